r"""Turns RecFlow, as published, into an event table, an item table and a user table.

    python benchmarks/recflow_log.py RecFlow recflow
    tfrs-pipeline run --data.path recflow/events --data.timestamp_unit ms \
        --data.items_path recflow/items.parquet --data.item_features category_level_one=categorical

RecFlow has the whole funnel of a short-video service (Liu et al., ICLR 2025, CC BY-SA 4.0). The
folder holds a file a day, `all_stage/YYYY-MM-DD.feather` (every stage) and
`realshow/YYYY-MM-DD.feather` (exposures alone, read for days without the first); any days will do.
The flags, and the stages that they become (the furthest stage wins; a row without a flag is left
out, and counted):

| flag | an item that | stage |
|---|---|---|
| realshow | was exposed | `clicked` if effective_view is 1, `exposed` otherwise |
| rerank_pos, rerank_neg | ranked among the top 10 in rerank, or below | `ranked` |
| rank_pos | ranked among the top 10 in rank | `ranked` |
| rank_neg | ranked below the top 10 in rank | `pre_ranked` |
| coarse_neg | ranked below the top 500 in coarse rank | `pre_ranked` |
| prerank_neg | ranked below the top 500 in pre-rank | `retrieved` |

`rank` is rerank_index if the item was exposed or reranked, rank_index if it was only ranked, and
null otherwise or if negative. The outcomes, such as long_view, can be labels in place of
effective_view (`--data.label`). Each video and user has the columns of its latest row.
"""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.dataset

FLAGS = (
    *("realshow", "rerank_pos", "rerank_neg", "rank_pos", "rank_neg"),
    *("coarse_neg", "prerank_neg"),
)
OUTCOMES = (
    *("effective_view", "long_view", "like", "follow", "forward", "comment"),
    "playing_time",
)
ITEM_COLUMNS = (
    *("author_id", "category_level_one", "category_level_two"),
    *("upload_type", "upload_timestamp", "duration"),
)
USER_COLUMNS = ("device_id", "age", "gender", "province")
COLUMNS = (
    *("request_id", "request_timestamp", "user_id", "video_id", "rank_index", "rerank_index"),
    *(*FLAGS, *OUTCOMES, *ITEM_COLUMNS, *USER_COLUMNS),
)

DAY = f"""
COPY (
    SELECT user_id, video_id AS item_id, request_timestamp AS timestamp, request_id,
        CASE WHEN realshow = 1 AND effective_view = 1 THEN 'clicked'
            WHEN realshow = 1 THEN 'exposed'
            WHEN 1 IN (rerank_pos, rerank_neg, rank_pos) THEN 'ranked'
            WHEN 1 IN (rank_neg, coarse_neg) THEN 'pre_ranked'
            ELSE 'retrieved' END AS stage,
        CASE WHEN 1 IN (realshow, rerank_pos, rerank_neg)
                THEN if(rerank_index >= 0, rerank_index, NULL)
            WHEN 1 IN (rank_pos, rank_neg) THEN if(rank_index >= 0, rank_index, NULL) END AS rank,
        {", ".join(f'"{name}"' for name in (*OUTCOMES, *ITEM_COLUMNS, *USER_COLUMNS))}
    FROM day WHERE 1 IN ({", ".join(FLAGS)})
) TO '{{output}}' (FORMAT parquet)
"""
LATEST = """
COPY (
    SELECT {id}, unnest(arg_max({{{columns}}}, (timestamp, filename, file_row_number)))
    FROM read_parquet('{events}/*.parquet', filename = true, file_row_number = true)
    GROUP BY {id} ORDER BY {id}
) TO '{output}' (FORMAT parquet)
"""


def list_days(folder: Path) -> list[Path]:
    """Returns the file to read of each day: of all stages if there is one, else of exposures."""
    days = {
        path.stem: path
        for name in ("realshow", "all_stage")
        for path in (folder / name).glob("[!._]*.feather")
    }
    if not days:
        raise SystemExit(f"{folder}: no all_stage/YYYY-MM-DD.feather, no realshow/YYYY-MM-DD")
    for day in days:
        date.fromisoformat(day)
    return [days[day] for day in sorted(days)]


def query(path: Path, sql: str) -> tuple[int, ...]:
    """Streams a file, as the table `day`, through a query; returns the first row of its result."""
    dataset = pa.dataset.dataset(path, format="feather")
    for name in COLUMNS:
        if not pa.types.is_integer(dataset.schema.field(name).type):
            raise SystemExit(f"{path}: {name} must be an integer")
    # A reader, because its batches keep their order, unlike those of the data set.
    connection = duckdb.connect()
    connection.register("day", dataset.scanner(columns=list(COLUMNS)).to_reader())
    row: tuple[int, ...] | None = connection.execute(sql).fetchone()
    assert row is not None
    return row


def check_values(path: Path) -> int:
    """Refuses a file with impossible values; returns the number of its rows."""
    wrong = [f"{flag} IS NULL OR {flag} NOT IN (0, 1)" for flag in FLAGS]
    wrong += ["realshow = 1 AND (effective_view IS NULL OR effective_view NOT IN (0, 1))"]
    wrong += ["request_timestamp IS NULL OR request_timestamp NOT BETWEEN 1e11 AND 1e14"]
    wrong += ["request_id IS NULL"]
    counts = ", ".join(f"count(*) FILTER ({condition})" for condition in wrong)
    num_rows, *num_wrong = query(path, f"SELECT count(*), {counts} FROM day")
    for condition, num in zip(wrong, num_wrong, strict=True):
        if num:
            raise SystemExit(f"{path}: {num:,} rows where {condition}")
    return num_rows


def convert(folder: Path, output: Path) -> None:
    """Writes events/ (a file a day), items.parquet and users.parquet; ids are int64."""
    events = output / "events"
    events.mkdir(parents=True)
    num_rows = num_events = 0
    for path in list_days(folder):
        num_rows += check_values(path)
        num_events += query(path, DAY.format(output=events / f"{path.stem}.parquet"))[0]
    for table, id_, columns in (
        ("items", "item_id", ITEM_COLUMNS),
        ("users", "user_id", USER_COLUMNS),
    ):
        entry = ", ".join(f"'{name}': {name}" for name in columns)
        written = output / f"{table}.parquet"
        duckdb.sql(LATEST.format(id=id_, columns=entry, events=events, output=written))
    print(f"{num_events:,} events; {num_rows - num_events:,} rows without a flag are left out")


def main() -> None:
    """Converts a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="RecFlow, with all_stage, realshow or both.")
    parser.add_argument("output", type=Path, help="Folder to make.")
    options = parser.parse_args()
    convert(options.folder, options.output)


if __name__ == "__main__":
    main()
