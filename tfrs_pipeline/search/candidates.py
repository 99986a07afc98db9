"""Search over candidates in memory: with an index or exactly, with exclusions and a filter.

Candidates can be added and removed while others search. A change writes rows that no search reads
yet, and then makes a new view. Each search keeps the view that it began with.
"""

import bisect
import itertools
import logging
import string
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np

from tfrs_pipeline.data.ids import Ids, as_id_array
from tfrs_pipeline.features.raw import to_text, to_text_lists
from tfrs_pipeline.search.searcher import Searcher
from tfrs_pipeline.search.settings import Level
from tfrs_pipeline.search.topk import merge, top_k_in_blocks

logger = logging.getLogger(__name__)


Allowed: TypeAlias = Sequence[Collection[str]] | None
"""For each query, values of the item filter: items need one of them. An empty list allows all."""


class UnknownItem(ValueError):
    """A request asks for items similar to one that is not among the model's candidates."""


class FilterValues:
    """The values by which requests may choose candidates.

    Codes are 1, 2, ... in the order of `values`, then of the new values that `encode` sees.
    `separator` separates the values of one text, as in the item table.
    """

    def __init__(self, values: Iterable[str] = (), separator: str = "|") -> None:
        self.code_of = {value: code for code, value in enumerate(values, 1)}
        self._separator = separator

    def encode(self, column: Any) -> np.ndarray:
        """Returns the codes of new rows' values, [n, any] int32 padded with 0; learns new ones."""
        values, lengths = to_text_lists(column)
        encoded = values.dictionary_encode()
        distinct = [
            self.code_of.setdefault(value, len(self.code_of) + 1)
            for value in encoded.dictionary.to_pylist()
        ]
        rows = np.zeros((len(lengths), max(1, lengths.max(initial=0))), np.int32)
        is_filled = np.arange(rows.shape[1]) < lengths[:, np.newaxis]
        rows[is_filled] = np.array(distinct, np.int32)[encoded.indices.to_numpy()]
        return rows

    def split(self, value: Any) -> list[str]:
        """Splits a text of several values at the separator, unless it is a value itself."""
        text = to_text(value)
        if text in self.code_of:
            return [text]
        parts = (part.strip(string.whitespace) for part in text.split(self._separator))
        return [part for part in parts if part]

    def choose(self, values: Iterable[Any]) -> np.ndarray | None:
        """Returns which codes are of one of the values: [num_codes + 1] bool.

        A text of several values counts as each of them. Returns None, which allows all
        candidates, if there are no values.

        Example:
            >>> genres = FilterValues()
            >>> genres.encode([["drama"], ["comedy", "drama"]]).tolist()
            [[1, 0], [2, 1]]
            >>> genres.choose(["comedy"]).tolist()
            [False, False, True]
        """
        wanted = [value for value in values if value != ""]
        if not wanted:
            return None
        parts = itertools.chain.from_iterable(map(self.split, wanted))
        codes = [self.code_of.get(part, 0) for part in parts]
        # Made after the codes are looked up, because another thread may add values meanwhile.
        is_chosen = np.zeros(len(self.code_of) + 1, bool)
        is_chosen[codes] = True
        is_chosen[0] = False  # Padding, and values that no item has.
        return is_chosen


