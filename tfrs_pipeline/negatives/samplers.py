"""Kinds of negatives, easy and hard: the two protocols, and the package's own kinds.

Easy negatives are columns that all rows of a batch share; each hard negative is a column of one row
alone. A kind is a class; what it has to say for log_q to be right is in its protocol.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Protocol, TypeAlias

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, PositiveInt

from tfrs_pipeline.data.schema import DataError
from tfrs_pipeline.libraries import tf
from tfrs_pipeline.messages import check_integer
from tfrs_pipeline.settings import Several, checked, from_text


@dataclass(frozen=True, eq=False)
class SamplingFrame:
    """The distributions from which negatives are drawn, by candidate row: [num_candidates + 1].

    `counts` are training positives, and `q_positive`, float64, is the distribution from which the
    `batch_size` positives of a batch are drawn; row 0 has unknown items, if batches hold any.
    """

    counts: np.ndarray
    q_positive: np.ndarray
    batch_size: int

    @classmethod
    def of_counts(cls, counts: Sequence[int] | np.ndarray, batch_size: int) -> SamplingFrame:
        """Makes the frame of batches that are a fair draw of the counted positives.

        Unknown items may be in the batch but are never negatives: their columns have a log_q of
        -inf. A `ValueError` if the counts or the size are impossible.

        Example:
            One positive of an unknown item, three of item 1 and four of item 3:

            >>> SamplingFrame.of_counts([1, 3, 0, 4], batch_size=16).q_positive
            array([0.125, 0.375, 0.   , 0.5  ])
        """
        counts = np.asarray(counts)
        is_count = np.isfinite(counts) & (counts >= 0)
        if counts.ndim != 1 or not is_count.all() or not counts[1:].any():
            raise ValueError(
                "counts must be a finite number for each candidate row, 0 or more, and not all 0 "
                f"beyond row 0, which counts positives of unknown items. Received: {counts}."
            )
        check_integer(1, batch_size=batch_size)
        return cls(counts, counts / counts.sum(), batch_size)

    @property
    def num_candidates(self) -> int:
        """Size of the corpus, without row 0."""
        return len(self.counts) - 1


def sampling_probability(counts: np.ndarray, alpha: float) -> np.ndarray:
    """Computes p(c) proportional to counts(c)^alpha over the corpus; row 0 is never drawn.

    alpha = 0 is uniform over every candidate, clicked or not; alpha = 1 is the distribution of
    in-batch negatives; .75 lies between (word2vec; Mikolov et al. 2013).

    Example:
        >>> sampling_probability(np.array([0, 16, 1, 0]), alpha=0.75)
        array([0.        , 0.88888889, 0.11111111, 0.        ])
    """
    # 0^0 is 1, as intended: uniform draws include items without a click.
    mass = np.power(np.asarray(counts, np.float64), alpha)
    mass[0] = 0.0
    return mass / mass.sum()


class Negatives(Protocol):
    """A kind of negative that the rows of a batch share.

    Your own kind needs only these two methods: log_q of every column is then right, whatever other
    kinds are in the mixture (see `negatives/log_q.py`). `tfrs_pipeline.testing.check_draws` checks
    that the second method says what the first one does.

    Example:
        The newest items, each with the same chance. Rows follow the ids, and ids the time here:

        >>> class Newest:
        ...     def draw(self, frame, positive_rows, seed):
        ...         last = frame.num_candidates
        ...         return tf.random.stateless_uniform([64], seed, last - 9, last + 1, tf.int32)
        ...
        ...     def expected_count(self, frame):
        ...         rows = np.arange(frame.num_candidates + 1)
        ...         return np.where(rows > frame.num_candidates - 10, 6.4, 0.0)
        >>> from tfrs_pipeline.negatives.log_q import Mixture
        >>> frame = SamplingFrame.of_counts(np.arange(31), batch_size=8)
        >>> log_q = Mixture([InBatch(), Newest()], frame).log_q
        >>> np.exp(log_q(tf.constant([20, 30]))).round(3)  # 7 * 20 / 465, and 7 * 30 / 465 + 6.4
        array([0.301, 6.852], dtype=float32)
    """

    def draw(self, frame: SamplingFrame, positive_rows: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Draws the candidates of one batch, in the graph, as a function of its arguments.

        Args:
            frame: The corpus and its distributions.
            positive_rows: [B] int32, the positives of the batch.
            seed: [2] int32, for stateless draws.

        Returns:
            [num] int32 candidate rows from 1; row 0 is never drawn. Repeats are allowed.
        """

    def expected_count(self, frame: SamplingFrame) -> np.ndarray:
        """Computes how many copies of each candidate `draw` is expected to return.

        Returns [num_candidates + 1] float64, 0 at row 0. If these are the rows' positives
        (`InBatch`), a row's own does not count.
        """


