"""Raw queries become the encoded inputs of a query tower: in one place, in NumPy.

A query passes three forms. `Query` mappings hold what a caller knows. `read` makes raw arrays of
them, which are also what a request over HTTP brings. `encode` makes the inputs of the tower: rows,
relative times and encoded features.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.features.encoding import (
    TIMESTAMP,
    encode_raw,
    encode_requests,
    raw_columns,
    raw_requests,
    raw_signature,
    request_signature,
)
from tfrs_pipeline.features.feature import Feature, Spec
from tfrs_pipeline.features.raw import MAX_SECONDS, relative_seconds, to_seconds
from tfrs_pipeline.retrieval import HISTORY_TIMESTAMPS, Query, check_ids, history_of

Arrays: TypeAlias = Mapping[str, np.ndarray]

USER_FEATURES, REQUEST_FEATURES, CANDIDATE_FEATURES = "query", "request", "candidate"
# The inputs of a query tower; an encoded feature has the second prefix before its name.
QUERY_ROWS, HISTORY_ROWS, HISTORY_TIMES = "query_rows", "history_rows", "history_times"
CANDIDATE_ROWS, FEATURE = "candidate_rows", "feature "
# How a function names its inputs: those of features may be no names of arguments.
INPUT = "input_{}"
# Self-attention over 200 items takes about 1.3 MB a query: four times as many would be most of the
# memory of a training.
QUERIES_PER_CALL = 256
# Which users of a batch bring features of their own, [B] bool; absent if all or none do.
_HAS_FEATURES = "has_features"


class Tower(Protocol):
    """Embeds encoded inputs: the contract of all towers that serve."""

    def __call__(self, inputs: Arrays, /) -> np.ndarray:
        """Returns embeddings, [B, D] float32, of inputs by name, [B, ...] each."""


class Lookup(Protocol):
    """The users of a model: rows by id, such as `Ids`."""

    are_text: bool

    def rows(self, values: Any) -> np.ndarray:
        """Returns the row of each id, [n] int32; 0 is unknown."""


class History(NamedTuple):
    """The known items of a query's history, most recent first.

    Attributes:
        rows: [n] int32 candidate rows from 1.
        times: [n] float64 seconds since 1970, NaN where unknown; None if nobody reads them.
    """

    rows: np.ndarray
    times: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class QueryInputs:
    """What a query tower reads, and how raw queries become that.

    Attributes:
        users: The users that the tower has rows for.
        items: The items that histories may hold.
        features: Fitted features by side: "query" (the user's) and "request".
        columns: Encoded features of the users by name, [num_users, ...], from row 1.
        history_length: Number of most recent items that the tower reads.
        reads_times: Whether it also reads their times, and that of the request.
    """

    users: Lookup
    items: Ids
    features: Mapping[str, Sequence[Feature]]
    columns: Arrays
    history_length: int
    reads_times: bool

    @cached_property
    def request_signature(self) -> dict[str, Spec]:
        """The raw inputs of requests, by feature; also the timestamp if it is read."""
        return request_signature(
            self.features[REQUEST_FEATURES],
            self.features[USER_FEATURES],
            reads_times=self.reads_times,
        )

    @cached_property
    def user_signature(self) -> dict[str, Spec]:
        """The raw inputs of users' features, by feature."""
        return raw_signature(self.features[USER_FEATURES])

    @cached_property
    def signatures(self) -> dict[str, dict[str, Spec]]:
        """The raw inputs of `embed_user`, `embed_query` and `embed_query_with_features` by name."""
        user, item = ("string" if ids.are_text else "int64" for ids in (self.users, self.items))
        users = [Spec((None,), user, "user_id")]
        histories = [*users, Spec((None, None), item, "history")]
        if self.reads_times:
            histories.append(Spec((None, None), "float64", HISTORY_TIMESTAMPS))
        requests, features = self.request_signature.values(), self.user_signature.values()
        by_name = {"embed_user": [*users, *requests], "embed_query": [*histories, *requests]}
        if features:
            by_name["embed_query_with_features"] = [*histories, *features, *requests]
        return {name: {spec.name: spec for spec in specs} for name, specs in by_name.items()}

    @cached_property
    def tower_inputs(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The inputs of the tower: shape of a row, and dtype, by name."""
        inputs: dict[str, tuple[tuple[int, ...], str]] = {
            QUERY_ROWS: ((), "int32"),
            HISTORY_ROWS: ((self.history_length,), "int32"),
        }
        if self.reads_times:
            inputs[HISTORY_TIMES] = ((self.history_length + 1,), "int32")
        return inputs | feature_inputs(
            [*self.features[USER_FEATURES], *self.features[REQUEST_FEATURES]]
        )

    def read(self, queries: Sequence[Query]) -> dict[str, np.ndarray]:
        """Makes raw arrays of queries: ids, histories with their times, features, requests.

        Raises a `ValueError` if an id has another type, a time or a feature cannot be read, or a
        user's feature is unknown.
        """
        lists = list(map(history_of, queries))
        arrays = {
            "user_id": id_array([query.get("user_id") for query in queries], self.users.are_text),
            "history": padded_ids(lists, self.items.are_text),
        }
        if self.reads_times:
            times = item_times(queries)
            arrays[HISTORY_TIMESTAMPS] = padded(np.concatenate([[], *times]), times, np.nan)
        has_features = np.array([query.get("features") is not None for query in queries], bool)
        if has_features.any():
            arrays |= self._read_features([query.get("features") or {} for query in queries])
            if not has_features.all():
                arrays[_HAS_FEATURES] = has_features
        requests = [query.get("request") for query in queries]
        raw = raw_requests(self.features[REQUEST_FEATURES], requests, reads_times=self.reads_times)
        return arrays | {spec.name: raw[name] for name, spec in self.request_signature.items()}

    def _read_features(self, values: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        features = self.features[USER_FEATURES]
        names = [feature.name for feature in features]
        if not names:
            raise ValueError(
                "The model reads no user features: remove `features` from the queries."
            )
        if unknown := {name for of_user in values for name in of_user} - set(names):
            raise ValueError(
                f"The model reads no user feature {', '.join(map(repr, sorted(unknown)))}; known: "
                f"{', '.join(names)}"
            )
        columns = {name: [of_user.get(name) for of_user in values] for name in names}
        raw = raw_columns(features, columns, len(values))
        return {spec.name: raw[name] for name, spec in self.user_signature.items()}

    def history(self, item_ids: Any, times: np.ndarray | None) -> History:
        """Looks up a history, [n] ids oldest first with their times; unknown items are left out."""
        rows = self.items.rows(item_ids)[::-1]
        is_known = rows > 0
        if times is None or not self.reads_times:
            return History(rows[is_known])
        return History(rows[is_known], times[::-1][is_known])

    def histories(self, arrays: Arrays) -> list[History]:
        """Looks up the histories of raw arrays; unknown items are left out."""
        given = arrays["history"]
        # A query may have fewer times than items, or its row more room.
        times, width = np.full(given.shape, np.nan), given.shape[1]
        known = arrays.get(HISTORY_TIMESTAMPS, times)[:, :width]
        times[:, : known.shape[1]] = known
        return [self.history(*line) for line in zip(given, times, strict=True)]

    def encode(self, arrays: Arrays, histories: Sequence[History]) -> dict[str, np.ndarray]:
        """Makes the inputs of the tower (`tower_inputs`) of raw arrays, with these histories."""
        rows, length = self.users.rows(arrays["user_id"]), self.history_length
        cut = [history.rows[:length] for history in histories]
        inputs = {QUERY_ROWS: rows, HISTORY_ROWS: np.zeros((len(rows), length), np.int32)}
        for line, of_line in enumerate(cut):
            inputs[HISTORY_ROWS][line, : len(of_line)] = of_line
        if self.reads_times:
            times = np.full((len(rows), length + 1), np.nan)
            times[:, 0] = arrays[TIMESTAMP]
            for line, history in enumerate(histories):
                if history.times is not None:
                    times[line, 1 : 1 + len(cut[line])] = history.times[:length]
            inputs[HISTORY_TIMES] = relative_seconds(times)
        raw = {name: arrays[spec.name] for name, spec in self.request_signature.items()}
        encoded = encode_requests(self.features[REQUEST_FEATURES], raw)
        encoded |= self._user_features(rows, arrays)
        return inputs | {FEATURE + name: values for name, values in encoded.items()}

    def _user_features(self, rows: np.ndarray, arrays: Arrays) -> dict[str, np.ndarray]:
        """Encodes the features that users bring, and gathers those of the others by row."""
        features = self.features[USER_FEATURES]
        brought: dict[str, np.ndarray] = {}
        if features and all(spec.name in arrays for spec in self.user_signature.values()):
            raw = {name: arrays[spec.name] for name, spec in self.user_signature.items()}
            brought = encode_raw(features, raw)
            if _HAS_FEATURES not in arrays:
                return brought
        encoded = {}
        for feature in features:
            values = np.repeat(feature.missing, len(rows), axis=0)
            if feature.name in self.columns:
                values[rows > 0] = self.columns[feature.name][rows[rows > 0] - 1]
            if brought:
                is_own = arrays[_HAS_FEATURES]
                values[is_own] = brought[feature.name][is_own]
            encoded[feature.name] = values
        return encoded

    def embed(self, tower: Tower, queries: Sequence[Query]) -> np.ndarray:
        """Embeds queries, which bring their history: [num_queries, D] float32."""
        blocks = []
        # At least one call: without a query, it still gives the number of dimensions.
        for start in range(0, max(len(queries), 1), QUERIES_PER_CALL):
            arrays = self.read(queries[start : start + QUERIES_PER_CALL])
            blocks.append(tower(self.encode(arrays, self.histories(arrays))))
        return np.concatenate(blocks)


def feature_inputs(features: Sequence[Feature]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns the inputs of a tower that hold encoded features: shape of a row, and dtype."""
    return {
        FEATURE + feature.name: (feature.missing.shape[1:], str(feature.missing.dtype))
        for feature in features
    }


def candidate_inputs(features: Sequence[Feature]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns the inputs of a candidate tower: shape of a row, and dtype, by name."""
    return {CANDIDATE_ROWS: ((), "int32"), **feature_inputs(features)}


def id_array(ids: Sequence[Any] | np.ndarray, are_text: bool) -> np.ndarray:
    """Makes an array of ids, [n] int64, or texts as objects; None is the empty id.

    Raises a `ValueError` if one has another type.
    """
    check_ids([ids], are_text=are_text)
    if are_text:
        return np.array(["" if id_ is None else id_ for id_ in ids], object)
    array = np.asarray(ids)
    if array.dtype.kind != "i":  # None, no id at all, or integers beyond int64, which nobody has.
        fits = (id_ is not None and -(2**63) <= id_ < 2**63 for id_ in ids)
        array = np.array([id_ if fit else -1 for id_, fit in zip(ids, fits, strict=True)], np.int64)
    return array


def padded_ids(lists: Sequence[Collection[Any]], are_text: bool) -> np.ndarray:
    """Makes an array [n, longest] of lists of ids, padded with the empty id; see `id_array`.

    Example:
        >>> padded_ids([[7, 8], [], [9]], are_text=False)
        array([[ 7,  8],
               [-1, -1],
               [ 9, -1]])
    """
    values = id_array(list(itertools.chain.from_iterable(lists)), are_text)
    return padded(values, lists, "" if are_text else -1)


def padded(values: np.ndarray, lists: Sequence[Collection[Any]], default: Any) -> np.ndarray:
    """Puts the concatenated values of lists into rows [n, longest], padded at the end."""
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    rows = np.full((len(lists), lengths.max(initial=0)), default, values.dtype)
    rows[np.arange(rows.shape[1]) < lengths[:, np.newaxis]] = values
    return rows


def item_times(queries: Sequence[Query]) -> list[np.ndarray]:
    """Returns the times of each query's history: float64 seconds since 1970, NaN if unknown.

    A query's `history_timestamps` are datetimes with a time zone, or seconds since 1970; an unknown
    time is None.

    Example:
        >>> item_times(
        ...     [{"history": [7, 8], "history_timestamps": [86400, 172800]}, {"history": [9]}]
        ... )
        [array([ 86400., 172800.]), array([nan])]
    """
    times = []
    for query in queries:
        num_items = len(history_of(query))
        stamps = query.get(HISTORY_TIMESTAMPS)
        if stamps is None:
            times.append(np.full(num_items, np.nan))
            continue
        if len(stamps) != num_items:
            raise ValueError(
                f"{HISTORY_TIMESTAMPS} must be one time for each item of the history, None where "
                f"unknown. Received: {len(stamps)} times for {num_items} items."
            )
        # None would make objects of the seconds beside it.
        seconds = np.array([np.nan if stamp is None else stamp for stamp in stamps])
        if seconds.dtype.kind not in "iuf":
            seconds = to_seconds(HISTORY_TIMESTAMPS, list(stamps))
        elif (seconds > MAX_SECONDS).any():
            raise ValueError(
                f"{HISTORY_TIMESTAMPS} must be seconds since 1970; divide milliseconds by 1,000. "
                f"Received: {np.nanmax(seconds)}, which is after the year 5000"
            )
        times.append(seconds.astype(np.float64))
    return times
