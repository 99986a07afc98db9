"""The pipeline end to end, on a small log: what it reports, exports, repeats and must not know."""

import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import MagicMock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

import tfrs_pipeline as tp
from tests import small_log
from tests.small_batches import assert_same_samples
from tests.small_log import NUM_ITEMS, Ids, Stopped, Watched, event_table, item_id, write
from tfrs_pipeline import durable
from tfrs_pipeline.answers import version as service_version
from tfrs_pipeline.answers.publish import NotPublished, versions_of
from tfrs_pipeline.answers.retriever import load
from tfrs_pipeline.cli.commands import NOT_PUBLISHED
from tfrs_pipeline.data import held_out_queries
from tfrs_pipeline.data.schema import AskedBy
from tfrs_pipeline.durable import file_hash, read_record, write_record
from tfrs_pipeline.messages import StepReport
from tfrs_pipeline.model import two_tower
from tfrs_pipeline.run import gate, pipeline
from tfrs_pipeline.run.data import RunData, final_part, prepare
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.run.gate import IN_SERVICE
from tfrs_pipeline.run.measure import MeasuredBaselines, baselines_of, fit_best
from tfrs_pipeline.run.pipeline import run
from tfrs_pipeline.run.steps import RunContext, Step
from tfrs_pipeline.run.training import split_in, trained_in
from tfrs_pipeline.samples.store import read_samples
from tfrs_pipeline.search.exclusions import KNOWN_STAGES

PROVE = service_version.prove
pytestmark = pytest.mark.usefixtures("quick_runs", "traced_once")
STAGES = ["data", "split", "samples", "train two_tower", "baselines", "evaluate",
          "export", "metrics"]  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """A finished run, and what it reported."""

    config: tp.RunConfig
    folder: Path
    metrics: dict[str, Any]
    export_folder: Path
    reports: dict[str, StepReport]
    ids: Ids

    def holdout(self, part: Literal["validation", "test"]) -> tp.Holdout:
        return split_of(self.folder).holdout(part)


def go(config: tp.RunConfig, folder: Path, ids: Ids = "str") -> Finished:
    watched = Watched()
    result = run(config, folder, progress=watched)
    version = result.export_folder or Path("not exported")
    return Finished(config, folder, result.metrics, version, watched.reports, ids)


def run_until(config: tp.RunConfig, folder: Path, stop: Any) -> dict[str, StepReport]:
    watched = Watched(stop)
    with pytest.raises(Stopped):
        run(config, folder, progress=watched)
    return watched.reports


def split_of(folder: Path) -> tp.Split:
    return split_in(RunFolder(folder))


def stages_config(folder: Path, events: pa.Table, **settings: Any) -> tp.RunConfig:
    """Makes settings for a Parquet log: stages, times, string ids, features of both sides."""
    data = {
        "path": write(events, folder / "events.parquet"),
        "items_path": write(small_log.item_table("str"), folder / "items.parquet"),
        "users_path": write(small_log.user_table("str"), folder / "users.parquet"),
        "item_features": {"title": "text", "genre": "categorical"},
        "user_features": {"age": "numeric"},
    }
    split = {"kind": "last_share", "test": 0.2, "validation": 0.1}
    return small_log.small_config(folder, data, **{"split": split, **settings})


def ratings_config(folder: Path) -> tp.RunConfig:
    """Makes settings for ordered CSV ratings: no times, integer ids, other column names."""
    events = event_table("int").select(["user_id", "item_id", "rating"])
    events = events.rename_columns(["viewer", "film", "stars"])
    columns = {"user_id": "viewer", "item_id": "film", "rating": "stars"}
    path = write(events, folder / "log" / "stars.csv")
    settings: dict[str, Any] = {"evaluation": {"exclude": "seen", "baselines": ["uncorrected"]}}
    settings["export"] = {"index": "scann", "target_recall": 1.0}
    settings["split"] = {"kind": "last_n", "test": 2, "validation": 1}
    data = {"path": path, "columns": columns, "rating_threshold": 3}
    return small_log.small_config(folder, data, training={"refit": False}, **settings)


@pytest.fixture(scope="module")
def of_stages(module_path: Path) -> Finished:
    folder = module_path / "stages"
    evaluation = {"baselines": ["popularity", "ease"]}
    config = stages_config(folder, event_table("str"), evaluation=evaluation)
    # The item graph of an export knows the test, so its answers are other ones.
    config = tp.with_settings(config, {"training.history_bonus": False})
    return go(config, folder / "run")


@pytest.fixture(scope="module")
def of_ratings(module_path: Path) -> Finished:
    folder = module_path / "ratings"
    return go(ratings_config(folder), folder / "run", "int")


@pytest.fixture(params=["of_stages", "of_ratings"])
def finished(request: pytest.FixtureRequest) -> Finished:
    return request.getfixturevalue(request.param)


