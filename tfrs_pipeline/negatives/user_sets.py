"""Training batches of whole users: one query finds a random half of its user's positives.

For logs without an order. A query's embedding, and its scores with the shared negatives, serve all
of the positives that it is to find, where `TrainingBatches` computes them once a positive. What the
positives are compared with, and how it weighs, is as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from tfrs_pipeline.negatives.batches import Batch, EasySampling, HardSampling
from tfrs_pipeline.negatives.epochs import EpochBatches
from tfrs_pipeline.samples.build import Samples


class UserSetBatches(EpochBatches):
    """Builds training batches of users whose positives are read in part and found in part.

    An epoch visits every user once, in random order, and flips a coin for each of its candidates:
    those of the one side are read as the history, all of the other side are positives of that
    query. Copies of a candidate stay together, so that no query reads what it is to find. A user
    with nothing to read has an empty history; one with nothing to find is left out of the epoch. An
    order, if the log has one, plays no part.

    An epoch has as many batches as put `batch_size` positives into each on average, and its users
    are spread over them evenly, their numbers differing by one at most: how many positives a batch
    holds varies with its users. In a tiny log whose coins leave fewer users than batches they are
    flipped again.

    A batch has P positives of W queries and M easy negatives as columns that the queries share,
    C = M. There are no in-batch negatives (a sampler with alpha 1 draws from the same distribution)
    and no hard ones. The columns of a query count for all of its positives alike, so that all of
    these must be masked.

    `batch` returns what `TrainingBatches.batch` describes, without in-batch negatives, but for:
        query_row: [W] int32.
        history_rows: [W, L'] int32, in random order, padded with 0 to the longest of the batch; L'
            is `history_length` at most.
        candidate_row, weight, positive_log_q: [P].
        positive_query: [P] int32, the row in [0, W) that has the positive's query; rising.
        is_counted: [W, C] bool.

    Args:
        samples: The training samples.
        batch_size: Positives in a batch, about.
        easy_negatives: As for `TrainingBatches`, as the other arguments.
        history_length: Most that a query reads.
        seed: Of the order, the coins and the draws.
        read_share: Probability that a candidate of a user is read, in (0, 1).
        mask_known_positives: Must be True.
        mask_exposed: Whether a query's exposed and never clicked items are left out.
        hard_share: Must be 0.
        hard_negatives: Not used, as anywhere with a hard share of 0.
        positive_weight: [num_candidates + 1] factors for the weights of the samples, by candidate.

    Raises:
        ValueError: If an argument is out of range, or as for `TrainingBatches`.
    """

    _chosen: ClassVar[Any] = {
        name: tf.TensorSpec([None], tf.int32)
        for name in ("query_row", "found", "num_found", "read", "num_read")
    }

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        easy_negatives: Sequence[EasySampling],
        history_length: int,
        seed: int,
        read_share: float = 0.5,
        mask_known_positives: bool = True,
        mask_exposed: bool = True,
        hard_share: float = 0.0,
        hard_negatives: Sequence[HardSampling] = (),
        positive_weight: np.ndarray | None = None,
    ) -> None:
        if not 0 < read_share < 1:
            raise ValueError(f"read_share must be in (0, 1). Received: {read_share}")
        if not mask_known_positives:
            raise ValueError(
                "mask_known_positives = False, and a query's columns count for all of its "
                "positives: a column that holds one of them would be a negative of itself. Use "
                "True, or train each positive by itself (training.positions = 'one')."
            )
        if hard_share:
            raise ValueError(
                f"hard_share = {hard_share}, and hard negatives are those of one positive, where a "
                "query has many here. Use 0, or train each positive by itself (training.positions "
                "= 'one')."
            )
        super().__init__(
            samples,
            batch_size=batch_size,
            easy_negatives=easy_negatives,
            history_length=history_length,
            seed=seed,
            in_batch=False,
            mask_known_positives=mask_known_positives,
            mask_exposed=mask_exposed,
            positive_weight=positive_weight,
        )
        self._read_share = read_share
        # The distinct (query, candidate) that have a coin, and those of each sample.
        pairs = samples.query_rows.astype(np.int64) << 32 | samples.candidate_rows
        distinct, self._pair = np.unique(pairs, return_inverse=True)
        self._queries, query_of_pair = np.unique(distinct >> 32, return_inverse=True)
        self._query_of_sample = query_of_pair[self._pair]
        # Half of all draws at least have as many users left as their mean, rounded down.
        mean_left = np.sum(1 - read_share ** np.bincount(query_of_pair))
        self._num_batches = max(1, min(super().steps_per_epoch, int(mean_left)))

    @property
    def positives_per_epoch(self) -> float:
        """Positives that an epoch finds, on average."""
        return self.num_samples * (1 - self._read_share)

    @property
    def steps_per_epoch(self) -> int:
        """Batches per pass over the users."""
        return self._num_batches

    def _draw_epoch(self, rng: np.random.Generator) -> list[dict[str, np.ndarray]]:
        is_read, num_found = self._flip_coins(rng)
        order = rng.permutation(np.flatnonzero(num_found))
        turn = np.full(len(self._queries), -1)
        turn[order] = np.arange(len(order))
        # One sort: by the turn of the user, and at random within, which chooses what is read of
        # more than `history_length`. Users with nothing to find, of turn -1, come first.
        turns = turn[self._query_of_sample]
        visited = np.argsort(turns + rng.random(self.num_samples))[np.count_nonzero(turns < 0) :]
        is_read = is_read[visited]
        found = visited[~is_read].astype(np.int32)
        read = self.samples.candidate_rows[visited[is_read]]
        num_read = np.bincount(turns[visited[is_read]], minlength=len(order)).astype(np.int32)
        num_found = num_found[order].astype(np.int32)
        query_row = self._queries[order].astype(np.int32)
        # Where each batch begins: among the users, and among what they find and read.
        begin = np.arange(self._num_batches + 1) * len(order) // self._num_batches
        begin_found, begin_read = (
            np.concatenate([[0], np.cumsum(numbers)])[begin] for numbers in (num_found, num_read)
        )
        parts = {
            "query_row": (query_row, begin),
            "found": (found, begin_found),
            "num_found": (num_found, begin),
            "read": (read, begin_read),
            "num_read": (num_read, begin),
        }
        return [
            {name: values[at[i] : at[i + 1]] for name, (values, at) in parts.items()}
            for i in range(self._num_batches)
        ]

    def _flip_coins(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draws which samples are read, and counts the others of each of the queries."""
        while True:
            is_read = (rng.random(int(self._pair.max()) + 1) < self._read_share)[self._pair]
            num_found = np.bincount(self._query_of_sample[~is_read], minlength=len(self._queries))
            if np.count_nonzero(num_found) >= self._num_batches:
                return is_read, num_found

    def _build(self, step: tf.Tensor, chosen: Any) -> Batch:
        index, query_row = chosen["found"], chosen["query_row"]
        read = tf.RaggedTensor.from_row_lengths(chosen["read"], chosen["num_read"], validate=False)
        candidate_row = tf.gather(self._candidate_rows, index)
        return {
            **self._compared(step, index, query_row, candidate_row),
            "history_rows": read[:, : self.history_length].to_tensor(),
            "positive_query": tf.repeat(tf.range(tf.shape(query_row)[0]), chosen["num_found"]),
        }

    def _is_counted(
        self, query_row: tf.Tensor, candidate_row: tf.Tensor, columns: tf.Tensor
    ) -> tf.Tensor:
        # A row a query: its positives are among its known ones.
        return ~self._holds(self._left_out, query_row, columns)
