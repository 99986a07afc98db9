"""Optimizers that update only a batch's rows, and the learning rate schedule."""

from typing import Any

import tensorflow as tf

from tfrs_pipeline.model.settings import OptimizerName, TrainingSettings


@tf.keras.utils.register_keras_serializable(package="tfrs_pipeline")
class LazyAdam(tf.keras.optimizers.Adam):
    """Adam that updates only the rows of an embedding that are in the gradient.

    With g the sum of a row's gradients and t the step from 1, each row in the gradient, and each
    weight with a dense gradient, is updated as in `tf.keras.optimizers.Adam`:

        m <- m + (1 - beta_1) * (g - m)
        v <- v + (1 - beta_2) * (g^2 - v)
        w <- w - learning_rate * sqrt(1 - beta_2^t) / (1 - beta_1^t) * m / (sqrt(v) + epsilon)

    Adam also moves rows that are not in a batch, by their decaying moments, so a step touches the
    whole table. Here such rows keep weights and moments until their next gradient.

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
        **kwargs: Any,
    ) -> None:
        # XLA would recompile the update for each number of distinct rows.
        super().__init__(learning_rate, **{"jit_compile": False, "name": "LazyAdam", **kwargs})

    def update_step(self, gradient: tf.Tensor | tf.IndexedSlices, variable: tf.Variable) -> None:
        """Updates one variable by a dense gradient, or by a sparse one with distinct rows.

        `apply_gradients` adds up copies of a row before it calls this.
        """
        if not isinstance(gradient, tf.IndexedSlices):
            super().update_step(gradient, variable)
            return
        # The parent's formula on the rows, in the same order of operations, for the same bits.
        rows, values = gradient.indices, gradient.values
        step = tf.cast(self.iterations + 1, variable.dtype)
        beta_1_power = tf.pow(tf.cast(self.beta_1, variable.dtype), step)
        beta_2_power = tf.pow(tf.cast(self.beta_2, variable.dtype), step)
        learning_rate = tf.cast(self.learning_rate, variable.dtype)
        alpha = learning_rate * tf.sqrt(1 - beta_2_power) / (1 - beta_1_power)
        epsilon = self.epsilon * (tf.sqrt(1 - beta_2_power) if self.adaptive_epsilon else 1.0)
        tables = slots_of(self, variable)
        m, v = (tf.gather(table, rows) for table in tables)
        m += (values - m) * (1 - self.beta_1)
        v += (tf.square(values) - v) * (1 - self.beta_2)
        for table, new in zip(tables, (m, v), strict=True):
            table.scatter_update(tf.IndexedSlices(new, rows))
        variable.scatter_sub(tf.IndexedSlices((m * alpha) / (tf.sqrt(v) + epsilon), rows))


# A step of Adagrad or LazyAdam touches the batch's rows; Adam's moments decay in whole tables.
_OPTIMIZERS: dict[OptimizerName, type[tf.keras.optimizers.Optimizer]] = {
    "adagrad": tf.keras.optimizers.Adagrad,
    "adam": tf.keras.optimizers.Adam,
    "lazy_adam": LazyAdam,
}


def slots_of(optimizer: tf.keras.optimizers.Optimizer, variable: tf.Variable) -> list[tf.Variable]:
    """Returns a built optimizer's state for a variable: tables of the variable's shape."""
    number = optimizer._index_dict[optimizer._var_key(variable)]
    kept = ("_momentums", "_velocities", "_accumulators")
    return [getattr(optimizer, name)[number] for name in kept if hasattr(optimizer, name)]


class _From(tf.keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that begins at a later step of the optimizer."""

    def __init__(self, schedule: Any, first_step: int) -> None:
        self._schedule, self._first_step = schedule, first_step

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        return self._schedule(step - self._first_step)

    def get_config(self) -> dict[str, Any]:
        return {"schedule": self._schedule, "first_step": self._first_step}


def make_optimizer(
    settings: TrainingSettings, num_steps: int, first_step: int = 0
) -> tf.keras.optimizers.Optimizer:
    """Makes the settings' optimizer; warm-up and decay go from `first_step` over `num_steps`.

    The rate depends only on the optimizer's step count, which is in the checkpoint. Raises a
    `ValueError` if the warm-up leaves no step for the decay.
    """
    make, rate = _OPTIMIZERS[settings.optimizer], settings.learning_rate
    warmup_steps, has_decay = settings.warmup_steps, settings.decay == "cosine"
    if not warmup_steps and not has_decay:
        return make(rate)
    if has_decay and num_steps <= warmup_steps:
        raise ValueError(
            f"A warm-up of {warmup_steps} steps leaves nothing of {num_steps} steps for the decay "
            f"{settings.decay!r}. Lower training.warmup_steps, or raise training.max_epochs."
        )
    # With alpha 1 the cosine is constant: a warm-up alone.
    schedule = tf.keras.optimizers.schedules.CosineDecay(
        0.0 if warmup_steps else rate,
        decay_steps=max(num_steps - warmup_steps, 1),
        alpha=0.0 if has_decay else 1.0,  # Final rate, as a share of the peak.
        warmup_target=rate if warmup_steps else None,
        warmup_steps=warmup_steps,
    )
    return make(_From(schedule, first_step) if first_step else schedule)


def set_optimizer(
    network: tf.keras.Model, settings: TrainingSettings, num_steps: int, first_step: int = 0
) -> None:
    """Compiles a network with the settings' optimizer, and makes the optimizer's variables."""
    with network.distribute_strategy.scope():
        network.compile(optimizer=make_optimizer(settings, num_steps, first_step))
        # A checkpoint is read before the first step, which would otherwise make these variables.
        network.optimizer.build(network.trainable_variables)
