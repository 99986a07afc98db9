"""What an evaluation prints, counts and refuses; `test_slow_evaluator.py` has its numbers."""

import dataclasses
import json
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pytest

import tfrs_pipeline as tp
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.search.topk import ScoreRetriever

IDS = np.arange(100, 112)
COUNTS = np.array([9, 9, 6, 5, 4, 3, 2, 1, 1, 0, 0, 0])
CALL_SIZE = f"{tp.evaluate.__module__}.QUERIES_PER_CALL"


class Scores:
    """Retrieves by scores, [num_users, num_candidates], of user ids from 0; `spoil` changes the
    answers."""

    def __init__(self, scores: Any, ids: np.ndarray = IDS, spoil: Any = None) -> None:
        self.scores = np.asarray(scores, float)
        self.items = Ids(ids)
        self.spoil = spoil or (lambda ids, scores: (ids, scores))

    def retrieve(
        self, queries: Sequence[tp.Query], k: int, exclude: Sequence[Collection[Any]] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        def score(queries: Sequence[tp.Query]) -> np.ndarray:
            return self.scores[[query["user_id"] for query in queries]]

        return self.spoil(*ScoreRetriever(self.items, score).retrieve(queries, k, exclude))


def make_holdout(
    relevant: Any, clicked: Any = None, seen: Any = None, dtype: type = int
) -> tp.Holdout:
    clicked = clicked or [[]] * len(relevant)
    lists = relevant, clicked, seen or clicked
    relevant, clicked, seen = ([np.array(ids, dtype) for ids in x] for x in lists)
    ids = IDS if dtype is int else np.array(["a", "b", "c"], object)
    counts = COUNTS[: len(ids)]
    return tp.Holdout(np.arange(len(relevant)), clicked, relevant, clicked, seen, ids, counts)


def measure_all(retrievers: Any, holdout: tp.Holdout, **options: Any) -> tp.Evaluation:
    return tp.evaluate(retrievers, holdout, **{"cutoffs": (3,), "num_bootstrap": 0, **options})


def measure(retriever: tp.Retriever, holdout: tp.Holdout, **options: Any) -> tp.EvaluationResult:
    return measure_all(retriever, holdout, **options).first


def test_a_summary_is_json_without_nan() -> None:
    result = measure(Scores(np.zeros((2, 12))), make_holdout([[100], [100]]))
    summary = json.loads(json.dumps(result.summary(), allow_nan=False))
    assert summary["coverage@3"] == 3 / 12
    # Nothing relevant is in the tail.
    assert summary["slices"]["tail"]["recall@3"] == {"mean": None, "low": None, "high": None}
    assert {"num_queries", "num_skipped", "num_relevant", "num_relevant_excluded"} <= set(summary)


@pytest.mark.parametrize(
    ("num_users", "relevant", "is_told"), [(20, [100], True), (21, [100], False), (20, [], False)]
)
def test_many_queries_that_an_exclusion_leaves_empty_come_with_a_remedy(
    num_users: int, relevant: list[int], is_told: bool
) -> None:
    """From 5% on, and only if the user had clicked what was to be found."""
    others = num_users - 1
    holdout = make_holdout([relevant, *[[100]] * others], [[100], *[[101]] * others])
    lines = measure(Scores(np.zeros((num_users, 12))), holdout, exclude="clicked").describe()
    (line,) = (line for line in lines if "skipped, with nothing to find" in line)
    assert line.startswith(f"1 of {num_users} queries")
    assert ("set evaluation.exclude to none (docs/guides/rules.md)" in line) == is_told


def test_a_holdout_has_as_many_lists_as_users() -> None:
    lists = [IDS[:1], IDS[1:2]]
    good: dict[str, Any] = dict.fromkeys(("histories", "relevant", "clicked", "seen"), lists)
    good |= {"user_ids": [0, 1], "candidate_ids": IDS.tolist(), "candidate_counts": COUNTS.tolist()}
    assert tp.Holdout(**good).candidate_ids.dtype == np.int64
    for name in ("histories", "relevant", "clicked", "seen", "history_times", "requests"):
        with pytest.raises(ValueError, match=rf"{name} must hold one entry .* 2 user_ids.*: 1"):
            tp.Holdout(**good | {name: lists[:1]})
    with pytest.raises(ValueError, match=r"candidate_counts must hold one .* 12 .*: 3"):
        tp.Holdout(**good | {"candidate_counts": [1, 2, 3]})


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_lists_of_other_types_leave_large_ids_as_they_are(dtype: type) -> None:
    """Empty lists are floats; unsigned and signed integers together would become floats."""
    ids = 2**60 + np.arange(12)
    relevant: Any = [ids[1:2].astype(dtype), ids[2:3].astype(dtype)]
    before = [ids[:1], np.array([])]
    holdout = tp.Holdout(np.arange(2), before, relevant, before, before, ids, COUNTS)
    result = measure(Scores(-np.tile(np.arange(12), (2, 1)), ids), holdout)
    assert result.per_query["recall@3"].tolist() == [1, 1]
    assert result.overall.num_relevant == 2


def test_strings_are_ids_too_but_not_beside_numbers() -> None:
    holdout = make_holdout([["c", "b"]], [["a"]], dtype=object)
    retriever = Scores([[3.0, 1.0, 2.0]], holdout.candidate_ids)
    assert measure(retriever, holdout, cutoffs=(1,)).per_query["recall@1"].tolist() == [0.5]
    mixed = dataclasses.replace(make_holdout([[100]]), relevant=[np.array(["a"], object)])
    with pytest.raises(ValueError, match="relevant 'a', candidate 100"):
        measure(retriever, mixed)


def test_progress_counts_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CALL_SIZE, 2)
    seen: list[tuple[str, int, int]] = []
    retrievers = {name: Scores(np.zeros((3, 12))) for name in "ab"}
    measure_all(retrievers, make_holdout([[100]] * 3), on_progress=lambda *x: seen.append(x))
    assert seen == [("a", 2, 3), ("a", 3, 3), ("b", 2, 3), ("b", 3, 3)]


