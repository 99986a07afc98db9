"""A day of events: what an item graph of now finds that the graph of the night did not.

Reads a finished run whose test follows its training in time, and asks its model at each click of
the test: without a bonus, with the graph of all events before the test, and with a graph that also
has the clicks of the test up to the hour before. The bonus is the one that validation chose.

    tfrs-pipeline run --data.source movielens-100k --split.kind time --run-dir RUN
    python benchmarks/graph.py RUN [--hours 1] [--json FILE]
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from record import parser_with_json, write_json

import tfrs_pipeline as tp
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.run.training import split_in
from tfrs_pipeline.samples.latest_histories import latest_histories
from tfrs_pipeline.search.item_graph import ItemGraph


def graph_until(log: Any, users: tp.Ids, items: tp.Ids, kind: str, until: float) -> ItemGraph:
    """Builds the graph of the positives of a log before a time in seconds since 1970."""
    histories, _, times = latest_histories(log, users, items)
    assert times is not None
    return ItemGraph.build(histories.where(times < until), len(items), kind)


def part_of(holdout: tp.Holdout, places: np.ndarray) -> tp.Holdout:
    """Keeps some queries of a holdout."""
    kept: dict[str, Any] = {}
    for field in dataclasses.fields(holdout):
        values = getattr(holdout, field.name)
        if field.name in ("user_ids", "times"):
            kept[field.name] = values[places]
        elif isinstance(values, list) and len(values) == len(holdout):
            kept[field.name] = [values[place] for place in places]
    return dataclasses.replace(holdout, **kept)


def main() -> None:
    """Measures the three models hour by hour."""
    parser = parser_with_json(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--hours", type=float, default=1.0)
    options = parser.parse_args()
    split = split_in(RunFolder(options.run))
    model = tp.trained_in(options.run, "refit", "two_tower")
    bonus = model.bonus
    if bonus is None or bonus.neighbours is None:
        raise SystemExit("Validation chose no bonus of neighbours in this run.")
    test = split.holdout("test", by="requests", trained_on=split.before_test)
    users, items = tp.Ids(model.query_ids), tp.Ids(model.candidate_ids)
    assert test.times is not None
    hours = np.floor(test.times / 3600 / options.hours)
    rows = []
    for hour in np.unique(hours):
        part = part_of(test, np.flatnonzero(hours == hour))
        start = hour * 3600 * options.hours
        graph = graph_until(split.log, users, items, bonus.neighbours.kind, start)
        now = dataclasses.replace(bonus, graph=graph)
        models = {
            "without": dataclasses.replace(model, bonus=None),
            "night": model,
            "now": dataclasses.replace(model, bonus=now),
        }
        measured = tp.evaluate(models, part, num_bootstrap=0)
        rows.append(
            {"start": float(start), "queries": len(part)}
            | {
                name: result.overall.intervals["ndcg@100"].mean
                for name, result in measured.results.items()
            }
        )
        print(rows[-1], flush=True)
    num = np.array([row["queries"] for row in rows])
    means = {
        name: float(np.average([row[name] for row in rows], weights=num))
        for name in ("without", "night", "now")
    }
    print(means)
    write_json(options.json, {"hours": rows, "ndcg@100": means})


if __name__ == "__main__":
    main()
