import json
import math
from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.split import EvaluationQueries
from tfrs_pipeline.evaluation.bootstrap import Interval
from tfrs_pipeline.evaluation.evaluate import (
    Exclude,
    evaluate,
    popularity_slices,
)
from tfrs_pipeline.evaluation.metrics import QUERY_METRICS
from tfrs_pipeline.evaluation.results import EvaluationResult
from tfrs_pipeline.evaluation.topk import retrieve_by_scores
from tfrs_pipeline.retrieval import Query, Retriever

IDS = np.arange(100, 112)
Problem: TypeAlias = tuple[EvaluationQueries, np.ndarray, int]
COUNTS = np.array([9, 9, 6, 5, 4, 3, 2, 1, 1, 0, 0, 0])


class Scores:
    """A retriever of given scores: [num_users, num_candidates], users 0 and up."""

    def __init__(self, scores: Any, ids: np.ndarray = IDS) -> None:
        self.scores = np.asarray(scores, float)
        self.corpus = Ids(ids)

    def retrieve(
        self, queries: Sequence[Query], k: int, exclude: Sequence[Collection[Any]] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        return retrieve_by_scores(
            lambda qs: self.scores[[q["user_id"] for q in qs]], self.corpus, queries, k, exclude
        )


def make_queries(relevant: Any, clicked: Any = None, seen: Any = None) -> EvaluationQueries:
    clicked = clicked or [[]] * len(relevant)
    seen = seen or clicked
    return EvaluationQueries(
        user_ids=np.arange(len(relevant)),
        histories=[np.array(c, int) for c in clicked],
        relevant=[np.array(r, int) for r in relevant],
        clicked=[np.array(c, int) for c in clicked],
        seen=[np.array(s, int) for s in seen],
    )


def measure(retriever: Retriever, queries: EvaluationQueries, **options: Any) -> EvaluationResult:
    options = {"cutoffs": (3,), "num_bootstrap": 0, **options}
    return evaluate(retriever, queries, candidate_ids=IDS, candidate_counts=COUNTS, **options).first


def slow_values(
    scores: np.ndarray,
    queries: EvaluationQueries,
    excluded: list[np.ndarray],
    in_slice: np.ndarray,
    k: int,
) -> np.ndarray:
    """Ranks by a plain sort and counts, one query at a time; None where nothing is relevant."""
    values = []
    for user, relevant in enumerate(queries.relevant):
        gone = set(excluded[user].tolist())
        wanted = set(relevant.tolist()) - gone
        if not wanted:
            continue
        ranking = sorted(
            (i for i in range(len(IDS)) if IDS[i] not in gone), key=lambda i: -scores[user][i]
        )
        wanted = {id_ for id_ in wanted if in_slice[id_ - IDS[0]]}
        if not wanted:
            values.append([math.nan, math.nan])
            continue
        gains = [1 / math.log2(p + 2) for p, i in enumerate(ranking[:k]) if IDS[i] in wanted]
        ideal = sum(1 / math.log2(p + 2) for p in range(min(k, len(wanted))))
        values.append([len(gains) / len(wanted), sum(gains) / ideal])
    return np.array(values)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    num_users = draw(st.integers(1, 6))
    some_ids = st.lists(st.sampled_from(IDS.tolist()), unique=True, max_size=5)
    clicked = [draw(some_ids) for _ in range(num_users)]
    seen = [sorted({*c, *draw(some_ids)}) for c in clicked]
    relevant = [draw(some_ids) for _ in range(num_users - 1)] + [[IDS[0]]]
    clicked[-1] = seen[-1] = []
    scores = draw(
        st.lists(
            st.lists(st.integers(0, 5), min_size=12, max_size=12),
            min_size=num_users,
            max_size=num_users,
        )
    )
    return make_queries(relevant, clicked, seen), np.array(scores), draw(st.integers(1, 14))


@given(problems(), st.sampled_from(["clicked", "seen", "none"]), st.integers(1, 4))
def test_equals_a_slow_loop_for_each_exclusion_and_slice(
    problem: Any, exclude: Exclude, batch_size: int
) -> None:
    queries, scores, k = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{evaluate.__module__}._QUERIES_PER_CALL", batch_size)
        result = measure(Scores(scores), queries, exclude=exclude, cutoffs=(k,))
    nothing = [np.empty(0, int)] * len(queries)
    excluded = {"clicked": queries.clicked, "seen": queries.seen, "none": nothing}[exclude]
    parts = {"all": (result.overall, np.ones(12, bool))}
    for name, in_slice in popularity_slices(COUNTS).items():
        parts[name] = (result.slices[name], in_slice)
    for name, (part, in_slice) in parts.items():
        slow = slow_values(scores, queries, excluded, in_slice, k)
        ours = np.stack([part.per_query[f"recall@{k}"], part.per_query[f"ndcg@{k}"]], axis=1)
        np.testing.assert_allclose(ours, slow, rtol=1e-12, err_msg=name)
        assert part.num_queries == np.sum(~np.isnan(slow[:, 0]))
    assert result.num_skipped == len(queries) - len(slow)
    assert result.num_relevant_excluded == sum(
        len(set(r.tolist()) & set(e.tolist()))
        for r, e in zip(queries.relevant, excluded, strict=True)
    )
    assert result.overall.num_relevant == sum(p.num_relevant for p in result.slices.values())


def test_excluded_relevant_items_are_taken_out_and_queries_without_any_skipped() -> None:
    queries = make_queries([[100, 101], [102], []], clicked=[[101], [102], [103]])
    result = measure(Scores(np.zeros((3, 12))), queries)
    assert result.user_ids.tolist() == [0]
    assert (result.num_skipped, result.num_relevant_excluded) == (2, 2)
    assert result.per_query["recall@3"].tolist() == [1.0]


def test_seen_leaves_more_out_than_clicked() -> None:
    # Items come by row: 100 and 101 were clicked, 102 was only seen, 104 is wanted.
    queries = make_queries([[104]], clicked=[[100, 101]], seen=[[100, 101, 102]])
    scores = Scores(np.zeros((1, 12)))
    places = {
        exclude: measure(scores, queries, exclude=exclude, cutoffs=(12,)).per_query["mrr@12"][0]
        for exclude in ("none", "clicked", "seen")
    }
    assert places == pytest.approx({"none": 1 / 5, "clicked": 1 / 3, "seen": 1 / 2})


def test_relevant_items_without_a_count_or_a_candidate_stay_in_the_denominator() -> None:
    # 111 has no training count; 999 is not in the corpus.
    queries = make_queries([[100, 111, 999]])
    result = measure(Scores(-np.arange(12.0)[None]), queries)
    assert result.per_query["recall@3"].tolist() == [1 / 3]
    assert result.num_relevant_unknown == 1
    assert result.slices["tail"].num_relevant == 1


def test_means_and_intervals_come_from_the_per_query_values() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((400, 12))
    queries = make_queries([rng.choice(IDS, 2, replace=False).tolist() for _ in range(400)])
    result = measure(Scores(scores), queries, cutoffs=(3, 5), num_bootstrap=500)
    assert set(result.per_query) == {f"{m}@{k}" for m in QUERY_METRICS for k in (3, 5)}
    for name, values in result.per_query.items():
        interval = result.overall.intervals[name]
        assert interval.mean == pytest.approx(values.mean(), rel=1e-12)
        half_width = 1.96 * values.std() / 20
        assert interval.high - interval.low == pytest.approx(2 * half_width, rel=0.2)


def test_set_metrics_by_hand() -> None:
    # Both users get rows 0 and 1, then one gets row 2 and the other row 11, which has no count.
    scores = np.zeros((2, 12))
    scores[:, :2] = 2
    scores[0, 2] = scores[1, 11] = 1
    result = measure(Scores(scores), make_queries([[100], [100]]))
    summary = result.summary()
    assert summary["coverage@3"] == 4 / 12
    assert summary["average_popularity@3"] == (9 + 9 + 6 + 9 + 9 + 0) / 6
    assert summary["gini@3"] == pytest.approx((11 * 2 + 9 * 2 + 7 * 1 + 5 * 1) / (12 * 6))
    # Of the head, rows 0, 1 and 2: all retrieved, 2 + 2 + 1 times.
    head = summary["slices"]["head"]
    assert head["num_candidates"] == 3
    assert head["coverage@3"] == 1.0
    assert head["average_popularity@3"] == (9 * 4 + 6) / 5
    assert head["gini@3"] == pytest.approx(2 * (2 - 1) / (3 * 5))


def test_summary_is_json_without_nan_and_has_the_promised_keys() -> None:
    queries = make_queries([[100, 102], [101]])
    result = measure(Scores(np.zeros((2, 12))), queries, cutoffs=(2, 3), num_bootstrap=20)
    summary = json.loads(json.dumps(result.summary(), allow_nan=False))
    assert set(summary["ndcg@2"]) == {"mean", "low", "high"}
    assert {"num_queries", "num_skipped", "num_relevant", "num_relevant_excluded"} <= set(summary)
    assert set(summary["slices"]) == {"head", "torso", "tail"}
    assert set(summary["slices"]["head"]) >= {"recall@3", "coverage@3", "num_relevant"}
    # Nothing relevant is in the tail.
    assert summary["slices"]["tail"]["recall@3"] == {"mean": None, "low": None, "high": None}


def test_string_ids() -> None:
    ids = np.array(["a", "b", "c"], object)
    queries = EvaluationQueries(
        user_ids=np.array([0]),
        histories=[np.array(["a"], object)],
        relevant=[np.array(["c", "b"], object)],
        clicked=[np.array(["a"], object)],
        seen=[np.array(["a"], object)],
    )
    result = evaluate(
        Scores([[3.0, 1.0, 2.0]], ids),
        queries,
        candidate_ids=ids,
        candidate_counts=np.array([1, 1, 1]),
        cutoffs=(1,),
    ).first
    assert result.per_query["recall@1"].tolist() == [0.5]


def test_progress_counts_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{evaluate.__module__}._QUERIES_PER_CALL", 2)
    seen = []
    measure(
        Scores(np.zeros((5, 12))),
        make_queries([[100]] * 5),
        on_progress=lambda *progress: seen.append(progress),
    )
    assert seen == [("Scores", 2, 5), ("Scores", 4, 5), ("Scores", 5, 5)]


def test_slices_hold_their_share_of_the_positives() -> None:
    slices = popularity_slices(np.array([3, 30, 0, 20, 10, 30, 7]))
    # By count: 1 and 5 (30 each), 3 (20), 4 (10), 6 (7), 0 (3), 2 (none). Of 100, 60 is the first
    # sum to reach 50, and 80 to reach 80.
    assert {name: np.flatnonzero(x).tolist() for name, x in slices.items()} == {
        "head": [1, 5],
        "torso": [3],
        "tail": [0, 2, 4, 6],
    }


def test_a_single_hit_item_is_the_head() -> None:
    slices = popularity_slices(np.array([0, 90, 5, 5]))
    assert [np.flatnonzero(s).tolist() for s in slices.values()] == [[1], [], [0, 2, 3]]


@given(
    st.lists(st.integers(0, 30), max_size=20).map(lambda x: np.array(x, int)),
    st.sampled_from([(0.5, 0.3), (0.2, 0.7), (0.1, 0.2), (0.33, 0.67)]),
)
def test_slices_are_a_partition_cut_at_the_first_item_that_reaches_the_share(
    counts: np.ndarray, shares: tuple[float, float]
) -> None:
    slices = popularity_slices(counts, head_share=shares[0], torso_share=shares[1])
    assert np.all(sum(s.astype(int) for s in slices.values()) == 1)
    total = int(counts.sum())
    held = 0
    for row in sorted(range(len(counts)), key=lambda i: -counts[i]):
        percent = held * 100
        bounds = [round(100 * shares[0]), round(100 * sum(shares))]
        expected = sum(percent >= bound * total for bound in bounds) if counts[row] else 2
        assert slices[("head", "torso", "tail")[expected]][row]
        held += int(counts[row])


def test_differences_are_paired_and_narrower_than_the_two_intervals() -> None:
    rng = np.random.default_rng(0)
    queries = make_queries([rng.choice(IDS, 3, replace=False).tolist() for _ in range(300)])
    scores = rng.random((300, 12))
    better = scores.copy()
    for user, relevant in enumerate(queries.relevant):
        better[user, relevant[0] - 100] += 0.1
    found = evaluate(
        {"first": Scores(scores), "better": Scores(better), "same": Scores(scores)},
        queries,
        candidate_ids=IDS,
        candidate_counts=COUNTS,
        cutoffs=(3,),
        num_bootstrap=200,
    )
    assert list(found.differences) == ["better", "same"]
    first, better_ndcg = (
        found.results[name].overall.intervals["ndcg@3"] for name in ("first", "better")
    )
    difference = found.differences["better"]["ndcg@3"]
    assert difference.mean == pytest.approx(better_ndcg.mean - first.mean)
    assert 0 < difference.low < difference.mean < difference.high
    assert difference.high - difference.low < (first.high - first.low) / 2
    assert found.differences["same"]["ndcg@3"] == Interval(0, 0, 0)
    # What is printed: a line each, the difference beside the number.
    header, *lines = str(found).split("\n")
    assert [line.split()[0] for line in lines] == ["first", "better", "same"]
    assert "ndcg@3" in header
    assert f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]" in lines[1]


