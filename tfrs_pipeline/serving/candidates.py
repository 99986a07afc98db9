"""Search over candidates in memory: with an index or exactly, with exclusions and a filter.

Candidates can be added and removed while others search. A change writes rows that no search reads
yet, and then makes a new view. Each search keeps the view that it began with.
"""

import bisect
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tfrs_pipeline.data.ids import Ids, as_id_array
from tfrs_pipeline.evaluation.topk import top_k_in_blocks
from tfrs_pipeline.features.raw import has_booleans, padded, to_text, to_text_lists
from tfrs_pipeline.serving.index import Level
from tfrs_pipeline.serving.searcher import Searcher, View, with_room


class FilterValues:
    """The values by which requests may choose candidates, and how often each occurs.

    `values` have the codes 1, 2, ...; new values get the next ones. `codes` are those of all rows.
    """

    def __init__(self, values: Sequence[str], codes: np.ndarray) -> None:
        self.code_of = {value: code for code, value in enumerate(values, 1)}
        self._counts = np.bincount(codes.ravel(), minlength=len(values) + 1)

    def encode(self, column: Sequence[Any]) -> np.ndarray:
        """Returns the codes of new rows' values, [n, any] int32 padded with 0; learns new ones."""
        code_of, lists = self.code_of, padded(*to_text_lists(column)).tolist()
        codes = [
            [code_of.setdefault(x, len(code_of) + 1) for x in dict.fromkeys(values) if x]
            for values in lists
        ]
        rows = np.zeros((len(codes), max([1, *map(len, codes)])), np.int32)
        for row, of_row in zip(rows, codes, strict=True):
            row[: len(of_row)] = of_row
        counts = np.bincount(rows.ravel(), minlength=len(self.code_of) + 1)
        counts[: len(self._counts)] += self._counts
        self._counts = counts
        return rows

    def choose(self, values: Iterable[Any], num_rows: int) -> "Chosen | None":
        """Chooses candidates with one of the values; None, which allows all, if there are none."""
        texts = [value for value in values if value not in ("", b"")]
        if not texts:
            return None
        lower = has_booleans(self.code_of)
        codes = [self.code_of.get(to_text(text) if lower else text, 0) for text in texts]
        # Sized after the codes are known, because another thread may add some meanwhile.
        counts, table = self._counts, np.zeros(len(self.code_of) + 1, bool)
        table[codes] = True
        table[0] = False  # Padding, and values that no item has.
        # This counts candidates with two of the values twice.
        share = counts[table[: len(counts)].nonzero()].sum() / max(1, num_rows)
        return Chosen(table, min(1.0, float(share)))


@dataclass(frozen=True)
class Chosen:
    """Which codes a query allows, [num_codes + 1] bool, and the rough share of their candidates."""

    table: np.ndarray
    share: float

    def has(self, codes: np.ndarray) -> np.ndarray:
        """Returns which rows' codes, [n, P], are chosen: [n] bool."""
        # A column at a time: all at once would take P times the memory.
        found = self.table[codes[:, 0]]
        for column in codes.T[1:]:
            found |= self.table[column]
        return found


# Up to this many of the newest candidates are scored exactly. More are added to the index.
MOST_PENDING = 1024
_ADDED_AT_ONCE = 8  # So that searches go on in between.
# The index is rebuilt after more changes than this number and than this share of its candidates.
_LEAST_CHANGES, _LEAST_CHANGED_SHARE = 2_000, 0.3
_NO_ROWS = np.zeros(0, np.int32)
_of_thread = threading.local()  # Each thread marks what a query excludes.


