"""Measures the preset `sequence` beside RecTools' SASRec: CPU seconds per epoch, NDCG over them.

The log is that of `sparse_sequences.py --data ml-1m`, with each user's last two items held out.
NDCG@10 is that of the first, ranked among all items that the user does not have. All models are
64-d, with two blocks and histories of 50. RecTools' has LiGR layers and batches of 128 users:

    sequence            the preset with histories of 50; its CPU seconds include validation
    sampled softmax     RecTools with 256 uniform negatives for each position
    softmax             RecTools with the softmax over all items

RecTools needs another NumPy, so it has a separate environment, which --reference names; without it
only the preset is measured. RecTools' CPU seconds leave out recommending.

    python -m venv rectools && rectools/bin/pip install 'rectools[torch]==0.19.0'
    python benchmarks/rectools_speed.py --data-dir data --reference rectools/bin/python --json FILE
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import numpy as np
import pandas as pd
from log_kinds import sparse
from record import write_json

from tfrs_pipeline.data.log import Split
from tfrs_pipeline.presets import PRESETS

SHAPE = {"n_blocks": 2, "n_factors": 64, "session_max_len": 50, "batch_size": 128}
REFERENCES: dict[str, dict[str, Any]] = {
    "sampled softmax": {**SHAPE, "loss": "sampled_softmax", "n_negatives": 256},
    "softmax": {**SHAPE, "loss": "softmax"},
}
# Epochs of the preset without validation, to measure the time of one.
TIMED_EPOCHS, SEED = 4, 0


def fit_preset(
    split: Split, holdout: tp.Holdout | None, max_epochs: int
) -> tuple[list[float], list[float]]:
    """Trains the preset; returns CPU seconds until the end of each epoch, and its NDCG@10."""
    settings = {
        **PRESETS["sequence"].settings,
        "model.history_length": 50,
        "training.max_epochs": max_epochs,
        "evaluation.cutoffs": (10,),
        "training.monitor": "ndcg@10",
    }
    config = tp.with_settings(tp.RunConfig(), settings)
    plan = tp.TwoTower(**dict(config.model), training=config.training, seed=SEED)
    start, seconds = time.process_time(), list[float]()
    model = plan.fit(
        split.train, holdout, on_epoch=lambda _: seconds.append(time.process_time() - start)
    )
    return seconds, model.result.history.get("val_ndcg@10", [])


def fit_reference(
    python: str, split: Split, settings: dict[str, Any], folder: Path
) -> tuple[list[float], list[float]]:
    """Trains RecTools' model in its own environment; returns the same as `fit_preset`."""
    events = split.train.events.select("user_id", "item_id", "event_number").to_pandas()
    events.to_csv(folder / "train.csv", index=False)
    pd.DataFrame({"user_id": split.validation.user_ids}).to_csv(folder / "users.csv", index=False)
    script = Path(__file__).with_name("rectools_fit.py")
    command = [python, str(script), str(folder), json.dumps(settings)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=folder)
    epochs = [json.loads(line) for line in output.stdout.splitlines() if line.startswith("{")]
    targets = np.concatenate(split.validation.relevant)  # One per user.
    gains = 1 / np.log2(np.arange(2, 12))
    values = [(np.array(x["items"]) == targets[:, None]) @ gains for x in epochs]
    return [x["cpu_seconds"] for x in epochs], [float(of_users.mean()) for of_users in values]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="Folder that holds ml-1m.")
    parser.add_argument("--reference", metavar="PYTHON", help="Interpreter that has RecTools.")
    parser.add_argument("--max-epochs", type=int, default=30, help="Of each model (30).")
    parser.add_argument("--max-cpu-seconds", type=float, default=240, help="Of RecTools (240).")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where to write the figures.")
    options = parser.parse_args()
    bounds = {"num_epochs": options.max_epochs, "max_cpu_seconds": options.max_cpu_seconds}
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        split = sparse("ml-1m", options.data_dir, Path(folder))
        figures["num_positives"] = split.train.events.count().to_pyarrow().as_py()
        timed, _ = fit_preset(split, None, TIMED_EPOCHS)
        curves = {"sequence": fit_preset(split, split.validation, options.max_epochs)}
        for name, settings in REFERENCES.items() if options.reference else ():
            python, given = options.reference, {**settings, **bounds}
            curves[name] = fit_reference(python, split, given, Path(folder))
    for name, (seconds, values) in curves.items():
        epoch = float(np.diff(timed if name == "sequence" else [0.0, *seconds]).mean())
        figures[name] = {"epoch": epoch, "cpu_seconds": seconds, "ndcg@10": values}
        print(
            f"{name:16} {epoch:6.1f} CPU s an epoch, ndcg@10 {values[-1]:.4f} at {seconds[-1]:.0f}"
        )
    if not options.reference:
        print("RecTools was left out: install 'rectools[torch]==0.19.0' and name --reference.")
    if options.json:
        write_json(options.json, figures, seed=SEED)


if __name__ == "__main__":
    main()
