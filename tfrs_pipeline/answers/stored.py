"""What a version holds of users and items, as arrays in files that are mapped, not read.

Several processes share the pages of a mapped file, and a page that nobody asks for costs no memory.
"""

import bisect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tfrs_pipeline.data.ids import Ids, parse_id
from tfrs_pipeline.retrieval import check_ids
from tfrs_pipeline.samples.store import RowLists
from tfrs_pipeline.search.item_graph import ItemGraph

_SORTED, _ROWS, _BYTES, _OFFSETS = "sorted", "rows", "bytes", "offsets"
_LISTS = "histories", "known", "disliked"
_TIMES, _COLUMN = "history_times", "feature_{}"


def write_array(folder: Path, name: str, values: np.ndarray) -> None:
    """Writes an array into a folder of mapped ones."""
    np.save(folder / f"{name}.npy", np.ascontiguousarray(values))


def read_array(folder: Path, name: str) -> np.ndarray:
    """Maps an array that `write_array` wrote."""
    path = folder / f"{name}.npy"
    # A plain view: indexing NumPy's class of mapped arrays takes several times as long.
    return np.asarray(np.load(path, mmap_mode="r"))


class MappedIds:
    """Distinct ids in files, sorted, with the row of each: what `Ids` is in memory.

    A look-up costs a binary search, so it suits few ids at a time, such as the users of a request.
    """

    def __init__(self, folder: Path, name: str, are_text: bool) -> None:
        self.are_text = are_text
        self._rows = read_array(folder, f"{name}_{_ROWS}")
        if are_text:
            self._bytes = read_array(folder, f"{name}_{_BYTES}")
            self._offsets = read_array(folder, f"{name}_{_OFFSETS}")
        else:
            self._sorted = read_array(folder, f"{name}_{_SORTED}")

    def __len__(self) -> int:
        return len(self._rows)

    @staticmethod
    def write(folder: Path, name: str, ids: np.ndarray) -> None:
        """Writes [n] distinct int64, or str in an object array, in the order of their rows."""
        if ids.dtype == np.int64:
            order = np.argsort(ids)
            write_array(folder, f"{name}_{_SORTED}", ids[order])
        else:
            texts = [id_.encode() for id_ in ids.tolist()]
            order = np.array(sorted(range(len(texts)), key=texts.__getitem__), np.int64)
            ordered = [texts[position] for position in order]
            offsets = np.cumsum([0, *map(len, ordered)], dtype=np.int64)
            write_array(folder, f"{name}_{_BYTES}", np.frombuffer(b"".join(ordered), np.uint8))
            write_array(folder, f"{name}_{_OFFSETS}", offsets)
        write_array(folder, f"{name}_{_ROWS}", (order + 1).astype(np.int32))

    def rows(self, values: Iterable[Any] | np.ndarray) -> np.ndarray:
        """Looks up the rows of ids: [n] int32 in their order, 0 where unknown."""
        listed = values.tolist() if isinstance(values, np.ndarray) else list(values)
        return np.fromiter(map(self._row, listed), np.int32, len(listed))

    def _row(self, id_: Any) -> int:
        if not self.are_text:
            if id_ is None or not -(2**63) <= id_ < 2**63:
                return 0
            position = int(np.searchsorted(self._sorted, id_))
            is_there = position < len(self) and self._sorted[position] == id_
        else:
            wanted = (id_ or "").encode(errors="surrogatepass")
            position = bisect.bisect_left(range(len(self)), wanted, key=self._text)
            is_there = position < len(self) and self._text(position) == wanted
        return int(self._rows[position]) if is_there else 0

    def _text(self, position: int) -> bytes:
        return self._bytes[self._offsets[position] : self._offsets[position + 1]].tobytes()

    def values(self) -> list[Any]:
        """Returns all ids, in the order of their rows."""
        if self.are_text:
            ordered = [self._text(position).decode() for position in range(len(self))]
            return [ordered[position] for position in np.argsort(self._rows)]
        return list(self._sorted[np.argsort(self._rows)].tolist())


