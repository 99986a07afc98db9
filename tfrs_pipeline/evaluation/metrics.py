"""Metrics of ranked lists, one class each, and what they read.

Candidates are rows from 1, best first; row 0 is an empty slot. A metric is a class with a name, a
range and one method, so that evaluation, reports and the check before an export know nothing of any
single one. `METRICS` lists those that settings can name; your own is measured like them
(`docs/guides/pieces.md` has an example).

Even metrics estimate what metrics would be if the log had shown every item equally often. A log has
clicks on what was shown, so plain metrics reward finding what its funnel favours. Each item to find
is weighted by one over how readily the log showed it, p(i), and the weights of a user are
normalised to sum to 1: self-normalised inverse propensity scores (Yang et al. 2018, "Unbiased
offline recommender evaluation for missing-not-at-random implicit feedback").

    p(i) ~ events of i at any stage, up to the end of the part; in a log of positives alone,
           the square root of their number
    w(i) = min(1 / p(i), sqrt(n) * mean of 1 / p over the n items to find)
    even_recall@k = mean over users u of: sum of w over u's items found in the top k / W(u)
    W(u) = sum of w over all items that u is to find

The limit of w follows Ionides 2008, "Truncated importance sampling". The exponent 1/2 follows Saito
et al. 2020, "Unbiased recommender learning from missing-not-at-random implicit feedback"; it cannot
be estimated, because a log of positives alone cannot tell what was shown often from what is liked.
Weights compare items of one user only: a user with one item to find counts as in plain metrics.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tfrs_pipeline.data.ids import are_listed
from tfrs_pipeline.messages import suggest_part

# With fewer items to find per user, weights within users change little.
_MIN_ITEMS_PER_USER = 1.5


def find_hits(
    retrieved_rows: np.ndarray, relevant_queries: np.ndarray, relevant_rows: np.ndarray
) -> np.ndarray:
    """Marks which of [num_queries, max_k] rows are relevant to their query.

    `relevant_queries`, from 0, and `relevant_rows` are [num_pairs] each.
    """
    if not len(relevant_rows) or not retrieved_rows.size:
        return np.zeros(retrieved_rows.shape, bool)
    # One list for each query, empty ones included, because `are_listed` walks both line by line.
    order = np.argsort(relevant_queries, kind="stable")
    starts = np.searchsorted(relevant_queries[order], np.arange(1, len(retrieved_rows)))
    highest = max(relevant_rows.max(), retrieved_rows.max())
    return are_listed(retrieved_rows, np.split(relevant_rows[order], starts), highest)


def item_weights(exposure: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns w of each candidate, [num_candidates]; `wanted`: items to find, from 0."""
    # An item that the log never showed counts as if it had been shown once.
    weights = 1.0 / np.maximum(exposure, 1.0)
    limit = np.sqrt(len(wanted)) * weights[wanted].mean() if len(wanted) else np.inf
    return np.minimum(weights, limit)


@dataclass(frozen=True, eq=False)
class EvenWeights:
    """Weights of the items to find with which each would count as if all had been shown equally.

    Attributes:
        by_item: [1 + num_candidates] w(i) by row, 0 for the empty slot.
        queries: [num_pairs] numbers of the queries, ascending, of the items to find.
        wanted: [num_pairs] their weights.
        users: [num_queries] number of each query's user.
        num: Effective number of items to find (Kish): (sum of v)^2 / sum of v^2, where v is the
            weight of an item over the sum of its user's.
    """

    by_item: np.ndarray
    queries: np.ndarray
    wanted: np.ndarray
    users: np.ndarray
    num: int

    @classmethod
    def of(
        cls,
        queries: np.ndarray,
        wanted_rows: np.ndarray,
        user_ids: np.ndarray,
        exposure: np.ndarray | None,
    ) -> "EvenWeights | None":
        """Weights pairs of a query, ascending, and an item to find by `exposure`, p up to a factor.

        None if the exposure is unknown, or users have fewer than 1.5 items to find on average.
        """
        users = np.unique(user_ids, return_inverse=True)[1]
        num_users = len(np.unique(users[queries]))
        if exposure is None or len(wanted_rows) < max(1, _MIN_ITEMS_PER_USER * num_users):
            return None
        by_item = np.append(0.0, item_weights(exposure, wanted_rows - 1))
        wanted = by_item[wanted_rows]
        # v(u, i) = w(i) / W(u), which sums to 1 over a user's items to find.
        v = wanted / np.bincount(users[queries], wanted)[users[queries]]
        return cls(by_item, queries, wanted, users, round(num_users**2 / np.sum(v**2)))

    @property
    def by_query(self) -> np.ndarray:
        """[num_queries] sum of the weights of each query's items to find."""
        return np.bincount(self.queries, self.wanted, len(self.users))

    def by_user(self, reached: np.ndarray) -> np.ndarray:
        """Divides what each user reached by what the user wanted: [num_queries].

        A user has one value, however many queries: it stands at the first of them with an item of
        the corpus to find, and all others have NaN. So means over queries, and those of a
        bootstrap, are means over users.

        Args:
            reached: [num_queries] sums of the weights of what was found.
        """
        measured = np.flatnonzero(self.by_query)  # Weights are above 0.
        users = self.users[measured]
        sums, totals = (np.bincount(users, x[measured]) for x in (reached, self.by_query))
        # Users' numbers ascend in both, which have an entry for each user, measured or not.
        numbers, first = np.unique(users, return_index=True)
        values = np.full(len(reached), np.nan)
        values[measured[first]] = sums[numbers] / totals[numbers]
        return values


