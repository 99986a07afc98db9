"""Optimizers whose step costs what a batch touches, and the schedule of their step size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import tensorflow as tf

OptimizerName = Literal["adagrad", "adam", "lazy_adam"]
Decay = Literal["none", "cosine", "linear"]


@tf.keras.utils.register_keras_serializable(package="tfrs_pipeline")
class LazyAdam(tf.keras.optimizers.Adam):
    """Adam whose update of an embedding touches only the rows that the gradient has.

    With g the sum of a row's gradients, t the number of the step from 1, for every row in the
    gradient, and for every weight of a dense one, as in `tf.keras.optimizers.Adam`:

        m <- m + (1 - beta_1) * (g - m)
        v <- v + (1 - beta_2) * (g^2 - v)
        w <- w - learning_rate * sqrt(1 - beta_2^t) / (1 - beta_1^t) * m / (sqrt(v) + epsilon)

    Adam takes the rows that a batch leaves out for rows of gradient 0: their moments decay and they
    move on by what is left of m, so that a step costs as much as the whole table. Here they keep
    their weights and moments as they are until their next gradient. A rare row so remembers its
    last gradients for longer, and does not move between them. With every row in every gradient the
    two are the same.

    Args:
        learning_rate: Step size: a number or a `LearningRateSchedule`.
        beta_1: Decay of the mean gradient, in [0, 1).
        beta_2: Decay of the mean squared gradient, in [0, 1).
        epsilon: Added to the root of the mean squared gradient.
        amsgrad: Whether the largest v so far divides, instead of the last.
        jit_compile: Whether XLA compiles the update on a GPU. It compiles anew for each number of
            distinct rows, and that differs from step to step: off unless set.
        name: Of the optimizer.
        **kwargs: Further arguments of `tf.keras.optimizers.Adam`.

    Raises:
        ValueError: If `weight_decay` or `use_ema` is set: both go over whole tables.

    Example:
        >>> table = tf.Variable([[1.0], [1.0], [1.0]])
        >>> gradient = tf.IndexedSlices(tf.constant([[2.0], [3.0]]), tf.constant([1, 1]))
        >>> _ = LazyAdam(0.5).apply_gradients([(gradient, table)])
        >>> table.numpy().round(4).ravel().tolist()
        [1.0, 0.5, 1.0]
    """

    def __init__(
        self,
        learning_rate: float | tf.keras.optimizers.schedules.LearningRateSchedule = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        amsgrad: bool = False,
        jit_compile: bool = False,
        name: str = "LazyAdam",
        **kwargs: Any,
    ) -> None:
        for option in ("weight_decay", "use_ema"):
            if kwargs.get(option):
                raise ValueError(
                    f"LazyAdam touches the rows of a gradient alone, and {option} would go over "
                    f"the whole table each step. Received: {option}={kwargs[option]!r}. Leave it "
                    "out, or use tf.keras.optimizers.Adam."
                )
        super().__init__(
            learning_rate,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            amsgrad=amsgrad,
            jit_compile=jit_compile,
            name=name,
            **kwargs,
        )

    def update_step(self, gradient: tf.Tensor | tf.IndexedSlices, variable: tf.Variable) -> None:
        """Updates one variable.

        Args:
            gradient: Dense, or the rows of a table, each once: `apply_gradients` sums copies of a
                row before it calls this.
            variable: What to update.
        """
        if not isinstance(gradient, tf.IndexedSlices):
            super().update_step(gradient, variable)
            return
        # The parent's formula on the rows, in its order of operations: the same bits.
        rows, values = gradient.indices, gradient.values
        step = tf.cast(self.iterations + 1, variable.dtype)
        beta_1_power = tf.pow(tf.cast(self.beta_1, variable.dtype), step)
        beta_2_power = tf.pow(tf.cast(self.beta_2, variable.dtype), step)
        learning_rate = tf.cast(self.learning_rate, variable.dtype)
        alpha = learning_rate * tf.sqrt(1 - beta_2_power) / (1 - beta_1_power)
        epsilon = self.epsilon * (tf.sqrt(1 - beta_2_power) if self.adaptive_epsilon else 1.0)
        number = self._index_dict[self._var_key(variable)]
        m = _update_rows(
            self._momentums[number], rows, lambda old: old + (values - old) * (1 - self.beta_1)
        )
        v = _update_rows(
            self._velocities[number],
            rows,
            lambda old: old + (tf.square(values) - old) * (1 - self.beta_2),
        )
        if self.amsgrad:
            v = _update_rows(self._velocity_hats[number], rows, lambda old: tf.maximum(old, v))
        variable.scatter_sub(tf.IndexedSlices((m * alpha) / (tf.sqrt(v) + epsilon), rows))


def _update_rows(
    table: tf.Variable, rows: tf.Tensor, update: Callable[[tf.Tensor], tf.Tensor]
) -> tf.Tensor:
    """Replaces distinct rows of a table by a function of them, and returns the new ones."""
    new = update(tf.gather(table, rows))
    table.scatter_update(tf.IndexedSlices(new, rows))
    return new


@tf.keras.utils.register_keras_serializable(package="tfrs_pipeline")
class WarmupDecay(tf.keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up to the peak, then a decay to a share of it.

    With s the number of the step from 1, p = (s - warmup_steps) / (num_steps - warmup_steps)
    clipped to [0, 1], the step size is

        peak * s / warmup_steps                                          up to s = warmup_steps
        peak * (decay_to + (1 - decay_to) * (1 - p))                     "linear"
        peak * (decay_to + (1 - decay_to) * (1 + cos(pi * p)) / 2)       "cosine"
        peak                                                             "none"

    It is a function of the optimizer's count of steps alone, which is in the checkpoint: a stopped
    run goes on at the step size it had come to.

    Args:
        peak: Step size at the end of the warm-up, above 0.
        num_steps: Steps after which the decay has come to its end; further ones stay there.
        warmup_steps: Steps of the warm-up; 0 is none.
        decay: Shape of the decay.
        decay_to: Share of the peak that it ends at, in [0, 1].

    Raises:
        ValueError: If the warm-up leaves no step for a decay, or a value is out of range.

    Example:
        >>> schedule = WarmupDecay(0.1, num_steps=6, warmup_steps=2, decay="linear")
        >>> [round(float(schedule(step)), 4) for step in range(7)]
        [0.05, 0.1, 0.075, 0.05, 0.025, 0.0, 0.0]
    """

    def __init__(
        self,
        peak: float,
        *,
        num_steps: int,
        warmup_steps: int = 0,
        decay: Decay = "none",
        decay_to: float = 0.0,
    ) -> None:
        if peak <= 0 or warmup_steps < 0 or not 0 <= decay_to <= 1:
            raise ValueError(
                "peak must be above 0, warmup_steps 0 or more and decay_to in [0, 1]. "
                f"Received: peak={peak}, warmup_steps={warmup_steps}, decay_to={decay_to}"
            )
        if decay not in ("none", "cosine", "linear"):
            raise ValueError(f"decay must be none, cosine or linear. Received: {decay!r}")
        if decay != "none" and num_steps <= warmup_steps:
            raise ValueError(
                f"A warm-up of {warmup_steps} steps leaves nothing of {num_steps} steps for the "
                f"decay {decay!r}. Lower training.warmup_steps, or raise training.max_epochs."
            )
        self._peak = peak
        self._num_steps = num_steps
        self._warmup_steps = warmup_steps
        self._decay = decay
        self._decay_to = decay_to

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        """Computes the step size after `step` whole steps: scalar float32."""
        number = tf.cast(step, tf.float32) + 1.0
        rate = tf.constant(self._peak, tf.float32)
        if self._decay != "none":
            length = self._num_steps - self._warmup_steps
            progress = tf.clip_by_value((number - self._warmup_steps) / length, 0.0, 1.0)
            left = (
                1.0 - progress
                if self._decay == "linear"
                else (1.0 + tf.cos(math.pi * progress)) / 2.0
            )
            rate *= self._decay_to + (1.0 - self._decay_to) * left
        if self._warmup_steps:
            rate *= tf.minimum(number / self._warmup_steps, 1.0)
        return rate

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            "peak": self._peak,
            "num_steps": self._num_steps,
            "warmup_steps": self._warmup_steps,
            "decay": self._decay,
            "decay_to": self._decay_to,
        }


