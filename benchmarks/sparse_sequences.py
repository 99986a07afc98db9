"""Measures the preset `sequence` on sparse logs, and what its settings and true features change.

Two logs of 10,000 users, ordered and without times:

    ml-1m          MovieLens-1M in SASRec's version: each user is a stretch of a real user's
                   sequence, of 9 events on average, cut with a fixed seed; attributes: genres
    kuairand-pure  the last long views of users with 5 or more, 19 on average, of a cut of
                   KuaiRand-Pure (`kuairand.py` says which); attributes: tags

The last item of each sequence is the test, the one before it the validation. All items are ranked,
the user's own excluded. Choose settings by the validation figures.

    python benchmarks/sparse_sequences.py --data ml-1m --data-dir ml-1m --json FILE

Takes about five CPU minutes per plan and seed.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from leaderboard_data import convert_ml_1m
from record import parser_with_json, write_json

from tfrs_pipeline.model.settings import TrainingSettings
from tfrs_pipeline.presets import PRESETS

NUM_USERS, MIN_EVENTS, MEAN_EVENTS, CUT_SEED = 10_000, 5, 9, 0
TRUE, RANDOM = "attributes", "attributes_of_another"
# Name -> features of the items, and settings that differ from the preset's.
PLANS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "preset": ({}, {}),
    "temperature .15": ({}, {"model.temperature": 0.15}),
    "temperature .07": ({}, {"model.temperature": 0.07}),
    "id_dropout .05": ({}, {"model.id_dropout": 0.05}),
    "patience 10": ({}, {"training.patience": 10}),
    "cosine decay": ({}, {"training.decay": "cosine"}),
    "cosine decay of 40 epochs": ({}, {"training.decay": "cosine", "training.max_epochs": 40}),
    "learning_rate .004": ({}, {"training.learning_rate": 0.004}),
    "dim 128": ({}, {"model.dim": 128}),
    "attention_dropout .4": ({}, {"model.attention_dropout": 0.4}),
    "1 block": ({}, {"model.attention_blocks": 1}),
    "attributes": ({TRUE: "multi_categorical"}, {}),
    "attributes of another item": ({RANDOM: "multi_categorical"}, {}),
}


def cut_ml_1m(data_dir: Path, folder: Path, rng: np.random.Generator) -> tuple[pa.Table, pa.Table]:
    """Returns the events and items of MovieLens-1M."""
    convert_ml_1m(data_dir, folder)
    events = pq.read_table(folder / "events.parquet")
    users = events["user_id"].to_numpy()
    order = np.argsort(users, kind="stable")
    items = events["item_id"].to_numpy()[order]
    begins = np.flatnonzero(np.diff(users[order], prepend=-1))
    stretches = []
    for begin, end in zip(begins, [*begins[1:], len(items)], strict=True):
        while end - begin >= MIN_EVENTS:
            length = min(MIN_EVENTS + rng.geometric(1 / (MEAN_EVENTS - MIN_EVENTS)), end - begin)
            stretches.append((begin, begin + length))
            begin += length
    kept = [stretches[i] for i in rng.choice(len(stretches), NUM_USERS, replace=False)]
    sequences = [items[begin:end] for begin, end in kept]
    table = pq.read_table(folder / "items.parquet")
    return _events(range(NUM_USERS), sequences), _items(table["item_id"], table["genres"])


def cut_kuairand(
    data_dir: Path, folder: Path, rng: np.random.Generator
) -> tuple[pa.Table, pa.Table]:
    """Returns the events and items of KuaiRand."""
    del folder
    sequences = pq.read_table(data_dir / "user_sequences.parquet").sort_by("user_id").to_pandas()
    long_enough = sequences[sequences["long_watch_seq"].map(len) >= MIN_EVENTS]
    kept = long_enough.iloc[np.sort(rng.choice(len(long_enough), NUM_USERS, replace=False))]
    events = _events(kept["user_id"], list(kept["long_watch_seq"]))
    videos = pd.read_csv(data_dir / "video_features_basic_pure.csv", dtype={"tag": str})
    watched = videos[videos["video_id"].isin(events["item_id"].to_numpy())]
    return events, _items(watched["video_id"], watched["tag"].fillna("").str.split(","))


def _events(users: Any, sequences: list[np.ndarray]) -> pa.Table:
    lengths = [len(sequence) for sequence in sequences]
    return pa.table(
        {"user_id": np.repeat(np.array(users), lengths), "item_id": np.concatenate(sequences)}
    )


def _items(item_ids: Any, attributes: Any) -> pa.Table:
    return pa.table({"item_id": item_ids, TRUE: attributes})


CUTS = {"ml-1m": cut_ml_1m, "kuairand-pure": cut_kuairand}


def cut(data: str, data_dir: Path, folder: Path) -> None:
    """Writes `sparse.parquet` and `items.parquet`, with attributes of each item and another."""
    rng = np.random.default_rng(CUT_SEED)
    events, items = CUTS[data](data_dir, folder, rng)
    others = items[TRUE].take(pa.array(rng.permutation(len(items))))
    pq.write_table(events, folder / "sparse.parquet")
    pq.write_table(items.append_column(RANDOM, others), folder / "items.parquet")


def measure(folder: Path, name: str, seed: int) -> dict[str, Any]:
    """Fits one plan and evaluates it."""
    features, changes = PLANS[name]
    settings: dict[str, dict[str, Any]] = {"model": {}, "training": {}}
    for key, value in {**PRESETS["sequence"].settings, **changes}.items():
        section, _, field = key.partition(".")
        settings[section][field] = value
    log = tp.Log.from_files(
        folder / "sparse.parquet", items=folder / "items.parquet", item_features=features
    )
    train, validation, test = log.split("last_n", validation=1, test=1, min_positives=3)
    plan = tp.TwoTower(
        **settings["model"], training=TrainingSettings(**settings["training"]), seed=seed
    )
    start = time.process_time()
    model = plan.fit(train, validation)
    found: dict[str, Any] = {
        "plan": name,
        "seed": seed,
        "best_epoch": model.result.best_epoch,
        "validation_by_epoch": model.result.history[f"val_{plan.training.monitor}"],
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
    parser = parser_with_json(__doc__)
    parser.add_argument("--data", choices=CUTS, required=True)
    parser.add_argument("--data-dir", type=Path, required=True, help="Folder of the data set.")
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS), metavar="PLAN")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="Which (0).")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as directory:
        cut(options.data, options.data_dir, Path(directory))
        for seed in options.seeds:
            for name in options.plans:
                found.append(measure(Path(directory), name, seed))
                print(found[-1], flush=True)
                if options.json:
                    write_json(options.json, {"data": options.data, "runs": found})


if __name__ == "__main__":
    main()
