"""What evaluation, mining and serving ask of anything that retrieves, and what it refuses."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from tfrs_pipeline.messages import check_integer, suggest

HISTORY_TIMESTAMPS = "history_timestamps"
"""What a query may bring beside its history: the time of each item."""

Query: TypeAlias = Mapping[str, Any]
"""Whichever of these a retriever needs: `"user_id"`, an int or str; `"history"`, a sequence of item
ids, oldest first, all ids as the log has them; `"history_timestamps"`, the time of each of these,
aware `datetime`s or seconds since 1970; `"features"`, raw values of user features by column name;
`"request"`, those of request features, and `"timestamp"`, when the request comes: of it those
features are made that the log made of its own, and with it models that read times know how long ago
the history was."""

Excluded: TypeAlias = Sequence[Collection[Any]] | None
"""Per query, candidate ids never to be returned for it, unknown ones ignored; None is nothing."""

Retrieved: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Candidate ids and scores, [num_queries, k] each; see `Retriever.retrieve`."""


@runtime_checkable
class Retriever(Protocol):
    """Finds the best candidates of each query: a model, a baseline, an index.

    One contract test runs on every retriever of the package.
    """

    def retrieve(self, queries: Sequence[Query], k: int, exclude: Excluded = None) -> Retrieved:
        """Retrieves the k best candidates of each query.

        Ties are broken by the order of the corpus. A query gives the same answer alone as in any
        batch. Where fewer than k candidates are left, the last slots are empty. An approximate
        index may miss candidates, and which ones can change with k, with what is excluded and with
        the batch; in all else, and in the order of what it finds, it keeps to this too.

        Args:
            queries: One mapping a query. Ids in a history that the corpus does not know are
                ignored.
            k: How many candidates a query, 1 or more; may exceed the corpus.
            exclude: One collection of candidate ids a query, never to be returned for it. Ids that
                the corpus does not know are ignored. None excludes nothing.

        Returns:
            candidate_ids: [num_queries, k], best first, in the type of the corpus: int64 with -1 in
                empty slots, or object (str) with "" in them.
            scores: [num_queries, k] float32, -inf in empty slots.

        Raises:
            ValueError: As `check_asked`.
        """
        ...


_KEYS = frozenset({"user_id", "history", HISTORY_TIMESTAMPS, "features", "request"})


def check_asked(queries: Sequence[Query], k: int, exclude: Excluded, *, ids_are_text: bool) -> None:
    """Refuses (`ValueError`) arguments that no `Retriever` over items with such ids can answer."""
    check_queries(queries, ids_are_text=ids_are_text)
    check_k(k)
    if exclude is not None:
        check_one_each("exclude", exclude, len(queries))
        check_ids(exclude, are_text=ids_are_text)


def check_queries(queries: Sequence[Query], *, ids_are_text: bool) -> None:
    """Refuses (`ValueError`) queries that would be answered as if they said something else.

    One with a misspelt key, or with a history of ids of another type, would have the answer for an
    empty history. User ids and the names of features are left to each model.
    """
    if isinstance(queries, Mapping):
        raise ValueError(f"Queries come in a list, also a single one: [{dict(queries)!r}]")
    histories = []
    for query in queries:
        if not isinstance(query, Mapping):
            raise ValueError(
                "A query is a mapping, such as {'history': [...]} or {'user_id': ...}. "
                f"Received: {query!r}"
            )
        if unknown := sorted(map(str, query.keys() - _KEYS)):
            raise ValueError(f"Unknown key {unknown[0]!r} in a query; {suggest(unknown[0], _KEYS)}")
        for name in ("features", "request"):
            values = query.get(name)
            if values is not None and not isinstance(values, Mapping):
                raise ValueError(
                    f"{name!r} of a query is a mapping, values by name. Received: {values!r}"
                )
        history = query.get("history")
        if history is None:
            continue
        if _is_one(history):
            raise ValueError(
                f"A history is a list of item ids. Received: {history!r}; did you mean "
                f"[{history!r}]?"
            )
        _check_sized("history", history)
        histories.append(history)
    check_ids(histories, are_text=ids_are_text)


def check_requests(
    requests: Iterable[Mapping[str, Any] | None],
    known: Collection[str],
    *,
    may_have_others: bool = False,
) -> None:
    """Refuses (`ValueError`) requests with a feature that the model does not read.

    A `timestamp` is always allowed, also where the model reads no time. With `may_have_others` a
    name is refused only if it looks misspelt: a holdout brings all request features of its log, of
    which a model may read some.
    """
    known = {*known, "timestamp"}
    given = {name for request in requests for name in request or ()}
    unknown = sorted(map(str, given.difference(known)))
    if may_have_others:
        missing = [name for name in known if name not in given]
        unknown = [x for x in unknown if difflib.get_close_matches(x, missing, cutoff=0.8)]
    if unknown:
        hint = suggest(unknown[0], known)
        raise ValueError(f"The model reads no request feature {unknown[0]!r}; {hint}")


def check_k(k: int) -> None:
    """Refuses (`ValueError`) a k that is no whole number, below 1, or no int32, as exports take."""
    check_integer(1, k=k)
    if k >= 2**31:
        raise ValueError(f"k must be an int32, below 2**31. Received: {k}")


def check_one_each(name: str, values: Sequence[Any], num_queries: int) -> None:
    """Refuses (`ValueError`) what should hold one collection a query and does not."""
    if len(values) != num_queries:
        raise ValueError(
            f"{name} must hold one collection a query, which may be empty. "
            f"Received: {len(values)} for {num_queries} queries."
        )
    for value in values:
        if _is_one(value):
            raise ValueError(
                f"{name} must hold one collection a query. Received: {value!r}; did you mean "
                f"[{value!r}]?"
            )
        _check_sized(name, value)


def _check_sized(name: str, values: Any) -> None:
    """Refuses (`ValueError`) what can be read only once: a check would leave nothing of it."""
    if not hasattr(values, "__len__"):
        raise ValueError(f"{name} must hold lists or other collections. Received: {values!r}")


def check_ids(lists: Iterable[Iterable[Any]], *, are_text: bool) -> None:
    """Refuses (`ValueError`) ids of another type than the model's, in any of the lists.

    Each would be taken for an unknown id. None stands for no id, and is not refused.
    """
    allowed = str if are_text else (int, np.integer)
    fine: set[type] = {type(None)}
    for ids in lists:
        # Type by type, not id by id: an evaluation checks tens of thousands of queries.
        if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu" and not are_text:
            continue
        for kind in set(map(type, ids)) - fine:
            if not issubclass(kind, allowed):
                wrong = next(id_ for id_ in ids if type(id_) is kind)
                if are_text:
                    what, hint = "strings", f"; did you mean '{wrong}'?"
                else:
                    what, hint = "integers", ""
                raise ValueError(f"This model's ids are {what}. Received: {wrong!r}{hint}")
            fine.add(kind)


def _is_one(value: Any) -> bool:
    """Whether this is an id where a list of ids belongs: iterated, a string is its letters."""
    return isinstance(value, str | int | np.integer)