# A step of Adagrad and of LazyAdam costs what the batch touches; Adam's moments decay over whole
# tables each step.
_OPTIMIZERS: dict[OptimizerName, type[tf.keras.optimizers.Optimizer]] = {
    "adagrad": tf.keras.optimizers.Adagrad,
    "adam": tf.keras.optimizers.Adam,
    "lazy_adam": LazyAdam,
}


def make_optimizer(
    name: OptimizerName,
    learning_rate: float,
    *,
    num_steps: int = 0,
    warmup_steps: int = 0,
    decay: Decay = "none",
    decay_to: float = 0.0,
) -> tf.keras.optimizers.Optimizer:
    """Makes an optimizer by name.

    Args:
        name: "adagrad", "adam" or "lazy_adam".
        learning_rate: Its step size, or the peak of it.
        num_steps: Of the decay (see `WarmupDecay`, as the rest).
        warmup_steps: Of the warm-up.
        decay: Shape of the decay.
        decay_to: Share of the peak that the decay ends at.

    Returns:
        The optimizer; its step size is a plain number where it stays the same.

    Raises:
        ValueError: If the name is unknown or the schedule cannot be.
    """
    if name not in _OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {list(_OPTIMIZERS)}. Received: {name!r}")
    if not warmup_steps and decay == "none":
        return _OPTIMIZERS[name](learning_rate)
    schedule = WarmupDecay(
        learning_rate,
        num_steps=num_steps,
        warmup_steps=warmup_steps,
        decay=decay,
        decay_to=decay_to,
    )
    return _OPTIMIZERS[name](schedule)
