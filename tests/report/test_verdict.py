"""The wording about a run: each statement follows from its own numbers, and from no others."""

import re
from typing import Any

import pytest

from tfrs_pipeline.config import RunConfig, with_settings
from tfrs_pipeline.evaluation.bootstrap import Outcome
from tfrs_pipeline.report.advice import advice
from tfrs_pipeline.report.verdict import (
    by_popularity,
    compared_with_baselines,
    found_by_index,
    other_question,
)

METRIC = "ndcg@100"
BETTER, LEVEL, WORSE = Outcome
POPULAR, MIDDLING, RARE = "popular items (head)", "middling items (torso)", "rare items (tail)"
SCANN = {"kind": "scann", "target_recall": 0.98}


def interval(mean: float, half: float = 0.01) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def made(means: dict[str, float], **changed: Any) -> dict[str, Any]:
    """Makes metrics of models with given means, and the others' differences from the first."""
    first = next(iter(means))
    slices = {"head": 0.2, "torso": 0.0, "tail": -0.1}
    counts = {"num_queries": 100, "num_relevant": 500, "num_empty_histories": 0}
    counts["num_relevant_unclicked"] = 0
    models: dict[str, Any] = {
        name: {METRIC: interval(mean), **counts} for name, mean in means.items()
    }
    for name, model in models.items():
        of_part = {part: interval(means[name] + more) for part, more in slices.items()}
        model["slices"] = {x: {METRIC: y, "num_candidates": 200} for x, y in of_part.items()}
    compared = (METRIC, *(f"{part}/{METRIC}" for part in slices))
    gaps = {name: interval(mean - means[first]) for name, mean in means.items() if name != first}
    return {
        "asked_by": "requests",
        "models": models,
        "differences": {name: dict.fromkeys(compared, gap) for name, gap in gaps.items()},
        "split": {"train": {"num_positives": 30_000}},
        "training": {first: {"best_epoch": 3, "history": {f"val_{METRIC}": [0.1, 0.2, 0.3, 0.2]}}},
    } | changed


@pytest.mark.parametrize(
    ("means", "outcome", "answer", "why"),
    [
        (
            {"ease": 0.2, "ials": 0.25},
            BETTER,
            "yes",
            r"beats .*iALS: \+0.0500 [\+0.0400, \+0.0600]; it beats EASE",
        ),
        (
            {"ease": 0.305, "p": 0.1},
            LEVEL,
            "a tie",
            r"ties .*EASE: -0.0050 [-0.0150, \+0.0050]; it beats p",
        ),
        ({"ease": 0.32, "ials": 0.4}, WORSE, "no", "is behind .* iALS: -0.1.*; it is behind EASE"),
        ({"transitions": 0.4, "p": 0.1}, WORSE, "no", "is behind .*transitions: .*; it beats p"),
        ({}, None, "not compared", "no baseline"),
    ],
    ids=["better", "level", "worse", "transitions", "alone"],
)
# A variant of the model is not a baseline.
@pytest.mark.parametrize("variants", [{}, {"two_tower_uncorrected": 0.4}, {"in_service": 0.301}])
def test_a_model_is_better_where_every_interval_says_so(
    means: Any, variants: Any, outcome: Outcome | None, answer: str, why: str
) -> None:
    found = compared_with_baselines(made({"two_tower": 0.3, **variants, **means}), METRIC)
    assert (found.answer, found.outcome) == (answer, outcome)
    assert re.search(why.replace("[", r"\["), found.why)
    assert found.outcome is None or found.why.startswith(f"by request, in {METRIC} ")
    assert not re.search("without the correction|service", found.why)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_clear_outcome_is_written_with_an_interval_that_excludes_0(sign: int) -> None:
    metrics = made({"two_tower": 0.3, "ease": 0.3 + sign * 0.0028})
    ends = sorted([sign * 0.00003, sign * 0.0053])
    metrics["differences"]["ease"][METRIC] = {
        "mean": sign * 0.0028, "low": ends[0], "high": ends[1]
    }  # fmt: skip
    found = compared_with_baselines(metrics, METRIC)
    assert found.outcome is (WORSE if sign > 0 else BETTER)
    signed = "-0.00280 [-0.00530, -0.00003]" if sign > 0 else "+0.00280 [+0.00003, +0.00530]"
    assert f"EASE: {signed}" in found.why


