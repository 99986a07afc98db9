"""A simulated recommendation funnel whose true preferences are known.

Logs show what a funnel chose to show; recall measured on them rewards agreeing with the funnel.
Here the true click probabilities are known, so that the best items can be the target.

The model, in logits of a click. Users and items lie in 10 clusters, the genres, on the unit sphere
of 8 dimensions. The popularity of an item is -log(place), centred, with random places: Zipf's law.
With a `device_weight` above 0, a request comes from one of three devices d, each with its own taste
on that sphere.

    taste(u, d)    = 4 u + device_weight * d
    truth(u, d, i) = click_bias + <taste, i> + .3 popularity(i)
    retrieval      = <taste, i> + popularity_weight * popularity(i) + retrieval_noise * e
    pre-rank       = truth + pre_rank_noise * e
    rank           = truth + rank_noise * e
    P(click | shown at r) = sigmoid(truth) / (1 + r)^position_bias,    r = 0 is the first place

with e standard normal, new for each request and item. Each stage keeps its best; the first
`num_exposed` of rank are shown. Requests are independent given the users: tastes do not drift, and
shown or clicked items can come again. A click is a look times a liking: the examination hypothesis
(Craswell et al. 2008, "An experimental comparison of click position-bias models").
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import NonNegativeFloat, PositiveInt
from scipy.special import expit

from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import Stage
from tfrs_pipeline.settings import checked

_NUM_DIMS, _NUM_CLUSTERS = 8, 10
# Equal tastes have 55 times the odds of orthogonal ones; tenfold popularity doubles the odds.
_TASTE_WEIGHT, _QUALITY_WEIGHT = 4.0, 0.3
# Probability that the genre shown for an item, or for a user, is random.
_FEATURE_NOISE = 0.2
_START, _DURATION = datetime(2024, 1, 1, tzinfo=UTC), timedelta(days=30)
# Scores of a block of requests for the whole corpus: 4 MiB fit in the processor's cache.
_MAX_BLOCK_SCORES = 2**20
_MAX_BLOCK_REQUESTS = 1024
_STAGES = [stage.value for stage in Stage]
DEVICES = ("phone", "tablet", "tv")


@checked
class FunnelOptions:
    """How the simulated funnel works. The defaults are round numbers, not fitted to anything.

    The module's formulas say what the weights, noises and biases do; each stage keeps its `num_...`
    best items. A `ConfigError` if a number is out of range, not finite, or a count is not an
    integer.
    """

    num_retrieved: PositiveInt = 100
    num_pre_ranked: PositiveInt = 40
    num_ranked: PositiveInt = 20  # These are logged with rank and score.
    num_exposed: PositiveInt = 10  # One screen.
    popularity_weight: float = 1.0  # In retrieval.
    click_bias: float = -4.0  # 1.8% for mean popularity at right angles to the user's taste.
    retrieval_noise: NonNegativeFloat = 2.0  # Standard deviations of errors, in logits.
    pre_rank_noise: NonNegativeFloat = 1.0
    rank_noise: NonNegativeFloat = 0.5
    position_bias: NonNegativeFloat = (
        0.5  # The fourth place is looked at half as often as the first.
    )
    device_weight: NonNegativeFloat = 0.0  # At 0, requests have no device.

    def __post_init__(self) -> None:
        kept = ("num_exposed", "num_ranked", "num_pre_ranked", "num_retrieved")
        for fewer, more in itertools.pairwise(kept):
            if getattr(self, fewer) > getattr(self, more):
                raise ValueError(
                    f"{fewer} must be at most {more}: each stage keeps some of what the one before "
                    f"it kept. Received: {getattr(self, fewer)} and {getattr(self, more)}."
                )


@dataclass(frozen=True, eq=False)
class Preferences:
    """What users like: the truth that a funnel's scores only approach.

    Tastes are [n, 8] float64: of users and items with length 1, of `DEVICES`, in their order, with
    length `device_weight`. Popularity is the centred log of the Zipf weight.
    """

    user_tastes: np.ndarray
    item_tastes: np.ndarray
    popularity: np.ndarray
    click_bias: float
    device_tastes: np.ndarray

    @property
    def has_devices(self) -> bool:
        """Whether the taste depends on the device of the request."""
        return bool(self.device_tastes.any())

    def tastes(self, user_rows: np.ndarray, device_rows: np.ndarray) -> np.ndarray:
        """Computes taste(u, d): [num_queries, 8]."""
        return _TASTE_WEIGHT * self.user_tastes[user_rows] + self.device_tastes[device_rows]

    def logits(self, tastes: np.ndarray, item_rows: np.ndarray | None = None) -> np.ndarray:
        """Computes the truth: [num_queries, num_items], or [num_queries, n] of `item_rows`."""
        if item_rows is None:
            popularity, liking = self.popularity, tastes @ self.item_tastes.T
        else:
            popularity = self.popularity[item_rows]
            liking = np.einsum("bd,bnd->bn", tastes, self.item_tastes[item_rows])
        return self.click_bias + liking + _QUALITY_WEIGHT * popularity


@dataclass(frozen=True, eq=False)
class Simulation:
    """A simulated log and the truth behind it. Ids are int64 1, 2, ..., as preferences' rows."""

    log: Log
    user_ids: np.ndarray
    item_ids: np.ndarray
    preferences: Preferences

    def click_probability(self, user_ids: npt.ArrayLike, device: str | None = None) -> np.ndarray:
        """Computes the true probability of a click on every item, if shown in the first place.

        `user_ids` are [num_queries], the device is one of `DEVICES` if the taste depends on it.
        Returns [num_queries, num_items] float64 in (0, 1), columns in the order of `item_ids`. A
        `ValueError` if a user or the device is unknown.
        """
        return expit(self._logits(user_ids, device))

    def best_items(
        self, user_ids: npt.ArrayLike, k: int = 50, device: str | None = None
    ) -> np.ndarray:
        """Finds each user's k items of highest true click probability: [num_queries, k] int64 ids.

        The best come first; all items if there are fewer. Arguments as in `click_probability`.
        """
        return self.item_ids[np.argsort(-self._logits(user_ids, device), axis=1)[:, :k]]

    def _logits(self, user_ids: npt.ArrayLike, device: str | None) -> np.ndarray:
        known = DEVICES if self.preferences.has_devices else (None,)
        if device not in known:
            raise ValueError(f"device must be one of {known}. Received: {device!r}.")
        ids = np.asarray(user_ids, np.int64).reshape(-1)
        if len(unknown := np.setdiff1d(ids, self.user_ids)):
            raise ValueError(
                f"{len(unknown)} unknown user ids, the first is {unknown[0]}. The simulation has "
                f"1 to {self.user_ids[-1]}."
            )
        devices = np.full(len(ids), known.index(device))
        return self.preferences.logits(self.preferences.tastes(ids - 1, devices))


