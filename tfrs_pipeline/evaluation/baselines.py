"""Baselines that a model has to pass: popularity, the user's own items, EASE, implicit ALS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import ibis
import numpy as np
import scipy.sparse
from scipy.linalg import lapack
from threadpoolctl import threadpool_limits

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.log import Log, check_log
from tfrs_pipeline.data.split import in_order, num_in_share
from tfrs_pipeline.evaluation.topk import exclude_rows_of, retrieve_by_scores
from tfrs_pipeline.retrieval import Excluded, Query, Retrieved, check_asked
from tfrs_pipeline.samples.positives import Positives


@dataclass(frozen=True)
class Interactions:
    """Which users clicked which items in training: what baselines are fitted on.

    The matrix is [num_users, num_items] float32 of 0 and 1; the item of row r has column r - 1.
    """

    items: Ids
    matrix: scipy.sparse.csr_matrix

    @classmethod
    def from_rows(cls, items: Ids, user_rows: np.ndarray, item_rows: np.ndarray) -> Interactions:
        """Makes them from pairs; repeats count once, users without a pair are dropped.

        User rows are whole numbers, 0 or more, item rows are of `items`, from 1. A `ValueError` if
        the two differ in length, or an item is not of the corpus.

        Example:
            >>> items = Ids([10, 20, 30])
            >>> rows = items.rows([10, 10, 20])
            >>> Interactions.from_rows(items, np.array([7, 7, 9]), rows).matrix.toarray()
            array([[1., 0., 0.],
                   [0., 1., 0.]], dtype=float32)
        """
        if len(user_rows) != len(item_rows):
            raise ValueError(
                "user_rows and item_rows must be columns of one table. "
                f"Received: {len(user_rows)} and {len(item_rows)} rows."
            )
        _check_candidates(item_rows, "events are of items")
        shape = (int(user_rows.max(initial=-1)) + 1, len(items))
        matrix = _zero_one_matrix(user_rows, item_rows, shape)
        return cls(items, matrix[np.diff(matrix.indptr) > 0])

    @classmethod
    def from_log(cls, log: Log) -> Interactions:
        """Collects the positives of a log; its items, in the order of their ids, are the corpus."""
        items = _items_of(log)
        pairs = Positives.select(log.events).select("user_id", "item_id").distinct()
        pairs = pairs.order_by("user_id").to_pyarrow()
        users = pairs["user_id"].combine_chunks().dictionary_encode().indices
        return cls.from_rows(items, users.to_numpy(), items.rows(pairs["item_id"].to_numpy()))


def _items_of(log: Log) -> Ids:
    return Ids(log.items.select("item_id").order_by("item_id").to_pyarrow()["item_id"].to_numpy())


def _count_users(positives: ibis.Table, items: Ids) -> np.ndarray:
    """Counts the users of each item among positives: [num_items] int64."""
    found = positives.group_by("item_id").agg(num=positives["user_id"].nunique()).to_pyarrow()
    rows = items.rows(found["item_id"].to_numpy())
    _check_candidates(rows, "clicked items are items")
    counts = np.zeros(len(items), np.int64)
    counts[rows - 1] = found["num"].to_numpy()
    return counts


def _check_candidates(item_rows: np.ndarray, what: str) -> None:
    """Refuses (`ValueError`) rows of items that are not in the corpus, which are 0."""
    if num_unknown := np.count_nonzero(item_rows < 1):
        raise ValueError(
            f"{num_unknown} of {len(item_rows)} {what} that are not candidates. "
            "Drop them, or add the items."
        )


def _latest(positives: ibis.Table, share: float) -> ibis.Table:
    """Keeps a share of the positives, the last ones, and all of the time of the first of them."""
    if "timestamp" not in positives.columns:
        raise ValueError(
            f"The latest {share:g} of the positives are told by their timestamps, and the log has "
            "none. Count all: latest=1."
        )
    num, time_of = in_order(positives.select("timestamp"))
    if not num:
        return positives
    num_latest = max(1, num_in_share(share, num))
    return positives.filter(positives["timestamp"] >= time_of(num - num_latest))


@dataclass(eq=False)
class MostPopular:
    """The same candidates to everyone: those with the most users in training.

    Args:
        latest: Share of the positives, the latest by their timestamps, whose users are counted;
            the users of all positives break ties. Below 1 for logs whose items come and go.

    Raises:
        ValueError: If `latest` is not in (0, 1].

    Example:
        >>> train = Interactions.from_rows(
        ...     Ids(["a", "b"]), np.array([0, 1, 1]), np.array([2, 2, 1])
        ... )
        >>> MostPopular().fit(train).retrieve([{"user_id": 7}], k=1)[0]
        array([['b']], dtype=object)
    """

    latest: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.latest <= 1:
            raise ValueError(f"latest must be in (0, 1]. Received: {self.latest}.")

    def fit(self, train: Log | Interactions) -> MostPopular:
        """Counts the users of each candidate of a log, or of interactions.

        A `ValueError` if `latest` is below 1 and there are no timestamps; interactions have none.
        """
        if isinstance(train, Interactions):
            if self.latest < 1:
                raise ValueError("latest needs times, which interactions lack: fit it to a log.")
            self.items, self.counts = train.items, _num_users(train)
        else:
            check_log(train)
            positives = Positives.select(train.events)
            self.items = _items_of(train)
            self.counts = _count_users(positives, self.items)
            if self.latest < 1:
                late = _count_users(_latest(positives, self.latest), self.items)
                self.counts = late + _below_one(self.counts)
        self._order = np.argsort(-self.counts, kind="stable").astype(np.int32) + 1
        return self

    def retrieve(self, queries: Sequence[Query], k: int, exclude: Excluded = None) -> Retrieved:
        """Retrieves the k most popular; see `Retriever.retrieve`. Queries may lack a history."""
        _require_fit(self)
        check_asked(queries, k, exclude, ids_are_text=self.items.are_text)
        excluded_rows = exclude_rows_of(self.items, exclude)
        rows = np.zeros((len(queries), k), np.int32)
        for i in range(len(queries)):
            excluded = () if excluded_rows is None else excluded_rows[i]
            # Of the k + |excluded| most popular, at least k are not excluded.
            top = self._order[: k + len(excluded)]
            top = top[~np.isin(top, excluded)][:k]
            rows[i, : len(top)] = top
        scores = np.where(rows > 0, self.counts[rows - 1], -np.inf)
        return self.items.take(rows), scores.astype(np.float32)


@dataclass(eq=False)
class Repeats:
    """The user's own items again, the most frequent first, of equals the latest; then popular ones.

    For services whose users come back to the same items. If these are excluded it is `MostPopular`.

    Example:
        >>> train = Interactions.from_rows(Ids(["a", "b", "c"]), np.array([0, 1]), np.array([3, 3]))
        >>> query = {"history": ["b", "a", "b", "a", "x"]}
        >>> Repeats().fit(train).retrieve([query], k=3)[0]
        array([['a', 'b', 'c']], dtype=object)
    """

    def fit(self, train: Log | Interactions) -> Repeats:
        """Counts the users of each candidate of a log, or of interactions."""
        train = _interactions(train)
        self.items, self.counts = train.items, _num_users(train)
        return self

    def retrieve(self, queries: Sequence[Query], k: int, exclude: Excluded = None) -> Retrieved:
        """Retrieves by history; see `Retriever.retrieve`. Without one, what `MostPopular` does."""
        _require_fit(self)
        return retrieve_by_scores(self._scores, self.items, queries, k, exclude)

    def _scores(self, queries: Sequence[Query]) -> np.ndarray:
        scores = np.tile(_below_one(self.counts), (len(queries), 1))
        for own, columns in zip(scores, _histories(queries, self.items), strict=True):
            # The latest first, so that the place of each is that of its last time.
            found, place, num = np.unique(columns[::-1], return_index=True, return_counts=True)
            own[found] = 1 + num - (1 + place) / (1 + len(columns))
        return scores


@dataclass(eq=False)
class Ease:
    """EASE: a linear autoencoder of histories, solved in closed form; strong where it fits memory.

    B = argmin ||X - X B||^2 + l2 ||B||^2 with a zero diagonal, from P = (X'X + l2 I)^-1 as
    B_ij = -P_ij / P_jj. A candidate's score is the sum of its weights over the history.

    Reference: Steck 2019, Embarrassingly Shallow Autoencoders for Sparse Data.

    Args:
        l2: Regularisation, above 0. Good values grow with the number of users.
        max_candidates: Refuse a larger corpus: memory grows with its square, time with its cube.

    Raises:
        ValueError: If l2 is not above 0.
    """

    l2: float = 200.0
    max_candidates: int = field(default=20_000, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        if self.l2 <= 0:
            raise ValueError(
                f"l2 must be above 0, or the matrix may be singular. Received: {self.l2}."
            )

    def fit(self, train: Log | Interactions) -> Ease:
        """Solves for the item-to-item weights of a log, or of interactions.

        Raises:
            ValueError: If the corpus is too large.
        """
        train = _interactions(train)
        num_candidates = len(train.items)
        if num_candidates > self.max_candidates:
            raise ValueError(
                f"EASE inverts a matrix of {num_candidates} x {num_candidates} candidates, "
                f"{num_candidates**2 * 12 / 1e9:.0f} GB of memory, and max_candidates is "
                f"{self.max_candidates}. Use Ials instead, or raise max_candidates."
            )
        self.items, self.counts = train.items, _num_users(train)
        self.weights = _ease_weights(train.matrix.astype(np.float64), self.l2)
        return self

    def retrieve(self, queries: Sequence[Query], k: int, exclude: Excluded = None) -> Retrieved:
        """Retrieves by history; see `Retriever.retrieve`. Without one, what `MostPopular` does."""
        _require_fit(self)
        return retrieve_by_scores(self._scores, self.items, queries, k, exclude)

    def _scores(self, queries: Sequence[Query]) -> np.ndarray:
        histories = history_matrix(queries, self.items)
        return _or_popular(histories @ self.weights, histories, self.counts)


@dataclass(eq=False)
class Ials:
    """Implicit ALS: matrix factorisation on every cell, clicked ones weighted by `alpha`.

    The user's factors are computed from the query's history, so that new users and new clicks need
    no new fit.

    Reference: Hu, Koren and Volinsky 2008, Collaborative Filtering for Implicit Feedback Datasets;
    the solver is the `implicit` library's.

    Args:
        num_factors: Size of the embeddings.
        regularization: L2 on both sides' factors, 0 or more. It and `alpha` matter most, and only
            together: the defaults suit about a thousand users.
        alpha: Weight of a clicked cell; any other has 1.
        num_iterations: Alternations.
        seed: Of the first factors.
        num_threads: 0 takes every core.

    Raises:
        ValueError: If an argument is out of range.
    """

    num_factors: int = 128
    regularization: float = 30.0
    alpha: float = 6.0
    num_iterations: int = field(default=15, kw_only=True, repr=False)
    seed: int = field(default=0, kw_only=True, repr=False)
    num_threads: int = field(default=0, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        if (
            min(self.num_factors, self.num_iterations) < 1
            or self.regularization < 0
            or self.alpha <= 0
        ):
            raise ValueError(
                "num_factors and num_iterations must be 1 or more, regularization 0 or more, "
                f"alpha above 0. Received: {self}, num_iterations={self.num_iterations}."
            )

    def fit(self, train: Log | Interactions) -> Ials:
        """Factorises the positives of a log, or interactions."""
        # The CPU class itself: the library's own factory takes a GPU when it sees one. Imported
        # here since it takes a second, and popularity and EASE do without it.
        from implicit.cpu.als import AlternatingLeastSquares

        train = _interactions(train)
        self.items, self.counts = train.items, _num_users(train)
        # Its threads and those of BLAS would fight over the cores; the library warns of it.
        with threadpool_limits(1, "blas"):
            self._model = AlternatingLeastSquares(
                factors=self.num_factors,
                regularization=self.regularization,
                alpha=self.alpha,
                iterations=self.num_iterations,
                random_state=self.seed,
                num_threads=self.num_threads,
            )
            self._model.fit(train.matrix, show_progress=False)
        return self

    def retrieve(self, queries: Sequence[Query], k: int, exclude: Excluded = None) -> Retrieved:
        """Retrieves by history; see `Retriever.retrieve`. Without one, what `MostPopular` does."""
        _require_fit(self)
        return retrieve_by_scores(self._scores, self.items, queries, k, exclude)

    def _scores(self, queries: Sequence[Query]) -> np.ndarray:
        histories = history_matrix(queries, self.items)
        factors = self._model.recalculate_user(np.arange(len(queries)), histories)
        return _or_popular(factors @ self._model.item_factors.T, histories, self.counts)


def _num_users(train: Interactions) -> np.ndarray:
    """Counts the users of each item."""
    return np.bincount(train.matrix.indices, minlength=len(train.items))


def _or_popular(
    scores: np.ndarray, histories: scipy.sparse.csr_matrix, counts: np.ndarray
) -> np.ndarray:
    """Gives queries without a trained item the counts as scores: by their own, all are tied."""
    scores[histories @ (counts > 0) == 0] = counts
    return scores


def _below_one(counts: np.ndarray) -> np.ndarray:
    """Scales whole counts so that they break the ties of others: float64 in [0, 1)."""
    return counts / (1.0 + counts.max(initial=0))


def history_matrix(queries: Sequence[Query], items: Ids) -> scipy.sparse.csr_matrix:
    """Marks the items of each history: [num_queries, num_items] float32 of 0 and 1.

    A `ValueError` if a query has no history.
    """
    histories = _histories(queries, items)
    rows = np.repeat(np.arange(len(queries)), [len(h) for h in histories])
    columns = np.concatenate([*histories, np.empty(0, np.int32)])
    return _zero_one_matrix(rows, columns + 1, (len(queries), len(items)))


def _histories(queries: Sequence[Query], items: Ids) -> list[np.ndarray]:
    """Looks up the known items of each history, a column each, oldest first."""
    for query in queries:
        if query.get("history") is None:
            raise ValueError(
                "This retriever works from query['history']: pass [] for a user without one. "
                f"Received a query with: {', '.join(map(repr, query)) or 'nothing'}."
            )
    histories = [items.rows(query["history"]) for query in queries]
    return [rows[rows > 0] - 1 for rows in histories]


def _zero_one_matrix(
    rows: np.ndarray, item_rows: np.ndarray, shape: tuple[int, int]
) -> scipy.sparse.csr_matrix:
    ones = np.ones(len(rows), np.float32)
    matrix = scipy.sparse.csr_matrix((ones, (rows, item_rows - 1)), shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix


def _interactions(train: Log | Interactions) -> Interactions:
    if isinstance(train, Interactions):
        return train
    check_log(train)
    return Interactions.from_log(train)


def _require_fit(retriever: MostPopular | Repeats | Ease | Ials) -> None:
    if not hasattr(retriever, "items"):
        raise ValueError(f"{type(retriever).__name__} is not fitted yet: call fit(train) first.")


def _ease_weights(interactions: scipy.sparse.csr_matrix, l2: float) -> np.ndarray:
    """Solves for EASE's B, [num_candidates, num_candidates] float32, in 12 bytes a cell."""
    num_candidates = interactions.shape[1]
    gram = np.empty((num_candidates, num_candidates), order="F")
    columns = interactions.tocsc()
    for start in range(0, num_candidates, 1024):
        block = slice(start, start + 1024)
        gram[:, block] = (columns.T @ columns[:, block]).toarray()
    gram[np.diag_indices_from(gram)] += l2
    # Cholesky in place: a third of the work of a general inverse and none of its copies. Only the
    # lower triangle is filled, which is the upper one of the transpose.
    factor, factor_failed = lapack.dpotrf(gram, lower=True, clean=False, overwrite_a=True)
    precision, inverse_failed = lapack.dpotri(factor, lower=True, overwrite_c=True)
    if factor_failed or inverse_failed:
        raise ValueError(f"EASE's matrix is not positive definite with l2={l2}: use a larger l2.")
    weights = precision.T.astype(np.float32)
    for i in range(num_candidates):
        weights[i + 1 :, i] = weights[i, i + 1 :]
    weights /= -np.diag(precision).astype(np.float32)
    np.fill_diagonal(weights, 0.0)
    return weights
