"""Chooses the repeat bonus of a model on validation."""

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np

from tfrs_pipeline.data.held_out_queries import Holdout
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.schema import Exclude
from tfrs_pipeline.evaluation.bootstrap import Outcome, bootstrap_intervals
from tfrs_pipeline.evaluation.evaluate import Truth, rankings_of
from tfrs_pipeline.evaluation.metrics import Metric, metric_of
from tfrs_pipeline.model.distribution import on_chief
from tfrs_pipeline.model.settings import TrainingSettings
from tfrs_pipeline.search.repeats import RepeatBonus
from tfrs_pipeline.search.topk import merge, top_k_in_blocks

# What validation chooses from. Weights are in standard deviations of a query's scores. Where people
# do not return to items, a negative one wins: an item's vector in the history makes it look likely.
_WEIGHTS = -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0
# Pairs of power and forgetting. The last suits messages, most of which go to the latest partners.
_FORMS = (0.0, 0.0), (0.5, 0.0), (0.5, 0.5), (0.5, 1.5)
# The standard deviation is measured on this many queries: it needs scores of all candidates.
_SPREAD_QUERIES = 256
_NONE = RepeatBonus(0.0, 0.0, 0.0)


def bonus_for(
    model: Any, training: TrainingSettings, validation: Holdout, exclude: Exclude, seed: int
) -> RepeatBonus | None:
    """Chooses a model's repeat bonus on the queries that validation ranks after each epoch.

    Returns None, for no bonus, if rankings exclude items, if `training.repeat_bonus` is off, or if
    no bonus is better than none. The chief decides for all workers.
    """
    if exclude != "none" or not training.repeat_bonus:
        return None
    sample = validation.sample(training.validation_users, seed)

    def choose() -> dict[str, float] | None:
        queries = model.query_embeddings(sample.as_queries())
        vectors = model.candidate_ids, model.corpus_embeddings(), queries
        bonus = choose_bonus(*vectors, sample, metric_of(training.monitor), seed)
        return None if bonus is None else dataclasses.asdict(bonus)

    fields = on_chief(choose)
    return fields and RepeatBonus(**fields)


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
        metric: Measures rankings, query by query; more is better.
        seed: Seed of the bootstrap's resamples.
    """
    pairs = zip(holdout.histories, holdout.relevant, strict=True)
    if not any(np.isin(relevant, history).any() for history, relevant in pairs):
        return None  # Nobody returns to an item.
    truth, items = Truth.of(holdout, "none"), Ids(candidate_ids)
    vectors, k = query_embeddings[truth.positions], metric.k
    # Computed once for all bonuses: the best of the other items, and the dot products of those in
    # the history.
    lines, rows, _ = _NONE.cells(items, truth.queries)
    ends = np.cumsum(np.bincount(lines, minlength=len(vectors)))[:-1]
    repeats = np.split(rows, ends)
    dots = [
        candidate_embeddings[line - 1] @ vector
        for line, vector in zip(repeats, vectors, strict=True)
    ]

    def score(block: slice) -> np.ndarray:
        return vectors[block] @ candidate_embeddings.T

    # One query at a time: in a large corpus, the scores of all of them may not fit in memory.
    num_spread = min(_SPREAD_QUERIES, len(vectors))
    spread = float(np.mean([score(slice(line, line + 1)).std() for line in range(num_spread)]))
    disliked = items.rows_by_list(truth.excluded or [items.values[:0]] * len(vectors))
    not_others = [*map(np.union1d, repeats, disliked)]
    others = top_k_in_blocks(score, len(vectors), len(items), k, not_others)

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
    # Metrics are NaN for queries that they leave out. With NaN as every mean, the first bonus wins.
    chosen = max(bonuses, key=lambda bonus: float(np.nanmean(measure(bonus))))
    gain = measure(chosen) - measure(_NONE)
    (interval,) = bootstrap_intervals(gain[:, np.newaxis], users=truth.user_ids, seed=seed)
    return chosen if interval.outcome is Outcome.BETTER else None
