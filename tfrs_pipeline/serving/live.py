"""Items that are added, changed and removed while a model is in service.

Each write is checked, embedded by the exported item tower, put into the journal beside the
versions, and found by the next search. If a newer version has an item itself, the journal's
records of that item no longer count.
"""

import collections
import contextlib
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeAlias

import numpy as np

from tfrs_pipeline.data.ids import NO_ID, Ids
from tfrs_pipeline.features.encoding import raw_columns
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.raw import is_missing
from tfrs_pipeline.messages import plain
from tfrs_pipeline.model.encoder import ITEMS_PER_CALL
from tfrs_pipeline.retrieval import check_ids
from tfrs_pipeline.serving.candidates import MOST_PENDING, Candidates
from tfrs_pipeline.serving.journal import Journal, Record
from tfrs_pipeline.serving.searcher import build_in_subprocess

logger = logging.getLogger(__name__)

Item: TypeAlias = Mapping[str, Any]
"""An item: `item_id`, and raw values by column of the log's item table; None is missing."""

# The journal is rewritten when it is longer than this, and most of it is outdated.
_SMALL_JOURNAL_BYTES = 1 << 20

_Embed: TypeAlias = Callable[
    [Sequence[Any], Mapping[str, Sequence[Any]]], tuple[np.ndarray, np.ndarray]
]


