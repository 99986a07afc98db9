"""Retrieval metrics, per query and over all retrieved lists together.

Candidates are rows from 1, best first; row 0 is an empty slot. To measure a part of the relevant
items, such as a popularity slice, clear the other hits and count only that part in `num_relevant`.

Even metrics estimate what metrics would be if the log had shown every item equally often. A log has
clicks on what was shown, so plain metrics reward finding what its funnel favours. Each item to find
is weighted by one over how readily the log showed it, p(i), and the weights of a user are
normalised to sum to 1: self-normalised inverse propensity scores (Yang et al. 2018, "Unbiased
offline recommender evaluation for missing-not-at-random implicit feedback").

    p(i) ~ events of i at any stage, up to the end of the part; in a log of positives alone,
           the square root of their number
    w(i) = min(1 / p(i), sqrt(n) * mean of 1 / p over the n items to find)
    even_recall@k = mean over users u of: sum of w over u's items found in the top k / W(u)
    even_ndcg@k   = the same for NDCG with gains w; W(u): sum of w over all items that u is to find

The limit of w follows Ionides 2008, "Truncated importance sampling". The exponent 1/2 follows Saito
et al. 2020, "Unbiased recommender learning from missing-not-at-random implicit feedback"; it cannot
be estimated, because a log of positives alone cannot tell what was shown often from what is liked.
Weights compare items of one user only: a user with one item to find counts as in plain metrics.
"""

from collections.abc import Sequence

import numpy as np

from tfrs_pipeline.data.ids import are_listed

QUERY_METRICS = ("recall", "hit_rate", "ndcg", "mrr")
SET_METRICS = ("coverage", "average_popularity", "gini")


def find_hits(
    retrieved_rows: np.ndarray, relevant_queries: np.ndarray, relevant_rows: np.ndarray
) -> np.ndarray:
    """Marks which of [num_queries, max_k] rows are relevant to their query.

    `relevant_queries`, from 0, and `relevant_rows` are [num_pairs] each.
    """
    if not len(relevant_rows) or not retrieved_rows.size:
        return np.zeros(retrieved_rows.shape, bool)
    order = np.argsort(relevant_queries, kind="stable")
    starts = np.searchsorted(relevant_queries[order], np.arange(1, len(retrieved_rows)))
    highest = max(relevant_rows.max(), retrieved_rows.max())
    return are_listed(retrieved_rows, np.split(relevant_rows[order], starts), highest)


