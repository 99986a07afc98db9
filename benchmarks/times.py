"""Measures what the preset `sequence` gains from the times of the events.

    ml-100k        MovieLens-100K's ratings of 4 and 5, ids alone; the last one of each user is the
                   test, the one before it the validation
    kuairand-pure  the clicks of seven days of KuaiRand-Pure, as in `request.py`: five days to train
                   on, a day to choose the epoch, a day to test

Each seed trains twice on the same samples, whose histories hold only strictly earlier events: once
without and once with the times. Choose by the validation figures.

    python benchmarks/times.py --data ml-100k --seeds 0 1 --json times_ml_100k.json
    python benchmarks/times.py --data kuairand-pure --data-dir kuairand-pure --json FILE
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
from record import write_json
from request import read_events

from tfrs_pipeline.data.log import Split
from tfrs_pipeline.model.corpus import TrainingSet
from tfrs_pipeline.model.settings import TrainingSettings
from tfrs_pipeline.presets import PRESETS
from tfrs_pipeline.sources.movielens import load_movielens_100k

METRICS = ("recall@20", "ndcg@20", "recall@100", "ndcg@100")


def load(data: str, data_dir: Path | None) -> Split:
    """Loads and splits a log."""
    if data == "ml-100k":
        log = load_movielens_100k(data_dir, item_features={}, user_features={})
        return log.split("last_n", validation=1, test=1)
    assert data_dir is not None  # The parser's own check.
    return tp.Log.from_table(read_events(data_dir)).split("column")


def measure(split: Split, data: TrainingSet, name: str, seed: int) -> dict[str, Any]:
    """Fits the preset and evaluates it."""
    settings: dict[str, dict[str, Any]] = {"model": {}, "training": {}}
    for key, value in PRESETS["sequence"].settings.items():
        section, _, field = key.partition(".")
        settings[section][field] = value
    plan = tp.TwoTower(
        **settings["model"], training=TrainingSettings(**settings["training"]), seed=seed
    )
    start = time.process_time()
    model = plan.fit_samples(data, split.validation)
    found: dict[str, Any] = {
        "plan": name,
        "seed": seed,
        "best_epoch": model.result.best_epoch,
        "num_epochs": model.result.num_epochs,
        "cpu_seconds": time.process_time() - start,
    }
    for part in ("validation", "test"):
        result = tp.evaluate(model, getattr(split, part), num_bootstrap=0).first
        found[part] = {metric: result.overall.intervals[metric].mean for metric in METRICS}
    return found


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=("ml-100k", "kuairand-pure"), required=True)
    parser.add_argument("--data-dir", type=Path, help="Folder of KuaiRand's cut.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="Which (0).")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where to write the figures.")
    options = parser.parse_args()
    if options.data == "kuairand-pure" and options.data_dir is None:
        parser.error("kuairand-pure needs --data-dir")
    split = load(options.data, options.data_dir)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        timed = TrainingSet.build(split.train, Path(folder), seed=0)
        plain = dataclasses.replace(
            timed,
            samples=dataclasses.replace(timed.samples, sequence_times=None),
            corpus=dataclasses.replace(timed.corpus, has_times=False),
        )
        for seed in options.seeds:
            for name, data in (("without times", plain), ("with times", timed)):
                found.append(measure(split, data, name, seed))
                print(found[-1], flush=True)
                if options.json:
                    write_json(options.json, {"data": options.data, "runs": found})


if __name__ == "__main__":
    main()
