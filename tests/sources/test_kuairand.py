"""KuaiRand, as published and as cut, against a slow loop over made-up files; what is refused."""

import csv
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import DataError
from tfrs_pipeline.features.kinds import FeatureKind
from tfrs_pipeline.sources.kuairand import load_kuairand as load

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


def rows_of(tables: Log) -> list[dict[str, Any]]:
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


def test_features_are_those_asked_for(published: Path) -> None:
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
    assert tables.items.order_by("item_id").drop("_listed").to_pyarrow().to_pylist() == [
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
    assert any("are of 1 user that" in note for note in tables.notes)


def test_upload_days_are_those_of_the_logs_time_zone(published: Path) -> None:
    path = published / "data" / "video_features_basic_27k.csv"
    days = ("upload_dt", "2022-04-10", "", "2021-12-31")
    lines = zip(VIDEOS.splitlines(), days, strict=True)
    path.write_text("".join(f"{line},{day}\n" for line, day in lines))
    kinds: dict[str, FeatureKind] = {
        "upload_dt": "timestamp",
        "music_type": "hashed",
        "video_duration": "bucketized",
    }
    items = load(published, item_features=kinds).items.order_by("item_id").to_pyarrow()
    assert items["upload_dt"].to_pylist() == [
        datetime(2022, 4, 9, 16, tzinfo=UTC),
        None,
        datetime(2021, 12, 30, 16, tzinfo=UTC),
    ]
    assert items["music_type"].to_pylist() == [9, None, 4]
    assert items["video_duration"].to_pylist() == [1000.5, None, 20.0]


def test_names_and_settings_reach_the_log(published: Path) -> None:
    path = published / "data" / "video_features_basic_27k.csv"
    path.write_text("\n".join(VIDEOS.splitlines()[:3]) + "\n")
    num_unknown = sum(row["video_id"] == 2 for log in LOGS.values() for row in log)
    log = load(published, unknown_items="drop")
    assert [d.num_rows for d in log.dropped] == [num_unknown]
    with pytest.raises(DataError, match=r"no column .longview.\. Nearest: long_view"):
        load(published, label={"longview": 1.0})
    with pytest.raises(DataError, match=r"no column .authorid.\. Nearest: author_"):
        load(published, item_features={"authorid": "categorical"})


def test_logs_without_feature_files_have_ids_alone(published: Path) -> None:
    for path in (published / "data").glob("*_features_*.csv"):
        path.unlink()
    assert load(published).items.drop("_listed").columns == ("item_id",)
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
        ({"user_id": "x7"}, "'user_id' must hold whole numbers in all"),
        ({"video_id": "1.5"}, "'video_id' must hold whole numbers in all"),
        ({"video_id": -1}, r"'video_id' is -1 \(reserved for empty slots\) in 1 of 56 rows"),
        ({"time_ms": 10**18}, "holds times in another unit among milliseconds in 1 of 56"),
        ({"is_click": 2}, "'is_click' holds an unknown stage in 1 of 56 rows, such as '2'"),
    ],
)
def test_a_bad_value_is_refused(published: Path, values: dict[str, Any], message: str) -> None:
    name = "log_standard_4_22_to_5_08_27k.csv"
    rows: list[dict[str, Any]] = [*LOGS[name]]
    rows[3] = {**rows[3], **values}
    write_log(published / "data" / name, rows)
    with pytest.raises(DataError, match=message):
        load(published)


def test_a_folder_without_logs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no KuaiRand log "):
        load(tmp_path)
