"""The file of vectors: each item's own, the metadata about them, and never half a file."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.service.conftest import Exported
from tfrs_pipeline.answers import vectors
from tfrs_pipeline.answers.retriever import load
from tfrs_pipeline.durable import StorageError
from tfrs_pipeline.search.candidates import Candidates


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts 60 items into three blocks, the last of them shorter."""
    monkeypatch.setattr(vectors, "BLOCK", 25)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("ids", ["int", "str"])
def test_each_item_has_its_own_vector(exported: Exported, tmp_path: Path, ids: str) -> None:
    path, loaded = tmp_path / "films.parquet", load(exported(ids, "exact"))
    about = vectors.write_vectors(loaded, path)
    table = pq.read_table(path)
    assert pq.ParquetFile(path).num_row_groups == 3
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 8)
    expected = dict(zip(loaded.candidate_ids(), loaded.candidate_embeddings(), strict=True))
    for row in table.to_pylist():
        own = expected.pop(row["item_id"])
        np.testing.assert_array_equal(np.float32(row["embedding"]), own)
        assert row["norm"] == pytest.approx(np.sqrt(np.sum(own**2)), rel=1e-6)
        assert row["title"] == loaded.titles()[row["item_id"]]
    assert not expected
    metadata = {name.decode(): text.decode() for name, text in table.schema.metadata.items()}
    names = ("model", "version", "dim", "metric", "unit_length", "has_item_bias")
    told = [metadata[name] for name in names]
    assert told == ["films", "1", "8", "inner_product", "true", "false"]
    assert float(metadata["max_norm"]) == about["max_norm"] == table["norm"].to_numpy().max()
    # Readable without Arrow, too.
    (dims,) = duckdb.sql(f"SELECT DISTINCT len(embedding) FROM '{path}'").fetchall()
    assert dims == (8,)


def test_the_command_writes_items_of_the_service_too(
    films: Path, tmp_path: Path, command: Any
) -> None:
    model = load(films)
    model.upsert([{"item_id": 5, "genres": ["a"], "title": "New"}])
    model.remove([3])
    said = command("vectors", films, tmp_path / "films.parquet").out
    assert "60 items of version 1, 8 dimensions, inner product" in said
    rows = {row["item_id"]: row for row in pq.read_table(tmp_path / "films.parquet").to_pylist()}
    assert len(rows) == 60
    assert rows.keys() == set(model.candidate_ids()) == {5, *(7 * n + 3 for n in range(1, 60))}
    (expected,), _ = model.embed_candidates([5], {"genres": [["a"]]})
    np.testing.assert_allclose(rows[5]["embedding"], expected, rtol=1e-6)
    assert (rows[5]["title"], rows[10]["title"]) == ("New", "The 1th Film")


def untitled(*ids: str) -> Any:
    """Makes a model of items without titles; the second one's vector has length 2."""
    vectors = np.array([[1, 0], [0, 2]], np.float32)
    candidates = Candidates(np.array(ids or ("a", "b"), object), vectors, None, ())
    if not ids:
        candidates.change([], vectors[:0], removed=["a", "b"])
    about: dict[str, Any] = {"folder": Path("plain/3"), "manifest": {"name": "plain"}}
    about |= {"titles": dict}
    return SimpleNamespace(candidates=candidates, **about)


def test_a_write_in_between_does_not_show(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An item is added, one is changed, and one removed, as soon as the vectors are read."""
    model = load(films)
    real, (ids, embeddings) = model.candidates.ids_and_vectors, model.candidates.ids_and_vectors()

    def then_write() -> Any:
        found = real()
        model.upsert([{"item_id": 90_000, "genres": ["c"]}, {"item_id": 17, "genres": ["a"]}])
        model.remove([3])
        return found

    monkeypatch.setattr(model.candidates, "ids_and_vectors", then_write)
    vectors.write_vectors(model, tmp_path / "films.parquet")
    table = pq.read_table(tmp_path / "films.parquet")
    assert table["item_id"].to_pylist() == ids.tolist() != real()[0].tolist()
    np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), embeddings)


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plain.parquet"
    about = vectors.write_vectors(untitled("a", "b"), path)
    assert (about["min_norm"], about["max_norm"], about["unit_length"]) == (1, 2, False)
    assert pq.read_schema(path).names == ["item_id", "embedding", "norm"]
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", _full)
    with pytest.raises(ValueError, match="no items"):
        vectors.write_vectors(untitled(), path)
    with pytest.raises(StorageError, match=r"plain\.parquet.*No space left"):
        vectors.write_vectors(untitled("c", "d"), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def _full(*paths: Path) -> None:
    raise OSError(28, "No space left on device")
