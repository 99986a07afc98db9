"""Tables in Spark become the log that they are: the same rows, types and samples."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ibis
import pyarrow.parquet as pq
import pytest

from tfrs_pipeline import DataError, FunnelLosers, Log, TrainingSet
from tfrs_pipeline.data.engines import connect_spark
from tfrs_pipeline.data.settings import DataConfig
from tfrs_pipeline.run.data import load_log
from tfrs_pipeline.sources.simulated import FunnelOptions, simulate_funnel

# Pools of the same request, and of the low part of the ranks.
HARD = FunnelLosers(stages=("retrieved", "ranked"))
REQUEST_FEATURES = {"place": "categorical", "near": "vector", "hour": "numeric"}
REQUEST_FEATURES["weekday"] = "categorical"


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    settings = ["spark.driver.host=127.0.0.1", "spark.driver.bindAddress=127.0.0.1"]
    settings += ["spark.ui.enabled=false", "spark.sql.shuffle.partitions=2"]
    with pytest.MonkeyPatch.context() as patch:
        words = " --conf ".join(["--master local[2]", *settings])
        patch.setenv("PYSPARK_SUBMIT_ARGS", f"{words} pyspark-shell")
        backend = connect_spark()
    yield backend
    backend.disconnect()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    """Makes a log with a request feature of each type; some values are missing."""
    options = FunnelOptions(num_retrieved=30, num_pre_ranked=16, num_ranked=8, num_exposed=4)
    log = simulate_funnel(num_users=30, num_items=80, num_requests=500, seed=3, options=options).log
    place = log.events["user_id"] % 4
    near = ibis.ifelse(place > 1, ibis.array([place / 8, place / 4]), None)
    events = log.events.mutate(
        place=ibis.ifelse(place > 0, place.cast("string"), ibis.null("string")),
        near=near.cast("array<float32>"),
    )
    log = dataclasses.replace(log, events=events, request_features=REQUEST_FEATURES)
    log.write(folder := tmp_path_factory.mktemp("log"))
    return Log.read(folder)


@pytest.fixture(scope="module")
def copied(spark: Any, log: Log, tmp_path_factory: pytest.TempPathFactory) -> Log:
    """Makes the log of the same tables in Spark, which has several unordered parts of them."""
    folder, tables = tmp_path_factory.mktemp("spark"), {}
    for name in ("events", "items", "users"):
        pq.write_table(getattr(log, name).to_pyarrow(), folder / f"{name}.parquet")
        tables[name] = spark.read_parquet(str(folder / f"{name}.parquet"))
        spark.create_view(name, tables[name], overwrite=True)
    names = ("item_features", "user_features", "request_features")
    features = {name: getattr(log, name) for name in names}
    return Log.from_ibis(tables.pop("events"), **tables, **features)


@pytest.mark.slow
def test_tables_of_spark_are_the_same_log_in_duckdb(log: Log, copied: Log, tmp_path: Path) -> None:
    for name, key in (("events", "event_number"), ("items", "item_id"), ("users", "user_id")):
        ours, theirs = getattr(log, name), getattr(copied, name)
        assert {*ours.columns} == {*theirs.columns}
        expected = ours.select(*theirs.columns).order_by(key).to_pyarrow()
        assert theirs.order_by(key).to_pyarrow().to_pylist() == expected.to_pylist()
    assert log.describe()[:3] == copied.describe()[:3]
    found = []
    for made, name in ((log, "duckdb"), (copied, "spark")):
        built = TrainingSet.build(made.split("time").train, tmp_path / name, seed=5, hard=HARD)
        tables = {path.name: pq.read_table(path) for path in (tmp_path / name).glob("*.parquet")}
        found.append((built.report, {name: table.to_pylist() for name, table in tables.items()}))
    assert found[0] == found[1]
    report, tables = found[0]
    assert report["hard_negatives"]["retrieved"]["mean_pool"] > 5
    assert all(tables.values())
    assert len(tables) == 5 + len(HARD.stages)


@pytest.mark.slow
def test_a_config_names_tables_of_spark(log: Log, copied: Log, tmp_path: Path) -> None:
    paths = {"path": Path("events"), "items_path": Path("items")}
    data = DataConfig(source="spark", item_features={"genre": "categorical"}, **paths)
    load_log(data).write(tmp_path)
    back = Log.read(tmp_path)
    for name, key in (("events", "event_number"), ("items", "item_id")):
        columns = getattr(back, name).columns
        expected = getattr(log, name).select(*columns).order_by(key).to_pyarrow()
        assert getattr(back, name).order_by(key).to_pyarrow().to_pylist() == expected.to_pylist()


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
