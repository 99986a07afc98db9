"""KuaiRand, as published and as cut, against a slow loop over made-up files; what is refused."""

import csv
import logging
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tfrs_pipeline.config import DataConfig, SplitConfig
from tfrs_pipeline.data.schema import DataError, Tables, check_tables
from tfrs_pipeline.data.split import evaluation_queries, split_last_n, split_report
from tfrs_pipeline.sources.kuairand import load_kuairand

# The published header; only the columns that are read matter.
LOG_COLUMNS = [
    *("user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "is_like", "is_follow"),
    *("is_comment", "is_forward", "is_hate", "long_view", "play_time_ms", "duration_ms"),
    *("profile_stay_time", "comment_stay_time", "is_profile_enter", "is_rand", "tab"),
]
START_MS = 1_649_350_000_123
VIDEOS = """\
video_id,author_id,video_type,upload_type,video_duration,music_type,tag
0,70,NORMAL,Web,1000.5,9.0,"39,43"
1,71,AD,Web,,,
2,70,NORMAL,Kmovie,20.0,4.0,2
"""
USERS = "user_id,user_active_degree,onehot_feat4\n5,full_active,1.0\n6,UNKNOWN,\n"

Row = dict[str, int]


def make_log(seed: int, num_rows: int, is_rand: int) -> list[Row]:
    rng = random.Random(seed)
    return [
        {
            **dict.fromkeys(LOG_COLUMNS, 0),
            "user_id": rng.randrange(5, 8),
            "video_id": rng.randrange(3),
            "time_ms": START_MS + rng.randrange(10**9),
            "is_click": rng.randrange(2),
            "is_like": rng.randrange(2),
            "long_view": rng.randrange(2),
            "is_rand": is_rand,
            "tab": rng.randrange(15),
        }
        for _ in range(num_rows)
    ]


# In the order in which they are read: a part 10 comes after a part 2.
LOGS = {
    "log_standard_4_08_to_4_21_27k_part1.csv": make_log(0, 7, 0),
    "log_standard_4_08_to_4_21_27k_part2.csv": make_log(1, 5, 0),
    "log_standard_4_08_to_4_21_27k_part10.csv": make_log(2, 5, 0),
    "log_standard_4_22_to_5_08_27k.csv": make_log(3, 9, 0),
    "log_random_4_22_to_5_08_27k.csv": make_log(4, 30, 1),
}


def write_log(path: Path, rows: list[dict[str, Any]], columns: list[str] = LOG_COLUMNS) -> None:
    with path.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for name, rows in LOGS.items():
        write_log(tmp_path / "data" / name, rows)
    (tmp_path / "data" / "video_features_basic_27k.csv").write_text(VIDEOS)
    (tmp_path / "data" / "user_features_27k.csv").write_text(USERS)
    (tmp_path / "data" / "video_features_statistic_27k_part1.csv").write_text("video_id\n0\n")
    return tmp_path


def load(folder: Path, **options: Any) -> Tables:
    tables = load_kuairand(folder, **options)
    check_tables(tables)
    return tables


def rows_of(tables: Tables) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tables.events.order_by("event_number").to_pyarrow().to_pylist()
    return found


# As published


def test_every_exposure_of_the_logs_is_an_event(published: Path) -> None:
    rows = [row for log in LOGS.values() for row in log]
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    assert rows_of(load(published)) == [
        {
            "user_id": row["user_id"],
            "item_id": row["video_id"],
            "timestamp": epoch + timedelta(milliseconds=row["time_ms"]),
            "event_number": number,
            "stage": "clicked" if row["is_click"] else "exposed",
            "is_rand": row["is_rand"],
            "tab": row["tab"],
        }
        for number, row in enumerate(rows)
    ]
    assert rows_of(load(published / "data")) == rows_of(load(published))


def test_a_label_chooses_among_the_outcomes(published: Path) -> None:
    rows = [row for log in LOGS.values() for row in log]
    found = rows_of(load(published, label={"long_view": 1.0, "is_like": 3.0}))
    weights = [1.0 * row["long_view"] + 3.0 * row["is_like"] for row in rows]
    assert [e["stage"] for e in found] == ["clicked" if w else "exposed" for w in weights]
    assert [e["weight"] for e in found] == [w or 1.0 for w in weights]


def test_features_are_those_asked_for(published: Path, caplog: pytest.LogCaptureFixture) -> None:
    tables = load(
        published,
        item_features={
            "author_id": "categorical",
            "tag": "multi_categorical",
            "video_duration": "numeric",
            "music_type": "categorical",
        },
        user_features={"user_active_degree": "categorical", "onehot_feat4": "categorical"},
    )
    assert tables.items.order_by("item_id").to_pyarrow().to_pylist() == [
        {"item_id": i, "author_id": a, "tag": t, "video_duration": d, "music_type": m}
        for i, a, t, d, m in [
            (0, 70, ["39", "43"], 1000.5, 9),
            (1, 71, None, None, None),
            (2, 70, ["2"], 20.0, 4),
        ]
    ]
    # User 7 is in the logs alone.
    assert tables.users.order_by("user_id").to_pyarrow().to_pylist() == [
        {"user_id": 5, "user_active_degree": "full_active", "onehot_feat4": 1},
        {"user_id": 6, "user_active_degree": "UNKNOWN", "onehot_feat4": None},
        {"user_id": 7, "user_active_degree": None, "onehot_feat4": None},
    ]
    assert "user_features_27k.csv: lacks 1 ids" in caplog.text


def test_upload_days_are_those_of_the_logs_time_zone(published: Path) -> None:
    path = published / "data" / "video_features_basic_27k.csv"
    days = ("upload_dt", "2022-04-10", "", "2021-12-31")
    lines = zip(VIDEOS.splitlines(), days, strict=True)
    path.write_text("".join(f"{line},{day}\n" for line, day in lines))
    kinds = {"upload_dt": "timestamp", "music_type": "hashed", "video_duration": "bucketized"}
    items = load(published, item_features=kinds).items.order_by("item_id").to_pyarrow()
    assert items["upload_dt"].to_pylist() == [
        datetime(2022, 4, 9, 16, tzinfo=UTC),
        None,
        datetime(2021, 12, 30, 16, tzinfo=UTC),
    ]
    assert items["music_type"].to_pylist() == [9, None, 4]
    assert items["video_duration"].to_pylist() == [1000.5, None, 20.0]


@pytest.mark.parametrize("unknown_items", ["keep", "drop", "error"])
def test_videos_without_features_follow_the_setting(published: Path, unknown_items: Any) -> None:
    path = published / "data" / "video_features_basic_27k.csv"
    path.write_text("\n".join(VIDEOS.splitlines()[:3]) + "\n")
    num_unknown = sum(row["video_id"] == 2 for log in LOGS.values() for row in log)
    if unknown_items == "error":
        with pytest.raises(DataError, match=f"'video_id': {num_unknown} of 56 rows"):
            load(published, unknown_items=unknown_items)
        return
    tables = load(published, unknown_items=unknown_items)
    is_kept = unknown_items == "keep"
    assert sorted(tables.items.to_pyarrow()["item_id"].to_pylist()) == [0, 1, 2][: 2 + is_kept]
    assert len(rows_of(tables)) == 56 - (0 if is_kept else num_unknown)
    assert [d.num_rows for d in tables.dropped] == ([] if is_kept else [num_unknown])


def test_logs_without_feature_files_have_ids_alone(published: Path) -> None:
    for path in (published / "data").glob("*_features_*.csv"):
        path.unlink()
    assert load(published).items.columns == ("item_id",)
    with pytest.raises(DataError, match=r"no file video_features_basic_\*\.csv.*tag"):
        load(published, item_features={"tag": "multi_categorical"})


def test_logs_without_the_random_policy_warn(
    published: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (published / "data" / "log_random_4_22_to_5_08_27k.csv").unlink()
    assert len(rows_of(load(published))) == 26
    assert "may be drawn as a negative" in caplog.text


def test_versions_are_not_mixed(published: Path) -> None:
    data = published / "data"
    write_log(data / "log_random_4_22_to_5_08_pure.csv", make_log(0, 1, 1))
    with pytest.raises(DataError, match="several versions: 27k, pure"):
        load(published)
    (data / "log_random_4_22_to_5_08_pure.csv").unlink()
    (data / "user_features_27k.csv").rename(data / "user_features_1k.csv")
    with pytest.raises(DataError, match=r"user_features_1k\.csv, and the logs are of.* 27k"):
        load(published)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"user_id": "x7"}, "'user_id' must hold whole numbers; 1 of 56 rows"),
        ({"video_id": "1.5"}, "'video_id' must hold whole numbers; 1 of 56 rows"),
        ({"video_id": -1}, "'video_id' is -1 in 1 of 56 rows"),
        ({"time_ms": START_MS // 1000}, "'time_ms' must hold milliseconds since 1970; 1 of 56"),
        ({"time_ms": 10**18}, "'time_ms' must hold milliseconds since 1970; 1 of 56"),
        ({"is_click": 2}, "'is_click' must hold 0 or 1; 1 of 56"),
        ({"is_rand": ""}, "'is_rand' must hold 0 or 1; 1 of 56"),
    ],
)
def test_a_bad_value_is_refused(published: Path, values: dict[str, Any], message: str) -> None:
    name = "log_standard_4_22_to_5_08_27k.csv"
    rows: list[dict[str, Any]] = [*LOGS[name]]
    rows[3] = {**rows[3], **values}
    write_log(published / "data" / name, rows)
    with pytest.raises(DataError, match=message):
        load(published)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": {"longview": 1.0}}, "no column 'longview'. Nearest: long_view"),
        ({"label": {"tab": 1.0}}, "no column 'tab'"),
        ({"item_features": {"authorid": "categorical"}}, "no column 'authorid'. Nearest: author_"),
        ({"user_features": {"onehot_feat": "categorical"}}, "'onehot_feat'. Nearest: onehot_feat4"),
        ({"item_features": {"video_duration": "categorical"}}, None),
    ],
)
def test_an_unknown_name_is_refused(published: Path, options: Any, message: str | None) -> None:
    if message is None:  # Fractions stay text.
        assert load(published, **options).items.schema()["video_duration"].is_string()
        return
    with pytest.raises(DataError, match=message):
        load(published, **options)


