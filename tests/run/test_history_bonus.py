"""A run on a log whose users come back to the same items."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.small_log import Stopped, Watched, small_config, write
from tests.tracing import tracing_once
from tfrs_pipeline import RunConfig, Split, compare, evaluate, load, trained_in, with_settings
from tfrs_pipeline.run.data import describe_samples, load_log, prepare
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.run.pipeline import run
from tfrs_pipeline.run.training import plan_of, split_in

pytestmark = pytest.mark.usefixtures("quick_runs")
NUM_USERS, NUM_ITEMS = 120, 50


def config_of(folder: Path, share: float = 0.7) -> RunConfig:
    """Makes a log in which a share of the clicks is on four favourites of the user."""
    rng = np.random.default_rng(4)
    favourites = np.array([rng.choice(NUM_ITEMS, 4, replace=False) for _ in range(NUM_USERS)])
    users = np.repeat(np.arange(NUM_USERS), 20)
    items = rng.integers(0, NUM_ITEMS, len(users))
    is_again = rng.random(len(users)) < share
    items[is_again] = favourites[users[is_again], rng.integers(0, 4, is_again.sum())]
    events = pa.table({"user_id": users, "item_id": items})
    path = write(events, folder / "events.parquet")
    evaluation = {"exclude": "none", "cutoffs": [5, 20], "baselines": ["repeats"]}
    return small_config(
        folder,
        {"path": path},
        split={"kind": "last_share"},
        evaluation=evaluation,
        training={"max_epochs": 1},
        export={"index": "exact"},
    )


def test_a_run_chooses_a_bonus_keeps_it_in_the_refit_and_serves_it(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with tracing_once():
        with pytest.raises(Stopped):  # After both trainings, so that they are read back.
            run(config, tmp_path / "run", progress=Watched(stop="train two_tower"))
        result = run(config, tmp_path / "run", progress=(watched := Watched()))
    model = trained_in(result.folder)
    assert model is not None
    assert model.bonus is not None
    assert model.bonus.repeats is not None
    assert model.bonus.repeats.weight > 0
    bonus = result.metrics["training"]["two_tower"]["bonus"]
    assert model.bonus.as_dict() == bonus
    # Chosen by the first training alone, whose model never saw validation.
    first = trained_in(result.folder, "selection")
    assert first is not None
    split: Split = split_in(RunFolder(result.folder))
    chosen = first.with_bonus(split.validation, "none", config.seed).bonus
    assert chosen is not None
    assert chosen.as_dict() == model.bonus.as_dict()
    notes = watched.reports["train two_tower"].notes
    assert {*model.bonus.notes} <= {*notes}
    # What the run measured is the model with the bonus, and so is what it serves.
    assert result.metrics["models"]["two_tower"]["recall@5"]["mean"] > 0.5
    loaded = load(config.model_folder)
    queries = split.test.as_queries()
    ids, scores = loaded.retrieve(queries, 10)
    expected, expected_scores = model.retrieve(queries, 10)
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-4)
    # Users get their favourites again, also those whose history is stored.
    (user_ids,), _, _ = loaded.retrieve_user([7], 4)
    assert set(user_ids.tolist()) & set(loaded.users.history(7))


def test_a_comparison_in_python_measures_what_fit_returns(tmp_path: Path) -> None:
    """Where rankings exclude nothing, that is a model with its bonus."""
    config = config_of(tmp_path)
    split = load_log(config.data).split("last_share")
    plan = plan_of(config, "plain")
    with tracing_once():
        fitted = plan.fit(split.train, split.validation, exclude="none")
        asked: dict[str, Any] = {"exclude": "none", "cutoffs": (5, 20)}
        compared = compare(*split, plans={"plain": plan}, **asked)
    assert fitted.bonus is not None
    alone = evaluate(fitted, split.test, **asked).first.per_query
    values = compared.by_seed[0].first.per_query
    assert {name: x.tolist() for name, x in values.items()} == {
        name: x.tolist() for name, x in alone.items()
    }


@pytest.mark.parametrize(("exclude", "favourites", "is_told"), [
    ("clicked", 0.7, True), ("seen", 0.7, True), ("none", 0.7, False), ("clicked", 0.0, False),
])  # fmt: skip
def test_many_repeats_are_told_where_rankings_leave_them_out(
    tmp_path: Path, exclude: str, favourites: float, is_told: bool
) -> None:
    config = with_settings(config_of(tmp_path, favourites), {"evaluation.exclude": exclude})
    data = prepare(config, tmp_path / "run")
    before = data.split.before_test.events.to_pandas()
    repeats = before.duplicated(["user_id", "item_id"]).mean()
    notes = describe_samples(data.final.report, config.evaluation.exclude)
    told = f"{repeats:.0%} repeats, which rankings leave out (evaluation.exclude {exclude})"
    assert any(note.startswith(told) for note in notes) == is_told
    # So few positives that a simple model does as well; many are no matter.
    assert any(note.startswith("few positives") for note in notes)
    many = describe_samples({**data.final.report, "num_samples": 12_000}, "none")
    assert not any(note.startswith("few positives") for note in many)
