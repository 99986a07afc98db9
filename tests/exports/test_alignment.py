"""A new version's space is turned onto that of the version in service; no score changes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tests.service.conftest import NUM_CANDIDATES, Served, make_served
from tfrs_pipeline import Exact, export, load, write_vectors
from tfrs_pipeline.answers.publish import MANIFEST_FILE
from tfrs_pipeline.durable import write_record
from tfrs_pipeline.exports.alignment import align

pytestmark = pytest.mark.usefixtures("trusted_exports", "few_signatures")


def rotation(dim: int, seed: int = 0) -> np.ndarray:
    """Draws an orthogonal matrix."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]


def exported(served: Served, folder: Path) -> Path:
    return export(served.exportable(), folder, index=Exact(), queries=served.queries())


def test_a_turned_model_comes_back(served: Served, tmp_path: Path) -> None:
    folder, model = tmp_path / "films", served.exportable()
    first = load(exported(served, folder))
    assert first.manifest["aligned"] is None
    dim = first.candidate_embeddings().shape[1]
    turned = model.turned(rotation(dim))
    second = load(export(turned, folder, index=Exact(), queries=served.queries()))
    assert second.manifest["aligned"] == {
        "version": 1,
        "num_items": NUM_CANDIDATES,
        "mean_cosine": pytest.approx(1, abs=1e-5),
    }
    assert second.candidate_ids() == first.candidate_ids()
    vectors = first.candidate_embeddings(), second.candidate_embeddings()
    np.testing.assert_allclose(*vectors, atol=1e-5)
    # Without the turn back, they would be others.
    elsewhere = vectors[0] @ rotation(dim)
    assert np.abs(elsewhere - vectors[0]).max() > 0.1
    queries = served.queries()
    np.testing.assert_allclose(
        first.embed_queries(queries), second.embed_queries(queries), atol=1e-5
    )
    about = write_vectors(second, tmp_path / "vectors.parquet")
    assert about["aligned"] == second.manifest["aligned"]


@pytest.mark.parametrize("served", ["int"], indirect=True)
def test_scores_are_those_of_the_model(served: Served, tmp_path: Path) -> None:
    """Another model's space is turned, and its answers stay the model's own."""
    other = make_served("int", use_user_id=False)
    alone = load(exported(other, tmp_path / "alone" / "films"))
    exported(served, tmp_path / "films")
    after = load(exported(other, tmp_path / "films"))
    assert after.manifest["aligned"]["mean_cosine"] < 0.99
    moved = after.candidate_embeddings() - alone.candidate_embeddings()
    assert np.abs(moved).max() > 0.1
    queries = other.queries()
    answers = [model.retrieve(queries, NUM_CANDIDATES) for model in (alone, after)]
    np.testing.assert_array_equal(answers[0][0], answers[1][0])
    np.testing.assert_allclose(answers[0][1], answers[1][1], atol=1e-6 * NUM_CANDIDATES)
    # Nearer to the version in service than before: the least distance that a rotation reaches.
    first = load(tmp_path / "films" / "1").candidate_embeddings()
    distances = [np.square(model.candidate_embeddings() - first).sum() for model in (alone, after)]
    assert distances[1] < distances[0]
    for seed in range(20):
        trial = alone.candidate_embeddings() @ rotation(first.shape[1], seed)
        assert np.square(trial - first).sum() > distances[1]


@pytest.mark.parametrize("has_item_bias", [False, True])
def test_biases_stay_where_they_are(int_folder: Path, tmp_path: Path, has_item_bias: bool) -> None:
    model = load(int_folder)
    ids, vectors = model.candidates.ids_and_vectors()
    folder = tmp_path / "films"
    folder.symlink_to(int_folder)
    if has_item_bias:  # The version in service has none, so the last place means another thing.
        assert align(folder, ids, vectors, has_item_bias=True) is None
        folder.unlink()
        served = make_served("int")
        biased = dataclasses.replace(served.exportable(), has_item_bias=True)
        export(biased, folder, index=Exact(), queries=served.queries())
        turned = vectors.copy()
        turned[:, :-1] = vectors[:, :-1] @ rotation(vectors.shape[1] - 1)
    else:
        turned = vectors @ rotation(vectors.shape[1])
    found = align(folder, ids, turned.astype(np.float32), has_item_bias=has_item_bias)
    assert found is not None
    np.testing.assert_allclose(turned @ found.rotation, vectors, atol=1e-4)
    np.testing.assert_allclose(
        found.rotation @ found.rotation.T, np.eye(vectors.shape[1]), atol=1e-5
    )
    if has_item_bias:
        np.testing.assert_array_equal(found.rotation[-1], np.eye(vectors.shape[1])[-1])


def test_what_cannot_be_compared_is_left_alone(int_folder: Path, tmp_path: Path) -> None:
    ids, vectors = load(int_folder).candidates.ids_and_vectors()
    options = {"has_item_bias": False}
    assert align(tmp_path / "none", ids, vectors, **options) is None
    assert align(int_folder, ids, vectors[:, :-1], **options) is None
    assert align(int_folder, ids + 100_000, vectors, **options) is None
    assert align(int_folder, ids.astype(str).astype(object), vectors, **options) is None
    # Some shared items are enough, and new ones are turned with them.
    num = 20
    some = np.concatenate([ids[:num], ids[num:] + 100_000])
    found = align(int_folder, some, vectors @ rotation(8).astype(np.float32), **options)
    assert found is not None
    assert found.report["num_items"] == num
    np.testing.assert_allclose(found.rotation, rotation(8).T, atol=1e-4)


def test_a_version_of_another_format_is_left_alone(tmp_path: Path) -> None:
    served = make_served("int")
    folder = exported(served, tmp_path / "films")
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    ids, vectors = load(folder).candidates.ids_and_vectors()
    assert align(tmp_path / "films", ids, vectors, has_item_bias=False) is not None
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE]
    write_record(folder / MANIFEST_FILE, {**manifest, "format": 1}, files)
    assert align(tmp_path / "films", ids, vectors, has_item_bias=False) is None
    (folder / MANIFEST_FILE).write_text("{")
    assert align(tmp_path / "films", ids, vectors, has_item_bias=False) is None