class Stored:
    """What a version holds of the users and items of its training.

    Lists are by the user's row; row 0, an unknown user, has empty ones.

    Attributes:
        users, items: Their ids.
        columns: Encoded features of the users by name, from row 1.
        reads_times: Whether histories have times.
        graph: What people took near each item.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        about = manifest["stored"]
        self.items = Ids(MappedIds(folder, "items", about["items_are_text"]).values())
        self.users = MappedIds(folder, "users", about["users_are_text"])
        self._histories, self._known, self._disliked = (
            RowLists(read_array(folder, f"{name}_{_OFFSETS}"), read_array(folder, name))
            for name in _LISTS
        )
        self.graph = ItemGraph(
            about["graph"],
            RowLists(read_array(folder, f"graph_{_OFFSETS}"), read_array(folder, "graph_rows")),
            read_array(folder, "graph_counts"),
            read_array(folder, "graph_totals"),
        )
        self.reads_times = about["reads_times"]
        self._times = read_array(folder, _TIMES) if self.reads_times else None
        self.columns = {
            name: read_array(folder, _COLUMN.format(number))
            for number, name in enumerate(about["user_features"])
        }

    @staticmethod
    def write(
        folder: Path,
        *,
        user_ids: np.ndarray,
        item_ids: np.ndarray,
        lists: Mapping[str, RowLists],
        times: np.ndarray | None,
        columns: Mapping[str, np.ndarray],
        graph: ItemGraph,
    ) -> None:
        """Writes the files.

        `lists` are the histories, most recent first, and the `known` and `disliked` items of each
        user row from 0; `times` are those of the histories' values.
        """
        MappedIds.write(folder, "items", item_ids)
        MappedIds.write(folder, "users", user_ids)
        for name in _LISTS:
            write_array(folder, name, lists[name].values.astype(np.int32))
            write_array(folder, f"{name}_{_OFFSETS}", lists[name].offsets)
        if times is not None:
            write_array(folder, _TIMES, np.asarray(times, np.float64))
        for number, values in enumerate(columns.values()):
            write_array(folder, _COLUMN.format(number), values)
        write_array(folder, f"graph_{_OFFSETS}", graph.neighbours.offsets)
        write_array(folder, "graph_rows", graph.neighbours.values)
        write_array(folder, "graph_counts", graph.counts)
        write_array(folder, "graph_totals", graph.totals)

    def parse_id(self, text: str, of: Literal["user", "item"] = "item") -> Any:
        """Parses a typed id into the type of the model's ids, or raises a `ValueError`."""
        are_text = (self.users if of == "user" else self.items).are_text
        return parse_id(text, are_text=are_text, of=of)

    def user_rows(self, user_ids: Sequence[Any]) -> list[int]:
        """Looks up users; raises a `ValueError` if an id has another type."""
        check_ids([user_ids], are_text=self.users.are_text)
        return list(self.users.rows(user_ids).tolist())

    def has_items(self, item_ids: Sequence[Any]) -> np.ndarray:
        """Returns which items the training had, [n] bool; raises as `user_rows`."""
        check_ids([item_ids], are_text=self.items.are_text)
        return self.items.rows(item_ids) > 0

    def history(self, row: int) -> tuple[list[Any], np.ndarray]:
        """Returns what a user clicked, oldest first, without items that the training did not have.

        Ids, and their times, [n] float64 seconds since 1970, NaN where unknown.
        """
        rows, start, end = self._histories[row], *self._histories.offsets[row : row + 2]
        times = np.full(len(rows), np.nan) if self._times is None else self._times[start:end]
        return self._ids(rows)[::-1], times[rows > 0][::-1]

    def known(self, row: int) -> list[Any]:
        """Returns what a user clicked; if the version was trained with `seen`, what they saw."""
        return self._ids(self._known[row])

    @property
    def has_dislikes(self) -> bool:
        """Whether any user disliked anything in the training's log."""
        return bool(len(self._disliked.values))

    def disliked(self, row: int) -> list[Any]:
        """Returns what a user disliked in the training's log."""
        return self._ids(self._disliked[row])

    def _ids(self, rows: np.ndarray) -> list[Any]:
        return list(self.items.values[rows[rows > 0] - 1].tolist())
