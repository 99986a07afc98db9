"""Words about a run: each follows from its numbers, and from no others."""

import re
from typing import Any

import pytest

from tfrs_pipeline.config import RunConfig, with_settings
from tfrs_pipeline.report.verdict import (
    advice,
    by_popularity,
    compared_with_baselines,
    found_by_index,
)

METRIC = "ndcg@100"


def interval(mean: float, half: float = 0.01) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def made(means: dict[str, float], **changed: Any) -> dict[str, Any]:
    """Makes metrics of models by their mean, the first against the others."""
    first = next(iter(means))
    slices = {"head": 0.2, "torso": 0.0, "tail": -0.1}
    return {
        "models": {
            name: {
                METRIC: interval(mean),
                **{"num_queries": 100, "num_relevant": 500, "num_relevant_excluded": 0},
                "slices": {
                    part: {METRIC: interval(mean + more), "num_candidates": 100}
                    for part, more in slices.items()
                },
            }
            for name, mean in means.items()
        },
        "differences": {
            name: dict.fromkeys(
                (METRIC, *(f"{part}/{METRIC}" for part in slices)), interval(mean - means[first])
            )
            for name, mean in means.items()
            if name != first
        },
        "split": {"train": {"num_positives": 30_000}},
        "training": {first: {"best_epoch": 3, "history": {f"val_{METRIC}": [0.1, 0.2, 0.3, 0.2]}}},
    } | changed


def test_a_model_is_better_where_every_interval_says_so() -> None:
    better = compared_with_baselines(made({"two_tower": 0.3, "ease": 0.2, "ials": 0.25}), METRIC)
    assert (better.answer, better.is_good) == ("yes", True)
    assert better.why == (
        "in ndcg@100 two_tower is better than ease and ials "
        "(the nearest, ials, is 0.0500 [0.0400, 0.0600] behind)"
    )
    level = compared_with_baselines(made({"two_tower": 0.3, "ease": 0.305, "p": 0.1}), METRIC)
    assert (level.answer, level.is_good) == ("not clearly", False)
    worse = compared_with_baselines(made({"two_tower": 0.3, "ease": 0.32, "ials": 0.4}), METRIC)
    assert (worse.answer, worse.is_good) == ("no", False)
    assert "ease and ials are better than two_tower" in worse.why
    assert "(the nearest, ials, is 0.1000 [0.0900, 0.1100] ahead)" in worse.why
    # Another form of the model is no baseline.
    for form in ("two_tower_uncorrected", "in_service"):
        metrics = made({"two_tower": 0.3, form: 0.301, "ease": 0.2})
        verdict = compared_with_baselines(metrics, METRIC)
        assert (verdict.answer, form in verdict.why) == ("yes", False)
    assert compared_with_baselines(made({"two_tower": 0.3}), METRIC).is_good is None


def test_popularity_slices_are_told_apart() -> None:
    metrics = made({"two_tower": 0.3, "two_tower_uncorrected": 0.9, "ease": 0.25})
    found = by_popularity(metrics, METRIC)
    assert found.answer == "ahead in the head, torso and tail"
    # Whom it is ahead of is said, and that the uncorrected model is ahead of it.
    assert found.why == (
        "in ndcg@100 it is ahead of ease in the head, torso and tail; another form of it "
        "finds more in the head (0.50, two_tower_uncorrected 1.10), torso (0.30, "
        "two_tower_uncorrected 0.90) and tail (0.20, two_tower_uncorrected 0.80)"
    )
    metrics["models"]["ease"]["slices"]["head"][METRIC] = interval(0.7)
    metrics["differences"]["ease"][f"head/{METRIC}"] = interval(0.2)
    metrics["differences"]["ease"][f"torso/{METRIC}"] = interval(0.005)
    found = by_popularity(metrics, METRIC)
    assert (found.answer, found.is_good) == ("ahead in the tail", None)
    assert "level with the best one in the torso" in found.why
    assert "behind one in the head (0.50, ease 0.70)" in found.why


