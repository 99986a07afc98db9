"""What an approximate index costs for what it finds, and the cheapest that keeps a promise."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.evaluation.table import format_cells
from tfrs_pipeline.serving.index import ExactIndex, ScannIndex, ScannSettings, index_recall

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

# With fewer, a half would be too small to say anything.
SMALLEST_SPLIT = 20
# Below this, looking up the nearest leaves costs more than it saves.
SMALLEST_PARTITIONED_CORPUS = 10_000
# Candidates rescored exactly, over k. The most comes first: it finds the most.
_REORDERED_OVER_K = (20, 10, 5, 3, 2, 1.5, 1)
# A setting further than this below the target is not worth varying.
_MARGIN = 0.05
# Halvings, by ratio, of the step between too few leaves and enough.
_NUM_REFINEMENTS = 3
# The median over fewer would be noise.
_MIN_TIMED_CALLS = 16

_Search = Callable[..., tuple[tf.Tensor, tf.Tensor]]


@dataclass(frozen=True)
class FrontierPoint:
    """One setting of an index, measured.

    Args:
        settings: Of the build and of the search.
        recall: index_recall@k on the held-out queries.
        tuning_recall: index_recall@k on the queries that choose.
        microseconds: Per query; the median over batches, each divided by its size.
        build_seconds: Of the structure, which points that differ in their search alone share.
    """

    settings: ScannSettings
    recall: float
    tuning_recall: float
    microseconds: float
    build_seconds: float

    def keeps(self, target_recall: float) -> bool:
        """Says whether the promise is kept on both halves of the queries."""
        return min(self.recall, self.tuning_recall) >= target_recall

    def as_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FrontierPoint:
        """Reads what `as_dict` wrote."""
        return cls(**{**values, "settings": ScannSettings(**values["settings"])})


def is_on_frontier(point: FrontierPoint, points: Sequence[FrontierPoint]) -> bool:
    """Says whether no point finds as much in less time, nor more in the same.

    Example:
        >>> slow, fast, poor = (
        ...     FrontierPoint(ScannSettings(1, 1, 100), recall, recall, microseconds, 1.0)
        ...     for recall, microseconds in ((0.9, 30.0), (0.9, 20.0), (0.8, 10.0))
        ... )
        >>> [is_on_frontier(point, [slow, fast, poor]) for point in (slow, fast, poor)]
        [False, True, True]
    """
    return not any(
        other.recall >= point.recall
        and other.microseconds <= point.microseconds
        and (other.recall, other.microseconds) != (point.recall, point.microseconds)
        for other in points
    )


@dataclass(frozen=True)
class Frontier:
    """Recall against time of every setting that was measured, beside exact search.

    Args:
        k: Of the recall.
        target_recall: The promise, in (0, 1].
        num_candidates: In the corpus.
        num_queries: Measured on. From 20 on, every other one chooses and the rest are held out;
            fewer do both.
        batch_size: Queries in a call.
        exact_microseconds: Per query, of `ExactIndex`, which may use every core; ScaNN uses one.
        points: In the order of measuring.
    """

    k: int
    target_recall: float
    num_candidates: int
    num_queries: int
    batch_size: int
    exact_microseconds: float
    points: tuple[FrontierPoint, ...]

    @property
    def kept(self) -> tuple[FrontierPoint, ...]:
        """The points that keep the promise, cheapest first."""
        kept = [point for point in self.points if point.keeps(self.target_recall)]
        return tuple(sorted(kept, key=lambda point: point.microseconds))

    @property
    def chosen(self) -> FrontierPoint:
        """The cheapest point that keeps the promise.

        Choosing by one half and going to the next cheapest where the other half disagrees comes to
        the same.

        Raises:
            RuntimeError: If no point keeps it.
        """
        if not self.kept:
            raise RuntimeError(
                f"No ScaNN setting reaches index_recall@{self.k} = {self.target_recall}. "
                "Lower export.target_recall, or set export.index = 'exact'. Measured:\n"
                f"{self.table()}"
            )
        return self.kept[0]

    def table(self, *, every: bool = False) -> str:
        """Lays the points out as plain text, by recall, exact search last.

        Args:
            every: Show all points; otherwise the chosen one and those on the frontier, without
                those far below the target.
        """
        shown = sorted(self.points, key=_by_recall) if every else self._shown()
        header = ["leaves", "searched", "dims/block", "reordered", f"recall@{self.k}"]
        lines = [[*header, "us/query", "build s", "promise"]]
        for point in shown:
            settings = point.settings
            keeps = "kept" if point.keeps(self.target_recall) else "-"
            lines.append(
                [
                    str(settings.num_leaves),
                    str(settings.num_leaves_to_search),
                    str(settings.dimensions_per_block),
                    str(settings.num_reordered),
                    f"{point.recall:.4f}",
                    f"{point.microseconds:.1f}",
                    f"{point.build_seconds:.2f}",
                    "chosen" if point in self.kept[:1] else keeps,
                ]
            )
        exact_time = f"{self.exact_microseconds:.1f}"
        lines.append(["exact", "-", "-", "-", "1.0000", exact_time, "-", "-"])
        return f"{self._title()}\n{format_cells(lines)}"

    def records(self) -> list[dict[str, Any]]:
        """Returns what `table` shows of the index as flat records, for a report or a manifest.

        Each has "index_recall@k", "query_ms" (milliseconds a query) and the settings that vary.
        """
        return [
            {
                f"index_recall@{self.k}": point.recall,
                "query_ms": round(point.microseconds / 1000, 5),
                "num_leaves": point.settings.num_leaves,
                "num_leaves_to_search": point.settings.num_leaves_to_search,
                "num_reordered": point.settings.num_reordered,
                "dimensions_per_block": point.settings.dimensions_per_block,
            }
            for point in self._shown()
        ]

    def _shown(self) -> list[FrontierPoint]:
        least = min(self.target_recall - _MARGIN, max(point.recall for point in self.points))
        return [
            point
            for point in sorted(self.points, key=_by_recall)
            if point in self.kept[:1]
            or (point.recall >= least and is_on_frontier(point, self.points))
        ]

    def figure(self) -> Figure:
        """Draws time against recall: the frontier as a line, the target, the chosen point, exact.

        Filled marks keep the promise, hollow ones do not. Recalls far below the target are cut off.
        A notebook shows it after `%matplotlib inline`.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        self._draw_points(axes)
        line = sorted(
            (p.recall, p.microseconds) for p in self.points if is_on_frontier(p, self.points)
        )
        axes.plot(*zip(*line, strict=True), color="0.3", linewidth=1, zorder=1, label="frontier")
        target = f"promised: {self.target_recall:g}"
        axes.axvline(self.target_recall, color="0.3", linestyle="--", linewidth=1, label=target)
        exact = f"exact search: {self.exact_microseconds:,.0f} us"
        axes.axhline(
            self.exact_microseconds, color="tab:red", linestyle=":", linewidth=1.5, label=exact
        )
        if self.kept:
            best = self.kept[0]
            axes.scatter(
                best.recall,
                best.microseconds,
                s=160,
                facecolors="none",
                edgecolors="black",
                linewidths=1.5,
                zorder=4,
                label=f"chosen: recall {best.recall:.4f}, {best.microseconds:,.0f} us",
            )
        left = self.target_recall - 2 * _MARGIN
        if max(point.recall for point in self.points) > left:
            axes.set_xlim(left, 1 + 0.03 * (1 - left))
        axes.set_yscale("log")
        # Within a decade the default would write 2 x 10^1.
        for axis_format in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis_format("{x:,g}")
        axes.set_xlabel(f"index_recall@{self.k}")
        axes.set_ylabel(f"microseconds a query, {self.batch_size} in a call")
        axes.set_title(self._title(), fontsize=9)
        axes.grid(which="both", color="0.92")
        axes.set_axisbelow(True)
        axes.legend(fontsize=8)
        return figure

    def as_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold; "chosen" is a place in "points", or None."""
        chosen = self.points.index(self.kept[0]) if self.kept else None
        return {**asdict(self), "points": [p.as_dict() for p in self.points], "chosen": chosen}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Frontier:
        """Reads what `as_dict` wrote."""
        points = tuple(FrontierPoint.from_dict(point) for point in values["points"])
        fields = {name: value for name, value in values.items() if name != "chosen"}
        return cls(**{**fields, "points": points})

    def _title(self) -> str:
        if self.num_queries < SMALLEST_SPLIT:
            queries = f"the {self.num_queries} queries it is tuned on, too few to hold some out"
        else:
            queries = f"{self.num_queries // 2} held-out queries"
        return f"{self.num_candidates:,} candidates, recall on {queries}"

    def _draw_points(self, axes: Axes) -> None:
        for number, structure in enumerate(dict.fromkeys(map(_structure, self.points))):
            points = [point for point in self.points if _structure(point) == structure]
            leaves, dimensions = structure
            colour = f"C{number}"
            axes.scatter(
                [point.recall for point in points],
                [point.microseconds for point in points],
                s=28,
                facecolors=[
                    colour if point.keeps(self.target_recall) else "none" for point in points
                ],
                edgecolors=colour,
                marker="os^D"[number % 4],
                zorder=2,
                label=f"{_leaves(leaves)}, {dimensions} dims/block",
            )


def _by_recall(point: FrontierPoint) -> tuple[float, float]:
    return point.recall, point.microseconds


def _structure(point: FrontierPoint) -> tuple[int, int]:
    return point.settings.num_leaves, point.settings.dimensions_per_block


def _leaves(num_leaves: int) -> str:
    return "no partitions" if num_leaves == 1 else f"{num_leaves:,} leaves"


def measure_frontier(
    embeddings: np.ndarray,
    queries: np.ndarray,
    *,
    k: int,
    target_recall: float,
    num_structures: int | None = 2,
    batch_size: int = 16,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[ScannIndex, Frontier]:
    """Builds the ScaNN index that keeps a promise on recall in the least time.

    Recall is index_recall@k against exact search; every other query chooses the setting, which must
    keep the promise on the others too. Structures are built once each; the leaves searched and the
    candidates rescored are arguments of a search. More leaves are tried up to recall 1 or, once the
    promise is kept, until they take longer than exact search or twice the cheapest that keeps it.
    So the choice depends on the clock, and ScaNN draws its partitions anew each time: the same call
    may give another index, but none that breaks the promise.

    Searches go through a `tf.function`, as a request's do: ScaNN on one thread, exact search on
    TensorFlow's.

    Args:
        embeddings: [num_candidates, dim] float32, of any lengths: scores are dot products.
        queries: [num_queries, dim] float32 to measure on, not empty; 200 and more make the promise
            hold for others.
        k: Of the promise; capped at num_candidates.
        target_recall: The promise, in (0, 1].
        num_structures: Of those that suit the size, how many to try, quickest to build first: 1 to
            be fast, None for all (3 or 4). More are tried while none keeps the promise.
        batch_size: Queries in a call, as a server joins them. One alone costs more: the call itself
            takes 0.2 ms.
        clock: Seconds.

    Returns:
        The index, set to what was chosen, and what was measured.

    Raises:
        RuntimeError: If no setting keeps the promise, with what was measured.
        ValueError: If the target is out of range, or the two arrays do not fit each other.
    """
    _check(embeddings, queries, k, target_recall, num_structures, batch_size)
    k = min(k, len(embeddings))
    probes = _Probes(embeddings, queries, k, batch_size, clock)
    points: list[FrontierPoint] = []
    best: ScannIndex | None = None
    cheapest = math.inf
    for number, structure in enumerate(_structures(len(embeddings), k)):
        if num_structures is not None and number >= num_structures and best is not None:
            break
        start = clock()
        index = ScannIndex(embeddings, structure)
        build_seconds = clock() - start
        for point in _Sweep(index, probes, target_recall, build_seconds, cheapest).run():
            points.append(point)
            if point.keeps(target_recall) and point.microseconds < cheapest:
                best, cheapest = index, point.microseconds
    frontier = probes.frontier(points, target_recall)
    chosen = frontier.chosen
    logger.info("index: %s", frontier.table())
    assert best is not None  # Of the chosen point.
    best.settings = chosen.settings
    return best, frontier


class _Probes:
    """Queries with their exact answers, to measure searches on."""

    def __init__(
        self,
        embeddings: np.ndarray,
        queries: np.ndarray,
        k: int,
        batch_size: int,
        clock: Callable[[], float],
    ) -> None:
        self.k, self._clock = k, clock
        self._num_candidates, self._num_queries = len(embeddings), len(queries)
        # The last batch is filled up from the start, so that all take alike.
        rows = np.resize(np.arange(len(queries)), (-(-len(queries) // batch_size), batch_size))
        self._batches = [tf.constant(queries[batch], tf.float32) for batch in rows]
        if len(queries) < SMALLEST_SPLIT:
            logger.warning(
                "the index is tuned and measured on the same %d queries, below %d too few to split",
                len(queries),
                SMALLEST_SPLIT,
            )
            self._tuning = self._held_out = slice(None)
        else:
            self._tuning, self._held_out = slice(0, None, 2), slice(1, None, 2)
        index = ExactIndex(embeddings)
        self._exact, self.exact_microseconds = self._search(_compiled(index.search, 1), k)

    def frontier(self, points: Sequence[FrontierPoint], target_recall: float) -> Frontier:
        """Puts points beside exact search."""
        return Frontier(
            k=self.k,
            target_recall=target_recall,
            num_candidates=self._num_candidates,
            num_queries=self._num_queries,
            batch_size=len(self._batches[0]),
            exact_microseconds=self.exact_microseconds,
            points=tuple(points),
        )

    def measure(self, search: _Search, *options: int) -> tuple[float, float, float]:
        """Searches for k; returns held-out recall, tuning recall and microseconds a query."""
        found, microseconds = self._search(search, self.k, *options)
        held_out, tuning = (
            index_recall(found[half], self._exact[half]) for half in (self._held_out, self._tuning)
        )
        return held_out, tuning, microseconds

    def _search(self, search: _Search, *options: int) -> tuple[np.ndarray, float]:
        """Returns [num_queries, k] places, -1 in empty slots, and the median time of a batch."""
        arguments = [tf.constant(option, tf.int32) for option in options]
        search(self._batches[0], *arguments)  # The first call of a search loads its index.
        found, seconds = [], []
        # Few batches are asked again, for the median.
        for number in range(max(len(self._batches), _MIN_TIMED_CALLS)):
            batch = self._batches[number % len(self._batches)]
            start = self._clock()
            places, scores = (x.numpy() for x in search(batch, *arguments))
            seconds.append(self._clock() - start)
            if number < len(self._batches):
                is_found = scores > -np.inf
                row = np.full((len(places), self.k), -1, np.int32)
                row[:, : places.shape[1]] = np.where(is_found, places, -1)
                found.append(row)
        microseconds = 1e6 * float(np.median(seconds)) / len(self._batches[0])
        return np.concatenate(found)[: self._num_queries], microseconds


class _Sweep:
    """Measures searches of one structure.

    Args:
        index: The structure.
        probes: What to search for.
        target_recall: The promise.
        build_seconds: Of the structure.
        cheapest: Microseconds of the cheapest setting so far that keeps the promise, or infinity.
    """

    def __init__(
        self,
        index: ScannIndex,
        probes: _Probes,
        target_recall: float,
        build_seconds: float,
        cheapest: float,
    ) -> None:
        self.points: list[FrontierPoint] = []
        self._settings, self._num_candidates = index.settings, index.num_candidates
        self._index = index  # Which the compiled search does not keep alive.
        self._search = _compiled(index.search, 3)
        self._probes, self._target = probes, target_recall
        self._build_seconds, self._cheapest = build_seconds, cheapest
        self._num_leaves = max(1, index.settings.num_leaves // 128)

    def run(self) -> list[FrontierPoint]:
        """Doubles the leaves; where the promise is first kept, looks closer below and goes on."""
        too_few = 0
        while not (is_kept := self._measure(self._num_leaves)) and not self._is_over():
            too_few = self._num_leaves
            self._double()
        if is_kept:
            self._refine(too_few, self._num_leaves)
        while not self._is_over():
            self._double()
            self._measure(self._num_leaves)
        return self.points

    def _double(self) -> None:
        self._num_leaves = min(2 * self._num_leaves, self._settings.num_leaves)

    def _refine(self, too_few: int, enough: int) -> None:
        for _ in range(_NUM_REFINEMENTS):
            leaves = round(math.sqrt(max(1, too_few) * enough))
            if not too_few < leaves < enough:
                return
            if self._measure(leaves):
                enough = leaves
            else:
                too_few = leaves

    def _measure(self, num_leaves: int) -> bool:
        """Varies what is rescored, from much to little; says whether the promise was kept."""
        is_kept = False
        for num_reordered in _numbers_reordered(self._probes.k, self._num_candidates):
            recall, tuning_recall, microseconds = self._probes.measure(
                self._search, num_leaves, num_reordered
            )
            settings = replace(
                self._settings, num_leaves_to_search=num_leaves, num_reordered=num_reordered
            )
            point = FrontierPoint(
                settings, recall, tuning_recall, microseconds, self._build_seconds
            )
            self.points.append(point)
            if point.keeps(self._target):
                is_kept = True
                self._cheapest = min(self._cheapest, microseconds)
            # Rescoring fewer finds still less.
            if tuning_recall < self._target - _MARGIN:
                break
        return is_kept

    def _is_over(self) -> bool:
        """Says whether more leaves than now have nothing more to find, or cost too much."""
        row = [p for p in self.points if p.settings.num_leaves_to_search == self._num_leaves]
        if self._num_leaves == self._settings.num_leaves or row[0].keeps(1.0):
            return True
        dearest = min(self._probes.exact_microseconds, 2 * self._cheapest)
        return self._cheapest < math.inf and min(p.microseconds for p in row) > dearest


def _structures(num_candidates: int, k: int) -> list[ScannSettings]:
    """Returns what suits a corpus, quickest to build first.

    About sqrt(num_candidates) leaves and two dimensions a block is ScaNN's own advice. More leaves
    can be cheaper, and so can one dimension a block, after which fewer candidates need rescoring.
    """
    leaves = max(1, round(math.sqrt(num_candidates)))
    if num_candidates < SMALLEST_PARTITIONED_CORPUS:
        shapes = [(1, 2), (1, 1), (leaves, 2)]
    else:
        shapes = [(leaves, 2), (4 * leaves, 2), (leaves, 1), (4 * leaves, 1)]
    num_reordered = max(_numbers_reordered(k, num_candidates))
    return [
        ScannSettings(num_leaves, num_leaves, num_reordered, dimensions_per_block=dimensions)
        for num_leaves, dimensions in dict.fromkeys(shapes)
    ]


def _numbers_reordered(k: int, num_candidates: int) -> list[int]:
    """Returns how many candidates to rescore exactly, most first.

    Example:
        >>> _numbers_reordered(100, 600)
        [600, 500, 300, 200, 150, 100]
    """
    return list(dict.fromkeys(min(math.ceil(x * k), num_candidates) for x in _REORDERED_OVER_K))


def _compiled(search: _Search, num_options: int) -> _Search:
    """Compiles a search of queries with integer options, for as long as its index lives."""
    options = [tf.TensorSpec([], tf.int32)] * num_options
    signature = [tf.TensorSpec([None, None], tf.float32), *options]
    # Not called as a tf.function, which warns where many indexes are built, one after the other.
    return tf.function(search, input_signature=signature).get_concrete_function()


def _check(
    embeddings: np.ndarray,
    queries: np.ndarray,
    k: int,
    target_recall: float,
    num_structures: int | None,
    batch_size: int,
) -> None:
    if embeddings.ndim != 2 or queries.ndim != 2 or embeddings.shape[1] != queries.shape[1]:
        raise ValueError(
            "embeddings and queries must be matrices of the same width. Received: "
            f"embeddings.shape={embeddings.shape}, queries.shape={queries.shape}"
        )
    if not len(embeddings) or not len(queries):
        raise ValueError(
            "There must be candidates to search and queries to measure on. Received: "
            f"{len(embeddings)} candidates, {len(queries)} queries"
        )
    if not 0 < target_recall <= 1:
        raise ValueError(f"target_recall must be in (0, 1]. Received: {target_recall}")
    counts = {"k": k, "num_structures": num_structures, "batch_size": batch_size}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more. Received: {value}")