def test_a_log_without_a_column_is_refused(published: Path) -> None:
    for name, rows in LOGS.items():
        write_log(published / "data" / name, rows, [c for c in LOG_COLUMNS if c != "is_rand"])
    with pytest.raises(DataError, match="no column 'is_rand'"):
        load(published)


def test_a_folder_without_logs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no KuaiRand log .*user_sequences\.parquet"):
        load(tmp_path)


# The cut

SEQUENCES: dict[int, tuple[list[int], list[int]]] = {
    8: ([4, 1, 4, 2, 1], [9, 1, 9, 3]),
    7: ([5], []),
    3: ([6, 6], [6]),
}


def exposures(rows: list[tuple[int, int, int, int]]) -> pa.Table:
    users, videos, times, views = zip(*rows, strict=True)
    return pa.table(
        {
            "user_id": pa.array(users, pa.int64()),
            "video_id": pa.array(videos, pa.int64()),
            "time_ms": pa.array([START_MS + time for time in times], pa.int64()),
            "long_view": pa.array(views, pa.int64()),
            "is_click": pa.array([1] * len(users), pa.int64()),
            "is_rand": pa.array([0] * len(users), pa.int64()),
            "tab": pa.array([1] * len(users), pa.int64()),
        }
    )


# user, video, time, long view: not in the order of time.
VALIDATION = [(8, 5, 20, 1), (8, 1, 10, 0), (2, 4, 15, 1), (7, 4, 10, 1)]
TEST = [(8, 2, 9, 1), (3, 0, 30, 1), (2, 9, 5, 1), (8, 2, 40, 1), (7, 4, 1, 0)]


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    sequences = pa.table(
        {
            "user_id": pa.array(SEQUENCES, pa.int64()),
            "history_len": pa.array([90, 1, 2], pa.int64()),
            "watch_seq": pa.array([w for w, _ in SEQUENCES.values()], pa.list_(pa.int64())),
            "long_watch_seq": pa.array([v for _, v in SEQUENCES.values()], pa.list_(pa.int64())),
        }
    )
    pq.write_table(sequences, tmp_path / "user_sequences.parquet")
    pq.write_table(exposures(VALIDATION), tmp_path / "val.parquet")
    pq.write_table(exposures(TEST), tmp_path / "test.parquet")
    (tmp_path / "video_features_basic_pure.csv").write_text(VIDEOS)
    users = pa.table({"user_id": [2, 3, 7, 8], "onehot_feat4": [1.0, None, 0.0, 13.0]})
    pq.write_table(users, tmp_path / "user_features.parquet")
    return tmp_path


