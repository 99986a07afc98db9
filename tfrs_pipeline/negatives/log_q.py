"""log_q of every column of a batch: the weight of each sampled negative.

With corpus size V (without items that came later), excluded items E(x) (c+ itself, the other known
positives, the exposed items), hard share f and pool shares w_k, the loss of one positive c+ of
query x is

    -s(x, c+) + log( exp s(x, c+) + (1-f) * sum over c not in E(x) of exp s(x, c)
                     + f * V * sum_k w_k * mean over h in hard_k(x) of exp s(x, h) ).

Both sums are estimated from sampled columns with the logit s - log_q, where log_q is

    the row's own positive                 0
    a shared column holding candidate c    log( n(c) / (1-f) )
    one of H_k own hard negatives          log( H_k / (V * f * w_k) )

n(c) is the expected number of copies of c among the shared columns, whichever kind drew them. The
expectation of the sum over columns is then the sum over the corpus.
"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfrs_pipeline.negatives.samplers import Negatives, SamplingFrame


class Mixture:
    """Kinds of shared negatives drawn together, and the log_q of their draws.

    Attributes:
        expected_count: [num_candidates + 1] float64, n(c), the expected copies of candidate c among
            a row's shared columns; 0 where no kind can draw the candidate.

    Raises:
        ValueError: If there is no negative at all. Whether the counts of a kind are possible, and
            it draws as they say, is for your tests: `tfrs_pipeline.testing.check_draws`.

    Example:
        The negatives of a batch for your own loss, with items that have 3 and 1 positives:

        >>> from tfrs_pipeline.negatives.samplers import InBatch, Uniform
        >>> mixture = Mixture([InBatch(), Uniform(2)], SamplingFrame.of_counts([0, 3, 1], 5))
        >>> rows = mixture.draw(tf.constant([1, 1, 2, 1, 1]), seed=[7, 0])
        >>> rows.shape, mixture.log_q(tf.constant([1, 2])).numpy().round(3)
        (TensorShape([7]), array([1.386, 0.693], dtype=float32))
        >>> mixture.expected_count
        array([0., 4., 2.])
    """

    def __init__(self, negatives: Sequence[Negatives], frame: SamplingFrame) -> None:
        self._negatives = tuple(negatives)
        self._frame = frame
        self.expected_count = np.zeros(frame.num_candidates + 1)
        for kind in self._negatives:
            self.expected_count += kind.expected_count(frame)
        if not self.expected_count.any():
            raise ValueError(
                "No shared column can be a negative: use in-batch negatives with a batch of 2 or "
                "more, or an easy kind such as uniform."
            )
        # Nothing is clipped, because log 0 occurs only for candidates that no kind draws.
        with np.errstate(divide="ignore"):
            self._log_count = tf.constant(np.log(self.expected_count), tf.float32)

    def draw(self, positive_rows: tf.Tensor, seed: tf.Tensor | Sequence[int]) -> tf.Tensor:
        """Draws the shared negatives of a batch, as a function of a seed such as `[7, step]`.

        `positive_rows` are its positives, [B] integers. Returns [C] int32 candidate rows, kind by
        kind; 0, whose log_q is -inf, where a positive of the batch is unknown. A row must mask its
        own positive. A larger batch raises as in `InBatch.draw`.
        """
        positive_rows = tf.cast(positive_rows, tf.int32)
        drawn = []
        for i, kind in enumerate(self._negatives):
            # By position, so a kind that is added last changes no other kind's draws.
            kind_seed = tf.cast(tf.random.experimental.stateless_fold_in(seed, i), tf.int32)
            drawn.append(tf.cast(kind.draw(self._frame, positive_rows, kind_seed), tf.int32))
        return tf.concat(drawn, axis=0)

    def log_q(self, candidate_rows: tf.Tensor, hard_share: tf.Tensor | None = None) -> tf.Tensor:
        """Looks up log n(c) of candidates, float32 of the same shape.

        With `hard_share`, the f of rows, it is log( n(c) / (1 - f) ), and shapes are broadcast.
        """
        log_q = tf.gather(self._log_count, candidate_rows)
        return log_q if hard_share is None else log_q - tf.math.log1p(-hard_share)


def hard_log_q(num_left: tf.Tensor, share: float, num_candidates: int) -> tf.Tensor:
    """Computes log( H_k / (V * f * w_k) ) of a row's pools of H_k, 0 if empty: [W, num_pools].

    Pools with something left have equal weight w_k.

    Example:
        A row with 2 columns of one pool, and one with 4 columns of each of two, for f = .5:

        >>> hard_log_q(tf.constant([[2.0, 0.0], [4.0, 4.0]]), 0.5, 1000).numpy().round(3)
        array([[-5.521,  0.   ],
               [-4.135, -4.135]], dtype=float32)
    """
    is_left = tf.cast(num_left > 0, tf.float32)
    pool_share = tf.math.divide_no_nan(is_left, tf.reduce_sum(is_left, axis=1, keepdims=True))
    # -inf * 0 and log 0 occur only in masked columns.
    log_q = tf.math.log(num_left) - tf.math.log(num_candidates * share * pool_share)
    return tf.where(num_left > 0, log_q, tf.zeros_like(log_q))
