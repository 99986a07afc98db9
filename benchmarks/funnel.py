"""Compares sampling plans on a simulated funnel, against the users' true preferences.

Every plan trains the same two-tower model for the same number of epochs on the same log, seed by
seed. Recall@50 is measured for two sets of items:

    truth   the 50 items that a user would most probably click if shown, whatever the funnel showed
    clicks  the items of the last fifth of the user's clicks that the user had not clicked before;
            the funnel, which favours popular items, had chosen what to show

Differences are paired by seed: mean, standard error, and in how many seeds the plan came out ahead.

    python benchmarks/funnel.py --seeds 10 --json funnel.json
    python benchmarks/funnel.py --seeds 3 --popularity-weight 0.3 --plans easy in-batch
    python benchmarks/funnel.py --false-negatives --json funnel_false_negatives.json

The last one trains nothing: it counts the losers of each stage that their users click in the next
tenth of their clicks, for the first seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import numpy as np
import tensorflow as tf
from record import paired, parser_with_json, write_json

from tfrs_pipeline.model.corpus import Corpus, TrainingSet
from tfrs_pipeline.sources.simulated import FunnelOptions, Simulation, simulate_funnel

K = 50
TRUTHS = ("recall@50 of truth", "recall@50 of clicks")
EVERY_STAGE = ("retrieved", "pre_ranked", "exposed")
LOSING: tuple[Any, ...] = ("retrieved", "pre_ranked", "ranked", "exposed")


def losers(share: float, *stages: Any, num: int = 4) -> dict[str, Any]:
    """Returns the settings of hard negatives, `num` columns of each stage."""
    return {"hard": tp.FunnelLosers(share, stages=stages, num=num, allow_exposed=True)}


IN_BATCH = {"negatives": (tp.InBatch(),)}
UNCORRECTED = {"correction": "none"}
# Plan -> the plan that it is compared with, and how its settings differ from the defaults.
PLANS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "easy": (None, {}),
    "easy, uncorrected": ("easy", UNCORRECTED),
    "in-batch": ("easy", IN_BATCH),
    "in-batch, uncorrected": ("in-batch", {**IN_BATCH, **UNCORRECTED}),
    **{
        f"easy, positives^-{exponent}": ("easy", {"resampling_exponent": exponent})
        for exponent in (0.3, 0.6)
    },
    **{
        f"hybrid f={share}": ("easy", losers(share, "retrieved", "pre_ranked"))
        for share in (0.01, 0.05, 0.2, 0.5)
    },
    "hybrid f=0.05, pre-rank losers": ("easy", losers(0.05, "retrieved")),
    **{
        f"exposed as negatives f={share}": ("easy", losers(share, "exposed", num=8))
        for share in (0.05, 0.5)
    },
}


def measure(
    retriever: tp.Retriever, simulation: Simulation, queries: tp.Holdout
) -> dict[str, float]:
    """Measures both recalls, and the mean true click probability of the 50 retrieved."""
    asked = queries.as_queries()
    found, _ = retriever.retrieve(asked, K)
    best = simulation.best_items(queries.user_ids, K)
    probability = simulation.click_probability(queries.user_ids)
    column = np.searchsorted(simulation.item_ids, found.astype(np.int64))
    new, _ = retriever.retrieve(asked, K, exclude=queries.clicked)
    later = [np.setdiff1d(a, b) for a, b in zip(queries.relevant, queries.clicked, strict=True)]
    return {
        "recall@50 of truth": float(
            np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, best, strict=True)])
        ),
        "recall@50 of clicks": float(
            np.mean([np.isin(a, b).mean() for a, b in zip(later, new, strict=True) if len(a)])
        ),
        "true_click_probability@50": float(np.take_along_axis(probability, column, axis=1).mean()),
    }


def simulate(seed: int, options: argparse.Namespace) -> Simulation:
    """Simulates one funnel."""
    return simulate_funnel(
        num_users=options.users,
        num_items=options.items,
        num_requests=options.requests,
        seed=seed,
        options=FunnelOptions(popularity_weight=options.popularity_weight),
    )


def count_false(options: argparse.Namespace) -> dict[str, Any]:
    """Counts the losers of each stage that their users click later."""
    split = simulate(options.first_seed, options).log.split("last_share", validation=0.1, test=0.2)
    plan = tp.TwoTower(hard=tp.FunnelLosers(stages=LOSING, allow_exposed=True))
    counts = plan.false_negatives(split.train, split.validation)
    print("\n".join(f"{stage}: {count}" for stage, count in counts.items()))
    return {stage: dataclasses.asdict(count) for stage, count in counts.items()}


def run_seed(seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Simulates one funnel and trains every plan on it."""
    simulation = simulate(seed, options)
    split = simulation.log.split("last_share", validation=0, test=0.2)
    rows = []
    every = tp.FunnelLosers(stages=EVERY_STAGE, allow_exposed=True)
    training = tp.TrainingSettings(
        batch_size=512, max_epochs=options.epochs, optimizer="adam", learning_rate=0.002
    )
    with tempfile.TemporaryDirectory() as folder:
        data = TrainingSet.build(split.train, Path(folder), seed=seed, hard=every)
        # Models have ids alone.
        ids = Corpus(data.corpus.candidate_ids, data.corpus.query_ids)
        data = dataclasses.replace(data, corpus=ids)
        for name, (_, settings) in PLANS.items():
            if options.plans and not any(part in name for part in options.plans):
                continue
            start = time.monotonic()
            plan = tp.TwoTower(
                training=training,
                seed=seed,
                dim=32,
                recency_decay=0.98,
                id_dropout=0.0,
                temperature=options.temperature,
                **settings,
            )
            model = plan.fit_samples(data)
            measured = measure(model, simulation, split.test)
            rows.append(
                {
                    "seed": seed,
                    "plan": name,
                    **measured,
                    "mean_hard_share": plan.batches(data.samples).mean_hard_share,
                    "seconds": time.monotonic() - start,
                }
            )
            print(
                f"seed {seed}  {name:32}"
                + "  ".join(f"{metric} {value:.4f}" for metric, value in measured.items()),
                flush=True,
            )
    return rows


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Computes each plan's means and its paired differences."""
    table = []
    runs = {(row["plan"], row["seed"]): row for row in rows}
    for plan, (against, _) in PLANS.items():
        own = [row for row in rows if row["plan"] == plan]
        if not own:
            continue
        entry: dict[str, Any] = {"plan": plan, "num_seeds": len(own), "against": against}
        for name in TRUTHS:
            entry[name] = {"mean": float(np.mean([row[name] for row in own]))}
            others = [runs.get((against, row["seed"])) for row in own]
            if None in others:
                continue
            pairs = zip(own, others, strict=True)
            difference = np.array([a[name] - b[name] for a, b in pairs if b is not None])
            entry[name] |= paired(difference)
        table.append(entry)
    return table


