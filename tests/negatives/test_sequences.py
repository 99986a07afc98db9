"""Batches of whole sequences: every sample once, each with its own history, mask and negatives."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.negatives.test_batches import NUM_CANDIDATES, NUM_SAMPLES, SAMPLES
from tests.negatives.test_hybrid_batches import HARD, HYBRID, SAMPLE_OF
from tfrs_pipeline.negatives.batches import shared_columns
from tfrs_pipeline.negatives.sequences import SequenceBatches, _Windows
from tfrs_pipeline.samples.build import RowLists, Samples

LENGTH = 4


def make_batches(samples: Samples = SAMPLES, **options: Any) -> SequenceBatches:
    arguments: dict[str, Any] = {
        "batch_size": 32,
        "easy_negatives": ((0.0, 12), (1.0, 10)),
        "history_length": LENGTH,
        "seed": 3,
    }
    return SequenceBatches(samples, **{**arguments, **options})


def batch_list(batches: SequenceBatches, num_steps: int, start: int = 0) -> list[dict[str, Any]]:
    return list(batches.dataset(start, num_steps).as_numpy_iterator())


def samples_of(batch: dict[str, Any]) -> list[int]:
    return [SAMPLE_OF[float(weight)] for weight in batch["weight"]]


def test_every_sample_comes_once_an_epoch_in_another_order_each() -> None:
    batches = make_batches()
    steps = batches.steps_per_epoch
    assert steps == round(NUM_SAMPLES / 32)
    epochs = []
    for epoch in range(2):
        found = [samples_of(batch) for batch in batch_list(batches, steps, epoch * steps)]
        assert sorted(itertools.chain(*found)) == list(range(NUM_SAMPLES))
        # Cut at the middle of a window: no batch is off by more than one of them.
        assert all(abs(len(of_batch) - NUM_SAMPLES / steps) <= LENGTH + 2 for of_batch in found)
        epochs.append(found)
    assert epochs[0] != epochs[1]


def test_each_position_has_read_its_own_history_and_no_more() -> None:
    num_truncated = 0
    for batch in batch_list(make_batches(), 10):
        width = batch["sequence_rows"].shape[1] + 1
        for sample, state, query, positive in zip(
            samples_of(batch),
            batch["state"],
            batch["query_row"],
            batch["candidate_row"],
            strict=True,
        ):
            window, num_read = divmod(int(state), width)
            read = batch["sequence_rows"][window, :num_read].tolist()
            history = SAMPLES.history(sample).tolist()
            assert read == history[len(history) - num_read :]
            # Nothing of it is lost but what the window leaves out, which begins with one item.
            assert num_read == len(history) or num_read >= 1
            num_truncated += num_read < min(len(history), LENGTH)
            assert query == SAMPLES.query_rows[sample]
            assert positive == SAMPLES.candidate_rows[sample]
    assert num_truncated > 0


def test_batches_are_a_function_of_seed_and_step() -> None:
    batches = make_batches()
    whole = batch_list(batches, 12)
    rest = batch_list(make_batches(), 5, start=7)
    for step, (expected, got) in enumerate(zip(whole[7:], rest, strict=True), 7):
        alone = batches.batch(step)
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name])
            np.testing.assert_array_equal(alone[name], expected[name])
    other = batch_list(make_batches(seed=4), 12)
    assert any(
        a["weight"].tolist() != b["weight"].tolist() for a, b in zip(whole, other, strict=True)
    )


def test_masks_and_log_q_are_those_of_the_samples() -> None:
    q = SAMPLES.counts / SAMPLES.counts.sum()
    n = 12 / NUM_CANDIDATES + 10 * q
    num_masked = 0
    for batch in batch_list(make_batches(), 6):
        columns = shared_columns(batch).numpy()
        assert len(columns) == 22
        np.testing.assert_allclose(batch["log_q"][0], np.log(n[columns]), rtol=1e-5)
        np.testing.assert_allclose(
            batch["positive_log_q"], np.log(n[batch["candidate_row"]]), rtol=1e-5
        )
        for i, query in enumerate(batch["query_row"]):
            left_out = {*SAMPLES.known_positives[query], *SAMPLES.exposed[query]}
            expected = [column not in left_out for column in columns]
            assert batch["is_counted"][i].tolist() == expected
            num_masked += expected.count(False)
    assert num_masked > 0


def test_hard_negatives_belong_to_the_position() -> None:
    batches = make_batches(HYBRID, hard_share=0.4, hard_negatives=HARD)
    num_drawn = 0
    for batch in batch_list(batches, 8):
        for i, sample in enumerate(samples_of(batch)):
            for stage, columns in (("retrieved", slice(0, 5)), ("pre_ranked", slice(5, 9))):
                drawn = batch["hard_candidate_row"][i, columns]
                counted = drawn[batch["hard_is_counted"][i, columns]]
                assert set(counted.tolist()) <= set(HYBRID.hard_pools[stage][sample].tolist())
                num_drawn += len(counted)
        expected = np.log1p(-batch["hard_share"])[:, None]
        easy_alone = batch["log_q"] + expected
        q = SAMPLES.counts / SAMPLES.counts.sum()
        own = 12 / NUM_CANDIDATES + 10 * q[batch["candidate_row"]]
        np.testing.assert_allclose(
            batch["positive_log_q"], np.log(own) - expected[:, 0], rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(easy_alone - easy_alone[:1], 0, atol=1e-5)
    assert num_drawn > 0


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=5),
    length=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_windows_cover_every_sample_once_within_their_length(
    lengths: list[int], length: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    query_rows = np.repeat(np.arange(1, len(lengths) + 1), lengths).astype(np.int32)
    place = np.concatenate([np.arange(n) for n in lengths])
    # Ties: a sample knows no more than the one after it.
    num_earlier = np.minimum.accumulate((place - rng.integers(0, 3, len(place)))[::-1])[::-1]
    starts_anew = np.where(place == 0, 0, num_earlier).clip(0)
    sequences = [np.zeros(0, int), *(np.arange(1, n + 1) for n in lengths)]
    samples = Samples(
        query_rows=query_rows,
        candidate_rows=(place + 1).astype(np.int32),
        weights=np.ones(len(place), np.float32),
        sequences=RowLists.from_lists(sequences),
        num_earlier=np.minimum(starts_anew, place).astype(np.int32),
        known_positives=RowLists.from_lists(sequences),
        exposed=RowLists.from_lists([np.zeros(0, int)] * len(sequences)),
        counts=np.bincount(place + 1, minlength=15),
    )
    windows = _Windows.cut(samples, length)
    assert samples.num_earlier is not None
    assert sorted(windows.samples.values.tolist()) == list(range(len(samples)))
    for i, (query, start, num_items) in enumerate(
        zip(windows.query_rows, windows.starts, windows.lengths, strict=True)
    ):
        assert 0 <= num_items <= length
        assert start + num_items <= len(sequences[query])
        for sample in windows.samples[i]:
            assert samples.query_rows[sample] == query
            num_read = samples.num_earlier[sample] - start
            assert 0 <= num_read <= num_items
            assert num_read > 0 or samples.num_earlier[sample] == 0


def test_refusals() -> None:
    unordered = Samples(**{**vars(SAMPLES), "num_earlier": None})
    with pytest.raises(ValueError, match="need an order"):
        make_batches(unordered)
    with pytest.raises(ValueError, match=r"too small.*a shorter history"):
        make_batches(batch_size=4)


def tied(num: int) -> Samples:
    """One moment of a user with that many positives, and 40 users with one each."""
    rows = np.arange(num) % NUM_CANDIDATES + 1
    sequences = [np.zeros(0, int), rows, *([np.array([5])] * 40)]
    query_rows = np.concatenate([np.ones(num, int), np.arange(2, 42)])
    return Samples(
        query_rows=query_rows.astype(np.int32),
        candidate_rows=np.concatenate([rows, np.full(40, 5)]).astype(np.int32),
        weights=np.linspace(1, 2, num + 40).astype(np.float32),
        sequences=RowLists.from_lists(sequences),
        num_earlier=np.zeros(num + 40, np.int32),
        known_positives=RowLists.from_lists([np.unique(x) for x in sequences]),
        exposed=RowLists.from_lists([np.zeros(0, int)] * 42),
        counts=np.bincount(np.concatenate([rows, np.full(40, 5)]), minlength=NUM_CANDIDATES + 1),
    )


def test_positives_of_one_moment_stay_in_one_window() -> None:
    samples = tied(20)
    batches = make_batches(samples, batch_size=30)
    found = [batch["weight"].tolist() for batch in batch_list(batches, batches.steps_per_epoch)]
    assert sorted(itertools.chain(*found)) == pytest.approx(samples.weights.tolist())
    for batch in batch_list(batches, 4):  # Nobody has a history: windows of no item.
        assert batch["sequence_rows"].shape[1] == 0
        # A state a window, and the positives of a window share it.
        assert set(batch["state"].tolist()) == set(range(len(batch["sequence_rows"])))
    with pytest.raises(ValueError, match=r"up to 60 positives.*'one'"):
        make_batches(tied(60), batch_size=12)