def test_popularity_slices_are_told_apart() -> None:
    metrics = made({"two_tower": 0.3, "two_tower_uncorrected": 0.9, "ease": 0.25})
    found = by_popularity(metrics, METRIC)
    everywhere = f"{POPULAR}, {MIDDLING} and {RARE}"
    assert (found.answer, found.outcome) == (f"beats the best baseline for {everywhere}", BETTER)
    assert f"{POPULAR}: it beats EASE (0.50 against 0.45)" in found.why
    assert f"{RARE}: it beats EASE (0.20 against 0.15)" in found.why
    metrics["models"]["ease"]["slices"]["head"][METRIC] = interval(0.7)
    metrics["differences"]["ease"][f"head/{METRIC}"] = interval(0.2)
    metrics["differences"]["ease"][f"torso/{METRIC}"] = interval(0.005)
    found = by_popularity(metrics, METRIC)
    best = "the best baseline for"
    answer = f"beats {best} {RARE}; ties with {best} {MIDDLING}; is behind {best} {POPULAR}"
    assert (found.answer, found.outcome) == (answer, LEVEL)
    assert f"{MIDDLING}: it ties with EASE (0.30 against 0.25)" in found.why
    assert f"{POPULAR}: it is behind EASE (0.50 against 0.70)" in found.why
    assert "EASE finds" not in found.why
    # A list of 100 can hold the whole head of 100 items, whatever the model.
    metrics["models"]["two_tower"]["slices"]["head"]["num_candidates"] = 100
    found = by_popularity(metrics, METRIC)
    assert found.answer == f"beats {best} {RARE}; ties with {best} {MIDDLING}"
    assert found.why.endswith(f"; not compared, since one list of 100 could hold all {POPULAR}")
    for of_slice in metrics["models"]["two_tower"]["slices"].values():
        of_slice["num_candidates"] = 50
    assert by_popularity(metrics, METRIC).why == f"one list of 100 could hold all {everywhere}"


def test_a_sum_that_loses_to_its_best_member_in_a_slice_says_so() -> None:
    metrics = made({"two_tower": 0.3, "best_member": 0.3, "ease": 0.25})
    told = "best recipe alone"
    assert told not in by_popularity(metrics, METRIC).why  # Level, as the intervals say.
    metrics["models"]["best_member"]["slices"]["tail"][METRIC] = interval(0.26)
    metrics["differences"]["best_member"][f"tail/{METRIC}"] = interval(0.06)
    found = by_popularity(metrics, METRIC)
    clauses = [clause for clause in found.why.split("; ") if told in clause]
    assert clauses == [
        f"{RARE}: it beats EASE (0.20 against 0.15), and it is behind the best recipe alone "
        "(0.20 against 0.26)"
    ]
    assert found.outcome is BETTER  # The best member is no baseline.


def test_slices_are_compared_query_by_query() -> None:
    # The intervals of the two models overlap widely; the interval of their difference is narrow.
    metrics = made({"two_tower": 0.3, "ease": 0.295})
    metrics["differences"]["ease"][f"tail/{METRIC}"] = interval(-0.005, 0.002)
    metrics["differences"]["ease"][f"head/{METRIC}"] = interval(0.005, 0.002)
    found = by_popularity(metrics, METRIC)
    assert found.answer.endswith(f"is behind the best baseline for {POPULAR}")
    assert f"{POPULAR}: it is behind EASE" in found.why
    # A baseline that is ahead counts, however wide another baseline's interval is.
    metrics = made({"two_tower": 0.3, "ease": 0.295, "ials": 0.295})
    metrics["differences"]["ease"][f"head/{METRIC}"] = interval(0.08, 0.05)
    metrics["differences"]["ials"][f"head/{METRIC}"] = interval(0.09, 0.14)
    assert f"{POPULAR}: it is behind EASE (0.50 against 0.49)" in by_popularity(metrics, METRIC).why
    # A single query has no interval, and is not compared.
    for others in metrics["differences"].values():
        others |= {key: {"mean": 0.1, "low": None, "high": None} for key in others}
    assert by_popularity(metrics, METRIC).answer == "not compared"


@pytest.mark.parametrize(
    ("index", "num_items", "outcome", "why"),
    [
        ({"kind": "exact"}, 10**6, BETTER, "scores every item"),
        (SCANN, 10**6, None, "tuned to find 98%"),
        (SCANN | {"requests": [{"recall": 0.99}, {"recall": 0.981}]}, 10**6, BETTER, "98.1%"),
        (SCANN | {"requests": [{"recall": 0.99}, {"recall": 0.9}]}, 10**6, WORSE, "90.0%"),
        # An index that saves no time is not called good.
        (SCANN | {"requests": [{"recall": 0.99}]}, 1_600, LEVEL, "exact search is as fast"),
    ],
)
def test_an_index_is_measured_by_its_target(
    index: dict[str, Any], num_items: int, outcome: Outcome | None, why: str
) -> None:
    found = found_by_index(index, num_items)
    assert (found.outcome, why in found.why) == (outcome, True)


