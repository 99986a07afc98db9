"""The converters of public logs, on a few made-up rows in the published format."""

import pickle
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from tests.scripts import script
from tests.small_log import column
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.settings import Reading

START_MS = 1_705_104_000_000  # 2024-01-13, UTC
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KUAIRAND, RECFLOW, UNSEEN = (
    script(BENCHMARKS / f"{name}.py") for name in ("kuairand_log", "recflow_log", "unseen_logs")
)


def columns_of(log: Log, *names: str) -> list[tuple[Any, ...]]:
    return list(zip(*(column(log.events, name) for name in names), strict=True))


def moment(milliseconds: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=milliseconds)


# KuaiRand


def exposures(seed: int, num_rows: int, is_rand: int) -> list[dict[str, int]]:
    rng = random.Random(seed)
    row = dict.fromkeys((*KUAIRAND.COLUMNS, "date", "duration_ms"), 0) | {"is_rand": is_rand}
    mosts = {"user_id": 3, "video_id": 3, "time_ms": 10**9, "is_click": 2, "long_view": 2}
    drawn = [{name: rng.randrange(num) for name, num in mosts.items()} for _ in range(num_rows)]
    return [row | x | {"time_ms": START_MS + x["time_ms"]} for x in drawn]


# In the order in which they are read: part 10 comes after part 2.
LOGS = {
    "log_standard_4_08_to_4_21_27k_part1.csv": exposures(0, 7, 0),
    "log_standard_4_08_to_4_21_27k_part2.csv": exposures(1, 5, 0),
    "log_standard_4_08_to_4_21_27k_part10.csv": exposures(2, 5, 0),
    "log_standard_4_22_to_5_08_27k.csv": exposures(3, 9, 0),
    "log_random_4_22_to_5_08_27k.csv": exposures(4, 30, 1),
}


