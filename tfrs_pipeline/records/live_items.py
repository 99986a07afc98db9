"""Items that are added, changed and removed while a model is in service.

Each write is checked, embedded by the exported item tower, put into the store beside the versions,
and found by the next search.

A version takes the last write of an item

- if it was made after the reading of the version's items began;
- if it was made before, and no version had the item: so an item that was only ever written live
  stays until it is removed.

It drops an earlier write of an item that some version had: the version has the item itself, or the
item is gone.
"""

import collections
import contextlib
import functools
import itertools
import json
import logging
import math
import string
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from tfrs_pipeline.data.ids import NO_ID, check_length
from tfrs_pipeline.data.settings import Reading
from tfrs_pipeline.durable import StorageError
from tfrs_pipeline.features.encoding import raw_columns
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.kinds import features_of
from tfrs_pipeline.features.raw import is_missing
from tfrs_pipeline.messages import plain
from tfrs_pipeline.records.database import Database
from tfrs_pipeline.retrieval import check_collection, check_ids
from tfrs_pipeline.search.candidates import Candidates
from tfrs_pipeline.search.queries import Arrays
from tfrs_pipeline.search.searcher import SMALLEST_HASHED_CORPUS, build_in_subprocess

logger = logging.getLogger(__name__)

Item: TypeAlias = Mapping[str, Any]
"""An item: `item_id`, and raw values by column of the log's item table; None is missing."""

Embed: TypeAlias = Callable[[Sequence[Any], Arrays], tuple[np.ndarray, np.ndarray]]
"""Embeds items by ids and raw features: [n, D] float32, and if training had them, [n] bool."""

STORE_FILE = "live.sqlite"

_SCHEMA = """
PRAGMA journal_mode = WAL;  -- Readers and the writer do not wait for each other.
CREATE TABLE IF NOT EXISTS live_items (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- Rises with every write and is never reused.
    item_id NOT NULL UNIQUE,                -- INTEGER or TEXT; without a type, 7 and '7' differ.
    time REAL NOT NULL,                     -- When it was written, in seconds since 1970.
    is_listed INTEGER NOT NULL DEFAULT 0,   -- Whether a version had the item itself.
    item TEXT                               -- JSON; NULL if the item was removed.
);
PRAGMA application_id = 1;  -- The format of this table; the first files have no number, so 0.
"""
_MAX_NOTES = 10
# How long writes are kept that the version in use does not take, for older versions.
_KEPT_SECONDS = 30 * 86_400


class LiveRow(NamedTuple):
    """The last write of an item; see the table. The item is None if it was removed."""

    seq: int
    item_id: Any
    time: float
    is_listed: bool
    item: dict[str, Any] | None


class Store(Database):
    """The file of live items: a row for each item that was written, with its last write."""

    file_name, schema, formats, is_mirrored = STORE_FILE, _SCHEMA, (0, 1), True
    what_is_lost = ", and write the live items again"

    def items_after(self, seq: int) -> list[LiveRow]:
        """Reads the rows written after row `seq`, in the order of the writes."""
        query = f"SELECT {', '.join(LiveRow._fields)} FROM live_items WHERE seq > ? ORDER BY seq"
        with self._opened() as connection:
            rows = connection.execute(query, [seq]).fetchall() if connection else []
            return [LiveRow._make([*row[:-1], row[-1] and json.loads(row[-1])]) for row in rows]

    def write_items(
        self, items: Mapping[Any, Mapping[str, Any] | None], not_before: float = 0.0
    ) -> int:
        """Writes items by id, None for removed ones, in place of earlier writes of them.

        Their time is now, or `not_before`, in seconds since 1970, if that is later. Returns the
        last row's `seq`.
        """
        insert = "INSERT OR REPLACE INTO live_items (item_id, time, item) VALUES (?, ?, ?)"
        with self.writing() as connection:
            now = max(time.time(), not_before)
            rows = [(id_, now, item and json.dumps(item)) for id_, item in items.items()]
            connection.executemany(insert, rows)
            return int(connection.execute("SELECT max(seq) FROM live_items").fetchone()[0])

    def mark_listed(self, item_ids: Iterable[Any], over: Iterable[int] = ()) -> None:
        """Notes that a version has these items itself, and drops the rows `over`, by `seq`."""
        with self.writing() as connection:
            mark = "UPDATE live_items SET is_listed = 1 WHERE item_id = ?"
            connection.executemany(mark, [(id_,) for id_ in item_ids])
            connection.executemany("DELETE FROM live_items WHERE seq = ?", [(seq,) for seq in over])


