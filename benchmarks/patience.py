"""Measures how many epochs without a better validation metric training should wait for.

The default model is trained on logs of several kinds for at most 40 epochs, with a patience of 15
that no other one exceeds; the curve of its validation NDCG@100 then tells what each patience would
have kept, and after how many epochs it would have stopped.

    ratings          MovieLens-100K, the last share of each user's likes held out
    ratings, time    the same, split by time
    200 users        the first, of 200 of its users, without features
    funnel           a simulated funnel of 3,000 users and 2,000 items
    kuairand         KuaiRand's clicks (`request.py` says which), --data-dir
    kuairand, tab    the same with the tab of the app and the hour as request features
    sparse ...       the logs of `sparse_sequences.py`, --data-dir

    python benchmarks/patience.py --data-dir data --seeds 2 --json benchmarks/results/patience.json

--data-dir holds the folders ml-1m and kuairand-pure; without it the logs that need none are run.
"""

from __future__ import annotations

import argparse
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
from record import write_json
from request import PLANS, read_events
from sparse_sequences import CUTS, cut

from tfrs_pipeline.data.log import Split
from tfrs_pipeline.model.settings import TrainingSettings
from tfrs_pipeline.run_data import load_log
from tfrs_pipeline.sources.simulated import simulate_funnel

PATIENCES = (2, 3, 5, 8, 10, 15)
TRAINING = TrainingSettings(max_epochs=40, patience=max(PATIENCES))


def ratings(kind: str, num_users: int | None = None) -> Split:
    """Splits MovieLens-100K, of all users or of some."""
    log = load_log(tp.movielens_config().data)
    if num_users is not None:
        users = log.users["user_id"].to_pyarrow().to_numpy()
        kept = np.random.default_rng(0).choice(np.sort(users), num_users, replace=False).tolist()
        events = log.events.filter(log.events["user_id"].isin(kept))
        log = tp.Log.from_ibis(events)
    return log.split(kind)


def kuairand(data_dir: Path, features: dict[str, Any]) -> Split:
    """Splits KuaiRand's clicks by their day."""
    return tp.Log.from_table(
        read_events(data_dir / "kuairand-pure"), request_features=features
    ).split("column")


def sparse(data: str, data_dir: Path, folder: Path) -> Split:
    """Splits a sparse log, its users' last two events held out."""
    cut(data, data_dir / data, folder)
    log = tp.Log.from_files(folder / "sparse.parquet")
    return log.split("last_n", validation=1, test=1, min_positives=3)


def logs(data_dir: Path | None, folder: Path) -> dict[str, Callable[[], Split]]:
    """Says how each log is made."""
    made: dict[str, Callable[[], Split]] = {
        "ratings": lambda: ratings("last_share"),
        "ratings, time": lambda: ratings("time"),
        "200 users": lambda: ratings("last_share", 200),
        "funnel": lambda: simulate_funnel(
            num_users=3000, num_items=2000, num_requests=20_000, seed=1
        ).log.split("time"),
    }
    if data_dir is None:
        return made
    return {
        **made,
        "kuairand": lambda: kuairand(data_dir, {}),
        "kuairand, tab": lambda: kuairand(data_dir, PLANS["tab, hour"]),
        **{f"sparse {name}": (lambda of=name: sparse(of, data_dir, folder)) for name in CUTS},
    }


def kept_by(curve: Sequence[float]) -> dict[str, dict[str, float]]:
    """Returns by patience the metric that it keeps, and the epochs that are trained for it."""
    found = {}
    for patience in PATIENCES:
        best, best_epoch = -1.0, 0
        for epoch, value in enumerate(curve, start=1):
            if value > best:
                best, best_epoch = value, epoch
            if epoch - best_epoch >= patience:
                break
        found[str(patience)] = {"best": best, "num_epochs": epoch}
    return found


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="Folder of the data sets; see the top.")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="Seeds 0 to N - 1 (1).")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where to write the figures.")
    options = parser.parse_args()
    tf.get_logger().setLevel("ERROR")  # A model a log retraces its functions: no fault here.
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, make in logs(options.data_dir, Path(folder)).items():
            train, validation, _ = make()
            for seed in range(options.seeds):
                tf.keras.backend.clear_session()
                start = time.process_time()
                model = tp.TwoTower(training=TRAINING, seed=seed).fit(train, validation)
                curve = model.result.history[f"val_{TRAINING.monitor}"]
                seconds = time.process_time() - start
                row = {"log": name, "seed": seed, "cpu_seconds": seconds, "curve": curve}
                rows.append({**row, "patience": kept_by(curve)})
                kept = "  ".join(
                    f"{patience}: {x['best']:.4f} ({x['num_epochs']})"
                    for patience, x in rows[-1]["patience"].items()
                )
                print(f"{name:20} seed {seed}  {kept}", flush=True)
                if options.json:
                    write_json(options.json, {"runs": rows})


if __name__ == "__main__":
    main()