@dataclass(frozen=True, eq=False)
class Rankings:
    """What a metric reads: the lists of all queries, and the hits among a part of the items.

    To measure a part, such as a popularity slice, the other hits are cleared, and only that part
    counts in `num_relevant`; the lists stay those of the whole corpus.

    Attributes:
        rows: [num_queries, max_k] candidates retrieved, best first; 0 is an empty slot.
        is_hit: [num_queries, max_k] bool, which of them are to be found.
        num_relevant: [num_queries] items to find, those outside the corpus included.
        counts: [num_candidates] training positives.
        is_in: [num_candidates] bool, the part's candidates.
        even: Weights for even metrics; None in a slice, or if they are unknown.
    """

    rows: np.ndarray
    is_hit: np.ndarray
    num_relevant: np.ndarray
    counts: np.ndarray
    is_in: np.ndarray
    even: EvenWeights | None = None

    def times_retrieved(self, k: int) -> np.ndarray:
        """Counts the lists with each of the part's candidates in the top k: [num_in_part]."""
        rows = self.rows[:, :k].ravel()  # Empty slots are counted first, and left out.
        return np.bincount(rows, minlength=len(self.counts) + 1)[1:][self.is_in]


@dataclass(frozen=True)
class Metric:
    """A metric of queries at a cutoff; a subclass has a name and the method `measure`.

    The first paragraph of its docstring says in reports what it means.

    Attributes:
        name: Its name in settings and tables, which add the cutoff: `str(Recall(20))` is recall@20.
        note: A line below tables that have it, if its name does not explain it. Names in braces
            stand for numbers of an `EvaluationResult`.
        range: Least and largest value; others are refused.
        more_is_better: Whether a larger value is better. Only such a metric may choose an epoch.
        is_by_slice: Whether models are also compared by it among popular and among rare items.

    Example:
        >>> class Precision(Metric):
        ...     "Share of the top k that is relevant."
        ...
        ...     name = "precision"
        ...
        ...     def measure(self, rankings):
        ...         return rankings.is_hit[:, : self.k].mean(axis=1)
        >>> str(Precision(20)), Precision.meaning()
        ('precision@20', 'Share of the top k that is relevant.')
    """

    k: int

    name: ClassVar[str]
    note: ClassVar[str] = ""
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    more_is_better: ClassVar[bool] = True
    is_by_slice: ClassVar[bool] = False

    def measure(self, rankings: Rankings) -> np.ndarray | float | None:
        """Returns [num_queries] float64; None if it cannot be measured here.

        Queries with nothing to find become NaN afterwards, and means skip NaN.
        """
        raise NotImplementedError

    @classmethod
    def meaning(cls) -> str:
        """Says what it measures: the first paragraph of its docstring."""
        return " ".join((cls.__doc__ or "").partition("\n\n")[0].split())

    def __str__(self) -> str:
        return f"{self.name}@{self.k}"


class ListMetric(Metric):
    """A metric of all lists together, which has no interval: `measure` returns one number."""

    more_is_better = False


def discounts(k: int) -> np.ndarray:
    """Returns 1 / log2(1 + rank) of the ranks 1 to k."""
    return 1.0 / np.log2(np.arange(2, k + 2))


class Recall(Metric):
    """Share of a query's relevant items that are in its top k."""

    name = "recall"
    is_by_slice = True

    def measure(self, rankings: Rankings) -> np.ndarray:
        """Divides by all relevant items, not at most k: below 1 if there are more."""
        # The maximum avoids a division by 0. Such queries become NaN afterwards.
        return rankings.is_hit[:, : self.k].sum(axis=1) / np.maximum(rankings.num_relevant, 1)


class HitRate(Metric):
    """Share of the queries with a relevant item in the top k."""

    name = "hit_rate"

    def measure(self, rankings: Rankings) -> np.ndarray:
        """Returns 1 for a query with a hit, or 0."""
        return np.asarray(rankings.is_hit[:, : self.k].any(axis=1), np.float64)