def simulate_funnel(
    *,
    num_users: int,
    num_items: int,
    num_requests: int,
    seed: int,
    options: FunnelOptions | None = None,
) -> Simulation:
    """Simulates the log of a funnel, with the truth behind it.

    The same arguments give the same log. Each block of requests has separate random numbers, so
    that memory grows with the event table alone, and a longer simulation starts with the requests
    of a shorter one, at other times.

    A user may have no request; each request logs `options.num_retrieved` events. Returns events in
    the order of requests, with timestamp, request_id (from 0), rank and score (null for what did
    not survive rank). Categorical features hint at the taste: genre of items, favourite_genre of
    users and, with devices, device of requests. A `ValueError` if a number is out of range, or
    nothing was clicked.

    Example:
        >>> simulation = simulate_funnel(num_users=50, num_items=200, num_requests=100, seed=0)
        >>> simulation.best_items([7, 1], k=3).shape
        (2, 3)
    """
    options = options or FunnelOptions()
    if min(num_users, num_requests) < 1 or num_items < options.num_retrieved:
        raise ValueError(
            "num_users and num_requests must be 1 or more, num_items at least num_retrieved, "
            f"{options.num_retrieved}: retrieval takes that many different items. "
            f"Received: {num_users}, {num_requests} and {num_items}."
        )
    preferences, activity, favourite_genres, genres = _draw_world(
        num_users, num_items, options, seed
    )
    user_ids, item_ids = (np.arange(1, 1 + num) for num in (num_users, num_items))
    blocks = _event_blocks(preferences, options, activity, num_requests, seed)
    first = next(blocks)
    log = Log.from_table(
        pa.RecordBatchReader.from_batches(first.schema, itertools.chain([first], blocks)),
        items=pa.table({"item_id": item_ids, "genre": genres}),
        users=pa.table({"user_id": user_ids, "favourite_genre": favourite_genres}),
        item_features={"genre": "categorical"},
        user_features={"favourite_genre": "categorical"},
        request_features={"device": "categorical"} if preferences.has_devices else {},
    )
    return Simulation(log, user_ids, item_ids, preferences)


