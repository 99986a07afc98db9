"""Training batches whose examples are chosen an epoch at a time, in NumPy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from tfrs_pipeline.negatives.batches import Batch, TrainingBatches

_ORDER_STREAM = 0


class EpochBatches(TrainingBatches):
    """Builds training batches from an epoch's draw: what is in each of its batches.

    An epoch is a function of (seed, epoch), and has `steps_per_epoch` batches, so that a batch is
    one of (seed, step). A child draws in `_draw_epoch` and builds in `_build`.
    """

    # What `_draw_epoch` chooses for a batch, as `tf.data` describes it.
    _chosen: ClassVar[Any]
    _drawn: tuple[int, Sequence[Any]] | None = None

    def dataset(self, start_step: int = 0, num_steps: int | None = None) -> tf.data.Dataset:
        """Streams the batches of steps `start_step`, `start_step` + 1, ...

        Args:
            start_step: First step; continuing from it gives what an unbroken run would have seen.
            num_steps: How many batches; endless if None.

        Returns:
            Dataset of the dicts that `batch` describes.
        """

        def chosen() -> Iterator[tuple[int, Any]]:
            step = start_step
            while num_steps is None or step < start_step + num_steps:
                yield step, self._choose(step)
                step += 1

        signature = (tf.TensorSpec([], tf.int64), self._chosen)
        choices = tf.data.Dataset.from_generator(chosen, output_signature=signature)
        batches = choices.map(self._build, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        return batches.prefetch(tf.data.AUTOTUNE)

    def batch(self, step: tf.Tensor | int) -> Batch:
        """Builds the batch of one step, outside a graph.

        Args:
            step: 0 or more.

        Returns:
            What the class describes.
        """
        number = int(step)
        chosen = tf.nest.map_structure(tf.constant, self._choose(number))
        return self._build(tf.constant(number, tf.int64), chosen)

    def _choose(self, step: int) -> Any:
        """Returns what a step's batch holds."""
        epoch, place = divmod(step, self.steps_per_epoch)
        drawn = self._drawn  # A dataset's thread may ask for another epoch meanwhile.
        if drawn is None or drawn[0] != epoch:
            rng = np.random.default_rng([self._seed, _ORDER_STREAM, epoch])
            drawn = self._drawn = epoch, self._draw_epoch(rng)
        return drawn[1][place]

    def _draw_epoch(self, rng: np.random.Generator) -> Sequence[Any]:
        """Draws what each of an epoch's batches holds, structures of arrays as `_chosen` says."""
        raise NotImplementedError

    def _build(self, step: tf.Tensor, chosen: Any) -> Batch:
        """Builds the batch of a step from what was drawn for it."""
        raise NotImplementedError

    def _holds(
        self, kinds: Sequence[tf.RaggedTensor], query_row: tf.Tensor, columns: tf.Tensor
    ) -> tf.Tensor:
        # Once a query: its rows have the same lists.
        queries, slot = tf.unique(query_row)
        return tf.gather(super()._holds(kinds, queries, columns), slot)
