"""iALS as a member of a sum: its vectors against the library's scores, its sum, its export."""

from pathlib import Path

import numpy as np
import pytest

import tfrs_pipeline as tp
from tests.model.conftest import make_log, untrained
from tfrs_pipeline.evaluation.evaluate import Truth
from tfrs_pipeline.model.corpus import TrainingSet
from tfrs_pipeline.model.fitted_model import encoder_of
from tfrs_pipeline.model.ials import HISTORY_LENGTH, FittedIals
from tfrs_pipeline.retrieval import Query

pytestmark = pytest.mark.usefixtures("trusted_exports", "few_signatures")
LOG = make_log()
SETTINGS = tp.Ials(num_factors=6, regularization=2.0, alpha=3.0)
KNOWN: list[Query] = [
    {"history": [10, 40, 20]},
    {"history": [10, 40, 20, 10]},  # An item comes again.
    {"history": [50, 999_999]},  # The log lacks one.
]


@pytest.fixture(scope="module")
def fitted() -> FittedIals:
    return FittedIals.fit(SETTINGS, LOG)


def scores(fitted: FittedIals, queries: list[Query]) -> np.ndarray:
    return encoder_of(fitted.towers)(queries) @ fitted.vectors[1:].T


def test_the_vectors_give_the_librarys_scores(fitted: FittedIals) -> None:
    ids, expected = SETTINGS.fit(LOG).retrieve(KNOWN, k=len(fitted.towers.candidate_ids))
    by_id = fitted.towers.candidate_ids.tolist()
    for line, line_ids, line_scores in zip(scores(fitted, KNOWN), ids, expected, strict=True):
        columns = [by_id.index(item) for item in line_ids]
        np.testing.assert_allclose(line[columns], line_scores, rtol=1e-4, atol=1e-5)


def test_without_a_known_item_the_other_members_rank(fitted: FittedIals) -> None:
    np.testing.assert_array_equal(scores(fitted, [{"history": []}, {"history": [7]}, {}]), 0)
    embedded = fitted.towers.embed_candidates(np.array([0, 1], np.int32)).numpy()
    assert not embedded[0].any()
    assert embedded[1].any()


def test_the_latest_items_of_a_long_history_count(fitted: FittedIals) -> None:
    latest = np.resize([10, 40, 20], HISTORY_LENGTH).tolist()
    long, cut = scores(fitted, [{"history": [50, *latest]}, {"history": latest}])
    np.testing.assert_array_equal(long, cut)


def test_two_fits_are_equal_bit_for_bit(fitted: FittedIals) -> None:
    again = FittedIals.fit(SETTINGS, LOG)
    np.testing.assert_array_equal(again.vectors, fitted.vectors)


def test_a_sum_with_ials_is_fitted_exported_and_asked(tmp_path: Path) -> None:
    train, validation, _ = LOG.split("last_n", validation=1, test=1)
    data = TrainingSet.build(train, tmp_path / "samples", seed=0)
    tower = untrained(tp.TwoTower(dim=4, history_length=3, history_pooling=["mean"]), data.corpus)
    # iALS comes first, so that the export takes what users did from it.
    members = {"ials": FittedIals.fit(SETTINGS, train), "towers": tower}
    queries = Truth.of(validation, "clicked").queries
    model = tp.FittedSum.of(members, {"ials": 1.0, "towers": 0.5}, queries, dim=99)
    assert model.towers.history_length == HISTORY_LENGTH
    folder = tp.export(model, tmp_path / "sum", index=tp.Exact(), queries=KNOWN)
    loaded = tp.load(folder)
    asked: list[list[Query]] = [KNOWN, [{"user_id": 101}], [{"history": []}]]
    for queries in asked:
        ids, line_scores = loaded.retrieve(queries, k=7)
        np.testing.assert_array_equal(ids, model.retrieve(queries, k=7)[0])
        np.testing.assert_allclose(line_scores, model.retrieve(queries, k=7)[1], rtol=1e-4)
    # A new item is ranked by the other member alone: the first six entries are those of iALS.
    (new, known), is_trained = loaded.embed_candidates([999, 10], {"genre": ["war", "war"]})
    assert is_trained.tolist() == [False, True]
    assert not new[:6].any()
    assert new[6:].all()
    assert known.all()
