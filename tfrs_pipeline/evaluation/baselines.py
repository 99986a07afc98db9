"""Baselines that a model has to beat: popularity, repeats, transitions, ItemKNN, EASE, iALS.

A baseline is one class: settings, a `fit` that returns a retriever and does not change the
baseline, and what a run, its verdict and its advice need to know. `BASELINES` lists those that
settings can name.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

import ibis
import numpy as np
import scipy.sparse
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from scipy.linalg import lapack
from threadpoolctl import threadpool_limits

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import Exclude
from tfrs_pipeline.data.split import in_order, num_in_share
from tfrs_pipeline.evaluation.interactions import (
    Interactions,
    Sequences,
    below_one,
    history_columns,
    history_matrix,
)
from tfrs_pipeline.retrieval import Excluded, Query, Retrieved, Retriever, check_asked
from tfrs_pipeline.search.topk import ScoreRetriever, best_places
from tfrs_pipeline.settings import checked

if TYPE_CHECKING:
    from implicit.cpu.als import AlternatingLeastSquares


@dataclass(frozen=True)
class Baseline:
    """What a model has to beat: a subclass has a label and the method `fit`.

    A `ValueError` says why it cannot be fitted to a log; a run leaves it out then.

    Attributes:
        label: Its name in sentences.

    Example:
        A baseline of your own, in a run with `--evaluation.baselines ... alphabet`::

            class Alphabet(Baseline):
                label = "the first letters"

                def fit(self, train):
                    return MyRetriever(sorted(train.items["item_id"].to_list()))


            BASELINES["alphabet"] = Alphabet
    """

    label: ClassVar[str]

    @classmethod
    def forms(cls, *, seed: int, by_time: bool, exclude: Exclude) -> Sequence[Self]:
        """Returns the forms from which validation chooses; none if nothing is left to find.

        `by_time` says that the test is later in time, `exclude` what rankings leave out.
        """
        return [cls()]

    def fit(self, train: Log) -> Retriever:
        """Fits it to the positives of a log."""
        raise NotImplementedError


# Shares of the latest positives by which popularity is counted in a split by time: for a test on
# later days, recent popularity may be a better guess.
_LATEST = (1.0, 0.2, 0.05, 0.01)


@checked
class MostPopular(Baseline):
    """Retrieves the same candidates for everyone: those with the most users in training.

    `latest` in (0, 1] is the share of the latest positives, by timestamp, whose users are counted;
    the users of all positives break ties, and then what else these clicked. Set it below 1 for logs
    whose items come and go. A `ValueError` if it is out of range.

    Example:
        >>> import pyarrow as pa
        >>> log = Log.from_table(pa.table({"user_id": [1, 2, 2], "item_id": ["b", "b", "a"]}))
        >>> MostPopular().fit(log).retrieve([{"user_id": 7}], k=1)[0]
        array([['b']], dtype=object)
    """

    latest: Annotated[float, Field(gt=0, le=1)] = 1.0

    label = "popularity"

    @classmethod
    def forms(cls, *, seed: int, by_time: bool, exclude: Exclude) -> Sequence[Self]:
        """Returns several shares of the latest positives for a test on later days."""
        return [cls(latest) for latest in (_LATEST if by_time else (1.0,))]

    def fit(self, train: Log | Interactions) -> "FittedPopularity":
        """Counts the users of each candidate of a log, or of interactions.

        A `ValueError` if `latest` is below 1 without timestamps; interactions have none.
        """
        whole = Interactions.of(train)
        items, counts = whole.items, whole.popularity
        if self.latest < 1:
            if isinstance(train, Interactions):
                raise ValueError("latest needs times, which interactions lack: fit it to a log.")
            latest = Interactions.of(train, _latest(train.positives(), self.latest))
            counts = latest.counts + below_one(counts)
        return FittedPopularity(items, counts)


class FittedPopularity:
    """What `MostPopular.fit` returns; `counts` are [num_items], the order of the ranking."""

    def __init__(self, items: Ids, counts: np.ndarray) -> None:
        self.items, self.counts = items, counts
        self._order = np.argsort(-counts, kind="stable").astype(np.int32) + 1

    def retrieve(self, queries: Sequence[Query], k: int, exclude: Excluded = None) -> Retrieved:
        """Retrieves the k most popular; see `Retriever.retrieve`. Queries may lack a history."""
        check_asked(queries, k, exclude, ids_are_text=self.items.are_text)
        rows = np.zeros((len(queries), k), np.int32)
        lists = self.items.rows_by_list([()] * len(queries) if exclude is None else exclude)
        for row, excluded in zip(rows, lists, strict=True):
            # At least k of the k + |excluded| most popular are not excluded.
            top = self._order[: k + len(excluded)]
            top = top[~np.isin(top, excluded)][:k]
            row[: len(top)] = top
        scores = np.where(rows > 0, self.counts[rows - 1], -np.inf)
        return self.items.take(rows), scores.astype(np.float32)


@checked
class Repeats(Baseline):
    """Retrieves the user's history, the most frequent items first, then the latest, then others.

    For services whose users return to the same items. If rankings exclude these, it equals
    `MostPopular`.

    Example:
        >>> import pyarrow as pa
        >>> log = Log.from_table(pa.table({"user_id": [1, 2, 2], "item_id": ["c", "c", "b"]}))
        >>> Repeats().fit(log).retrieve([{"history": ["b", "b", "x"]}], k=2)[0]
        array([['b', 'c']], dtype=object)
    """

    label = "the user's own items again"

    @classmethod
    def forms(cls, *, seed: int, by_time: bool, exclude: Exclude) -> Sequence[Self]:
        """Returns none if rankings exclude what their user had: nothing is left to repeat."""
        return [cls()] if exclude == "none" else []

    def fit(self, train: Log | Interactions) -> ScoreRetriever:
        """Counts the users of each candidate of a log, or of interactions."""
        train = Interactions.of(train)
        popular = below_one(train.popularity)

        def score(queries: Sequence[Query]) -> np.ndarray:
            scores = np.tile(popular, (len(queries), 1))
            for line, history in zip(scores, history_columns(queries, train.items), strict=True):
                # Reversed, so that `since` counts the items after its last occurrence.
                items, since, num = np.unique(history[::-1], return_index=True, return_counts=True)
                line[items] = 1 + num - (1 + since) / (1 + len(history))
            return scores

        return ScoreRetriever(train.items, score)


# Weight decay per position after the item.
_DECAY = 0.8
# What followed the item before the last one counts this much: docs/archive/tried.md.
_BEFORE = 0.3


@checked
class Transitions(Baseline):
    """Retrieves what came next after the last two items of the history; then popular items.

    score(j) = (n_ij + .3 n_hj + m p_j) / (n_i + .3 n_h + m), the mean of a Dirichlet posterior: i
    is the last known item of the history and h the one before it, n_ij how often j came next in a
    user's training positives, n_i their sum, p_j the item's share of the distinct pairs of user and
    item, and m the prior's size. Positives of one request do not follow each other; all follow the
    positives before the request. The same holds for positives at one time, if the log's rule for
    ties is "drop". Of equal scores, the more popular item comes first.

    The `prior` is m, above 0: an item with 1% of the pairs counts as m / 100 transitions. The
    `window` is how many of the next positives count as coming next, 1 or more: the first as 1, each
    further one as .8 of the one before. A window above 1 helps where transitions are few. A
    `ValueError` if one of the two is out of range.

    Example:
        >>> import pyarrow as pa
        >>> clicks = {"user_id": [1, 1, 2, 2, 3, 4], "item_id": ["a", "b", "a", "b", "c", "c"]}
        >>> fitted = Transitions().fit(Log.from_table(pa.table(clicks)))
        >>> fitted.retrieve([{"history": ["c", "a"]}, {"history": ["b"]}], k=2)[0]
        array([['b', 'a'],
               ['a', 'b']], dtype=object)
    """

    prior: PositiveFloat = 100.0
    window: PositiveInt = 3

    label = "item-to-item transitions"

    def fit(self, train: Log | Sequences) -> ScoreRetriever:
        """Counts the transitions of a log, or of sequences; a `ValueError` if it has no order."""
        if not isinstance(train, Sequences):
            train = Sequences.from_log(train)
        items, rows = train.items, train.item_rows
        # The prior: popular items are likely to come next after anything.
        clicked = Interactions.from_rows(items, train.users, rows)
        popular = self.prior * clicked.counts / max(1, clicked.counts.sum())
        # Of equal scores, the first column wins: the more popular item, whatever its id.
        order = np.argsort(-clicked.popularity, kind="stable")
        # Row 0, which is empty, is for histories without a known item.
        shape = (1 + len(items), len(items))
        num = scipy.sparse.csr_matrix(shape, dtype=np.float32)
        for i in range(self.window):
            position = train.earlier(1 + i)
            is_there = position >= 0  # False for the first positives of a user.
            pair = rows[position[is_there]], rows[is_there] - 1
            weight = np.full(len(pair[0]), _DECAY**i, np.float32)
            num += scipy.sparse.csr_matrix((weight, pair), shape)
        num_all = num.sum(axis=1).A1  # n_i of each item, 0 for the empty row.

        def score(queries: Sequence[Query]) -> np.ndarray:
            histories = history_columns(queries, items)
            last, before = (
                np.array(
                    [1 + history[-i] if len(history) >= i else 0 for history in histories], np.int64
                )
                for i in (1, 2)
            )
            total = num_all[last] + _BEFORE * num_all[before] + popular.sum()
            scores = (num[last] + _BEFORE * num[before]).toarray() + popular
            return (scores / np.maximum(total, 1e-12)[:, np.newaxis])[:, order]

        return ScoreRetriever(Ids(items.values[order]), score)


# Most pairs of items that `ItemKnn` counts at a time, which bounds memory, and in all, which bounds
# time: a user with n items has n * n.
_PAIRS_PER_BLOCK = 1 << 23
_MAX_PAIRS = 1 << 28
# Most neighbors that all items together keep: 400 MB while they are collected.
_MAX_NEIGHBORS = 1 << 25


@checked
class ItemKnn(Baseline):
    """ItemKNN: retrieves the items that have most users in common with the history; then popular.

    score(j) = sum over the history's items i of decay^(items after i) s_ij, with

        s_ij = n_ij / (n_i^alpha n_j^(1 - alpha) + shrinkage),

    n_ij the users of both items, n_i those of one. A user of n items counts 1 / sqrt(n), because
    who has clicked much says less about each pair. With alpha of .5 this is the cosine of two items
    if nothing is shrunk; above, popular items of the history count less, and popular candidates are
    found more often. With `bm25`, instead, whatever alpha and the shrinkage are,

        s_ij = sum over the users u of both of idf_u^2 b_i b_j, where idf_u = ln(N / (1 + n_u)) with
        n_u items of N, and b_i = 101 / (1 + 100 (.2 + .8 n_i / mean n)).

    Each candidate keeps its `num_neighbors` items of highest s_ij. An item is
    its own neighbor only with `own_items`, for rankings that do not exclude clicked items.
    Candidates without a neighbor in the history follow the others, with scores from -1 to 0.

    Time and memory are bounded. The longest users are left out while the squares of the users'
    numbers of items sum to more than 2^28, and a corpus of n items keeps at most 2^25 / n neighbors
    a candidate, which is fewer than `num_neighbors` above 335,000 items.

    `alpha` in [0, 1], `shrinkage` 0 or more, `decay` in (0, 1], `num_neighbors` 1 or more; a
    `ValueError` if one is out of range.

    Reference: Ferrari Dacrema et al. 2021, A Troubling Analysis of Reproducibility and Progress in
    Recommender Systems Research; there, ItemKNN is hard to beat.

    Example:
        >>> import pyarrow as pa
        >>> clicks = {"user_id": [1, 1, 2, 2, 3], "item_id": ["a", "b", "a", "b", "c"]}
        >>> fitted = ItemKnn().fit(Log.from_table(pa.table(clicks)))
        >>> fitted.retrieve([{"history": ["a"]}], k=1, exclude=[["a"]])[0]
        array([['b']], dtype=object)
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.7
    shrinkage: NonNegativeFloat = 2.0
    decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    num_neighbors: PositiveInt = 100
    own_items: bool = False
    bm25: bool = False

    label = "ItemKNN"

    @classmethod
    def forms(cls, *, seed: int, by_time: bool, exclude: Exclude) -> Sequence[Self]:
        """Returns three decays with two shrinkages, or, if nothing is excluded, also own items.

        And the same decays with BM25's weights.
        """
        own = exclude == "none"
        choices = [(2.0, False, False), (2.0 if own else 8.0, own, False), (0.0, own, True)]
        return [
            cls(shrinkage=shrinkage, decay=decay, own_items=own_items, bm25=bm25)
            for shrinkage, own_items, bm25 in choices
            for decay in (0.7, 0.9, 1.0)
        ]

    def fit(self, train: Log | Interactions) -> ScoreRetriever:
        """Finds each candidate's neighbors in a log, or in interactions."""
        train = Interactions.of(train)
        num_items = len(train.items)
        clicked = _without_longest(train.matrix, _MAX_PAIRS)
        lengths = np.diff(clicked.indptr)
        weighted = clicked.copy()
        weighted.data = np.repeat(lengths**-0.5, lengths).astype(np.float32)
        num_users = np.maximum(weighted.sum(axis=0).A1, 1e-12)  # Not 0, for items without a user.
        history_scale, candidate_scale = num_users**self.alpha, num_users ** (1 - self.alpha)
        if self.bm25:
            idf = np.log(max(1, num_items) / (1 + lengths))
            weighted.data = np.repeat(idf**2, lengths).astype(np.float32)
            share = train.counts / max(train.counts.mean(), 1e-12)
            history_scale = candidate_scale = (1 + 100 * (0.2 + 0.8 * share)) / 101
        shrinkage = 0.0 if self.bm25 else self.shrinkage
        num_kept = max(1, min(self.num_neighbors, _MAX_NEIGHBORS // max(1, num_items)))
        users_by_item = clicked.T.tocsr()
        parts = [(np.empty(0, np.float32), np.empty(0, np.int32), np.empty(0, np.int32))]
        for start, stop in _blocks(users_by_item @ lengths, _PAIRS_PER_BLOCK):
            shared = users_by_item[start:stop] @ weighted  # n_ij: [stop - start, num_items].
            shared.sort_indices()  # So that the smaller row wins a tie.
            candidates = np.repeat(np.arange(start, stop, dtype=np.int32), np.diff(shared.indptr))
            scale = candidate_scale[candidates] * history_scale[shared.indices] + shrinkage
            similarity = (shared.data / scale).astype(np.float32)
            is_kept = np.full(len(similarity), True)
            if not self.own_items:
                is_kept = candidates != shared.indices
                similarity[~is_kept] = -np.inf
            for row in np.flatnonzero(np.diff(shared.indptr) > num_kept):
                low, high = shared.indptr[row : row + 2]
                is_kept[low:high] = False
                is_kept[low + best_places(similarity[low:high], num_kept)] = True
            parts.append((similarity[is_kept], shared.indices[is_kept], candidates[is_kept]))
        values, neighbors, candidates = map(np.concatenate, zip(*parts, strict=True))
        shape = (num_items, num_items)
        # Row i has s_ij of every candidate j that keeps i.
        similar = scipy.sparse.csr_matrix((values, (neighbors, candidates)), shape)
        # Candidates without a neighbor in the history follow those with one.
        popular = (below_one(train.popularity) - 1).astype(np.float32)

        def score(queries: Sequence[Query]) -> np.ndarray:
            histories = history_columns(queries, train.items)
            lengths = [len(history) for history in histories]
            recency = [self.decay ** np.arange(length)[::-1] for length in lengths]
            data = np.concatenate([*recency, np.empty(0)]).astype(np.float32)
            columns = np.concatenate([*histories, np.empty(0, np.int32)])
            table = data, columns, np.cumsum([0, *lengths])
            weights = scipy.sparse.csr_matrix(table, (len(queries), num_items))
            sums = (weights @ similar).toarray()
            return np.where(sums > 0, sums, popular)

        return ScoreRetriever(train.items, score)


@checked
class Ease(Baseline):
    """EASE: a linear autoencoder of histories, solved in closed form; strong if it fits in memory.

    B = argmin ||X - X B||^2 + l2 ||B||^2 with a zero diagonal, from P = (X'X + l2 I)^-1 as
    B_ij = -P_ij / P_jj. A candidate's score is the sum of its weights over the history. Good values
    of l2, above 0, grow with the number of users. A corpus above `max_candidates` is refused
    (`ValueError`), and so is one that free memory cannot hold (`MemoryError`): memory grows with
    its square, time with its cube.

    Reference: Steck 2019, Embarrassingly Shallow Autoencoders for Sparse Data.
    """

    l2: PositiveFloat = 200.0
    max_candidates: int = field(default=20_000, kw_only=True, repr=False)

    label = "EASE"

    def fit(self, train: Log | Interactions) -> ScoreRetriever:
        """Solves for the item-to-item weights.

        Raises a `ValueError` if the corpus is too large, a `MemoryError` if memory is too small.
        """
        train = Interactions.of(train)
        num_candidates = len(train.items)
        num_bytes = 8 * num_candidates**2
        size = (
            f"EASE inverts a matrix of all pairs of items: {num_candidates:,} take "
            f"{num_bytes / 1e9:.1f} GB of memory"
        )
        if num_candidates > self.max_candidates:
            raise ValueError(
                f"{size}, and max_candidates is {self.max_candidates:,}. Use Ials, or raise it."
            )
        if num_bytes > (num_free := memory_left()):
            raise MemoryError(f"{size}, and {num_free / 1e9:.1f} GB are free. Use Ials.")
        weights = _ease_weights(train.matrix.astype(np.float64), self.l2)
        return _by_product(train, lambda histories: histories @ weights)


@checked
class Ials(Baseline):
    """Implicit ALS: matrix factorization of all cells, with clicked ones weighted by `alpha`.

    The user's factors are computed from the query's history, so that new users and new clicks need
    no new fit. `regularization` (L2 on both sides' factors, 0 or more) and `alpha` (cells that were
    not clicked have the weight 1) matter most, and must fit together: the defaults suit about a
    thousand users. `num_factors` is the size of the embeddings, `num_iterations` counts the
    alternations; 0 as `num_threads` uses every core. A `ValueError` if an argument is out of range.

    Reference: Hu, Koren and Volinsky 2008, Collaborative Filtering for Implicit Feedback Datasets;
    the solver is that of the library `implicit`.
    """

    num_factors: PositiveInt = 128
    regularization: NonNegativeFloat = 30.0
    alpha: PositiveFloat = 6.0
    num_iterations: PositiveInt = field(default=15, kw_only=True, repr=False)
    seed: int = field(default=0, kw_only=True, repr=False)
    num_threads: int = field(default=0, kw_only=True, repr=False)

    label = "iALS"

    @classmethod
    def forms(cls, *, seed: int, by_time: bool, exclude: Exclude) -> Sequence[Self]:
        """Returns one form, which starts from the run's seed."""
        return [cls(seed=seed)]

    def fit(self, train: Log | Interactions) -> ScoreRetriever:
        """Factorizes the positives of a log, or interactions."""
        train = Interactions.of(train)
        model = self.factorize(train)

        def score(histories: scipy.sparse.csr_matrix) -> np.ndarray:
            factors = model.recalculate_user(np.arange(histories.shape[0]), histories)
            return factors @ model.item_factors.T

        return _by_product(train, score)

    def factorize(self, train: Interactions) -> "AlternatingLeastSquares":
        """Returns the fitted model of the library; `item_factors` is [num_items, D] float32."""
        # The CPU class, because the library's factory would use a GPU if there is one. Imported
        # here because it takes a second, and the other baselines do not need it.
        from implicit.cpu.als import AlternatingLeastSquares

        # The library warns that its threads and those of BLAS would compete for the cores.
        with threadpool_limits(1, "blas"):
            model = AlternatingLeastSquares(
                factors=self.num_factors,
                regularization=self.regularization,
                alpha=self.alpha,
                iterations=self.num_iterations,
                random_state=self.seed,
                num_threads=self.num_threads,
            )
            # It draws a start for each row, so the order of rows may not depend on names.
            users, items = map(np.argsort, train.rarity)
            matrix = train.matrix[users][:, items]
            matrix.sort_indices()
            model.fit(matrix, show_progress=False)
        model.item_factors = model.item_factors[np.argsort(items)]
        return model


BASELINES: dict[str, type[Baseline]] = {
    "popularity": MostPopular,
    "repeats": Repeats,
    "transitions": Transitions,
    "itemknn": ItemKnn,
    "ease": Ease,
    "ials": Ials,
}
"""The baselines that settings can name. Add your own before you use it."""


def memory_left(proc: Path = Path("/proc"), group: Path = Path("/sys/fs/cgroup")) -> float:
    """Returns how many bytes processes may still take, of the machine's or the container's.

    Infinity if the system does not say.
    """
    left = math.inf
    with contextlib.suppress(OSError, IndexError):
        left = 1024 * _number("MemAvailable: *", proc / "meminfo")
    with contextlib.suppress(OSError, IndexError):  # No container, or one without a limit.
        cached = _number("^inactive_file ", group / "memory.stat")  # Given back when needed.
        used = _number("", group / "memory.current") - cached
        left = min(left, _number("^", group / "memory.max") - used)
    return left


def _number(before: str, path: Path) -> int:
    """Finds the number after a pattern in a file of the system; an `IndexError` without one."""
    return int(re.findall(rf"{before}(\d+)", path.read_text(), re.MULTILINE)[0])


def _by_product(
    train: Interactions, score: Callable[[scipy.sparse.csr_matrix], np.ndarray]
) -> ScoreRetriever:
    """Scores histories as rows of a matrix; those without a trained item get the counts."""

    def or_popular(queries: Sequence[Query]) -> np.ndarray:
        histories = history_matrix(queries, train.items)
        scores = score(histories)
        # Their own scores are all equal, and would rank items by their ids.
        scores[histories @ (train.counts > 0) == 0] = train.popularity
        return scores

    return ScoreRetriever(train.items, or_popular)


def _latest(positives: ibis.Table, share: float) -> ibis.Table:
    """Keeps the latest share of the positives, with all that tie with the earliest of them."""
    if "timestamp" not in positives.columns:
        raise ValueError(
            f"latest={share:g} chooses positives by their timestamps, and the log has none. "
            "Count all: latest=1."
        )
    # By number, not by time: a share of the positives is what the user asked for.
    num, time_of = in_order(positives.select("timestamp"))
    if not num:
        return positives
    num_latest = max(1, num_in_share(share, num))
    return positives.filter(positives["timestamp"] >= time_of(num - num_latest))


def _without_longest(matrix: scipy.sparse.csr_matrix, max_pairs: int) -> scipy.sparse.csr_matrix:
    """Leaves out the users (rows) with most items.

    The squares of the others' numbers of items sum to `max_pairs` at most.
    """
    lengths = np.diff(matrix.indptr).astype(np.int64)
    order = np.argsort(lengths, kind="stable")
    return matrix[np.sort(order[np.cumsum(lengths[order] ** 2) <= max_pairs])]


def _blocks(work: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Yields start and stop of blocks of [n] amounts of work, of `most` in all or one amount."""
    ends, start = np.cumsum(work), 0
    while start < len(work):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + most, "right")))
        yield start, stop
        start = stop


def _ease_weights(interactions: scipy.sparse.csr_matrix, l2: float) -> np.ndarray:
    """Solves for EASE's B, [num_candidates, num_candidates] float32, in 8 bytes a cell."""
    num_candidates = interactions.shape[1]
    gram = np.empty((num_candidates, num_candidates), order="F")
    columns = interactions.tocsc()
    # In blocks of columns, because the sparse product of all would take as much memory again.
    for start in range(0, num_candidates, 1024):
        block = slice(start, start + 1024)
        gram[:, block] = (columns.T @ columns[:, block]).toarray()
    gram[np.diag_indices_from(gram)] += l2
    # Cholesky in place takes a third of the work of a general inverse, and no copies. It fills only
    # the lower triangle, which is the upper one of the transpose. One thread, because SciPy's
    # OpenBLAS (0.3.30) with more crashes from about 16,000 rows on.
    with threadpool_limits(1, "blas"):
        factor, factor_failed = lapack.dpotrf(gram, lower=True, clean=False, overwrite_a=True)
        precision, inverse_failed = lapack.dpotri(factor, lower=True, overwrite_c=True)
    if factor_failed or inverse_failed:
        raise ValueError(f"EASE's matrix is not positive definite with l2={l2}: use a larger l2.")
    diagonal = np.diag(precision).astype(np.float32)
    # Rounded within its own memory, where a row of the result never lies behind its source.
    rows = precision.T.reshape(-1).view(np.float32)[: precision.size]
    weights = rows.reshape(precision.shape)
    for row, values in zip(weights, precision.T, strict=True):
        row[:] = values.astype(np.float32)
    # Copied a column at a time: a transposed copy would be a third matrix of this size.
    for i in range(num_candidates):
        weights[i + 1 :, i] = weights[i, i + 1 :]
    weights /= -diagonal
    np.fill_diagonal(weights, 0.0)
    return weights
