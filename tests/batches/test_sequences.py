"""Whole sequences: windows cover every sample once, each position with its own history."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.small_batches import LENGTH, SAMPLES, batch_list, make_batches, samples_of
from tfrs_pipeline.batches.examples import WholeSequences
from tfrs_pipeline.features.raw import NO_TIME
from tfrs_pipeline.samples.store import Samples


def samples_of_users(places: list[list[int]]) -> Samples:
    """Makes users with a positive for each given place in time; equal ones are ties."""
    candidates = np.concatenate([np.arange(1, len(times) + 1) for times in places])
    queries = np.repeat(np.arange(1, len(places) + 1), [len(times) for times in places])
    sizes = {"num_queries": len(places), "num_candidates": 99}
    return dataclasses.replace(
        Samples.from_pairs(queries, candidates, **sizes),
        num_earlier=np.concatenate([np.searchsorted(sorted(x), sorted(x)) for x in places]),
        sequence_times=np.concatenate([sorted(times) for times in places]),
    )


@given(
    places=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=13), min_size=1, max_size=5),
    length=st.integers(1, 5),
)
def test_every_sample_reads_the_end_of_its_history(places: list[list[int]], length: int) -> None:
    samples = samples_of_users(places)
    num_earlier = samples.num_earlier
    assert num_earlier is not None
    examples = WholeSequences(samples, batch_size=200, history_length=length, seed=0)
    assert examples.steps_per_epoch == 1
    batch = examples.read(examples.choose(0))
    assert sorted(batch.index.tolist()) == list(range(len(samples)))
    width = batch.sequence_rows.shape[1] + 1
    assert width <= length + 1
    num_full, states = 0, set()
    for i, (sample, state) in enumerate(zip(batch.index, batch.state.tolist(), strict=True)):
        window, num_read = divmod(state, width)
        read = batch.sequence_rows[window, :num_read].tolist()
        history = samples.history(sample).tolist()
        # The times of the items read, then the query's. Single positives have the latest first.
        times = batch.sequence_times[window, : num_read + 1]
        latest = samples.latest_times(np.array([sample]), length)[0]
        own = sorted(places[samples.query_rows[sample] - 1])
        window_times = own[len(history) - num_read : len(history) + 1]
        assert latest[: num_read + 1][::-1].tolist() == window_times
        # A batch counts seconds from the latest time of the window.
        known = batch.sequence_times[window][batch.sequence_times[window] != NO_TIME]
        assert max(known) == 0
        assert (times - times[-1]).tolist() == [time - window_times[-1] for time in window_times]
        assert read == history[len(history) - num_read :]
        # A window may cut a history, but not to nothing; a history that fits one window is whole.
        assert num_read > 0 or not history
        last = int(num_earlier[samples.query_rows == samples.query_rows[sample]].max())
        if last <= length:
            assert read == history
        num_full += read == history[-length:]
        assert batch.query_row[i] == samples.query_rows[sample]
        assert batch.candidate_row[i] == samples.candidate_rows[sample]
        states.add(window)
    assert states == set(range(len(batch.sequence_rows)))  # Every window has a sample.
    # At least the last positive of each user reads as much as a window holds.
    assert num_full >= len(places)


def test_batches_of_like_length_are_even() -> None:
    batches = make_batches("sequences")
    for batch in batch_list(batches, 10):
        # Batches are cut at the middle of a window, so none is off by more than one window.
        num = len(samples_of(batch))
        assert abs(num - len(SAMPLES) / batches.steps_per_epoch) <= LENGTH + 2


def test_positives_of_one_moment_stay_in_one_window() -> None:
    """One user has 20 positives at one moment, and 40 users have one each."""
    samples = samples_of_users([[5] * 20, *[[1]] * 40])
    examples = WholeSequences(samples, batch_size=30, history_length=LENGTH, seed=0)
    batches = [examples.read(examples.choose(step)) for step in range(2)]
    found = [batch.index.tolist() for batch in batches]
    assert sorted(itertools.chain(*found)) == list(range(60))
    for batch, of_batch in zip(batches, found, strict=True):
        assert batch.sequence_rows.shape[1] == 0  # Nobody has a history.
        assert len(set(range(20)) & set(of_batch)) in (0, 20)
    samples = samples_of_users([[5] * 60, *[[1]] * 40])
    with pytest.raises(ValueError, match=r"up to 60 positives.*Use 120.*'single'"):
        WholeSequences(samples, batch_size=12, history_length=LENGTH, seed=0)