def test_differences_are_paired_and_narrower_than_the_two_intervals() -> None:
    rng = np.random.default_rng(0)
    holdout = make_holdout([rng.choice(IDS, 3, replace=False).tolist() for _ in range(300)])
    scores = rng.random((300, 12))
    better = scores.copy()
    for user, relevant in enumerate(holdout.relevant):
        better[user, relevant[0] - 100] += 0.1
    models = {"first": Scores(scores), "better": Scores(better), "same": Scores(scores)}
    found = measure_all(models, holdout, num_bootstrap=200)
    assert list(found.differences) == ["better", "same"]
    first, second = (found.results[n].overall.intervals["ndcg@3"] for n in ("first", "better"))
    difference = found.differences["better"]["ndcg@3"]
    assert difference.mean == pytest.approx(second.mean - first.mean)
    assert 0 < difference.low < difference.mean < difference.high
    assert difference.high - difference.low < (first.high - first.low) / 2
    assert found.differences["same"]["ndcg@3"] == tp.Interval(0, 0, 0)
    # Each model is printed in a line, with the difference beside the number.
    header, *lines = str(found).split("\n")
    assert [line.split()[0] for line in lines[:3]] == ["first", "better", "same"]
    assert "ndcg@3" in header
    assert f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]" in lines[1]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda ids, scores: (ids[:, :2], scores[:, :2]), r"ids and scores of \(1, 3\)"),
        (lambda ids, scores: ids, r"ids and scores of \(1, 3\).*Received: ndarray"),
        (lambda ids, scores: None, "ids and scores of .*Received: NoneType"),
        (lambda ids, scores: (ids, scores, scores), "ids and scores of .*Received: tuple"),
        (lambda ids, scores: (ids + 500, scores), "not candidates.*601"),
        (lambda ids, scores: (ids[:, [0, 1, 0]], scores), "twice"),
        (lambda ids, scores: (ids - 1, scores), "excluded"),
        (lambda ids, scores: (ids, scores + np.arange(3)), "best first"),
        (lambda ids, scores: (ids, scores * np.nan), "without NaN"),
        (lambda ids, scores: (ids, scores.astype(str)), "numbers as scores"),
        (lambda ids, scores: (ids.astype(str).astype(object), scores), "not candidates"),
    ],
)
def test_a_retriever_that_breaks_its_contract_is_refused(spoil: Any, message: str) -> None:
    holdout, broken = make_holdout([[102]], clicked=[[100]]), Scores(np.zeros((1, 12)), spoil=spoil)
    for cutoff in (3, 1) if message == "without NaN" else (3,):  # Also a single score.
        with pytest.raises(ValueError, match=f"Scores.retrieve .*{message}"):
            measure(broken, holdout, cutoffs=(cutoff,))