class Candidates:
    """Candidates by id, [n], their vectors, [n, D] float32, and the searches over them.

    `searcher` is an index of the vectors; without one, searches are exact. `levels` say how widely
    to search it, by ascending depth; deeper requests are answered exactly. If there is a filter,
    requests choose by `values`; `codes`, [n, P] int32 padded with 0, are those of each candidate.
    """

    def __init__(
        self,
        ids: Collection[Any] | np.ndarray,
        vectors: np.ndarray,
        searcher: Searcher | None = None,
        levels: Sequence[Level] = (),
        values: FilterValues | None = None,
        codes: np.ndarray | None = None,
    ) -> None:
        corpus = Ids(ids)
        by_row = corpus.take(np.arange(len(corpus) + 1))
        if codes is not None:
            codes = np.pad(codes, [[1, 0], [0, 0]])
        self.values = values
        self._view = View(
            *(corpus, by_row, vectors, codes, None, searcher, tuple(levels)), num_rows=len(corpus)
        )
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return self._view.num_candidates

    @property
    def corpus(self) -> Ids:
        """The ids at the start, or at the last `rebuild`."""
        return self._view.corpus

    @property
    def has_drifted(self) -> bool:
        """Whether so much has changed since the index was built that it should be rebuilt."""
        view, num_built = self._view, len(self._view.corpus)
        num_changed = max(view.num_rows - num_built, view.num_removed)
        return num_changed > max(_LEAST_CHANGES, _LEAST_CHANGED_SHARE * num_built)

    @property
    def num_pending(self) -> int:
        """Number of candidates that the index has not taken in yet."""
        view = self._view
        return 0 if view.searcher is None else view.num_rows - view.searcher.num_rows

    def has(self, ids: Collection[Any]) -> np.ndarray:
        """Returns which ids are candidates now, [n] bool."""
        return np.fromiter(map(self._view.row_of, ids), bool)

    def ids_and_vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the candidates of one moment: ids [n], and vectors [n, D] float32."""
        view = self._view
        rows = view.live_rows()
        return view.ids[rows], view.vectors[rows - 1]

    def vectors_of(self, ids: Sequence[Any]) -> np.ndarray:
        """Returns a copy of some candidates' vectors; a `KeyError` if one is not there."""
        view = self._view
        rows = np.fromiter(map(view.row_of, ids), np.int32)
        if not rows.all():
            raise KeyError(ids[int(np.flatnonzero(rows == 0)[0])])
        return view.vectors[rows - 1]

    def search(
        self,
        queries: np.ndarray,
        k: int,
        excluded: Sequence[Collection[Any]] | None = None,
        allowed: Sequence[Iterable[Any]] | None = None,
        *,
        exact: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Finds the k best candidates of [B, D] finite float32 queries; with `exact`, scores all.

        A query never gets its `excluded` ids, only candidates with one of its `allowed` values; an
        empty list allows all. Exact search returns the first of equal candidates. Returns ids
        [B, k], best first, the empty id in empty slots, and scores [B, k] float32, -inf there.
        """
        view, num = self._view, len(queries)
        is_plain = num > 0 and allowed is None and (excluded is None or not any(map(len, excluded)))
        if is_plain and not exact and (found := _found_at_once(view, queries, k)) is not None:
            return found
        excluded = [()] * num if excluded is None else excluded
        lists = [view.rows_of(ids) if len(ids) else _NO_ROWS for ids in excluded]
        chosen: list[Chosen | None] = [None] * num
        if allowed is not None and self.values is not None:
            chosen = [self.values.choose(values, len(self)) for values in allowed]
        asked = _Search(view, queries, k, lists, chosen)
        levels = np.full(num, len(view.levels)) if exact else asked.levels()
        for number, level in enumerate(view.levels):
            if len(lines := np.flatnonzero(levels == number)):
                levels[lines] = asked.approximate(level, lines)
        if len(lines := np.flatnonzero(levels == len(view.levels))):
            asked.score_all(lines)
        return view.ids[asked.rows], asked.scores

    def change(
        self,
        ids: Sequence[Any],
        vectors: np.ndarray,
        column: Sequence[Any] | None = None,
        removed: Iterable[Any] = (),
    ) -> int:
        """Adds or replaces candidates, and removes others, in one change for all later searches.

        Ids are distinct; `vectors` are [n, D] float32, and `column` has the [n] values of a filter.
        Returns how many of `removed` were candidates; unknown ids are ignored.
        """
        with self._lock:
            view, num = self._view, len(ids)
            gone = list(filter(None, map(view.row_of, ids)))
            num_replaced = len(gone)
            gone += filter(None, map(view.row_of, removed))
            codes = None if self.values is None else self.values.encode(column or [None] * num)
            view = with_room(view, num, 0 if codes is None else codes.shape[1], removes=bool(gone))
            first, last = view.num_rows + 1, view.num_rows + num
            view.ids[first : last + 1] = as_id_array(ids) if num else []
            view.vectors[first - 1 : last] = vectors
            if codes is not None and view.codes is not None:
                view.codes[first : last + 1, : codes.shape[1]] = codes
            for row, id_ in enumerate(ids, first):
                view.new_rows.setdefault(id_, []).append(row)
            if view.removed_by is not None:
                view.removed_by[gone] = view.num_changes + 1
            self._view = replace(
                view,
                num_rows=last,
                num_removed=view.num_removed + len(gone),
                num_changes=view.num_changes + 1,
            )
            return len(gone) - num_replaced

    def take_in(self) -> None:
        """Adds new candidates to the index, a few at a time, so that searches go on in between."""
        while (view := self._view).searcher is not None:
            first = view.searcher.num_rows
            last = min(first + _ADDED_AT_ONCE, view.num_rows)
            if first >= last:
                return
            view.searcher.add(view.vectors[first:last])

    def rebuild(self, build: Callable[[np.ndarray], Searcher] | None) -> None:
        """Drops removed rows, and builds the index of the rest anew; no `build` means no index.

        Changes made meanwhile are kept.
        """
        view = self._view
        rows = view.live_rows()
        ids, vectors = view.ids[rows], view.vectors[rows - 1]
        corpus, searcher = Ids(ids), None if build is None else build(vectors)
        with self._lock:
            now, num = self._view, len(rows)
            later = np.arange(view.num_rows + 1, now.num_rows + 1)
            all_rows = np.concatenate([[0], rows, later])
            removed_by = None if now.removed_by is None else now.removed_by[all_rows]
            new_rows = {
                id_: [row - view.num_rows + num for row in of_id if row > view.num_rows]
                for id_, of_id in now.new_rows.items()
            }
            self._view = replace(
                now,
                corpus=corpus,
                ids=now.ids[all_rows],
                vectors=np.concatenate([vectors, now.vectors[later - 1]]),
                codes=None if now.codes is None else now.codes[all_rows],
                removed_by=removed_by,
                searcher=searcher,
                num_rows=num + len(later),
                num_removed=0 if removed_by is None else int((removed_by <= now.num_changes).sum()),
                new_rows={id_: of_id for id_, of_id in new_rows.items() if of_id},
            )


@dataclass
class _Search:
    """Queries, the rows that each excludes, what it allows (None is all), and what is found."""

    view: View
    queries: np.ndarray
    k: int
    excluded: Sequence[np.ndarray]
    chosen: Sequence[Chosen | None]

    def __post_init__(self) -> None:
        shape = len(self.queries), self.k
        self.rows, self.scores = np.zeros(shape, np.int32), np.full(shape, -np.inf, np.float32)
        self.num_excluded = np.array([len(x) for x in self.excluded], np.int64)
        self.depths = [level.depth for level in self.view.levels]
        # What an answer of the index must have. If less is left, exact search says so.
        self.num_wanted = min(self.k, self.view.num_candidates)

    def levels(self) -> np.ndarray:
        """Returns each query's level; a number past the last one means exact search."""
        view = self.view
        if view.searcher is None:
            return np.full(len(self.queries), len(view.levels))
        needed = (self.num_wanted + self.num_excluded).astype(np.float64)
        share = np.array([1.0 if x is None else x.share for x in self.chosen])
        share *= view.num_candidates / max(1, view.num_rows)
        is_part = share < 1
        needed[is_part] = _depth(needed[is_part], share[is_part])
        return np.searchsorted(self.depths, needed)

    def approximate(self, level: Level, lines: np.ndarray) -> np.ndarray:
        """Asks the index for the best of some queries, and keeps each answer that it can fill.

        Returns the level at which to ask again for the others, [n], and -1 for those answered. The
        best candidates of the others lie deeper in the index. Pending candidates may be far away
        and do not make up for them.
        """
        view, wanted, top = self.view, self.num_wanted, slice(self.num_wanted)
        assert view.searcher is not None
        found, found_scores, num_indexed = view.searcher.search(self.queries[lines], level)
        is_whole = num_indexed == view.num_rows and view.removed_by is None
        pending = np.arange(num_indexed + 1, view.num_rows + 1, dtype=np.int32)
        vectors = view.vectors[num_indexed : view.num_rows]
        next_levels = np.full(len(lines), -1)
        for i, line in enumerate(lines):
            best, best_scores = found[i], found_scores[i]
            if not is_whole or len(self.excluded[line]) or self.chosen[line] is not None:
                is_open = self._open(line, best)
                best, best_scores = best[is_open], best_scores[is_open]
            if (num_found := int((best > 0).sum())) < wanted:
                depth = _depth(wanted, max(num_found, 1) / level.depth)
                next_levels[i] = np.searchsorted(self.depths, depth)
                continue
            if len(pending):
                is_open = self._open(line, pending)
                best = np.concatenate([best, pending[is_open]])
                new_scores = np.vecdot(vectors, self.queries[line])
                best_scores = np.concatenate([best_scores, new_scores[is_open]])
                order = np.argsort(-best_scores, kind="stable")
                best, best_scores = best[order], best_scores[order]
            self.rows[line, top], self.scores[line, top] = best[top], best_scores[top]
        return next_levels

    def _open(self, line: int, rows: np.ndarray) -> np.ndarray:
        """Returns which rows, [n], a query may return: [n] bool."""
        view, excluded, chosen = self.view, self.excluded[line], self.chosen[line]
        rows = rows * (rows <= view.num_rows)  # Newer ones, which the index may have, become 0.
        is_open = rows > 0
        if view.removed_by is not None:
            is_open &= ~view.is_removed(rows)
        if len(excluded):
            marks: np.ndarray = getattr(_of_thread, "marks", _NO_ROWS)
            if len(marks) < len(view.ids):
                marks = _of_thread.marks = np.zeros(len(view.ids), bool)
            marks[excluded] = True
            is_open &= ~marks[rows]
            marks[excluded] = False
        if chosen is not None:
            assert view.codes is not None
            is_open &= chosen.has(view.codes[rows])
        return is_open

    def score_all(self, lines: np.ndarray) -> None:
        """Scores all candidates for some queries."""
        view, num = self.view, self.view.num_rows
        vectors, excluded = view.vectors[:num], [self.excluded[line] for line in lines]

        def score(block: slice) -> np.ndarray:
            queries = self.queries[lines[block]]
            # A single query is scored in one thread: the threads of a matrix product wait for each
            # other, which takes a hundred times as long while other processes work.
            is_one = len(queries) == 1
            found = np.vecdot(vectors, queries)[np.newaxis] if is_one else (vectors @ queries.T).T
            if view.removed_by is not None:
                found[:, view.removed_by[1 : num + 1] <= view.num_changes] = -np.inf
            for of_line, line in zip(found, lines[block], strict=True):
                if (chosen := self.chosen[line]) is not None:
                    assert view.codes is not None
                    of_line[~chosen.has(view.codes[1 : num + 1])] = -np.inf
            return found

        best = top_k_in_blocks(score, len(lines), num, self.k, excluded)
        self.rows[lines], self.scores[lines] = best


def _depth(num_wanted: Any, share: Any) -> Any:
    """Returns how deep to search for so many candidates if a share of all is open to a query."""
    # With three standard deviations more, there are nearly always enough.
    return (num_wanted + 3 * np.sqrt(num_wanted)) / np.maximum(share, 1e-9)


def _found_at_once(view: View, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Answers queries without limits by the index alone if it holds the whole view, else None."""
    searcher, levels = view.searcher, view.levels
    if searcher is None or view.removed_by is not None or searcher.num_rows != view.num_rows:
        return None
    place = bisect.bisect_left(levels, min(k, view.num_rows), key=lambda level: level.depth)
    if place == len(levels) or levels[place].depth < k:
        return None
    rows, scores, num_rows = searcher.search(queries, levels[place])
    rows, scores = rows[:, :k], scores[:, :k]
    is_full = num_rows == view.num_rows and rows[:, -1].all()
    return (view.ids[rows], scores) if is_full else None
