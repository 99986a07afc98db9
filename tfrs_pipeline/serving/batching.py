"""Calls of the model, one at a time in a thread of their own; small ones that wait share one.

While a call runs, TensorFlow has released Python's lock and requests gather. Those with the same
signature and k then go into the next call together, whose fixed cost they share.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tfrs_pipeline.serving.rest import RequestError

logger = logging.getLogger(__name__)

# A long list makes everyone in the call pay for it: the search fetches as many items more.
MAX_SHARED_WIDTH = 128

Arrays = dict[str, np.ndarray]


class SignatureModel(Protocol):
    """What is called by signature: a version of a model."""

    def call(self, signature: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Answers inputs of as many queries each; runs in the batcher's thread."""
        ...


@dataclass(eq=False)
class _Call:
    model: SignatureModel
    signature: str
    inputs: Mapping[str, np.ndarray]
    num_rows: int
    future: asyncio.Future[Arrays]
    # Calls of one key can be joined; None joins with nothing.
    key: tuple[Any, ...] | None


class Batcher:
    """Calls models from an event loop, in one thread, with a bounded queue.

    Args:
        share: Whether calls that wait at the same time are joined.
        wait_seconds: How long a call that could be joined waits for others; 0 takes those alone
            that are already there.
        max_rows: Most queries in a call of the model; a larger request is cut.
        max_waiting: Most calls in the queue.
        on_call: Told of every call of a model: requests in it, queries, seconds.
    """

    def __init__(
        self,
        *,
        share: bool,
        wait_seconds: float,
        max_rows: int,
        max_waiting: int,
        on_call: Callable[[int, int, float], None] = lambda *arguments: None,
    ) -> None:
        self._share = share
        self._wait_seconds = wait_seconds
        self._max_rows = max_rows
        self._max_waiting = max_waiting
        self._on_call = on_call
        self._waiting: deque[_Call] = deque()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._work, name="model calls", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, timeout_seconds: float | None = None) -> None:
        """Ends the thread once the queue is empty; blocks until then.

        Args:
            timeout_seconds: Longest time to wait; a call that hangs ends with the process. None
                waits for ever.
        """
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            logger.error("a call of the model still runs; %d wait", len(self._waiting))

    @property
    def is_running(self) -> bool:
        """Whether calls are answered."""
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Calls in the queue."""
        return len(self._waiting)

    async def call(self, model: SignatureModel, signature: str, inputs: Arrays) -> Arrays:
        """Answers a request.

        Args:
            model: Version to call.
            signature: Its signature.
            inputs: Arrays [num_queries, ...], or [] for what holds for the whole request.

        Returns:
            Arrays [num_queries, ...].

        Raises:
            RequestError: 503, if the queue is full.
        """
        loop = asyncio.get_running_loop()
        key = self._key(model, signature, inputs)
        calls = [
            _Call(model, signature, part, num_rows, loop.create_future(), key)
            for part, num_rows in _parts(inputs, self._max_rows)
        ]
        with self._changed:
            if self._is_stopping or len(self._waiting) + len(calls) > self._max_waiting:
                raise RequestError(
                    503,
                    f"The server is busy: {len(self._waiting)} calls wait. Try again later.",
                    {"Retry-After": "1"},
                )
            self._waiting.extend(calls)
            self._changed.notify()
        answers = await asyncio.gather(*(call.future for call in calls))
        if len(answers) == 1:
            return answers[0]
        return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}

    def _key(self, model: SignatureModel, signature: str, inputs: Arrays) -> tuple[Any, ...] | None:
        if not self._share:
            return None
        # Vectors, which are numbers with a fraction, are equally long in every call.
        lists = [array for array in inputs.values() if array.ndim > 1 and array.dtype.kind != "f"]
        if any(array.shape[1] > MAX_SHARED_WIDTH for array in lists):
            return None
        scalars = [(name, array.item()) for name, array in inputs.items() if not array.ndim]
        return (id(model), signature, *scalars)

    def _work(self) -> None:
        while group := self._next_group():
            answers = self._answer(group)
            try:
                group[0].future.get_loop().call_soon_threadsafe(_deliver, group, answers)
            except RuntimeError:  # The loop was closed by force: nobody listens.
                logger.warning("%d answers came after the end", len(group))
            # Not to keep the last version alive while nothing is asked.
            del group, answers

    def _next_group(self) -> list[_Call]:
        """Waits for calls and takes those to be joined; returns none at the end."""
        with self._changed:
            while not self._waiting:
                if self._is_stopping:
                    return []
                self._changed.wait()
            first = self._waiting.popleft()
            group = [first]
            if first.key is None:
                return group
            until = time.monotonic() + self._wait_seconds
            while True:
                self._take_alike(group)
                left = until - time.monotonic()
                is_full = sum(call.num_rows for call in group) >= self._max_rows
                if is_full or left <= 0 or self._is_stopping:
                    return group
                self._changed.wait(left)

    def _take_alike(self, group: list[_Call]) -> None:
        num_rows = sum(call.num_rows for call in group)
        others: list[_Call] = []
        while self._waiting:
            call = self._waiting.popleft()
            if call.key == group[0].key and num_rows + call.num_rows <= self._max_rows:
                group.append(call)
                num_rows += call.num_rows
            else:
                others.append(call)
        self._waiting.extend(others)

    def _answer(self, group: list[_Call]) -> list[Arrays | BaseException]:
        """Answers calls together, or each by itself where together they fail."""
        first = group[0]
        start = time.perf_counter()
        try:
            joined = first.inputs if len(group) == 1 else _joined([call.inputs for call in group])
            answer = first.model.call(first.signature, joined)
        except Exception as error:
            if len(group) == 1:
                return [error]
            # One of them must not spoil the others' answers.
            logger.warning("%d calls failed together, trying each: %s", len(group), error)
            return [result for call in group for result in self._answer([call])]
        num_rows = [call.num_rows for call in group]
        self._on_call(len(group), sum(num_rows), time.perf_counter() - start)
        return list(_split(answer, num_rows))


def _deliver(calls: Sequence[_Call], answers: Sequence[Arrays | BaseException]) -> None:
    for call, answer in zip(calls, answers, strict=True):
        if call.future.done():  # Given up by whoever asked.
            continue
        if isinstance(answer, BaseException):
            call.future.set_exception(answer)
        else:
            call.future.set_result(answer)


def _parts(inputs: Arrays, max_rows: int) -> list[tuple[Arrays, int]]:
    """Cuts a request into calls of at most `max_rows` queries, with the number of each."""
    num_rows = max((len(array) for array in inputs.values() if array.ndim), default=1)
    if num_rows <= max_rows:
        return [(inputs, num_rows)]
    return [
        (
            {
                name: array[start : start + max_rows] if array.ndim else array
                for name, array in inputs.items()
            },
            min(max_rows, num_rows - start),
        )
        for start in range(0, num_rows, max_rows)
    ]


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> Arrays:
    """Puts the queries of several calls below each other, shorter lists filled with empty ids."""
    joined = {}
    for name, first in parts[0].items():
        arrays = [part[name] for part in parts]
        if first.ndim == 0:
            joined[name] = first
            continue
        if first.ndim == 2:
            width = max(array.shape[1] for array in arrays)
            empty: Any = b"" if first.dtype == object else -1
            arrays = [
                np.pad(array, [(0, 0), (0, width - array.shape[1])], constant_values=empty)
                if array.shape[1] < width
                else array
                for array in arrays
            ]
        joined[name] = np.concatenate(arrays)
    return joined


def _split(answer: Arrays, num_rows: Sequence[int]) -> Sequence[Arrays]:
    if len(num_rows) == 1:
        return [answer]
    ends = np.cumsum(num_rows).tolist()
    return [
        {name: array[end - size : end] for name, array in answer.items()}
        for end, size in zip(ends, num_rows, strict=True)
    ]
