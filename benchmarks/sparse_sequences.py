"""Measures the preset `sequence` on a sparse log, and what its settings and true features change.

MovieLens-1M in SASRec's version (`--data-dir`; `leaderboard_data.py` says which files), cut into
10,000 users with 5 events or more, 9 on average: stretches of the real users' sequences, drawn by a
seed of their own. The last item of each is the test, the one before it the validation; all items
are ranked, the user's own excluded. Settings are chosen by the validation figures.

    python benchmarks/sparse_sequences.py --data-dir ml-1m --json sparse_sequences.json

A minute or two a plan and seed on two idle cores.
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
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from leaderboard_data import convert_ml_1m
from record import write_json

from tfrs_pipeline.model.settings import TrainingSettings, TwoTowerSettings
from tfrs_pipeline.presets import PRESETS

NUM_USERS, MIN_EVENTS, MEAN_EVENTS, CUT_SEED = 10_000, 5, 9, 0
GENRES = {"genres": "multi_categorical"}
# Name -> features of the items, and settings that differ from the preset's.
PLANS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "preset": ({}, {}),
    "temperature .15": ({}, {"model.temperature": 0.15}),
    "temperature .07": ({}, {"model.temperature": 0.07}),
    "id_dropout .05": ({}, {"model.id_dropout": 0.05}),
    "patience 3": ({}, {"training.patience": 3}),
    "genres": (GENRES, {}),
    "genres, title, year": (GENRES | {"title": "text", "year": "categorical"}, {}),
    "genres of another item": ({"random_genres": "multi_categorical"}, {}),
}


def cut(data_dir: Path, folder: Path) -> None:
    """Writes `sparse.parquet` and `items.parquet`, with each item's genres and another one's."""
    convert_ml_1m(data_dir, folder)
    events = pq.read_table(folder / "events.parquet")
    users = events["user_id"].to_numpy()
    order = np.argsort(users, kind="stable")
    items = events["item_id"].to_numpy()[order]
    begins = np.flatnonzero(np.diff(users[order], prepend=-1))
    rng = np.random.default_rng(CUT_SEED)
    stretches = []
    for begin, end in zip(begins, [*begins[1:], len(items)], strict=True):
        while end - begin >= MIN_EVENTS:
            length = min(MIN_EVENTS + rng.geometric(1 / (MEAN_EVENTS - MIN_EVENTS)), end - begin)
            stretches.append((begin, begin + length))
            begin += length
    kept = [stretches[i] for i in rng.choice(len(stretches), NUM_USERS, replace=False)]
    lengths = [end - begin for begin, end in kept]
    columns = {
        "user_id": np.repeat(np.arange(NUM_USERS), lengths),
        "item_id": np.concatenate([items[begin:end] for begin, end in kept]),
    }
    pq.write_table(pa.table(columns), folder / "sparse.parquet")
    table = pq.read_table(folder / "items.parquet")
    others = table["genres"].take(pa.array(rng.permutation(len(table))))
    pq.write_table(table.append_column("random_genres", others), folder / "items.parquet")


def measure(folder: Path, name: str, seed: int) -> dict[str, Any]:
    """Fits one plan and evaluates it."""
    features, changes = PLANS[name]
    settings: dict[str, dict[str, Any]] = {"model": {}, "training": {}}
    for key, value in {**PRESETS["sequence"][1], **changes}.items():
        section, _, field = key.partition(".")
        settings[section][field] = value
    log = tp.Log.from_files(
        folder / "sparse.parquet", items=folder / "items.parquet", item_features=features
    )
    train, validation, test = log.split("last_n", validation=1, test=1, min_positives=3)
    model = tp.TwoTower(
        TwoTowerSettings(**settings["model"]),
        training=TrainingSettings(**settings["training"]),
        seed=seed,
    )
    start = time.process_time()
    model.fit(train, validation)
    found: dict[str, Any] = {
        "plan": name,
        "seed": seed,
        "best_epoch": model.result.best_epoch,
        "cpu_seconds": time.process_time() - start,
    }
    for part, holdout in (("validation", validation), ("test", test)):
        result = tp.evaluate(model, holdout, cutoffs=(10, 100), num_bootstrap=0).first
        means = {metric: x.mean for metric, x in result.overall.intervals.items()}
        tail = result.slices["tail"].intervals["recall@10"].mean
        found[part] = {x: means[x] for x in ("recall@10", "ndcg@10")} | {"tail/recall@10": tail}
    return found


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="Folder of MovieLens-1M.")
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS), metavar="PLAN")
    parser.add_argument("--seeds", type=int, default=1, help="How many (1).")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where to write the figures.")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as directory:
        cut(options.data_dir, Path(directory))
        for seed in range(options.seeds):
            for name in options.plans:
                found.append(measure(Path(directory), name, seed))
                print(found[-1], flush=True)
                if options.json:
                    write_json(options.json, {"runs": found})


if __name__ == "__main__":
    main()