def numbers(folder: Path) -> dict[str, Any]:
    """Returns the metrics that equal runs share: all but the folder of the export."""
    metrics = read_record(folder / "metrics.json")
    return {name: value for name, value in metrics.items() if name != "export_folder"}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        inner = flat(value, f"{prefix}{name}/") if isinstance(value, dict) else None
        leaves |= {prefix + name: value} if inner is None else inner
    return leaves


def measured(retriever: tp.Retriever, queries: tp.Holdout, config: tp.RunConfig) -> dict[str, Any]:
    options = {name: getattr(config.evaluation, name) for name in ("exclude", "cutoffs")}
    return tp.evaluate(retriever, queries, seed=config.seed, **options).first.summary()


# What a run reports


def test_the_report_counts_the_funnel_as_a_loop_counts_it(of_stages: Finished) -> None:
    from tfrs_pipeline.report.facts import gather_facts

    facts = gather_facts(of_stages.folder)
    rows = split_of(of_stages.folder).events.to_pyarrow().to_pylist()
    assert facts.events_by_stage == Counter(row["stage"] for row in rows)
    clicks = [row for row in rows if row["part"] != "test" and row["stage"] == "clicked"]
    counts = Counter(row["item_id"] for row in clicks)
    # Items are in the order of their ids.
    in_order = sorted(item_id(number, "str") for number in range(NUM_ITEMS))
    assert facts.counts.tolist() == [counts[id_] for id_ in in_order]
    titles = {row["item_id"]: row["title"] for row in small_log.item_table("str").to_pylist()}
    for example in of_stages.metrics["examples"]:
        assert all(facts.titles[id_] == titles[id_] for id_ in example["recommended"])


def test_popularity_is_counted_where_the_model_was_trained(finished: Finished) -> None:
    parts = ["train", "validation"] if finished.config.training.refit else ["train"]
    rows = split_of(finished.folder).events.to_pyarrow().to_pylist()
    trained_on = [row for row in rows if row["part"] in parts and row["stage"] == "clicked"]
    clicks = Counter(row["item_id"] for row in trained_on)
    counts = [clicks[item_id(i, finished.ids)] for i in range(NUM_ITEMS)]
    slices = tp.popularity_slices(np.array(counts))
    for part, of_part in finished.metrics["models"]["two_tower"]["slices"].items():
        assert of_part["num_candidates"] == slices[part].sum()


def test_examples_are_answers_to_test_queries(finished: Finished) -> None:
    queries = finished.holdout("test")
    retriever = load(finished.export_folder, exact=True)
    place = {user: i for i, user in enumerate(queries.user_ids.tolist())}
    asked, lengths = queries.as_queries(), []
    for example in finished.metrics["examples"]:
        i = place[example["user_id"]]
        history = queries.histories[i].tolist()
        assert example["history"] == history[::-1][:10]
        assert example["num_history"] == len(history)
        lengths.append(len(history))
        is_seen = finished.config.evaluation.exclude == "seen"
        excluded = (queries.seen if is_seen else queries.clicked)[i]
        ids, _ = retriever.retrieve([asked[i]], 10, [excluded.tolist()])
        assert example["recommended"] == ids[0].tolist()
        relevant = set(queries.relevant[i].tolist())
        assert example["num_relevant"] == len(relevant)
        assert set(example["found"]) == relevant & set(example["recommended"])
    assert (len(lengths), lengths) == (4, sorted(lengths))


def test_metrics_have_the_documented_form(finished: Finished) -> None:
    text = (finished.folder / "metrics.json").read_text()
    metrics = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert set(metrics.pop("sha256")) == {"metrics.json"}
    # Values that differ between equal runs are in a file beside it.
    steps = read_record(finished.folder / "steps.json")
    assert set(steps) == {"date", "notes", "seconds"}
    assert {**steps, **metrics} == json.loads(json.dumps(finished.metrics))
    assert [*steps["seconds"], "metrics"] == list(finished.reports)


def test_the_list_of_a_run_is_what_runs(finished: Finished) -> None:
    steps = pipeline.run_steps(finished.config)
    assert [step.name for step in steps] == list(finished.reports)


