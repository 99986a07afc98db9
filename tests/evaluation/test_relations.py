"""Changes of a log change its metrics by nothing, or by an amount that is computed here."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import tfrs_pipeline as tp
from tests.model.conftest import eagerly
from tests.small_log import arguments
from tfrs_pipeline.retrieval import Excluded

NUM_USERS, NUM_ITEMS, NUM_TASTES, PER_USER = 60, 40, 4, 18
START, STEP = 1_700_000_000, 977
CUTOFFS, SLICES = (1, 5, 20), ("head", "torso", "tail")
EVEN = {f"even_recall@{k}" for k in CUTOFFS}
BY: tuple[Any, ...] = ("users", "requests")
PLANS: dict[str, Any] = {
    "latest": tp.MostPopular(0.2),
    "transitions": tp.Transitions(prior=10.0),
    "itemknn": tp.ItemKnn(shrinkage=2.0),
    "ease": tp.Ease(l2=5.0),
    "ials": tp.Ials(8, 2.0, num_threads=1),
}
# These read a history as a set, and those in its order.
WITHOUT_ORDER = {name: PLANS[name] for name in ("latest", "ease", "ials")}
IN_ORDER = {name: PLANS[name] for name in ("transitions", "itemknn")}
# It reads the order of a history, its times, and the hour and weekday of a request.
TOWER = tp.TwoTower(
    dim=8,
    history_length=5,
    history_pooling=("attention",),
    negatives=[tp.InBatch(), tp.Uniform(8)],
    training=tp.TrainingSettings(batch_size=512, max_epochs=1, monitor="ndcg@5"),
)


def make_events() -> pd.DataFrame:
    """Users with a taste see each item once, at times of their own, and dislike a few."""
    rng = np.random.default_rng(0)
    items, appeal = np.arange(NUM_ITEMS), (1 + np.arange(NUM_ITEMS)) ** -0.7
    shown = []
    for user in range(NUM_USERS):
        shares = appeal * np.where(items % NUM_TASTES == user % NUM_TASTES, 8, 1)
        shown += rng.choice(items, PER_USER, replace=False, p=shares / shares.sum()).tolist()
    users = np.repeat(np.arange(NUM_USERS), PER_USER)
    events = pd.DataFrame({"user_id": users, "item_id": shown})
    events["timestamp"] = START + STEP * rng.permutation(len(events))
    stages = ["clicked", "exposed", "disliked"]
    events["stage"] = rng.choice(stages, len(events), p=[0.7, 0.25, 0.05])
    return events.sort_values("timestamp", ignore_index=True)


EVENTS = make_events()
TIMES = pd.to_datetime(EVENTS["timestamp"], unit="s", utc=True)
IN_NEW_YORK = TIMES.dt.tz_convert("America/New_York")


def as_log(folder: Path, events: pd.DataFrame = EVENTS, **options: Any) -> tp.Log:
    """Makes the log of a CSV file; `items` are the ids of an item table."""
    events.to_csv(folder / "events.csv", index=False)
    if (ids := options.pop("items", None)) is not None:
        options["items"] = folder / "items.csv"
        pd.DataFrame({"item_id": ids}).to_csv(options["items"], index=False)
    return log_from(folder / "events.csv", **options)


def log_from(source: Any, **options: Any) -> tp.Log:
    hours = dict.fromkeys(("hour", "weekday"), "categorical")
    return tp.Log.from_files(source, **arguments(request_features=hours, **options))


def measured(
    log: tp.Log, plans: Mapping[str, Any] = PLANS, *, has_tower: bool = False
) -> dict[str, tp.Evaluation]:
    """Measures models on a log, by both questions."""
    split = log.split("time", validation=0.1, test=0.2)
    models = {name: plan.fit(split.before_test) for name, plan in plans.items()}
    if has_tower:
        with eagerly():
            models["two_tower"] = TOWER.fit(split.train, split.validation)
    return evaluated(models, split)


def evaluated(
    models: Mapping[str, tp.Retriever], split: tp.Split, **options: Any
) -> dict[str, tp.Evaluation]:
    holdouts = (split.holdout("test", by=by, **options) for by in BY)
    pairs = zip(BY, holdouts, strict=True)
    return {by: tp.evaluate(models, x, cutoffs=CUTOFFS, num_bootstrap=20) for by, x in pairs}


def numbers(evaluations: Mapping[str, tp.Evaluation], models: Collection[str]) -> dict[str, Any]:
    """Returns all values of some models by name, such as "users/ease/tail/recall@5/low"."""
    summaries = {by: evaluation.summary()["models"] for by, evaluation in evaluations.items()}
    return flat({by: {name: all_[name] for name in models} for by, all_ in summaries.items()})


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{name}/")
        elif value is not None:
            leaves[prefix + name] = value
    return leaves


def means(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out what depends on the order of ids: draws of users, and ties at a slice's bound."""
    return {
        name: value
        for name, value in values.items()
        if not name.endswith(("/low", "/high")) and "/slices/" not in name
    }