def query_metrics(is_hit: np.ndarray, num_relevant: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """Computes the metrics of each query at a cutoff, with places counted from 1.

        recall@k = hits in the top k / num_relevant; not capped, so below 1 if more are relevant
        hit_rate@k = 1 if there is a hit in the top k, or 0
        ndcg@k = sum over the hits of 1 / log2(1 + place), divided by the sum for the ideal list,
            which has min(num_relevant, k) hits first (Järvelin and Kekäläinen 2002, binary gains)
        mrr@k = 1 / place of the first hit, or 0 without one

    `is_hit` is [num_queries, max_k] bool, k at most max_k; `num_relevant` is [num_queries]. Returns
    name of `QUERY_METRICS` -> [num_queries] float64 in [0, 1], NaN where nothing is relevant.
    """
    top = is_hit[:, :k]
    has_hit = np.any(top, axis=1).astype(float)
    discounts = 1.0 / np.log2(np.arange(2, k + 2))
    ideal = np.cumsum(discounts)[np.clip(num_relevant, 1, k) - 1]
    values = {
        "recall": top.sum(axis=1) / np.maximum(num_relevant, 1).astype(np.float64),
        "hit_rate": has_hit,
        "ndcg": top @ discounts / ideal,
        "mrr": has_hit / (1.0 + np.argmax(top, axis=1)),
    }
    return {name: np.where(num_relevant > 0, x, np.nan) for name, x in values.items()}


def set_metrics(
    retrieved_rows: np.ndarray, candidate_counts: np.ndarray, in_part: np.ndarray, k: int
) -> dict[str, float]:
    """Computes metrics of the top k of all queries together, for a part of the candidates.

        coverage = share of the candidates that were retrieved for at least one query
        average_popularity = mean training count over the filled slots
        gini = sum over i, j of |x_i - x_j| / (2 n^2 mean(x)), where x_i is how often candidate i
            was retrieved: 0 if all are equally often, (n - 1) / n if only one ever is

    `candidate_counts` and `in_part`, bool, are [num_candidates]. Returns name of `SET_METRICS` -> a
    number: NaN without candidates or, but for coverage, if nothing was retrieved.
    """
    rows = retrieved_rows[:, :k].ravel()
    times = np.bincount(rows, minlength=len(candidate_counts) + 1)[1:][in_part]
    total, n = times.sum(), len(times)
    found = dict.fromkeys(SET_METRICS, float("nan"))
    if n:
        found["coverage"] = float(np.mean(times > 0))
    if total:
        found["average_popularity"] = float(times @ candidate_counts[in_part] / total)
        # After sorting, the double sum is a single one: the i-th smallest has weight 2 i - n - 1.
        weights = 2 * np.arange(1, n + 1) - n - 1
        found["gini"] = float(weights @ np.sort(times).astype(np.float64) / (n * total))
    return found


# With fewer items to find per user, weights within users change little.
_MIN_ITEMS_PER_USER = 1.5


def item_weights(exposure: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns w of each candidate, [num_candidates]; `wanted`: items to find, from 0."""
    weights = 1.0 / np.maximum(exposure, 1.0)
    limit = np.sqrt(len(wanted)) * weights[wanted].mean() if len(wanted) else np.inf
    return np.minimum(weights, limit)


def even_metrics(
    rows: np.ndarray,
    is_hit: np.ndarray,
    relevant: tuple[np.ndarray, np.ndarray],
    user_ids: np.ndarray,
    exposure: np.ndarray | None,
    cutoffs: Sequence[int],
) -> tuple[dict[str, np.ndarray], int | None]:
    """Computes the weighted metrics of each query, and how many items to find they rest on.

    The number is Kish's: (sum of v)^2 / sum of v^2, where v(u, i) = w(i) / W(u). A user has one
    value, however many queries: it stands at the first of them with an item of the corpus to find,
    and all others have NaN. So means over queries, and those of a bootstrap, are means over users.

    `rows`, [num_queries, max_k], are the candidates found, and `is_hit` says which are relevant;
    `relevant` has query numbers, ascending, and candidates; `exposure` is p, up to a factor.
    Nothing is computed if it is None, or users have fewer than 1.5 items to find on average.
    """
    queries, wanted = relevant
    measured = np.unique(queries)  # Ascending, as are the numbers of users below.
    users = np.unique(user_ids, return_inverse=True)[1]
    by = users[measured]
    is_user, first = np.unique(by, return_index=True)
    num_users = len(is_user)
    if exposure is None or len(wanted) < max(1, _MIN_ITEMS_PER_USER * num_users):
        return {}, None
    weights = np.append(0.0, item_weights(exposure, wanted - 1))
    of_query = np.bincount(queries, weights[wanted], len(rows))
    of_user = np.bincount(users, of_query)
    v = weights[wanted] / of_user[users[queries]]
    share = of_query[measured] / of_user[by]  # A query's part of W(u).
    gains = np.where(is_hit, weights[rows], 0.0)
    discounts = 1.0 / np.log2(np.arange(2, max(cutoffs) + 2))
    order = np.lexsort([-weights[wanted], queries])
    place = np.arange(len(order)) - np.searchsorted(queries, queries)
    values = {}
    for k in cutoffs:
        top = gains[:, :k]
        is_in = place < k
        ideal = weights[wanted][order][is_in] * discounts[place[is_in]]
        of_ideal = np.bincount(queries[is_in], ideal, len(rows))
        for name, found, best in (
            ("recall", top.sum(axis=1), of_query),
            ("ndcg", top @ discounts[:k], of_ideal),
        ):
            of_users = np.bincount(by, share * found[measured] / best[measured])
            values[f"even_{name}@{k}"] = column = np.full(len(rows), np.nan)
            column[measured[first]] = of_users[is_user]
    return values, round(num_users**2 / np.sum(v**2))


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