class Ndcg(Metric):
    """Sum of 1 / log2(1 + rank) over the hits in the top k, over that of the best possible list.

    Reference: Järvelin and Kekäläinen 2002, with binary gains.
    """

    name = "ndcg"

    def measure(self, rankings: Rankings) -> np.ndarray:
        """Divides the DCG by that of a list with min(num_relevant, k) hits first."""
        ideal = np.cumsum(discounts(self.k))[np.clip(rankings.num_relevant, 1, self.k) - 1]
        return rankings.is_hit[:, : self.k] @ discounts(self.k) / ideal


class Mrr(Metric):
    """1 / rank of the first relevant item; 0 if none is in the top k."""

    name = "mrr"

    def measure(self, rankings: Rankings) -> np.ndarray:
        """Finds the first hit of each query."""
        top = rankings.is_hit[:, : self.k]
        # Without a hit, argmax is 0 too, which would be rank 1: `any` makes the value 0.
        return top.any(axis=1) / (1.0 + np.argmax(top, axis=1))


class EvenRecall(Metric):
    """recall@k as if the log had shown every item equally often."""

    name = "even_recall"
    note = (
        "even_: as if the log had shown every item equally often; rests on {num_even:,} of "
        "{num_relevant:,} items to find, by their weights"
    )

    def measure(self, rankings: Rankings) -> np.ndarray | None:
        """Divides the weights of what was found by those of all that was to be found."""
        if (even := rankings.even) is None:
            return None
        # The empty slot has weight 0 and is never a hit.
        gains = np.where(rankings.is_hit, even.by_item[rankings.rows], 0.0)
        return even.by_user(gains[:, : self.k].sum(axis=1))


class Coverage(ListMetric):
    """Share of the items that are in at least one top k."""

    name = "coverage"

    def measure(self, rankings: Rankings) -> float:
        """Returns NaN without items."""
        times = rankings.times_retrieved(self.k)
        return float(np.mean(times > 0)) if len(times) else np.nan


class AveragePopularity(ListMetric):
    """Mean number of training positives of the items in the top k."""

    name = "average_popularity"
    range = (0.0, np.inf)
    note = (
        "average_popularity: mean training positives of the items that are retrieved; those of the "
        "items to find are {relevant_popularity:.1f}"
    )

    def measure(self, rankings: Rankings) -> float:
        """Averages over the filled slots; NaN if there are none."""
        times = rankings.times_retrieved(self.k)
        total = times.sum()
        return float(times @ rankings.counts[rankings.is_in] / total) if total else np.nan


PLAIN = (Recall, HitRate, Ndcg, Mrr)
"""Metrics that validation measures after each epoch, beside the one that chooses it."""

METRICS: dict[str, type[Metric]] = {
    metric.name: metric
    # In tables and reports they come in this order.
    for metric in (*PLAIN, EvenRecall, Coverage, AveragePopularity)
}
"""The metrics that settings can name, and that an evaluation measures unless it is given others.

Add your own before you use it, in every process: `METRICS["precision"] = Precision`.
"""

BUILT_IN = frozenset(METRICS)


def metric_of(text: str) -> Metric:
    """Returns the metric of a name, such as "ndcg@100"; a `ValueError` if there is none.

    Example:
        >>> metric_of("ndcg@100")
        Ndcg(k=100)
    """
    name, _, k = text.partition("@")
    if name not in METRICS or not re.fullmatch(r"[1-9]\d*", k):
        hint = "its cutoff is not an integer of 1 or more"
        if name not in METRICS:
            hint = suggest_part(f"{name}@{k or 100}", [f"{known}@{k or 100}" for known in METRICS])
        raise ValueError(f"must be a metric at a cutoff, such as 'ndcg@100'; {hint}")
    return METRICS[name](int(k))


def popularity_slices(candidate_counts: np.ndarray) -> dict[str, np.ndarray]:
    """Cuts the candidates into head, torso and tail by their counts: [num_candidates] bool.

    Sorted by falling count, ties by row, the head is the fewest candidates that hold half of the
    training positives, the torso the next ones up to 80%, and the tail all others.
    """
    counts = candidate_counts
    order = np.argsort(-counts, kind="stable")
    held_by_more_popular = np.cumsum(counts[order]) - counts[order]
    # .8 of a sum can be slightly off. Counts are integers, so this margin changes nothing else.
    bounds = np.array([0.5, 0.8]) * counts.sum() - 1e-6
    part = np.empty(len(counts), np.int8)
    part[order] = np.searchsorted(bounds, held_by_more_popular)
    return {name: part == number for number, name in enumerate(("head", "torso", "tail"))}
