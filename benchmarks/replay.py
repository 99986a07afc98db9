"""Replays the test part of MovieLens-100K through the server: are the metrics those of `evaluate`?

The model is exported as of the moment at which the test begins. Then each like of the test comes in
the order of time: the server is asked by `user_id` alone, and afterwards gets the like as an event.
That is what an evaluation by request assumes. Every metric of every query has to be equal, to the
last digit, to that of the fitted model, which is asked with the histories of the holdout.

    python benchmarks/replay.py --json benchmarks/results/replay.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import numpy as np

from tfrs_pipeline.sources.movielens import load_movielens_100k

K = 100


class Answers:
    """A retriever of stored answers."""

    def __init__(self, queries: Sequence[tp.Query], ids: Sequence[Sequence[Any]]) -> None:
        self._ids = dict(zip(map(repr, queries), ids, strict=True))

    def retrieve(
        self, queries: Sequence[tp.Query], k: int, exclude: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns what is stored for each query."""
        ids = np.array([self._ids[repr(query)][:k] for query in queries])
        return ids, np.broadcast_to(-np.arange(k, dtype=np.float32), ids.shape)


def as_of_test(model: Any) -> Any:
    """Returns a model whose export ends where the test begins, as one of that day did."""
    return dataclasses.replace(model, log=dataclasses.replace(model.log, part_of=None))