HOLDOUT = make_holdout([[100]], [[102]])
ALONE = Scores(np.zeros((2, 12)))


@pytest.mark.parametrize(
    ("retrievers", "holdout", "options", "error", "message"),
    [
        (ALONE, HOLDOUT, {"exclude": "liked"}, ValueError, "'liked'"),
        (ALONE, HOLDOUT, {"cutoffs": ()}, ValueError, r"cutoffs .*\[\]"),
        (ALONE, HOLDOUT, {"cutoffs": (0, 5)}, ValueError, r"cutoffs .*\[0, 5\]"),
        (ALONE, HOLDOUT, {"cutoffs": ["5"]}, ValueError, r"cutoffs .*\['5'\]"),
        (ALONE, HOLDOUT, {"cutoffs": 20}, TypeError, "cutoffs must be a list.*Received: 20"),
        (ALONE, make_holdout([[102], []], [[102]] * 2), {}, ValueError, "2 queries .*1 were excl"),
        (ALONE, [[100]], {}, TypeError, "needs a Holdout.*Received: list"),
        ({}, HOLDOUT, {}, ValueError, "at least one retriever"),
        ({"two_tower": Scores}, HOLDOUT, {}, TypeError, "two_tower has no `retrieve`: .*<class"),
        (tp.Ease(), HOLDOUT, {}, TypeError, "Ease has no `retrieve`: pass what its fit returns"),
    ],
)
def test_refuses_what_cannot_be_measured(
    retrievers: Any, holdout: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        measure_all(retrievers, holdout, **options)


def test_a_retriever_may_return_lists() -> None:
    holdout, scores = make_holdout([[102]]), np.arange(12.0)[np.newaxis]
    as_lists = Scores(scores, spoil=lambda ids, scores: (ids.tolist(), scores.tolist()))
    assert measure(as_lists, holdout).overall == measure(Scores(scores), holdout).overall


def test_a_sample_measures_its_users_as_the_whole_does_and_says_so() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(50, len(IDS)))
    relevant = [rng.choice(IDS, 2, replace=False) for _ in range(50)]
    holdout = make_holdout(relevant, [rng.choice(IDS, 3, replace=False) for _ in range(50)])
    whole, sample = (measure(Scores(scores), part) for part in (holdout, holdout.sample(20, 3)))
    is_drawn = np.isin(whole.user_ids, holdout.sample(20, 3).user_ids)
    assert np.array_equal(sample.user_ids, whole.user_ids[is_drawn])
    for metric, values in whole.per_query.items():
        np.testing.assert_array_equal(sample.per_query[metric], values[is_drawn])
    assert sample.summary()["num_sampled_from"] == 50
    assert "of 50 queries, sampled" in repr(measure_all(Scores(scores), holdout.sample(20, 3)))
    assert "sampled" not in repr(measure_all(Scores(scores), holdout))
    assert holdout.sample(50) is holdout
    assert holdout.sample(30, 3).sample(20, 4).num_sampled_from == 50
    # All users are equally likely: 40 of 100 draws of 20, within five standard deviations.
    times = sum(np.isin(holdout.user_ids, holdout.sample(20, s).user_ids) for s in range(100))
    assert np.all(np.abs(times - 40) <= 5 * math.sqrt(100 * 0.4 * 0.6))
