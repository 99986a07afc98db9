"""Popularity at the end of the training period: how it is estimated, and where it counts."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import tfrs_pipeline as tp
from tests.model.conftest import NUM_ITEMS, assert_same, scores_of, tiny
from tfrs_pipeline import Samples, Split, TrainingSet
from tfrs_pipeline.model.loss import popularity_shift


def clicks_in_turn(*probabilities: np.ndarray, num: int = 4000, seed: int = 0) -> Samples:
    """Returns clicks of 500 users in random order; item probabilities differ between periods."""
    rng = np.random.default_rng(seed)
    items = [1 + rng.choice(len(p), num, p=p) for p in probabilities]
    rows, users = np.concatenate(items), rng.integers(1, 501, num * len(items))
    samples = Samples.from_pairs(users, rows, num_queries=500, num_candidates=len(probabilities[0]))
    return dataclasses.replace(samples, sequence_times=np.argsort(users, kind="stable"))


def test_shares_now_are_those_of_the_last_period() -> None:
    before, changed = np.repeat([0.09, 0.01], 10), np.repeat([0.02, 0.08], 10)
    for now, num_deviations in ((changed, 5), (before, 3)):
        shift = popularity_shift(clicks_in_turn(before, before, before, now))
        expected = now / (0.75 * before + 0.25 * now)
        # Each share is estimated from at least half of the last period's 4,000 clicks.
        deviation = 1 / np.sqrt(2000 * now)
        assert (np.abs(shift[1:] - np.log(expected)) < num_deviations * deviation).all()
        assert shift[0] == 0
    assert np.abs(shift).mean() < 0.15  # Items that stay as popular are left alone.


def test_unclicked_items_and_logs_that_tell_nothing() -> None:
    probabilities = np.append(np.full(10, 0.1), 0.0)
    samples = clicks_in_turn(probabilities, probabilities)
    assert np.isfinite(popularity_shift(samples)).all()
    assert not popularity_shift(dataclasses.replace(samples, sequence_times=None)).any()
    few = Samples.from_pairs([1] * 99, [1, 2, 3] * 33, num_queries=1, num_candidates=3)
    assert not popularity_shift(dataclasses.replace(few, sequence_times=np.arange(99))).any()


def test_few_items_of_a_large_catalog_are_clicked() -> None:
    """No click comes to an item without one before, so the uniform share falls to 0."""
    few = clicks_in_turn(np.full(10, 0.1), num=400)
    counts = np.append(few.counts, np.zeros(200_000, int))
    shift = popularity_shift(dataclasses.replace(few, counts=counts))
    assert not shift[11:].any()
    np.testing.assert_allclose(shift[:11], popularity_shift(few), atol=0.01)


@pytest.mark.usefixtures("in_eager_steps", "trusted_exports", "few_signatures")
def test_it_counts_in_answers_alone(split: Split, data: TrainingSet, tmp_path: Path) -> None:
    plans = (tiny(correction=x, candidate_bias=True) for x in ("mixture", "recent"))
    plain, recent = (plan.fit_samples(data, max_epochs=2) for plan in plans)
    assert_same(*([x.numpy() for x in m.network.trainable_variables] for m in (plain, recent)))
    shift = popularity_shift(data.samples)
    assert np.ptp(shift) > 0.05
    scores, shifted = (scores_of(model.network) for model in (plain, recent))
    moved = plain.settings.temperature * shift[1:]
    np.testing.assert_allclose(shifted, scores + moved, atol=1e-5)
    # The export's answers include the shift too.
    loaded = tp.load(tp.export(recent, tmp_path / "m", index=tp.Exact()))
    query = [{"user_id": 101, "history": [30, 40]}]
    ids, expected = (model.retrieve(query, NUM_ITEMS)[0].tolist() for model in (loaded, recent))
    assert ids == expected
    # Warm starts have the shift too.
    warm = tiny(correction="recent", candidate_bias=True)
    warm_shift = warm.fit_samples(
        data, warm_start=plain, max_epochs=1
    ).network.candidate_tower.shift
    np.testing.assert_allclose(warm_shift, plain.settings.temperature * shift, rtol=1e-6)
