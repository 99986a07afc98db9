"""Compares sampling plans on KuaiRand: real exposures, with and without a long view.

The cut of KuaiRand-Pure (Gao et al., CIKM 2022) that the loader describes: trained on
`user_sequences` (epochs chosen on `val`, then again on both), tested on `test`, label long_view.
The folder must hold user_sequences.parquet, val.parquet, test.parquet, user_features.parquet and
video_features_basic_pure.csv. No setting was chosen on the test.

    python benchmarks/kuairand.py --data-dir kuairand-pure --json benchmarks/results/kuairand.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from tfrs_pipeline import RunConfig, with_settings

# isort: split
import tensorflow as tf
from record import write_json

from tfrs_pipeline.compare import compare
from tfrs_pipeline.run import StageReport

SETTINGS = {
    "data": {"source": "kuairand", "item_features": {"tag": "multi_categorical"}},
    "split": {"kind": "column"},
    "samples": {
        "easy_negatives": ({"alpha": 0.0, "num": 128}, {"alpha": 0.75, "num": 128}),
        "allow_exposed_as_negatives": True,
        "mined_every": 2,
    },
    "model": {"embedding_dim": 32},
    "compare": {"hard_shares": (0.01, 0.2), "resampling_exponents": (0.5,)},
}


def config_of(folder: Path) -> RunConfig:
    """Returns the settings of the comparison."""
    return RunConfig(**{**SETTINGS, "data": {**SETTINGS["data"], "path": folder}})


def show(report: StageReport) -> None:
    """Prints a stage as it ends."""
    print(f"{report.name}  {report.seconds:.0f} s", *report.notes, sep="\n    ", flush=True)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="Folder of the cut.")
    parser.add_argument("--run-dir", type=Path, help="Where to work, to be resumed if stopped.")
    parser.add_argument("--max-epochs", type=int, default=3)
    parser.add_argument("--plans", nargs="+", help="Instead of all plans.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where to write the figures.")
    options = parser.parse_args()
    tf.get_logger().setLevel("ERROR")  # A model a plan retraces its functions: no fault here.
    config = with_settings(
        config_of(options.data_dir),
        {"seed": options.seed, "training.max_epochs": options.max_epochs}
        | ({"compare.plans": options.plans} if options.plans else {}),
    )
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        result = compare(config, options.run_dir or Path(scratch), on_stage=show)
        saved = json.loads((result.folder / "comparison.json").read_text())
    print(result.table, *result.notes, sep="\n")
    if options.json:
        for plan in saved["plans"]:
            del plan["summary"]  # The metrics hold what the table shows.
        figures = {**saved, "settings": SETTINGS, "seconds": time.monotonic() - start}
        write_json(options.json, figures, seed=options.seed)


if __name__ == "__main__":
    main()
