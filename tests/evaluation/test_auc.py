"""AUC against scikit-learn and a slow loop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from tfrs_pipeline.evaluation.auc import auc, auc_per_query, draw_corpus_rows

scores = st.lists(st.integers(-3, 3), min_size=1, max_size=20)


@given(positives=scores, negatives=scores)
def test_equals_scikit_learn(positives: list[int], negatives: list[int]) -> None:
    labels = [1] * len(positives) + [0] * len(negatives)
    expected = roc_auc_score(labels, positives + negatives)
    assert auc(np.array(positives), np.array(negatives)) == pytest.approx(expected, abs=1e-12)


def test_empty_and_nan() -> None:
    some = np.array([1.0])
    assert np.isnan(auc(some, np.zeros(0)))
    assert np.isnan(auc(np.zeros(0), some))
    with pytest.raises(ValueError, match="NaN"):
        auc(np.array([np.nan]), some)


def test_per_query_uses_the_query_s_own_items() -> None:
    rng = np.random.default_rng(0)
    queries, candidates = rng.normal(size=(6, 3)), rng.normal(size=(30, 3))
    positives = [1 + rng.choice(30, size=n, replace=False) for n in (1, 4, 0, 2, 5, 3)]
    negatives = [1 + rng.choice(30, size=n, replace=False) for n in (7, 1, 4, 0, 9, 2)]
    found = auc_per_query(queries, candidates, positives, negatives)
    for i in range(6):
        pairs = [
            float(candidates[p - 1] @ queries[i] > candidates[n - 1] @ queries[i])
            + 0.5 * float(p == n)
            for p in positives[i]
            for n in negatives[i]
        ]
        if pairs:
            assert found[i] == pytest.approx(np.mean(pairs))
        else:
            assert np.isnan(found[i])
    with pytest.raises(ValueError, match="shorter"):
        auc_per_query(queries, candidates, positives[:5], negatives)


def test_corpus_rows_are_uniform() -> None:
    assert draw_corpus_rows(5, 100, seed=0).tolist() == [1, 2, 3, 4, 5]
    counts = np.zeros(50)
    for seed in range(400):
        rows = draw_corpus_rows(50, 10, seed=seed)
        assert len(np.unique(rows)) == 10
        counts[rows - 1] += 1
    # 400 draws of 10 in 50: mean 80, variance 400 * .2 * .8; five deviations.
    assert np.abs(counts - 80).max() < 5 * np.sqrt(64)
