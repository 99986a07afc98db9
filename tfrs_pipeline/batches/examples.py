"""Which positives are batched together, and what their queries read."""

from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from tfrs_pipeline.batches.batch import Batch
from tfrs_pipeline.messages import check_integer

SAMPLES_PER_BLOCK = 1 << 20


class Use(IntEnum):
    """The uses of a seed; their draws are independent of each other."""

    ORDER, DROPOUT, HARD, SHARED = range(4)


def seed_of(seed: int, use: Use, key: tf.Tensor) -> tf.Tensor:
    """Derives the seed of a draw, [2] int32, from the run's seed and a step or epoch (int64)."""
    return tf.cast(tf.random.experimental.stateless_fold_in([seed, use], key), tf.int32)


class Examples(Protocol):
    """An order of the training samples: one by one, whole sequences, or sets of a user's items.

    A batch is a function of (seed, step). `choose` decides the contents of a step's batch,
    `dataset` does so for many steps, and `read` gathers them from the samples' arrays.

    Attributes:
        batch_size: B, positives in a batch, about or exactly.
        steps_per_epoch: Batches per pass over the samples.
        rate: [num_candidates + 1] rates at which positives are drawn, by candidate; None if each
            sample comes once an epoch.
        is_fair_draw: Whether a batch is a fair draw of the positives, as in-batch negatives need.
        has_one_positive: Whether each row of a batch has exactly one positive.
        signature: The type of each field that `read` returns.
    """

    batch_size: int
    steps_per_epoch: int
    rate: np.ndarray | None
    is_fair_draw: bool
    has_one_positive: bool
    signature: Batch

    def choose(self, step: int) -> Any:
        """Returns the chosen contents of a step's batch, a structure of arrays."""
        ...

    def dataset(self, start_step: int, num_steps: int | None) -> tf.data.Dataset:
        """Returns pairs of a step, scalar int64, and its `choose`."""
        ...

    def read(self, chosen: Any) -> Batch:
        """Gathers the chosen contents in NumPy.

        Returns a `Batch` with query_row, index and candidate_row; positive_query if W may differ
        from P; history_rows, or sequence_rows and state; if the samples have times, those too.
        """
        ...


class EpochExamples:
    """Batches of whole users, whose contents are drawn in NumPy, an epoch at a time.

    `drawn` has the types of a batch's draws, a structure of arrays.
    """

    is_fair_draw = False
    rate: np.ndarray | None = None

    def __init__(self, *, batch_size: int, steps_per_epoch: int, seed: int, drawn: Any) -> None:
        check_integer(0, seed=seed)
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        self._seed = seed
        self._spec = drawn
        self._drawn: tuple[int, Sequence[Any]] | None = None

    def draw_epoch(self, rng: np.random.Generator) -> Sequence[Any]:
        """Draws the contents of each batch of an epoch."""
        raise NotImplementedError

    def choose(self, step: int) -> Any:
        """Returns the contents of a step's batch; see `Examples`."""
        epoch, place = divmod(step, self.steps_per_epoch)
        drawn = self._drawn  # A dataset's thread may ask for another epoch meanwhile.
        if drawn is None or drawn[0] != epoch:
            rng = np.random.default_rng([self._seed, Use.ORDER, epoch])
            drawn = self._drawn = epoch, self.draw_epoch(rng)
        return drawn[1][place]

    def dataset(self, start_step: int, num_steps: int | None) -> tf.data.Dataset:
        """Returns pairs of a step and its batch's contents; see `Examples`."""

        def pairs() -> Iterator[tuple[int, Any]]:
            step = start_step
            while num_steps is None or step < start_step + num_steps:
                yield step, self.choose(step)
                step += 1

        specs = (tf.TensorSpec([], tf.int64), self._spec)
        return tf.data.Dataset.from_generator(pairs, output_signature=specs)


def blocks(num_samples: int) -> Iterator[slice]:
    """Cuts samples into blocks that are small enough to be copied into memory."""
    for start in range(0, num_samples, SAMPLES_PER_BLOCK):
        yield slice(start, min(start + SAMPLES_PER_BLOCK, num_samples))
