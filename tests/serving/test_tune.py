"""The choice among an index's settings, against slow loops."""

import json
import logging

import numpy as np
import pytest
import tensorflow as tf

from tests.serving.test_index import clustered
from tfrs_pipeline.serving import tune
from tfrs_pipeline.serving.index import ExactIndex, ScannIndex, ScannSettings
from tfrs_pipeline.serving.tune import CurvePoint, RecallLatencyCurve, tune_index

EMBEDDINGS, QUERIES = clustered(2000), clustered(60, seed=1)


def slow_recall(
    index: ScannIndex, embeddings: np.ndarray, queries: np.ndarray, k: int
) -> list[float]:
    """Searches one query at a time, as the index is set; returns the recall of each."""
    recalls = []
    for query in queries:
        best = 1 + np.argsort(-(embeddings @ query), kind="stable")[:k]
        rows = index.approximate(tf.constant(query[None]), k)[0][0].numpy()
        recalls.append(len(set(rows.tolist()) & set(best.tolist())) / k)
    return recalls


def curve_of(
    *values: tuple[float, float, float, float], target_recall: float = 0.9
) -> RecallLatencyCurve:
    """Makes a curve of points (recall, tuning recall, milliseconds, work)."""
    points = tuple(
        CurvePoint(ScannSettings(10, number, 100), *point) for number, point in enumerate(values, 1)
    )
    return RecallLatencyCurve(100, target_recall, 5000, 60, 16, 0.08, points)


