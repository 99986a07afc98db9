import numpy as np
from sklearn.metrics import ndcg_score

from tfrs_pipeline.evaluation.metrics import Ndcg, Rankings


def test_ndcg_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    num_queries, num_candidates = 40, 60
    scores = rng.permuted(np.tile(np.arange(num_candidates), (num_queries, 1)), axis=1)
    truth = rng.random((num_queries, num_candidates)) < rng.choice([0.02, 0.2, 0.9], (40, 1))
    truth[:, 0] |= ~truth.any(axis=1)
    is_hit = np.take_along_axis(truth, np.argsort(-scores, axis=1), axis=1)
    for k in (1, 5, 60):
        nothing = np.zeros(0)
        ours = Ndcg(k).measure(Rankings(is_hit, is_hit, truth.sum(axis=1), nothing, nothing))
        theirs = [ndcg_score(truth[[i]], scores[[i]], k=k) for i in range(num_queries)]
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
