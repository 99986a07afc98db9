"""A bonus for the items of a user's history, where people buy, play or watch the same items again.

The dot product alone ranks a user's own items poorly: each is one of the many that a history makes
likely, and how often it came is lost in the mean. The bonus is added to their scores. They are few,
so they are scored exactly and merged with the best of the others, whatever index finds these.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.data.holdout import Holdout
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.evaluation.bootstrap import Outcome, bootstrap_intervals
from tfrs_pipeline.evaluation.evaluate import Truth, rankings_of
from tfrs_pipeline.evaluation.metrics import Metric
from tfrs_pipeline.evaluation.topk import ExactRetriever, ScoreRetriever, merge, top_k_in_blocks
from tfrs_pipeline.retrieval import Query

# What validation chooses from. Weights count in standard deviations of a query's scores. Items that
# people do not return to get a negative one: their own vectors make them look likely.
_WEIGHTS = -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 4.0, 8.0
_FORMS = (0.0, 0.0), (0.5, 0.0), (0.5, 0.5)  # Pairs of power and forgetting.
# The spread of the scores is measured on this many queries.
_SPREAD_QUERIES = 256
# A pair of a line and a candidate row is one number: candidate rows are int32.
_ROWS = 1 << 31


@dataclass(frozen=True)
class RepeatBonus:
    """What is added to the score of an item of the query's history.

        bonus(u, i) = weight * n(u, i)^power
        n(u, i)     = sum over the occurrences of i in u's history of (1 + age)^-forgetting

    The age counts the known items after an occurrence, so n is the number of occurrences without
    forgetting; with it, old ones fade as memories do (Anderson and Schooler 1991, "Reflections of
    the environment in memory"). The power is below 1: the tenth purchase says less than the second.
    With power 0, the bonus is the weight. The whole history counts, not only the items that the
    model reads.
    """

    weight: float
    power: float
    forgetting: float

    def __str__(self) -> str:
        fading = f", each times (1 + age)^-{self.forgetting:g}" if self.forgetting else ""
        return f"{self.weight:+.3g} * occurrences^{self.power:g}{fading}"

    def of(self, histories: tf.RaggedTensor) -> tuple[tf.RaggedTensor, tf.RaggedTensor]:
        """Returns the distinct known rows of histories, and their bonuses, also within a graph.

        `histories` are [B, any] int32 candidate rows, most recent first; 0 is unknown. Returns
        [B, any] int32, in the order of the last occurrence, and [B, any] float32.
        """
        known = tf.ragged.boolean_mask(histories, histories > 0)
        lines = tf.cast(known.value_rowids(), tf.int64)
        ages = tf.cast(tf.ragged.range(known.row_lengths()).values, tf.float32)
        pairs, position = tf.unique(lines * _ROWS + tf.cast(known.values, tf.int64))
        n = tf.math.unsorted_segment_sum((1 + ages) ** -self.forgetting, position, tf.size(pairs))
        num_lines = histories.nrows(tf.int64)
        rows, bonuses = (
            tf.RaggedTensor.from_value_rowids(values, pairs // _ROWS, num_lines)
            for values in (tf.cast(pairs % _ROWS, tf.int32), self.weight * n**self.power)
        )
        return rows, bonuses

    def cells(
        self, items: Ids, queries: Sequence[Query]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lists the bonuses of queries by line, from 0, and row among `items`: [any] each."""
        histories = [items.rows(_history(query))[::-1] for query in queries]
        values = np.concatenate([np.zeros(0, np.int32), *histories])
        lengths = np.array([len(history) for history in histories], np.int64)
        rows, bonuses = self.of(tf.RaggedTensor.from_row_lengths(values, lengths))
        return rows.value_rowids().numpy(), rows.values.numpy(), bonuses.values.numpy()

    def added_to(self, exact: ExactRetriever) -> ScoreRetriever:
        """Returns a retriever that adds the bonus to the scores of another one."""

        def score(queries: Sequence[Query]) -> np.ndarray:
            scores = exact.score(queries)
            lines, rows, bonuses = self.cells(exact.items, queries)
            scores[lines, rows - 1] += bonuses
            return scores

        return ScoreRetriever(exact.items, score)


_NONE = RepeatBonus(0.0, 0.0, 0.0)


def _history(query: Query) -> Collection[Any]:
    history = query.get("history")
    return () if history is None else history


def choose_bonus(
    candidate_ids: Collection[Any],
    candidate_embeddings: np.ndarray,
    query_embeddings: np.ndarray,
    holdout: Holdout,
    metric: Metric,
    seed: int = 0,
) -> RepeatBonus | None:
    """Chooses the bonus that is best on a validation holdout, where rankings exclude nothing.

    Returns None, for no bonus, unless it is better than none beyond the 95% interval of the paired
    difference.

    Args:
        candidate_ids: [num_candidates] ids.
        candidate_embeddings: [num_candidates, D] float32, in their order.
        query_embeddings: [num_queries, D] float32, of the queries of the holdout.
        holdout: Its histories hold what may be repeated.
        metric: Measures rankings, query by query.
        seed: Seed of the resamples.
    """
    pairs = zip(holdout.histories, holdout.relevant, strict=True)
    if not any(np.isin(relevant, history).any() for history, relevant in pairs):
        return None  # Nobody returns to an item.
    truth, items = Truth.of(holdout, "none"), Ids(candidate_ids)
    vectors, k = query_embeddings[truth.positions], metric.k
    # The best of all other items stay the same, and so do the dot products of the user's own.
    lines, rows, _ = _NONE.cells(items, truth.queries)
    ends = np.cumsum(np.bincount(lines, minlength=len(vectors)))[:-1]
    repeats = np.split(rows, ends)
    dots = [
        candidate_embeddings[line - 1] @ vector
        for line, vector in zip(repeats, vectors, strict=True)
    ]

    def score(block: slice) -> np.ndarray:
        return vectors[block] @ candidate_embeddings.T

    spread = float(score(slice(_SPREAD_QUERIES)).std(axis=1).mean())
    others = top_k_in_blocks(score, len(vectors), len(items), k, repeats)

    def measure(bonus: RepeatBonus) -> np.ndarray:
        bonuses = np.split(bonus.cells(items, truth.queries)[2], ends)
        lists = zip(*others, repeats, dots, bonuses, strict=True)
        best = [
            merge(best_rows, scores, line, line_dots + line_bonuses)[0]
            for best_rows, scores, line, line_dots, line_bonuses in lists
        ]
        # The holdout may list the items in another order.
        ranked = truth.items.rows(items.take(np.stack(best))).reshape(len(best), k)
        return np.asarray(metric.measure(rankings_of(ranked, truth)))

    bonuses = [RepeatBonus(spread * weight, *form) for weight in _WEIGHTS for form in _FORMS]
    chosen = max(bonuses, key=lambda bonus: float(measure(bonus).mean()))
    gain = measure(chosen) - measure(_NONE)
    (interval,) = bootstrap_intervals(gain[:, np.newaxis], users=truth.user_ids, seed=seed)
    return chosen if interval.outcome is Outcome.BETTER else None
