"""Settings that would train something else than they say are refused; short forms are read."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tfrs_pipeline as tp


@given(num=st.integers(1, 5000), batch_size=st.integers(2, 1024))
def test_a_batch_fits_the_positives(num: int, batch_size: int) -> None:
    training = tp.TrainingSettings(batch_size=batch_size)
    fitting = training.fitting(num).batch_size
    if num >= batch_size:
        assert fitting == batch_size
    else:  # About eight batches; their size is a power of two, which workers can share.
        assert 2 <= fitting <= max(2, num // 8)
        assert fitting & (fitting - 1) == 0
        assert num < 16 or 8 <= num // fitting < 16
    # Other ways of batching fit batches to whole users themselves.
    sets = tp.TrainingSettings(batch_size=batch_size, examples="sets")
    assert sets.fitting(num) == sets


def test_kinds_are_read_from_short_forms_tables_and_objects() -> None:
    expected = (tp.InBatch(), tp.Uniform(256), tp.Popularity(64, 0.5))
    short = ["in_batch", "uniform:num=256", "popularity:num=64:alpha=0.5"]
    table: list[Any] = [{"kind": "in_batch"}, {"kind": "uniform"}]
    table.append({"kind": "popularity", "num": 64, "alpha": 0.5})
    for negatives in (short, table, expected):
        assert tp.TwoTowerSettings(negatives=negatives).negatives == expected
    settings = tp.TwoTowerSettings(hard={"kind": "funnel", "share": 0.1})
    assert settings.hard == tp.FunnelLosers(share=0.1)
    # What is written can be read again.
    assert tp.TwoTowerSettings(**settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize(("settings", "message"), [
    ({"negatives": ["uniform:num=0"]}, r"negatives\.0.*num: got '0'; must be greater than 0"),
    ({"negatives": ["uniform:5"]}, r"negatives: got 'uniform:5'.*such as uniform:num=256"),
    ({"negatives": ["popular:num=5"]}, "unknown kind 'popular'.*popularity"),
    ({"hard": {"kind": "clicked"}}, "funnel"),
    ({"history_pooling": ["mean", "mean"]}, "history_pooling: .*a value twice"),
    ({"history_pooling": ["attention"], "dim": 9}, "dim: got 9; must be a multiple of 2"),
    ({"correction": "recent"}, "correction: got 'recent', which needs candidate_bias"),
    ({"candidate_bias": True, "use_candidate_id": False}, "candidate_bias: needs use_candida"),
    ({"item_init": "svd", "use_candidate_id": False, "history_pooling": ()},
     "item_init: got 'svd', which needs use_candidate_id or a history"),
])  # fmt: skip
def test_settings_of_the_model_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(tp.ConfigError, match=message):
        tp.TwoTowerSettings(**settings)


@pytest.mark.parametrize(("model", "setting", "refused"), [
    ({"negatives": ["in_batch"]}, "model.negatives", {"sequences", "sets"}),
    ({"history_pooling": [], "use_user_id": True}, "model.history_pooling", {"sequences", "sets"}),
    ({"hard": tp.FunnelLosers()}, "model.hard", {"sets"}),
    ({"history_length": 512}, "training.batch_size", {"sequences"}),  # A batch needs two windows.
    ({}, "", set()),
])  # fmt: skip
def test_what_does_not_go_with_many_positives_of_a_user(
    model: dict[str, Any], setting: str, refused: set[str]
) -> None:
    model = {"negatives": ["uniform:num=16"], **model}
    for examples in ("sequences", "sets", "single"):
        told = []
        try:
            tp.TwoTower(training=tp.TrainingSettings(examples=examples), **model)
        except tp.ConfigError as error:
            told = [name for name, _ in error.problems]
        assert told == [setting] * (examples in refused)


def test_a_checked_dataclass_is_refused_as_settings_are() -> None:
    wrong: Any = (
        ((1.5,), {}, "share: got 1.5; must be less than 1"),
        ((), {"shar": 0.1}, "shar: unknown setting; did you mean 'share'"),
        ((0.1,), {"share": 0.2}, "share"),
    )
    for values, settings, named in wrong:
        with pytest.raises(tp.ConfigError, match=named):
            tp.FunnelLosers(*values, **settings)
    with pytest.raises(tp.ConfigError, match="negatives: got 3; must be a table of settings"):
        tp.TwoTowerSettings(negatives=[3])