@pytest.fixture(scope="module")
def log(module_path: Path) -> tp.Log:
    return as_log(module_path)


@pytest.fixture(scope="module")
def original(log: tp.Log) -> dict[str, tp.Evaluation]:
    return measured(log, has_tower=True)


def in_files(folder: Path, suffix: str) -> tp.Log:
    """Writes a folder of four files, one of them with a single row."""
    (folder / "log").mkdir()
    for number, rows in enumerate(np.split(np.arange(len(EVENTS)), [100, 101, 700])):
        path = folder / "log" / f"day-{number}.{suffix}"
        part = EVENTS.iloc[rows]
        part.to_parquet(path) if suffix == "parquet" else part.to_csv(path, index=False)
    return log_from(folder / "log")


def with_times(times: Any, **options: Any) -> Callable[[Path], tp.Log]:
    return lambda folder: as_log(folder, EVENTS.assign(timestamp=times), **options)


RATINGS = EVENTS["stage"].map({"clicked": 4, "exposed": 2.5, "disliked": 0})
# Ways to write the same rows in the same order.
FORMS: dict[str, Callable[[Path], tp.Log]] = {
    "files": lambda folder: in_files(folder, "csv"),
    "zipped files": lambda folder: in_files(folder, "csv.gz"),
    "parquet files": lambda folder: in_files(folder, "parquet"),
    "columns moved": lambda folder: as_log(folder, EVENTS[[*EVENTS.columns[::-1]]]),
    "decimal ids": lambda folder: as_log(folder, EVENTS.astype({"user_id": float})),
    "milliseconds": with_times(EVENTS["timestamp"] * 10**3, timestamp_unit="ms"),
    "nanoseconds": with_times(EVENTS["timestamp"] * 10**9, timestamp_unit="ns"),
    "ISO 8601": with_times(TIMES.dt.strftime("%Y-%m-%dT%H:%M:%SZ")),
    "offsets": with_times(IN_NEW_YORK.astype(str)),
    "a time zone": with_times(IN_NEW_YORK.dt.tz_localize(None), time_zone="America/New_York"),
    "a table in memory": lambda _: log_from(EVENTS.assign(timestamp=TIMES)),
    "ratings": lambda folder: as_log(
        folder,
        EVENTS.drop(columns="stage").assign(rating=RATINGS),
        rating_threshold=3,
        dislike_threshold=1,
    ),
    "an item table": lambda folder: as_log(folder, items=range(NUM_ITEMS)),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_form_of_the_files_is_no_part_of_the_log(
    form: str, log: tp.Log, tmp_path: Path
) -> None:
    """All else is made of its tables: the same fingerprint, the same models and metrics."""
    other = FORMS[form](tmp_path)
    assert other.fingerprint() == log.fingerprint()
    assert other.describe() == log.describe()


def renamed(events: pd.DataFrame, seed: int | None) -> pd.DataFrame:
    """Gives users and items names: in the order of their numbers, or in another one."""
    names = {"user_id": 1000 + np.arange(NUM_USERS), "item_id": 1000 + 7 * np.arange(NUM_ITEMS)}
    if seed is not None:
        names = {id_: np.random.default_rng(seed).permutation(x) for id_, x in names.items()}
    texts = {id_: np.array([f"é {name}" for name in x]) for id_, x in names.items()}
    return events.assign(**{id_: x[events[id_]] for id_, x in texts.items()})


# What moves the rows, all times by 52 weeks, or the names without a change of their order.
MOVES: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "rows": lambda events: events.sample(frac=1, random_state=1),
    "times": lambda events: events.assign(timestamp=events["timestamp"] - 52 * 7 * 86_400),
    "names": lambda events: renamed(events, None),
}


