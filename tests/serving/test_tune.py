"""The choice among an index's settings, against slow loops and clocks of a known course."""

import json
import logging
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from tfrs_pipeline.serving import tune as frontier_module
from tfrs_pipeline.serving.index import ScannIndex, ScannSettings
from tfrs_pipeline.serving.tune import (
    Frontier,
    FrontierPoint,
    is_on_frontier,
    measure_frontier,
)


def clustered(num: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(20, dim))
    points = centres[rng.integers(0, 20, num)] + 0.3 * rng.normal(size=(num, dim))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


EMBEDDINGS, QUERIES = clustered(2000), clustered(60, seed=1)


def random_clock(seed: int) -> Callable[[], float]:
    """Returns a clock whose every step is another: what it measures depends on the seed alone."""
    rng, now = np.random.default_rng(seed), [0.0]

    def clock() -> float:
        now[0] += rng.uniform(0.001, 0.002)
        return now[0]

    return clock


def slow_recall(
    index: ScannIndex, embeddings: np.ndarray, queries: np.ndarray, k: int
) -> list[float]:
    """Searches one query at a time, as the index is set; returns the recall of each."""
    recalls = []
    for query in queries:
        best = np.argsort(-(embeddings @ query), kind="stable")[:k].tolist()
        places, scores = index.search(tf.constant(query[None]), k)
        found = [
            place
            for place, score in zip(places[0].numpy().tolist(), scores[0].numpy(), strict=True)
            if score > -np.inf
        ]
        recalls.append(len(set(found) & set(best)) / k)
    return recalls


def points_of(*values: tuple[float, float, float]) -> tuple[FrontierPoint, ...]:
    """Makes points of (recall, tuning recall, microseconds)."""
    return tuple(
        FrontierPoint(ScannSettings(10, number, 100), recall, tuning, microseconds, 1.0)
        for number, (recall, tuning, microseconds) in enumerate(values, 1)
    )


def frontier_of(*values: tuple[float, float, float], target_recall: float = 0.9) -> Frontier:
    return Frontier(100, target_recall, 5000, 60, 16, 80.0, points_of(*values))


def test_the_recall_is_that_of_a_slow_loop() -> None:
    index, frontier = measure_frontier(EMBEDDINGS, QUERIES, k=50, target_recall=0.9)
    recalls = slow_recall(index, EMBEDDINGS, QUERIES, 50)
    # A candidate as good as the last of the 50 may stand in its place.
    assert frontier.chosen.recall == pytest.approx(np.mean(recalls[1::2]), abs=2e-3)
    assert frontier.chosen.tuning_recall == pytest.approx(np.mean(recalls[::2]), abs=2e-3)
    assert min(frontier.chosen.recall, frontier.chosen.tuning_recall) >= 0.9
    assert index.settings == frontier.chosen.settings


@pytest.mark.parametrize("seed", range(3))
def test_of_the_points_that_keep_the_promise_the_least_time_is_chosen(seed: int) -> None:
    index, frontier = measure_frontier(
        EMBEDDINGS, QUERIES, k=50, target_recall=0.8, num_structures=None, clock=random_clock(seed)
    )
    times = [p.microseconds for p in frontier.points if min(p.recall, p.tuning_recall) >= 0.8]
    assert frontier.chosen.microseconds == min(times)
    assert len(set(times)) == len(times)
    assert index.settings == frontier.chosen.settings
    # The index is of the structure that was chosen: it searches as well as measured.
    recalls = slow_recall(index, EMBEDDINGS, QUERIES, 50)
    assert np.mean(recalls[1::2]) == pytest.approx(frontier.chosen.recall, abs=2e-3)


def test_what_is_chosen_depends_on_the_clock() -> None:
    chosen = {
        measure_frontier(EMBEDDINGS, QUERIES, k=50, target_recall=0.8, clock=random_clock(seed))[
            1
        ].chosen.settings
        for seed in range(4)
    }
    assert len(chosen) > 1


def test_a_clock_gives_the_median_of_the_batches() -> None:
    steps = iter(range(10**9))
    now = [0.0]

    def clock() -> float:
        # Every second reading ends a batch; one batch in five takes a hundred times as long.
        step = next(steps)
        if step % 2:
            now[0] += 0.1 if step % 10 == 9 else 0.001
        return now[0]

    _, frontier = measure_frontier(
        EMBEDDINGS, QUERIES, k=50, target_recall=0.8, batch_size=4, clock=clock
    )
    expected = 1e6 * 0.001 / 4
    assert frontier.exact_microseconds == pytest.approx(expected)
    assert [p.microseconds for p in frontier.points] == pytest.approx(
        [expected] * len(frontier.points)
    )


