"""A training batch, its slices, and `Examples`, which decide which positives it has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Annotated, Any, NamedTuple, Protocol, get_type_hints

import numpy as np
import tensorflow as tf

from tfrs_pipeline.messages import check_integer


class Axis(Enum):
    """What the first dimension of a batch's field runs over."""

    QUERY = "the queries, W"
    POSITIVE = "the positives, P"
    SEQUENCE = "the sequences, S"
    COLUMN = "the shared columns, C"
    NONE = "none of these: the field is the same in every slice"


class HardColumns(NamedTuple):
    """Each row's own hard negatives; a row has one positive, so W = P.

    Attributes:
        candidate_row: [W, H] int32, 0 if the row's pool is empty.
        log_q: [W, H] float32, log( H_k / (V * f * w_k) ) (see `negatives/log_q.py`).
        is_counted: [W, H] bool. False: nothing drawn, known positive, exposed item.
        share: [W] float32, the row's f: 0 if it has no hard negative left.
    """

    candidate_row: tf.Tensor
    log_q: tf.Tensor
    is_counted: tf.Tensor
    share: tf.Tensor


class Batch(NamedTuple):
    """P positives of W queries, the C columns that the queries share, and their corrections.

    W = P = B unless a query has several positives. Fields that a batch does not have are None.

    Attributes:
        query_row: [W] int32.
        index: [P] int32, the samples.
        candidate_row: [P] int32, their positives.
        weight: [P] float32.
        positive_query: [P] int32 in [0, W), ascending: the query of each positive; None if W = P.
        history_rows: [W, any] int32, most recent first, padded with 0.
        history_times: [W, one more] int32, if the samples have times: those of the query and then
            of the items, as `relative_seconds` counts them; `NO_TIME` is padding.
        sequence_rows: In place of histories, [S, L'] int32, the windows of `WholeSequences`, oldest
            first, padded with 0; L' is the length of the longest.
        sequence_times: [S, L' + 1] int32, if the log has timestamps: those of the windows' items
            and of the event after the last one, as `relative_seconds` counts them; `NO_TIME` is
            padding. So entry j is the time of the query of state j.
        state: [P] int32, s * (L' + 1) + j if the history is the first j items of window s.
        requests: Each request feature by name, [W] or [W, any], encoded.
        shared_row: [C] int32, candidates of the shared columns, kind by kind.
        log_q: [1, C] float32, log n(c) of the column's candidate (see `negatives/log_q.py`);
            with hard negatives [W, C], log( n(c) / (1 - f) ) with the row's own f.
        is_counted: [W, C] bool. False: accidental hit (a row's own in-batch column is one), known
            positive, exposed item, item that came after the training.
        hard: The rows' own hard negatives.
        dropout_seed: [2] int32, for the model's dropout.
        dropout_slice: [2] int32, in a slice: which history (or sequence) of the whole batch comes
            first in it, from 0, and how many the whole batch has. So a slice drops what it would
            drop as a part of its batch.
        total_weight: Scalar float32, in a slice: the weight of the whole batch.
    """

    query_row: Annotated[tf.Tensor, Axis.QUERY]
    index: Annotated[tf.Tensor, Axis.POSITIVE] = None
    candidate_row: Annotated[tf.Tensor, Axis.POSITIVE] = None
    weight: Annotated[tf.Tensor, Axis.POSITIVE] = None
    positive_query: Annotated[tf.Tensor, Axis.POSITIVE] = None
    history_rows: Annotated[tf.Tensor, Axis.QUERY] = None
    history_times: Annotated[tf.Tensor, Axis.QUERY] = None
    sequence_rows: Annotated[tf.Tensor, Axis.SEQUENCE] = None
    sequence_times: Annotated[tf.Tensor, Axis.SEQUENCE] = None
    state: Annotated[tf.Tensor, Axis.POSITIVE] = None
    requests: Annotated[Mapping[str, tf.Tensor], Axis.QUERY] = None  # type: ignore[assignment]
    shared_row: Annotated[tf.Tensor, Axis.COLUMN] = None
    log_q: Annotated[tf.Tensor, Axis.QUERY] = None
    is_counted: Annotated[tf.Tensor, Axis.QUERY] = None
    hard: Annotated[HardColumns, Axis.QUERY] = None  # type: ignore[assignment]
    dropout_seed: Annotated[tf.Tensor, Axis.NONE] = None
    dropout_slice: Annotated[tf.Tensor, Axis.NONE] = None
    total_weight: Annotated[tf.Tensor, Axis.NONE] = None


