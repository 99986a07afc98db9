"""Measures ways of training against the default one, on MovieLens-100K, in paired seeds.

The split, the settings and the two trainings (epochs chosen on validation, then again on both) are
those of the default run. With one seed, all plans have the same initial weights and order of the
positives. Sets of plans; within a set, the others are compared with the first:

    unknown    all ids known in training; ID dropout of 5% and 10%
    popularity cosines, which cannot carry popularity; cosines with a bias for each item, which can;
               dot products, whose norms can, at two temperatures

    python benchmarks/paired_seeds.py --set unknown --seeds 5 --json benchmarks/results/unknown.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import numpy as np
import tensorflow as tf
from movielens_100k import prepared
from record import write_json

from tfrs_pipeline.run.training import train_and_refit

METRICS = ("ndcg@100", "recall@100", "recall@20", "tail/recall@100")
REPORTED = ("validation_ndcg@100", *METRICS, "seconds")
SETS: dict[str, dict[str, dict[str, Any]]] = {
    "unknown": {
        "none": {"model.id_dropout": 0.0},
        "5%": {"model.id_dropout": 0.05},
        "10%": {"model.id_dropout": 0.1},
    },
    "popularity": {
        "cosine": {},
        "cosine and bias": {"model.candidate_bias": True},
        "dot product, T = .15": {"model.normalize": False},
        "dot product, T = 1": {"model.normalize": False, "model.temperature": 1.0},
    },
}


def run_seed(seed: int, plans: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Trains and measures every plan with one seed."""
    config = tp.with_settings(tp.movielens_config(), {"seed": seed})
    rows = []
    with prepared(config) as data:
        for name, settings in plans.items():
            start = time.monotonic()
            model = train_and_refit(tp.with_settings(config, settings), data)
            measured = tp.evaluate(model, data.test, num_bootstrap=0).first
            row = {
                "seed": seed,
                "plan": name,
                "num_epochs": model.result.best_epoch,
                "validation_ndcg@100": max(model.result.history["val_ndcg@100"]),
                **{metric: measured.overall.intervals[metric].mean for metric in METRICS[:3]},
                "tail/recall@100": measured.slices["tail"].intervals["recall@100"].mean,
                "seconds": time.monotonic() - start,
            }
            rows.append(row)
            print(
                f"seed {seed}  {name:18} "
                + "  ".join(f"{k} {v:.4f}" for k, v in row.items() if isinstance(v, float)),
                f"  {row['num_epochs']} epochs",
                flush=True,
            )
    return rows


def summarise(rows: list[dict[str, Any]], metrics: Sequence[str]) -> dict[str, Any]:
    """Computes each plan's means and its paired differences from the first one.

    Args:
        rows: A dict each of "plan", "seed" and the metrics.
        metrics: Names of the metrics to average.
    """
    table: dict[str, Any] = {}
    base = {row["seed"]: row for row in rows if row["plan"] == rows[0]["plan"]}
    for plan in dict.fromkeys(row["plan"] for row in rows):
        own = [row for row in rows if row["plan"] == plan]
        table[plan] = {"num_seeds": len(own)}
        for metric in metrics:
            values = np.array([row[metric] for row in own])
            difference = values - np.array([base[row["seed"]][metric] for row in own])
            table[plan][metric] = {
                "mean": float(values.mean()),
                "deviation": float(values.std(ddof=1)) if len(own) > 1 else None,
                "difference": float(difference.mean()),
                "standard_error": float(difference.std(ddof=1) / np.sqrt(len(own)))
                if len(own) > 1
                else None,
                "num_seeds_ahead": int((difference > 0).sum()),
            }
    return table


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--set", choices=SETS, required=True, help="Which plans.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where to write the figures.")
    options = parser.parse_args()
    tf.get_logger().setLevel("ERROR")  # Hides warnings of retracing: each plan has its own model.
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        rows += run_seed(seed, SETS[options.set])
        if options.json:  # Takes hours, so partial results are saved.
            write_json(options.json, {"plans": summarise(rows, REPORTED), "runs": rows})
    for plan, row in summarise(rows, REPORTED).items():
        cells = [
            f"{name} {row[name]['mean']:.4f} ({row[name]['difference']:+.4f} "
            f"± {row[name]['standard_error'] or float('nan'):.4f}, "
            f"{row[name]['num_seeds_ahead']} ahead)"
            for name in REPORTED[:-1]
        ]
        print(f"{plan:18}", "  ".join(cells))


if __name__ == "__main__":
    main()
