"""Sets of a user's items, for logs without an order: one random half is input, the other target.

All targets of a query share its embedding and its scores with the shared negatives.
"""

import numpy as np
import tensorflow as tf

from tfrs_pipeline.batches.batch import Batch
from tfrs_pipeline.batches.examples import EpochExamples
from tfrs_pipeline.messages import check_integer
from tfrs_pipeline.samples.store import Samples, offsets_of, padded_lines


class UserSets(EpochExamples):
    """Some of a user's positives are input, the others are targets.

    An epoch visits every user once, in random order, and flips a coin for each of the user's
    candidates: it becomes input, part of the history, or a target, one of the query's positives.
    Copies of a candidate stay together, so that no target is in its own input. A user without input
    has an empty history; one without targets is left out of the epoch. An order of the log is
    ignored.

    Users are spread evenly over an epoch's batches, which have about `batch_size` positives each.
    If the coins leave fewer users than batches, as in a tiny log, they are flipped again.

    Batches have a positive_query, and history_rows in random order, as wide as the batch's longest,
    `history_length` at most: longer input is sampled. A query's shared columns count for all of its
    positives, so all are masked in them. There are no hard negatives, which belong to one positive.
    """

    has_one_positive = False

    def __init__(
        self, samples: Samples, *, batch_size: int, history_length: int, seed: int
    ) -> None:
        check_integer(1, batch_size=batch_size)
        row, rows = tf.TensorSpec([None], tf.int32), tf.TensorSpec([None, None], tf.int32)
        self.signature = Batch(row, row, row, positive_query=row, history_rows=rows)
        self._history_length = history_length
        self._num_samples = len(samples)
        self._rows = samples.candidate_rows
        # The distinct pairs of a query and a candidate; each has one coin.
        pairs = samples.query_rows.astype(np.int64) << 32 | samples.candidate_rows
        distinct, self._pair = np.unique(pairs, return_inverse=True)
        self._queries, query_of_pair = np.unique(distinct >> 32, return_inverse=True)
        self._query_of_sample = query_of_pair[self._pair]
        # At least half of all draws leave the mean number of users, rounded down, or more.
        mean_left = np.sum(1 - 0.5 ** np.bincount(query_of_pair))
        steps = max(1, min(round(len(samples) * 0.5 / batch_size), int(mean_left)))
        drawn = dict.fromkeys(("query_row", "target", "num_targets", "input", "num_inputs"), row)
        super().__init__(batch_size=batch_size, steps_per_epoch=steps, seed=seed, drawn=drawn)

    def draw_epoch(self, rng: np.random.Generator) -> list[dict[str, np.ndarray]]:
        """Draws each batch's users with their targets and inputs, one after the other."""
        is_input, num_targets = self._flip_coins(rng)
        order = rng.permutation(np.flatnonzero(num_targets))
        turn = np.full(len(self._queries), -1)
        turn[order] = np.arange(len(order))
        # One sort by the user's turn, in random order within, which also samples longer histories.
        # Users without targets have turn -1 and come first.
        turns = turn[self._query_of_sample]
        visited = np.argsort(turns + rng.random(self._num_samples))[np.count_nonzero(turns < 0) :]
        is_input = is_input[visited]
        target = visited[~is_input].astype(np.int32)
        inputs = self._rows[visited[is_input]]
        num_inputs = np.bincount(turns[visited[is_input]], minlength=len(order)).astype(np.int32)
        num_targets = num_targets[order].astype(np.int32)
        query_row = self._queries[order].astype(np.int32)
        # Where each batch begins among the users, and among their targets and inputs.
        begin = np.arange(self.steps_per_epoch + 1) * len(order) // self.steps_per_epoch
        begin_target, begin_input = (offsets_of(num)[begin] for num in (num_targets, num_inputs))
        parts = {
            "query_row": (query_row, begin),
            "target": (target, begin_target),
            "num_targets": (num_targets, begin),
            "input": (inputs, begin_input),
            "num_inputs": (num_inputs, begin),
        }
        return [
            {name: values[at[i] : at[i + 1]] for name, (values, at) in parts.items()}
            for i in range(self.steps_per_epoch)
        ]

    def _flip_coins(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draws which samples are input, and counts the targets of each query."""
        while True:
            is_input = (rng.random(int(self._pair.max()) + 1) < 0.5)[self._pair]
            num = np.bincount(self._query_of_sample[~is_input], minlength=len(self._queries))
            if np.count_nonzero(num) >= self.steps_per_epoch:
                return is_input, num

    def read(self, chosen: dict[str, np.ndarray]) -> Batch:
        """Reads a step's draws; see the class."""
        num_inputs = chosen["num_inputs"]
        width = min(num_inputs.max(), self._history_length)
        first = np.cumsum(num_inputs) - num_inputs
        queries = np.arange(len(num_inputs), dtype=np.int32)
        return Batch(
            query_row=chosen["query_row"],
            index=chosen["target"],
            candidate_row=self._rows[chosen["target"]],
            positive_query=np.repeat(queries, chosen["num_targets"]),
            history_rows=padded_lines(chosen["input"], first, num_inputs, width),
        )
