"""The contract of retrievers: queries, answers, and refused arguments."""

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from tfrs_pipeline.messages import check_integer, plain, suggest

HISTORY_TIMESTAMPS = "history_timestamps"
"""Key of a query: the time of each item of its history."""

Query: TypeAlias = Mapping[str, Any]
"""A mapping with the keys that a retriever needs; ids are as in the log:

- `"user_id"`: int or str.
- `"history"`: item ids, oldest first.
- `"history_timestamps"`: the time of each, aware `datetime`s or seconds since 1970; None where
  unknown.
- `"features"`: raw values of user features by column name.
- `"request"`: raw values of request features, and `"timestamp"`, the time of the request. Hour and
  weekday are made from it as in the log, and models that read times compare it with the history.
"""

Excluded: TypeAlias = Sequence[Collection[Any]] | None
"""For each query, candidate ids never to return; unknown ids are ignored. None excludes nothing."""

Retrieved: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Candidate ids and scores, [num_queries, k] each; see `Retriever.retrieve`."""


@runtime_checkable
class Retriever(Protocol):
    """Finds the best candidates of each query: a model, a baseline, an index.

    A single contract test covers every retriever of the package.
    """

    def retrieve(self, queries: Sequence[Query], k: int, exclude: Excluded = None) -> Retrieved:
        """Retrieves the k best candidates of each query.

        The order of the corpus breaks ties. A query gets the same answer alone and in any batch. If
        fewer than k candidates are left, the last slots are empty. An approximate index may miss
        candidates, depending on k, exclusions and the batch; otherwise it keeps this contract.

        Args:
            queries: One mapping for each query. Unknown ids in a history are ignored.
            k: Number of candidates for each query, 1 or more; may exceed the corpus.
            exclude: For each query, candidate ids never to return; see `Excluded`.

        Returns:
            candidate_ids: [num_queries, k], best first, in the type of the corpus: int64 with -1 in
                empty slots, or object (str) with "" in them.
            scores: [num_queries, k] float32, -inf in empty slots.

        Raises:
            ValueError: As for `check_asked`.
        """
        ...


def history_of(query: Query) -> Sequence[Any]:
    """Returns the history of a query, which may be missing or, read from a file, None."""
    history = query.get("history")
    return () if history is None else history


_KEYS = frozenset({"user_id", "history", HISTORY_TIMESTAMPS, "features", "request"})


def check_asked(queries: Sequence[Query], k: int, exclude: Excluded, *, ids_are_text: bool) -> None:
    """Refuses (`ValueError`) arguments that no `Retriever` over ids of this type can answer."""
    check_queries(queries, ids_are_text=ids_are_text)
    check_integer(1, k=k)
    if k >= 2**31:
        raise ValueError(f"k must be an int32, below 2**31. Received: {k}")
    if exclude is not None:
        check_one_each("exclude", exclude, len(queries))
        check_ids(exclude, are_text=ids_are_text)


def check_queries(queries: Sequence[Query], *, ids_are_text: bool) -> None:
    """Refuses (`ValueError`) queries that would be silently misread.

    Each model checks user ids and names of features itself.

    Example:
        >>> check_queries([{"histroy": [1]}], ids_are_text=False)
        Traceback (most recent call last):
        ValueError: Unknown key 'histroy' in a query; did you mean 'history'?
    """
    if isinstance(queries, Mapping):
        raise ValueError(f"Queries come in a list, also a single one: [{dict(queries)!r}]")
    histories = []
    for query in queries:
        _check_mapping("A query", query)
        if unknown := sorted(map(str, query.keys() - _KEYS)):
            raise ValueError(f"Unknown key {unknown[0]!r} in a query; {suggest(unknown[0], _KEYS)}")
        for name in ("features", "request"):
            if query.get(name) is not None:
                _check_mapping(f"{name!r} of a query", query[name])
        if query.get("history") is not None:
            check_collection("the history of a query", query["history"])
            histories.append(query["history"])
    check_ids(histories, are_text=ids_are_text)


def _check_mapping(name: str, values: Any) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} is a mapping, values by name. Received: {values!r}")


def check_requests(
    requests: Iterable[Mapping[str, Any] | None],
    known: Collection[str],
    *,
    may_have_others: bool = False,
) -> None:
    """Refuses (`ValueError`) requests with a feature that the model does not read.

    With `may_have_others`, as in a holdout, a name is refused only if it looks misspelt.
    """
    known = {*known, "timestamp"}
    names = {name for request in requests for name in request or ()}
    unknown = sorted(map(str, names.difference(known)))
    if may_have_others:
        missing = [name for name in known if name not in names]
        unknown = [name for name in unknown if difflib.get_close_matches(name, missing, cutoff=0.8)]
    if unknown:
        hint = suggest(unknown[0], known)
        raise ValueError(f"The model reads no request feature {unknown[0]!r}; {hint}")


def check_one_each(name: str, values: Sequence[Any], num_queries: int) -> None:
    """Refuses (`ValueError`) values that are not one collection for each query."""
    if len(values) != num_queries:
        raise ValueError(
            f"{name} must hold one collection a query, which may be empty. "
            f"Received: {len(values)} for {num_queries} queries."
        )
    for value in values:
        check_collection(f"{name} for a query", value)


def check_collection(name: str, values: Any) -> None:
    """Refuses (`ValueError`) an id in place of a list, and iterators, which a check exhausts.

    A text is a sequence too, each of whose letters would pass for an id.
    """
    if isinstance(values, str | int | np.integer):
        raise ValueError(
            f"{name} must be a list. Received: {plain(values)}; did you mean [{plain(values)}]?"
        )
    if not hasattr(values, "__len__"):
        raise ValueError(f"{name} must be a list or another collection. Received: {values!r}")


def check_ids(lists: Iterable[Iterable[Any]], *, are_text: bool) -> None:
    """Refuses (`ValueError`) ids whose type is not the model's, or they would count as unknown."""
    allowed = str if are_text else (int, np.integer)
    fine: set[type] = {type(None)}  # A missing id.
    for ids in lists:
        # Checks each type once, not each id: an evaluation has tens of thousands of queries.
        if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu" and not are_text:
            continue
        for kind in set(map(type, ids)) - fine:
            if not issubclass(kind, allowed):
                wrong = next(id_ for id_ in ids if type(id_) is kind)
                what = "strings" if are_text else "integers"
                raise ValueError(f"This model's ids are {what}. Received: {plain(wrong)}")
            fine.add(kind)
