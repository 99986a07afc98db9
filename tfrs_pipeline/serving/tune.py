"""What an approximate index finds at which cost; the least work that reaches a recall target."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.evaluation.table import format_cells
from tfrs_pipeline.serving.index import (
    ExactIndex,
    Scann,
    ScannIndex,
    ScannSettings,
    index_recall,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

# With fewer, a half would be too small to say anything.
SMALLEST_SPLIT = 20
# Below this, looking up the nearest leaves costs more than it saves.
SMALLEST_PARTITIONED_CORPUS = 10_000
# Of `CurvePoint.work`: measured at 100,000 candidates of 64 dimensions.
_WORK_OF_A_LEAF, _WORK_OF_RESCORING = 16, 28
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
class CurvePoint:
    """One setting of an index, measured.

    Args:
        settings: Of the build and of the search.
        recall: index_recall@k on the held-out queries.
        tuning_recall: index_recall@k on the queries that choose.
        query_ms: Milliseconds a query; the median over batches, each divided by its size.
        work: Expected of a search: hashed candidates over dimensions_per_block, and what leaves and
            exact rescoring take beside. The same whenever and wherever it is computed.
    """

    settings: ScannSettings
    recall: float
    tuning_recall: float
    query_ms: float
    work: float

    def reaches(self, target_recall: float) -> bool:
        """Says whether the target is reached on both halves of the queries."""
        return min(self.recall, self.tuning_recall) >= target_recall


@dataclass(frozen=True)
class RecallLatencyCurve:
    """Recall against time of every setting that was measured, beside exact search.

    Args:
        k: Of the recall.
        target_recall: In (0, 1].
        num_candidates: In the corpus.
        num_queries: Measured on. From 20 on, every other one chooses and the rest are held out;
            fewer do both.
        batch_size: Queries in a call.
        exact_ms: Milliseconds a query of `ExactIndex`, which may use every core; ScaNN uses one.
        points: In the order of measuring.
    """

    k: int
    target_recall: float
    num_candidates: int
    num_queries: int
    batch_size: int
    exact_ms: float
    points: tuple[CurvePoint, ...]

    @property
    def chosen(self) -> CurvePoint:
        """The point of the least work that reaches the target on both halves of the queries.

        Raises:
            RuntimeError: If no point does.
        """
        point = self._best()
        if point is None:
            raise RuntimeError(
                f"No ScaNN setting reaches index_recall@{self.k} = {self.target_recall}. Lower the "
                f"recall target, or take the exact index. Measured:\n{self.table()}"
            )
        return point

    def table(self, *, every: bool = False) -> str:
        """Lays the points out as plain text, by recall, exact search last.

        Args:
            every: Show all points; otherwise the chosen one and those that no other beats in both
                recall and time, without those far below the target.
        """
        points = sorted(self.points, key=_by_recall) if every else self._shown()
        header = ["leaves", "searched", "dims/block", "reordered", f"recall@{self.k}", "ms/query"]
        lines = [[*header, "target"]]
        for point in points:
            settings = point.settings
            reached = "reached" if point.reaches(self.target_recall) else "-"
            lines.append(
                [
                    str(settings.num_leaves),
                    str(settings.num_leaves_to_search),
                    str(settings.dimensions_per_block),
                    str(settings.num_reordered),
                    f"{point.recall:.4f}",
                    f"{point.query_ms:.4f}",
                    "chosen" if point is self._best() else reached,
                ]
            )
        lines.append(["exact", "-", "-", "-", "1.0000", f"{self.exact_ms:.4f}", "-"])
        return f"{self._title()}\n{format_cells(lines)}"

    def records(self) -> list[dict[str, Any]]:
        """Returns what `table` shows of the index as flat records, for a report or a manifest.

        Each has "index_recall@k", "query_ms" (milliseconds a query) and the settings that vary.
        """
        names = ("num_leaves", "num_leaves_to_search", "num_reordered", "dimensions_per_block")
        return [
            {
                f"index_recall@{self.k}": point.recall,
                "query_ms": round(point.query_ms, 5),
                **{name: getattr(point.settings, name) for name in names},
            }
            for point in self._shown()
        ]

    def as_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold; "chosen" is a place in "points", or None."""
        best = self._best()
        return {**asdict(self), "chosen": None if best is None else self.points.index(best)}

    def figure(self) -> Figure:
        """Draws time against recall: every point, the curve, the target, the chosen point, exact.

        Filled marks reach the target, hollow ones do not. Recalls far below it are cut off. A
        notebook shows it after `%matplotlib inline`.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        for number, structure in enumerate(dict.fromkeys(map(_structure, self.points))):
            points = [point for point in self.points if _structure(point) == structure]
            reached = [point.reaches(self.target_recall) for point in points]
            axes.scatter(
                *_coordinates(points),
                s=28,
                facecolors=[f"C{number}" if is_reached else "none" for is_reached in reached],
                edgecolors=f"C{number}",
                marker="os^D"[number % 4],
                zorder=2,
                label="{:,} leaves, {} dims/block".format(*structure),
            )
        curve = [point for point in sorted(self.points, key=_by_recall) if self._is_best(point)]
        axes.plot(*_coordinates(curve), color="0.3", lw=1, zorder=1, label="recall/latency curve")
        target = f"recall target: {self.target_recall:g}"
        axes.axvline(self.target_recall, color="0.3", linestyle="--", lw=1, label=target)
        exact = f"exact search: {self.exact_ms:,.3f} ms"
        axes.axhline(self.exact_ms, color="tab:red", linestyle=":", lw=1.5, label=exact)
        best = self._best()
        if best is not None:
            chosen = f"chosen: recall {best.recall:.4f}, {best.query_ms:,.3f} ms"
            axes.scatter(
                best.recall, best.query_ms, s=160, fc="none", ec="black", zorder=4, label=chosen
            )
        left = self.target_recall - 2 * _MARGIN
        if max(point.recall for point in self.points) > left:
            axes.set_xlim(left, 1 + 0.03 * (1 - left))
        axes.set_yscale("log")
        # Within a decade the default would write 2 x 10^1.
        for axis_format in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis_format("{x:g}")
        axes.set_xlabel(f"index_recall@{self.k}")
        axes.set_ylabel(f"milliseconds a query, {self.batch_size} in a call")
        axes.set_title(self._title(), fontsize=9)
        axes.grid(which="both", color="0.92")
        axes.set_axisbelow(True)
        axes.legend(fontsize=8)
        return figure

    def _best(self) -> CurvePoint | None:
        reached = (point for point in self.points if point.reaches(self.target_recall))
        return min(reached, key=lambda point: point.work, default=None)

    def _is_best(self, point: CurvePoint) -> bool:
        """Says whether no point finds as much in less time, nor more in the same."""
        return not any(
            other.recall >= point.recall
            and other.query_ms <= point.query_ms
            and (other.recall, other.query_ms) != (point.recall, point.query_ms)
            for other in self.points
        )

    def _shown(self) -> list[CurvePoint]:
        least = min(self.target_recall - _MARGIN, max(point.recall for point in self.points))
        return [
            point
            for point in sorted(self.points, key=_by_recall)
            if point is self._best() or (point.recall >= least and self._is_best(point))
        ]

    def _title(self) -> str:
        if self.num_queries < SMALLEST_SPLIT:
            queries = f"the {self.num_queries} queries it is tuned on, too few to hold some out"
        else:
            queries = f"{self.num_queries // 2} held-out queries"
        return f"{self.num_candidates:,} candidates, recall on {queries}"


def _by_recall(point: CurvePoint) -> tuple[float, float]:
    return point.recall, point.query_ms


def _structure(point: CurvePoint) -> tuple[int, int]:
    return point.settings.num_leaves, point.settings.dimensions_per_block


def _coordinates(points: Sequence[CurvePoint]) -> tuple[list[float], list[float]]:
    return [point.recall for point in points], [point.query_ms for point in points]


def tune_index(
    embeddings: np.ndarray,
    queries: np.ndarray,
    *,
    k: int,
    target_recall: float,
    num_structures: int | None = 2,
    batch_size: int = 16,
) -> tuple[ScannIndex, RecallLatencyCurve]:
    """Builds the ScaNN index that reaches a recall target with the least work.

    Recall is index_recall@k against exact search; every other query chooses the setting, which must
    reach the target on the others too. Structures are built once each; the leaves searched and the
    candidates rescored are arguments of a search. More leaves are tried as long as their work may
    be less than the least that reaches the target. Work is computed and not timed, so that equal
    data give an equal index; the times are for the curve.

    Searches go through a `tf.function`, as a request's do: ScaNN on one thread, exact search on
    TensorFlow's.

    Args:
        embeddings: [num_candidates, D] float32, of any lengths: scores are dot products.
        queries: [num_queries, D] float32 to measure on, not empty; with 200 and more the recall
            holds for others.
        k: Of the recall; capped at num_candidates.
        target_recall: In (0, 1].
        num_structures: Of those that suit the size, how many to try, quickest to build first: 1 to
            be fast, None for all (3 or 4). More are tried while none reaches the target.
        batch_size: Queries in a call. One alone costs more: the call itself takes 0.2 ms.

    Returns:
        The index, set to what was chosen, and what was measured.

    Raises:
        RuntimeError: If no setting reaches the target, with what was measured.
        ValueError: If the target is out of range, or the two arrays do not fit each other.
    """
    Scann(target_recall, k)  # Refuses what is out of range.
    if not (embeddings.ndim == queries.ndim == 2 and embeddings.shape[1] == queries.shape[1]):
        raise ValueError(
            "embeddings and queries must be matrices of the same width. Received: "
            f"embeddings.shape={embeddings.shape}, queries.shape={queries.shape}"
        )
    if not len(embeddings) or not len(queries):
        raise ValueError(
            "There must be candidates to search and queries to measure on. Received: "
            f"{len(embeddings)} candidates, {len(queries)} queries"
        )
    k = min(k, len(embeddings))
    exact = ExactIndex(embeddings)
    probes = _Probes(exact, queries, k, batch_size)
    points: list[CurvePoint] = []
    best, least_work = None, math.inf
    for number, structure in enumerate(_structures(len(embeddings), k)):
        if num_structures is not None and number >= num_structures and best is not None:
            break
        index = ScannIndex(exact, structure)
        for point in _sweep(index, probes, target_recall, least_work):
            points.append(point)
            if point.reaches(target_recall) and point.work < least_work:
                best, least_work = index, point.work
    curve = RecallLatencyCurve(
        k=k,
        target_recall=target_recall,
        num_candidates=len(embeddings),
        num_queries=len(queries),
        batch_size=batch_size,
        exact_ms=probes.exact_ms,
        points=tuple(points),
    )
    chosen = curve.chosen
    logger.info("index: %s", curve.table())
    assert best is not None  # Of the chosen point.
    best.settings = chosen.settings
    return best, curve


class _Probes:
    """Queries with their exact answers, to measure searches on."""

    def __init__(self, exact: ExactIndex, queries: np.ndarray, k: int, batch_size: int) -> None:
        self.k, self._num_queries = k, len(queries)
        # The last batch is filled up from the start, so that all take alike.
        rows = np.resize(np.arange(len(queries)), (-(-len(queries) // batch_size), batch_size))
        self._batches = [tf.constant(queries[batch], tf.float32) for batch in rows]
        self._halves = slice(1, None, 2), slice(0, None, 2)
        if len(queries) < SMALLEST_SPLIT:
            logger.warning(
                "the index is tuned and measured on the same %d queries, below %d too few to split",
                len(queries),
                SMALLEST_SPLIT,
            )
            self._halves = slice(None), slice(None)
        nothing = tf.zeros([batch_size, 0], tf.int32)
        search = _compiled(lambda queries, k: exact.search(queries, k, nothing), 1)
        self._exact, self.exact_ms = self._search(search)

    def measure(self, search: _Search, *options: int) -> tuple[float, float, float]:
        """Searches for k; returns held-out recall, tuning recall and milliseconds a query."""
        found, query_ms = self._search(search, *options)
        held_out, tuning = (index_recall(found[h], self._exact[h]) for h in self._halves)
        return held_out, tuning, query_ms

    def _search(self, search: _Search, *options: int) -> tuple[np.ndarray, float]:
        """Returns [num_queries, k] rows and the median time of a query, in milliseconds."""
        arguments = [tf.constant(option, tf.int32) for option in (self.k, *options)]
        search(self._batches[0], *arguments)  # The first call of a search loads its index.
        found, seconds = [], []
        # Few batches are asked again, for the median.
        for number in range(max(len(self._batches), _MIN_TIMED_CALLS)):
            batch = self._batches[number % len(self._batches)]
            start = time.perf_counter()
            rows = search(batch, *arguments)[0].numpy()
            seconds.append(time.perf_counter() - start)
            found.append(rows)
        query_ms = 1e3 * float(np.median(seconds)) / len(self._batches[0])
        return np.concatenate(found)[: self._num_queries], query_ms


def _sweep(
    index: ScannIndex, probes: _Probes, target_recall: float, least_work: float
) -> list[CurvePoint]:
    """Measures searches of one structure, as long as they may come below the least work so far.

    The leaves are doubled; where the target is first reached, it looks closer below, and goes on.
    """
    search = _compiled(index.approximate, 3)
    options = _numbers_reordered(probes.k, index.num_candidates)
    all_leaves = index.settings.num_leaves
    points: list[CurvePoint] = []

    def measure(leaves: int) -> bool:
        """Varies what is rescored, from much to little; says whether the target was reached."""
        is_reached = False
        for num_reordered in options:
            changes = {"num_leaves_to_search": leaves, "num_reordered": num_reordered}
            settings = replace(index.settings, **changes)
            figures = probes.measure(search, leaves, num_reordered)
            point = CurvePoint(settings, *figures, _work(settings, index.num_candidates))
            points.append(point)
            is_reached |= point.reaches(target_recall)
            # Rescoring fewer finds still less.
            if point.tuning_recall < target_recall - _MARGIN:
                break
        return is_reached

    def may_be_least(leaves: int) -> bool:
        reached = [point.work for point in points if point.reaches(target_recall)]
        settings = replace(index.settings, num_leaves_to_search=leaves, num_reordered=options[-1])
        return _work(settings, index.num_candidates) < min([least_work, *reached])

    too_few, leaves = 0, max(1, all_leaves // 128)
    while not (is_reached := measure(leaves)) and leaves < all_leaves and may_be_least(leaves):
        too_few, leaves = leaves, min(2 * leaves, all_leaves)
    if is_reached:
        enough = leaves
        for _ in range(_NUM_REFINEMENTS):
            between = round(math.sqrt(max(1, too_few) * enough))
            if not too_few < between < enough:
                break
            too_few, enough = (too_few, between) if measure(between) else (between, enough)
    while leaves < all_leaves and may_be_least(2 * leaves):
        leaves = min(2 * leaves, all_leaves)
        measure(leaves)
    return points


def _work(settings: ScannSettings, num_candidates: int) -> float:
    hashed = num_candidates * settings.num_leaves_to_search / settings.num_leaves
    leaves = settings.num_leaves if settings.num_leaves > 1 else 0
    return (
        hashed / settings.dimensions_per_block
        + _WORK_OF_A_LEAF * leaves
        + _WORK_OF_RESCORING * settings.num_reordered
    )


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
