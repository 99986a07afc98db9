"""LazyAdam against Keras' Adam, and the schedule against its formula."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfrs_pipeline.model.optimizer import LazyAdam, WarmupDecay, make_optimizer

NUM_ROWS, DIM, NUM_STEPS = 12, 3, 40


def gradients(seed: int, num: int = NUM_STEPS) -> list[np.ndarray]:
    """Gradients of very different sizes by row, as popular and rare items have."""
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.uniform(-3, 1, [NUM_ROWS, 1])
    return [(size * rng.normal(size=[NUM_ROWS, DIM])).astype(np.float32) for _ in range(num)]


def start(seed: int = 0) -> tf.Variable:
    return tf.Variable(np.random.default_rng(seed).normal(size=[NUM_ROWS, DIM]).astype(np.float32))


def slices(gradient: np.ndarray, rows: list[int]) -> tf.IndexedSlices:
    """A gradient's rows as `tf.gather` leaves them: a row may come several times."""
    return tf.IndexedSlices(
        tf.constant(gradient), tf.constant(rows, tf.int32), dense_shape=tf.constant([NUM_ROWS, DIM])
    )


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"beta_1": 0.5, "epsilon": 1e-3}])
def test_dense_gradients_are_those_of_adam_to_the_bit(options: dict[str, Any]) -> None:
    ours, keras = start(), start()
    lazy, adam = LazyAdam(0.1, **options), tf.keras.optimizers.Adam(0.1, **options)
    for gradient in gradients(1):
        lazy.apply_gradients([(tf.constant(gradient), ours)])
        adam.apply_gradients([(tf.constant(gradient), keras)])
    np.testing.assert_array_equal(ours, keras)
    assert not np.allclose(ours, start(), atol=0.1)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}])
def test_with_every_row_in_every_step_it_is_adam(options: dict[str, Any]) -> None:
    ours, dense, sparse = start(), start(), start()
    lazy = LazyAdam(0.1, **options)
    adam, sparse_adam = (tf.keras.optimizers.Adam(0.1, **options) for _ in range(2))
    rng = np.random.default_rng(5)
    for gradient in gradients(2):
        rows = rng.permutation(NUM_ROWS).tolist()
        lazy.apply_gradients([(slices(gradient[rows], rows), ours)])
        sparse_adam.apply_gradients([(slices(gradient[rows], rows), sparse)])
        adam.apply_gradients([(tf.constant(gradient), dense)])
    np.testing.assert_array_equal(ours, dense)
    # Keras adds to sparse moments in two roundings, and to dense ones in one.
    np.testing.assert_allclose(ours, sparse, rtol=1e-4, atol=1e-5)


def by_hand(steps: list[tuple[np.ndarray, list[int]]], learning_rate: float) -> np.ndarray:
    """The documented formula, in float64, a row at a time."""
    table = start().numpy().astype(np.float64)
    m, v = np.zeros_like(table), np.zeros_like(table)
    for t, (gradient, rows) in enumerate(steps, 1):
        for row in sorted(set(rows)):
            g = sum(gradient[i].astype(np.float64) for i in range(len(rows)) if rows[i] == row)
            m[row] = 0.9 * m[row] + 0.1 * g
            v[row] = 0.999 * v[row] + 0.001 * g**2
            scale = learning_rate * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            table[row] -= scale * m[row] / (np.sqrt(v[row]) + 1e-7)
    return table


def random_steps(seed: int, rows_below: int = NUM_ROWS) -> list[tuple[np.ndarray, list[int]]]:
    rng = np.random.default_rng(seed)
    return [
        (gradient[:5], rng.integers(0, rows_below, 5).tolist()) for gradient in gradients(seed + 1)
    ]


def test_rows_follow_the_formula_and_copies_of_a_row_are_summed() -> None:
    steps = random_steps(3)
    assert any(len(set(rows)) < len(rows) for _, rows in steps)
    table, optimizer = start(), LazyAdam(0.1)
    for gradient, rows in steps:
        optimizer.apply_gradients([(slices(gradient, rows), table)])
    np.testing.assert_allclose(table, by_hand(steps, 0.1), rtol=1e-4, atol=1e-5)


def test_rows_without_a_gradient_keep_their_weights_and_moments() -> None:
    table, optimizer = start(), LazyAdam(0.1)
    optimizer.build([table])
    everything = list(range(NUM_ROWS))
    optimizer.apply_gradients([(slices(gradients(4)[0], everything), table)])
    state = [table, *optimizer.variables[1:]]
    # The step size, the weights and the two moments.
    assert [tuple(variable.shape) for variable in state].count((NUM_ROWS, DIM)) == 3
    before = [variable.numpy() for variable in state]
    for gradient, rows in random_steps(6, rows_below=4):
        optimizer.apply_gradients([(slices(gradient, rows), table)])
    for old, new in zip(before, state, strict=True):
        if new.shape == (NUM_ROWS, DIM):
            np.testing.assert_array_equal(old[4:], new[4:])
            assert np.all(old[:4] != new[:4])