def print_table(table: list[dict[str, Any]]) -> None:
    """Prints the summary as Markdown."""
    print("\n| plan | against | " + " | ".join(TRUTHS) + " |")
    print("|---|---|" + "---:|" * len(TRUTHS))
    for entry in table:
        cells = []
        for name in TRUTHS:
            cell = f"{entry[name]['mean']:.4f}"
            if "difference" in entry[name]:
                error = entry[name]["standard_error"]
                spread = "" if error is None else f" ± {error:.4f}"
                ahead = f"{entry[name]['num_seeds_ahead']} of {entry['num_seeds']}"
                cell += f" ({entry[name]['difference']:+.4f}{spread}, ahead in {ahead})"
            cells.append(cell)
        print(f"| {entry['plan']} | {entry['against'] or ''} | " + " | ".join(cells) + " |")


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--temperature", type=float, default=0.15)
    parser.add_argument(
        "--popularity-weight",
        type=float,
        default=FunnelOptions().popularity_weight,
        help="Of popularity in the funnel's retrieval; in the truth it has .3.",
    )
    parser.add_argument("--false-negatives", action="store_true", help="Only count them.")
    parser.add_argument("--plans", nargs="*", default=[], help="Parts of the names to run.")
    options = parser.parse_args()
    # Hides warnings of retracing: each plan has its own model.
    tf.get_logger().setLevel("ERROR")
    if options.false_negatives:
        counts = count_false(options)
        if options.json:
            write_json(options.json, {"false_negatives": counts}, seed=options.first_seed)
        return
    rows: list[dict[str, Any]] = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        rows += run_seed(seed, options)
    table = summarise(rows)
    print_table(table)
    if options.json:
        write_json(options.json, {"plans": table, "runs": rows})


if __name__ == "__main__":
    main()