class Broken(Scores):
    """Answers rightly, then spoils the answer."""

    def __init__(self, spoil: Any) -> None:
        super().__init__(np.zeros((1, 12)))
        self.spoil = spoil

    def retrieve(
        self, queries: Sequence[Query], k: int, exclude: Sequence[Collection[Any]] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        return self.spoil(*super().retrieve(queries, k, exclude))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda ids, scores: (ids[:, :2], scores[:, :2]), r"ids and scores of \(1, 3\)"),
        (lambda ids, scores: (ids + 500, scores), "not candidates.*601"),
        (lambda ids, scores: (ids[:, [0, 1, 0]], scores), "twice"),
        (lambda ids, scores: (ids - 1, scores), "excluded"),
        (lambda ids, scores: (ids, scores + np.arange(3)), "best first"),
        (lambda ids, scores: (ids, scores * np.nan), "no NaN"),
        (lambda ids, scores: (ids.astype(str).astype(object), scores), "not candidates"),
    ],
)
def test_a_retriever_that_breaks_its_contract_is_refused(spoil: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"Broken.retrieve .*{message}"):
        measure(Broken(spoil), make_queries([[102]], clicked=[[100]]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"exclude": "liked"}, "'liked'"),
        ({"cutoffs": ()}, r"cutoffs=\[\]"),
        ({"cutoffs": (0, 5)}, r"cutoffs=\[0, 5\]"),
    ],
)
def test_refuses_arguments_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(Scores(np.zeros((1, 12))), make_queries([[100]]), **options)


def test_refuses_counts_of_another_corpus() -> None:
    with pytest.raises(ValueError, match=r"\(12,\).*\(3,\)"):
        evaluate(
            Scores(np.zeros((1, 12))),
            make_queries([[100]]),
            candidate_ids=IDS,
            candidate_counts=np.array([1, 2, 3]),
        )


def test_refuses_when_nothing_is_left_to_measure() -> None:
    with pytest.raises(ValueError, match=r"none of 2 queries .*2 were excluded"):
        measure(Scores(np.zeros((2, 12))), make_queries([[100, 101], []], [[100, 101], []]))


def test_refuses_ids_of_two_types() -> None:
    queries = make_queries([[100]])
    ids = IDS.astype(str)
    retriever = Scores(np.zeros((1, 12)), ids)
    with pytest.raises(ValueError, match="relevant 100, candidate '100'"):
        evaluate(retriever, queries, candidate_ids=ids, candidate_counts=COUNTS)