class LiveItems:
    """Writes to the candidates of a loaded version; safe from several threads.

    Begins by applying the journal to the candidates. The version's items were read at `items_read`,
    in seconds since 1970: earlier writes of an item that the version has do not count. `embed`
    embeds ids with columns of raw `features`: vectors [n, D], is_known_item [n]. An index has
    `num_leaves` partitions; 0 is exact search.
    """

    def __init__(
        self,
        candidates: Candidates,
        journal: Journal,
        items_read: float,
        features: Sequence[Feature],
        filter_by: str | None,
        num_leaves: int,
        embed: _Embed,
    ) -> None:
        self._candidates, self._journal, self._items_read = candidates, journal, items_read
        self._features, self._filter, self._embed = tuple(features), filter_by, embed
        self._num_leaves = num_leaves
        self._own: Ids = candidates.corpus  # The version's own items.
        self._lock = threading.RLock()
        # What the journal says last of each id: the time of the write, and the item or None.
        self._last: dict[Any, tuple[float, Item | None]] = {}
        self._num_written = 0
        self._is_busy = threading.Lock()
        self.catch_up()

    def upsert(self, items: Sequence[Item]) -> int:
        """Adds items, or replaces them; see `LoadedRetriever.upsert`."""
        if isinstance(items, Mapping):
            raise ValueError(f"Items come in a list, also a single one: [{dict(items)!r:.200}]")
        return self._write([self._checked(item) for item in items], [])[0]

    def unknown_values(self, items: Sequence[Item]) -> list[str]:
        """Says which categories of items the model does not know, in lines; at most ten."""
        items = [self._checked(item) for item in items]  # As they are written: stripped.
        return [
            f"{feature.name} {item[feature.name]!r:.80} of item {plain(item['item_id'])} is "
            "unknown to the model: taken as missing"
            for feature in self._features
            for item in items
            if feature.holds_categories and feature.unknown([item[feature.name]])[0]
        ][:10]

    def remove(self, item_ids: Iterable[Any]) -> int:
        """Removes items; see `LoadedRetriever.remove`."""
        if isinstance(item_ids, str | int | np.integer):
            raise ValueError(f"item_ids must be a list. Received: {item_ids!r}")
        return self._write([], [self._checked_id(id_) for id_ in item_ids])[1]

    def _write(self, items: list[Item], gone: list[Any]) -> tuple[int, int]:
        """Writes and removes checked items; returns how many are new, and how many were there."""
        ids = [item["item_id"] for item in items]
        counts = collections.Counter([*ids, *gone])
        if twice := [id_ for id_, count in counts.items() if count > 1]:
            raise ValueError(f"Item {twice[0]!r} occurs more than once in one write.")
        embedded = self._embedded(items)
        with self._lock, self._journal.writing():
            self.catch_up()
            num_new = int((~self._candidates.has(ids)).sum())
            record = {"time": time.time(), "put": items, "gone": gone}
            self._journal.append(record)
            self._last |= self._changes(record)
            num_gone = self._candidates.change(ids, embedded, self._filter_column(items), gone)
            self._rewrite_if_long()
        self._maintain_if_needed()
        return num_new, num_gone

    def catch_up(self) -> None:
        """Takes in what other processes have written."""
        with self._lock:
            changed: dict[Any, tuple[float, Item | None]] = {}
            for record in self._journal.records():
                changed |= self._changes(record)
            # A rewritten journal is read from its start, and mostly repeats what is known.
            changed = {id_: x for id_, x in changed.items() if self._last.get(id_) != x}
            self._last |= changed
            wanted = {id_: x for id_, (at, x) in changed.items() if self._applies(id_, at)}
            items, embedded = self._embedded_again([x for x in wanted.values() if x is not None])
            gone = [id_ for id_, item in wanted.items() if item is None]
            if items or gone:
                ids = [item["item_id"] for item in items]
                self._candidates.change(ids, embedded, self._filter_column(items), gone)
        self._maintain_if_needed()

    def titles(self) -> dict[Any, str | None]:
        """Returns the titles of items that were written and not removed since, by id."""
        last = dict(self._last)  # Others may write meanwhile.
        return {id_: self.title_of(id_) for id_, (_, item) in last.items() if item is not None}

    def title_of(self, item_id: Any) -> str | None:
        """Returns the title that an item was written with, None if there is none that applies."""
        written, item = self._last.get(item_id, (0.0, None))
        if item is None or not self._applies(item_id, written):
            return None
        return None if item.get("title") is None else str(item["title"])

    def _applies(self, item_id: Any, written: float) -> bool:
        """Whether a write applies: not if the version has the item itself, and read it later."""
        return written >= self._items_read or not self._own.rows([item_id])[0]

    def _changes(self, record: Record) -> dict[Any, tuple[float, Item | None]]:
        """Returns time and item (None if removed) of each id in a record, and counts them."""
        written, gone = record["time"], record.get("gone", ())
        changes = {item["item_id"]: (written, item) for item in record.get("put", ())}
        self._num_written += len(changes) + len(gone)
        return {**changes, **dict.fromkeys(gone, (written, None))}

    def _rewrite_if_long(self) -> None:
        is_small = self._journal.path.stat().st_size < _SMALL_JOURNAL_BYTES
        if is_small or self._num_written < 2 * len(self._last):
            return
        self._last = {id_: x for id_, x in self._last.items() if self._applies(id_, x[0])}
        kept: dict[float, dict[str, list[Any]]] = {}
        for id_, (written, item) in self._last.items():
            record = kept.setdefault(written, {"put": [], "gone": []})
            record["gone" if item is None else "put"].append(id_ if item is None else item)
        self._journal.replace([{"time": at, **record} for at, record in sorted(kept.items())])
        self._num_written = len(self._last)
        logger.info("rewrote %s: %d items", self._journal.path, len(self._last))

    def _maintain_if_needed(self) -> None:
        """After many writes, lets the index take in new items or rebuilds it, in the background."""
        candidates = self._candidates
        is_needed = candidates.num_pending > MOST_PENDING or candidates.has_drifted
        if is_needed and self._is_busy.acquire(blocking=False):
            threading.Thread(target=self._maintain, name="live-items", daemon=True).start()

    def _maintain(self) -> None:
        try:
            self._candidates.take_in()
            if self._candidates.has_drifted:
                build = functools.partial(build_in_subprocess, num_leaves=self._num_leaves)
                self._candidates.rebuild(build if self._num_leaves else None)
                self._candidates.take_in()
        except Exception:  # Searches go on with the old index, and the next write tries again.
            logger.exception("cannot build the index anew")
        finally:
            self._is_busy.release()

    def _filter_column(self, items: Sequence[Item]) -> list[Any] | None:
        return None if self._filter is None else [item.get(self._filter) for item in items]

    def _columns(self, items: Sequence[Item]) -> dict[str, list[Any]]:
        columns = {}
        for feature in self._features:
            column = [item.get(feature.name) for item in items]
            if feature.is_time:
                column = [feature.parse(x) if isinstance(x, str) else x for x in column]
            columns[feature.name] = column
        return columns

    def _embedded(self, items: Sequence[Item]) -> np.ndarray:
        """Embeds checked items, or raises a `ValueError` that names the first that cannot be."""
        if not items:
            return self._candidates.vectors_of([])
        blocks = [
            self._embed([item["item_id"] for item in block], self._columns(block))
            for start in range(0, len(items), ITEMS_PER_CALL)
            for block in [items[start : start + ITEMS_PER_CALL]]
        ]
        vectors, is_known = map(np.concatenate, zip(*blocks, strict=True))
        wrong = ~np.isfinite(vectors).all(axis=1)
        if not self._features:  # A new item then has nothing to be embedded by.
            wrong |= ~is_known
        if wrong.any():
            why = "gives it no finite vector"
            if not self._features:
                why = "reads no item features, and its training did not have it"
            item_id = items[int(wrong.argmax())]["item_id"]
            raise ValueError(f"Item {item_id!r} cannot be embedded: the model {why}.")
        return vectors

    def _embedded_again(self, items: list[Item]) -> tuple[list[Item], np.ndarray]:
        """Embeds items of the journal, and leaves out those that only another version can embed."""
        with contextlib.suppress(ValueError):
            return items, self._embedded(items)
        fine, vectors = [], [self._embedded([])]
        for item in items:
            try:
                vectors.append(self._embedded([item]))
                fine.append(item)
            except ValueError as error:
                logger.warning("%s: %s It is left out.", self._journal.path, error)
        return fine, np.concatenate(vectors)

    def _checked(self, item: Item) -> dict[str, Any]:
        """Returns an item of plain values, or raises a `ValueError`."""
        if not isinstance(item, Mapping):
            raise ValueError(f"An item is a mapping, values by name. Received: {item!r:.200}")
        kinds = {feature.name: feature for feature in self._features}
        needed = dict.fromkeys(["item_id", *kinds, *([self._filter] if self._filter else [])])
        if missing := [name for name in needed if name not in item]:
            unknown = "" if "item_id" in missing else "; give None (null) where it is unknown"
            raise ValueError(
                f"An item lacks {', '.join(map(repr, missing))}, which the model reads{unknown}. "
                f"Received: {', '.join(map(str, item))}"
            )
        plain = {"item_id": self._checked_id(item["item_id"])}
        for name, value in item.items():
            if not isinstance(name, str):
                raise ValueError(f"An item's names are text. Received: {name!r}")
            if name != "item_id":
                plain[name] = _plain(f"{name!r} of item {plain['item_id']!r}", value)
                if name in kinds:
                    _check_kind(kinds[name], plain["item_id"], plain[name])
        raw_columns(self._features, self._columns([plain]), 1)
        return plain

    def _checked_id(self, id_: Any) -> Any:
        if is_id := not isinstance(id_, bool | np.bool_ | None):
            check_ids([[id_]], are_text=self._own.are_text)
            id_ = _plain("An id", id_)
        if not is_id or id_ == self._own.empty_id or id_ in NO_ID:
            raise ValueError(f"An item needs an id. Received: {id_!r}")
        if isinstance(id_, int) and not -(2**63) <= id_ < 2**63:
            raise ValueError(f"An id must be an int64. Received: {id_!r}")
        return id_


