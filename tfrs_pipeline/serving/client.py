"""A served model as a `Retriever`: over HTTP, from a process without TensorFlow."""

from __future__ import annotations

import itertools
import json
import math
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from tfrs_pipeline.model.raw import (
    history_of,
    item_times,
    padded,
    to_numbers,
    to_seconds,
    to_text_lists,
    to_texts,
    to_vectors,
)
from tfrs_pipeline.retrieval import (
    HISTORY_TIMESTAMPS,
    Excluded,
    Query,
    Retrieved,
    check_asked,
    check_ids,
    check_one_each,
    check_requests,
)
from tfrs_pipeline.serving.settings import ServeSettings

# Those of a server with default settings. Of a longer history, models read the latest items.
LIMITS = ServeSettings()


class ServedRetriever:
    """A `Retriever` on a server: this package's or TensorFlow Serving.

    The url is the model's, such as "http://127.0.0.1:8501/v1/models/movielens-100k"; a request may
    take `timeout_seconds`. An `OSError` if the server cannot be reached, a `ValueError` if it has
    no such model.
    """

    def __init__(self, url: str, *, timeout_seconds: float = 10.0) -> None:
        self._url = url.rstrip("/")
        self._timeout_seconds = timeout_seconds
        metadata = self._ask("/metadata")["metadata"]
        signatures = metadata["signature_def"]["signature_def"]
        inputs = signatures["retrieve"]["inputs"]
        self._has_filter = "retrieve_filtered" in signatures
        self._users_are_text = inputs["user_id"]["dtype"] == "DT_STRING"
        self._items_are_text = inputs["history"]["dtype"] == "DT_STRING"
        self._reads_item_times = HISTORY_TIMESTAMPS in inputs
        others = ("user_id", "history", HISTORY_TIMESTAMPS, "exclude", "k")
        self._of_request = {name: inputs[name] for name in inputs if name not in others}

    def retrieve(
        self,
        queries: Sequence[Query],
        k: int,
        exclude: Excluded = None,
        *,
        allowed: Sequence[Collection[str]] | None = None,
    ) -> Retrieved:
        """Retrieves the k best candidates of each query; see `Retriever.retrieve`.

        `user_id`, `history`, `history_timestamps` and `request` are read. The keys of `request` are
        the signature's inputs: the request features' names as far as TensorFlow takes them, and
        `timestamp`, in seconds since 1970 or an aware `datetime`. Nothing is excluded but
        `exclude`. `allowed` is as for `LoadedRetriever`, but a value that no item has finds
        nothing. Many queries are sent in several requests, within the server's default limits, and
        the latest 1,000 items of a history.

        Raises:
            ValueError: As `check_asked`; if a user id is of another type than the model's, the
                model has no such request feature, `allowed` is given and it has no item filter, or
                the server refuses a request, as for a k or an `exclude` beyond its limits.
            OSError: If it does not answer, or with an error of its own.
        """
        check_asked(queries, k, exclude, ids_are_text=self._items_are_text)
        check_ids([[query.get("user_id") for query in queries]], are_text=self._users_are_text)
        check_requests([query.get("request") for query in queries], self._of_request)
        if exclude is None:
            exclude = [()] * len(queries)
        if allowed is not None:
            check_one_each("allowed", allowed, len(queries))
            if not self._has_filter:
                raise ValueError("This model has no item filter: export it with export.filter_by.")
            for value in itertools.chain.from_iterable(allowed):
                # What is no text the server would take for no value, which allows every item.
                if not isinstance(value, str) or not value:
                    raise ValueError(
                        f"Values to filter by are texts, and not empty. Received: {value!r}"
                    )
        ids = np.full((len(queries), k), "" if self._items_are_text else -1)
        ids = ids.astype(object if self._items_are_text else np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        size = max(1, min(LIMITS.max_queries, LIMITS.max_results // k))
        for start in range(0, len(queries), size):
            block = slice(start, start + size)
            of_block = None if allowed is None else allowed[block]
            ids[block], scores[block] = self._answer(queries[block], k, exclude[block], of_block)
        return ids, scores

    def _answer(
        self,
        queries: Sequence[Query],
        k: int,
        exclude: Sequence[Collection[Any]],
        allowed: Sequence[Collection[str]] | None,
    ) -> tuple[list[Any], list[Any]]:
        """Asks in one request, or in two where its body would be too long."""
        inputs = self._inputs(queries, k, exclude)
        signature = "retrieve"
        if allowed is not None:
            signature = "retrieve_filtered"
            inputs["allowed"] = _padded(allowed, is_text=True)
        body = json.dumps({"signature_name": signature, "inputs": inputs}).encode()
        if len(body) <= LIMITS.max_body_bytes or len(queries) == 1:
            outputs = self._ask(":predict", body)["outputs"]
            return outputs["candidate_ids"], outputs["scores"]
        ids: list[Any] = []
        scores: list[Any] = []
        for half in (slice(len(queries) // 2), slice(len(queries) // 2, None)):
            of_half = None if allowed is None else allowed[half]
            some_ids, some_scores = self._answer(queries[half], k, exclude[half], of_half)
            ids, scores = ids + some_ids, scores + some_scores
        return ids, scores

    def _inputs(
        self, queries: Sequence[Query], k: int, exclude: Sequence[Collection[Any]]
    ) -> dict[str, Any]:
        """Writes the inputs of the signature, every one of them, as TensorFlow Serving asks."""
        users = [[query.get("user_id")] for query in queries]
        histories = [history_of(query)[-LIMITS.max_history :] for query in queries]
        requests = [query.get("request") or {} for query in queries]
        inputs = {
            "user_id": [user for (user,) in _padded(users, self._users_are_text)],
            "history": _padded(histories, self._items_are_text),
            **{
                name: _values(name, [request.get(name) for request in requests], about)
                for name, about in self._of_request.items()
            },
            "exclude": _padded(exclude, self._items_are_text),
            "k": int(k),
        }
        if self._reads_item_times:
            times = [of[-LIMITS.max_history :].tolist() for of in item_times(queries)]
            # A server refuses the time of an empty id.
            is_empty = np.array(inputs["history"], object) == ("" if self._items_are_text else -1)
            known = np.where(is_empty, math.nan, _filled(times, math.nan))
            inputs[HISTORY_TIMESTAMPS] = known.tolist()
        return inputs

    def _ask(self, path: str, body: bytes | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_seconds) as answer:
                # Python's reader knows the bare word -Infinity of empty slots.
                return json.load(answer)
        except urllib.error.HTTPError as error:
            message = f"{self._url}: {error.code} {error.read().decode(errors='replace')[:500]}"
            if error.code < 500:
                raise ValueError(message) from None
            raise OSError(message) from None


def _values(name: str, values: Sequence[Any], about: Mapping[str, Any]) -> list[Any]:
    """Writes values of an input: of strings, numbers, times, or lists of these."""
    is_text = about["dtype"] == "DT_STRING"
    sizes = [int(dim["size"]) for dim in about["tensor_shape"]["dim"]]
    written: Any
    if len(sizes) > 1:
        written = (
            padded(*to_text_lists(values)) if is_text else to_vectors(name, values, sizes[1])
        ).tolist()
    elif is_text:
        written = to_texts(values).to_pylist()
    else:  # A time is a number of seconds here, or an aware datetime.
        seconds = [to_seconds(name, [x])[0] if isinstance(x, datetime) else x for x in values]
        written = to_numbers(name, seconds).tolist()
    return list(written)


def _padded(lists: Sequence[Collection[Any]], is_text: bool) -> list[list[Any]]:
    """Writes ids as JSON has them: the empty id in place of one that no model can know.

    So each stays in its place, beside its time; empty ones fill the rest.
    """
    if is_text:
        return _filled([["" if x is None else x for x in ids] for ids in lists], "")
    int64 = range(-(2**63), 2**63)
    known = [[-1 if x is None or int(x) not in int64 else int(x) for x in ids] for ids in lists]
    return _filled(known, -1)


def _filled(lists: Sequence[Sequence[Any]], filler: Any) -> list[list[Any]]:
    """Makes lists of one length."""
    width = max(map(len, lists), default=0)
    return [[*values, *[filler] * (width - len(values))] for values in lists]