def test_slices_are_compared_query_by_query() -> None:
    # The intervals of the two overlap by far; that of their difference is narrow.
    metrics = made({"two_tower": 0.3, "ease": 0.295})
    metrics["differences"]["ease"][f"tail/{METRIC}"] = interval(-0.005, 0.002)
    metrics["differences"]["ease"][f"head/{METRIC}"] = interval(0.005, 0.002)
    found = by_popularity(metrics, METRIC)
    assert found.answer == "ahead in the tail"
    assert "behind one in the head" in found.why
    assert "level with the best one in the torso" in found.why
    # One that is ahead counts, whatever another one's wide interval holds.
    metrics = made({"two_tower": 0.3, "ease": 0.295, "ials": 0.295})
    metrics["differences"]["ease"][f"head/{METRIC}"] = interval(0.08, 0.05)
    metrics["differences"]["ials"][f"head/{METRIC}"] = interval(0.09, 0.14)
    assert "behind one in the head (0.50, ease 0.49)" in by_popularity(metrics, METRIC).why
    # What has no interval, of one query, is not compared.
    for others in metrics["differences"].values():
        others |= {key: {"mean": 0.1, "low": None, "high": None} for key in others}
    assert by_popularity(metrics, METRIC).answer == "not compared"


def test_an_index_is_measured_by_its_target() -> None:
    scann = {"kind": "scann", "target_recall": 0.98}
    assert found_by_index({"kind": "exact"}).is_good
    assert found_by_index(scann).is_good is None
    assert found_by_index(scann | {"requests": [{"recall": 0.99}, {"recall": 0.981}]}).is_good
    low = found_by_index(scann | {"requests": [{"recall": 0.99}, {"recall": 0.9}]})
    assert (low.is_good, "90.0%" in low.why) == (False, True)


LOSING = {"two_tower": 0.2, "two_tower_uncorrected": 0.1, "popularity": 0.1, "ease": 0.3}
LEVEL = LOSING | {"ease": 0.2}


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (made({"two_tower": 0.4, "ease": 0.3}, split={"train": {"num_positives": 5}}), None),
        (made(LOSING), "behind ease: set model.item_init svd, or give features"),
        (made(LOSING | {"popularity": 0.3, "ease": 0.4}), "behind popularity: "),
        (made(LEVEL, split={"train": {"num_positives": 1_500}}), "5.0 each"),
        (made(LEVEL, training={"two_tower": {"best_epoch": 1,
         "history": {f"val_{METRIC}": [0.1]}}}), "was best after the last of 1 epoch."),
        (made(LEVEL | {"two_tower_uncorrected": 0.25}), "model.correction"),
    ],
)  # fmt: skip
def test_advice_follows_from_what_was_measured(
    metrics: dict[str, Any], expected: str | None
) -> None:
    found = list(advice(metrics, METRIC, RunConfig()))
    assert len(found) == (expected is not None)
    assert expected is None or expected in found[0]


BETTER = {"two_tower": 0.4, "popularity": 0.2, "ease": 0.3}
SHORT = {"two_tower": {"best_epoch": 1, "history": {f"val_{METRIC}": [0.1]}}}


def test_what_would_be_more_is_said_of_a_better_model_too() -> None:
    uncorrected = {"two_tower": 0.2, "two_tower_uncorrected": 0.25, "popularity": 0.1}
    (found,) = advice(made(uncorrected), METRIC, RunConfig())
    assert found.startswith("the correction costs here")
    (found,) = advice(made(BETTER, training=SHORT), METRIC, RunConfig())
    assert found.startswith("trained too shortly")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {"num_empty_histories": 51},
            "51 of 100 test queries have an empty history: the test is of",
        ),
        ({"num_empty_histories": 50}, None),
        (
            {"num_relevant_excluded": 501},
            "501 of 1,001 items to find are excluded.*exclude to none",
        ),
        ({"num_relevant_excluded": 500}, None),
        (
            {"num_relevant_unclicked": 151},
            "151 of 500 items to find have no .* find them, of which data.item_features has none",
        ),
        ({"num_relevant_unclicked": 150}, None),
    ],
)
@pytest.mark.parametrize("means", [BETTER, LOSING | {"two_tower": 0.09}])
def test_a_test_of_something_else_is_told_and_nothing_besides(
    means: dict[str, float], changed: dict[str, int], told: str | None
) -> None:
    metrics = made(means)
    metrics["models"]["two_tower"] |= changed
    found = list(advice(metrics, METRIC, RunConfig()))
    if told is None:
        assert not any(re.search(r"test queries|items to find", line) for line in found)
        return
    (line,) = found
    assert re.match(told, line)
    # What is set already is not suggested.
    features = {"year": "numeric"}
    settings = {"evaluation.exclude": "none", "data.item_features": features}
    again = list(advice(metrics, METRIC, with_settings(RunConfig(), settings)))
    assert not any("exclude to none" in line or "item_features" in line for line in again)


