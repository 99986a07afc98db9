"""Batches from an endless stream of positives, against slow loops and the full sum."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.small_batches import assert_same_batches
from tfrs_pipeline.batches.stream import stream_batches
from tfrs_pipeline.model.streaming import StreamingFrequency
from tfrs_pipeline.negatives.in_batch import InBatch
from tfrs_pipeline.negatives.popularity import Popularity
from tfrs_pipeline.negatives.protocol import Negatives
from tfrs_pipeline.negatives.uniform import Uniform

NUM_CANDIDATES, BATCH_SIZE, NUM_UNIFORM, HISTORY_LENGTH = 30, 16, 10, 4
MIXTURE = (InBatch(), Uniform(NUM_UNIFORM))
Example = dict[str, Any]
SIGNATURE = {
    **{name: tf.TensorSpec([], tf.int32) for name in ("query_row", "candidate_row")},
    **{name: tf.TensorSpec([None], tf.int32) for name in ("history_rows", "excluded_rows")},
    "weight": tf.TensorSpec([], tf.float32),
}


def positives() -> Iterator[Example]:
    """Yields positives without end; few queries, so that they meet in a batch, some unknown."""
    rng = np.random.default_rng(0)
    number = 0
    while True:
        number += 1
        yield {
            "query_row": rng.integers(0, 12),
            "candidate_row": 1 + min(NUM_CANDIDATES - 1, rng.geometric(0.1)),
            "history_rows": rng.integers(0, NUM_CANDIDATES + 1, rng.integers(0, 8)),
            "weight": np.float32(number),
            "excluded_rows": rng.integers(1, NUM_CANDIDATES + 1, rng.integers(0, 4)),
        }


def examples_of(
    source: Callable[[], Iterator[Example]] = positives, *names: str
) -> tf.data.Dataset:
    signature = {name: SIGNATURE[name] for name in names or SIGNATURE}

    def selected() -> Iterator[Example]:
        for example in source():
            yield {name: example[name] for name in signature}

    return tf.data.Dataset.from_generator(selected, output_signature=signature)


def batches_of(
    examples: tf.data.Dataset, negatives: Sequence[Negatives] = MIXTURE, **options: Any
) -> tf.data.Dataset:
    arguments = {
        "num_candidates": NUM_CANDIDATES,
        "batch_size": BATCH_SIZE,
        "history_length": HISTORY_LENGTH,
        "seed": 3,
    }
    return stream_batches(examples, negatives, **{**arguments, **options})


def taken(dataset: tf.data.Dataset, num: int) -> list[dict[str, np.ndarray]]:
    return list(dataset.take(num).as_numpy_iterator())


@pytest.mark.parametrize(("in_batch", "excluded"), [(True, True), (True, False), (False, True)])
def test_rows_are_the_examples_in_order_and_masks_match_a_loop(
    in_batch: bool, excluded: bool
) -> None:
    names = [name for name in SIGNATURE if excluded or name != "excluded_rows"]
    source = positives()
    reasons = {"history beyond N": 0, "same query": 0, "excluded": 0}
    negatives = MIXTURE if in_batch else MIXTURE[1:]
    batches = batches_of(examples_of(positives, *names), negatives)
    for batch in taken(batches, 8):
        rows = [next(source) for _ in range(BATCH_SIZE)]
        columns = batch["shared_row"].tolist()
        if in_batch:
            np.testing.assert_array_equal(columns[:BATCH_SIZE], batch["candidate_row"])
        assert len(columns) == BATCH_SIZE * in_batch + NUM_UNIFORM
        assert batch["in_batch_draws"] == (BATCH_SIZE - 1) * in_batch
        uniform = NUM_UNIFORM / NUM_CANDIDATES
        np.testing.assert_allclose(batch["other_expected_count"], [[uniform] * len(columns)])
        for i, row in enumerate(rows):
            for name in ("query_row", "candidate_row", "weight"):
                assert batch[name][i] == row[name]
            latest = row["history_rows"][:HISTORY_LENGTH].tolist()
            padding = [0] * (HISTORY_LENGTH - len(latest))
            assert batch["history_rows"][i].tolist() == latest + padding
            same_query = {
                other["candidate_row"]
                for other in rows
                if other["query_row"] == row["query_row"] > 0
            }
            never = {row["candidate_row"]} | same_query | set(row["history_rows"])
            never |= set(row["excluded_rows"]) if excluded else set()
            assert batch["is_counted"][i].tolist() == [column not in never for column in columns]
            others = set(columns) - {row["candidate_row"]}
            reasons["history beyond N"] += bool(others & set(row["history_rows"][HISTORY_LENGTH:]))
            reasons["same query"] += bool(others & same_query)
            reasons["excluded"] += bool(others & set(row["excluded_rows"]))
    assert min(reasons.values()) > 0


def test_a_batch_is_a_function_of_seed_and_step_and_a_stream_goes_on() -> None:
    batches = batches_of(examples_of())
    unbroken = taken(batches, 8)
    assert_same_batches(taken(batches, 8), unbroken)
    rest = examples_of().skip(5 * BATCH_SIZE)
    assert_same_batches(taken(batches_of(rest, start_step=5), 3), unbroken[5:])
    other = taken(batches_of(examples_of(), seed=4), 1)[0]
    assert (other["candidate_row"] == unbroken[0]["candidate_row"]).all()
    for name in ("shared_row", "dropout_seed"):
        assert (other[name] != unbroken[0][name]).any()
        assert len({batch[name].tobytes() for batch in unbroken}) == 8


def test_dense_examples_fill_full_batches_of_known_shape() -> None:
    example = {"query_row": 1, "candidate_row": 2, "history_rows": [5, 3]}
    batches = batches_of(tf.data.Dataset.from_tensors(example).repeat(3 * BATCH_SIZE + 5))
    found = taken(batches, 9)
    assert len(found) == 3
    # A weight that is not given is 1.
    np.testing.assert_array_equal(found[0]["weight"], [1] * BATCH_SIZE)
    np.testing.assert_array_equal(found[0]["history_rows"], [[5, 3, 0, 0]] * BATCH_SIZE)
    for name, shape in {
        "query_row": [BATCH_SIZE],
        "history_rows": [BATCH_SIZE, HISTORY_LENGTH],
        "shared_row": [BATCH_SIZE + NUM_UNIFORM],
        "other_expected_count": [1, BATCH_SIZE + NUM_UNIFORM],
        "is_counted": [BATCH_SIZE, BATCH_SIZE + NUM_UNIFORM],
    }.items():
        assert batches.element_spec[name].shape.as_list() == shape


def test_the_corrected_sum_is_that_over_the_corpus() -> None:
    """Weighs every column by 1 / n(c), with the estimated share of the positives."""
    rng = np.random.default_rng(1)
    popularity = 1 / np.arange(1, NUM_CANDIDATES + 1)
    popularity /= popularity.sum()
    num_steps, warm_up = 1700, 600
    candidates = 1 + rng.choice(NUM_CANDIDATES, num_steps * BATCH_SIZE, p=popularity)
    rows = {
        "query_row": np.zeros(len(candidates), np.int32),
        "candidate_row": candidates.astype(np.int32),
        "history_rows": np.zeros([len(candidates), 0], np.int32),
    }
    examples = tf.data.Dataset.from_tensor_slices(rows)
    frequency = StreamingFrequency(5000, learning_rate=0.005)
    value = tf.constant(np.exp(rng.normal(size=NUM_CANDIDATES + 1)), tf.float32)

    @tf.function
    def estimated_over_exact(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        columns = batch["shared_row"]
        frequency.update(batch["candidate_row"])
        count = batch["in_batch_draws"] * frequency(columns) + batch["other_expected_count"]
        weights = tf.gather(value, columns) / count
        sums = tf.reduce_sum(tf.where(batch["is_counted"], weights, 0.0), axis=1)
        exact = tf.reduce_sum(value[1:]) - tf.gather(value, batch["candidate_row"])
        return tf.reduce_mean(sums / exact)

    batches = batches_of(examples)
    ratios = np.array([estimated_over_exact(batch) for batch in batches])[warm_up:]
    chance = ratios.std() / np.sqrt(len(ratios))
    assert chance < 0.012
    # Estimates bring a bias of a/2 and of their variance, at most a/2 each.
    assert ratios.mean() == pytest.approx(1, abs=4 * chance + 0.005)


def test_refuses_other_examples() -> None:
    for changes, message in (
        ({"history_rows": None}, r"must hold \['history_rows'\]"),
        ({"candidate_row": np.int64(3)}, "'candidate_row' of a single.* must be int32.*int64"),
        ({"query_row": np.array([1, 2], np.int32)}, r"'query_row'.*rank 0.*\(2,\)"),
        ({"excluded_rows": np.int32(1)}, "'excluded_rows'.*rank 1"),
        ({"weight": np.float64(1)}, "'weight'.*float32.*float64"),
    ):
        example: Example = {"query_row": 1, "candidate_row": 2, "history_rows": [3]} | changes
        example = {name: value for name, value in example.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            batches_of(tf.data.Dataset.from_tensors(example))


def test_refuses_what_has_no_counts() -> None:
    examples = examples_of()
    with pytest.raises(ValueError, match="must be a dict"):
        batches_of(tf.data.Dataset.from_tensors((1, 2)))
    with pytest.raises(ValueError, match=r"none can be drawn.*uniform"):
        batches_of(examples, [Popularity(3)])
    with pytest.raises(ValueError, match="No shared column can be a negative"):
        batches_of(examples, [InBatch()], batch_size=1)


def test_refuses_rows_outside_the_corpus() -> None:
    wrong: dict[str, list[Any]] = {
        "candidate_row": [0, NUM_CANDIDATES + 1],
        "history_rows": [[1, 31], [-1, 1]],
    }
    good: Example = {"query_row": 1, "candidate_row": 2, "history_rows": [5, 3]}
    rows = [
        good | {name: value} for name, values in wrong.items() for value in (good[name], *values)
    ]
    columns = {name: [row[name] for row in rows] for name in good}
    batches = iter(batches_of(tf.data.Dataset.from_tensor_slices(columns), batch_size=1))
    for name, values in wrong.items():
        next(batches)
        for _ in values:
            message = f"{name} must lie in [01] .. 30"
            with pytest.raises(tf.errors.InvalidArgumentError, match=message):
                next(batches)
