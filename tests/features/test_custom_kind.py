"""A kind of feature defined outside the package: trained, exported, served and refreshed."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf

from tests.model.conftest import tiny
from tests.small_log import event_table, item_table, write
from tfrs_pipeline import ConfigError, Exact, Log, RunConfig, load
from tfrs_pipeline.exports import export
from tfrs_pipeline.features.encoding import parse_request
from tfrs_pipeline.features.feature import Feature, TableColumn
from tfrs_pipeline.features.kinds import KINDS
from tfrs_pipeline.features.raw import Column, to_numbers
from tfrs_pipeline.run.refresh import refresh_index
from tfrs_pipeline.service import page, rest
from tfrs_pipeline.service.settings import ServeSettings
from tfrs_pipeline.service.versions import ServedVersion

ITEM_KINDS = {"month": "cyclic"}


@dataclass(frozen=True)
class Cyclic(Feature):
    """A number on a circle, such as a month, encoded as a point."""

    period: float

    kind: ClassVar[str] = "cyclic"
    raw_dtype = "float64"
    example = "3"
    is_embedded = False

    @classmethod
    def read(cls, column: TableColumn) -> Any:
        return column.read("number")

    @classmethod
    def fit(cls, name: str, column: Column, *, reference: datetime | None = None) -> Self:
        numbers = to_numbers(name, column)
        return cls(name, float(numbers[np.isfinite(numbers)].max(initial=0)))

    def to_raw(self, column: Column) -> np.ndarray:
        return to_numbers(self.name, column)

    @staticmethod
    def from_text(text: str) -> float:
        return float(text)

    def encoded(self, raw: np.ndarray) -> np.ndarray:
        angle = raw * (2 * np.pi / self.period)
        return np.stack([np.sin(angle), np.cos(angle)], axis=1, dtype=np.float32)

    def encoded_in_graph(self, raw: tf.Tensor) -> tf.Tensor:
        angle = raw * (2 * np.pi / self.period)
        return tf.cast(tf.stack([tf.sin(angle), tf.cos(angle)], axis=1), tf.float32)


@pytest.fixture(scope="module", autouse=True)
def known(trusted_exports: None, few_signatures: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KINDS, "cyclic", Cyclic)
        yield


def items(num: int) -> pa.Table:
    table = item_table("int")
    months = [None if i % 10 == 0 else 1 + i % 12 for i in range(table.num_rows)]
    return table.append_column("month", pa.array(months)).slice(0, num)


@pytest.fixture(scope="module")
def folder(module_path: Path) -> Path:
    """Trains on CSV files with an item and a request feature of the kind; returns the export."""
    events = event_table("int")
    asked = pa.array([1 + i % 12 for i in range(events.num_rows)])
    path = write(events.append_column("season", asked), module_path / "events.csv")
    kinds: Any = {"item_features": ITEM_KINDS, "request_features": {"season": "cyclic"}}
    log = Log.from_files(path, items=write(items(80), module_path / "items.csv"), **kinds)
    split = log.split("last_n", validation=1, test=1)
    fitted = tiny(training={"max_epochs": 1, "monitor": "ndcg@5"}).fit(split.train)
    (month,), (season,) = fitted.corpus.candidate_features, fitted.corpus.request_features
    assert (month, season) == (Cyclic("month", 12.0), Cyclic("season", 12.0))
    assert fitted.corpus.candidate_columns["month"].shape == (80, 2)
    return export.export(fitted, module_path / "models" / "films", index=Exact())


def test_settings_name_the_kind_and_teach_others() -> None:
    data = {"path": "x", "items_path": "y", "item_features": ITEM_KINDS}
    assert RunConfig(data=data).data.item_features == ITEM_KINDS
    with pytest.raises(ConfigError, match="did you mean 'cyclic'"):
        RunConfig(data={**data, "item_features": {"month": "cyclc"}})
    with pytest.raises(ConfigError, match=r"export.filter_by.*no item feature of kind categorical"):
        RunConfig(data=data, export={"filter_by": "month"})


def test_a_request_is_answered_by_its_values(folder: Path) -> None:
    model = load(folder)
    items = model.candidate_ids()[:3]

    def embedded(**request: Any) -> np.ndarray:
        return model.embed_queries([{"history": items, "request": request}])

    read = model.features["request"]
    assert parse_request(read, {"season": "3"}) == {"season": 3.0}
    with pytest.raises(ValueError, match=r"season \(cyclic\) is written like 3\."):
        parse_request(read, {"season": "spring"})
    np.testing.assert_allclose(embedded(season=3), embedded(season=15), atol=1e-5)
    for other in ({"season": 9}, {}):
        assert np.abs(embedded(season=3) - embedded(**other)).max() > 1e-3
    version = ServedVersion(folder, ServeSettings())
    body = {"signature_name": "embed_user", "inputs": {"user_id": [1], "season": [None]}}
    asked = rest.parse_predict(json.dumps(body).encode(), version.signatures)
    assert np.isnan(asked.inputs["season"]).all()
    query = page.PageQuery(items=items, request={"season": "3"})
    assert page.request_of(model, query)["inputs"]["season"] == [3.0]


def test_a_refresh_reads_the_column_as_the_training_did(folder: Path, tmp_path: Path) -> None:
    refreshed = refresh_index(folder, write(items(70), tmp_path / "items.parquet"))
    before, after = load(folder), load(refreshed.folder)
    expected = before.candidate_embeddings()[:70]
    np.testing.assert_allclose(after.candidate_embeddings(), expected, atol=1e-6)
    lost = items(70).set_column(3, "month", pa.nulls(70, pa.float64()))
    with pytest.raises(ValueError, match="none of 70 items has a value of 'month'"):
        refresh_index(refreshed.folder, write(lost, tmp_path / "lost.parquet"))
