"""Chooses on validation what a history adds to scores: its own items, and what is near them."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from tfrs_pipeline.data.held_out_queries import Holdout
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import Exclude
from tfrs_pipeline.evaluation.bootstrap import Outcome, bootstrap_intervals
from tfrs_pipeline.evaluation.evaluate import Truth, rankings_of
from tfrs_pipeline.evaluation.metrics import Metric, metric_of
from tfrs_pipeline.model.distribution import on_chief
from tfrs_pipeline.retrieval import history_of
from tfrs_pipeline.samples.latest_histories import latest_histories
from tfrs_pipeline.search.history_bonus import HistoryBonus, NeighbourBonus, RepeatBonus
from tfrs_pipeline.search.item_graph import KINDS, ItemGraph
from tfrs_pipeline.search.topk import top_k_in_blocks

# What validation chooses from. Weights are in standard deviations of a query's scores. Where people
# do not return to items, a negative one wins: an item's vector in the history makes it look likely.
_REPEAT_WEIGHTS = -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0
# Pairs of power and forgetting. The last suits messages, most of which go to the latest partners.
_FORMS = (0.0, 0.0), (0.5, 0.0), (0.5, 0.5), (0.5, 1.5)
_NEIGHBOUR_WEIGHTS = 1.0, 3.0, 10.0, 30.0, 100.0
_DECAYS = 0.3, 0.7, 1.0
# The standard deviation is measured on this many queries: it needs scores of all candidates.
_SPREAD_QUERIES = 256


def item_graph(log: Log, user_ids: np.ndarray, item_ids: np.ndarray, kind: str) -> ItemGraph:
    """Builds the graph of a log's positives, for users and items in the order of their rows."""
    histories, _, _ = latest_histories(log, Ids(user_ids), Ids(item_ids))
    return ItemGraph.build(histories, len(item_ids), kind)


def bonus_for(model: Any, validation: Holdout, exclude: Exclude, seed: int) -> HistoryBonus | None:
    """Chooses a model's bonus on the queries that validation ranks after each epoch.

    Neighbours are those in the model's log. Returns None, for no bonus, if `training.history_bonus`
    is off, or if no bonus is better than none. The chief decides for all workers.
    """
    training = model.first.training
    if not training.history_bonus:
        return None
    sample = validation.sample(training.validation_users, seed)
    users, items = Ids(model.query_ids), Ids(model.candidate_ids)
    histories, _, _ = latest_histories(model.log, users, items)
    graphs = {kind: ItemGraph.build(histories, len(items), kind) for kind in KINDS}

    def choose() -> dict[str, Any] | None:
        queries = model.query_embeddings(sample.as_queries())
        vectors = model.candidate_ids, model.corpus_embeddings(), queries
        metric = metric_of(training.monitor)
        bonus = choose_bonus(*vectors, sample, metric, exclude=exclude, graphs=graphs, seed=seed)
        return None if bonus is None else bonus.as_dict()

    if (record := on_chief(choose)) is None:
        return None
    bonus = HistoryBonus.read(record, None)
    near = bonus.neighbours
    return bonus if near is None else dataclasses.replace(bonus, graph=graphs[near.kind])


def choose_bonus(
    candidate_ids: Collection[Any],
    candidate_embeddings: np.ndarray,
    query_embeddings: np.ndarray,
    holdout: Holdout,
    metric: Metric,
    *,
    exclude: Exclude,
    graphs: Mapping[str, ItemGraph],
    seed: int = 0,
) -> HistoryBonus | None:
    """Chooses the bonus that is best on a validation holdout.

    Where rankings exclude nothing, the history's own items come first; then what is near them. Each
    is chosen only if it is better than without it beyond the 95% interval of the paired difference.
    Returns None, for no bonus, if neither is.

    Args:
        candidate_ids: [num_candidates] ids.
        candidate_embeddings: [num_candidates, D] float32, in their order.
        query_embeddings: [num_queries, D] float32, of the queries of the holdout.
        holdout: Its histories hold what may be repeated.
        metric: Measures rankings, query by query; more is better.
        exclude: What rankings exclude.
        graphs: What people took near each item before the holdout, by kind; may be empty.
        seed: Seed of the bootstrap's resamples.
    """
    truth, items = Truth.of(holdout, exclude), Ids(candidate_ids)
    trial = _Trial(items, candidate_embeddings, query_embeddings[truth.positions], truth, metric)
    # One query at a time: in a large corpus, the scores of all of them may not fit in memory.
    lines = range(min(_SPREAD_QUERIES, len(truth.positions)))
    spread = float(np.mean([trial.score(slice(line, line + 1)).std() for line in lines]))
    bonus = HistoryBonus()
    pairs = zip(holdout.histories, holdout.relevant, strict=True)
    if exclude == "none" and any(np.isin(relevant, history).any() for history, relevant in pairs):
        parts = [HistoryBonus(RepeatBonus(spread, *form)) for form in _FORMS]
        bonus = trial.better(bonus, parts, _REPEAT_WEIGHTS, seed)
    if graphs:
        parts = [
            HistoryBonus(neighbours=NeighbourBonus(kind, spread, decay), graph=graph)
            for kind, graph in graphs.items()
            for decay in _DECAYS
        ]
        bonus = trial.better(bonus, parts, _NEIGHBOUR_WEIGHTS, seed)
    return bonus or None


