"""Every kind of feature, from files through the command line to the model in service."""

import csv
import io
import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.small_log import event_table, item_table, small_config, user_table, write
from tfrs_pipeline import cli
from tfrs_pipeline.config import dump_config
from tfrs_pipeline.data.schema import read_tables
from tfrs_pipeline.model.features import NUM_TIME_VALUES, Feature
from tfrs_pipeline.run import Corpus, read_corpus
from tfrs_pipeline.serving import export

ITEM_KINDS = {
    "title": "text",
    "genre": "categorical",
    "maker": "hashed",
    "tags": "multi_categorical",
    "price": "numeric",
    "plays": "bucketized",
    "uploaded": "timestamp",
    "look": "vector",
}
USER_KINDS = {"age": "bucketized", "joined": "timestamp", "taste": "vector", "city": "hashed"}
START = datetime(2023, 11, 1, tzinfo=UTC)


def rich_items() -> pa.Table:
    """The small log's items with a column of each kind, each of them missing in some rows."""
    items = item_table("int").to_pylist()
    for number, row in enumerate(items):
        more = {
            "maker": f"maker {number % 40}",
            "tags": ["a", f"tag {number % 5}"],
            "price": number / 4,
            "plays": float(number**3),
            "uploaded": START + timedelta(hours=number),
            "look": [float(number % 4 == i) for i in range(4)],
        }
        absent = list(more)[number % 10] if number % 10 < len(more) else None
        row.update({name: None if name == absent else value for name, value in more.items()})
    return pa.Table.from_pylist(items)


def rich_users() -> pa.Table:
    users = user_table("int").to_pylist()
    for number, row in enumerate(users):
        row["joined"] = None if number % 9 == 0 else START - timedelta(days=number, minutes=number)
        row["taste"] = None if number % 7 == 0 else [number % 4 - 1.5, 1.0]
        row["city"] = None if number % 8 == 0 else f"city {number}"
    return pa.Table.from_pylist(users)


def as_text(value: Any) -> Any:
    if isinstance(value, list):
        return ";".join(str(each) for each in value)
    return value.replace(tzinfo=None).isoformat() if isinstance(value, datetime) else value


def write_rich(table: pa.Table, path: Path) -> Path:
    """Writes Parquet, or CSV with lists as strings and times without a zone."""
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return path
    with path.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(table.column_names)
        writer.writerows([map(as_text, row.values()) for row in table.to_pylist()])
    return path


def run_with_features(folder: Path, suffix: str) -> Path:
    """Runs the command line with a column of each kind; returns the run's folder."""
    data = {"source": "events", "path": write(event_table("int"), folder / "events.parquet")}
    (folder / "small.toml").write_text(dump_config(small_config(folder, data)))
    arguments: list[Any] = [
        *("run", "--config", folder / "small.toml", "--run-dir", folder / "run"),
        *("--data.items-path", write_rich(rich_items(), folder / f"items.{suffix}")),
        *("--data.users-path", write_rich(rich_users(), folder / f"users.{suffix}")),
        *("--data.item-features", *(f"{name}={kind}" for name, kind in ITEM_KINDS.items())),
        *("--data.user-features", *(f"{name}={kind}" for name, kind in USER_KINDS.items())),
    ]
    if suffix == "csv":
        arguments += ["--data.list-separator", ";", "--data.time-zone", "UTC"]
    with pytest.MonkeyPatch.context() as patch:
        # The check in a fresh process takes seconds, and has its own tests.
        patch.setattr(export, "_prove", lambda *arguments: None)
        for stream in ("stdout", "stderr"):
            patch.setattr(sys, stream, io.StringIO())
        code = cli.main([str(argument) for argument in arguments])
    assert code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def of_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_with_features(tmp_path_factory.mktemp("csv"), "csv")


@pytest.fixture(scope="module")
def of_parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_with_features(tmp_path_factory.mktemp("parquet"), "parquet")


def corpus_of(run_folder: Path) -> Corpus:
    return read_corpus(read_tables(run_folder / "data"), run_folder / "samples" / "final")


def is_missing(feature: Feature, encoded: np.ndarray) -> list[bool]:
    (empty,) = feature.spec.empty(1)
    same = (encoded == empty) | (np.isnan(encoded) & np.isnan(empty))
    return [bool(np.all(row)) for row in same]


@pytest.mark.parametrize("files", ["of_csv", "of_parquet"])
def test_every_kind_reaches_the_corpus_and_the_model(
    files: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(files)
    corpus = corpus_of(folder)
    features = {feature.name: feature for feature in corpus.candidate_features}
    assert {name: feature.kind for name, feature in features.items()} == ITEM_KINDS
    assert {feature.name: feature.kind for feature in corpus.query_features} == USER_KINDS
    num_items, num_users = len(corpus.candidate_ids), len(corpus.query_ids)
    assert corpus.candidate_columns["look"].shape == (num_items, 4)
    assert corpus.candidate_columns["uploaded"].shape == (num_items, NUM_TIME_VALUES)
    assert corpus.query_columns["taste"].shape == (num_users, 2)
    for tenth, name in enumerate(("maker", "tags", "price", "plays", "uploaded", "look")):
        missing = is_missing(features[name], corpus.candidate_columns[name])
        # Ids are 10 times the number of the item, and in order.
        assert missing == [id_ // 10 % 10 == tenth for id_ in corpus.candidate_ids], name
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["models"]["two_tower"]["recall@5"]["mean"] > 0
    losses = metrics["training"]["two_tower"]["history"]["loss"]
    assert losses
    assert np.isfinite(losses).all()


def test_csv_and_parquet_are_encoded_alike(of_csv: Path, of_parquet: Path) -> None:
    csv_corpus, parquet_corpus = corpus_of(of_csv), corpus_of(of_parquet)
    for side in ("candidate", "query"):
        features = getattr(csv_corpus, f"{side}_features")
        assert features == getattr(parquet_corpus, f"{side}_features")
        for feature in features:
            columns = (
                getattr(corpus, f"{side}_columns")[feature.name]
                for corpus in (csv_corpus, parquet_corpus)
            )
            np.testing.assert_array_equal(*columns)


def test_ages_count_from_the_end_of_the_log(of_parquet: Path) -> None:
    corpus = corpus_of(of_parquet)
    end = max(event_table("int")["timestamp"].to_pylist())
    for features in (corpus.candidate_features, corpus.query_features):
        (feature,) = (each for each in features if each.kind == "timestamp")
        assert feature.reference == end
