"""Calls joined and cut, against the same calls one by one; a full queue; failures kept apart."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np
import pytest

from tfrs_pipeline.serving.batching import MAX_SHARED_WIDTH, Batcher
from tfrs_pipeline.serving.rest import RequestError


class Echo:
    """Answers each query with what it was asked, so that a mix-up shows; can be held up."""

    def __init__(self) -> None:
        self.num_rows: list[int] = []
        self.go = threading.Event()
        self.go.set()
        self.is_busy = threading.Event()

    def call(self, signature: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.is_busy.set()
        assert self.go.wait(10)
        self.num_rows.append(len(inputs["user_id"]))
        if 13 in inputs["user_id"]:
            raise ValueError("unlucky")
        kept = [[x for x in row if x not in (-1, b"")] for row in inputs["exclude"].tolist()]
        told = np.empty(len(kept), object)
        told[:] = [(signature, int(inputs["k"]), row) for row in kept]
        return {"user_id": inputs["user_id"], "told": told}


def inputs(*users: int, exclude: Any = (), k: int = 1) -> dict[str, np.ndarray]:
    rows = np.empty((len(users), len(exclude)), np.asarray(exclude or [1]).dtype)
    rows[:] = list(exclude)
    return {"user_id": np.array(users), "exclude": rows, "k": np.array(k, np.int32)}


def run(work: Callable[[Batcher, Echo], Awaitable[Any]], **settings: Any) -> Any:
    defaults = {"share": True, "wait_seconds": 0.0, "max_rows": 8, "max_waiting": 100}
    batcher, model = Batcher(**{**defaults, **settings}), Echo()
    batcher.start()

    async def main() -> Any:
        return await work(batcher, model)

    try:
        return asyncio.run(main())
    finally:
        model.go.set()
        batcher.stop()
        assert not batcher.is_running


async def held(model: Echo, batcher: Batcher, *calls: Any) -> list[Any]:
    """Lets calls gather behind a first one; returns what each of them gave or raised."""
    model.go.clear()
    first = asyncio.create_task(batcher.call(model, "s", inputs(0)))
    await asyncio.to_thread(model.is_busy.wait, 10)
    tasks = [asyncio.create_task(batcher.call(model, *call)) for call in calls]
    while sum(task.done() for task in tasks) + batcher.num_waiting < len(calls):
        await asyncio.sleep(0.001)
    model.go.set()
    await first
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_what_waits_is_joined_and_each_gets_its_own() -> None:
    async def work(batcher: Batcher, model: Echo) -> None:
        calls = [("s", inputs(user, exclude=list(range(user)))) for user in range(1, 6)]
        answers = await held(model, batcher, *calls)
        for user, answer in zip(range(1, 6), answers, strict=True):
            assert answer["user_id"].tolist() == [user]
            assert answer["told"].tolist() == [("s", 1, list(range(user)))]
        assert model.num_rows == [1, 5]

    run(work)


def test_lists_of_strings_are_filled_with_the_empty_string() -> None:
    async def work(batcher: Batcher, model: Echo) -> None:
        exclude = np.array([[b"a", b"b"]], object)
        nothing = np.empty((1, 0), object)
        calls = [("s", {**inputs(user), "exclude": e}) for user, e in ((1, exclude), (2, nothing))]
        answers = await held(model, batcher, *calls)
        assert [a["told"][0][2] for a in answers] == [[b"a", b"b"], []]
        assert model.num_rows == [1, 2]

    run(work)


@pytest.mark.parametrize(
    "other",
    [
        ("s", inputs(2, k=2)),
        ("t", inputs(2)),
        ("s", inputs(2, exclude=list(range(MAX_SHARED_WIDTH + 1)))),
        ("s", inputs(*range(20, 28))),
    ],
    ids=["k", "signature", "a long list", "too many queries together"],
)
def test_what_differs_is_not_joined(other: tuple[str, dict[str, np.ndarray]]) -> None:
    async def work(batcher: Batcher, model: Echo) -> None:
        answers = await held(model, batcher, ("s", inputs(1)), other)
        assert answers[1]["told"][0][:2] == (other[0], int(other[1]["k"]))
        assert len(model.num_rows) == 3

    run(work)


def test_models_are_not_mixed() -> None:
    async def work(batcher: Batcher, model: Echo) -> None:
        another = Echo()
        model.go.clear()
        first = asyncio.create_task(batcher.call(model, "s", inputs(0)))
        await asyncio.to_thread(model.is_busy.wait, 10)
        tasks = [asyncio.create_task(batcher.call(m, "s", inputs(1))) for m in (model, another)]
        await asyncio.sleep(0.01)
        model.go.set()
        await asyncio.gather(first, *tasks)
        assert (model.num_rows, another.num_rows) == ([1, 1], [1])

    run(work)


def test_nothing_is_joined_when_told_so() -> None:
    async def work(batcher: Batcher, model: Echo) -> None:
        await held(model, batcher, *[("s", inputs(user)) for user in range(1, 5)])
        assert model.num_rows == [1] * 5

    run(work, share=False)


def test_a_call_waits_for_others_as_long_as_it_is_told() -> None:
    async def work(batcher: Batcher, model: Echo) -> None:
        first = asyncio.create_task(batcher.call(model, "s", inputs(1)))
        await asyncio.sleep(0.05)
        assert not first.done()
        await asyncio.gather(first, *(batcher.call(model, "s", inputs(u)) for u in range(2, 9)))
        assert model.num_rows == [8]  # Full: it did not wait for the minute to pass.

    run(work, wait_seconds=60.0)


def test_a_large_request_is_cut_and_put_together() -> None:
    async def work(batcher: Batcher, model: Echo) -> None:
        answer = await batcher.call(model, "s", inputs(*range(20, 41)))
        assert answer["user_id"].tolist() == list(range(20, 41))
        assert model.num_rows == [8, 8, 5]

    run(work)


def test_a_request_of_no_query_is_a_call() -> None:
    async def work(batcher: Batcher, model: Echo) -> None:
        answer = await batcher.call(model, "s", inputs())
        assert answer["user_id"].shape == (0,)

    run(work)


def test_one_that_fails_does_not_spoil_the_others() -> None:
    async def work(batcher: Batcher, model: Echo) -> None:
        answers = await held(model, batcher, *[("s", inputs(user)) for user in (1, 13, 2)])
        assert answers[0]["user_id"].tolist() == [1]
        assert isinstance(answers[1], ValueError)
        assert answers[2]["user_id"].tolist() == [2]
        assert (await batcher.call(model, "s", inputs(3)))["user_id"].tolist() == [3]

    run(work)


def test_a_full_queue_refuses_at_once_and_takes_again() -> None:
    async def work(batcher: Batcher, model: Echo) -> None:
        answers = await held(model, batcher, *[("s", inputs(user)) for user in range(1, 6)])
        refused = [answer for answer in answers if isinstance(answer, RequestError)]
        assert [error.status for error in refused] == [503, 503]
        assert refused[0].headers == {"Retry-After": "1"}
        assert len([a for a in answers if isinstance(a, dict)]) == 3
        assert (await batcher.call(model, "s", inputs(9)))["user_id"].tolist() == [9]

    run(work, max_waiting=3)


def test_a_request_of_more_calls_than_there_is_room_for_leaves_nothing_behind() -> None:
    async def work(batcher: Batcher, model: Echo) -> None:
        with pytest.raises(RequestError, match="busy"):
            await batcher.call(model, "s", inputs(*range(20, 50)))
        assert batcher.num_waiting == 0
        assert model.num_rows == []

    run(work, max_waiting=3)


def test_one_who_gave_up_is_no_trouble_to_others() -> None:
    async def work(batcher: Batcher, model: Echo) -> None:
        model.go.clear()
        first = asyncio.create_task(batcher.call(model, "s", inputs(0)))
        await asyncio.to_thread(model.is_busy.wait, 10)
        tasks = [asyncio.create_task(batcher.call(model, "s", inputs(user))) for user in (1, 2)]
        await asyncio.sleep(0.01)
        tasks[0].cancel()
        model.go.set()
        assert (await tasks[1])["user_id"].tolist() == [2]
        await first

    run(work)


def test_the_end_answers_what_waits_and_refuses_what_comes() -> None:
    async def work(batcher: Batcher, model: Echo) -> None:
        model.go.clear()
        tasks = [asyncio.create_task(batcher.call(model, "s", inputs(user))) for user in (1, 2)]
        await asyncio.to_thread(model.is_busy.wait, 10)
        end = asyncio.create_task(asyncio.to_thread(batcher.stop))
        await asyncio.sleep(0.05)
        with pytest.raises(RequestError):
            await batcher.call(model, "s", inputs(3))
        model.go.set()
        assert [a["user_id"].tolist() for a in await asyncio.gather(*tasks)] == [[1], [2]]
        await end

    run(work)


def test_a_call_that_hangs_does_not_hold_up_the_end(caplog: pytest.LogCaptureFixture) -> None:
    async def work(batcher: Batcher, model: Echo) -> None:
        model.go.clear()
        task = asyncio.create_task(batcher.call(model, "s", inputs(1)))
        await asyncio.to_thread(model.is_busy.wait, 10)
        await asyncio.to_thread(batcher.stop, 0.05)
        assert batcher.is_running
        assert "still runs" in caplog.text
        model.go.set()
        await task

    run(work)


def test_every_call_of_a_model_is_counted() -> None:
    counted: list[tuple[int, int]] = []

    async def work(batcher: Batcher, model: Echo) -> None:
        await held(model, batcher, ("s", inputs(1, 2)), ("s", inputs(3)))

    run(work, on_call=lambda requests, rows, seconds: counted.append((requests, rows)))
    assert counted == [(1, 1), (2, 3)]