def _plain(what: str, value: Any) -> Any:
    """Converts a value to what JSON holds, or raises a `ValueError`."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        if any(isinstance(x, list | tuple | Mapping) for x in value):
            raise ValueError(f"{what} is a list of lists. Received: {value!r:.200}")
        return [_plain(what, x) for x in value]
    if is_missing(value):  # As a log's: None, or NaN in a table.
        return None
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError(f"{what} needs a time zone. Received: {value!r}")
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{what} must be finite, or None (null). Received: {value!r}")
    if isinstance(value, str):
        value = value.strip()
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{what} is no valid text. Received: {value!r:.200}") from None
    elif not isinstance(value, bool | int | float):
        raise ValueError(f"{what} must be text, a number, a list or None. Received: {value!r:.200}")
    return value


def _check_kind(feature: Feature, item_id: Any, value: Any) -> None:
    """Refuses text and booleans in place of numbers, and a list in place of one value."""
    wrong: tuple[type, ...] = (list,)
    needs = "text"
    if feature.is_time:
        wrong, needs = (bool, int, float, list), "text, ISO 8601 with a time zone"
    elif feature.raw_spec.dtype.is_floating:
        wrong, needs = (str, bool, list), "numbers"
    is_list, is_one = isinstance(value, list), feature.raw_shape == ()
    if (is_list and is_one) or any(isinstance(x, wrong) for x in (value if is_list else [value])):
        one = "one value" if is_one else "a list"
        raise ValueError(
            f"{feature.name!r} of item {item_id!r} takes {one} of {needs}. Received: {value!r:.200}"
        )
