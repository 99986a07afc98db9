"""Batches from an endless stream of positives, against slow loops and the full sum."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

from tfrs_pipeline.negatives.stream import stream_batches
from tfrs_pipeline.samples.streaming import StreamingFrequency

NUM_CANDIDATES, BATCH_SIZE, NUM_UNIFORM, HISTORY_LENGTH = 30, 16, 10, 4
Example = dict[str, Any]
LISTS = tf.TensorSpec([None], tf.int32)
SIGNATURE = {
    "query_row": tf.TensorSpec([], tf.int32),
    "candidate_row": tf.TensorSpec([], tf.int32),
    "history_rows": LISTS,
    "weight": tf.TensorSpec([], tf.float32),
    "excluded_rows": LISTS,
}


def positives(num: int | None = None) -> Iterator[Example]:
    """Yields positives without end; few queries, so that they meet in a batch, some unknown."""
    rng = np.random.default_rng(0)
    number = 0
    while num is None or number < num:
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


def batches_of(examples: tf.data.Dataset, **options: Any) -> tf.data.Dataset:
    arguments = {
        "num_candidates": NUM_CANDIDATES,
        "batch_size": BATCH_SIZE,
        "num_uniform": NUM_UNIFORM,
        "history_length": HISTORY_LENGTH,
        "seed": 3,
    }
    return stream_batches(examples, **{**arguments, **options})


def taken(dataset: tf.data.Dataset, num: int) -> list[dict[str, np.ndarray]]:
    return list(dataset.take(num).as_numpy_iterator())


def assert_same_batches(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    for got, expected in zip(first, second, strict=True):
        assert got.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name])


def test_rows_are_the_examples_in_their_order() -> None:
    source = positives()
    for batch in taken(batches_of(examples_of()), 5):
        for i in range(BATCH_SIZE):
            example = next(source)
            for name in ("query_row", "candidate_row", "weight"):
                assert batch[name][i] == example[name]
            latest = example["history_rows"][:HISTORY_LENGTH].tolist()
            padding = [0] * (HISTORY_LENGTH - len(latest))
            assert batch["history_rows"][i].tolist() == latest + padding


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("excluded", [True, False])
def test_mask_matches_a_loop(in_batch: bool, excluded: bool) -> None:
    names = [name for name in SIGNATURE if excluded or name != "excluded_rows"]
    source = positives()
    reasons = {"history beyond N": 0, "same query": 0, "excluded": 0}
    for batch in taken(batches_of(examples_of(positives, *names), in_batch=in_batch), 8):
        rows = [next(source) for _ in range(BATCH_SIZE)]
        columns = np.concatenate([batch["candidate_row"], batch["easy_candidate_row"]])
        for i, row in enumerate(rows):
            same_query = {
                other["candidate_row"]
                for other in rows
                if other["query_row"] == row["query_row"] > 0
            }
            left_out = {row["candidate_row"]} | same_query | set(row["history_rows"])
            left_out |= set(row["excluded_rows"]) if excluded else set()
            expected = [
                j == i or (column not in left_out and (in_batch or j >= BATCH_SIZE))
                for j, column in enumerate(columns)
            ]
            assert batch["is_counted"][i].tolist() == expected
            others = set(columns) - {row["candidate_row"]}
            reasons["history beyond N"] += bool(others & set(row["history_rows"][HISTORY_LENGTH:]))
            reasons["same query"] += bool(others & same_query)
            reasons["excluded"] += bool(others & set(row["excluded_rows"]))
    assert min(reasons.values()) > 0


@pytest.mark.parametrize(("in_batch", "draws"), [(True, BATCH_SIZE - 1), (False, 0)])
def test_expected_counts_in_parts(in_batch: bool, draws: int) -> None:
    batch = taken(batches_of(examples_of(), in_batch=in_batch), 1)[0]
    assert batch["positive_draws"] == draws
    assert batch["positive_draws"].dtype == np.float32
    assert batch["other_expected_count"].shape == (1, BATCH_SIZE + NUM_UNIFORM)
    np.testing.assert_allclose(batch["other_expected_count"], NUM_UNIFORM / NUM_CANDIDATES)


def test_easy_negatives_are_uniform_and_no_step_repeats_another() -> None:
    same = tf.data.Dataset.from_tensors(
        {"query_row": 1, "candidate_row": 2, "history_rows": [5, 3]}
    ).repeat()
    batches = taken(batches_of(same, batch_size=2, num_uniform=200), 60)
    drawn = np.array([batch["easy_candidate_row"] for batch in batches])
    observed = np.bincount(drawn.ravel(), minlength=NUM_CANDIDATES + 1)
    assert observed[0] == 0
    assert scipy.stats.chisquare(observed[1:]).pvalue > 1e-4
    assert len({line.tobytes() for line in drawn}) == 60
    assert len({batch["dropout_seed"].tobytes() for batch in batches}) == 60
    # A weight that is not given is 1; lists of one length may come dense.
    np.testing.assert_array_equal(batches[0]["weight"], [1, 1])
    np.testing.assert_array_equal(batches[0]["history_rows"], [[5, 3, 0, 0]] * 2)


def test_a_batch_is_a_function_of_seed_and_step_and_a_stream_goes_on() -> None:
    unbroken = taken(batches_of(examples_of()), 8)
    assert_same_batches(taken(batches_of(examples_of()), 8), unbroken)
    rest = examples_of().skip(5 * BATCH_SIZE)
    assert_same_batches(taken(batches_of(rest, start_step=5), 3), unbroken[5:])
    other = taken(batches_of(examples_of(), seed=4), 1)[0]
    assert (other["candidate_row"] == unbroken[0]["candidate_row"]).all()
    assert (other["easy_candidate_row"] != unbroken[0]["easy_candidate_row"]).any()
    assert (other["dropout_seed"] != unbroken[0]["dropout_seed"]).any()


def test_only_full_batches_of_known_shape() -> None:
    batches = batches_of(examples_of(lambda: positives(3 * BATCH_SIZE + 5)))
    assert len(taken(batches, 9)) == 3
    shapes = {name: spec.shape.as_list() for name, spec in batches.element_spec.items()}
    num_columns = BATCH_SIZE + NUM_UNIFORM
    assert shapes == {
        "query_row": [BATCH_SIZE],
        "history_rows": [BATCH_SIZE, HISTORY_LENGTH],
        "candidate_row": [BATCH_SIZE],
        "weight": [BATCH_SIZE],
        "easy_candidate_row": [NUM_UNIFORM],
        "positive_draws": [],
        "other_expected_count": [1, num_columns],
        "dropout_seed": [2],
        "is_counted": [BATCH_SIZE, num_columns],
    }


def test_no_easy_negative() -> None:
    batch = taken(batches_of(examples_of(), num_uniform=0), 1)[0]
    assert batch["easy_candidate_row"].shape == (0,)
    assert batch["is_counted"].shape == (BATCH_SIZE, BATCH_SIZE)
    assert not batch["other_expected_count"].any()


@pytest.mark.parametrize(("in_batch", "num_uniform"), [(True, 10), (False, 10)])
def test_the_corrected_sum_is_that_over_the_corpus(in_batch: bool, num_uniform: int) -> None:
    """Weighs every column by 1 / n(c), with the estimated share of the positives."""
    rng = np.random.default_rng(1)
    popularity = 1 / np.arange(1, NUM_CANDIDATES + 1)
    popularity /= popularity.sum()
    num_steps, warm_up = 2000, 600
    candidates = 1 + rng.choice(NUM_CANDIDATES, num_steps * BATCH_SIZE, p=popularity)
    rows = {
        "query_row": np.zeros(len(candidates), np.int32),
        "candidate_row": candidates.astype(np.int32),
        "history_rows": np.zeros([len(candidates), 0], np.int32),
    }
    examples = tf.data.Dataset.from_tensor_slices(rows)
    frequency = StreamingFrequency(num_buckets=5000, learning_rate=0.005)
    value = tf.constant(np.exp(rng.normal(size=NUM_CANDIDATES + 1)), tf.float32)

    @tf.function
    def estimated_over_exact(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        columns = tf.concat([batch["candidate_row"], batch["easy_candidate_row"]], axis=0)
        frequency.update(batch["candidate_row"])
        count = batch["positive_draws"] * frequency(columns) + batch["other_expected_count"]
        weights = tf.gather(value, columns) / count
        own = tf.eye(BATCH_SIZE, len(columns), dtype=tf.bool)
        sums = tf.reduce_sum(tf.where(batch["is_counted"] & ~own, weights, 0.0), axis=1)
        exact = tf.reduce_sum(value[1:]) - tf.gather(value, batch["candidate_row"])
        return tf.reduce_mean(sums / exact)

    batches = batches_of(examples, in_batch=in_batch, num_uniform=num_uniform)
    ratios = np.array([estimated_over_exact(batch) for batch in batches])[warm_up:]
    chance = ratios.std() / np.sqrt(len(ratios))
    assert chance < 0.012
    # Estimates bring a bias of a/2 and of their variance, at most a/2 each.
    assert ratios.mean() == pytest.approx(1, abs=4 * chance + 0.005)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_candidates": 0}, "num_candidates must be 1 or more. Received: 0"),
        ({"num_candidates": 2**31}, "must fit int32"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"num_uniform": -1}, "num_uniform must be 0 or more. Received: -1"),
        ({"history_length": 0}, "history_length must be 1 or more"),
        ({"start_step": -1}, "start_step must be 0 or more"),
        ({"num_uniform": 0, "in_batch": False}, "No shared column can be a negative"),
        ({"num_uniform": 0, "batch_size": 1}, "batch_size = 1, in_batch = True"),
    ],
)
def test_refuses_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches_of(examples_of(), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"history_rows": None}, r"must hold \['history_rows'\]"),
        (
            {"candidate_row": np.int64(3)},
            "'candidate_row' of a single example must be int32.*int64",
        ),
        ({"query_row": np.array([1, 2], np.int32)}, r"'query_row'.*rank 0.*\(2,\)"),
        ({"excluded_rows": np.int32(1)}, "'excluded_rows'.*rank 1"),
        ({"weight": np.float64(1)}, "'weight'.*float32.*float64"),
    ],
)
def test_refuses_other_examples(changes: dict[str, Any], message: str) -> None:
    example = {"query_row": 1, "candidate_row": 2, "history_rows": [3]} | changes
    example = {name: value for name, value in example.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        batches_of(tf.data.Dataset.from_tensors(example))
    with pytest.raises(ValueError, match="must be a dict"):
        batches_of(tf.data.Dataset.from_tensors((1, 2)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("candidate_row", 0),
        ("candidate_row", NUM_CANDIDATES + 1),
        ("history_rows", [1, NUM_CANDIDATES + 1]),
        ("history_rows", [-1]),
    ],
)
def test_refuses_rows_outside_the_corpus(name: str, value: object) -> None:
    def source() -> Iterator[Example]:
        for number, example in enumerate(positives(2 * BATCH_SIZE)):
            yield example | ({name: value} if number == 20 else {})

    batches = iter(batches_of(examples_of(source)))
    next(batches)
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"{name} must lie in [01] .. 30"):
        next(batches)