def build_alias_table(probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Builds an alias table of a distribution (Walker 1977), without a loop over rows.

    Slot i yields i with probability accept[i] and alias[i] otherwise, so that

        p(c) = ( accept[c] + sum over slots i with alias[i] = c of (1 - accept[i]) ) / num_rows.

    Example:
        >>> accept, alias = build_alias_table(np.array([0.25, 0.75]))
        >>> accept, alias
        (array([0.5, 1. ], dtype=float32), array([1, 1], dtype=int32))
    """
    probability = np.asarray(probability, np.float64)
    mass = probability * len(probability)
    # Rounding may leave no mass at 1 or above.
    is_large = mass >= min(1.0, mass.max())
    small, large = np.flatnonzero(~is_large), np.flatnonzero(is_large)
    # Small rows take what they lack from large ones, in order. Think of all lacking and all spare
    # mass as two lines side by side: a small row takes from the large row beside its start. If it
    # ends beyond that large row, the large row has given too much and takes it from the next one.
    lacking, spare = np.cumsum(1 - mass[small]), np.cumsum(mass[large] - 1)
    alias = np.arange(len(mass), dtype=np.int32)
    begins = np.append(0.0, lacking[:-1])[: len(small)]
    donor = np.searchsorted(spare, begins, side="right")
    # Spare and lacking mass are equal up to rounding, which must not reach beyond the last row.
    alias[small] = large[np.minimum(donor, len(large) - 1)]
    last = np.searchsorted(lacking, spare)  # The row that takes more than the large one has.
    gives_too_much = (last < len(small)) & (np.arange(len(large)) < len(large) - 1)
    accept = np.minimum(mass, 1.0)
    overdrawn = np.append(lacking, np.inf)[last] - spare  # Beyond what each large row has.
    accept[large] = np.where(gives_too_much, 1 - overdrawn, 1.0)
    alias[large[:-1]] = np.where(gives_too_much[:-1], large[1:], large[:-1])
    return accept.astype(np.float32), alias


class AliasSampler:
    """Draws candidate rows from a distribution (see `build_alias_table`), with replacement."""

    # An inverse CDF in float32 would give the tail of a large corpus probability zero.
    # Thresholds have steps of 2^-23: rows with a mass p(c) V near that are drawn coarsely. Powers
    # of clicks up to 1 stay well above it with fewer than a million clicks per item.

    def __init__(self, probability: np.ndarray) -> None:
        accept, alias = build_alias_table(probability)
        with tf.init_scope():  # The constants must outlive the graph that first needs them.
            self._accept = tf.constant(accept)
            self._alias = tf.constant(alias)
        self._num_rows = len(accept)

    def sample(self, num: int, seed: tf.Tensor) -> tf.Tensor:
        """Draws [num] int32 rows; the seed, [2] int, is as in `tf.random.stateless_uniform`."""
        slot_seed, accept_seed = tf.unstack(tf.random.experimental.stateless_split(seed, 2))
        # int64: the remainder of a 32-bit draw would favour low slots by up to num_rows / 2^32.
        slot = tf.random.stateless_uniform(
            [num], slot_seed, minval=0, maxval=self._num_rows, dtype=tf.int64
        )
        keep = tf.random.stateless_uniform([num], accept_seed) < tf.gather(self._accept, slot)
        return tf.where(keep, tf.cast(slot, tf.int32), tf.gather(self._alias, slot))


@functools.lru_cache(maxsize=16)
def sampler_of(frame: SamplingFrame, alpha: float | None = None) -> AliasSampler:
    """Makes the sampler of counts^alpha, or without `alpha` of positives, once for all batches."""
    probability = frame.q_positive if alpha is None else sampling_probability(frame.counts, alpha)
    return AliasSampler(probability)


@dataclass(frozen=True)
class InBatch:
    """The other rows' positives: free, and drawn by popularity, p(c) ~ clicks(c)^1.

    Without the log_q correction they penalise popular items too much.
    """

    kind: Literal["in_batch"] = "in_batch"

    def draw(self, frame: SamplingFrame, positive_rows: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Returns the batch's positives, [B]; a row's own is masked as an accidental hit.

        An unknown item, row 0, fills a column that does not count. A short batch, such as a
        dataset's last, is padded with draws from q_positive, which keeps n(c) unchanged. A larger
        one raises a `tf.errors.InvalidArgumentError`.
        """
        if positive_rows.shape[0] == frame.batch_size:
            return positive_rows
        message = (
            f"The frame, and log_q with it, is for batches of {frame.batch_size} positives or "
            "fewer. Make a frame of the batch's size"
        )
        num_rows = tf.shape(positive_rows)[0]
        check = tf.debugging.assert_less_equal(num_rows, frame.batch_size, message)
        with tf.control_dependencies([check]):
            num_missing = frame.batch_size - num_rows
        return tf.concat([positive_rows, sampler_of(frame).sample(num_missing, seed)], axis=0)

    def expected_count(self, frame: SamplingFrame) -> np.ndarray:
        """Computes (B - 1) * q_positive(c), 0 at row 0, since a row meets the others' positives."""
        count = (frame.batch_size - 1) * frame.q_positive
        count[0] = 0.0
        return count


@checked
class Uniform:
    """`num` candidates per batch, 1 or more, all of the corpus equally likely, with replacement."""

    num: PositiveInt = 256
    kind: Literal["uniform"] = "uniform"

    def draw(self, frame: SamplingFrame, positive_rows: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Draws [num] candidate rows."""
        # int64: the remainder of a 32-bit draw would favour low rows by up to size / 2^32.
        rows = tf.random.stateless_uniform(
            [self.num], seed, minval=1, maxval=frame.num_candidates + 1, dtype=tf.int64
        )
        return tf.cast(rows, tf.int32)

    def expected_count(self, frame: SamplingFrame) -> np.ndarray:
        """Computes num / num_candidates for every candidate."""
        count = np.full(frame.num_candidates + 1, self.num / frame.num_candidates)
        count[0] = 0.0
        return count


@checked
class Popularity:
    """`num` candidates per batch, p(c) proportional to clicks(c)^alpha, with replacement.

    `alpha` is above 0; .75 is word2vec's, 1 draws like in-batch negatives. Items without a click
    are never drawn. A `ConfigError` if an argument is out of range.
    """

    num: PositiveInt = 256
    alpha: PositiveFloat = 0.75
    kind: Literal["popularity"] = "popularity"

    def draw(self, frame: SamplingFrame, positive_rows: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Draws [num] candidate rows."""
        return sampler_of(frame, self.alpha).sample(self.num, seed)

    def expected_count(self, frame: SamplingFrame) -> np.ndarray:
        """Computes num * p(c)."""
        return self.num * sampling_probability(frame.counts, self.alpha)


Pool: TypeAlias = tuple[Any, np.ndarray | None]
"""Lists of candidate rows, and the number of the list that each sample draws from, [num_samples].

None in place of the numbers means that there is one list for each sample, in their order.
"""


class HardNegatives(Protocol):
    """A kind of hard negatives: the candidates that a row's own columns are drawn from.

    Your own kind says which candidates a positive's hard negatives come from (`pools`) and how many
    columns of a row are drawn from each pool (`num`). Batches draw them, each candidate of a list
    with the same chance, mask what is never a negative of the row, and correct them (see
    `negatives/log_q.py`): log_q is right without any arithmetic of yours.

    What is never a negative: known positives, items that came after the training, and items that
    the user was shown and did not click. Only a kind with the attribute `allow_exposed`, True, may
    have the last ones, in a pool of the name "exposed" (see `samples/never_negatives.py`).

    Attributes:
        share: f in (0, 1), the share of the negatives' weight that hard negatives hold, in rows
            that have any.
        num: Columns drawn for each row from each pool, 1 or more.

    Example:
        Other items of the positive's category. Row 1 is the first item by id, and so on:

        >>> class SameCategory:
        ...     share, num = 0.05, 2
        ...
        ...     def __init__(self, categories):  # By candidate row; row 0 is in none.
        ...         self.categories = np.array([0, *categories])
        ...
        ...     def pools(self, samples):
        ...         lists = [[], *(np.flatnonzero(self.categories == c) for c in (1, 2))]
        ...         return {"category": (lists, self.categories[samples.candidate_rows])}
        >>> from tfrs_pipeline import HybridBatches, Samples, SinglePositives
        >>> samples = Samples.from_pairs([1, 2], [1, 4], num_queries=2, num_candidates=6)
        >>> examples = SinglePositives(samples, batch_size=2, history_length=4, seed=0)
        >>> hard = SameCategory([1, 1, 1, 2, 2, 2])
        >>> batch = HybridBatches(samples, examples, [Uniform(5)], hard=hard, seed=0).batch(0)
        >>> rows = zip(batch.candidate_row.numpy(), batch.hard.candidate_row.numpy())
        >>> all(set((drawn - 1) // 3) == {(positive - 1) // 3} for positive, drawn in rows)
        True
    """

    @property
    def share(self) -> float: ...  # noqa: D102

    @property
    def num(self) -> int: ...  # noqa: D102

    def pools(self, samples: Any) -> Mapping[str, Pool]:
        """Returns the candidates of each sample's hard negatives: one pool or more, by name.

        Called once. Pools of a row that have any negative left share f equally; a sample whose list
        is empty has no hard negatives. A batch copies its samples' lists, so keep them short: a
        hundred candidates are enough.

        Args:
            samples: The training samples (`tp.Samples`): `query_rows` and `candidate_rows` say
                the user and the item of each. Samples of a log also have `query_ids` and
                `candidate_ids`, whose methods `rows` and `rows_by_list` turn ids into rows.

        Returns:
            Name -> the lists, a sequence of vectors of candidate rows, and the number of each
            sample's list (see `Pool`).
        """


HardStage: TypeAlias = Literal["retrieved", "pre_ranked", "ranked", "exposed"]


def _split(stages: Any) -> Any:
    """Reads stages as typed after a flag, separated by commas."""
    return stages.split(",") if isinstance(stages, str) else stages


@checked
class FunnelLosers:
    """Items that lost in the positive's own request.

    The request is the user's events with its request_id or, without one, at its time. Stages have
    equal weight. Exposed items and known positives are left out. At most 100 losers of a stage,
    drawn at random, are kept for a positive.

    Attributes:
        share: f in (0, 1), share of the negatives' weight that hard negatives hold, in rows that
            have any. .5 is the rule of thumb; ablations found about .01 better.
        stages: Furthest stages that the losers reached: "retrieved" lost in pre-rank, "pre_ranked"
            lost in rank, "ranked" ended low in rank.
        num: Columns drawn for each row from its pool of a stage.
        bottom_share: For "ranked": the low part of the request's ranks, as a share in (0, 1].
        allow_exposed: Whether "exposed", items that were shown and not clicked, may be a stage.
            Ranking learns from them; this option measures what they do to retrieval.

    Raises:
        ConfigError: If "exposed" is a stage without `allow_exposed`, or `bottom_share` is given
            without "ranked".
    """

    share: Annotated[float, Field(gt=0, lt=1)] = 0.01
    stages: Annotated[Several[HardStage], BeforeValidator(_split)] = ("retrieved", "pre_ranked")
    num: PositiveInt = 4
    bottom_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    allow_exposed: bool = False
    kind: Literal["funnel"] = "funnel"

    def __post_init__(self) -> None:
        if "exposed" in self.stages and not self.allow_exposed:
            raise ValueError(
                "stages holds 'exposed'. An item that was exposed to a user and not clicked is "
                "never a negative of that user in retrieval: the funnel rated it highly enough to "
                "show it, and the missing click may be due to its position. It is for ranking. To "
                "see what such negatives do to retrieval, set allow_exposed."
            )
        if "ranked" not in self.stages and self.bottom_share != FunnelLosers.bottom_share:
            raise ValueError(
                "bottom_share chooses among items of the stage 'ranked'. Add that stage, or leave "
                f"bottom_share out. Received: {self.bottom_share}, stages {self.stages!r}"
            )

    def pools(self, samples: Any) -> dict[str, Pool]:
        """Returns the losers of each stage that the samples hold, one list for each sample.

        Raises a `DataError` if no sample has one.
        """
        pools: dict[str, Pool] = {
            stage: (samples.hard_pools[stage], None)
            for stage in self.stages
            if stage in samples.hard_pools
        }
        if not any(len(losers.values) for losers, _ in pools.values()):
            ranked = "; a ranked one also needs a rank" if "ranked" in self.stages else ""
            raise DataError(
                f"model.hard asks for losers of the stages {', '.join(self.stages)}, and none of "
                f"{len(samples):,} positives has one. A loser has the positive's user and its "
                f"request_id, or without a request_id exactly its time{ranked}. If a click is "
                "logged later than its request, give request_id; or set model.hard to none."
            )
        return pools

    def of_stages(self, stages: Sequence[HardStage]) -> FunnelLosers:
        """Returns a copy with other stages; without "ranked", `bottom_share` is the default."""
        share = self.bottom_share if "ranked" in stages else FunnelLosers.bottom_share
        return replace(self, stages=stages, bottom_share=share)


def _refuse_subclass(kind: Any) -> Any:
    """Refuses a subclass, which would be read back from a file as the class itself."""
    if type(kind) not in SETTING_KINDS:
        raise ValueError(
            "is a subclass, which cannot be a setting; give your own kinds of negatives to "
            "TwoTower(negatives=[...], hard=...)"
        )
    return kind


# The kinds that settings, files and flags can name, each by its `kind`: a new one is added here.
_Easy = InBatch | Uniform | Popularity
_Hard = FunnelLosers
_READ = BeforeValidator(from_text), AfterValidator(_refuse_subclass)
SharedKind: TypeAlias = Annotated[_Easy, Field(discriminator="kind"), *_READ]
HardKind: TypeAlias = Annotated[_Hard, *_READ]
SETTING_KINDS: tuple[type, ...] = (*typing.get_args(_Easy), _Hard)
