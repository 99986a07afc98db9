r"""Turns KuaiRand, as published, into an event table.

    python benchmarks/kuairand_log.py KuaiRand-Pure kuairand.parquet
    tfrs-pipeline run --data.path kuairand.parquet --data.timestamp_unit ms \
        --data.time_zone Asia/Shanghai --data.list_separator , \
        --data.items_path KuaiRand-Pure/data/video_features_basic_pure.csv \
        --data.item_columns item_id=video_id --data.item_features tag=multi_categorical

KuaiRand has short videos with real exposures, a part of them random (Gao et al., CIKM 2022, CC
BY-SA 4.0). The folder (Pure, 1K or 27K) holds CSV logs of all exposures. They are ordered by policy
(standard, then random), date, part and row. The timestamp is `time_ms`, UTC; `date` and `hourmin`,
which are UTC+8, are left out, and a video's upload day is taken as UTC+8. An item that the random
policy showed is an exposure like any other: without a click it is never a negative. The outcomes,
such as long_view, can be labels instead of the click (`--data.label`); is_rand and tab are context
columns (`--data.columns`).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

OUTCOMES = (
    *("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view"),
    *("play_time_ms", "profile_stay_time", "comment_stay_time", "is_profile_enter"),
)
COLUMNS = ("user_id", "video_id", "time_ms", "is_rand", "tab", *OUTCOMES)
LOG = re.compile(
    r"log_(?P<policy>standard|random)_(?P<days>\d+_\d+_to_\d+_\d+)_(?P<version>[A-Za-z0-9]+)"
    r"(_part(?P<part>\d+))?\.csv(\.gz)?"
)


def list_logs(folder: Path) -> list[Path]:
    """Returns the logs in a folder, or in its folder `data`: standard first, by date and part."""
    for place in (folder, folder / "data"):
        names = [path.name for path in place.iterdir()] if place.is_dir() else []
        if found := [match for match in map(LOG.fullmatch, names) if match]:
            break
    else:
        raise SystemExit(f"{folder}: no log_standard_4_08_to_4_21_pure.csv or the like (_1k, _27k)")
    if len(versions := {match["version"] for match in found}) > 1:
        raise SystemExit(f"{folder}: logs of {sorted(versions)}, which number their users anew")
    if all(match["policy"] == "standard" for match in found):
        print(f"{folder}: no log_random_*.csv; what it showed may be drawn as a negative")
    found.sort(key=lambda m: (m["policy"] == "random", m["days"], int(m["part"] or 0)))
    return [place / match[0] for match in found]


def as_events(batch: pa.RecordBatch) -> pa.Table:
    """Names the columns as an event table does, and adds the stage."""
    table = pa.table(batch)
    if not pc.all(pc.is_in(table["is_click"], pa.array([0, 1])), min_count=0).as_py():
        raise SystemExit("is_click is not 0 or 1 everywhere: take the files as they were published")
    stage = pc.if_else(pc.equal(table["is_click"], 1), "clicked", "exposed")
    names = {"video_id": "item_id", "time_ms": "timestamp"}
    table = table.rename_columns([names.get(name, name) for name in table.column_names])
    return table.append_column("stage", stage)


def convert(folder: Path, output: Path) -> None:
    """Writes one event per exposure; ids are int64."""
    options = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(COLUMNS, pa.int64()), include_columns=COLUMNS
    )
    schema = pa.schema(dict.fromkeys(COLUMNS, pa.int64()))
    schema = as_events(pa.RecordBatch.from_pylist([], schema)).schema
    with pq.ParquetWriter(output, schema) as writer:
        for log in list_logs(folder):
            for batch in pa.csv.open_csv(log, convert_options=options):
                writer.write_table(as_events(batch))


def main() -> None:
    """Converts a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="KuaiRand, unpacked.")
    parser.add_argument("output", type=Path, help="Parquet file to write.")
    options = parser.parse_args()
    convert(options.folder, options.output)


if __name__ == "__main__":
    main()
