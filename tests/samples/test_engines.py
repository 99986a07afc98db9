"""DuckDB and Spark give the same samples, in the same order."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tfrs_pipeline import FunnelLosers, TrainingSet, Transitions, signals
from tfrs_pipeline.data.engines import connect_spark
from tfrs_pipeline.data.log import Log, Split
from tfrs_pipeline.data.schema import AskedBy, DataError, SplitKind, Ties
from tfrs_pipeline.data.settings import DataConfig
from tfrs_pipeline.durable import part_files
from tfrs_pipeline.run.data import load_log
from tfrs_pipeline.sources.simulated import FunnelOptions, simulate_funnel

# Pools of the same request, and of the low part of the ranks.
HARD = FunnelLosers(stages=("retrieved", "ranked"))


REQUEST_FEATURES = {"place": "categorical", "near": "vector", "hour": "numeric"}
REQUEST_FEATURES["weekday"] = "categorical"


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    backend = connect_spark("local[2]")
    backend.raw_sql("SET spark.sql.shuffle.partitions = 2")
    backend.raw_sql("SET spark.sql.adaptive.enabled = false")  # Else one part file holds it all.
    yield backend
    backend.disconnect()


@pytest.fixture(scope="module")
def logs(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Log, Log]:
    """Returns the same log in DuckDB and in Spark."""
    folder = tmp_path_factory.mktemp("log")
    options = FunnelOptions(num_retrieved=30, num_pre_ranked=16, num_ranked=8, num_exposed=4)
    log = simulate_funnel(num_users=30, num_items=80, num_requests=500, seed=3, options=options).log
    # A request feature of each type; some values are missing.
    place = log.events["user_id"] % 4
    near = ibis.ifelse(place > 1, ibis.array([place / 8, place / 4]), None)
    events = log.events.mutate(
        place=ibis.ifelse(place > 0, place.cast("string"), ibis.null("string")),
        near=near.cast("array<float32>"),
    )
    log = dataclasses.replace(log, events=events, request_features=REQUEST_FEATURES)
    log.write(folder)
    names = ("item_features", "user_features", "request_features")
    features: dict[str, Any] = {name: getattr(log, name) for name in names}
    for name in ("events", "items", "users"):
        features[name] = spark.read_parquet(f"{folder}/{name}.parquet")
    return Log.read(folder), Log.from_ibis(features.pop("events"), **features)


def read(folder: Path) -> dict[str, pa.Table]:
    """Reads all that a build has written, in its order."""
    return {
        path.name: pa.concat_tables(map(pq.read_table, part_files(path)))
        for path in sorted(folder.glob("*.parquet"))
    }


@pytest.mark.slow
def test_duckdb_and_spark_build_the_same_samples(logs: tuple[Log, Log], tmp_path: Path) -> None:
    found = []
    for log, name in zip(logs, ("duckdb", "spark"), strict=True):
        # The split is read back, as in a run.
        (folder := tmp_path / name).mkdir()
        log.split("time").write(folder / "split.parquet")
        split = Split.read(log, folder / "split.parquet")
        # The second build finds the samples of the same log.
        for _ in range(2):
            built = TrainingSet.build(split.train, folder / "samples", seed=5, hard=HARD)
        found.append((built.report, read(folder / "samples")))
    (report, tables), (other_report, others) = found
    assert report == other_report
    description, other_description = (log.describe()[:3] for log in logs)
    assert description == other_description
    assert description[2].startswith("positives a day: ")
    assert report["hard_negatives"]["retrieved"]["mean_pool"] > 5
    assert tables.keys() == others.keys()
    assert len(tables) == 5 + len(HARD.stages)
    for name, table in tables.items():
        assert table.num_rows
        assert table.to_pylist() == others[name].to_pylist()
    assert len(part_files(tmp_path / "spark" / "samples" / "samples.parquet")) > 1


@pytest.mark.nightly
@pytest.mark.parametrize("ties", ["order", "random"])
def test_both_order_equal_times_alike(logs: tuple[Log, Log], ties: Ties, tmp_path: Path) -> None:
    found = []
    for log in logs:
        events = log.events.drop("near", "place")
        day = events["timestamp"].truncate("D").cast("timestamp('UTC', 6)")
        events = events.mutate(timestamp=day)
        by_day = Log.from_ibis(events, ties=ties)
        folder = tmp_path / log.events.get_backend().name
        TrainingSet.build(by_day, folder, seed=0)
        drawn = by_day.events.order_by("event_number").select("event_number", "item_id")
        found.append((by_day.notes, drawn.to_pyarrow().to_pylist(), read(folder)))
    (notes, drawn, tables), (other_notes, other_drawn, others) = found
    assert notes == other_notes
    assert "times by day" in notes[0]
    assert drawn == other_drawn
    for name, table in tables.items():
        assert table.to_pylist() == others[name].to_pylist()


@pytest.mark.nightly
def test_duckdb_and_spark_have_the_same_signals_and_transitions(logs: tuple[Log, Log]) -> None:
    """This holds for all users and for a drawn sample of them."""
    found = []
    for log in logs:
        scores = Transitions().fit(log).score([{"history": [item]} for item in (1, 5, 40)])
        found.append((signals(log), signals(log, max_positives=200), scores.tolist()))
    assert found[0] == found[1]
    of_all, of_some, _ = found[0]
    assert of_all["request place"] != of_some["request place"]


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["last_share", "last_n", "held_out_users"])
def test_duckdb_and_spark_draw_the_same_parts(logs: tuple[Log, Log], kind: SplitKind) -> None:
    found = []
    for log in logs:
        events = log.events.drop("timestamp")
        unordered = dataclasses.replace(log, events=events, is_ordered=False, request_features={})
        parts = unordered.split(kind).events.select("event_number", "user_id", "item_id", "part")
        found.append(parts.order_by("event_number").to_pyarrow().to_pylist())
    assert found[0] == found[1]
    pairs = {(row["user_id"], row["item_id"]) for row in found[0]}
    parts_of_pairs = {(row["user_id"], row["item_id"], row["part"]) for row in found[0]}
    assert len(pairs) == len(parts_of_pairs) < len(found[0])


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("kind", "by"), [("last_share", "users"), ("held_out_users", "users"), ("time", "requests")]
)
def test_duckdb_and_spark_ask_the_same(logs: tuple[Log, Log], kind: SplitKind, by: AskedBy) -> None:
    holdout, other = (log.split(kind).holdout("test", 5, seed=1, by=by) for log in logs)
    assert holdout.num_sampled_from == other.num_sampled_from
    for name in ("user_ids", "times", "candidate_ids", "candidate_counts"):
        assert getattr(holdout, name).tolist() == getattr(other, name).tolist()
    for name in ("histories", "history_times", "relevant", "seen"):
        for left, right in zip(getattr(holdout, name), getattr(other, name), strict=True):
            assert left.tolist() == right.tolist()
    assert holdout.requests == other.requests
    assert {tuple(request) for request in holdout.requests or ()} == {tuple(REQUEST_FEATURES)}


@pytest.mark.nightly
def test_a_config_names_tables_of_spark(spark: Any, logs: tuple[Log, Log], tmp_path: Path) -> None:
    for name in ("events", "items"):
        spark.create_view(name, getattr(logs[1], name), overwrite=True)
    paths = {"path": Path("events"), "items_path": Path("items")}
    data = DataConfig(source="spark", item_features={"genre": "categorical"}, **paths)
    load_log(data).write(tmp_path)
    assert len(part_files(tmp_path / "events.parquet")) > 1
    # DuckDB reads what Spark has written.
    back = Log.read(tmp_path)
    for name, key in (("events", "event_number"), ("items", "item_id")):
        columns = getattr(back, name).columns
        expected = getattr(logs[0], name).select(*columns).order_by(key).to_pyarrow()
        assert getattr(back, name).to_pyarrow().to_pylist() == expected.to_pylist()


def test_what_spark_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    with pytest.raises(DataError, match=r"package pyspark.*\[spark\]"):
        connect_spark()


def test_that_java_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("pyspark")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"Java 17 or 21.*default-jre"):
        connect_spark()