@pytest.mark.parametrize("case", ["cosines", "lengths and an odd width", "partitioned"])
def test_what_is_chosen_has_the_recall_of_a_slow_loop_and_the_least_work(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings, queries = EMBEDDINGS, QUERIES
    if case == "lengths and an odd width":
        rng = np.random.default_rng(0)
        embeddings, queries = (
            (clustered(num, dim=7, seed=seed) * rng.lognormal(size=(num, 1))).astype(np.float32)
            for seed, num in enumerate((2000, 60))
        )
    if case == "partitioned":
        monkeypatch.setattr(tune, "SMALLEST_PARTITIONED_CORPUS", 1000)
    index, curve = tune_index(embeddings, queries, k=50, target_recall=0.95, num_structures=None)
    chosen, recalls = curve.chosen, slow_recall(index, embeddings, queries, 50)
    assert index.settings == chosen.settings
    # A candidate as good as the last of the 50 may stand in its place.
    assert chosen.recall == pytest.approx(np.mean(recalls[1::2]), abs=2e-3)
    assert chosen.tuning_recall == pytest.approx(np.mean(recalls[::2]), abs=2e-3)
    reached = [p.work for p in curve.points if min(p.recall, p.tuning_recall) >= 0.95]
    assert chosen.work == min(reached)
    if case == "partitioned":
        assert {point.settings.num_leaves for point in curve.points} == {45, 180}
        assert chosen.settings.num_leaves_to_search < chosen.settings.num_leaves


def test_equal_data_give_an_equal_index() -> None:
    found = []
    for _ in range(2):
        index, curve = tune_index(EMBEDDINGS, QUERIES, k=50, target_recall=0.8)
        rows, scores = index.approximate(tf.constant(QUERIES), 50)
        found.append((index.settings, [p.recall for p in curve.points], rows.numpy(), scores))
    for first, second in zip(*found, strict=True):
        np.testing.assert_array_equal(first, second)


def test_work_grows_with_what_a_search_does() -> None:
    base = ScannSettings(100, 10, 200)
    for more in (
        ScannSettings(100, 20, 200),
        ScannSettings(100, 10, 300),
        ScannSettings(100, 10, 200, dimensions_per_block=1),
        ScannSettings(1, 1, 200),
    ):
        assert tune._work(base, 100_000) < tune._work(more, 100_000)


def test_the_held_out_half_decides() -> None:
    # The least work reaches the target where it is tuned only, the second where it is not.
    curve = curve_of((0.8, 0.95, 0.01, 1), (0.95, 0.8, 0.02, 2), (0.91, 0.92, 0.03, 3))
    assert curve.chosen == curve.points[2]


def test_a_target_easy_to_reach_where_it_is_tuned_is_reached_elsewhere_too() -> None:
    # Half of the corpus in tight groups of 10, each in one leaf; half everywhere.
    rng = np.random.default_rng(0)
    groups = np.repeat(3 * rng.normal(size=(100, 16)), 10, axis=0)
    groups += 0.01 * rng.normal(size=groups.shape)
    spread = rng.normal(size=(1000, 16))
    embeddings = np.concatenate([groups, spread]).astype(np.float32)
    easy, hard = groups[::25], spread[:40] @ np.linalg.qr(rng.normal(size=(16, 16)))[0]
    queries = np.stack([easy, hard], axis=1).reshape(-1, 16).astype(np.float32)
    index, curve = tune_index(embeddings, queries, k=10, target_recall=0.95, num_structures=None)
    cheap = [p for p in curve.points if p.tuning_recall >= 0.95 and p.recall < 0.95]
    assert cheap  # Else the held-out half would have nothing to decide.
    assert np.mean(slow_recall(index, embeddings, queries, 10)[1::2]) >= 0.95 - 1e-3


def test_few_queries_are_not_split_and_this_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _, curve = tune_index(EMBEDDINGS, QUERIES[:19], k=50, target_recall=0.9)
    assert all(point.recall == point.tuning_recall for point in curve.points)
    assert "the same 19 queries" in caplog.text
    assert "the 19 queries it is tuned on" in curve.table()


def test_empty_slots_are_no_hits() -> None:
    # Eight leaves of about five: one leaf cannot fill 20 slots.
    exact = ExactIndex(EMBEDDINGS[:40])
    index = ScannIndex(exact, ScannSettings(8, 1, num_reordered=40))
    probes = tune._Probes(exact, QUERIES, 20, 16)
    held_out, tuning, _ = probes.measure(tune._compiled(index.approximate, 2), 1)
    recalls = slow_recall(index, EMBEDDINGS[:40], QUERIES, 20)
    assert 0 < held_out < 0.9
    assert held_out == pytest.approx(np.mean(recalls[1::2]))
    assert tuning == pytest.approx(np.mean(recalls[::2]))


def test_a_target_out_of_reach_fails_with_what_was_measured() -> None:
    # Nothing can find candidates of equal score in the same order as exact search.
    same = np.tile(EMBEDDINGS[:1], (500, 1))
    with pytest.raises(RuntimeError, match=r"index_recall@10 = 1.0.*take the exact") as error:
        tune_index(same, QUERIES, k=10, target_recall=1.0, num_structures=1)
    header, *lines = str(error.value).split("\n")[2:]
    assert header.split()[:4] == ["leaves", "searched", "dims/block", "reordered"]
    # Every structure was tried, though one was asked for.
    assert lines[-1].split()[0] == "exact"
    assert len(lines) > 1


def test_more_structures_are_tried_until_the_target_is_reached() -> None:
    # Twenty rescored are too few for the best one of 3,000 at two dimensions a block.
    rng = np.random.default_rng(0)
    embeddings, queries = (rng.normal(size=(num, 32)).astype(np.float32) for num in (3000, 60))

    def structures(num_structures: int, target_recall: float) -> set[tuple[int, int]]:
        _, curve = tune_index(
            embeddings, queries, k=1, target_recall=target_recall, num_structures=num_structures
        )
        return {(p.settings.num_leaves, p.settings.dimensions_per_block) for p in curve.points}

    assert structures(1, 0.1) == {(1, 2)}
    assert structures(2, 0.1) == {(1, 2), (1, 1)}
    assert structures(1, 1.0) > {(1, 2)}


@pytest.mark.parametrize("num_candidates", [16, 40])
def test_a_corpus_smaller_than_k_is_found_whole(num_candidates: int) -> None:
    index, curve = tune_index(EMBEDDINGS[:num_candidates], QUERIES, k=100, target_recall=0.99)
    assert curve.k == num_candidates
    rows, _ = index.approximate(tf.constant(QUERIES), curve.k)
    np.testing.assert_array_equal(np.sort(rows, axis=1), [range(1, num_candidates + 1)] * 60)


def test_the_table_shows_the_curve_or_everything_and_json_all() -> None:
    curve = curve_of((0.95, 0.95, 0.03, 2), (0.95, 0.95, 0.02, 1), (0.87, 0.87, 0.009, 0.5))
    lines = [line.split() for line in curve.table().split("\n")[2:]]
    assert [line[1] for line in lines] == ["3", "2", "-"]
    assert [line[-1] for line in lines] == ["-", "chosen", "-"]
    assert len(curve.table(every=True).split("\n")) == len(lines) + 3
    assert [r["num_leaves_to_search"] for r in curve.records()] == [3, 2]
    assert json.loads(json.dumps(curve.as_dict()))["chosen"] == 1
    assert curve_of((0.8, 0.8, 0.005, 1)).as_dict()["chosen"] is None


@pytest.mark.parametrize("target_recall", [0.9, 0.99])
def test_the_figure_draws_every_part(target_recall: float) -> None:
    curve = curve_of((0.95, 0.95, 0.03, 2), (0.93, 0.93, 0.02, 1), target_recall=target_recall)
    axes = curve.figure().axes[0]
    labels = axes.get_legend_handles_labels()[1]
    assert "10 leaves, 2 dims/block" in labels
    assert f"recall target: {target_recall}" in labels
    assert "exact search: 0.080 ms" in labels
    assert any(label.startswith("chosen") for label in labels) == (target_recall == 0.9)
    line = next(x for x in axes.lines if x.get_label() == "recall/latency curve")
    assert np.asarray(line.get_xydata()).tolist() == [[0.93, 0.02], [0.95, 0.03]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be 1 or more. Received: 0"),
        ({"target_recall": 1.01}, r"in \(0, 1\]. Received: 1.01"),
        ({"queries": QUERIES[:0]}, "0 queries"),
        ({"queries": QUERIES[:, :3]}, r"queries.shape=\(60, 3\)"),
        ({"embeddings": EMBEDDINGS[:15]}, "exact index. Received: 15 candidates"),
    ],
)
def test_refuses(change: dict[str, object], message: str) -> None:
    arguments = {"embeddings": EMBEDDINGS, "queries": QUERIES, "k": 10, "target_recall": 0.9}
    with pytest.raises(ValueError, match=message):
        tune_index(**{**arguments, **change})  # type: ignore[arg-type]
