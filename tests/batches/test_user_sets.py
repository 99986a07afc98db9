"""User sets: inputs and targets are disjoint, and together they are all positives of a user."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests import small_batches
from tests.small_batches import NUM_SAMPLES, SAMPLES, UNORDERED, batch_list, samples_of
from tfrs_pipeline import HybridBatches, Samples, Uniform
from tfrs_pipeline.batches.batch import Batch

QUERIES = np.unique(SAMPLES.query_rows)
EVERYTHING = NUM_SAMPLES  # A history that holds all.


def batches_of_sets(samples: Samples = UNORDERED, **options: Any) -> HybridBatches:
    return small_batches.make_batches("sets", samples, **{"batch_size": 16, **options})


def parts(batch: Batch) -> Iterator[tuple[int, list[int], list[int]]]:
    """Yields each query with its input candidates and its target samples."""
    targets: list[list[int]] = [[] for _ in batch.query_row]
    for place, sample in enumerate(samples_of(batch)):
        assert batch.candidate_row[place] == SAMPLES.candidate_rows[sample]
        targets[batch.positive_query[place]].append(sample)
    for row, query in enumerate(batch.query_row.tolist()):
        rows = batch.history_rows[row]
        inputs = rows[rows > 0].tolist()
        assert rows[: len(inputs)].tolist() == inputs  # Padding comes last.
        yield query, inputs, targets[row]


def test_a_positive_is_input_or_target_by_a_coin_of_its_own() -> None:
    batches, num_epochs = batches_of_sets(history_length=EVERYTHING), 60
    steps = batches.steps_per_epoch
    assert steps == round(NUM_SAMPLES / 2 / 16)
    # Per epoch and query: how many of its distinct candidates were targets.
    num_targets = np.zeros((num_epochs, len(QUERIES)))
    num_target_samples, visits = 0, []
    for step, batch in enumerate(batch_list(batches, num_epochs * steps)):
        for query, inputs, targets in parts(batch):
            assert targets
            assert {SAMPLES.query_rows[sample] for sample in targets} == {query}
            candidates = SAMPLES.candidate_rows[targets].tolist()
            # Nothing is lost, copies included, and no copy is on both sides.
            assert sorted(inputs + candidates) == sorted(SAMPLES.sequences[query].tolist())
            assert not set(inputs) & set(candidates)
            num_targets[step // steps, np.searchsorted(QUERIES, query)] = len(set(candidates))
            num_target_samples += len(targets)
            visits.append((step // steps, query))
    assert len(set(visits)) == len(visits)  # At most once an epoch.
    orders = [[query for at, query in visits if at == epoch] for epoch in range(2)]
    assert orders[0] != orders[1]

    p = 0.5
    num_coins = np.array([len(SAMPLES.known_positives[query]) for query in QUERIES])
    n = num_epochs * num_coins.sum()
    assert num_targets.sum() / n == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / n))
    # Independent coins: the count of a query has the variance of a binomial.
    z = (num_targets - p * num_coins) ** 2 / (p * (1 - p) * num_coins)
    # Var z^2 = 2 + (1 / (p (1 - p)) - 6) / num_coins.
    sd = np.sqrt(np.mean(2 + (1 / (p * (1 - p)) - 6) / num_coins) / z.size)
    assert z.mean() == pytest.approx(1, abs=4 * sd)
    # All copies of a candidate share one coin.
    pairs = SAMPLES.query_rows * 1000 + SAMPLES.candidate_rows
    copies = np.unique(pairs, return_counts=True)[1]
    sd = np.sqrt(num_epochs * p * (1 - p) * np.sum(copies**2))
    expected = num_epochs * NUM_SAMPLES * p
    assert num_target_samples == pytest.approx(expected, abs=4 * sd)


def test_a_long_history_is_read_in_part_any_of_it_by_users_spread_evenly() -> None:
    batches = batches_of_sets(history_length=2)
    steps = batches.steps_per_epoch
    input_of: dict[int, set[int]] = {query: set() for query in QUERIES.tolist()}
    num_full, sizes = 0, []
    for batch in batch_list(batches, 60 * steps):
        assert batch.history_rows.shape[1] <= 2
        sizes.append(len(batch.query_row))
        for query, inputs, targets in parts(batch):
            candidates = set(SAMPLES.candidate_rows[targets].tolist())
            assert set(inputs) <= set(SAMPLES.known_positives[query].tolist()) - candidates
            num_left = len(SAMPLES.sequences[query]) - len(targets)
            assert len(inputs) == min(2, num_left)
            num_full += num_left > 2
            input_of[query].update(inputs)
    assert num_full > 0
    for query, rows in input_of.items():
        assert sorted(rows) == SAMPLES.known_positives[query].tolist()
    by_epoch = np.reshape(sizes, (60, steps))
    assert np.ptp(by_epoch, axis=1).max() <= 1


@pytest.mark.parametrize(("num_users", "batch_size"), [(2, 2), (40, 2), (40, 20)])
def test_users_of_one_positive_have_a_target_and_no_input(num_users: int, batch_size: int) -> None:
    """A user whose positive becomes input is excluded, but no batch is left without a user."""
    rows = np.arange(1, num_users + 1)
    samples = Samples.from_pairs(rows, rows, num_queries=num_users, num_candidates=num_users)
    batches = batches_of_sets(samples, negatives=[Uniform(3)], batch_size=batch_size)
    steps, num_epochs = batches.steps_per_epoch, 30
    visited = np.zeros((num_epochs, num_users))
    for step, batch in enumerate(batch_list(batches, num_epochs * steps)):
        assert len(batch.query_row) >= 1
        assert batch.history_rows.shape == (len(batch.query_row), 0)
        np.testing.assert_array_equal(batch.positive_query, np.arange(len(batch.query_row)))
        np.testing.assert_array_equal(batch.candidate_row, batch.query_row)
        visited[step // steps, batch.query_row - 1] += 1
    assert set(np.unique(visited)) == {0, 1}
    if num_users == 40:
        assert visited.mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(visited.size))