def test_the_cut_is_one_event_a_list_entry_in_order(
    cut: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        tables = load(cut)
    expected = []
    num_dropped = 0
    for user, (watched, long_viewed) in sorted(SEQUENCES.items()):
        for video in watched:
            if video in long_viewed:
                num_dropped += 1
            else:
                expected.append((user, video, "exposed", "train"))
        expected += [(user, video, "clicked", "train") for video in long_viewed]
    for part, rows in (("validation", VALIDATION), ("test", TEST)):
        for user, video, _, view in sorted(rows, key=lambda row: row[2]):  # Stable, as files are.
            expected.append((user, video, "clicked" if view else "exposed", part))
    found = rows_of(tables)
    assert [(e["user_id"], e["item_id"], e["stage"], e["part"]) for e in found] == expected
    assert [e["event_number"] for e in found] == list(range(len(expected)))
    assert "timestamp" not in tables.events.columns
    assert [d.num_rows for d in tables.dropped] == [num_dropped]
    assert "holds the last 8 of 93 exposures" in caplog.text


def test_the_cut_is_split_by_its_files(cut: Path) -> None:
    from tfrs_pipeline.run import load_data, split_events

    tables = load_data(DataConfig(source="kuairand", path=cut))
    split = split_events(tables.events, SplitConfig(kind="column"), seed=0)
    report = split_report(split, tables.events)
    assert report["test"] == {"num_events": 5, "num_positives": 4, "num_users": 4}
    assert report["validation"] == {"num_events": 4, "num_positives": 3, "num_users": 3}
    assert report["num_users_dropped"] == report["num_events_dropped"] == 0
    queries = evaluation_queries(split, "test")
    assert queries.user_ids.tolist() == [2, 3, 8]
    # What test queries know is all of train and validation, in order, whatever the clock says.
    assert [history.tolist() for history in queries.histories] == [[4], [6], [9, 1, 9, 3, 5]]
    assert [ids.tolist() for ids in queries.relevant] == [[9], [0], [2]]
    assert [ids.tolist() for ids in queries.seen] == [[4], [6], [1, 2, 3, 4, 5, 9]]


def test_another_split_replaces_the_part_of_the_cut(cut: Path) -> None:
    split = split_last_n(load(cut).events)
    rows = split.filter(split["user_id"] == 8).order_by("event_number").to_pyarrow().to_pylist()
    parts = [row["part"] for row in rows if row["stage"] == "clicked"]
    assert parts == ["train"] * 5 + ["validation", "test"]


def test_the_label_of_the_cut_is_the_long_view(cut: Path) -> None:
    plain, weighted = (rows_of(load(cut, label=label)) for label in (None, {"long_view": 2.0}))
    assert [e["stage"] for e in plain] == [e["stage"] for e in weighted]
    assert [e["weight"] for e in weighted] == [1.0 + (e["stage"] == "clicked") for e in plain]
    with pytest.raises(DataError, match=r"cannot have the label is_click.*use long_view"):
        load(cut, label={"is_click": 1.0, "long_view": 1.0})


def test_features_and_unknown_videos_of_the_cut(cut: Path) -> None:
    tables = load(
        cut,
        item_features={"tag": "multi_categorical"},
        user_features={"onehot_feat4": "categorical"},
        unknown_items="drop",
    )
    assert tables.users.order_by("user_id").to_pyarrow()["onehot_feat4"].to_pylist() == [
        *(1, None, 0, 13)
    ]
    assert {event["item_id"] for event in rows_of(tables)} == {0, 1, 2}
    num_unknown = sum(event["item_id"] > 2 for event in rows_of(load(cut)))
    assert [d.num_rows for d in tables.dropped] == [4, num_unknown]


def test_repeats_are_dropped_within_a_part_alone(cut: Path) -> None:
    found = rows_of(load(cut, duplicates="drop"))
    of_user = [(e["item_id"], e["part"]) for e in found if e["user_id"] == 8]
    assert of_user == [
        *[(4, "train"), (2, "train"), (9, "train"), (1, "train"), (3, "train")],
        *[(1, "validation"), (5, "validation"), (2, "test")],
    ]


def test_a_cut_that_is_not_whole_is_refused(cut: Path) -> None:
    write_log(cut / "log_random_4_22_to_5_08_pure.csv", make_log(0, 3, 1))
    with pytest.raises(DataError, match="both published logs"):
        load(cut)
    (cut / "log_random_4_22_to_5_08_pure.csv").unlink()
    (cut / "val.parquet").unlink()
    with pytest.raises(DataError, match=r"not whole, it lacks val\.parquet"):
        load(cut)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("long_view", pa.array([0, 1, None, 1]), "'long_view' must hold 0 or 1; 1 of 4 rows"),
        ("long_view", pa.array([0, 1, 2, 1]), "'long_view' must hold 0 or 1; 1 of 4 rows"),
        ("time_ms", pa.array([1, None, None, 2]), "'time_ms' must hold a time.*; 2 of 4 rows"),
        ("tab", pa.array(["a"] * 4), r"'tab' must be an integer, it is string \(4 rows\)"),
        ("long_view", None, "no column 'long_view'"),
    ],
)
def test_a_bad_log_of_the_cut_is_refused(cut: Path, name: str, change: Any, message: str) -> None:
    table = exposures(VALIDATION).drop_columns([name])
    pq.write_table(
        table if change is None else table.append_column(name, change), cut / "val.parquet"
    )
    with pytest.raises(DataError, match=rf"val\.parquet: (column )?{message}"):
        load(cut)


def test_a_user_twice_in_the_sequences_is_refused(cut: Path) -> None:
    table = pq.read_table(cut / "user_sequences.parquet")
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), cut / "user_sequences.parquet")
    with pytest.raises(DataError, match="holds 3 different users in 4 rows"):
        load(cut)