@dataclass(frozen=True)
class Change:
    """A checked write: items with their vectors, [n, D] float32, and ids of items to remove."""

    items: Sequence[Item]
    vectors: np.ndarray
    removed: Sequence[Any]
    notes: Sequence[str]  # Which values the model does not know; at most ten lines.


class LiveItems:
    """Writes to the candidates of a loaded version; safe from several threads.

    Begins by taking in what the store holds, in the model's `folder`. `manifest` is the version's.
    `embed` embeds items. An index has `num_leaves` partitions; 0 is exact search.

    Attributes:
        folder: The model's folder.
        titles: The titles of the live items, or None, by id.
        path: The file of live items.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        candidates: Candidates,
        embed: Embed,
        num_leaves: int,
    ) -> None:
        self._store, self._candidates, self._embed = Store(folder), candidates, embed
        # When the reading of the version's items began, in seconds since 1970.
        self._items_read = datetime.fromisoformat(manifest["items_read"]).timestamp()
        self._features = features_of(manifest)["candidate"]
        self._filter = None if manifest["filter"] is None else manifest["filter"]["name"]
        self._separator = Reading(**manifest.get("reading", {})).list_separator
        self._num_leaves = num_leaves
        self._corpus = candidates.corpus  # The items that the version was exported with.
        self.folder, self.path = folder, self._store.path
        self._lock = threading.RLock()
        self._seq = 0  # The last row of the store that the candidates hold.
        self.titles: dict[Any, str | None] = {}
        self._removed: set[Any] = set()
        self._is_busy = threading.Lock()
        self.catch_up()

    def prepare(self, items: Sequence[Item] = (), removed: Collection[Any] = ()) -> Change:
        """Checks and embeds a write, without a lock; see `LoadedRetriever.upsert`."""
        if isinstance(items, Mapping):
            raise ValueError(f"Items come in a list, also a single one: [{dict(items)!r:.200}]")
        check_collection("item_ids", removed)
        items, removed = list(map(self._checked, items)), list(map(self._checked_id, removed))
        counts = collections.Counter([*(item["item_id"] for item in items), *removed])
        if twice := [id_ for id_, count in counts.items() if count > 1]:
            raise ValueError(f"Item {twice[0]!r} occurs more than once in one write.")
        raw = self._raw(items)
        return Change(items, self._embedded(items, raw), removed, self._notes(items, raw))

    def was_removed(self, item_id: Any) -> bool:
        """Returns whether an item's last write removed it."""
        return item_id in self._removed

    def violations(self) -> Iterator[str]:
        """Yields live items that the candidates lack, and removed ones that they hold."""
        with self._lock:
            for ids, is_right, what in (
                ([*self.titles], True, "was written, and is not found"),
                ([*self._removed], False, "was removed, and is still found"),
            ):
                is_wrong = self._candidates.has(ids) != is_right if ids else ()
                yield from (
                    f"live item {id_!r} {what}" for id_ in itertools.compress(ids, is_wrong)
                )

    def write(self, change: Change) -> tuple[int, int]:
        """Writes what `prepare` returned; returns how many items are new, and how many are gone.

        If this raises, nothing is written. The change must have been prepared by this version:
        another one has other vectors.
        """
        rows = {item["item_id"]: item for item in change.items} | dict.fromkeys(change.removed)
        if not rows:
            return 0, 0
        with self._lock:
            self.catch_up()  # Before the transaction, which should be short.
            with self._store.writing():
                self.catch_up()  # To what others have written meanwhile.
                is_there = self._candidates.has(rows)
                # A write is never earlier than the reading of the items, whatever the clocks say.
                last = self._store.write_items(rows, self._items_read)
                corpus_rows = zip(rows, self._corpus.rows(rows), strict=True)
                self._store.mark_listed(id_ for id_, row in corpus_rows if row)
            try:
                self._apply(change.items, change.vectors, change.removed)
                self._seq = last
                self._maintain_if_needed()
            except Exception:  # Not raised again: the write is on disk, so it has not failed.
                logger.exception("a write is on disk, but not in service until the next look")
        num = len(change.items)
        return int((~is_there[:num]).sum()), int(is_there[num:].sum())

    def catch_up(self) -> None:
        """Takes in what other processes have written."""
        with self._lock:
            if rows := self._store.items_after(self._seq):
                pairs = zip(rows, self._corpus.rows([row.item_id for row in rows]), strict=True)
                listed = {row.seq for row, corpus_row in pairs if corpus_row or row.is_listed}
                # Of the writes before the reading, only those count whose item no version had.
                wanted = [
                    row for row in rows if row.time >= self._items_read or row.seq not in listed
                ]
                items = [row.item for row in wanted if row.item is not None]
                removed = [row.item_id for row in wanted if row.item is None]
                self._apply(*self._embedded_again(items), removed)
                self._seq = rows[-1].seq
                self._tidy(rows, listed)
            self._maintain_if_needed()

    def _tidy(self, rows: Sequence[LiveRow], listed: Collection[int]) -> None:
        """Marks rows of items that the version has itself, and drops old rows that no one needs."""
        until = min(self._items_read, time.time() - _KEPT_SECONDS)
        new = [row.item_id for row in rows if row.seq in listed and not row.is_listed]
        before = (row for row in rows if row.time < until)
        old = [row.seq for row in before if row.seq in listed or row.item is None]
        if new or old:
            with contextlib.suppress(StorageError):  # If the folder may only be read.
                self._store.mark_listed(new, old)

    def _apply(self, items: Sequence[Item], vectors: np.ndarray, removed: Sequence[Any]) -> None:
        ids = [item["item_id"] for item in items]
        column = None if self._filter is None else [item.get(self._filter) for item in items]
        self._candidates.change(ids, vectors, column, removed)
        titles = {item["item_id"]: item.get("title") for item in items}
        self.titles |= {id_: None if title is None else str(title) for id_, title in titles.items()}
        self._removed = self._removed.difference(ids).union(removed)
        for id_ in removed:
            self.titles.pop(id_, None)

    def _maintain_if_needed(self) -> None:
        """Builds the index anew in the background, if many writes or a failed one call for it."""
        if self._candidates.has_drifted and self._is_busy.acquire(blocking=False):
            threading.Thread(target=self._maintain, name="live-items", daemon=True).start()

    def _maintain(self) -> None:
        try:
            build = functools.partial(build_in_subprocess, num_leaves=self._num_leaves)
            # ScaNN cannot build an index of so few candidates. Exact search is as fast for them.
            is_few = len(self._candidates) < max(self._num_leaves, SMALLEST_HASHED_CORPUS)
            self._candidates.rebuild(None if is_few or not self._num_leaves else build)
        except Exception:  # Searches go on with the old index, and the next write tries again.
            logger.exception("cannot build the index anew")
        finally:
            self._is_busy.release()

    def _raw(self, items: Sequence[Item]) -> dict[str, np.ndarray]:
        columns = {}
        for feature in self._features:
            column = [item.get(feature.name) for item in items]
            if feature.is_time:
                column = [
                    feature.parse(value) if isinstance(value, str) else value for value in column
                ]
            columns[feature.name] = column
        return raw_columns(self._features, columns, len(items))

    def _notes(self, items: Sequence[Item], raw: Mapping[str, np.ndarray]) -> list[str]:
        """Says which categories of items the model does not know."""
        return [
            f"{feature.name} {item[feature.name]!r:.80} of item {plain(item['item_id'])} is "
            "unknown to the model: taken as missing"
            for feature in self._features
            if feature.holds_categories
            for item, is_unknown in zip(items, feature.unknown(raw[feature.name]), strict=True)
            if is_unknown
        ][:_MAX_NOTES]

    def _embedded(self, items: Sequence[Item], raw: Mapping[str, np.ndarray]) -> np.ndarray:
        """Embeds checked items, or raises a `ValueError` that names the first that cannot be."""
        if not items:
            return self._candidates.vectors_of([])
        ids = [item["item_id"] for item in items]
        vectors, is_known = self._embed(ids, raw)
        wrong = ~np.isfinite(vectors).all(axis=1)
        if not self._features:  # A new item then has nothing to be embedded by.
            wrong |= ~is_known
        if wrong.any():
            why = "gives it no finite vector"
            if not self._features:
                why = "reads no item features, and its training did not have it"
            item_id = ids[int(wrong.argmax())]
            raise ValueError(f"Item {item_id!r} cannot be embedded: the model {why}.")
        return vectors

    def _embedded_again(self, items: Sequence[Item]) -> tuple[Sequence[Item], np.ndarray]:
        """Embeds items of the store, and leaves out those that only another version can embed."""
        with contextlib.suppress(ValueError):
            return items, self._embedded(items, self._raw(items))
        # One item of the block was refused. Each alone is slow, but shows which one.
        fine, vectors = [], [self._embedded([], {})]
        for item in items:
            try:
                vectors.append(self._embedded([item], self._raw([item])))
                fine.append(item)
            except ValueError as error:
                logger.warning("%s: %s It is left out.", self._store.path, error)
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
        checked = {"item_id": self._checked_id(item["item_id"])}
        for name, value in item.items():
            if not isinstance(name, str):
                raise ValueError(f"An item's names are text. Received: {name!r}")
            if name == "item_id":
                continue
            value = _plain(f"{name!r} of item {checked['item_id']!r}", value)
            if (feature := kinds.get(name)) is not None:
                if isinstance(value, str) and feature.raw_dtype == "string" and feature.raw_shape:
                    # Several values in one text are split as in the log's files.
                    parts = (part.strip(string.whitespace) for part in value.split(self._separator))
                    value = [part for part in parts if part]
                _check_kind(feature, checked["item_id"], value)
            checked[name] = value
        return checked

    def _checked_id(self, id_: Any) -> Any:
        # Python counts True as the integer 1, so booleans are refused before the check of types.
        if is_id := not isinstance(id_, bool | np.bool_ | None):
            check_ids([[id_]], are_text=self._corpus.are_text)
            id_ = _plain("An id", id_)
            check_length(str(id_))
        if not is_id or id_ == self._corpus.empty_id or id_ in NO_ID:
            raise ValueError(f"An item needs an id. Received: {id_!r}")
        if isinstance(id_, int) and not -(2**63) <= id_ < 2**63:
            raise ValueError(f"An id must be an int64. Received: {id_!r}")
        return id_


def _plain(what: str, value: Any) -> Any:
    """Converts a value to what JSON holds, or raises a `ValueError`."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        if any(isinstance(entry, list | tuple | Mapping) for entry in value):
            raise ValueError(f"{what} is a list of lists. Received: {value!r:.200}")
        return [_plain(what, entry) for entry in value]
    if is_missing(value):  # As in a log: None, or NaN from a table.
        return None
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError(f"{what} needs a time zone. Received: {value!r}")
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{what} must be finite, or None (null). Received: {value!r}")
    if isinstance(value, str):
        value = value.strip(string.whitespace)  # As in a log, which keeps other spaces.
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
    elif feature.raw_dtype.startswith("float"):
        wrong, needs = (str, bool, list), "numbers"
    is_list, is_one = isinstance(value, list), feature.raw_shape == ()
    entries = value if is_list else [value]
    if (is_list and is_one) or any(isinstance(entry, wrong) for entry in entries):
        one = "one value" if is_one else "a list"
        raise ValueError(
            f"{feature.name!r} of item {item_id!r} takes {one} of {needs}. Received: {value!r:.200}"
        )