# Each field must declare its axis, or several replicas could not share a batch.
_AXES: dict[str, Axis] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Batch, include_extras=True).items()
}


@dataclass(frozen=True)
class Slices:
    """Consecutive slices of each batch: `count` of them from the `first` on, out of `total`."""

    first: int
    count: int
    total: int

    def each(self, chosen: tf.data.Dataset) -> tf.data.Dataset:
        """Repeats each element for every slice, with the slice's number after it."""
        # A worker draws the whole batch and builds its slices: drawing is the cheap part.
        numbers = tf.data.Dataset.range(self.first, self.first + self.count)
        return chosen.flat_map(lambda *element: numbers.map(lambda number: (*element, number)))

    def take(self, number: tf.Tensor, batch: Batch) -> Batch:
        """Takes a slice of a batch whose columns are not masked and corrected yet.

        It has some of the queries, with their positives and own hard negatives, and all shared
        columns. Losses and gradients of the slices add up to those of the batch.
        """
        # Units (sequences, sets or single positives) are cut; `unit` is that of each positive.
        if batch.sequence_rows is not None:
            num_units, length = tf.unstack(tf.shape(batch.sequence_rows))
            num_states = length + 1
            unit = batch.state // num_states
        else:
            num_units, num_states = tf.shape(batch.query_row)[0], None
            unit = tf.range(num_units) if batch.positive_query is None else batch.positive_query
        number = tf.cast(number, tf.int32)
        # Slices differ by one unit at most, and together have each unit once.
        begin, end = number * num_units // self.total, (number + 1) * num_units // self.total
        first, last = tf.unstack(tf.searchsorted(unit, [begin, end]))  # Units are ascending.
        units, positives = slice(begin, end), slice(first, last)
        queries = positives if batch.positive_query is None else units
        ranges = {Axis.QUERY: queries, Axis.POSITIVE: positives, Axis.SEQUENCE: units}
        cut = {
            name: tf.nest.map_structure(lambda values, at=ranges[_AXES[name]]: values[at], field)
            for name, field in batch._asdict().items()
            if field is not None and _AXES[name] in ranges
        }
        part = batch._replace(**cut)
        if batch.positive_query is not None:
            # Numbers of queries and states count from the slice's first unit.
            part = part._replace(positive_query=part.positive_query - begin)
        if batch.state is not None:
            part = part._replace(state=part.state - begin * num_states)
        whole = tf.stack([begin, num_units])
        return part._replace(dropout_slice=whole, total_weight=tf.reduce_sum(batch.weight))


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

    def dataset(self, start_step: int, num_steps: int | None) -> tf.data.Dataset:
        """Returns pairs of a step, scalar int64, and its `choose`."""

    def read(self, chosen: Any) -> Batch:
        """Gathers the chosen contents in NumPy.

        Returns a `Batch` with query_row, index and candidate_row; positive_query if W may differ
        from P; history_rows, or sequence_rows and state; if the samples have times, those too.
        """


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
        epoch, number = divmod(step, self.steps_per_epoch)
        drawn = self._drawn  # A dataset's thread may ask for another epoch meanwhile.
        if drawn is None or drawn[0] != epoch:
            # By epoch: resuming in an epoch draws it again, and no earlier one.
            rng = np.random.default_rng([self._seed, Use.ORDER, epoch])
            drawn = self._drawn = epoch, self.draw_epoch(rng)
        return drawn[1][number]

    def dataset(self, start_step: int, num_steps: int | None) -> tf.data.Dataset:
        """Returns pairs of a step and its batch's contents; see `Examples`."""
        stop = np.iinfo(np.int64).max if num_steps is None else start_step + num_steps
        return tf.data.Dataset.from_generator(
            lambda: ((step, self.choose(step)) for step in range(start_step, stop)),
            output_signature=(tf.TensorSpec([], tf.int64), self._spec),
        )