def test_the_held_out_half_decides() -> None:
    # The cheapest keeps the promise where it is tuned only, the second where it is not.
    frontier = frontier_of((0.8, 0.95, 10.0), (0.95, 0.8, 20.0), (0.91, 0.92, 30.0))
    assert frontier.chosen == frontier.points[2]
    assert frontier.chosen.recall == 0.91


def test_a_promise_easy_to_keep_where_it_is_tuned_is_kept_elsewhere_too() -> None:
    # Half of the corpus in tight groups of 10, each in one leaf; half everywhere.
    rng = np.random.default_rng(0)
    groups = np.repeat(3 * rng.normal(size=(100, 16)), 10, axis=0)
    groups += 0.01 * rng.normal(size=groups.shape)
    spread = rng.normal(size=(1000, 16))
    embeddings = np.concatenate([groups, spread]).astype(np.float32)
    easy, hard = groups[::25], spread[:40] @ np.linalg.qr(rng.normal(size=(16, 16)))[0]
    queries = np.stack([easy, hard], axis=1).reshape(-1, 16).astype(np.float32)
    index, frontier = measure_frontier(
        embeddings, queries, k=10, target_recall=0.95, num_structures=None, clock=random_clock(0)
    )
    cheap = [p for p in frontier.points if p.tuning_recall >= 0.95 and p.recall < 0.95]
    assert cheap  # Else the held-out half would have nothing to decide.
    recalls = slow_recall(index, embeddings, queries, 10)
    assert np.mean(recalls[1::2]) >= 0.95 - 1e-3
    assert np.mean(recalls[::2]) >= 0.95 - 1e-3


def test_few_queries_are_not_split_and_this_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _, frontier = measure_frontier(EMBEDDINGS, QUERIES[:19], k=50, target_recall=0.9)
    assert all(point.recall == point.tuning_recall for point in frontier.points)
    assert "the same 19 queries" in caplog.text
    assert "the 19 queries it is tuned on" in frontier.table()


def test_empty_slots_are_no_hits() -> None:
    # Eight leaves of about five: one leaf cannot fill 20 slots, whose places ScaNN leaves at 0.
    index = ScannIndex(EMBEDDINGS[:40], ScannSettings(8, 1, num_reordered=40))
    probes = frontier_module._Probes(EMBEDDINGS[:40], QUERIES, 20, 16, random_clock(0))
    search = frontier_module._compiled(index.search, 2)
    held_out, tuning, _ = probes.measure(search, 1)
    recalls = slow_recall(index, EMBEDDINGS[:40], QUERIES, 20)
    assert 0 < held_out < 0.9
    assert held_out == pytest.approx(np.mean(recalls[1::2]))
    assert tuning == pytest.approx(np.mean(recalls[::2]))


def test_a_point_that_another_beats_is_not_on_the_frontier() -> None:
    points = points_of((0.9, 0.9, 30.0), (0.9, 0.9, 20.0), (0.8, 0.8, 20.0), (0.7, 0.7, 10.0))
    assert [is_on_frontier(point, points) for point in points] == [False, True, False, True]
    # Equal points do not beat each other.
    twins = points_of((0.9, 0.9, 20.0), (0.9, 0.9, 20.0))
    assert all(is_on_frontier(point, twins) for point in twins)


def test_an_impossible_promise_fails_with_what_was_measured() -> None:
    # Nothing can find candidates of equal score in the same order as exact search.
    same = np.tile(EMBEDDINGS[:1], (500, 1))
    with pytest.raises(RuntimeError) as error:
        measure_frontier(same, QUERIES, k=10, target_recall=1.0)
    message = str(error.value)
    assert "index_recall@10 = 1.0" in message
    assert "export.target_recall" in message
    assert "export.index = 'exact'" in message
    header, *lines = message.split("\n")[2:]
    assert header.split()[:4] == ["leaves", "searched", "dims/block", "reordered"]
    # Every structure was tried, though two were asked for.
    assert lines[-1].split()[0] == "exact"
    assert len(lines) > 1


def test_more_structures_are_tried_until_the_promise_is_kept() -> None:
    # Twenty rescored are too few for the best one of 3,000 at two dimensions a block.
    rng = np.random.default_rng(0)
    embeddings, queries = (rng.normal(size=(num, 32)).astype(np.float32) for num in (3000, 60))

    def structures(num_structures: int, target_recall: float) -> set[tuple[int, int]]:
        _, frontier = measure_frontier(
            embeddings, queries, k=1, target_recall=target_recall, num_structures=num_structures
        )
        return {(p.settings.num_leaves, p.settings.dimensions_per_block) for p in frontier.points}

    assert structures(1, 0.1) == {(1, 2)}
    assert structures(2, 0.1) == {(1, 2), (1, 1)}
    assert structures(1, 1.0) > {(1, 2)}


