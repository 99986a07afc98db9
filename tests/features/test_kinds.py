"""Every kind of feature, from files through the command line to the model in service."""

import csv
import io
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

import tfrs_pipeline
from tests.features.columns import NUM_NEW, fitted_features, new_columns, new_tensors
from tests.small_log import event_table, item_table, small_config, user_table, write
from tfrs_pipeline import Exportable, Log, TwoTower, cli, dump_config, load
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.exports.encoder import Encoder
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.kinds import KINDS
from tfrs_pipeline.features.numeric import Timestamp
from tfrs_pipeline.model.corpus import Corpus
from tfrs_pipeline.report import facts
from tfrs_pipeline.run.refresh import refresh_index
from tfrs_pipeline.service import page

pytestmark = pytest.mark.usefixtures("quick_runs")
ITEM_KINDS = {
    "title": "text",
    "genre": "categorical",
    "maker": "categorical",
    "tags": "multi_categorical",
    "price": "numeric",
    "plays": "bucketized",
    "uploaded": "timestamp",
    "look": "vector",
}
USER_KINDS = {"age": "bucketized", "joined": "timestamp", "taste": "vector", "city": "categorical"}
WITH_FEATURES = "embed_query_with_features"
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


def write_csv(table: pa.Table, path: Path) -> Path:
    """Writes lists as strings and times without a zone."""
    with path.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(table.column_names)
        writer.writerows([map(as_text, row.values()) for row in table.to_pylist()])
    return path