def test_a_graph_gives_what_eager_calls_give() -> None:
    eager, graph = start(), start()
    optimizer, in_graph = LazyAdam(0.1), LazyAdam(0.1)
    in_graph.build([graph])

    @tf.function
    def step(rows: tf.Tensor, target: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((tf.gather(graph, rows) - target) ** 2)
        gradient = tape.gradient(loss, graph)
        assert isinstance(gradient, tf.IndexedSlices)
        in_graph.apply_gradients([(gradient, graph)])

    for target, rows in random_steps(7):
        step(tf.constant(rows), tf.constant(target))
        gradient = 2 * (tf.gather(eager, rows) - target)
        optimizer.apply_gradients([(slices(gradient, rows), eager)])
    np.testing.assert_allclose(graph, eager, rtol=1e-5, atol=1e-6)


def test_it_goes_on_from_a_checkpoint_to_the_bit(tmp_path: Path) -> None:
    steps = random_steps(8)

    def run(table: tf.Variable, optimizer: LazyAdam, part: slice) -> None:
        for gradient, rows in steps[part]:
            optimizer.apply_gradients([(slices(gradient, rows), table)])

    schedule = WarmupDecay(0.1, num_steps=NUM_STEPS, warmup_steps=5, decay="cosine")
    unbroken, first, second = start(), start(), start(seed=99)
    run(unbroken, LazyAdam(schedule), slice(None))
    stopped = LazyAdam(schedule)
    run(first, stopped, slice(0, 17))
    path = tf.train.Checkpoint(table=first, optimizer=stopped).write(str(tmp_path / "state"))
    resumed = LazyAdam(schedule)
    resumed.build([second])
    restored = tf.train.Checkpoint(table=second, optimizer=resumed)
    restored.read(path).assert_existing_objects_matched()
    run(second, resumed, slice(17, None))
    np.testing.assert_array_equal(second, unbroken)


def test_what_would_go_over_the_whole_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight_decay=0\.01.*use tf\.keras\.optimizers\.Adam"):
        LazyAdam(0.1, weight_decay=0.01)
    with pytest.raises(ValueError, match="use_ema=True"):
        LazyAdam(0.1, use_ema=True)


def test_keras_can_save_it_with_its_schedule() -> None:
    schedule = WarmupDecay(0.1, num_steps=9, warmup_steps=3, decay="linear", decay_to=0.2)
    saved = tf.keras.optimizers.serialize(LazyAdam(schedule, beta_1=0.8))
    loaded = tf.keras.optimizers.deserialize(saved)
    assert isinstance(loaded, LazyAdam)
    assert loaded.beta_1 == 0.8
    table, twin = start(), start()
    original = LazyAdam(schedule, beta_1=0.8)
    for gradient, rows in random_steps(9):
        loaded.apply_gradients([(slices(gradient, rows), table)])
        original.apply_gradients([(slices(gradient, rows), twin)])
    np.testing.assert_array_equal(table, twin)


@pytest.mark.parametrize("decay", ["none", "linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 10])
def test_a_schedule_rises_to_the_peak_and_falls_to_its_share(decay: str, warmup_steps: int) -> None:
    schedule = WarmupDecay(
        0.3,
        num_steps=50,
        warmup_steps=warmup_steps,
        decay=decay,  # type: ignore[arg-type]
        decay_to=0.1,
    )
    rates = np.array([float(schedule(tf.constant(step, tf.int64))) for step in range(60)])
    rising, falling = rates[:warmup_steps], rates[max(warmup_steps - 1, 0) :]
    np.testing.assert_allclose(rising, 0.3 * np.arange(1, warmup_steps + 1) / (warmup_steps or 1))
    assert rates.max() == pytest.approx(0.3, rel=0.02)
    if decay == "none":
        np.testing.assert_allclose(falling, 0.3)
        return
    assert np.all(np.diff(falling[: 50 - max(warmup_steps - 1, 0)]) < 0)
    np.testing.assert_allclose(rates[49:], 0.03, rtol=1e-5)
    for progress in (0.25, 0.5, 0.75):
        number = warmup_steps + progress * (50 - warmup_steps)
        left = 1 - progress if decay == "linear" else math.cos(math.pi * progress / 2) ** 2
        rate = float(schedule(tf.constant(number - 1.0)))
        assert rate == pytest.approx(0.3 * (0.1 + 0.9 * left), rel=1e-5)


def test_the_optimizer_steps_by_the_schedule() -> None:
    table = tf.Variable([[0.0]])
    optimizer = make_optimizer("lazy_adam", 0.1, num_steps=6, warmup_steps=2, decay="linear")
    # A gradient that stays the same moves Adam by the step size itself.
    places = [0.0]
    for _ in range(6):
        optimizer.apply_gradients([(tf.IndexedSlices(tf.constant([[1.0]]), [0]), table)])
        places.append(float(table[0, 0]))
    np.testing.assert_allclose(-np.diff(places), [0.05, 0.1, 0.075, 0.05, 0.025, 0.0], atol=1e-5)


def test_what_cannot_be_scheduled_is_refused() -> None:
    with pytest.raises(ValueError, match=r"warm-up of 20 steps leaves nothing of 20 steps"):
        WarmupDecay(0.1, num_steps=20, warmup_steps=20, decay="cosine")
    with pytest.raises(ValueError, match=r"decay_to in \[0, 1\]. Received: .* decay_to=2"):
        WarmupDecay(0.1, num_steps=20, decay_to=2)
    with pytest.raises(ValueError, match="decay must be none, cosine or linear"):
        WarmupDecay(0.1, num_steps=20, decay="step")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"one of \['adagrad', 'adam', 'lazy_adam'\]"):
        make_optimizer("sgd", 0.1)  # type: ignore[arg-type]