def _has_chosen(is_chosen: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Returns which rows' codes, [n, P], are chosen: [n] bool."""
    # Looks at a column at a time: all columns at once would take P times the memory.
    return np.logical_or.reduce([is_chosen[column] for column in codes.T])


# Arrays that grow reserve this factor, and this many rows more.
_GROWTH, _LEAST_ROOM = 1.25, 1024


@dataclass(frozen=True)
class View:
    """The candidates of one moment, by row from 1; row 0 is the empty slot.

    A change makes a new view. Both share the arrays and the index, which are only ever written
    beyond `num_rows` of the older one, so a search in it goes on undisturbed.
    """

    corpus: Ids  # The first rows: those of the start, or of the last rebuild.
    # The ends of these arrays are reserved for new rows.
    ids: np.ndarray
    vectors: np.ndarray  # Without row 0: row r is at r - 1.
    codes: np.ndarray  # [any, P] int32, the values of the filter, padded with 0; P is 0 without.
    searcher: Searcher | None
    num_rows: int
    is_removed: np.ndarray  # [num_rows + 1] bool.
    num_removed: int = 0
    # The newest row of each id that was written since the corpus.
    new_rows: Mapping[Any, int] = field(default_factory=dict)

    @property
    def num_candidates(self) -> int:
        """Number of rows that are not removed."""
        return self.num_rows - self.num_removed

    def rows_of(self, ids: Collection[Any]) -> np.ndarray:
        """Returns the rows of ids, those in the corpus and new ones: [any] int32, ascending."""
        rows = self.corpus.known_rows(ids)
        if not self.new_rows:
            return rows
        new = [self.new_rows[id_] for id_ in ids if id_ in self.new_rows]
        return np.union1d(rows, np.array(new, np.int32))

    def rows_now(self, ids: Collection[Any]) -> np.ndarray:
        """Returns the row that each of [n] ids has now, [n] int32; 0 if it is not a candidate."""
        rows = self.corpus.rows(ids)
        if self.new_rows:
            # A replaced item of the corpus has a row in both; the newer one counts.
            now = (self.new_rows.get(id_) or row for id_, row in zip(ids, rows, strict=True))
            rows = np.fromiter(now, np.int32)
        return np.where(self.is_removed[rows], 0, rows)

    def live_rows(self) -> np.ndarray:
        """Returns the rows that are not removed: [any] int, ascending."""
        return 1 + np.flatnonzero(~self.is_removed[1:])

    def changed(
        self, ids: Sequence[Any], vectors: np.ndarray, codes: np.ndarray, removed: Sequence[Any]
    ) -> Self:
        """Returns the view after a change: `ids` are added or replaced, and others removed."""
        # A replaced item's old row is removed, so a search meets each id once.
        rows = self.rows_now([*ids, *removed])
        gone = rows[rows > 0]
        first, last = self.num_rows + 1, self.num_rows + len(ids)
        view = self._with_room(len(ids), codes.shape[1])
        view.ids[first : last + 1] = as_id_array(ids) if len(ids) else []
        view.vectors[first - 1 : last] = vectors
        view.codes[first : last + 1, : codes.shape[1]] = codes
        # A copy, which takes some 30 microseconds for a million rows.
        is_removed = np.pad(self.is_removed, [0, len(ids)])
        is_removed[gone] = True
        searcher = view.searcher
        if searcher is not None:
            try:
                # Its rows are those of the view in order. A search in an older view drops new ones.
                searcher.add(vectors)
            except Exception:
                # It may have taken in some: every later row would be another item's.
                logger.exception(
                    "the index failed to take in a change: search is exact until a rebuild"
                )
                searcher = None
        return replace(
            view,
            searcher=searcher,
            num_rows=last,
            is_removed=is_removed,
            num_removed=self.num_removed + len(gone),
            new_rows={**self.new_rows, **dict(zip(ids, range(first, last + 1), strict=True))},
        )

    def _with_room(self, num: int, width: int) -> Self:
        """Makes room for `num` new rows with `width` codes each; copies arrays that must grow."""
        capacity = len(self.ids) - 1
        # Room grows by a factor, so that adding items one by one copies each row only a few times
        # on average. Read-only vectors, such as TensorFlow's, are copied by the first change.
        if self.num_rows + num > capacity or not self.vectors.flags.writeable:
            capacity = round(_GROWTH * (self.num_rows + num)) + _LEAST_ROOM
        shapes: dict[str, tuple[int, ...]] = {
            "ids": (capacity + 1,),
            "vectors": (capacity, self.vectors.shape[1]),
            "codes": (capacity + 1, max(self.codes.shape[1], width)),
        }
        parts: dict[str, Any] = {}
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array.shape != shape:
                parts[name] = np.full(shape, "" if array.dtype == object else 0, array.dtype)
                parts[name][tuple(map(slice, array.shape))] = array
        return replace(self, **parts)


class Standing(NamedTuple):
    """How a candidate stands among those that an answer may hold, itself included.

    Attributes:
        rank: From 1.
        score: With its bonus.
        last: The k-th best score of the others, -inf if there are fewer: what it has to reach.
        is_allowed: Whether the filter lets it through.
    """

    rank: int
    score: float
    last: float
    is_allowed: bool


# The index is rebuilt after more changes than this number and than this share of its candidates.
_LEAST_CHANGES, _LEAST_CHANGED_SHARE = 2_000, 0.3
_NO_ROWS = np.zeros(0, np.int32)


class Candidates:
    """Candidates by id, [n], their vectors, [n, D] float32, and the searches over them.

    `searcher` is an index of the vectors; without one, searches are exact. `levels` say how widely
    to search it, by ascending depth; deeper requests are answered exactly. If there is a filter,
    requests choose by `values`; `codes`, [n, P] int32 padded with 0, are those of each candidate.

    Example:
        >>> videos = Candidates(["a", "b", "c"], np.array([[3.0], [2.0], [1.0]], np.float32))
        >>> ids, scores = videos.search(np.ones((1, 1), np.float32), 2, excluded=[["a"]])
        >>> ids.tolist(), scores.tolist()
        ([['b', 'c']], [[2.0, 1.0]])
    """

    def __init__(
        self,
        ids: Collection[Any] | np.ndarray,
        vectors: np.ndarray,
        searcher: Searcher | None = None,
        levels: Sequence[Level] = (),
        values: FilterValues | None = None,
        codes: np.ndarray | None = None,
    ) -> None:
        self.values, self._levels = values, tuple(levels)
        self._is_indexed = searcher is not None
        self._view = _first_view(ids, vectors, searcher, codes)
        self._lock = threading.RLock()
        # The changes made while a rebuild goes on; None if there is none.
        self._changes: list[tuple[Any, ...]] | None = None

    def __len__(self) -> int:
        return self._view.num_candidates

    @property
    def corpus(self) -> Ids:
        """The ids at the start, or at the last `rebuild`."""
        return self._view.corpus

    @property
    def has_drifted(self) -> bool:
        """Whether to rebuild the index: much has changed, or it failed to take in a change."""
        view, num_built = self._view, len(self._view.corpus)
        if not view.num_candidates:
            return False  # Without a candidate there is nothing to build.
        if self._is_indexed and view.searcher is None:
            return True
        num_changed = max(view.num_rows - num_built, view.num_removed)
        return num_changed > max(_LEAST_CHANGES, _LEAST_CHANGED_SHARE * num_built)

    def has(self, ids: Collection[Any]) -> np.ndarray:
        """Returns which ids are candidates now, [n] bool."""
        return self._view.rows_now(ids) > 0

    def violations(self) -> Iterator[str]:
        """Yields the violated invariants of the candidates at one moment, a line each."""
        view = self._view
        rows = view.live_rows()
        ids, vectors = view.ids[rows], view.vectors[rows - 1]
        if len(ids) != view.num_candidates:
            yield f"{len(ids):,} candidates are there, and {view.num_candidates:,} are counted"
        if (num := len({*ids.tolist()})) != len(ids):
            yield f"{len(ids):,} candidates have {num:,} different ids"
        if not np.isfinite(vectors).all():
            yield "a candidate's vector is not finite"
        if view.searcher is not None and view.searcher.num_rows < view.num_rows:
            yield f"the index holds {view.searcher.num_rows:,} of {view.num_rows:,} rows"

    def ids_and_vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the candidates of one moment: ids [n], and vectors [n, D] float32."""
        view = self._view
        rows = view.live_rows()
        return view.ids[rows], view.vectors[rows - 1]

    def vectors_of(self, ids: Sequence[Any]) -> np.ndarray:
        """Returns a copy of some candidates' vectors; an `UnknownItem` if one is not there."""
        view = self._view
        rows = view.rows_now(ids)
        if not rows.all():
            raise UnknownItem(
                f"Item {ids[int(np.argmin(rows))]!r} is not among the {len(self):,} items that the "
                "model retrieves. A new one comes in by `upsert`, by PUT, or by `tfrs-pipeline "
                "refresh-index`."
            )
        return view.vectors[rows - 1]

    def search(
        self,
        queries: np.ndarray | None,
        k: int,
        excluded: Sequence[Collection[Any]] | None = None,
        allowed: Sequence[Iterable[Any]] | None = None,
        *,
        exact: bool = False,
        bonuses: Sequence[tuple[Sequence[Any] | np.ndarray, np.ndarray]] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Finds the k best candidates of [B, D] finite float32 queries; with `exact`, scores all.

        A query never gets its `excluded` ids, only candidates with one of its `allowed` values; an
        empty list allows all. `bonuses` are added to scores: for each query, [n] distinct ids and
        [n or more] numbers, of which those after n are padding. Without `queries`, only these are
        found, and a score is the bonus. Exact search returns the first of equal candidates. Returns
        ids [B, k], best first, the empty id in empty slots, and scores [B, k] float32, -inf there.
        """
        view, is_asked = self._view, queries is not None
        if queries is None:
            queries = np.zeros((len(bonuses or ()), self._view.vectors.shape[1]), np.float32)
        num = len(queries)
        excluded = [()] * num if excluded is None else excluded
        rows_left_out = [view.rows_of(ids) if len(ids) else _NO_ROWS for ids in excluded]
        chosen: list[np.ndarray | None] = [None] * num
        if allowed is not None and self.values is not None:
            chosen = [self.values.choose(values) for values in allowed]
        search = _Search(view, self._levels, queries, k, rows_left_out, chosen)
        # Candidates with a bonus are scored exactly, and merged with the best of the others.
        with_bonus = [] if bonuses is None else search.take_out(bonuses)
        if not is_asked:
            pass
        elif exact or view.searcher is None:
            search.score_all(list(range(num)))
        else:
            search.approximate()
        search.merge(with_bonus)
        return view.ids[search.rows], search.scores

    def standing(
        self,
        query: np.ndarray,
        item_id: Any,
        k: int,
        excluded: Collection[Any] = (),
        allowed: Iterable[Any] = (),
        bonus: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Standing:
        """Scores all candidates for one [D] query, as an exact search does, to see one's standing.

        The other arguments are those of `search` for a query. Raises as `vectors_of`.
        """
        view, (row,) = self._view, self._view.rows_now([item_id])
        self.vectors_of([item_id])
        scores = np.vecdot(view.vectors[: view.num_rows], query)
        if bonus is not None:
            rows, numbers = view.rows_now(bonus[0]), bonus[1][: len(bonus[0])]
            scores[rows[rows > 0] - 1] += numbers[rows > 0]
        is_open = ~view.is_removed[1:]
        is_open[view.rows_of(excluded) - 1] = False
        is_chosen = None if self.values is None else self.values.choose(allowed)
        is_allowed = True
        if is_chosen is not None:
            has_chosen = _has_chosen(is_chosen, view.codes[1 : view.num_rows + 1])
            is_open, is_allowed = is_open & has_chosen, bool(has_chosen[row - 1])
        own, others = scores[row - 1], np.where(is_open, scores, -np.inf)
        others[row - 1] = -np.inf
        # The first of equal candidates comes first.
        rank = 1 + int((others > own).sum() + (others[: row - 1] == own).sum())
        last = np.partition(others, -k)[-k] if k <= len(others) else -np.inf
        return Standing(rank, float(own), float(last), is_allowed)

    def change(
        self,
        ids: Sequence[Any],
        vectors: np.ndarray,
        column: Sequence[Any] | None = None,
        removed: Sequence[Any] = (),
    ) -> None:
        """Adds or replaces candidates, and removes others, in one change for all later searches.

        Ids are distinct; `vectors` are [n, D] float32, and `column` has the [n] values of a filter.
        The index takes them in at once. Unknown ids among `removed` are ignored.
        """
        with self._lock:
            codes = np.zeros((len(ids), 0), np.int32)
            if self.values is not None:
                codes = self.values.encode(column or [None] * len(ids))
            change = ids, vectors, codes, removed
            # One assignment: a search sees the view before the change or the one after it.
            self._view = self._view.changed(*change)
            if self._changes is not None:
                self._changes.append(change)

    def rebuild(self, build: Callable[[np.ndarray], Searcher] | None) -> None:
        """Drops removed rows, and builds the index of the rest anew; no `build` means no index.

        Changes made meanwhile are made again in the new view, before a search sees it.
        """
        with self._lock:
            before, self._changes = self._view, []
        try:
            rows = before.live_rows()
            vectors = before.vectors[rows - 1]
            searcher = None if build is None else build(vectors)
            view = _first_view(before.ids[rows], vectors, searcher, before.codes[rows])
            with self._lock:
                for change in self._changes:
                    view = view.changed(*change)
                self._view, self._changes = view, None
                self._is_indexed = build is not None
        finally:
            # If the build failed, the old view has all changes, so none needs to be kept.
            self._changes = None


def _first_view(
    ids: Collection[Any] | np.ndarray,
    vectors: np.ndarray,
    searcher: Searcher | None,
    codes: np.ndarray | None,
) -> View:
    corpus = Ids(ids)
    by_row = corpus.take(np.arange(len(corpus) + 1))
    codes = np.zeros((len(corpus), 0), np.int32) if codes is None else codes
    codes = np.pad(codes, [[1, 0], [0, 0]])
    is_removed = np.zeros(len(by_row), bool)
    return View(corpus, by_row, vectors, codes, searcher, len(corpus), is_removed)


@dataclass
class _Search:
    """Queries, the rows that each excludes, the codes it allows (None is all), and the answers."""

    view: View
    levels: Sequence[Level]
    queries: np.ndarray
    k: int
    excluded: list[np.ndarray]
    chosen: Sequence[np.ndarray | None]

    def __post_init__(self) -> None:
        shape = len(self.queries), self.k
        self.rows, self.scores = np.zeros(shape, np.int32), np.full(shape, -np.inf, np.float32)
        # How many candidates an answer of the index must have. If fewer remain, exact search
        # finds all that do.
        self.num_wanted = min(self.k, self.view.num_candidates)

    def take_out(
        self, bonuses: Iterable[tuple[Sequence[Any] | np.ndarray, np.ndarray]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Scores candidates with a bonus; returns their rows and scores by query.

        These lack the candidates that the query may not return. A negative bonus leaves its
        candidate out of the search. A positive one need not: whatever is among the best with
        bonuses, but has none, is also among the best without.
        """
        with_bonus = []
        for line, (ids, numbers) in enumerate(bonuses):
            rows, numbers = self.view.rows_now(ids), numbers[: len(ids)]
            is_open = self._open(line, rows)
            rows, numbers = rows[is_open], numbers[is_open]
            if (is_worse := numbers < 0).any():
                self.excluded[line] = np.union1d(self.excluded[line], rows[is_worse])
            scores = self.view.vectors[rows - 1] @ self.queries[line]
            with_bonus.append((rows, scores + numbers))
        return with_bonus

    def merge(self, with_bonus: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Merges what `take_out` returned into the answers."""
        for line, (rows, scores) in enumerate(with_bonus):
            # A candidate that the search found too counts with its bonus.
            is_other = ~np.isin(self.rows[line], rows)
            found = self.rows[line] * is_other, np.where(is_other, self.scores[line], -np.inf)
            # No other is among the best: a bonus that lowers a score took its candidate out before.
            is_near = scores >= self.scores[line, -1]
            self.rows[line], self.scores[line] = merge(*found, rows[is_near], scores[is_near])

    def approximate(self) -> None:
        """Asks the index at the level that each query needs, and at a wider one if that fails.

        Exact search answers queries beyond the last level.
        """
        depths = [level.depth for level in self.levels]
        # One list for each level, and the last for exact search.
        by_level: list[list[int]] = [[] for _ in [*depths, None]]
        # Whatever is excluded may be among the nearest, so the index has to find as many more.
        for line, rows in enumerate(self.excluded):
            by_level[bisect.bisect_left(depths, self.num_wanted + len(rows))].append(line)
        for lines, level in zip(by_level, self.levels, strict=False):
            if lines:
                for line, depth in self._ask(level, lines):
                    # A deeper level comes later in this loop, and asks again.
                    by_level[bisect.bisect_left(depths, depth)].append(line)
        if by_level[-1]:
            self.score_all(by_level[-1])

    def _ask(self, level: Level, lines: list[int]) -> list[tuple[int, float]]:
        """Asks the index for the best of some queries, and keeps each answer that it can fill.

        A filter or removed candidates may leave an answer short: the best of that query lie deeper
        in the index. Returns these queries, and how deep to search for each.
        """
        view, wanted = self.view, self.num_wanted
        assert view.searcher is not None
        all_rows, all_scores, num_indexed = view.searcher.search(self.queries[lines], level)
        # The index may hold newer rows than the view.
        is_whole = num_indexed == view.num_rows and not view.num_removed
        short = []
        for line, rows, scores in zip(lines, all_rows, all_scores, strict=True):
            if not is_whole or len(self.excluded[line]) or self.chosen[line] is not None:
                is_open = self._open(line, rows)
                rows, scores = rows[is_open], scores[is_open]
            num_open = int(np.count_nonzero(rows))
            if num_open >= wanted:
                self.rows[line, :wanted] = rows[:wanted]
                self.scores[line, :wanted] = scores[:wanted]
                continue
            # With three standard deviations more than this level's share of open rows promises,
            # there are nearly always enough.
            share = max(num_open, 1) / level.depth
            short.append((line, (wanted + 3 * np.sqrt(wanted)) / share + 1))
        return short

    def _open(self, line: int, rows: np.ndarray) -> np.ndarray:
        """Returns which rows, [n], a query may return: [n] bool."""
        view, excluded, is_chosen = self.view, self.excluded[line], self.chosen[line]
        rows = rows * (rows <= view.num_rows)  # Newer ones, which the index may have, become 0.
        is_open = (rows > 0) & ~view.is_removed[rows]
        if len(excluded):  # Ascending. `np.isin` would sort both, which takes ten times as long.
            places = np.searchsorted(excluded, rows)
            is_open &= excluded[np.minimum(places, len(excluded) - 1)] != rows
        if is_chosen is not None:
            is_open &= _has_chosen(is_chosen, view.codes[rows])
        return is_open

    def score_all(self, lines: list[int]) -> None:
        """Scores all candidates for some queries."""
        view, num = self.view, self.view.num_rows
        vectors, excluded = view.vectors[:num], [self.excluded[line] for line in lines]

        def score(block: slice) -> np.ndarray:
            queries = self.queries[lines[block]]
            # A single query is scored in one thread: the threads of a matrix product wait for each
            # other, which takes a hundred times as long while other processes work.
            if len(queries) == 1:
                scores = np.vecdot(vectors, queries)[np.newaxis]
            else:
                # For few queries this product is faster. For many, the copy of a transposed matrix,
                # which ends it, takes longer than the product.
                is_few = len(queries) <= 16
                scores = (vectors @ queries.T).T if is_few else queries @ vectors.T
            if view.num_removed:
                scores[:, view.is_removed[1:]] = -np.inf
            for row, line in zip(scores, lines[block], strict=True):
                if (is_chosen := self.chosen[line]) is not None:
                    row[~_has_chosen(is_chosen, view.codes[1 : num + 1])] = -np.inf
            return scores

        best = top_k_in_blocks(score, len(lines), num, self.k, excluded)
        self.rows[lines], self.scores[lines] = best
