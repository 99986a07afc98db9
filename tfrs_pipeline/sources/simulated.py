"""A simulated recommendation funnel whose true preferences are known.

Logs show what a funnel chose to show; recall measured on them rewards a model for agreeing with the
funnel. Here every user's true click probability for every item is known, so a model can be measured
against the items that the user would like best.

The model, in logits of a click. Users and items lie in `num_clusters` clusters on the unit sphere;
popularity is -log(place) of the item, places dealt at random, less its mean: Zipf's law.

    truth(u, i)    = click_bias + taste_weight * <u, i> + quality_weight * popularity(i)
    retrieval      = taste_weight * <u, i> + popularity_weight * popularity(i) + retrieval_noise * e
    pre-rank       = truth + pre_rank_noise * e
    rank           = truth + rank_noise * e
    P(click | shown at r) = sigmoid(truth) / (1 + r)^position_bias,    r = 0 is the first place

with e standard normal, new for each request and item. Each stage keeps its best; the first
`num_exposed` of rank are shown. Requests are independent given the users: tastes do not drift, and
an item that was shown or clicked may come again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import Stage

# Scores of a block of requests for the whole corpus: 4 MiB, which stay in the processor's cache.
_MAX_BLOCK_SCORES = 2**20
_MAX_BLOCK_REQUESTS = 1024
_STAGES = [stage.value for stage in Stage]
_EVENT_SCHEMA = pa.schema(
    {
        "user_id": pa.int64(),
        "item_id": pa.int64(),
        "timestamp": pa.timestamp("us", "UTC"),
        "stage": pa.string(),
        "request_id": pa.int64(),
        "rank": pa.int64(),
        "score": pa.float64(),
    }
)
_START = int(datetime(2024, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000


@dataclass(frozen=True)
class FunnelOptions:
    """How the simulated funnel works. The defaults are round numbers, not fitted to anything.

    Args:
        num_retrieved: Items a request that retrieval takes from the corpus. 100.
        num_pre_ranked: Of these, how many pre-rank keeps. 40.
        num_ranked: Of these, how many rank keeps and logs with rank and score. 20.
        num_exposed: Of these, the first, how many are shown. 10: one screen.
        logged_share: Share of the losers of pre-rank, and of those of rank, that each request logs,
            drawn uniformly: real logs seldom keep all. 1: all. The rest of the log does
            not depend on it.
        num_dims: Dimensions of a taste. 8.
        num_clusters: Clusters of tastes, each a genre. 10.
        taste_spread: Length of what is a user's or item's own, against 1 for what is its
            cluster's, before both are brought to length 1. 1: half and half.
        taste_weight: Logits between a taste at right angles and the same taste. 4: 55 times
            the odds.
        quality_weight: Of popularity in the truth: a popular item is somewhat better. 0.3: at ten
            times the popularity, twice the odds.
        popularity_weight: Of popularity in retrieval. 1: Zipf's law, blurred by noise.
        click_bias: Logit of a click on an item of mean popularity at right angles to the user's
            taste. -4: 1.8%.
        retrieval_noise: Standard deviation of retrieval's error, in logits, 0 or more. 2.
        pre_rank_noise: The same of pre-rank. 1.
        rank_noise: The same of rank. 0.5.
        position_bias: How attention falls with the place. 0.5: the fourth place is looked at half
            as often as the first. 0: no bias.
        activity_spread: Standard deviation of the log of a user's share of requests. 1: the middle
            two thirds of the users lie within a factor of 7. 0: all alike.
        feature_noise: Probability that the genre of an item, or a user's favourite one, says
            nothing: it is then drawn from all. 0.2.
        num_days: Days from the first request to the last, evenly filled. 30.

    Raises:
        ValueError: If a number is out of range.
    """

    num_retrieved: int = 100
    num_pre_ranked: int = 40
    num_ranked: int = 20
    num_exposed: int = 10
    logged_share: float = 1.0
    num_dims: int = 8
    num_clusters: int = 10
    taste_spread: float = 1.0
    taste_weight: float = 4.0
    quality_weight: float = 0.3
    popularity_weight: float = 1.0
    click_bias: float = -4.0
    retrieval_noise: float = 2.0
    pre_rank_noise: float = 1.0
    rank_noise: float = 0.5
    position_bias: float = 0.5
    activity_spread: float = 1.0
    feature_noise: float = 0.2
    num_days: float = 30.0

    def __post_init__(self) -> None:
        kept = ("num_exposed", "num_ranked", "num_pre_ranked", "num_retrieved")
        for fewer, more in itertools.pairwise(kept):
            if getattr(self, fewer) > getattr(self, more):
                raise ValueError(
                    f"{fewer} must be at most {more}: each stage keeps some of what the one before "
                    f"it kept. Received: {getattr(self, fewer)} and {getattr(self, more)}."
                )
        infinity, no_less = math.inf, "0 or more"
        ranges: list[tuple[tuple[str, ...], float, float, str]] = [
            (("num_exposed", "num_dims", "num_clusters"), 1, infinity, "1 or more"),
            (("logged_share", "feature_noise"), 0, 1, "in [0, 1]"),
            (("retrieval_noise", "pre_rank_noise", "rank_noise"), 0, infinity, no_less),
            (("position_bias", "taste_spread", "activity_spread"), 0, infinity, no_less),
            (("taste_weight", "quality_weight"), -infinity, infinity, "finite"),
            (("popularity_weight", "click_bias"), -infinity, infinity, "finite"),
            (("num_days",), math.ulp(0), infinity, "above 0"),
        ]
        for names, low, high, what in ranges:
            for name in names:
                value = getattr(self, name)
                if not (low <= value <= high and math.isfinite(value)):
                    raise ValueError(f"{name} must be {what}. Received: {value}.")

    @property
    def num_logged_pre_ranked(self) -> int:
        """Events a request of stage pre_ranked: losers of rank."""
        return _share(self.num_pre_ranked - self.num_ranked, self.logged_share)

    @property
    def num_logged_retrieved(self) -> int:
        """Events a request of stage retrieved: losers of pre-rank."""
        return _share(self.num_retrieved - self.num_pre_ranked, self.logged_share)

    @property
    def num_logged(self) -> int:
        """Events a request, of all stages."""
        return self.num_ranked + self.num_logged_pre_ranked + self.num_logged_retrieved


@dataclass(frozen=True, eq=False)
class Preferences:
    """What users like: the truth that a funnel's scores only approach.

    Args:
        user_tastes: [num_users, num_dims] float64 of length 1.
        item_tastes: [num_items, num_dims] float64 of length 1.
        popularity: [num_items] float64, log of the Zipf weight less its mean.
        options: `click_bias` and the weights.
    """

    user_tastes: np.ndarray
    item_tastes: np.ndarray
    popularity: np.ndarray
    options: FunnelOptions

    def logits(self, user_rows: np.ndarray) -> np.ndarray:
        """Computes truth(u, i) of all items.

        Args:
            user_rows: [num_queries] rows of `user_tastes`.

        Returns:
            [num_queries, num_items] float64.
        """
        return self._logits(self.user_tastes[user_rows] @ self.item_tastes.T, self.popularity)

    def pair_logits(self, user_rows: np.ndarray, item_rows: np.ndarray) -> np.ndarray:
        """Computes truth(u, i) of some items of each user.

        Args:
            user_rows: [num_queries] rows of `user_tastes`.
            item_rows: [num_queries, n] rows of `item_tastes`.

        Returns:
            [num_queries, n] float64.
        """
        tastes = self.user_tastes[user_rows], self.item_tastes[item_rows]
        return self._logits(np.einsum("bd,bnd->bn", *tastes), self.popularity[item_rows])

    def _logits(self, cosine: np.ndarray, popularity: np.ndarray) -> np.ndarray:
        options = self.options
        return (
            options.click_bias + options.taste_weight * cosine + options.quality_weight * popularity
        )


@dataclass(frozen=True, eq=False)
class Simulation:
    """A simulated log and the truth behind it.

    Args:
        log: What was logged.
        user_ids: [num_users] int64, ascending.
        item_ids: [num_items] int64, ascending.
        preferences: The truth; its rows are in the order of `user_ids` and `item_ids`.
    """

    log: Log
    user_ids: np.ndarray
    item_ids: np.ndarray
    preferences: Preferences

    def click_probability(self, user_ids: npt.ArrayLike) -> np.ndarray:
        """Computes the true probability of a click on every item, if shown and looked at.

        Args:
            user_ids: [num_queries] ids of `user_ids`, in any order.

        Returns:
            [num_queries, num_items] float64 in (0, 1), columns in the order of `item_ids`. Position
            bias is not in it: times `examination` it is the probability at a place.

        Raises:
            ValueError: If a user is unknown.
        """
        return _sigmoid(self.preferences.logits(self._user_rows(user_ids)))

    def best_items(self, user_ids: npt.ArrayLike, k: int = 50) -> np.ndarray:
        """Finds each user's k items of highest true click probability.

        Args:
            user_ids: [num_queries] ids of `user_ids`, in any order.
            k: How many, 1 <= k <= num_items.

        Returns:
            [num_queries, k] int64 item ids, best first.

        Raises:
            ValueError: If a user is unknown, or `k` is out of range.
        """
        num_items = len(self.item_ids)
        if not 1 <= k <= num_items:
            raise ValueError(f"k must be in [1, {num_items}], the number of items. Received: {k}.")
        user_rows = self._user_rows(user_ids)
        best = np.empty((len(user_rows), k), np.int64)
        num_rows = max(1, _MAX_BLOCK_SCORES // num_items)
        for start in range(0, len(user_rows), num_rows):
            logits = self.preferences.logits(user_rows[start : start + num_rows])
            top, _ = _part_columns(logits, k)
            order = np.argsort(-np.take_along_axis(logits, top, axis=1), axis=1)
            best[start : start + num_rows] = self.item_ids[np.take_along_axis(top, order, axis=1)]
        return best

    def _user_rows(self, user_ids: npt.ArrayLike) -> np.ndarray:
        ids = np.asarray(user_ids, np.int64).reshape(-1)
        unknown = np.setdiff1d(ids, self.user_ids)
        if len(unknown):
            raise ValueError(
                f"{len(unknown)} unknown user ids, the first is {unknown[0]}. The simulation has "
                f"{self.user_ids[0]} to {self.user_ids[-1]}."
            )
        return np.searchsorted(self.user_ids, ids)


def simulate_funnel(
    *,
    num_users: int,
    num_items: int,
    num_requests: int,
    seed: int,
    options: FunnelOptions | None = None,
) -> Simulation:
    """Simulates the log of a funnel, with the truth behind it.

    The same arguments give the same log. Requests come in blocks, each with random numbers of its
    own, so that only the event table grows with their number, and the first n requests are the same
    in a longer simulation, but for their times.

    Args:
        num_users: 1 or more; ids from 1. A user may have no request.
        num_items: At least `options.num_retrieved`; ids from 1.
        num_requests: 1 or more; each logs `options.num_logged` events.
        seed: 0 or more.
        options: How the funnel works; None means `FunnelOptions()`.

    Returns:
        Events in the order of requests, with timestamp, request_id (from 0, in the order of time),
        rank and score (of the stage rank; null for what did not survive it). Item feature: genre
        (categorical). User feature: favourite_genre (categorical). Both tell of the taste.

    Raises:
        ValueError: If a number is out of range, or nothing was clicked.

    Example:
        >>> simulation = simulate_funnel(num_users=50, num_items=200, num_requests=100, seed=0)
        >>> simulation.click_probability([7, 1]).shape
        (2, 200)
        >>> simulation.best_items([7, 1], k=3).shape
        (2, 3)
        >>> simulation.log.events.count().to_pyarrow().as_py()
        10000
    """
    options = options or FunnelOptions()
    _check_sizes(num_users, num_items, num_requests, seed, options)
    rng = _generator(seed, 0)
    centers = _unit_length(rng.standard_normal((options.num_clusters, options.num_dims)))
    user_tastes, favourite_genres = _draw_tastes(rng, num_users, centers, options)
    item_tastes, genres = _draw_tastes(rng, num_items, centers, options)
    activity = np.exp(options.activity_spread * rng.standard_normal(num_users))
    popularity = -np.log(1.0 + rng.permutation(num_items))
    preferences = Preferences(user_tastes, item_tastes, popularity - popularity.mean(), options)
    user_ids, item_ids = (np.arange(1, 1 + num) for num in (num_users, num_items))
    blocks = _event_blocks(preferences, activity, num_requests, seed)
    reader = pa.RecordBatchReader.from_batches(_EVENT_SCHEMA, blocks)
    log = Log.from_table(
        reader,
        items=pa.table({"item_id": item_ids, "genre": genres}),
        users=pa.table({"user_id": user_ids, "favourite_genre": favourite_genres}),
        item_features={"genre": "categorical"},
        user_features={"favourite_genre": "categorical"},
    )
    return Simulation(log, user_ids, item_ids, preferences)


def examination(rank: npt.ArrayLike, position_bias: float) -> np.ndarray:
    """Computes the probability that a user looks at a place, 1 / (1 + rank)^position_bias.

    The examination hypothesis: a click is a look times a liking (Craswell et al. 2008, "An
    experimental comparison of click position-bias models").

    Args:
        rank: Places, 0 = first.
        position_bias: 0 or more.

    Returns:
        float64 of the shape of `rank`, 1 at the first place.

    Example:
        >>> examination([0, 3], position_bias=0.5)
        array([1. , 0.5])
    """
    return (1.0 + np.asarray(rank, np.float64)) ** -position_bias


@dataclass(frozen=True, eq=False)
class _Requests:
    """A block of requests: [num_requests] users, [num_requests, num_logged] items and stages.

    Columns: the ranked items, best first; the losers of rank; the losers of pre-rank.
    """

    user_rows: np.ndarray
    item_rows: np.ndarray
    stage_codes: np.ndarray
    rank_scores: np.ndarray  # [num_requests, num_ranked]


def _run_funnel(
    rng: np.random.Generator, preferences: Preferences, user_rows: np.ndarray
) -> _Requests:
    """Sends one request of each of the users through the funnel."""
    options = preferences.options
    retrieved = _retrieve(rng, preferences, user_rows)
    logits = preferences.pair_logits(user_rows, retrieved)

    scores = logits + options.pre_rank_noise * rng.standard_normal(logits.shape)
    kept, lost = _part_columns(scores, options.num_pre_ranked)
    lost_in_pre_rank = np.take_along_axis(retrieved, lost, axis=1)
    pre_ranked = np.take_along_axis(retrieved, kept, axis=1)
    logits = np.take_along_axis(logits, kept, axis=1)

    scores = logits + options.rank_noise * rng.standard_normal(logits.shape)
    order = np.argsort(-scores, axis=1)
    ranked, lost = order[:, : options.num_ranked], order[:, options.num_ranked :]
    lost_in_rank = np.take_along_axis(pre_ranked, lost, axis=1)

    shown = ranked[:, : options.num_exposed]
    click_probability = _sigmoid(np.take_along_axis(logits, shown, axis=1))
    click_probability *= examination(np.arange(options.num_exposed), options.position_bias)
    is_clicked = rng.random(shown.shape) < click_probability

    logged = [
        np.take_along_axis(pre_ranked, ranked, axis=1),
        _draw_columns(rng, lost_in_rank, options.num_logged_pre_ranked),
        _draw_columns(rng, lost_in_pre_rank, options.num_logged_retrieved),
    ]
    stages = (Stage.RANKED, Stage.PRE_RANKED, Stage.RETRIEVED)
    stage_codes = np.concatenate(
        [
            np.full(items.shape, _STAGES.index(stage.value), np.int8)
            for items, stage in zip(logged, stages, strict=True)
        ],
        axis=1,
    )
    stage_codes[:, : options.num_exposed] = np.where(
        is_clicked, _STAGES.index(Stage.CLICKED.value), _STAGES.index(Stage.EXPOSED.value)
    )
    return _Requests(
        user_rows=user_rows,
        item_rows=np.concatenate(logged, axis=1),
        stage_codes=stage_codes,
        rank_scores=np.take_along_axis(scores, ranked, axis=1),
    )


def _retrieve(
    rng: np.random.Generator, preferences: Preferences, user_rows: np.ndarray
) -> np.ndarray:
    """Returns [num_requests, num_retrieved] item rows, in no order.

    The one step that touches the whole corpus: in float32, since its noise is large.
    """
    options = preferences.options
    shape = len(user_rows), len(preferences.item_tastes)
    scores = rng.standard_normal(shape, dtype=np.float32)
    scores *= np.float32(options.retrieval_noise)
    weighted_tastes = options.taste_weight * preferences.user_tastes[user_rows]
    scores += weighted_tastes.astype(np.float32) @ preferences.item_tastes.T.astype(np.float32)
    scores += (options.popularity_weight * preferences.popularity).astype(np.float32)
    return _part_columns(scores, options.num_retrieved)[0]


def _event_blocks(
    preferences: Preferences, activity: np.ndarray, num_requests: int, seed: int
) -> Iterator[pa.RecordBatch]:
    """Yields the events of all requests."""
    num_items = len(preferences.item_tastes)
    # By the number of items alone: what a block draws does not depend on how many there are.
    num_in_block = min(max(1, _MAX_BLOCK_SCORES // num_items), _MAX_BLOCK_REQUESTS)
    cumulative_activity = np.cumsum(activity) / activity.sum()
    for start in range(0, num_requests, num_in_block):
        rng = _generator(seed, 1 + start // num_in_block)
        user_rows = np.searchsorted(cumulative_activity[:-1], rng.random(num_in_block), "right")
        # Times are uneven, but never so close that two requests share a microsecond.
        jitter = 0.9 * rng.random(num_in_block)
        requests = _run_funnel(rng, preferences, user_rows)
        yield _as_events(requests, jitter, start, num_requests, preferences.options)


def _as_events(
    requests: _Requests,
    jitter: np.ndarray,
    first_request: int,
    num_requests: int,
    options: FunnelOptions,
) -> pa.RecordBatch:
    """Writes a block as rows of the event table, without requests past the last one."""
    num_logged = options.num_logged
    num = min(len(requests.user_rows), num_requests - first_request)
    request_ids = np.arange(first_request, first_request + num)
    microseconds = timedelta(days=options.num_days) / timedelta(microseconds=1)
    since_start = (request_ids + jitter[:num]) * (microseconds / num_requests)
    times = _START + since_start.astype(np.int64)
    scores = np.zeros((num, num_logged))
    scores[:, : options.num_ranked] = requests.rank_scores[:num]
    ranks = np.arange(num_logged)
    is_unranked = np.tile(ranks >= options.num_ranked, num)
    stages = pa.DictionaryArray.from_arrays(
        pa.array(requests.stage_codes[:num].reshape(-1)), pa.array(_STAGES)
    )
    columns = [
        1 + np.repeat(requests.user_rows[:num], num_logged),
        1 + requests.item_rows[:num].reshape(-1),
        pa.array(np.repeat(times, num_logged), pa.timestamp("us", "UTC")),
        stages.cast(pa.string()),
        np.repeat(request_ids, num_logged),
        pa.array(np.tile(ranks, num), mask=is_unranked),
        pa.array(scores.reshape(-1), mask=is_unranked),
    ]
    return pa.RecordBatch.from_arrays(
        [pa.array(column) for column in columns], schema=_EVENT_SCHEMA
    )


def _draw_tastes(
    rng: np.random.Generator, num: int, centers: np.ndarray, options: FunnelOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Draws [num, num_dims] tastes around cluster centers, and the genre that people are told."""
    clusters = rng.integers(len(centers), size=num)
    own = rng.standard_normal((num, options.num_dims)) / math.sqrt(options.num_dims)
    tastes = _unit_length(centers[clusters] + options.taste_spread * own)
    says_nothing = rng.random(num) < options.feature_noise
    told = np.where(says_nothing, rng.integers(len(centers), size=num), clusters)
    names = np.array([f"genre {cluster}" for cluster in range(len(centers))])
    return tastes, names[told]


def _part_columns(scores: np.ndarray, num_kept: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns, per row, the columns of the best scores and the other columns, in no order."""
    num_lost = scores.shape[1] - num_kept
    if num_lost == 0:
        columns = np.broadcast_to(np.arange(num_kept), scores.shape)
    else:
        columns = np.argpartition(scores, num_lost, axis=1)
    return columns[:, num_lost:], columns[:, :num_lost]


def _draw_columns(rng: np.random.Generator, values: np.ndarray, num: int) -> np.ndarray:
    """Draws `num` values of each row, without replacement, in random order."""
    order = np.argsort(rng.random(values.shape), axis=1)[:, :num]
    return np.take_along_axis(values, order, axis=1)


def _unit_length(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    # By tanh, which does not overflow.
    return 0.5 * (1.0 + np.tanh(0.5 * logits))


def _share(num: int, share: float) -> int:
    return math.floor(num * share + 0.5)


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream,)))


def _check_sizes(
    num_users: int, num_items: int, num_requests: int, seed: int, options: FunnelOptions
) -> None:
    if min(num_users, num_requests) < 1 or seed < 0:
        raise ValueError(
            "num_users and num_requests must be 1 or more, seed 0 or more. "
            f"Received: {num_users}, {num_requests} and {seed}."
        )
    if num_items < options.num_retrieved:
        raise ValueError(
            f"num_items must be at least num_retrieved, {options.num_retrieved}: retrieval takes "
            f"that many different items. Received: {num_items}. Take more items, or "
            "FunnelOptions(num_retrieved=..., num_pre_ranked=..., ...)."
        )
