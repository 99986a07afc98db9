"""Settings that would train something else than they say are refused; short forms are read."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfrs_pipeline.model.settings import TrainingSettings, TwoTowerSettings
from tfrs_pipeline.model.two_tower import TwoTower
from tfrs_pipeline.negatives.hard import FunnelLosers, Mined
from tfrs_pipeline.negatives.kinds import InBatch, Popularity, Uniform
from tfrs_pipeline.settings import ConfigError


@given(num=st.integers(1, 5000), batch_size=st.integers(2, 1024))
def test_a_batch_fits_the_positives(num: int, batch_size: int) -> None:
    training = TrainingSettings(batch_size=batch_size)
    fitting = training.fitting(num).batch_size
    if num >= batch_size:
        assert fitting == batch_size
    else:  # Some eight batches, of a power of two, which workers can share.
        assert 2 <= fitting <= max(2, num // 8)
        assert fitting & (fitting - 1) == 0
        assert num < 16 or 8 <= num // fitting < 16
    # Other ways of batching fit batches to whole users themselves.
    sets = TrainingSettings(batch_size=batch_size, examples="sets")
    assert sets.fitting(num) == sets


def test_kinds_are_read_from_short_forms_tables_and_objects() -> None:
    expected = (InBatch(), Uniform(256), Popularity(64, 0.5))
    table = [
        {"kind": "in_batch"},
        {"kind": "uniform"},
        {"kind": "popularity", "num": 64, "alpha": 0.5},
    ]
    for negatives in (
        ["in_batch", "uniform:num=256", "popularity:num=64:alpha=0.5"],
        table,
        expected,
    ):
        assert TwoTowerSettings(negatives=negatives).negatives == expected
    settings = TwoTowerSettings(hard={"kind": "mined", "share": 0.1})
    assert settings.hard == Mined(share=0.1)
    # What is written can be read again.
    assert TwoTowerSettings(**settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"negatives": ["uniform:num=0"]}, r"negatives\.0.*num must be a whole number, 1 or more"),
        ({"negatives": ["uniform:5"]}, r"negatives: got 'uniform:5'.*such as uniform:num=256"),
        ({"negatives": ["popular:num=5"]}, "unknown kind 'popular'.*popularity"),
        ({"hard": {"kind": "mined", "share": 1}}, "share"),
        ({"hard": {"kind": "mined", "min_rank": 9, "max_rank": 9}}, "min_rank < max_rank"),
        ({"hard": {"kind": "clicked"}}, "funnel.*mined"),
        ({"history_lenght": 3}, "did you mean 'history_length'?"),
        ({"history_pooling": ["mean", "mean"]}, "history_pooling: .*a value twice"),
        ({"history_pooling": ["attention"], "dim": 9}, "dim: got 9; must be a multiple of 2"),
        ({"correction": "recent"}, "correction: got 'recent', which needs candidate_bias"),
        ({"candidate_bias": True, "use_candidate_id": False}, "candidate_bias: needs use_candida"),
        (
            {"item_init": "svd", "use_candidate_id": False, "history_pooling": ()},
            "item_init: got 'svd', which needs use_candidate_id or a history",
        ),
    ],
)
def test_settings_of_the_model_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TwoTowerSettings(**settings)


EASY = ["uniform:num=16"]


@pytest.mark.parametrize("examples", ["sequences", "sets"])
@pytest.mark.parametrize(
    ("model", "setting"),
    [
        ({}, "model.negatives"),
        ({"negatives": EASY, "history_pooling": [], "use_user_id": True}, "model.history_pooling"),
        ({"negatives": EASY, "hard": FunnelLosers()}, "model.hard"),
        ({"negatives": EASY, "history_length": 512}, "training.batch_size"),
        ({"negatives": EASY}, None),
    ],
)
def test_what_does_not_go_with_many_positives_of_a_user(
    examples: Any, model: dict[str, Any], setting: str | None
) -> None:
    training = TrainingSettings(examples=examples)
    # Sets have no hard negatives, sequences need a batch of two windows.
    only_in = {"model.hard": "sets", "training.batch_size": "sequences"}.get(
        setting or "", examples
    )
    if setting is None or only_in != examples:
        TwoTower(training=training, **model)
        return
    with pytest.raises(ConfigError) as raised:
        TwoTower(training=training, **model)
    assert [name for name, _ in raised.value.problems] == [setting]
    TwoTower(**model)