@pytest.mark.parametrize("moves", [*([move] for move in MOVES), [*MOVES]], ids="-".join)
def test_what_moves_in_order_changes_no_number(
    moves: list[str], original: dict[str, tp.Evaluation], tmp_path: Path
) -> None:
    """A two-tower model numbers users and items in the order of their ids. It meets all moves."""
    events, has_tower = EVENTS, len(moves) > 1
    for move in moves:
        events = MOVES[move](events)
    models = [*IN_ORDER, *(["two_tower"] if has_tower else [])]
    other = measured(as_log(tmp_path, events), IN_ORDER, has_tower=has_tower)
    assert numbers(other, models) == pytest.approx(numbers(original, models), rel=1e-9)


def test_other_names_change_no_mean(original: dict[str, tp.Evaluation], tmp_path: Path) -> None:
    """They renumber users and items, which changes draws, and ties at the bound of a slice."""
    other = measured(as_log(tmp_path, renamed(EVENTS, seed=2)))
    expected = means(numbers(original, PLANS))
    assert means(numbers(other, PLANS)) == pytest.approx(expected, rel=1e-9)


def test_a_second_delivery_of_the_log_is_dropped(
    original: dict[str, tp.Evaluation], tmp_path: Path
) -> None:
    twice = as_log(tmp_path, pd.concat([EVENTS, EVENTS]), duplicates="drop")
    assert [entry.num_rows for entry in twice.dropped] == [len(EVENTS)]
    assert numbers(measured(twice, IN_ORDER), IN_ORDER) == numbers(original, IN_ORDER)