@pytest.fixture(scope="module")
def folder(module_path: Path) -> Path:
    """Runs the command line with a column of each kind, as CSV; returns the run's folder."""
    folder = module_path
    data = {"path": write(event_table("int"), folder / "events.parquet")}
    config = small_config(folder, data, training={"max_epochs": 1, "refit": False})
    (folder / "small.toml").write_text(dump_config(config))
    arguments: list[Any] = [
        *("run", "--config", folder / "small.toml", "--run-dir", folder / "run"),
        *("--data.items_path", write_csv(rich_items(), folder / "items.csv")),
        *("--data.users_path", write_csv(rich_users(), folder / "users.csv")),
        *("--data.item_features", *(f"{name}={kind}" for name, kind in ITEM_KINDS.items())),
        *("--data.user_features", *(f"{name}={kind}" for name, kind in USER_KINDS.items())),
        *("--data.list_separator", ";", "--data.time_zone", "UTC"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        # The report takes seconds, and has tests of its own.
        patch.setattr(facts, "write_report", lambda *arguments: None)
        for stream in ("stdout", "stderr"):
            patch.setattr(sys, stream, io.StringIO())
        code = cli.main([str(argument) for argument in arguments])
    assert code == 0
    return folder / "run"


def test_no_kind_is_named_outside_its_room() -> None:
    """Elsewhere only settings of public logs name kinds; timestamp and text are also columns."""
    package = Path(tfrs_pipeline.__file__).parent
    files = [path for path in package.rglob("*") if path.suffix in (".py", ".html")]
    name = re.compile(rf"""["'`]({"|".join(KINDS.keys() - {"timestamp", "text"})})["'`]""")
    found = {path.parent.name for path in files if name.search(path.read_text())}
    assert found == {"features", "sources"}


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder.parent / "saved_models" / "films")


def is_missing(feature: Feature, encoded: np.ndarray) -> list[bool]:
    (empty,) = feature.missing
    same = (encoded == empty) | (np.isnan(encoded) & np.isnan(empty))
    return [bool(np.all(row)) for row in same]


def test_every_kind_reaches_the_corpus_and_the_model(folder: Path) -> None:
    samples = folder / "samples" / "selection"
    corpus = Corpus.read(Log.read(folder / "data"), samples)
    features: dict[str, Any] = {x.name: x for x in corpus.candidate_features}
    assert {name: feature.kind for name, feature in features.items()} == ITEM_KINDS
    assert {feature.name: feature.kind for feature in corpus.query_features} == USER_KINDS
    num_items, num_users = len(corpus.candidate_ids), len(corpus.query_ids)
    assert corpus.candidate_columns["look"].shape == (num_items, 4)
    assert corpus.candidate_columns["uploaded"].shape == (num_items, 5)
    assert corpus.query_columns["taste"].shape == (num_users, 2)
    for tenth, name in enumerate(("maker", "tags", "price", "plays", "uploaded", "look")):
        missing = is_missing(features[name], corpus.candidate_columns[name])
        # Ids are 10 times the number of the item, and in order.
        assert missing == [id_ // 10 % 10 == tenth for id_ in corpus.candidate_ids.values], name
    # Ages count from the end of the log.
    end = max(event_table("int")["timestamp"].to_pylist())
    assert features["uploaded"].reference == end
    assert [f.reference for f in corpus.query_features if isinstance(f, Timestamp)] == [end]


def test_raw_features_in_service_are_encoded_as_in_training(model: Any) -> None:
    items = {row["item_id"]: row for row in rich_items().to_pylist()}
    ids = model.candidate_ids()
    columns = {name: [items[id_][name] for id_ in ids] for name in ITEM_KINDS}
    embeddings, is_known = model.embed_candidates(ids, columns)
    assert is_known.all()
    np.testing.assert_allclose(embeddings, model.candidate_embeddings(), atol=1e-6)
    # Another price gives another embedding, and an extreme one still gives finite numbers.
    for price in (1e300, None):
        others, _ = model.embed_candidates(ids, columns | {"price": [price] * len(ids)})
        assert np.isfinite(others).all()
        assert np.abs(others - embeddings).max() > 1e-3
    users = rich_users().to_pylist()
    stored = [{"user_id": row["user_id"], "history": ids[:3]} for row in users]
    features = [{name: row[name] for name in USER_KINDS} for row in users]
    given = [{**x, "features": y} for x, y in zip(stored, features, strict=True)]
    np.testing.assert_allclose(model.embed_queries(given), model.embed_queries(stored), atol=1e-6)


def test_the_page_takes_a_time_as_typed(model: Any) -> None:
    def asked(joined: str) -> Any:
        query = page.PageQuery(items=[10, 20], features={"joined": joined, "age": "30"})
        return page.request_of(model, query)["inputs"]

    moment = datetime(2023, 10, 1, 6, 30, tzinfo=UTC)
    assert asked("2023-10-01T08:30+02:00")["joined"] == [moment.timestamp()]
    with pytest.raises(ValueError, match=r"joined \(timestamp\) is written .*: 'yesterday'"):
        asked("yesterday")
    with pytest.raises(ValueError, match=r"joined .* no zone: write 2023-10-01T08:30:00Z if"):
        asked("2023-10-01T08:30")


def test_typed_items_are_encoded_as_their_csv(folder: Path, model: Any, tmp_path: Path) -> None:
    models = folder.parent / "saved_models" / "films"
    pq.write_table(rich_items(), tmp_path / "items.parquet")
    after = load(refresh_index(models / "1", tmp_path / "items.parquet").folder)
    place = {id_: i for i, id_ in enumerate(after.candidate_ids())}
    embeddings = after.candidate_embeddings()[[place[id_] for id_ in model.candidate_ids()]]
    np.testing.assert_allclose(embeddings, model.candidate_embeddings(), atol=1e-6)


def test_an_exported_encoder_embeds_new_values_as_the_model_in_memory(tmp_path: Path) -> None:
    features, num_rows = tuple(fitted_features()), NUM_NEW
    encoded = {f.name: f.encode_column(new_columns()[f.name]) for f in features}
    ids = np.arange(num_rows)
    corpus = Corpus(Ids(ids), Ids(ids), features, features, encoded, encoded)
    model = TwoTower(dim=8, feature_dim=4, history_length=5).build(corpus)
    functions = model.embed_queries, model.embed_candidates, model.variables
    given: Any = {"query_ids": ids, "query_features": features, "candidate_features": features}
    exportable = Exportable(*functions, pa.table({"item_id": ids}), history_length=5, **given)
    encoder = Encoder(exportable)
    signatures = {name: getattr(encoder, name) for name in ("embed_candidate", WITH_FEATURES)}
    tf.saved_model.save(encoder, str(tmp_path), signatures=signatures)
    loaded = tf.saved_model.load(str(tmp_path))
    # Unknown, missing, empty, extreme, in other alphabets: for known items and users, and new ones.
    raw = new_tensors()
    for rows in (np.arange(1, num_rows + 1), np.zeros(num_rows, int)):
        tensor = tf.constant(rows - 1, tf.int64)
        items = loaded.signatures["embed_candidate"](item_id=tensor, **raw)["embeddings"]
        nothing = tf.fill([num_rows, 1], tf.constant(-1, tf.int64))
        answer = loaded.signatures[WITH_FEATURES](user_id=tensor, history=nothing, **raw)
        users = answer["embeddings"]
        rows = tf.constant(rows, tf.int32)
        histories = tf.zeros([num_rows, 5], tf.int32)
        np.testing.assert_allclose(items, model.embed_candidates(rows, encoded), atol=1e-6)
        np.testing.assert_allclose(users, model.embed_queries(rows, histories, encoded), atol=1e-6)
        assert np.isfinite(items).all()
        # Two rows lack every value, so without an id they are the same.
        assert len(np.unique(np.round(items, 4), axis=0)) == num_rows - (int(rows[0]) == 0)
