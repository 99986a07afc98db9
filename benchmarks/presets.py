"""Measures a race of recipes, the presets as they are, and the baselines, on logs of several kinds.

Every model is fitted to the training part of each log of `log_kinds.py`, and epochs are chosen on
validation. The result is NDCG on the test, on which nothing was chosen, and the difference in
NDCG@100 from the first model's, with a 95% bootstrap interval over users. `run`, the first model,
is the winner of the race, as in `tfrs-pipeline run` without a preset. There is no second training
on the training and validation parts together. EASE is left out if there are too many items for it.

    python benchmarks/presets.py --data-dir data --json benchmarks/results/presets.json
    python benchmarks/presets.py --no-order --data-dir data --json FILE

--data-dir is that of `log_kinds.py`. An existing file keeps what is not measured again.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import tensorflow as tf
from log_kinds import EXCLUDE, logs, unordered_logs
from record import COMMIT, parser_with_json, write_json

from tfrs_pipeline.data.log import Split
from tfrs_pipeline.data.schema import Exclude
from tfrs_pipeline.presets import PRESETS

METRICS = ("ndcg@100", "ndcg@10", "recall@100")
# Whether a log has an order -> what is measured on it; the others are compared with the first.
MODELS_OF = {
    True: ("run", "default", "quick", "sequence", "sparse", "sets"),
    False: ("run", "sets", "default", "ids"),
}


def raced(split: Split, seed: int, exclude: Exclude) -> tuple[Any, dict[str, Any]]:
    """Races all recipes; returns the winner's model, and the race."""
    settings = {"evaluation.exclude": exclude}
    model, race = tp.race(split.train, split.validation, settings=settings, seed=seed)
    return model, {"winner": race.winner, "raced": {x.name: [x.best, x.spent] for x in race.curves}}


def preset(name: str, split: Split, seed: int, exclude: Exclude) -> tuple[Any, dict[str, Any]]:
    """Fits a preset, or the default; the log itself says whether it has an order."""
    settings = dict(PRESETS[name].settings) if name in PRESETS else {}
    settings.pop("data.is_ordered", None)
    config = tp.with_settings(tp.RunConfig(), settings)
    plan = tp.TwoTower(**dict(config.model), training=config.training, seed=seed)
    return plan.fit(split.train, split.validation, exclude=exclude), {}


def measure(split: Split, seed: int, exclude: Exclude, names: list[str]) -> dict[str, Any]:
    """Fits models to one log; returns, by name, test results, epochs and CPU time."""
    train, validation, test = split
    fitted: dict[str, tp.Retriever] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        tf.keras.backend.clear_session()
        start = time.process_time()
        made = raced(split, seed, exclude) if name == "run" else preset(name, split, seed, exclude)
        fitted[name], found[name] = made
        found[name] |= {
            "cpu_seconds": time.process_time() - start,
            "num_epochs": made[0].result.num_epochs,
            "best_epoch": made[0].result.best_epoch,
            "commit": COMMIT,
        }
    baselines: dict[str, Any] = {
        "popularity": tp.MostPopular(),
        "ease": tp.Ease(),
        "ials": tp.Ials(seed=seed),
    }
    if train.is_ordered:
        baselines["transitions"] = tp.Transitions()
    if exclude == "none":
        baselines["repeats"] = tp.Repeats()
    if train.items.count().to_pyarrow().as_py() > baselines["ease"].max_candidates:
        del baselines["ease"]
    for name, baseline in baselines.items():
        start = time.process_time()
        fitted[name] = baseline.fit(train)
        found[name] = {"cpu_seconds": time.process_time() - start}
    chosen_on = tp.evaluate(fitted, validation, exclude=exclude, cutoffs=(10, 100), num_bootstrap=0)
    for name, result in chosen_on.results.items():
        found[name]["validation"] = result.overall.intervals["ndcg@100"].mean
    evaluation = tp.evaluate(fitted, test, exclude=exclude, cutoffs=(10, 100))
    for name, result in evaluation.results.items():
        found[name] |= {metric: result.overall.intervals[metric].mean for metric in METRICS}
        if name in evaluation.differences:
            difference = evaluation.differences[name]["ndcg@100"].as_dict()
            found[name]["difference"] = {"from": names[0], **difference}
    return found


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("--data-dir", type=Path, help="Folder of the data sets.")
    parser.add_argument("--logs", nargs="+", metavar="LOG", help="Which; all without it.")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="Which; all without it.")
    parser.add_argument("--no-order", action="store_true", help="The logs without an order.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tf.get_logger().setLevel("ERROR")  # Hides warnings of retracing: each log has its own model.
    is_there = options.json is not None and options.json.exists()
    found: dict[str, Any] = json.loads(options.json.read_text())["logs"] if is_there else {}
    with tempfile.TemporaryDirectory() as folder:
        make = unordered_logs if options.no_order else logs
        makers = make(options.data_dir, Path(folder))
        if unknown := set(options.logs or ()) - makers.keys():
            parser.error(f"--logs: got {sorted(unknown)}; there are {list(makers)}")
        for log in options.logs or makers:
            split, exclude = makers[log](), EXCLUDE.get(log, "clicked")
            models = options.models or list(MODELS_OF[split.train.is_ordered])
            now = measure(split, options.seed, exclude, models)
            found[log] = {**found.get(log, {}), **now}
            for name, x in now.items():
                print(
                    f"{log:20} {name:12} ndcg@100 {x['ndcg@100']:.4f}   "
                    f"{x['cpu_seconds']:6.1f} CPU s",
                    flush=True,
                )
            if options.json:
                write_json(options.json, {"logs": found}, seed=options.seed)


if __name__ == "__main__":
    main()