@pytest.mark.parametrize(
    ("by_request", "by_user", "answer"),
    [
        ((0.3, 0.2), (0.2, 0.1), None),  # Both say yes.
        ((0.3, 0.2), (0.2, 0.4), "no"),
        ((0.3, 0.2), (0.2, 0.205), "a tie"),
        ((0.2, 0.4), (0.2, 0.3), None),  # Both say no.
        ((0.2, 0.205), (0.205, 0.2), "a tie"),  # Another model is highest.
    ],
)
def test_the_other_question_is_told_only_where_it_would_decide_otherwise(
    by_request: Any, by_user: Any, answer: str | None
) -> None:
    decisive, other = (
        made(dict(zip(("two_tower", "ease"), means, strict=True)), asked_by=by)
        for means, by in ((by_request, "requests"), (by_user, "users"))
    )
    assert other_question(decisive, METRIC) is None
    assert other_question(decisive | {"other": {"left_out": "no order"}}, METRIC) is None
    found = other_question(decisive | {"other": other}, METRIC)
    assert (found is None) == (answer is None)
    if answer is not None:
        assert (found or "").startswith(f"{answer}, by user, in {METRIC} ")
        assert "set evaluation.by to users" in (found or "")
        # Else nothing would say what is different.
        is_other = max(by_request) != by_request[by_user.index(max(by_user))]
        assert ("is highest, here" in (found or "")) == is_other
    # The question that decides does not see the other one.
    assert compared_with_baselines(decisive | {"other": other}, METRIC).why.startswith("by request")


LOSING = {"two_tower": 0.2, "two_tower_uncorrected": 0.1, "popularity": 0.1, "ease": 0.3}
LEVEL_MEANS = LOSING | {"ease": 0.2}
WINNING = {"two_tower": 0.4, "popularity": 0.2, "ease": 0.3}
SHORT = {"two_tower": {"best_epoch": 1, "history": {f"val_{METRIC}": [0.1]}}}
SMALL = {"train": {"num_positives": 1_500}}


@pytest.mark.parametrize(
    ("metrics", "settings", "expected"),
    [
        (made(WINNING, split={"train": {"num_positives": 5}}), {}, None),
        (made(LOSING), {}, None),
        (made({"two_tower": 0.2, "repeats": 0.3}), {}, "behind the user's own items again"),
        (made(LEVEL_MEANS, split=SMALL), {}, "2.5 each"),
        (made(LEVEL_MEANS, training=SHORT), {}, "was best after the last of 1 epoch."),
        (made(LEVEL_MEANS | {"two_tower_uncorrected": 0.25}), {}, "model.correction"),
        # A model that beats the baselines also gets advice on longer training and the correction.
        (made({"two_tower": 0.2, "two_tower_uncorrected": 0.25, "ease": 0.1}), {}, "costs here"),
        (made(WINNING | {"best_member": 0.45}), {}, "the sum costs here: .* with members 1"),
        (made(WINNING | {"best_member": 0.39}), {}, None),
        (made(WINNING, training=SHORT), {}, "training stopped too early"),
        # A warm start has few epochs on purpose.
        (made(WINNING, training=SHORT), {"warm_start": "runs/before"}, None),
    ],
)
def test_advice_follows_what_was_measured(
    metrics: dict[str, Any], settings: dict[str, Any], expected: str | None
) -> None:
    found = list(advice(metrics, METRIC, with_settings(RunConfig(), settings)))
    assert len(found) == (expected is not None)
    assert expected is None or re.search(expected, found[0])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"num_empty_histories": 51}, "51 of 100 test queries have an empty history"),
        ({"num_empty_histories": 50}, None),
        ({"num_relevant_unclicked": 151}, "151 of 500 items to find .*item_features has none"),
        ({"num_relevant_unclicked": 150}, None),
        ({"num_queries": 29}, "29 test queries cannot tell models apart"),
        ({"num_queries": 30}, None),
    ],
)
@pytest.mark.parametrize("means", [WINNING, LOSING | {"two_tower": 0.09}])
def test_a_strange_test(means: dict[str, float], changed: dict[str, int], told: str | None) -> None:
    metrics = made(means)
    metrics["models"]["two_tower"] |= changed
    found = list(advice(metrics, METRIC, RunConfig()))
    if told is None:
        assert not any(re.search(r"test queries|items to find", line) for line in found)
        return
    (line,) = found
    assert re.match(told, line)
    # Settings that are already set are not suggested.
    settings = {"data.item_features": {"year": "numeric"}}
    again = list(advice(metrics, METRIC, with_settings(RunConfig(), settings)))
    assert not any("item_features" in line for line in again)
