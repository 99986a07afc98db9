"""Measures how many epochs without a better validation metric training should wait for.

The default model is trained on the logs of `log_kinds.py` for at most 40 epochs, with a patience of
15, the largest compared. Its curve of validation NDCG@100 shows which epoch each shorter patience
would have kept, and after how many epochs it would have stopped.

    python benchmarks/patience.py --data-dir data --seeds 2 --json benchmarks/results/patience.json

--data-dir is that of `log_kinds.py`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import tensorflow as tf
from log_kinds import logs
from record import write_json

from tfrs_pipeline.model.settings import TrainingSettings

PATIENCES = (2, 3, 5, 8, 10, 15)
TRAINING = TrainingSettings(max_epochs=40, patience=max(PATIENCES))


def kept_by(curve: Sequence[float]) -> dict[str, dict[str, float]]:
    """Returns, by patience, the metric of the epoch kept, and how many epochs are trained."""
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
    tf.get_logger().setLevel("ERROR")  # Hides warnings of retracing: each log has its own model.
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
