r"""Measures other corrections of sampling against the package's, in paired seeds.

Data sets (DATA says with which settings):

    ml-100k    the default run
    gowalla    LightGCN's split, the preset `sets` at 64 dimensions, 8 epochs
    ml-1m, kuairand-pure
               the sparse logs of `sparse_sequences.py`, the preset `sequence`, ids alone,
               30 epochs at most

All but the first are read from a folder each (--data-dir; see `leaderboard_data.py` and
`sparse_sequences.py`). Choose plans by the validation figures; the test figures are only
for comparisons that choose nothing. Plans:

    package            the loss as it is, every column corrected by its exact log q
    unigram            the correction of published code for mixed negatives: the log of the item's
                       share of the clicks, for every column and for the positive
    none               no correction

    python benchmarks/losses.py --data ml-1m --data-dir ml-1m --plans package unigram none \
        --seeds 3 --json losses_ml_1m.json

`unigram`: Mixed sampler of Tikhonovich et al. 2025, "eSASRec", RecSys.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import numpy as np
import tensorflow as tf
from leaderboard import Task
from leaderboard_data import PROTOCOLS
from record import paired, parser_with_json, write_json
from sparse_sequences import CUTS, cut

from tfrs_pipeline.batches.batch import Batch
from tfrs_pipeline.model.corpus import Corpus
from tfrs_pipeline.model.network import TwoTowerNetwork
from tfrs_pipeline.presets import PRESETS

# Data set -> its protocol, and settings over it. The learning rate falls to 0 in the epochs given.
DATA: dict[str, tuple[str, dict[str, Any]]] = {
    "ml-100k": ("ml-100k", {}),
    "gowalla": (
        "gowalla",
        {
            **PRESETS["sets"].settings,
            "model.dim": 64,
            "model.id_dropout": 0.0,
            "model.temperature": 0.07,
            "training.max_epochs": 8,
            "training.validation_users": 3000,
        },
    ),
    **{
        name: ("ml-1m", {**PRESETS["sequence"].settings, "training.max_epochs": 30})
        for name in CUTS
    },
}
# Changes the model, given the training clicks of each row.
Change = Callable[[TwoTowerNetwork, np.ndarray], None]


def with_unigram(network: TwoTowerNetwork, counts: np.ndarray) -> None:
    """Corrects all columns, and the positive, by the log of their share of the clicks."""
    # Uniform negatives also draw items without a click, which count as half a click.
    share = np.maximum(counts, 0.5) / counts.sum()
    log_share = tf.constant(np.log(share), tf.float32)

    def log_q(inputs: Batch) -> tf.Tensor:
        # The positive's logit stays: a softmax does not change if its log q is added to all logits.
        own, shared = (tf.gather(log_share, x) for x in (inputs.candidate_row, inputs.shared_row))
        return shared[tf.newaxis, :] - own[:, tf.newaxis]

    network.log_q = log_q


def unchanged(network: TwoTowerNetwork, counts: np.ndarray) -> None:
    """Leaves the model as it is."""


# Plan -> what changes in the model, and settings.
PLANS: dict[str, tuple[Change, dict[str, Any]]] = {
    "package": (unchanged, {}),
    "unigram": (with_unigram, {}),
    "none": (unchanged, {"model.correction": "none"}),
}


class Variant(tp.TwoTower):
    """A two-tower model that is changed once it is built."""

    change: Callable[[TwoTowerNetwork], None]
    """Changes the network."""

    def build(self, corpus: Corpus) -> TwoTowerNetwork:
        """Builds the Keras model, and changes it."""
        network = super().build(corpus)
        self.change(network)
        return network


def task_of(data: str, data_dir: Path | None, folder: Path) -> Task:
    """Makes the data set and its settings."""
    name, settings = DATA[data]
    protocol = PROTOCOLS[name]
    if data in CUTS:
        if data_dir is None:
            raise ValueError("This data set is not fetched: say where it lies with --data-dir.")
        cut(data, data_dir, folder)
        files = {"data.source": "files", "data.path": folder / "sparse.parquet"}
        config = tp.with_settings(tp.RunConfig(), {**files, **protocol.settings})
    else:
        config = protocol.config(data_dir, folder / "source")
    return Task(data, protocol, tp.with_settings(config, settings), folder)


def measure(task: Task, plan: str, seed: int) -> dict[str, Any]:
    """Fits one plan and measures it on validation and test, of which training sees neither."""
    change, settings = PLANS[plan]
    config = tp.with_settings(task.config, {**settings, "seed": seed})
    data = task.prepare(config)
    tf.keras.backend.clear_session()
    plan_to_fit = Variant(
        **dict(config.model),
        training=config.training,
        seed=seed,
        change=functools.partial(change, counts=data.selection.samples.counts),
    )
    start = time.process_time()
    model = plan_to_fit.fit_samples(
        data.selection, data.validation, exclude=config.evaluation.exclude
    )
    cpu_seconds = time.process_time() - start
    k = int(config.training.monitor.partition("@")[2])
    row = {"plan": plan, "seed": seed, "num_epochs": model.result.best_epoch}
    for prefix, holdout in (("", data.validation), ("test/", data.test)):
        measured = tp.evaluate(
            model, holdout, exclude=config.evaluation.exclude, cutoffs=(k,), num_bootstrap=0
        ).first
        overall, tail = (x.intervals for x in (measured.overall, measured.slices["tail"]))
        row |= {f"{prefix}{x}@{k}": overall[f"{x}@{k}"].mean for x in ("ndcg", "recall")}
        row[f"{prefix}tail/recall@{k}"] = tail[f"recall@{k}"].mean
        row[f"{prefix}coverage@{k}"] = measured.overall.set_metrics[f"coverage@{k}"]
    return {**row, "cpu_seconds": cpu_seconds}


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
                **paired(difference),
            }
    return table


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("--data", choices=DATA, required=True)
    parser.add_argument("--data-dir", type=Path, help="Folder of the data set; see the top.")
    parser.add_argument("--plans", nargs="+", choices=PLANS, required=True, metavar="PLAN")
    parser.add_argument("--seeds", type=int, default=1, help="How many (1).")
    options = parser.parse_args()
    tf.get_logger().setLevel("ERROR")  # Hides warnings of retracing: each plan has its own model.
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        task = task_of(options.data, options.data_dir, Path(folder))
        for seed in range(options.seeds):
            for plan in options.plans:
                rows.append(measure(task, plan, seed))
                print(rows[-1], flush=True)
                if options.json:
                    metrics = [name for name in rows[0] if name not in ("plan", "seed")]
                    table = summarise(rows, metrics)
                    write_json(options.json, {"data": options.data, "plans": table, "runs": rows})


if __name__ == "__main__":
    main()
