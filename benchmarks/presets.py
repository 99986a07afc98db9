"""Measures the presets as they are, and the baselines, on logs of several kinds.

Every model is fitted to the training part of each log of `log_kinds.py`, and epochs are chosen on
validation. The result is NDCG@100 on the test, on which nothing was chosen, and its difference from
the first model's, with a 95% bootstrap interval over users. There is no second training on the
training and validation parts together. EASE is left out where there are too many items for it.

    python benchmarks/presets.py --data-dir data --json benchmarks/results/presets.json
    python benchmarks/presets.py --no-order --data-dir data --json FILE

--data-dir is that of `log_kinds.py`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import tensorflow as tf
from log_kinds import logs, unordered_logs
from record import write_json

from tfrs_pipeline.data.log import Split
from tfrs_pipeline.presets import PRESETS

METRICS = ("ndcg@100", "ndcg@10", "recall@100")
# Whether a log has an order -> what is measured on it; the others are compared with the first.
PRESETS_OF = {True: ("default", "quick", "sequence"), False: ("sets", "default", "ids")}


def measure(split: Split, seed: int) -> dict[str, dict[str, Any]]:
    """Fits all models to one log; returns by name what its test, epochs and CPU time were."""
    train, validation, test = split
    fitted: dict[str, tp.Retriever] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in PRESETS_OF[train.is_ordered]:
        tf.keras.backend.clear_session()
        settings = PRESETS[name][1] if name in PRESETS else {}
        config = tp.with_settings(tp.RunConfig(), settings)
        plan = tp.TwoTower(**dict(config.model), training=config.training, seed=seed)
        start = time.process_time()
        fitted[name] = plan.fit(train, validation)
        found[name] = {
            "cpu_seconds": time.process_time() - start,
            "num_epochs": fitted[name].result.num_epochs,
            "best_epoch": fitted[name].result.best_epoch,
        }
    baselines: dict[str, Any] = {
        "popularity": tp.MostPopular(),
        "ease": tp.Ease(),
        "ials": tp.Ials(seed=seed),
    }
    if train.items.count().to_pyarrow().as_py() > baselines["ease"].max_candidates:
        del baselines["ease"]
    for name, baseline in baselines.items():
        start = time.process_time()
        fitted[name] = baseline.fit(train)
        found[name] = {"cpu_seconds": time.process_time() - start}
    evaluation = tp.evaluate(fitted, test, cutoffs=(10, 100))
    for name, result in evaluation.results.items():
        found[name] |= {metric: result.overall.intervals[metric].mean for metric in METRICS}
        if name in evaluation.differences:
            found[name]["difference"] = evaluation.differences[name]["ndcg@100"].as_dict()
    return found


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="Folder of the data sets.")
    parser.add_argument("--logs", nargs="+", metavar="LOG", help="Which; all without it.")
    parser.add_argument("--no-order", action="store_true", help="The logs without an order.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where to write the figures.")
    options = parser.parse_args()
    tf.get_logger().setLevel("ERROR")  # A model a log retraces its functions: no fault here.
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        make = unordered_logs if options.no_order else logs
        makers = make(options.data_dir, Path(folder))
        if unknown := set(options.logs or ()) - makers.keys():
            parser.error(f"--logs: got {sorted(unknown)}; there are {list(makers)}")
        for log in options.logs or makers:
            found[log] = measure(makers[log](), options.seed)
            for name, x in found[log].items():
                print(
                    f"{log:20} {name:12} ndcg@100 {x['ndcg@100']:.4f}   "
                    f"{x['cpu_seconds']:6.1f} CPU s",
                    flush=True,
                )
            if options.json:
                write_json(options.json, {"logs": found}, seed=options.seed)


if __name__ == "__main__":
    main()
