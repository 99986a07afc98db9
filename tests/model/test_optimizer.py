"""LazyAdam against Keras' Adam and its own formula, and the schedule against its formula."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfrs_pipeline.model.optimizer import LazyAdam, make_optimizer
from tfrs_pipeline.model.settings import TrainingSettings

NUM_ROWS, DIM, NUM_STEPS = 12, 3, 30


def start(seed: int = 0) -> tf.Variable:
    return tf.Variable(np.random.default_rng(seed).normal(size=[NUM_ROWS, DIM]).astype(np.float32))


def random_steps(seed: int, num: int = 5, rows_below: int = NUM_ROWS) -> list[Any]:
    """Gradients of very different sizes, as popular and rare items have, and their rows."""
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.uniform(-3, 1, [num, 1])
    gradients = (size * rng.normal(size=[NUM_STEPS, num, DIM])).astype(np.float32)
    return list(zip(gradients, rng.integers(0, rows_below, [NUM_STEPS, num]), strict=True))


def slices(gradient: np.ndarray, rows: np.ndarray) -> tf.IndexedSlices:
    """A gradient's rows as `tf.gather` leaves them: a row may come several times."""
    return tf.IndexedSlices(
        tf.constant(gradient), tf.constant(rows, tf.int32), dense_shape=tf.constant([NUM_ROWS, DIM])
    )


@pytest.mark.parametrize("options", [{}, {"beta_1": 0.5, "epsilon": 1e-3}])
def test_with_every_row_in_every_step_it_is_adam_to_the_bit(options: dict[str, Any]) -> None:
    dense, by_rows, keras = start(), start(), start()
    lazy, lazy_rows = LazyAdam(0.1, **options), LazyAdam(0.1, **options)
    adam = tf.keras.optimizers.Adam(0.1, **options)
    rng = np.random.default_rng(5)
    for gradient, _ in random_steps(2, num=NUM_ROWS):
        rows = rng.permutation(NUM_ROWS)
        lazy.apply_gradients([(tf.constant(gradient), dense)])
        lazy_rows.apply_gradients([(slices(gradient[rows], rows), by_rows)])
        adam.apply_gradients([(tf.constant(gradient), keras)])
    np.testing.assert_array_equal(dense, keras)
    np.testing.assert_array_equal(by_rows, keras)
    assert not np.allclose(keras, start(), atol=0.1)


def by_hand(steps: list[Any], learning_rate: float) -> np.ndarray:
    """The documented formula, in float64, a row at a time."""
    table = start().numpy().astype(np.float64)
    m, v = np.zeros_like(table), np.zeros_like(table)
    for t, (gradient, rows) in enumerate(steps, 1):
        for row in sorted(set(rows)):
            g = gradient[rows == row].astype(np.float64).sum(axis=0)
            m[row] = 0.9 * m[row] + 0.1 * g
            v[row] = 0.999 * v[row] + 0.001 * g**2
            scale = learning_rate * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            table[row] -= scale * m[row] / (np.sqrt(v[row]) + 1e-7)
    return table


def test_rows_follow_the_formula_and_copies_of_a_row_are_summed() -> None:
    """The steps run in a graph, with gradients of `tf.gather`; only rows below 8 have one."""
    steps = random_steps(3, rows_below=8)
    assert any(len(set(rows)) < len(rows) for _, rows in steps)
    table, optimizer = start(), LazyAdam(0.1)
    optimizer.build([table])

    @tf.function
    def step(gradient: tf.Tensor, rows: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.gather(table, rows) * gradient)
        found = tape.gradient(loss, table)
        assert isinstance(found, tf.IndexedSlices)
        optimizer.apply_gradients([(found, table)])

    for gradient, rows in steps:
        step(tf.constant(gradient), tf.constant(rows))
    np.testing.assert_allclose(table, by_hand(steps, 0.1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(table[8:], start()[8:])


def test_it_goes_on_from_a_checkpoint_and_from_keras_config_to_the_bit(tmp_path: Path) -> None:
    steps = random_steps(8)

    def run(table: tf.Variable, optimizer: Any, part: slice) -> None:
        for gradient, rows in steps[part]:
            optimizer.apply_gradients([(slices(gradient, rows), table)])

    settings = TrainingSettings(learning_rate=0.1, warmup_steps=5, decay="cosine")
    unbroken, first, second = start(), start(), start(seed=99)
    run(unbroken, make_optimizer(settings, NUM_STEPS), slice(None))
    stopped = make_optimizer(settings, NUM_STEPS)
    run(first, stopped, slice(0, 17))
    path = tf.train.Checkpoint(table=first, optimizer=stopped).write(str(tmp_path / "state"))
    resumed = tf.keras.optimizers.deserialize(tf.keras.optimizers.serialize(stopped))
    assert isinstance(resumed, LazyAdam)
    resumed.build([second])
    restored = tf.train.Checkpoint(table=second, optimizer=resumed)
    restored.read(path).assert_existing_objects_matched()
    run(second, resumed, slice(17, None))
    np.testing.assert_array_equal(second, unbroken)


@pytest.mark.parametrize("name", ["adagrad", "adam", "lazy_adam"])
@pytest.mark.parametrize("decay", ["none", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_the_rate_rises_and_falls_by_the_formula(name: str, decay: str, warmup_steps: int) -> None:
    options: Any = {"optimizer": name, "warmup_steps": warmup_steps, "decay": decay}
    optimizer = make_optimizer(TrainingSettings(learning_rate=0.3, **options), 50)
    optimizer.build([table := tf.Variable([[0.0]])])
    for step in (0, 1, 5, 10, 30, 49, 50, 60):
        optimizer.iterations.assign(step)
        optimizer.apply_gradients([(tf.zeros_like(table), table)])
        progress = min(max(step - warmup_steps, 0) / (50 - warmup_steps), 1)
        share = math.cos(math.pi * progress / 2) ** 2 if decay == "cosine" else 1.0
        share = step / warmup_steps if step < warmup_steps else share
        assert float(optimizer.learning_rate) == pytest.approx(0.3 * share, rel=1e-5, abs=1e-7)
