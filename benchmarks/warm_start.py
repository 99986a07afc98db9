"""Measures retraining from yesterday's model against training from nothing, on MovieLens-100K.

The log is cut into periods. At every cut a model is trained on the likes of the window that ends
there, and asked what users like in the next period. The first half of a user's likes in that period
is in the history, as in service. The second half has to be found among all items known at the cut
except the user's earlier likes. A user's query counts once in every period.

    from nothing          trained anew at every cut
    a fifth               the same with a fifth of the epochs
    warm                  started from its own model of the cut before, with as many epochs
    warm, a fifth         the same with a fifth of the epochs
    refreshed             the model trained from nothing one cut before, not trained again; in its
                          refreshed index, new items are embedded by their features
    refreshed, first cut  the same with the model of the first cut, ever older

For each seed the number of epochs is chosen once, on validation before the first cut, for all its
models. "New items" are those that nobody had rated by the previous cut, ranked among all.

    python benchmarks/warm_start.py --seeds 3 --json benchmarks/results/warm_start.json
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import numpy as np
import pandas as pd
from record import parser_with_json, write_json

from tfrs_pipeline.evaluation.bootstrap import bootstrap_intervals
from tfrs_pipeline.search.topk import ExactRetriever
from tfrs_pipeline.sources.movielens import load_movielens_100k

METRICS = ("ndcg@100", "recall@100", "recall@20")
REFERENCE, FIFTH, WARM, WARM_FIFTH = "from nothing", "a fifth", "warm", "warm, a fifth"
REFRESHED, FIRST = "refreshed", "refreshed, first cut"
NEW = "new items/recall@100"
PLANS = (REFERENCE, FIFTH, WARM, WARM_FIFTH, REFRESHED, FIRST)


@dataclasses.dataclass(frozen=True)
class Cut:
    """What is known at a cut, and what is asked after it."""

    log: tp.Log
    holdout: tp.Holdout
    new_items: frozenset[int]


def cuts(log: tp.Log, period_days: int, window_days: int) -> Iterator[Cut]:
    """Cuts a log into periods; the first cut comes once a window is full."""
    events = log.events.order_by("event_number").to_pandas()
    events["is_like"] = events["stage"].astype(str) == "clicked"
    period, window = timedelta(days=period_days), timedelta(days=window_days)
    at, end = events["timestamp"].min() + window, events["timestamp"].max()
    before: set[int] = set()
    while at + period <= end:
        past, now = events["timestamp"] < at, events["timestamp"].between(at, at + period, "left")
        known = set(events.loc[past, "item_id"])
        ids = sorted(known)
        in_window = (log.events["timestamp"] >= at - window) & (log.events["timestamp"] < at)
        part = dataclasses.replace(
            log,
            events=log.events.filter(in_window),
            items=log.items.filter(log.items["item_id"].isin(ids)),
        )
        yield Cut(
            part,
            _holdout(events[past], events[now & events["is_like"]], ids),
            frozenset(known - before) if before else frozenset(),
        )
        before, at = known, at + period


def _holdout(past: pd.DataFrame, now: pd.DataFrame, ids: list[int]) -> tp.Holdout:
    """Asks for the second half of what each user likes in a period."""
    likes = past[past["is_like"]].groupby("user_id")["item_id"].agg(list)
    candidates = np.array(ids, np.int64)
    users, histories, relevant = [], [], []
    asked = now[now["item_id"].isin(ids)].groupby("user_id")["item_id"].agg(list)
    for user, items in asked.items():
        half = len(items) // 2
        if half:
            users.append(user)
            histories.append(np.array([*likes.get(user, []), *items[:half]], np.int64))
            relevant.append(np.array(items[half:], np.int64))
    clicked = [np.unique(history) for history in histories]
    counts = past.loc[past["is_like"], "item_id"].value_counts().reindex(ids, fill_value=0)
    return tp.Holdout(
        np.array(users, np.int64),
        histories,
        relevant,
        clicked,
        clicked,
        candidates,
        counts.to_numpy(np.int64),
    )


def refreshed(model: tp.FittedTwoTower, items: pd.DataFrame) -> ExactRetriever:
    """Embeds today's items with a model, as `refresh-index` does (its tests hold the two equal)."""
    columns = {
        feature.name: feature.encode_column(items[feature.name].tolist())
        for feature in model.corpus.candidate_features
    }
    rows = model.corpus.candidate_ids.rows(items["item_id"].to_numpy())
    embeddings = model.network.embed_candidates(rows, columns).numpy()
    return ExactRetriever(items["item_id"].to_numpy(), embeddings, model.query_embeddings)


