"""Compares sampling plans on a simulated funnel, against the users' true preferences.

Every plan trains the same two-tower model for the same number of epochs on the same log, seed by
seed. Two truths are recalled in the top 50:

    truth   the 50 items that a user would click most probably if shown, whatever the funnel showed
    clicks  the items that the user clicked in the last fifth of their clicks and not before: what
            the funnel, with its own taste for popular items, went on to show

Differences are paired by seed: mean, standard error, and in how many seeds the plan came out ahead.

    python benchmarks/funnel.py --seeds 10 --json funnel.json
    python benchmarks/funnel.py --seeds 3 --popularity-weight 0.3 --plans easy in-batch
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from record import write_json

import tfrs_pipeline  # noqa: F401  (selects Keras 2 before TensorFlow is imported)
from tfrs_pipeline.data.schema import Stage
from tfrs_pipeline.data.split import Holdout
from tfrs_pipeline.model.fit import train
from tfrs_pipeline.model.queries import exact_retriever
from tfrs_pipeline.model.two_tower import TwoTowerModel
from tfrs_pipeline.negatives.batches import HardSampling, TrainingBatches
from tfrs_pipeline.samples.build import build_samples, read_ids, read_samples
from tfrs_pipeline.samples.hard_pools import HardNegativeRules
from tfrs_pipeline.samples.positives import power_law_rate
from tfrs_pipeline.sources.simulated import FunnelOptions, Simulation, simulate_funnel

K = 50
TRUTHS = ("recall@50 of truth", "recall@50 of clicks")
LOSERS: tuple[HardSampling, ...] = (("retrieved", 0.5, 4), ("pre_ranked", 0.5, 4))
EXPOSED: tuple[HardSampling, ...] = (("exposed", 1.0, 8),)


@dataclass(frozen=True)
class Plan:
    """A sampling plan and the one that it is compared with."""

    name: str
    against: str | None
    batches: dict[str, Any]
    correct_sampling: bool = True


MIXED = {"easy_negatives": ((0.0, 256), (0.75, 256))}
IN_BATCH: dict[str, Any] = {"easy_negatives": ()}
PLANS = (
    Plan("easy", None, MIXED),
    Plan("easy, uncorrected", "easy", MIXED, correct_sampling=False),
    Plan("in-batch", "easy", IN_BATCH),
    Plan("in-batch, uncorrected", "in-batch", IN_BATCH, correct_sampling=False),
    *(
        Plan(f"easy, positives^-{exponent}", "easy", {**MIXED, "resampling_exponent": exponent})
        for exponent in (0.3, 0.6)
    ),
    *(
        Plan(f"hybrid f={f}", "easy", {**MIXED, "hard_share": f, "hard_negatives": LOSERS})
        for f in (0.01, 0.05, 0.2, 0.5)
    ),
    Plan(
        "hybrid f=0.05, pre-rank losers",
        "easy",
        {**MIXED, "hard_share": 0.05, "hard_negatives": LOSERS[:1]},
    ),
    *(
        Plan(
            f"exposed as negatives f={f}",
            "easy",
            {**MIXED, "hard_share": f, "hard_negatives": EXPOSED},
        )
        for f in (0.05, 0.5)
    ),
)


def measure(
    model: TwoTowerModel, simulation: Simulation, queries: Holdout, folder: Path
) -> dict[str, float]:
    """Recalls both truths, and averages the true click probability of the 50 retrieved."""
    item_ids, user_ids = read_ids(folder)
    retriever = exact_retriever(model, user_ids, item_ids)
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


def run_seed(seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Simulates one funnel and trains every plan on it."""
    simulation = simulate_funnel(
        num_users=options.users,
        num_items=options.items,
        num_requests=options.requests,
        seed=seed,
        options=FunnelOptions(popularity_weight=options.popularity_weight),
    )
    split = simulation.log.split("last_share", validation=0, test=0.2)
    queries = split.test
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rules = HardNegativeRules(
            (Stage.RETRIEVED, Stage.PRE_RANKED, Stage.EXPOSED),
            window=timedelta(days=1),
            allow_exposed=True,
        )
        build_samples(
            simulation.log,
            split.train.events,
            folder,
            seed=seed,
            hard_negatives=rules,
        )
        samples = read_samples(folder)
        for plan in PLANS:
            if options.plans and not any(part in plan.name for part in options.plans):
                continue
            start = time.monotonic()
            tf.keras.utils.set_random_seed(seed)
            model = TwoTowerModel(
                num_queries=options.users,
                num_candidates=options.items,
                embedding_dim=32,
                recency_decay=0.98,
                temperature=options.temperature,
                correction="mixture" if plan.correct_sampling else "none",
            )
            settings = dict(plan.batches)
            exponent = settings.pop("resampling_exponent", None)
            batches = TrainingBatches(
                samples,
                batch_size=512,
                history_length=50,
                seed=seed,
                positive_rate=None
                if exponent is None
                else power_law_rate(samples.counts, exponent),
                **settings,
            )
            train(model, batches, max_epochs=options.epochs, optimizer="adam", learning_rate=0.002)
            measured = measure(model, simulation, queries, folder)
            rows.append(
                {
                    "seed": seed,
                    "plan": plan.name,
                    **measured,
                    "mean_hard_share": batches.mean_hard_share,
                    "seconds": time.monotonic() - start,
                }
            )
            print(
                f"seed {seed}  {plan.name:32}"
                + "  ".join(f"{name} {value:.4f}" for name, value in measured.items()),
                flush=True,
            )
    return rows


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Computes each plan's means and its paired differences."""
    table = []
    runs = {(row["plan"], row["seed"]): row for row in rows}
    for plan in PLANS:
        own = [row for row in rows if row["plan"] == plan.name]
        if not own:
            continue
        entry: dict[str, Any] = {"plan": plan.name, "num_seeds": len(own), "against": plan.against}
        for name in TRUTHS:
            entry[name] = {"mean": float(np.mean([row[name] for row in own]))}
            others = [runs.get((plan.against, row["seed"])) for row in own]
            if None in others:
                continue
            pairs = zip(own, others, strict=True)
            difference = np.array([a[name] - b[name] for a, b in pairs if b is not None])
            entry[name] |= {
                "difference": float(difference.mean()),
                "standard_error": float(difference.std(ddof=1) / np.sqrt(len(difference)))
                if len(difference) > 1
                else None,
                "num_seeds_ahead": int((difference > 0).sum()),
            }
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    parser.add_argument("--plans", nargs="*", default=[], help="Parts of the names to run.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where to write the figures.")
    options = parser.parse_args()
    # A model a plan retraces its functions: no fault here.
    tf.get_logger().setLevel("ERROR")
    rows: list[dict[str, Any]] = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        rows += run_seed(seed, options)
    table = summarise(rows)
    print_table(table)
    if options.json:
        write_json(options.json, {"plans": table, "runs": rows})


if __name__ == "__main__":
    main()