@pytest.fixture
def kuairand(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for name, rows in LOGS.items():
        pd.DataFrame(rows).to_csv(tmp_path / "data" / name, index=False)
    (tmp_path / "data" / "user_features_27k.csv").write_text("user_id\n1\n")
    return tmp_path


@pytest.mark.parametrize("positive", ["is_click", "long_view"])
def test_every_exposure_of_kuairand_is_an_event(kuairand: Path, positive: str) -> None:
    KUAIRAND.convert(kuairand, kuairand / "events.parquet")
    label = {} if positive == "is_click" else {positive: 1.0}
    reading = Reading(timestamp_unit="ms", label=label)
    log = Log.from_files(kuairand / "events.parquet", reading=reading)
    assert columns_of(log, "user_id", "item_id", "timestamp", "stage") == [
        (x["user_id"], x["video_id"], moment(x["time_ms"]), ("exposed", "clicked")[x[positive]])
        for rows in LOGS.values()
        for x in rows
    ]


def test_kuairand_refuses_what_it_cannot_convert(
    kuairand: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="no log_standard"):
        KUAIRAND.list_logs(tmp_path_factory.mktemp("empty"))
    (kuairand / "data" / "log_random_4_22_to_5_08_27k.csv").unlink()
    KUAIRAND.list_logs(kuairand)
    assert "may be drawn as a negative" in capsys.readouterr().out
    log = kuairand / "data" / "log_standard_4_22_to_5_08_27k.csv"
    log.rename(log.with_name("log_standard_4_22_to_5_08_1k.csv"))
    with pytest.raises(SystemExit, match="'1k', '27k'"):
        KUAIRAND.list_logs(kuairand)


# RecFlow


def row(**values: int | None) -> dict[str, int | None]:
    """Makes a row with all columns, as in a published file, and no flag set."""
    ids = {"request_id": 1, "request_timestamp": START_MS, "user_id": 1, "video_id": 1}
    return {**dict.fromkeys(RECFLOW.COLUMNS, 0), **ids, **values}


def write_day(path: Path, rows: list[dict[str, int | None]]) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    pa.feather.write_feather(pa.Table.from_pylist(rows), path, chunksize=4)


FURTHEST: list[tuple[list[str], str, int | None]] = [
    (["prerank_neg"], "retrieved", None),
    (["coarse_neg"], "pre_ranked", None),
    (["rank_neg"], "pre_ranked", 30),
    (["rank_pos"], "ranked", 30),
    (["rerank_neg"], "ranked", 4),
    (["rerank_pos"], "ranked", 4),
    (["realshow"], "exposed", 4),
    (["realshow", "prerank_neg"], "exposed", 4),
    (["realshow", "rerank_neg", "rank_neg"], "exposed", 4),
    (["coarse_neg", "prerank_neg"], "pre_ranked", None),
    (["rank_pos", "rank_neg"], "ranked", 30),
]


def test_the_furthest_stage_of_recflow_counts(tmp_path: Path) -> None:
    days = tmp_path / "all_stage"
    rows = [
        row(video_id=3 + i, rank_index=30, rerank_index=4, **dict.fromkeys(flags, 1))
        for i, (flags, _, _) in enumerate(FURTHEST)
    ]
    for x in rows:  # Whatever the outcome is, there is no positive without an exposure.
        x["effective_view"] = 1 - (x["realshow"] or 0)
    clicked = row(video_id=2, realshow=1, effective_view=1, rerank_index=-1)
    write_day(days / "2024-01-13.feather", [*rows, row(video_id=99, user_id=9)])
    write_day(tmp_path / "realshow" / "2024-01-13.feather", [clicked])  # Not read: see all_stage.
    write_day(tmp_path / "realshow" / "2024-01-14.feather", [clicked])
    RECFLOW.convert(tmp_path, tmp_path / "out")
    log = Log.from_files(tmp_path / "out" / "events", reading=Reading(timestamp_unit="ms"))
    found = columns_of(log, "stage", "rank")
    assert found == [*((stage, rank) for _, stage, rank in FURTHEST), ("clicked", None)]
    assert {*column(log.events, "timestamp")} == {moment(START_MS)}


def test_the_latest_row_of_recflow_describes_an_item(tmp_path: Path) -> None:
    days = {"13": [(7, 1, 0), (8, 2, 2), (9, 3, 1)], "14": [(6, 4, 2)]}
    for day, values in days.items():
        rows = [
            row(realshow=1, effective_view=1, author_id=a, age=b, request_timestamp=START_MS + c)
            for a, b, c in values
        ]
        write_day(tmp_path / "all_stage" / f"2024-01-{day}.feather", rows)
    RECFLOW.convert(tmp_path, tmp_path / "out")
    (item,) = pq.read_table(tmp_path / "out" / "items.parquet").to_pylist()
    (user,) = pq.read_table(tmp_path / "out" / "users.parquet").to_pylist()
    assert (item["author_id"], user["age"]) == (6, 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank_neg": 2}, "rank_neg"),
        ({"realshow": None}, "realshow IS NULL"),
        ({"realshow": 1, "effective_view": 7}, ".*effective_view"),
        ({"request_timestamp": START_MS // 1000}, "request_timestamp"),
        ({"request_id": None}, "request_id IS NULL"),
    ],
)
def test_recflow_refuses(tmp_path: Path, values: dict[str, int | None], message: str) -> None:
    path = tmp_path / "all_stage" / "2024-01-13.feather"
    write_day(path, [row(realshow=1, effective_view=1), {**row(), **values}])
    with pytest.raises(SystemExit, match=f"1 rows where {message}"):
        RECFLOW.convert(tmp_path, tmp_path / "out")


# Logs that no setting was chosen on


def test_times_of_a_review_log_belong_to_its_items(tmp_path: Path) -> None:
    (tmp_path / "Beauty_item_org_rank.txt").write_text("2 30 10\n7 20 30 40\n")
    (tmp_path / "Beauty_time_org_rank.txt").write_text("2 86400 86400\n7 0 86400 172800\n")
    users, items, times = UNSEEN.UNSEEN["cosmetics"](tmp_path).to_pydict().values()
    assert (users, items) == ([2, 2, 7, 7, 7], [30, 10, 20, 30, 40])
    assert times == [86400, 86400, 0, 86400, 172800]


def test_clicks_of_a_session_are_in_the_order_of_time(tmp_path: Path) -> None:
    head = "SessionId\tItemId\tTime\n"
    train, test = "3\t10\t5.9\n3\t11\t4.2\n", "1\t12\t7.5\n"
    (tmp_path / "yoochoose-clicks-100k_train_full.txt").write_text(head + train)
    (tmp_path / "yoochoose-clicks-100k_test.txt").write_text(head + test)
    table = UNSEEN.sessions(tmp_path).to_pydict()
    assert table == {"user_id": [1, 3, 3], "item_id": [12, 11, 10], "timestamp": [7, 4, 5]}


def test_short_sessions_are_not_drawn_and_the_others_stay_whole(tmp_path: Path) -> None:
    published = [[n, n + 100, n] if n % 2 else [n, n] for n in range(20)]
    (tmp_path / "all_train_seq.txt").write_bytes(pickle.dumps(published))
    table = UNSEEN.sampled_sessions(tmp_path, 6).to_pandas()
    drawn = table.groupby("user_id")["item_id"].apply(list).to_list()
    assert len(drawn) == 6
    assert all(session in published and len(session) == 3 for session in drawn)
    # A pickle that would import a module is refused.
    (tmp_path / "all_train_seq.txt").write_bytes(pickle.dumps([Path("a")]))
    with pytest.raises(pickle.UnpicklingError, match="lists of numbers"):
        UNSEEN.sampled_sessions(tmp_path, 1)


def test_baskets_keep_late_purchases_of_products_that_ten_households_bought(tmp_path: Path) -> None:
    late = pd.Timestamp("2017-12-01 10:00:00")
    rows = [(h, h, 1, late + pd.Timedelta(seconds=h)) for h in range(10, 0, -1)]
    rows += [(h, 20 + h, 2, late) for h in (1, 1, 2, 3, 4, 5, 6, 7, 8, 9)]  # Nine households.
    rows += [(1, 40, 1, pd.Timestamp("2017-09-30")), (3, 41, 1, late)]
    names = ["household_id", "basket_id", "product_id", "transaction_timestamp"]
    pd.DataFrame(rows, columns=names).to_parquet(tmp_path / "transactions.parquet")
    table = UNSEEN.baskets(tmp_path).to_pydict()
    assert (table["user_id"], {*table["item_id"]}) == ([1, 2, 3, 3, *range(4, 11)], {1})
    first = int(late.tz_localize("UTC").timestamp())
    assert table["timestamp"] == [first + n for n in (1, 2, 0, 3, 4, 5, 6, 7, 8, 9, 10)]
