"""Tables of other engines that are a log already: what they must hold, and how they are copied."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import ibis
import pyarrow as pa
import pytest

from tests.small_log import column, event_table, in_ibis, item_table
from tfrs_pipeline.data.engines import check_stored, connect, random_key
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.samples.build import build_samples
from tfrs_pipeline.samples.store import read_samples

START = datetime(2024, 1, 1, tzinfo=UTC)


def events_with(**columns: Any) -> ibis.Table:
    """Makes four events; the given columns replace others, and None removes one."""
    times = [START + timedelta(hours=hour) for hour in range(4)]
    good: dict[str, Any] = {
        "user_id": [1, 1, 2, 2],
        "item_id": ["a", "b", "a", "c"],
        "event_number": [5, 6, 8, 9],
        "stage": ["clicked", "exposed", "clicked", "retrieved"],
        "timestamp": pa.array(times, pa.timestamp("us", "UTC")),
        "weight": [1.0, 2.0, 0.5, 1.0],
    }
    return in_ibis({k: v for k, v in (good | columns).items() if v is not None})


def test_a_table_gives_the_samples_that_its_copy_gives(tmp_path: Path) -> None:
    kinds, clicks = {"genre": "categorical"}, event_table("str").drop_columns(["rating"])
    copied = Log.from_table(clicks, items=item_table("str"), item_features=kinds)
    # As a warehouse may hold them: smaller integers, an extra column whose name is close to one of
    # the log's own columns, some items not listed.
    number = copied.events["event_number"].cast("int32")
    events = copied.events.mutate(event_number=number, state=ibis.literal("NY"))
    items = copied.items.filter(copied.items["genre"] != "genre 3")
    log = Log.from_ibis(events, items=items, item_features=kinds)
    for each, name in ((copied, "a"), (log, "b")):
        build_samples(each.split("last_share").train, tmp_path / name, seed=0)
    a, b = read_samples(tmp_path / "a"), read_samples(tmp_path / "b")
    for name in ("query_rows", "candidate_rows", "num_earlier", "counts"):
        assert getattr(a, name).tolist() == getattr(b, name).tolist()
    null = log.items.filter(log.items["genre"].isnull()).count().to_pyarrow().as_py()
    assert 0 < null == copied.items.filter(copied.items["genre"] == "genre 3").count().execute()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"event_number": None}, "no column 'event_number'.*row_number"),
        ({"event_number": [1, 2, 2, 3]}, "3 different numbers in 4 rows.*row_number"),
        ({"stage": None}, "no column 'stage'.*always 'clicked'"),
        ({"stage": ["clicked", "bought", "buy", "x"]}, "'stage' holds an unknown stage in 3 of 4"),
        ({"stage": ["clicked", "exposed", "ranked", None]}, "'stage' is null in 1 of 4 rows"),
        ({"stage": ["exposed"] * 4}, "none of 4 rows is a positive"),
        ({"user_id": [1, None, 2, 2]}, "'user_id' is null in 1 of 4 rows"),
        ({"timestamp": None, "time_stamp": [1, 2, 3, 4]}, r"did you mean 'timestamp'\?$"),
    ],
)
def test_events_that_are_no_log_are_refused(columns: dict[str, Any], message: str) -> None:
    Log.from_ibis(events_with())
    with pytest.raises(ValueError, match=message):
        Log.from_ibis(events_with(**columns))


def test_tables_of_any_engine_are_copied_in_the_order_of_their_numbers() -> None:
    table = event_table("int").drop_columns(["rating"])
    numbers = pa.array(range(len(table), 0, -1))
    rows = ibis.memtable(table.append_column("event_number", numbers)).to_pandas()
    other = ibis.sqlite.connect().create_table("events", rows)
    log = Log.from_ibis(other)
    assert column(log.events, "item_id") == table["item_id"].to_pylist()[::-1]
    assert column(log.events, "event_number") == [*range(len(table))]
    for made in (table, rows):
        with pytest.raises(TypeError, match="takes tables of Ibis"):
            Log.from_ibis(made)


def test_what_a_killed_process_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    code = "import tfrs_pipeline.data.engines as x\nkept = x.connect()\nprint(flush=True)\ninput()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == b"\n"
        (theirs,) = tmp_path.iterdir()
        own = connect()
        assert theirs.exists()  # Its process is alive.
        process.kill()
    (mine,) = {*tmp_path.iterdir()} - {theirs}
    # The folder of a killed run has a similar name, but is not a copy of a log.
    (killed := tmp_path / "tfrs-pipeline-run").mkdir()
    (killed / "lock").touch()
    connect()
    assert not theirs.exists()
    assert mine.exists()
    assert own.list_tables() == []
    del own
    assert [*tmp_path.iterdir()] == [killed]


def test_an_interrupted_query_is_no_fault_of_the_log() -> None:
    with pytest.raises(KeyboardInterrupt):
        check_stored(duckdb.InterruptException("INTERRUPT Error: Interrupted!"))


def test_tables_beyond_memory_lie_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorting 60 MB in 30 MB of memory needs the disk, and nothing is left there in the end."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    connection = connect("30MB")
    connection.con.execute("SET threads = 1")
    connection.con.execute("CREATE TABLE numbers AS SELECT range AS number FROM range(2_000_000)")
    numbers = connection.table("numbers")
    shuffled = numbers.order_by(random_key(numbers["number"], seed=0))
    shuffled.to_parquet(tmp_path / "shuffled.parquet")
    back = connection.read_parquet(tmp_path / "shuffled.parquet")["number"]
    assert back.as_table().aggregate(n=back.nunique()).to_pyarrow()["n"][0].as_py() == 2_000_000
    (folder,) = tmp_path.glob("tfrs-pipeline-*")
    assert (folder / "tables.duckdb").exists()
    del connection, numbers, shuffled, back
    assert not folder.exists()
