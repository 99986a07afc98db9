"""A training batch: a record whose fields declare their axis, and slices of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, NamedTuple, get_type_hints

import tensorflow as tf


class Axis(Enum):
    """What the first dimension of a batch's field runs over."""

    QUERY = "the queries, W"
    POSITIVE = "the positives, P"
    SEQUENCE = "the sequences, S"
    COLUMN = "the shared columns, C"
    NONE = "none of these: the field is the same in every slice"


def axes_of(record: type) -> dict[str, Axis]:
    """Returns the axis of each field of a NamedTuple; raises a `TypeError` if one has none."""
    axes = {}
    for name, hint in get_type_hints(record, include_extras=True).items():
        found = [x for x in getattr(hint, "__metadata__", ()) if isinstance(x, Axis)]
        if len(found) != 1:
            raise TypeError(
                f"{record.__name__}.{name} must declare its axis, or several replicas could not "
                f"share a batch: annotate it as Annotated[tf.Tensor, Axis.QUERY]. Received: {hint}"
            )
        axes[name] = found[0]
    return axes


class HardColumns(NamedTuple):
    """Each row's own hard negatives; a row has one positive, so W = P.

    Attributes:
        candidate_row: [W, H] int32, 0 if the row's pool is empty.
        log_q: [W, H] float32, log( H_k / (V * f * w_k) ) (see `mixture`).
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
        history_times: [W, one more] float64, if the samples have times: those of the query and then
            of the items, in seconds since 1970; NaN is padding.
        sequence_rows: In place of histories, [S, L'] int32, the windows of `WholeSequences`, oldest
            first, padded with 0; L' is the length of the longest.
        sequence_times: [S, L' + 1] float64, if the log has timestamps: those of the windows' items
            and of the event after the last one, in seconds since 1970; NaN is padding. So entry j
            is the time of the query of state j.
        state: [P] int32, s * (L' + 1) + j if the history is the first j items of window s.
        requests: Each request feature by name, [W] or [W, any], encoded.
        shared_row: [C] int32, candidates of the shared columns, kind by kind.
        log_q: [1, C] float32, log n(c) of the column's candidate (see `mixture`); with hard
            negatives [W, C], log( n(c) / (1 - f) ) with the row's own f.
        is_counted: [W, C] bool. False: accidental hit (a row's own in-batch column is one), known
            positive, exposed item, item that came after the training.
        hard: The rows' own hard negatives.
        dropout_seed: [2] int32, for the model's dropout.
        dropout_slice: [2] int32, in a slice: the number of its first history (or sequence) within
            the whole batch, and the total of the whole batch.
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


_AXES = axes_of(Batch)


@dataclass(frozen=True)
class Slices:
    """Consecutive slices of each batch: `count` of them from the `first` on, out of `total`."""

    first: int
    count: int
    total: int

    def each(self, chosen: tf.data.Dataset) -> tf.data.Dataset:
        """Repeats each element for every slice, with the slice's number after it."""
        numbers = tf.data.Dataset.range(self.first, self.first + self.count)
        return chosen.flat_map(lambda *element: numbers.map(lambda number: (*element, number)))

    def take(self, number: tf.Tensor, batch: Batch) -> tuple[Batch, slice]:
        """Takes a slice of a batch whose columns are not masked and corrected yet.

        It has some of the queries, with their positives and own hard negatives, and all shared
        columns. Losses and gradients of the slices add up to those of the batch. Returns it, and
        which of the batch's queries it has.
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
        begin, end = number * num_units // self.total, (number + 1) * num_units // self.total
        first, last = tf.unstack(tf.searchsorted(unit, [begin, end]))  # Units are ascending.
        units, positives = slice(begin, end), slice(first, last)
        queries = positives if batch.positive_query is None else units
        places = {Axis.QUERY: queries, Axis.POSITIVE: positives, Axis.SEQUENCE: units}
        cut = {
            name: tf.nest.map_structure(lambda x, at=places[_AXES[name]]: x[at], field)
            for name, field in batch._asdict().items()
            if field is not None and _AXES[name] in places
        }
        part = batch._replace(**cut)
        if batch.positive_query is not None:
            part = part._replace(positive_query=part.positive_query - begin)
        if batch.state is not None:
            part = part._replace(state=part.state - begin * num_states)
        whole = tf.stack([begin, num_units])
        part = part._replace(dropout_slice=whole, total_weight=tf.reduce_sum(batch.weight))
        return part, queries
