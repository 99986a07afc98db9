"""Compares sampling plans on KuaiRand: real exposures, with and without a long view.

A cut of KuaiRand-Pure (Gao et al., CIKM 2022): user_sequences.parquet to train on, the last 50
exposures (watch_seq) and the last 50 long views (long_watch_seq) of each user without times, and
the exposures of later days in val.parquet and test.parquet. It is turned into an event table:

- each entry of a list is an event, in the list's order; then come val and test, each by `time_ms`.
  How a user's two lists interleave is unknown: exposures are numbered before long views;
- a long view is a click. Entries of watch_seq whose video is in the user's long_watch_seq are long
  views, not exposures without one: they are dropped;
- trained on the lists (epochs chosen on val, then again on both), tested on test.

The folder must hold video_features_basic_pure.csv too. No setting was chosen on the test.

    python benchmarks/kuairand.py --data-dir kuairand-pure --json benchmarks/results/kuairand.json
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from tfrs_pipeline import RunConfig, with_settings

# isort: split
import duckdb
import tensorflow as tf
from record import parser_with_json, write_json

from tfrs_pipeline.messages import Progress, StepReport
from tfrs_pipeline.run.compare import compare_plans

SETTINGS = {
    "data": {
        "source": "files",
        "item_columns": {"item_id": "video_id"},
        "item_features": {"tag": "multi_categorical"},
        "list_separator": ",",
    },
    "split": {"kind": "column"},
    "model": {
        "dim": 32,
        "negatives": ("in_batch", "uniform:num=128", "popularity:num=128"),
    },
    "compare": {
        "plans": (
            "mixed",
            "in_batch_uncorrected",
            "in_batch",
            "uniform",
            "popularity",
            "hybrid_0.01",
            "hybrid_0.2",
            "hybrid_0.5",
            "resampled_0.5",
        )
    },
}

EVENTS = """
COPY (
    WITH watched AS (
        SELECT user_id, long_watch_seq, unnest(watch_seq) AS item_id,
            generate_subscripts(watch_seq, 1) AS place
        FROM '{folder}/user_sequences.parquet'
    ), events AS (
        SELECT user_id, item_id, 'exposed' AS stage, 'train' AS part,
            0 AS file, user_id AS first, 0 AS second, place AS third
        FROM watched WHERE list_contains(long_watch_seq, item_id) IS NOT TRUE
        UNION ALL
        SELECT user_id, unnest(long_watch_seq), 'clicked', 'train',
            0, user_id, 1, generate_subscripts(long_watch_seq, 1)
        FROM '{folder}/user_sequences.parquet'
        UNION ALL
        SELECT user_id, video_id, if(long_view = 1, 'clicked', 'exposed'), part,
            file, time_ms, 0, file_row_number
        FROM (
            SELECT *, 'validation' AS part, 1 AS file
            FROM read_parquet('{folder}/val.parquet', file_row_number = true)
            UNION ALL BY NAME
            SELECT *, 'test' AS part, 2 AS file
            FROM read_parquet('{folder}/test.parquet', file_row_number = true)
        )
    )
    SELECT user_id, item_id, stage, part FROM events ORDER BY file, first, second, third
) TO '{events}' (FORMAT parquet)
"""


def config_of(folder: Path, events: Path) -> RunConfig:
    """Makes the event table of the cut, and the settings of the comparison."""
    duckdb.sql(EVENTS.format(folder=folder, events=events))
    data = {"path": events, "items_path": folder / "video_features_basic_pure.csv"}
    return RunConfig(**{**SETTINGS, "data": {**SETTINGS["data"], **data}})


class Printed(Progress):
    """Prints steps."""

    def step(self, report: StepReport) -> None:
        """Prints a step as it ends."""
        print(f"{report.name}  {report.seconds:.0f} s", *report.notes, sep="\n    ", flush=True)


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="Folder of the cut.")
    parser.add_argument("--run-dir", type=Path, help="Where to work, to be resumed if stopped.")
    parser.add_argument("--max-epochs", type=int, default=3)
    parser.add_argument("--plans", nargs="+", help="Instead of all plans.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tf.get_logger().setLevel("ERROR")  # Hides warnings of retracing: each plan has its own model.
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.run_dir or Path(scratch) / "run"
        folder.mkdir(parents=True, exist_ok=True)
        config = with_settings(
            config_of(options.data_dir, folder / "kuairand.parquet"),
            {"seed": options.seed, "training.max_epochs": options.max_epochs}
            | ({"compare.plans": options.plans} if options.plans else {}),
        )
        result = compare_plans(config, folder, progress=Printed())
        saved = json.loads((folder / "comparison.json").read_text())
    print(result)
    if options.json:
        figures = {**saved, "settings": SETTINGS, "seconds": time.monotonic() - start}
        write_json(options.json, figures, seed=options.seed)


if __name__ == "__main__":
    main()