def test_a_step_is_added_in_one_place_and_is_drawn_listed_and_run(
    of_stages: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    """As `CONTRIBUTING.md` says; here from outside the package, between two other steps."""

    def longest(run: RunContext, split: tp.Split, samples: RunData) -> int:
        run.note(f"seed {run.config.seed}")
        return max(map(len, split.validation.histories))

    added = Step("longest", ("samples", "split"), "longest_history", longest, workers="chief")
    steps_before = pipeline.run_steps

    def run_steps(config: tp.RunConfig, **options: Any) -> list[Step]:
        steps = steps_before(config, **options)
        return [*steps[:4], added, *steps[4:]]

    monkeypatch.setattr(pipeline, "run_steps", run_steps)
    short = {"training.max_epochs": 1, "training.refit": False, "evaluation.baselines": ()}
    config = tp.with_settings(of_stages.config, {**short, "export.index": "none"})
    (tmp_path / "short.toml").write_text(tp.dump_config(config))
    checked = command("run", "--config", tmp_path / "short.toml", "--check").out
    assert "# longest: samples, split -> longest_history\n" in checked
    result = run(config, tmp_path / "run", progress=(watched := Watched()))
    assert list(watched.reports) == [step.name for step in pipeline.run_steps(config)]
    assert result.metrics["notes"]["longest"] == ["seed 0"]
    assert result.export_folder is None


def test_models_and_stages_are_those_asked_for(of_stages: Finished, of_ratings: Finished) -> None:
    assert list(of_stages.metrics["models"]) == ["two_tower", "popularity", "ease"]
    assert list(of_ratings.metrics["models"]) == ["two_tower", "two_tower_uncorrected"]
    assert list(of_stages.reports) == STAGES
    assert list(of_ratings.reports) == [*STAGES[:4], "train two_tower_uncorrected", *STAGES[4:]]
    for name, correction in (("two_tower", "mixture"), ("two_tower_uncorrected", "none")):
        source = trained_in(str(of_ratings.folder), name=name)
        assert source is not None
        assert source.settings.correction == correction
    assert of_stages.metrics["index"] == {"kind": "exact"}
    assert of_ratings.metrics["index"]["target_recall"] == 1.0
    assert {x["recall"] for x in of_ratings.metrics["index"]["requests"]} == {1.0}
    # The model learns the tastes.
    models = flat(of_stages.metrics["models"])
    assert models["two_tower/ndcg@20/mean"] > 2.5 * models["popularity/ndcg@20/mean"]
    # At random, 5 of the 80 items hold a sixteenth of the relevant items.
    assert models["two_tower/recall@5/mean"] > 2.5 * 5 / 80


def test_one_question_decides_and_the_other_is_measured(
    of_stages: Finished, tmp_path: Path
) -> None:
    config, split = of_stages.config, split_of(of_stages.folder)
    trained_on, metrics = final_part(config, split), of_stages.metrics
    popular = tp.MostPopular().fit(trained_on)
    assert (metrics["asked_by"], metrics["other"]["asked_by"]) == ("requests", "users")
    asked_by: list[tuple[AskedBy, Any]] = [("requests", metrics), ("users", metrics["other"])]
    for by, asked in asked_by:
        queries = split.holdout("test", by=by, trained_on=trained_on)
        assert list(asked["models"]) == list(metrics["models"])
        assert asked["models"]["popularity"] == measured(popular, queries, config)
    # With one item to find, both are the same. (Not by the rule "drop": a history up to a request
    # lacks events of the same time, and the history before the test does not.)
    last: dict[str, Any] = {"split.kind": "last_n", "split.validation": 1, "split.test": 1}
    last["data.ties"] = "order"
    data = prepare(tp.with_settings(config, last), tmp_path / "run")
    assert data.test.by == data.validation.by == "users"
    assert isinstance(data.other_test, str)
    assert "by request is the same" in data.other_test


def test_no_file_of_the_data_is_hashed_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither when it is made nor when it is read back; a large log takes minutes to hash."""
    config, hashed = stages_config(tmp_path, event_table("str")), list[Path]()

    def count(path: Path) -> str:
        hashed.append(path)
        return file_hash(path)

    monkeypatch.setattr(durable, "file_hash", count)
    for _ in ("made", "read back"):
        hashed.clear()
        prepare(config, tmp_path / "run")
        assert {"events.parquet", "split.parquet", "candidate_row.npy"} <= {x.name for x in hashed}
        assert max(Counter(hashed).values()) == 1


@pytest.mark.parametrize("by", [None, "users", "requests"])
def test_validation_and_test_ask_the_same_question(of_stages: Finished, by: AskedBy | None) -> None:
    config = tp.with_settings(of_stages.config, {"evaluation.by": by})
    data, split = prepare(config, of_stages.folder), split_of(of_stages.folder)
    asked = by or "requests"  # The log has an order.
    parts: Any = {"validation": data.validation, "test": data.test}
    for part, holdout in parts.items():
        assert holdout.by == asked
        assert holdout.fingerprint() == split.holdout(part, by=asked).fingerprint()
    assert isinstance(data.other_test, tp.Holdout)
    assert data.other_test.by == ("requests" if asked == "users" else "users")


def test_by_user_no_request_of_a_user_with_too_many_is_asked(
    of_stages: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else setting `evaluation.by`, as the refusal advises, would not help."""
    monkeypatch.setattr(held_out_queries, "_MOST_OF_ONE", 1)
    with pytest.raises(tp.DataError, match=r"in all, .* set evaluation\.by to users"):
        prepare(of_stages.config, of_stages.folder)
    config = tp.with_settings(of_stages.config, {"evaluation.by": "users"})
    data = prepare(config, of_stages.folder)
    assert (data.test.by, data.validation.by) == ("users", "users")
    assert "events before them in all" in str(data.other_test)


def test_the_guide_to_trackers_logs_the_test_by_both_questions(
    of_stages: Finished, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its snippet runs as it is, with a tracker that only keeps what it is given."""
    (here / "runs").mkdir()
    (here / "runs" / "videos-1").symlink_to(of_stages.folder)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")
    logged: dict[str, float] = {}
    tracker = MagicMock()
    tracker.log_metric = lambda name, value, step=0: logged.update({name: value})
    monkeypatch.setitem(sys.modules, "mlflow", tracker)
    page = (Path(__file__).parents[2] / "docs/guides/tuning.md").read_text()
    (snippet,) = (text for text in page.split("```python\n") if "import mlflow" in text)
    exec(snippet.partition("```")[0], {})
    metrics = of_stages.metrics
    for test, models in (
        ("test", metrics["models"]),
        ("test/by_users", metrics["other"]["models"]),
    ):
        for name in ("ndcg@20", "recall@5", "even_recall@20"):
            if (value := models["two_tower"].get(name)) is not None:
                assert logged[f"{test}/{name.replace('@', '_at_')}"] == value["mean"]
    assert logged["test/ndcg_at_20"] != logged["test/by_users/ndcg_at_20"]


def test_baselines_where_time_goes_on_and_items_may_come_again(tmp_path: Path) -> None:
    evaluation = {"exclude": "none", "baselines": ["popularity", "repeats"], "cutoffs": [5, 20]}
    changed: dict[str, Any] = {"split": {"kind": "time"}, "evaluation": evaluation}
    config = stages_config(tmp_path, event_table("str"), **changed)
    data = prepare(config, tmp_path / "run")
    asked = data.split.holdout("validation", by="requests")
    assert data.validation.fingerprint() == asked.fingerprint()
    forms = baselines_of(config, data)
    found, notes = fit_best("popularity", forms["popularity"], config, data)
    scores = {}
    for latest in (1.0, 0.2, 0.05, 0.01):
        popular = tp.MostPopular(latest=latest).fit(data.split.train)
        options: dict[str, Any] = {"exclude": "none", "cutoffs": (5, 20), "num_bootstrap": 0}
        overall = tp.evaluate(popular, data.validation, **options).first.overall
        scores[latest] = overall.intervals[config.training.monitor].mean
    best = tp.MostPopular(latest=max(scores, key=lambda latest: scores[latest]))
    assert len(set(scores.values())) > 1
    assert notes == [f"popularity: {best!r}, best of 4 on validation"]
    assert list(forms) == ["popularity", "repeats"]
    expected = best.fit(data.split.before_test).retrieve([{}], 80)
    np.testing.assert_array_equal(found.retrieve([{}], 80), expected)
    excluding = tp.with_settings(config, {"evaluation.exclude": "clicked"})
    assert list(baselines_of(excluding, data)) == ["popularity"]
    choices = [tp.Ease(1.0), tp.Ease(50.0)]
    (note,) = fit_best("ease", choices, config, data)[1]
    assert note in [f"ease: {ease!r}, best of 2 on validation" for ease in choices]
    named = tp.with_settings(config, {"evaluation.baselines": ("itemknn",)})
    neighbors = baselines_of(named, data)["itemknn"]
    # A user's own items are candidates only where rankings do not exclude them.
    assert {form.own_items for form in neighbors if isinstance(form, tp.ItemKnn)} == {False, True}
    others = tp.ItemKnn.forms(seed=0, by_time=True, exclude="clicked")
    assert {form.own_items for form in others} == {False}
    (note,) = fit_best("itemknn", neighbors, config, data)[1]
    num = len(neighbors)
    assert note in [f"itemknn: {form!r}, best of {num} on validation" for form in neighbors]


def test_a_beaten_model_is_exported_only_if_asked_for(tmp_path: Path, command: Any) -> None:
    """The run first says by how much it lost; it is kept, and exports without more training."""
    settings = {"training.learning_rate": 1e-9, "training.max_epochs": 1, "export.index": "exact"}
    settings |= {"evaluation.baselines": ("popularity", "ease"), "export.if_beaten": False}
    config, folder = tp.with_settings(ratings_config(tmp_path), settings), tmp_path / "run"
    (tmp_path / "lost.toml").write_text(tp.dump_config(config))
    code, shown, told = command("run", "--config", tmp_path / "lost.toml", "--run-dir", folder)
    assert code == NOT_PUBLISHED
    metrics = read_record(folder / "metrics.json")
    means = {name: model["ndcg@20"]["mean"] for name, model in metrics["models"].items()}
    best = max(("popularity", "ease"), key=lambda name: means[name])
    first = shown.partition("a baseline wins: ")[2].splitlines()[0]
    assert f"it is behind the best baseline, {best.replace('ease', 'EASE')}: -" in first
    assert shown.index(first) < shown.index("On the test split")
    assert f"{means['two_tower']:.4f}, and {means[best]:.4f} of the baseline {best}: -" in told
    assert metrics["refusal"] in told
    assert "stays as it is" not in told  # No model is there yet.
    assert not (tmp_path / "saved_models").exists()
    trained = {x: x.stat().st_mtime_ns for x in folder.rglob("checkpoints/**/*") if x.is_file()}
    assert trained
    answer = command("run", "--run-dir", folder, "--export.if_beaten")
    assert answer.code == 0
    assert "exported anyway, as export.if_beaten allows: A baseline" in answer.out
    assert {x: x.stat().st_mtime_ns for x in trained} == trained
    assert read_record(folder / "metrics.json")["export_folder"].endswith("films/1")


@pytest.mark.parametrize("allowed", [[], ["export.if_beaten"], ["export.gate"]])
def test_all_reasons_against_an_export_are_told_at_once(
    allowed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the flag that the first refusal names would only lead to the second one."""
    reasons = "A baseline beats it.", "It is worse."
    flags = {"export.if_beaten": "--export.if_beaten", "export.gate": "--no-export.gate"}
    monkeypatch.setattr(gate, "beaten_by_baseline", lambda *arguments: reasons[0])
    worse = True, reasons[1]
    monkeypatch.setattr(gate, "worse_than_version", lambda *arguments, **options: worse)
    overruled: dict[str, Any] = {"export.if_beaten": True, "export.gate": False}
    settings = {"export.gate": True} | {name: overruled[name] for name in allowed}
    config = tp.with_settings(ratings_config(tmp_path), {"export.if_beaten": False, **settings})
    evaluation: Any = SimpleNamespace(results={"two_tower": None, "ease": None, IN_SERVICE: None})
    task: Any = RunFolder(tmp_path / "run"), evaluation, [], {}
    notes: list[str] = []
    with pytest.raises(NotPublished) as caught:
        notes.extend(gate.pass_gate(config, *task))
    for (name, flag), reason in zip(flags.items(), reasons, strict=True):
        assert (reason in str(caught.value)) == (flag in str(caught.value)) == (name not in allowed)


@pytest.mark.parametrize(
    ("others", "refused", "failed", "is_kept_out"),
    [
        ([], {"ease": "too many items"}, {"popularity": "it died"}, True),
        (["popularity"], {}, {"ease": "it died"}, False),
        ([], {"ease": "too many items"}, {}, False),
        ([], {}, {}, False),
    ],
    ids=["none could be measured", "one was", "a refusal", "none asked for"],
)
def test_a_model_that_no_baseline_could_be_compared_with_is_exported_only_if_asked_for(
    others: list[str], refused: Any, failed: Any, is_kept_out: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(gate, "beaten_by_baseline", lambda *arguments: "")
    config = tp.with_settings(ratings_config(tmp_path), {"export.if_beaten": False})
    measured: Any = [SimpleNamespace(results={name: None}) for name in others]
    baselines = MeasuredBaselines(measured, refused | failed, failed)
    evaluation: Any = SimpleNamespace(results={"two_tower": None})
    task = RunFolder(tmp_path / "run"), evaluation, baselines.names, baselines.failed
    told = "No baseline could be measured to compare the model with. popularity: it"
    if not is_kept_out:
        assert told not in str([*gate.pass_gate(config, *task)])
        return
    with pytest.raises(NotPublished, match=rf"^{told} died\. .*with --export\.if_beaten exports"):
        [*gate.pass_gate(config, *task)]
    allowed = tp.with_settings(config, {"export.if_beaten": True})
    assert f"exported anyway, as export.if_beaten allows: {told} died." in [
        *gate.pass_gate(allowed, *task)
    ]


def test_what_is_dropped_is_counted(tmp_path: Path) -> None:
    lost = item_id(3, "str")
    rows = event_table("str").to_pylist()
    logged = [*rows, *rows[100:109]]
    config = stages_config(tmp_path, pa.Table.from_pylist(logged))
    items = small_log.item_table("str")
    write(items.filter(pc.not_equal(items["item_id"], lost)), tmp_path / "items.parquet")
    settings = {"data.unknown_items": "drop", "data.duplicates": "drop", "split.min_positives": 15}
    reports = run_until(tp.with_settings(config, settings), tmp_path / "run", "split")
    num_lost = sum(row["item_id"] == lost for row in logged)
    left = [row for row in rows if row["item_id"] != lost]
    first, since, days, dropped, *reasons, unread, ties = reports["data"].notes
    assert first == f"{len(left):,} events, {NUM_ITEMS - 1} items, {small_log.NUM_USERS} users"
    assert re.match(r"from 2023-11-14 22:13 to 2023-11-.*positives a day: ", f"{since} {days}")
    num_dropped = len(logged) - len(left)
    assert dropped == f"dropped {num_dropped:,} of {len(logged):,} rows"
    assert reasons == [
        f"dropped {num_lost:,} rows: item is not in the item table",
        f"dropped {num_dropped - num_lost:,} rows: repeats an earlier event",
    ]
    assert unread.endswith("columns not read: rating")
    assert "have the time of another" in ties
    clicks = Counter(row["user_id"] for row in left if row["stage"] == "clicked")
    rare = {user for user, num in clicks.items() if num < 15}
    num_events = sum(row["user_id"] in rare for row in left)
    told = f"dropped {num_events} events of users with too few positives ({len(rare)} users)"
    assert reports["split"].notes[-1] == told


# The model in service


def test_the_export_answers_as_it_was_evaluated(finished: Finished) -> None:
    kind, split = finished.metrics["index"]["kind"], split_of(finished.folder)
    queries = split.holdout(
        "test", by=finished.metrics["asked_by"], trained_on=final_part(finished.config, split)
    )
    for exact in {False, kind == "scann"}:
        found = measured(load(finished.export_folder, exact=exact), queries, finished.config)
        expected = finished.metrics["models"]["two_tower"]
        assert flat(found) == pytest.approx(flat(expected), abs=1e-6)


def test_a_user_is_served_by_all_that_is_known_and_not_what_is_known(finished: Finished) -> None:
    retriever = load(finished.export_folder)
    user, rows = small_log.user_id(4, finished.ids), event_table(finished.ids).to_pylist()
    clicks = [row for row in rows if (row["user_id"], row["stage"]) == (user, "clicked")]
    clicked = [row["item_id"] for row in clicks]
    stages = KNOWN_STAGES[finished.config.evaluation.exclude]  # A low rating was shown, too.
    own = (row for row in rows if row["user_id"] == user and row["stage"] in stages)
    known = list(dict.fromkeys(row["item_id"] for row in own))
    ids, scores, is_known = retriever.retrieve_user([user], NUM_ITEMS)
    assert is_known.tolist() == [True]
    items = {item_id(item, finished.ids) for item in range(NUM_ITEMS)}
    assert {*ids[0].tolist()} - {retriever.candidates.corpus.empty_id} == items - {*known}
    times = [row["timestamp"] for row in clicks]
    query = {"user_id": user, "history": clicked, "history_timestamps": times}
    expected, expected_scores = retriever.retrieve([query], NUM_ITEMS, [known])
    np.testing.assert_array_equal(ids[0, :8], expected[0, :8])
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)


def test_the_manifest_tells_where_the_model_comes_from(finished: Finished) -> None:
    manifest = json.loads((finished.export_folder / "manifest.json").read_text())
    log = json.loads((finished.folder / "data" / "log.json").read_text())
    assert manifest["items_read"] == log["items_read"]
    assert tp.RunConfig(**manifest["config"]) == finished.config
    assert manifest["example_user"] == finished.holdout("test").user_ids.tolist()[0]
    assert manifest["metrics"] == json.loads(json.dumps(finished.metrics["models"]["two_tower"]))
    assert manifest["index"] == finished.metrics["index"]
    asked = finished.config.export
    assert manifest["export"]["index"] == {"kind": asked.index, "recall": asked.target_recall}
    assert manifest["counts"]["num_candidates"] == NUM_ITEMS
    tables = (finished.folder / "data").glob("*.parquet")
    assert manifest["data"] == {table.name: file_hash(table) for table in tables}


# Again


def test_a_run_that_is_stopped_goes_on_where_it_was(tmp_path: Path, of_stages: Finished) -> None:
    """With another folder's settings, and stopped several times, it ends as that folder's run."""
    config = tp.load_config(of_stages.folder / "config.toml")
    epoch_stops = [("two_tower, selection", 1), ("two_tower, refit", 1)]
    stopped = [Watched(stop) for stop in [("samples", 0), *epoch_stops, ("baselines", 0)]]
    last = Watched()
    for watched in stopped:
        with pytest.raises(Stopped):
            run(config, tmp_path / "run", progress=watched)
    assert not (tmp_path / "run" / "metrics.json").exists()
    again = run(config, tmp_path / "run", progress=last)
    assert numbers(again.folder) == numbers(of_stages.folder)
    assert again.export_folder != of_stages.export_folder
    # No epoch was run twice.
    told = [task for watched in (*stopped, last) for task in watched.tasks]
    epochs = [task for task in told if task[1] and ", " in task[0] and "ease" not in task[0]]
    assert max(Counter(epochs).values()) == 1


def test_a_trained_model_is_read_back_unless_damaged(tmp_path: Path, of_stages: Finished) -> None:
    folder = Path(shutil.copytree(of_stages.folder, tmp_path / "run"))
    config = tp.with_settings(of_stages.config, {"export.index": "none"})
    (saved,) = (folder / "checkpoints" / "two_tower" / "refit").glob("epoch-*.data-*")
    for is_damaged in (False, True):
        if is_damaged:
            saved.write_bytes(saved.read_bytes()[:-1])
        (folder / "metrics.json").unlink()
        watched = Watched()
        again = run(config, folder, progress=watched)
        for name in ("models", "training"):
            assert again.metrics[name] == of_stages.metrics[name]
        assert any("refit" in task for task, _ in watched.tasks) == is_damaged


def test_a_finished_run_is_given_back_and_not_exported_again(of_ratings: Finished) -> None:
    config, own, path = of_ratings.config, of_ratings.export_folder, of_ratings.folder
    watched = Watched()
    again = run(config, path, progress=watched)
    assert (again.export_folder, list(watched.reports)) == (own, ["finished before"])
    assert own.is_absolute()
    assert again.metrics == json.loads(json.dumps(of_ratings.metrics))
    place, record = config.model_folder, path / "metrics.json"
    # A version that another training made, such as a later one in this folder, is not its own.
    assert RunFolder(path).own_version(config) == own
    epochs = path / "checkpoints"
    epochs.rename(path / "elsewhere")
    assert RunFolder(path).own_version(config) is None
    (path / "elsewhere").rename(epochs)
    # Folders may have been moved since: the version is found among the model's.
    moved = {**again.metrics, "export_folder": "/before/films/1"}
    kept = record.read_bytes()
    write_record(record, moved)
    assert run(config, path).export_folder == own
    # Nor does a finished run replace another version in service, such as after a rollback.
    other = own.rename(own.parent / "7")
    manifest = (other / "manifest.json").read_bytes()
    written = read_record(other / "manifest.json", check_files=False)
    write_record(other / "manifest.json", {**written, "training": ["another"]})
    for metrics in (moved, again.metrics):
        write_record(record, metrics)
        assert run(config, path, progress=watched).metrics == metrics
        assert versions_of(place) == [7]
        notes = watched.reports["finished before"].notes
        assert "is gone, and a finished run is not exported again" in notes[-1]
    record.write_bytes(kept)
    (other / "manifest.json").write_bytes(manifest)
    other.rename(own)


@pytest.mark.parametrize("name", ["runs [1]", "a\\b"])
def test_unreadable_folders_are_refused(of_ratings: Finished, tmp_path: Path, name: str) -> None:
    config = of_ratings.config
    with pytest.raises(ValueError, match=r"holds [\[\\]: TensorFlow could not read back"):
        run(config, tmp_path / name)
    export = config.export.model_copy(update={"directory": tmp_path / name})
    with pytest.raises(ValueError, match="Choose a folder without"):
        run(config.model_copy(update={"export": export}), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# What must not be known


def weights(folder: Path, step: str, epoch: int) -> dict[str, np.ndarray]:
    reader = tf.train.load_checkpoint(
        str(folder / "checkpoints" / "two_tower" / step / f"epoch-{epoch}")
    )
    names = [name for name in reader.get_variable_to_shape_map() if "_tower/" in name]
    assert len(names) > 5
    return {name: reader.get_tensor(name) for name in names}


def with_other_items(events: pa.Table, folder: Path, parts: tuple[str, ...]) -> pa.Table:
    """Gives every event in some parts of a split another item; keeps its stage and time."""
    split = pq.read_table(folder / "data" / "split.parquet").sort_by("event_number").to_pylist()
    rng = np.random.default_rng(5)
    rows = events.to_pylist()
    for row, of_split in zip(rows, split, strict=True):
        assert row["item_id"] == of_split["item_id"]
        if of_split["part"] in parts:
            number = int(rng.integers(NUM_ITEMS))
            row["item_id"] = item_id(number, "str")
    return pa.Table.from_pylist(rows, schema=events.schema)


def assert_same_histories(a: tp.Holdout, b: tp.Holdout) -> None:
    for name in ("user_ids", "histories", "clicked", "seen"):
        for left, right in zip(getattr(a, name), getattr(b, name), strict=True):
            np.testing.assert_array_equal(left, right)


def assert_same_training(a: Path, b: Path, samples: str, step: str, epoch: int) -> None:
    assert_same_samples(*(read_samples(folder / "samples" / samples) for folder in (a, b)))
    expected, got = (weights(folder, step, epoch) for folder in (a, b))
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def test_nothing_of_the_test_part_is_known_before(of_stages: Finished, tmp_path: Path) -> None:
    events = with_other_items(event_table("str"), of_stages.folder, ("test",))
    run_until(stages_config(tmp_path, events), tmp_path / "run", "train two_tower")
    epochs = of_stages.metrics["training"]["two_tower"]["best_epoch"]
    for samples, step, epoch in (("selection", "selection", 2), ("final", "refit", epochs)):
        assert_same_training(of_stages.folder, tmp_path / "run", samples, step, epoch)
    other = split_of(tmp_path / "run").test
    assert_same_histories(other, of_stages.holdout("test"))
    # The change did reach the relevant items.
    pairs = zip(other.relevant, of_stages.holdout("test").relevant, strict=True)
    assert any(a.tolist() != b.tolist() for a, b in pairs)


def test_nothing_of_the_validation_is_known_before(of_stages: Finished, tmp_path: Path) -> None:
    events = with_other_items(event_table("str"), of_stages.folder, ("validation", "test"))
    folders = of_stages.folder, tmp_path / "run"
    run_until(stages_config(tmp_path, events), folders[1], ("two_tower, selection", 2))
    assert_same_training(*folders, "selection", "selection", 2)
    assert_same_histories(split_of(folders[1]).validation, of_stages.holdout("validation"))
    # The refit trains on the validation part, so there the change shows.
    before, after = (read_samples(folder / "samples" / "final").counts for folder in folders)
    assert not np.array_equal(before, after)


# Other logs and splits


@pytest.mark.parametrize("ids", [
    pytest.param("int", marks=pytest.mark.nightly),  # As the first page of the guides.
    pytest.param("str", marks=pytest.mark.slow),
])  # fmt: skip
def test_clicks_alone_with_a_split_by_time(tmp_path: Path, ids: Ids) -> None:
    events = event_table(ids)
    clicks = events.filter(pa.compute.equal(events["stage"], "clicked"))
    path = write(clicks.select(["user_id", "item_id", "timestamp"]), tmp_path / "clicks.csv")
    config = small_log.small_config(
        tmp_path, {"path": path}, split={"kind": "time"}, export={"name": None}
    )
    finished = go(config, tmp_path / "run", ids)
    assert finished.metrics["dataset"] == "clicks"
    # A split by time keeps every user, however few positives there are.
    assert finished.metrics["split"]["num_users_dropped"] == 0
    models = finished.metrics["models"]
    assert models["two_tower"]["ndcg@20"]["mean"] > 1.5 * models["popularity"]["ndcg@20"]["mean"]


def test_a_log_without_any_order_is_learned_a_user_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate, unmeasured = two_tower.validation_metrics, {"tail/recall@5": float("nan")}
    monkeypatch.setattr(two_tower, "validation_metrics", lambda *x: {**validate(*x), **unmeasured})
    settings = {"training.examples": "sets", "training.max_epochs": 4, "export.index": "none"}
    settings |= {"data.is_ordered": False, "model.negatives": ("uniform:num=32",)}
    settings |= {"evaluation.baselines": ("popularity", "transitions")}
    config = tp.with_settings(ratings_config(tmp_path), settings)
    finished = go(config, tmp_path / "run", "int")
    samples = read_samples(finished.folder / "samples" / "selection")
    for i, candidate in enumerate(samples.candidate_rows.tolist()):
        others = {*samples.known_positives[samples.query_rows[i]].tolist()} - {candidate}
        assert sorted(samples.history(i).tolist()) == sorted(others)
    batches = tp.TwoTower(**dict(config.model), training=config.training).batches(samples)
    assert isinstance(batches.examples, tp.UserSets)
    models = finished.metrics["models"]
    assert list(models) == ["two_tower", "popularity"]  # Transitions need an order.
    assert models["two_tower"]["ndcg@20"]["mean"] > 1.3 * models["popularity"]["ndcg@20"]["mean"]
    # What validation could not measure is null, because JSON has no NaN.
    history = finished.metrics["training"]["two_tower"]["history"]
    assert history["val_tail/recall@5"] == [None] * 4


@pytest.mark.nightly
def test_a_whole_run_proves_its_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_version, "prove", PROVE)
    baselines = ("popularity", "transitions", "itemknn", "ease", "ials")
    config = tp.with_settings(ratings_config(tmp_path), {"evaluation.baselines": baselines})
    finished = go(config, tmp_path / "run", "int")
    assert tuple(finished.metrics["models"]) == ("two_tower", *baselines)
    assert "fresh process" in finished.reports["export"].notes[-1]
