"""Slices of a batch: what each of several replicas trains on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import tensorflow as tf

from tfrs_pipeline.batches.examples import REQUEST, Batch

_OF_POSITIVES = ("candidate_row", "weight", "positive_query", "state")
_OF_QUERIES = ("query_row", "history_rows", "history_times")
_OF_SEQUENCES = ("sequence_rows", "sequence_times")


@dataclass(frozen=True)
class Slices:
    """Some consecutive slices of each batch, `count` from the `first` on, of `total` in all."""

    first: int
    count: int
    total: int

    def each(self, chosen: tf.data.Dataset) -> tf.data.Dataset:
        """Repeats each element for every slice, with the slice's number after it."""
        numbers = tf.data.Dataset.range(self.first, self.first + self.count)
        return chosen.flat_map(lambda *element: numbers.map(lambda number: (*element, number)))

    def take(self, number: tf.Tensor, batch: Batch, of_queries: Collection[str]) -> Batch:
        """Takes a slice of a batch whose columns are not masked yet.

        A slice is some of the queries, with their positives and their own hard negatives, and all
        of the columns that queries share. Losses and gradients of the slices add up to the batch's.
        Whole sequences stay whole, and so do sets: slices differ in size by one sequence or set.
        `of_queries` names what is by query beside what `Examples.read` returns.

        Returns:
            The same of one slice, and:
            total_weight: Scalar float32, of the whole batch.
            dropout_slice: [2] int32, number of its first history (or sequence) among those of the
                whole batch, and how many these are.
        """
        # What is cut: sequences, sets or single positives; and which of them a positive belongs to.
        if "sequence_rows" in batch:
            num_states = tf.shape(batch["sequence_rows"])[1] + 1
            num_units = tf.shape(batch["sequence_rows"])[0]
            unit = batch["state"] // num_states
        else:
            num_units = tf.shape(batch["query_row"])[0]
            unit = batch.get("positive_query", tf.range(num_units))
        number = tf.cast(number, tf.int32)
        begin, end = number * num_units // self.total, (number + 1) * num_units // self.total
        first, last = tf.unstack(tf.searchsorted(unit, [begin, end]))  # Units rise.
        queries = slice(begin, end) if "positive_query" in batch else slice(first, last)
        part = dict(batch)
        for name in batch:
            if name in _OF_POSITIVES:
                part[name] = batch[name][first:last]
            elif name in _OF_SEQUENCES:
                part[name] = batch[name][begin:end]
            elif name in (*_OF_QUERIES, *of_queries) or name.startswith(("hard_", REQUEST)):
                part[name] = batch[name][queries]
        if "positive_query" in batch:
            part["positive_query"] -= begin
        if "sequence_rows" in batch:
            part["state"] -= begin * num_states
        return part | {
            "total_weight": tf.reduce_sum(batch["weight"]),
            "dropout_slice": tf.stack([begin, num_units]),
        }