class _Trial:
    """Ranks the queries of validation with many bonuses, and scores all candidates only twice."""

    def __init__(
        self,
        items: Ids,
        embeddings: np.ndarray,
        vectors: np.ndarray,
        truth: Truth,
        metric: Metric,
    ) -> None:
        self._items, self._embeddings, self._vectors = items, embeddings, vectors
        self._truth, self._metric = truth, metric
        self._excluded = items.rows_by_list(truth.excluded or [items.values[:0]] * len(vectors))
        self._histories = [items.rows(history_of(query))[::-1] for query in truth.queries]

    def score(self, block: slice) -> np.ndarray:
        return self._vectors[block] @ self._embeddings.T

    def better(
        self,
        bonus: HistoryBonus,
        parts: Sequence[HistoryBonus],
        weights: Sequence[float],
        seed: int,
    ) -> HistoryBonus:
        """Returns a bonus with the best part and weight more, or as it is if none is better."""
        # The weight of a repeat may be negative: these items are left out of the others.
        repeated = (history[history > 0] for history in self._histories if parts[0].repeats)
        gone = [*map(np.union1d, self._excluded, [*repeated] or self._excluded)]
        fixed = [bonus.of(history) for history in self._histories]

        def score(block: slice) -> np.ndarray:
            scores = self.score(block)
            for line, (rows, bonuses) in zip(scores, fixed[block], strict=True):
                line[rows - 1] += bonuses
            return scores

        num_queries, k = len(self._vectors), self._metric.k
        others = top_k_in_blocks(score, num_queries, len(self._items), k, gone)
        # Metrics are NaN for queries that they leave out. With NaN as every mean, none is chosen.
        best, best_mean, gain = bonus, -np.inf, np.zeros(num_queries)
        for part in parts:
            measure = self._measure(others, fixed, part)
            for weight in weights:
                values = measure(weight)
                if (mean := float(np.nanmean(values))) > best_mean:
                    best, best_mean, gain = part.times(weight), mean, values - measure(0.0)
        users = self._truth.user_ids
        (interval,) = bootstrap_intervals(gain[:, np.newaxis], users=users, seed=seed)
        if interval.outcome is not Outcome.BETTER:
            return bonus
        note = f"{best}, chosen on validation: {self._metric} {interval.written('+')}"
        return bonus.plus(dataclasses.replace(best, notes=(note,)))

    def _measure(
        self,
        others: tuple[np.ndarray, np.ndarray],
        fixed: Sequence[tuple[np.ndarray, np.ndarray]],
        part: HistoryBonus,
    ) -> Callable[[float], np.ndarray]:
        """Returns a function that measures the rankings with a weight of a part."""
        cells = [part.of(history) for history in self._histories]
        shape = len(cells), max(1, *(len(rows) for rows, _ in cells))
        rows, numbers = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        scores = np.full(shape, -np.inf, np.float32)
        for line, (of_line, bonuses) in enumerate(cells):
            is_open = ~np.isin(of_line, self._excluded[line])
            of_line, bonuses = of_line[is_open], bonuses[is_open]
            rows[line, : len(of_line)], numbers[line, : len(of_line)] = of_line, bonuses
            dots = self._embeddings[of_line - 1] @ self._vectors[line]
            of_fixed = dict(zip(*(column.tolist() for column in fixed[line]), strict=True))
            dots += np.array([of_fixed.get(row, 0.0) for row in of_line.tolist()], np.float32)
            scores[line, : len(of_line)] = dots
        is_twice = np.stack([np.isin(a, b) for a, b in zip(others[0], rows, strict=True)])
        other_scores = np.where(is_twice, -np.inf, others[1])
        every_row = np.concatenate([others[0], rows], axis=1)
        k = self._metric.k

        def measure(weight: float) -> np.ndarray:
            every = np.concatenate([other_scores, scores + weight * numbers], axis=1)
            places = np.argpartition(-every, k - 1, axis=1)[:, :k]
            order = np.argsort(-np.take_along_axis(every, places, 1), axis=1, kind="stable")
            places = np.take_along_axis(places, order, 1)
            best = np.take_along_axis(every_row, places, 1)
            best[np.take_along_axis(every, places, 1) == -np.inf] = 0
            # The holdout may list the items in another order.
            ranked = self._truth.items.rows(self._items.take(best)).reshape(len(best), k)
            return np.asarray(self._metric.measure(rankings_of(ranked, self._truth)))

        return measure