def test_baselines_level_with_popularity_tell_what_they_do_not_read() -> None:
    level = made({"two_tower": 0.2, "popularity": 0.2, "ease": 0.2, "ials": 0.2})
    (found,) = advice(level, METRIC, RunConfig())
    assert found.startswith(
        "ease and ials, which read neither order nor features, do not clearly beat popularity"
    )
    (found,) = advice(made({"two_tower": 0.2, "popularity": 0.2, "ease": 0.2}), METRIC, RunConfig())
    assert found.startswith("ease, which reads neither order nor features, does not clearly beat")


def test_what_is_set_already_is_not_suggested() -> None:
    few = made(LEVEL, split={"train": {"num_positives": 1_500}})
    features = RunConfig(data={"item_features": {"genre": "categorical"}})
    assert ["data.item_features" in line for line in advice(few, METRIC, RunConfig())] == [True]
    for model, remedies in (
        ({}, "A longer log, or a model.feature_dim above 16"),
        ({"feature_dim": 32}, "A longer log, or a smaller model.dim"),
    ):
        config = with_settings(features, {f"model.{name}": x for name, x in model.items()})
        (found,) = advice(few, METRIC, config)
        assert found.endswith(f"5.0 each. {remedies}")
    numeric = RunConfig(data={"item_features": {"year": "numeric"}})
    (found,) = advice(few, METRIC, numeric)
    assert found.endswith("5.0 each. A longer log, or a smaller model.dim")

    behind = made({"two_tower": 0.2, "popularity": 0.3, "ease": 0.4})
    by_user = {"kind": "last_share"}
    (found,) = advice(behind, METRIC, RunConfig(split=by_user))
    assert found == (
        "behind popularity: set model.candidate_bias, or raise model.temperature, which is 0.15"
    )
    (found,) = advice(behind, METRIC, RunConfig(model={"candidate_bias": True}, split=by_user))
    assert found == "behind popularity: raise model.temperature, which is 0.15"
    both = RunConfig(model={"candidate_bias": True, "temperature": 0.2})
    assert not list(advice(behind, METRIC, with_settings(both, {"split.kind": "last_share"})))
    (found,) = advice(behind, METRIC, both)
    assert found.startswith("behind popularity: see with split.kind last_share whether")


@pytest.mark.parametrize(
    ("settings", "preset", "remedies"),
    [
        ({"model.item_init": "svd"}, None, "give features of the items (data.item_features), or "),
        ({"data.item_features": {"year": "numeric"}}, None, "set model.item_init svd, or "),
        ({"data.item_features": {"year": "numeric"}, "warm_start": "runs/before"}, None, ""),
        ({"data.item_features": {"year": "numeric"}}, "sets", ""),
        (
            {"data.item_features": {"year": "numeric"}, "data.is_ordered": False},
            None,
            "take --preset sets, or set model.item_init svd, or ",
        ),
    ],
)
def test_behind_linear_models_what_is_not_set_and_suits_the_log_is_suggested(
    settings: dict[str, Any], preset: str | None, remedies: str
) -> None:
    behind = made({"two_tower": 0.2, "popularity": 0.1, "ease": 0.3, "ials": 0.3})
    (found,) = advice(behind, METRIC, with_settings(RunConfig(), settings, preset=preset))
    assert found == f"behind ease and ials: {remedies}more model.negatives"
    # In a small log features are suggested for its size.
    behind["split"] = {"train": {"num_positives": 1_500}}
    small, found = advice(behind, METRIC, with_settings(RunConfig(), settings, preset=preset))
    assert ("data.item_features" in small, "item_features" in found) == (
        not settings.get("data.item_features"),
        False,
    )


def test_behind_linear_models_a_quick_model_is_left_out_first() -> None:
    behind = made({"two_tower": 0.2, "popularity": 0.1, "ease": 0.3})
    (found,) = advice(behind, METRIC, with_settings(RunConfig(), preset="quick"))
    assert found == "behind ease: leave out --preset quick, a small model of ten epochs at most"