def _draw_world(
    num_users: int, num_items: int, options: FunnelOptions, seed: int
) -> tuple[Preferences, np.ndarray, np.ndarray, np.ndarray]:
    """Draws the preferences, how active each user is, and the genres of users and items."""
    rng = _generator(seed, 0)
    centers = _unit_length(rng.standard_normal((_NUM_CLUSTERS, _NUM_DIMS)))
    user_tastes, favourite_genres = _draw_tastes(rng, num_users, centers)
    item_tastes, genres = _draw_tastes(rng, num_items, centers)
    # Log-normal, as in most logs: a few users make a large share of the requests.
    activity = np.exp(rng.standard_normal(num_users))
    popularity = -np.log(1.0 + rng.permutation(num_items))
    # Centred, so that click_bias is the logit at mean popularity.
    popularity -= popularity.mean()
    devices = options.device_weight * _unit_length(rng.standard_normal((len(DEVICES), _NUM_DIMS)))
    truth = Preferences(user_tastes, item_tastes, popularity, options.click_bias, devices)
    return truth, activity, favourite_genres, genres


def _draw_tastes(
    rng: np.random.Generator, num: int, centers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draws [num, 8] tastes, half the cluster's and half their offsets, and the genres shown."""
    clusters = rng.integers(len(centers), size=num)
    offsets = rng.standard_normal((num, _NUM_DIMS)) / math.sqrt(_NUM_DIMS)
    tastes = _unit_length(centers[clusters] + offsets)
    says_nothing = rng.random(num) < _FEATURE_NOISE
    told = np.where(says_nothing, rng.integers(len(centers), size=num), clusters)
    return tastes, np.array([f"genre {cluster}" for cluster in range(len(centers))])[told]


def _event_blocks(
    preferences: Preferences,
    options: FunnelOptions,
    activity: np.ndarray,
    num_requests: int,
    seed: int,
) -> Iterator[pa.RecordBatch]:
    # Depends only on the number of items, so that later blocks do not change earlier ones.
    num_in_block = max(1, _MAX_BLOCK_SCORES // len(preferences.item_tastes))
    num_in_block = min(num_in_block, _MAX_BLOCK_REQUESTS)
    cumulative_activity = np.cumsum(activity) / activity.sum()
    for start in range(0, num_requests, num_in_block):
        rng = _generator(seed, 1 + start // num_in_block)
        user_rows = np.searchsorted(cumulative_activity[:-1], rng.random(num_in_block), "right")
        # Times are uneven, but never so close that two requests share a microsecond.
        places = np.arange(start, start + num_in_block) + 0.9 * rng.random(num_in_block)
        since_start = places * (_DURATION / timedelta(microseconds=1) / num_requests)
        times = int(_START.timestamp()) * 1_000_000 + since_start.astype(np.int64)
        # A separate stream, so that everything else is the same with and without devices.
        devices = _generator(seed, 1 + start // num_in_block, 1)
        device_rows = devices.integers(len(DEVICES), size=num_in_block)
        tastes = preferences.tastes(user_rows, device_rows)
        item_rows, stage_codes, scores = _run_funnel(rng, preferences, options, tastes)
        # Only what survived rank has a rank and a score in a real log.
        num_logged, num_ranked = options.num_retrieved, options.num_ranked
        rank = np.tile(np.arange(num_logged), num_in_block)
        scores = np.pad(scores, [(0, 0), (0, num_logged - num_ranked)])
        columns = {
            "user_id": 1 + np.repeat(user_rows, num_logged),
            "item_id": 1 + item_rows.ravel(),
            "request_id": np.repeat(np.arange(start, start + num_in_block), num_logged),
            "rank": pa.array(rank, mask=rank >= num_ranked),
            "timestamp": pa.array(np.repeat(times, num_logged), pa.timestamp("us", "UTC")),
            "stage": pa.array(_STAGES).take(pa.array(stage_codes.ravel())),
            "score": pa.array(scores.ravel(), mask=rank >= num_ranked),
        }
        if preferences.has_devices:
            columns["device"] = pa.array(DEVICES).take(pa.array(np.repeat(device_rows, num_logged)))
        yield pa.RecordBatch.from_pydict(columns).slice(0, (num_requests - start) * num_logged)


def _run_funnel(
    rng: np.random.Generator, preferences: Preferences, options: FunnelOptions, tastes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sends requests through the funnel; each has a row of `tastes`.

    Returns item rows and stage codes, [num_requests, num_retrieved]: the ranked items, best first,
    then the losers of rank, then of pre-rank; and the scores of rank, [num_requests, num_ranked].
    """
    # Noise does not need float64.
    noisy = rng.standard_normal((len(tastes), len(preferences.item_tastes)), dtype=np.float32)
    noisy *= np.float32(options.retrieval_noise)
    noisy += tastes.astype(np.float32) @ preferences.item_tastes.T.astype(np.float32)
    noisy += (options.popularity_weight * preferences.popularity).astype(np.float32)
    retrieved, _ = _part_columns(noisy, options.num_retrieved)
    logits = preferences.logits(tastes, retrieved)
    scores = logits + options.pre_rank_noise * rng.standard_normal(logits.shape)
    kept, lost = _part_columns(scores, options.num_pre_ranked)
    lost_in_pre_rank = np.take_along_axis(retrieved, lost, axis=1)
    pre_ranked = np.take_along_axis(retrieved, kept, axis=1)
    logits = np.take_along_axis(logits, kept, axis=1)
    scores = logits + options.rank_noise * rng.standard_normal(logits.shape)
    ranked, lost = np.split(np.argsort(-scores, axis=1), [options.num_ranked], axis=1)
    lost_in_rank = np.take_along_axis(pre_ranked, lost, axis=1)
    shown = ranked[:, : options.num_exposed]
    examination = (1.0 + np.arange(options.num_exposed)) ** -options.position_bias
    click_probability = expit(np.take_along_axis(logits, shown, axis=1)) * examination
    is_clicked = rng.random(shown.shape) < click_probability

    losers = _shuffled(rng, lost_in_rank), _shuffled(rng, lost_in_pre_rank)
    item_rows = [np.take_along_axis(pre_ranked, ranked, axis=1), *losers]
    stages = (Stage.RANKED, Stage.PRE_RANKED, Stage.RETRIEVED)
    codes = np.repeat([_STAGES.index(s) for s in stages], [x.shape[1] for x in item_rows])
    stage_codes = np.tile(codes, (len(tastes), 1))
    outcomes = _STAGES.index(Stage.CLICKED), _STAGES.index(Stage.EXPOSED)
    stage_codes[:, : options.num_exposed] = np.where(is_clicked, *outcomes)
    rank_scores = np.take_along_axis(scores, ranked, axis=1)
    return np.concatenate(item_rows, axis=1), stage_codes, rank_scores


def _part_columns(scores: np.ndarray, num_kept: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns, per row, the columns of the best scores and the other columns, in no order."""
    if not (num_lost := scores.shape[1] - num_kept):
        return np.broadcast_to(np.arange(num_kept), scores.shape), np.zeros((len(scores), 0), int)
    # A partition, since the order within what is kept does not matter and sorting costs more.
    columns = np.argpartition(scores, num_lost, axis=1)
    return columns[:, num_lost:], columns[:, :num_lost]


def _shuffled(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """Shuffles the values of each row, so that no place in a log reveals a score."""
    return np.take_along_axis(values, np.argsort(rng.random(values.shape), axis=1), axis=1)


def _unit_length(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _generator(seed: int, *stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))