def run_seed(
    log: tp.Log, seed: int, period_days: int, window_days: int, num_periods: int | None
) -> dict[str, Any]:
    """Goes through the periods with one seed.

    Returns:
        Number of epochs; by plan, each metric's values for the queries of all periods, and the
        steps and seconds of its trainings.
    """
    config = tp.movielens_config()
    values: dict[str, dict[str, list[np.ndarray]]] = {p: defaultdict(list) for p in PLANS}
    costs: dict[str, list[tuple[int, float]]] = defaultdict(list)
    models: dict[str, tp.FittedTwoTower] = {}
    num_epochs = 0

    def fit(cut: Cut, name: str, epochs: int, source: tp.FittedTwoTower | None = None) -> None:
        training = config.training.model_copy(update={"max_epochs": epochs})
        plan = tp.TwoTower(**dict(config.model), training=training, seed=seed)
        start = time.monotonic()
        models[name] = model = plan.fit(cut.log, warm_start=source)
        first = 0 if source is None else int(source.network.optimizer.iterations)
        steps = int(model.network.optimizer.iterations) - first
        costs[name].append((steps, time.monotonic() - start))

    for number, cut in enumerate(cuts(log, period_days, window_days)):
        if number == 0:
            train, validation, _ = cut.log.split("last_share", validation=0.1, test=0.1)
            chosen = tp.TwoTower(**dict(config.model), training=config.training, seed=seed)
            best = chosen.fit(train, validation).result.best_epoch
            num_epochs = 5 * -(-best // 5)  # So that a fifth is an integer.
            fit(cut, REFERENCE, num_epochs)
            models |= dict.fromkeys((WARM, WARM_FIFTH, FIRST), models[REFERENCE])
            continue
        items = cut.log.items.order_by("item_id").to_pandas()
        old = models[REFERENCE]
        fit(cut, REFERENCE, num_epochs)
        fit(cut, FIFTH, num_epochs // 5)
        fit(cut, WARM, num_epochs, models[WARM])
        fit(cut, WARM_FIFTH, num_epochs // 5, models[WARM_FIFTH])
        measured = {
            **{
                name: refreshed(models[name], items)
                for name in (REFERENCE, FIFTH, WARM, WARM_FIFTH)
            },
            REFRESHED: refreshed(old, items),
            FIRST: refreshed(models[FIRST], items),
        }
        for name, found in measure(measured, cut).items():
            for metric, of_queries in found.items():
                values[name][metric].append(of_queries)
        ndcg = {name: np.mean(found["ndcg@100"][-1]) for name, found in values.items()}
        line = "  ".join(f"{name} {x:.3f}" for name, x in ndcg.items())
        print(f"seed {seed}, cut {number}: {len(cut.holdout)} queries  {line}", flush=True)
        if number == num_periods:
            break
    joined = {
        name: {metric: np.concatenate(parts) for metric, parts in found.items()}
        for name, found in values.items()
    }
    return {"num_epochs": num_epochs, "values": joined, "costs": costs}


def measure(retrievers: dict[str, ExactRetriever], cut: Cut) -> dict[str, dict[str, np.ndarray]]:
    """Measures models after a cut; the recall of new items is NaN where a query has none."""
    found = tp.evaluate(retrievers, cut.holdout, num_bootstrap=0).results
    values = {name: {m: result.per_query[m] for m in METRICS} for name, result in found.items()}
    users = found[REFERENCE].user_ids.tolist()
    for name in retrievers:
        values[name][NEW] = np.full(len(users), np.nan)
    new = [ids[np.isin(ids, list(cut.new_items))] for ids in cut.holdout.relevant]
    if any(map(len, new)):
        of_new = dataclasses.replace(cut.holdout, relevant=new)
        for name, result in tp.evaluate(retrievers, of_new, num_bootstrap=0).results.items():
            places = np.searchsorted(users, result.user_ids)
            values[name][NEW][places] = result.per_query["recall@100"]
    return values


def summarise(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Averages each query over the seeds, then over queries; differences are from the reference."""
    table: dict[str, Any] = {}
    metrics = (*METRICS, NEW)
    stacked = {
        plan: np.stack([np.stack([s["values"][plan][m] for m in metrics], 1) for s in seeds])
        for plan in PLANS
    }
    for plan, of_seeds in stacked.items():
        difference = of_seeds - stacked[REFERENCE]
        both = np.concatenate([of_seeds.mean(axis=0), difference.mean(axis=0)], axis=1)
        intervals = bootstrap_intervals(both, seed=0)
        costs = [cost for s in seeds for cost in s["costs"][plan]]
        table[plan] = {
            "steps": float(np.mean([steps for steps, _ in costs])) if costs else 0.0,
            "seconds": float(np.mean([seconds for _, seconds in costs])) if costs else 0.0,
        }
        for i, metric in enumerate(metrics):
            by_seed = np.nanmean(difference[:, :, i], axis=1)
            table[plan][metric] = {
                **intervals[i].as_dict(),
                "difference": intervals[len(metrics) + i].as_dict(),
                "difference_by_seed": by_seed.tolist(),
                "num_queries": int(np.count_nonzero(~np.isnan(of_seeds[0, :, i]))),
            }
    return table


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("--data", type=Path, help="MovieLens-100K's folder; fetched if not given.")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="Seeds 0 to N - 1 (3).")
    parser.add_argument("--period-days", type=int, default=20, metavar="N", help="(20)")
    parser.add_argument("--window-days", type=int, default=100, metavar="N", help="(100)")
    parser.add_argument("--periods", type=int, metavar="N", help="At most so many.")
    options = parser.parse_args()
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # Hides warnings of retracing.
    data = tp.movielens_config().data
    log = load_movielens_100k(
        options.data, item_features=data.item_features, user_features=data.user_features
    )
    seeds: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        seeds.append(run_seed(log, seed, options.period_days, options.window_days, options.periods))
        if options.json:  # Takes an hour, so partial results are saved.
            figures = {
                "num_seeds": len(seeds),
                "period_days": options.period_days,
                "window_days": options.window_days,
                "num_epochs": [s["num_epochs"] for s in seeds],
                "plans": summarise(seeds),
            }
            write_json(options.json, figures, seed=0)
    for plan, row in summarise(seeds).items():
        cells = [
            f"{metric} {row[metric]['mean']:.4f} ({row[metric]['difference']['mean']:+.4f} "
            f"[{row[metric]['difference']['low']:+.4f}, {row[metric]['difference']['high']:+.4f}])"
            for metric in (*METRICS, NEW)
        ]
        print(f"{plan:22}{row['steps']:6.0f} steps {row['seconds']:6.1f} s  " + "  ".join(cells))


if __name__ == "__main__":
    main()