def test_where_times_are_equal_rows_permuted_change_no_set(tmp_path: Path) -> None:
    """A model that reads a history as a set is the same; the last item of a history may differ."""
    tied = EVENTS.assign(timestamp=EVENTS["timestamp"] // (20 * STEP) * 20 * STEP + 1)
    ordered, permuted = (
        measured(as_log(tmp_path, events, ties="drop"), PLANS)
        for events in (tied, tied.sample(frac=1, random_state=1))
    )
    sets = numbers(ordered, WITHOUT_ORDER)
    assert numbers(permuted, WITHOUT_ORDER) == pytest.approx(sets, rel=1e-9)
    for name in IN_ORDER:
        assert numbers(permuted, [name]) != numbers(ordered, [name])


@pytest.mark.parametrize("column", ["request_id", "session_id"])
def test_requests_and_visits_group_rows_wherever_they_are(column: str, tmp_path: Path) -> None:
    """Their names do not matter, nor do those of types of events."""
    number = EVENTS["user_id"] * 10_000 + EVENTS.groupby("user_id").cumcount() // 3
    events, weights = EVENTS.assign(**{column: number}), {}
    if column == "session_id":
        weights = {"clicked": 2, "exposed": "exposed", "disliked": "disliked"}
        events = pd.concat([events, events.assign(timestamp=events["timestamp"] + 7201)])
        events = events.sort_values("timestamp").rename(columns={"stage": "event"})
    other = events.sample(frac=1, random_state=1)
    other[column] = [f"é {name % 7} {name}" for name in other[column]]
    others = {f"my {name}": weight for name, weight in weights.items()}
    if weights:
        other["event"] = "my " + other["event"]
    plans = {"transitions": PLANS["transitions"]}
    log = as_log(tmp_path, events, event_weights=weights)
    assert [entry.num_rows for entry in log.dropped] == [len(EVENTS)] * bool(weights)
    expected = numbers(measured(log, plans), plans)
    values = numbers(measured(as_log(tmp_path, other, event_weights=others), plans), plans)
    assert values == pytest.approx(expected, rel=1e-9)
    without = as_log(tmp_path, events.drop(columns=column), event_weights=weights)
    assert numbers(measured(without, plans), plans) != values


@dataclasses.dataclass(frozen=True)
class Without:
    """A retriever that never retrieves an item."""

    retriever: tp.Retriever
    item: Any

    def retrieve(
        self, queries: Sequence[tp.Query], k: int, exclude: Excluded = None
    ) -> tuple[np.ndarray, np.ndarray]:
        lists = [()] * len(queries) if exclude is None else exclude
        return self.retriever.retrieve(queries, k, [[*ids, self.item] for ids in lists])


def test_an_item_that_nobody_clicked_is_one_more_to_choose_from(
    log: tp.Log, tmp_path: Path
) -> None:
    """It comes after all others by counts of clicks, and has a score of 0 by products.

    iALS draws a start for it too, which counts until the solution is reached.
    """
    plans = {**PLANS, "ials": tp.Ials(NUM_ITEMS, 2.0, num_iterations=200, num_threads=1)}
    new = -5  # The first row, so that all others move.
    items = [*range(NUM_ITEMS), new]
    before, after = (x.split("time") for x in (log, as_log(tmp_path, items=items)))
    fitted, again = (
        {name: plan.fit(split.before_test) for name, plan in plans.items()}
        for split in (before, after)
    )
    queries: list[tp.Query] = [{"history": [3]}, {"history": []}]
    for name in ("latest", "transitions", "itemknn"):
        assert new not in again[name].retrieve(queries, NUM_ITEMS)[0]
    for name in ("ease", "ials"):
        ids, scores = again[name].retrieve(queries[:1], NUM_ITEMS + 1)
        assert scores[ids == new] == pytest.approx([0], abs=1e-6)
    striking = {name: Without(model, new) for name, model in again.items()}
    expected = with_one_more(numbers(evaluated(fitted, before), plans))
    assert numbers(evaluated(striking, after), plans) == pytest.approx(expected, rel=1e-9)


def with_one_more(values: Mapping[str, float]) -> dict[str, float]:
    """Counts one more item in the corpus, and in its tail, which is in no list."""
    grown = dict(values)
    for name, num in values.items():
        part, _, last = name.rpartition("/")
        if last == "num_candidates" and part.rpartition("/")[2] not in ("head", "torso"):
            grown[name] = num + 1
            for k in CUTOFFS:
                grown[f"{part}/coverage@{k}"] *= num / (num + 1)
    return grown


def test_a_user_doubled_counts_twice_in_every_mean(log: tp.Log, tmp_path: Path) -> None:
    """The models, and the counts of clicks, are those of the log without the copy."""
    cuts = (datetime.fromtimestamp(START + x * STEP * len(EVENTS), UTC) for x in (0.7, 0.8))
    parts: dict[str, Any] = dict(zip(("validation", "test"), cuts, strict=True))
    split = log.split("time", **parts)
    models = {name: plan.fit(split.before_test) for name, plan in PLANS.items()}
    before = evaluated(models, split)
    user = int(before["requests"].first.user_ids[7])
    copy = EVENTS[EVENTS["user_id"] == user].assign(user_id=NUM_USERS)
    doubled = as_log(tmp_path, pd.concat([EVENTS, copy])).split("time", **parts)
    after = evaluated(models, doubled, trained_on=split.before_test)
    for by, name in itertools.product(BY, PLANS):
        was, now = (evaluations[by].results[name] for evaluations in (before, after))
        is_twice = was.user_ids == user
        pairs = [(was.overall, now.overall), *((was.slices[x], now.slices[x]) for x in SLICES)]
        for part, other in pairs:
            for metric in part.per_query.keys() - EVEN:  # Whose weights count the user's events.
                values = np.append(part.per_query[metric], part.per_query[metric][is_twice])
                mean = np.nanmean(values)
                assert other.intervals[metric].mean == pytest.approx(mean), (by, name, metric)
            for k in CUTOFFS:
                assert other.set_metrics[f"coverage@{k}"] == part.set_metrics[f"coverage@{k}"]


def test_all_users_doubled_change_no_mean(
    original: dict[str, tp.Evaluation], tmp_path: Path
) -> None:
    """Every count is twice as large, and so is what the baselines add to counts."""
    copies = pd.concat([EVENTS, EVENTS.assign(user_id=EVENTS["user_id"] + NUM_USERS)])
    plans = {
        "latest": PLANS["latest"],
        "transitions": tp.Transitions(prior=20.0),
        "itemknn": tp.ItemKnn(shrinkage=4.0),
        "ease": tp.Ease(l2=10.0),
    }
    expected = numbers(original, plans)
    other = numbers(measured(as_log(tmp_path, copies), plans), plans)
    double = ("/num_queries", "/num_relevant")
    for name, value in other.items():
        if "/even_recall@" in name or name.endswith(("/low", "/high", "/num_even")):
            continue
        times = 2 if "popularity" in name or name.endswith(double) else 1
        assert value == pytest.approx(times * expected[name], rel=1e-6), name