@pytest.mark.parametrize("num_candidates", [16, 17, 40, 101])
def test_a_corpus_of_any_size_is_found_whole(num_candidates: int) -> None:
    embeddings = EMBEDDINGS[:num_candidates]
    index, frontier = measure_frontier(
        embeddings, QUERIES, k=100, target_recall=0.99, num_structures=None
    )
    assert frontier.k == min(100, num_candidates)
    places, _ = index.search(tf.constant(QUERIES), frontier.k)
    if num_candidates <= 100:
        np.testing.assert_array_equal(
            np.sort(places, axis=1), np.tile(np.arange(num_candidates), (60, 1))
        )


def test_lengths_that_vary_and_a_width_that_no_block_divides() -> None:
    rng = np.random.default_rng(0)
    embeddings = clustered(2000, dim=7) * rng.lognormal(sigma=1.0, size=(2000, 1))
    queries = clustered(60, dim=7, seed=1) * rng.lognormal(sigma=1.0, size=(60, 1))
    embeddings, queries = embeddings.astype(np.float32), queries.astype(np.float32)
    index, frontier = measure_frontier(
        embeddings, queries, k=50, target_recall=0.95, num_structures=None
    )
    recalls = slow_recall(index, embeddings, queries, 50)
    assert np.mean(recalls[1::2]) == pytest.approx(frontier.chosen.recall, abs=2e-3)
    assert np.mean(recalls[1::2]) >= 0.95 - 2e-3


def test_a_large_corpus_is_partitioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontier_module, "SMALLEST_PARTITIONED_CORPUS", 1000)
    index, frontier = measure_frontier(
        EMBEDDINGS, QUERIES, k=50, target_recall=0.95, num_structures=None
    )
    leaves = {point.settings.num_leaves for point in frontier.points}
    assert leaves == {45, 180}
    assert index.settings.num_leaves_to_search < index.settings.num_leaves
    assert np.mean(slow_recall(index, EMBEDDINGS, QUERIES, 50)) >= 0.95 - 2e-3


def test_a_frontier_goes_through_json() -> None:
    for frontier in (frontier_of((0.95, 0.95, 10.0)), frontier_of((0.5, 0.5, 10.0))):
        values = json.loads(json.dumps(frontier.as_dict()))
        assert Frontier.from_dict(values) == frontier
    assert frontier_of((0.8, 0.8, 5.0), (0.95, 0.95, 10.0)).as_dict()["chosen"] == 1
    assert frontier_of((0.8, 0.8, 5.0)).as_dict()["chosen"] is None


def test_the_table_shows_the_frontier_or_everything() -> None:
    frontier = frontier_of((0.95, 0.95, 30.0), (0.95, 0.95, 20.0), (0.87, 0.87, 9.0))
    lines = [line.split() for line in frontier.table().split("\n")[2:]]
    assert [line[1] for line in lines] == ["3", "2", "-"]
    assert [line[-1] for line in lines] == ["-", "chosen", "-"]
    assert len(frontier.table(every=True).split("\n")) == len(lines) + 3
    assert len({len(line) for line in frontier.table().split("\n")[1:]}) == 1


@pytest.mark.parametrize("target_recall", [0.9, 0.99])
def test_the_figure_draws_every_part(target_recall: float) -> None:
    frontier = frontier_of((0.95, 0.95, 30.0), (0.93, 0.93, 20.0), target_recall=target_recall)
    axes = frontier.figure().axes[0]
    labels = axes.get_legend_handles_labels()[1]
    assert "10 leaves, 2 dims/block" in labels
    assert f"promised: {target_recall}" in labels
    assert "exact search: 80 us" in labels
    assert any(label.startswith("chosen") for label in labels) == (target_recall == 0.9)
    assert axes.get_yscale() == "log"
    line = next(x for x in axes.lines if x.get_label() == "frontier")
    assert np.asarray(line.get_xydata()).tolist() == [[0.93, 20.0], [0.95, 30.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be 1 or more. Received: 0"),
        ({"num_structures": 0}, "num_structures must be 1 or more"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"target_recall": 0.0}, r"in \(0, 1\]. Received: 0.0"),
        ({"target_recall": 1.01}, r"in \(0, 1\]. Received: 1.01"),
        ({"queries": QUERIES[:0]}, "0 queries"),
        ({"queries": QUERIES[:, :3]}, r"queries.shape=\(60, 3\)"),
        ({"embeddings": EMBEDDINGS[:0]}, "0 candidates"),
        ({"embeddings": EMBEDDINGS[:15]}, "exact'. Received: 15 candidates"),
    ],
)
def test_refuses(change: dict[str, object], message: str) -> None:
    arguments = {"embeddings": EMBEDDINGS, "queries": QUERIES, "k": 10, "target_recall": 0.9}
    with pytest.raises(ValueError, match=message):
        measure_frontier(**{**arguments, **change})  # type: ignore[arg-type]
