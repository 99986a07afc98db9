"""Samples of a few users, and their batches, small enough for slow loops to check every cell."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

import tfrs_pipeline as tp
from tfrs_pipeline.samples.store import RowLists

NUM_QUERIES, NUM_CANDIDATES, NUM_SAMPLES = 20, 40, 150
# BATCH_SIZE divides NUM_SAMPLES, so that an epoch has only whole batches.
BATCH_SIZE, LENGTH = 30, 4
STAGES = ("retrieved", "pre_ranked")
MIXTURE: tuple[tp.Negatives, ...] = (tp.InBatch(), tp.Uniform(12), tp.Popularity(10))


def make_samples(
    seed: int = 0, num_samples: int = NUM_SAMPLES, num_queries: int = NUM_QUERIES,
    num_candidates: int = NUM_CANDIDATES,
) -> tp.Samples:  # fmt: skip
    """Draws samples by popularity, with ties in time, exposed items and distinct weights."""
    rng = np.random.default_rng(seed)
    popularity = 1 / np.arange(1, num_candidates + 1)
    queries = rng.integers(1, num_queries + 1, num_samples)
    candidates = 1 + rng.choice(num_candidates, num_samples, p=popularity / popularity.sum())
    sizes = {"num_queries": num_queries, "num_candidates": num_candidates}
    samples = tp.Samples.from_pairs(queries, candidates, **sizes)
    shown = [rng.integers(1, num_candidates + 1, rng.integers(0, 6)) for _ in range(num_queries)]
    exposed = [np.setdiff1d(x, samples.known_positives[i]) for i, x in enumerate(shown, 1)]
    assert samples.num_earlier is not None
    # A tie in time: fewer earlier items are known than samples precede this one.
    num_earlier = samples.num_earlier - (rng.random(num_samples) < 0.3)
    return dataclasses.replace(
        samples,
        weights=rng.permutation(np.linspace(0.1, 1, num_samples, dtype=np.float32)),
        exposed=RowLists.from_lists([np.zeros(0, int), *exposed]),
        num_earlier=num_earlier.clip(0).astype(np.int32),
    )


def with_pools(samples: tp.Samples, seed: int = 0) -> tp.Samples:
    """Gives each sample pools without its known positives and exposed items; some are empty."""
    rng = np.random.default_rng(seed)
    pools: dict[str, list[np.ndarray]] = {stage: [] for stage in STAGES}
    for row in samples.query_rows.tolist():
        allowed = np.setdiff1d(np.arange(1, len(samples.counts)), forbidden(samples, row))
        for pool in pools.values():
            pool.append(rng.permutation(allowed)[: rng.choice([0, 3, 9])])
    lists = {stage: RowLists.from_lists(pool) for stage, pool in pools.items()}
    return dataclasses.replace(samples, hard_pools=lists)


def forbidden(samples: tp.Samples, query: int) -> list[int]:
    return [*samples.known_positives[query].tolist(), *samples.exposed[query].tolist()]


SAMPLES = with_pools(make_samples())
UNORDERED = dataclasses.replace(SAMPLES, num_earlier=None)
# Two request features: the number of the sample, and a vector.
PLACES: dict[str, Any] = {"place": np.arange(NUM_SAMPLES, dtype=np.int32)}
PLACES["vector"] = np.arange(2 * NUM_SAMPLES, dtype=np.float32).reshape(-1, 2)
# Times are distinct, so that a time identifies the place in the sequences.
TIMES = np.arange(NUM_SAMPLES) + 1000
REQUESTED = dataclasses.replace(SAMPLES, request_columns=PLACES, sequence_times=TIMES)
# Weights are distinct, so that a weight identifies its sample.
SAMPLE_OF = {weight: i for i, weight in enumerate(SAMPLES.weights.tolist())}
ORDERS = {"single": tp.SinglePositives, "sequences": tp.WholeSequences, "sets": tp.UserSets}


def make_batches(
    order: str = "single", samples: tp.Samples = SAMPLES,
    negatives: Sequence[tp.Negatives] | None = None, *, batch_size: int = BATCH_SIZE,
    history_length: int = LENGTH, seed: int = 3, examples: dict[str, Any] | None = None,
    **options: Any,
) -> tp.HybridBatches:  # fmt: skip
    """Makes batches in an order of ORDERS; only single positives allow in-batch negatives."""
    if negatives is None:
        negatives = MIXTURE if order == "single" else MIXTURE[1:]
    sizes = {"batch_size": batch_size, "history_length": history_length}
    ordered = ORDERS[order](samples, **{**sizes, "seed": seed, **(examples or {})})
    return tp.HybridBatches(samples, ordered, negatives, seed=seed, **options)


def batch_list(batches: tp.HybridBatches, num_steps: int, start: int = 0) -> list[tp.Batch]:
    """Builds batches; up to 20 are built one by one, as a data set takes a second to trace."""
    if num_steps > 20:
        return list(batches.dataset(start, num_steps).as_numpy_iterator())
    steps = range(start, start + num_steps)
    return [as_arrays(batches.batch(step)) for step in steps]


def as_arrays(batch: tp.Batch) -> tp.Batch:
    return tf.nest.map_structure(lambda x: None if x is None else x.numpy(), batch)


def flat(batch: Any) -> dict[str, np.ndarray]:
    """Returns the arrays of a batch by name, such as "candidate_row" or "hard.log_q"."""
    fields = batch if isinstance(batch, dict) else batch._asdict()
    found: dict[str, np.ndarray] = {}
    for name, value in fields.items():
        if isinstance(value, dict | tuple):
            found |= {f"{name}.{inner}": x for inner, x in flat(value).items()}
        elif value is not None:
            found[name] = value
    return found


def samples_of(batch: tp.Batch) -> list[int]:
    return [SAMPLE_OF[weight] for weight in batch.weight.tolist()]


def assert_same_batches(first: Sequence[tp.Batch], second: Sequence[tp.Batch]) -> None:
    for got, expected in zip(map(flat, first), map(flat, second), strict=True):
        assert got.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name])


def assert_same_samples(got: tp.Samples, expected: tp.Samples) -> None:
    for field in dataclasses.fields(tp.Samples):
        a, b = getattr(got, field.name), getattr(expected, field.name)
        if isinstance(a, RowLists):
            np.testing.assert_array_equal(a.offsets, b.offsets)
            a, b = a.values, b.values
        if isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
