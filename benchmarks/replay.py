"""Replays the test part of MovieLens-100K through the server: are the metrics those of `evaluate`?

The model is exported as of the moment at which the test begins. Then each like of the test comes in
the order of time: the server is asked by `user_id` alone, and afterwards gets the like as an event.
That is what an evaluation by request assumes. Every metric of every query has to be equal, to the
last digit, to that of the fitted model, which is asked with the histories of the holdout.

    python benchmarks/replay.py --json benchmarks/results/replay.json
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
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
    line: list[tuple[Any, ...]] = []
    # Events at the time of a request are later than it, unless ties keep the log's order.
    is_in_order = split.log.ties != "drop"
    for row in rows:
        number, request_id = row["event_number"], row.get("request_id")
        row["position"] = row["timestamp"], is_in_order and number
        alone = number if request_id is None else None
        requests.setdefault((row["user_id"], request_id, alone), []).append(row)
        if row["part"] == "test" and row["stage"] in ("clicked", "exposed"):
            line.append((*row["position"], 1, number, row))
    for first, *others in requests.values():
        events = (row for row in (first, *others) if row["part"] == "test")
        if (targets := [row for row in events if row["stage"] == "clicked"]) and (
            first["part"] == "test"
        ):
            line.append((*first["position"], 0, first["event_number"], targets))
    numbers = {
        (user, seconds, frozenset(items)): number
        for number, (user, seconds, items) in enumerate(
            zip(test.user_ids.tolist(), test.times.tolist(), test.relevant, strict=True)
        )
    }
    queries, answers = test.as_queries(), {}
    for *_, is_event, _, content in sorted(line, key=lambda entry: entry[:-1]):
        if is_event:
            about = {name: content[name] for name in ("user_id", "item_id")}
            moment = content["timestamp"].isoformat()
            tell([about | {"type": content["stage"], "time": moment}])
            continue
        user, seconds = content[0]["user_id"], int(content[0]["timestamp"].timestamp() // 1)
        number = numbers[user, seconds, frozenset(row["item_id"] for row in content)]
        answers[number] = ask(user, queries[number]["request"])
    kept = sorted(answers)
    parts: dict[str, Any] = {
        name: [values[number] for number in kept]
        for name, values in vars(test).items()
        if isinstance(values, list)
    }
    parts |= {"user_ids": test.user_ids[kept], "times": test.times[kept]}
    asked = dataclasses.replace(test, **parts)
    return asked, Answers(asked.as_queries(), [answers[number] for number in kept])


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


def compare(
    model: tp.Retriever, test: tp.Holdout, answers: Answers, k: int, exclude: Any = "clicked"
) -> dict[str, Any]:
    """Compares all metrics of a model with those of the server's answers, query by query."""
    models = {"batches": model, "offline": Alone(model), "service": answers}
    asked: dict[str, Any] = {"cutoffs": (k // 5, k), "exclude": exclude, "num_bootstrap": 0}
    results = tp.evaluate(models, test, **asked).results
    batches, offline, service = (results[name].per_query for name in models)
    return {
        "num_queries": len(test),
        "means": {m: [float(np.nanmean(x[m])) for x in (offline, service)] for m in service},
        **{
            name: {m: int((~np.isclose(of[m], service[m], 0, 0, True)).sum()) for m in service}
            for name, of in (("num_unequal", offline), ("num_unequal_in_batches", batches))
        },
    }


def main() -> None:
    """Runs the benchmark."""
    from record import parser_with_json, write_json
    from serving import Client, served

    parser = parser_with_json(__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    split = load_movielens_100k().split("time", validation=0, test=0.1)
    test = split.holdout("test", by="requests")
    plan = tp.TwoTower(training=tp.TrainingSettings(max_epochs=options.epochs))
    model = plan.fit(split.before_test)
    with tempfile.TemporaryDirectory() as folder:
        token = Path(folder) / "token"
        token.write_text("0123456789abcdef")
        path = tp.export(as_of_test(model), Path(folder) / "films", index=tp.Exact()).parent
        with served(path, "--no-page", "--token-file", str(token)) as (port, _):
            client = Client(port, path.name, token.read_text())
            asked, answers = replay(
                split,
                test,
                lambda user, _: client.ask(user, K),
                lambda events: client.post("/v1/events", {"events": events}),
            )
    figures = compare(model, asked, answers, K) | {"num_not_asked": len(test) - len(asked)}
    print(figures)
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