def replay(
    split: tp.Split,
    test: tp.Holdout,
    ask: Callable[[Any, Mapping[str, Any]], Sequence[Any]],
    tell: Callable[[list[dict[str, Any]]], object],
) -> tuple[tp.Holdout, Answers]:
    """Asks the requests of the test, and tells what was clicked and shown, in the order of time.

    Args:
        split: By time, of a log with timestamps.
        test: Its test by requests.
        ask: A user's id, and features and `timestamp` of the request -> item ids, best first.
        tell: Takes events as `record` does.

    Returns:
        The queries that could be asked, and their answers. A request that began before the test
        cannot be: it should not know what the training knows.
    """
    rows = split.events.order_by(["timestamp", "event_number"]).to_pyarrow().to_pylist()
    requests: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        is_alone = row.get("request_id") is None
        key = (row["user_id"], is_alone, row["event_number"] if is_alone else row["request_id"])
        requests.setdefault(key, []).append(row)

    def place(row: Mapping[str, Any], is_event: bool) -> tuple[Any, ...]:
        # Events at the time of a request are later than it, unless ties keep the log's order.
        number = row["event_number"]
        in_order = (is_event, number) if split.log.ties == "drop" else (number, is_event)
        return row["timestamp"], *in_order

    line: list[tuple[Any, ...]] = [
        (place(row, True), "tell", row)
        for row in rows
        if row["part"] == "test" and row["stage"] in ("clicked", "exposed")
    ]
    for of_request in requests.values():
        is_target = [row["part"] == "test" and row["stage"] == "clicked" for row in of_request]
        if any(is_target) and of_request[0]["part"] == "test":
            targets = [row for row, is_one in zip(of_request, is_target, strict=True) if is_one]
            line.append((place(of_request[0], False), "ask", targets))
    names = (test.user_ids.tolist(), test.times.tolist(), map(set, test.relevant))
    numbers = {
        (user, seconds, frozenset(items)): number
        for number, (user, seconds, items) in enumerate(zip(*names, strict=True))
    }
    queries, answers = test.as_queries(), {}
    for _, what, content in sorted(line, key=lambda entry: entry[0]):
        if what == "tell":
            columns = {"user_id": "user_id", "item_id": "item_id", "stage": "type"}
            event = {name: content[column] for column, name in columns.items()}
            tell([event | {"time": content["timestamp"].isoformat()}])
            continue
        user, seconds = content[0]["user_id"], int(content[0]["timestamp"].timestamp() // 1)
        number = numbers[user, seconds, frozenset(row["item_id"] for row in content)]
        answers[number] = ask(user, queries[number]["request"])
    asked = sorted(answers)
    lists = {
        name: [values[number] for number in asked]
        for name, values in vars(test).items()
        if isinstance(values, list)
    }
    test = dataclasses.replace(
        test, user_ids=test.user_ids[asked], times=test.times[asked], **lists
    )
    return test, Answers(test.as_queries(), [answers[number] for number in asked])


class Alone:
    """A retriever that is asked one query at a time, as a server is.

    The product of many queries with the items rounds otherwise in the last bit, which now and then
    turns the order of two items with nearly equal scores.
    """

    def __init__(self, retriever: tp.Retriever) -> None:
        self._retriever = retriever

    def retrieve(
        self, queries: Sequence[tp.Query], k: int, exclude: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Retrieves for each query by itself."""
        pairs = zip(queries, exclude, strict=True)
        rows = [self._retriever.retrieve([query], k, [ids]) for query, ids in pairs]
        ids, scores = map(np.concatenate, zip(*rows, strict=True))
        return ids, scores


def compare(model: tp.Retriever, test: tp.Holdout, answers: Answers, k: int) -> dict[str, Any]:
    """Compares all metrics of a model with those of the server's answers, query by query."""
    models = {"batches": model, "offline": Alone(model), "service": answers}
    results = tp.evaluate(models, test, cutoffs=(k // 5, k), num_bootstrap=0).results
    batches, offline, service = (results[name].per_query for name in models)
    return {
        "num_queries": len(test),
        "means": {
            metric: [float(np.nanmean(values[metric])) for values in (offline, service)]
            for metric in offline
        },
        **{
            name: {m: int((~np.isclose(of[m], service[m], 0, 0, True)).sum()) for m in service}
            for name, of in (("num_unequal", offline), ("num_unequal_in_batches", batches))
        },
    }


@contextlib.contextmanager
def serving(model: Path, *flags: str) -> Iterator[Any]:
    """Serves a model on a free port; yields a client."""
    from live import Client

    token = model.parent / "token"
    token.write_text("0123456789abcdef")
    command = [sys.executable, "-m", "tfrs_pipeline.cli", "serve", str(model), "--port", "0"]
    command += ["--token-file", str(token), "--no-page", *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield Client(
            int(server.stdout.readline().rpartition(":")[2]), model.name, token.read_text()
        )
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """Runs the benchmark."""
    from record import parser_with_json, write_json

    parser = parser_with_json(__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--pooling", nargs="+", default=["mean"], help="model.history_pooling.")
    options = parser.parse_args()
    split = load_movielens_100k().split("time", validation=0, test=0.1)
    test, training = (
        split.holdout("test", by="requests"),
        tp.TrainingSettings(max_epochs=options.epochs),
    )
    plan = tp.TwoTower(history_pooling=tuple(options.pooling), training=training)
    model = plan.fit(split.before_test)
    with tempfile.TemporaryDirectory() as folder:
        path = tp.export(as_of_test(model), Path(folder) / "films", index=tp.Exact()).parent
        reads_times = "timestamp" in tp.load(path).signatures["retrieve_user"]
        with serving(path) as client:

            def ask(user: int, request: Mapping[str, Any]) -> list[int]:
                inputs = {"user_id": [user], "exclude": [[]], "k": K}
                if reads_times:
                    inputs["timestamp"] = [request["timestamp"].timestamp()]
                body = {"signature_name": "retrieve_user", "inputs": inputs}
                outputs = client.post("/v1/models/films:predict", body)["outputs"]
                return list(outputs["candidate_ids"][0])

            start = time.monotonic()
            asked, answers = replay(
                split, test, ask, lambda events: client.post("/v1/events", {"events": events})
            )
            figures = {"seconds": time.monotonic() - start, "num_not_asked": len(test) - len(asked)}
    figures |= compare(model, asked, answers, K)
    print(figures)
    if options.json:
        write_json(options.json, figures)


if __name__ == "__main__":
    main()
