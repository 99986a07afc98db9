"""Daily runs: each starts from yesterday's, and a gate protects the model in service."""

import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from tests.damage import DAMAGES, damage
from tests.small_log import Stopped, Watched, event_table, item_id, item_table, small_config, write
from tfrs_pipeline import ConfigError, Holdout, Split, evaluate, load
from tfrs_pipeline.answers.publish import MANIFEST_FILE, versions_of
from tfrs_pipeline.cli.commands import NOT_PUBLISHED
from tfrs_pipeline.config import RunConfig, dump_config, with_settings
from tfrs_pipeline.durable import Damaged, InUse, locked, read_record, write_record
from tfrs_pipeline.messages import StepReport
from tfrs_pipeline.run import training
from tfrs_pipeline.run.folder import CONFIG_FILE, RunFolder
from tfrs_pipeline.run.gate import IN_SERVICE, version_in_service
from tfrs_pipeline.run.pipeline import RunResult, run
from tfrs_pipeline.run.plans import ensemble_of, resolve_settings
from tfrs_pipeline.run.training import split_in, trained_in

pytestmark = pytest.mark.usefixtures("quick_runs", "traced_once")
YESTERDAY, TODAY = range(75), range(5, 80)  # Numbers of each day's items.
WITHDRAWN = [5, 6]  # Items of today's events that today's item table lacks.


@dataclass(frozen=True)
class Warm:
    """A run that started from another, and what it reported, by step."""

    result: RunResult
    reports: dict[str, StepReport]
    started_from: list[str]  # The trainings that it has read.
    alone: list[str]  # The steps after which nobody else could publish.


def ids_of(numbers: Iterable[int]) -> list[Any]:
    return [item_id(number, "str") for number in numbers]


def filtered(table: pa.Table, numbers: Iterable[int]) -> pa.Table:
    return table.filter(pc.is_in(table["item_id"], pa.array(ids_of(numbers))))


def config_of(folder: Path, day: str, items: range, **settings: Any) -> RunConfig:
    """Makes a run's settings for the log of a day; items and events differ, users do not."""
    events = filtered(event_table("str"), items)
    listed = items if items is YESTERDAY else [x for x in items if x not in WITHDRAWN]
    start, stop = (0, 0.85) if items is YESTERDAY else (0.15, 1)
    events = events.slice(int(start * len(events)), int((stop - start) * len(events)))
    data = {
        "path": write(events, folder / day / "events.parquet"),
        "items_path": write(filtered(item_table("str"), listed), folder / day / "items.parquet"),
        "item_features": {"genre": "categorical"},
    }
    evaluation = {"cutoffs": [5, 20], "baselines": []}
    config = small_config(folder, data, split={"kind": "last_share"}, evaluation=evaluation)
    return with_settings(config, settings)


@pytest.fixture(scope="module")
def yesterday(module_path: Path) -> RunResult:
    config = config_of(module_path, "yesterday", YESTERDAY)
    return run(config, module_path / "runs" / "yesterday")


@pytest.fixture(scope="module")
def place(yesterday: RunResult, module_path: Path) -> Path:
    return module_path


def model_folder(place: Path) -> Path:
    return place / "saved_models" / "films"


def today(place: Path, **settings: Any) -> RunConfig:
    return config_of(place, "today", TODAY, **settings)


@pytest.fixture(scope="module")
def warm(yesterday: RunResult, place: Path) -> Warm:
    """Runs today's run, which starts from the model in service and replaces it through the gate."""
    settings = {"warm_start": model_folder(place), "export.gate": True}
    started_from: list[str] = []
    alone: list[str] = []

    def try_publishing(report: StepReport) -> None:
        try:
            with locked(model_folder(place) / ".lock"):
                pass
        except InUse:
            alone.append(report.name)

    def read(folder: Path, step: Any, name: str) -> Any:
        started_from.append(step)
        return trained_in(folder, step, name)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as other:
        watched = Watched(on_step=lambda report: other.submit(try_publishing, report).result())
        patch.setattr(training, "trained_in", read)
        result = run(today(place, **settings), place / "runs" / "today", progress=watched)
    return Warm(result, watched.reports, started_from, alone)


def test_a_run_starts_from_the_served_model(yesterday: RunResult, place: Path, warm: Warm) -> None:
    result, reports = warm.result, warm.reports
    # Its source stays the same, whatever is in service when it is resumed.
    assert RunFolder(result.folder).settings().warm_start == yesterday.folder
    notes = reports["train two_tower"].notes
    assert f"started from {yesterday.folder}" in notes
    assert "warm start: 70 items kept, 5 new, 5 gone; 150 users kept, 0 new, 0 gone" in notes
    assert versions_of(model_folder(place)) == [1, 2]
    # The same if it is run again, when the newest version is its own.
    again = today(place, warm_start=model_folder(place))
    assert resolve_settings(again, RunFolder(result.folder)).warm_start == yesterday.folder
    # It begins where yesterday's training ended, and not at random.
    losses = [r.metrics["training"]["two_tower"]["history"]["loss"] for r in (yesterday, result)]
    assert losses[1][0] < losses[0][0]


def test_the_gate_measures_on_the_same_queries(place: Path, warm: Warm) -> None:
    """Nobody else can publish between the measurement and the export."""
    result, reports = warm.result, warm.reports
    (note,) = [x for x in reports["export"].notes if "not worse" in x]
    gap = result.metrics["differences"][IN_SERVICE]["ndcg@20"]
    new, old = (result.metrics["models"][x]["ndcg@20"]["mean"] for x in ("two_tower", IN_SERVICE))
    assert gap["mean"] == pytest.approx(old - new, abs=1e-9)
    told = rf"ndcg@20 {new:.4f}, and {old:.4f} of version 1 in service: \{new - old:+.4f} \["
    assert re.match(rf"not worse than the version in service. Asked by request, {told}", note)
    assert warm.alone == ["evaluate", "export", "metrics"]


def test_items_that_the_table_lacks_are_read_in_histories_and_not_retrieved(warm: Warm) -> None:
    result, reports = warm.result, warm.reports
    told = "the item table lacks 2 items of the log: they are read in histories but not retrieved"
    assert told in reports["export"].notes
    assert f"exact search over {len(TODAY) - 2} candidates" in reports["export"].notes
    # Withdrawn items are trained on like others.
    assert "75 candidates" in reports["samples"].notes[1]
    retriever, withdrawn = load(str(result.export_folder)), ids_of(WITHDRAWN)
    assert set(retriever.candidate_ids()) == {*ids_of(TODAY)} - {*withdrawn}
    assert retriever.stored.has_items(withdrawn).all()
    ids, _ = retriever.retrieve([{"history": withdrawn}, {}], len(TODAY))
    assert ids[0].tolist() != ids[1].tolist()
    # The users' stored histories hold them, too.
    rows = pq.read_table(result.folder / "data" / "events.parquet").to_pylist()
    clicked = (x for x in rows if x["item_id"] in withdrawn and x["stage"] == "clicked")
    assert set(withdrawn) & set(retriever.users.history(next(clicked)["user_id"]))
    # Elsewhere in the run they are still candidates.
    assert set(withdrawn) <= set(holdout_of(result).candidate_ids)


def test_both_are_measured_with_what_an_export_leaves_out(place: Path, warm: Warm) -> None:
    """The export of today's run, loaded as the version in service, finds what the model found."""
    holdout, split = holdout_of(warm.result), split_in(RunFolder(warm.result.folder))
    folder = place / "todays" / "films"
    shutil.copytree(model_folder(place) / "2", folder / "1")
    listed = np.setdiff1d(holdout.candidate_ids, ids_of(WITHDRAWN))
    assert split.log.listed_ids.tolist() == listed.tolist()
    found = {}
    for exported in (listed, holdout.candidate_ids):
        log = SimpleNamespace(**{**vars(split.log), "listed_ids": exported})
        lists: Any = SimpleNamespace(log=log, before_test=split.before_test)
        served = version_in_service(folder, holdout.candidate_ids, lists)
        assert served is not None
        measured = evaluate(served, holdout, cutoffs=(20,), num_bootstrap=0).first
        found[exported is not listed] = measured.overall.intervals["ndcg@20"].mean
    expected = warm.result.metrics["models"]["two_tower"]["ndcg@20"]["mean"]
    assert found[False] == pytest.approx(expected, abs=1e-5)
    assert found[True] != pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("gate", "changes", "newest"),
    [
        (True, {}, 2),
        (False, {"export.index": "none"}, 2),
        (False, {"export.user_data": False}, 3),
        pytest.param(False, {"export.index": "scann"}, 3, marks=pytest.mark.nightly),
    ],
)
def test_a_run_that_was_killed_after_its_export_keeps_its_version(
    place: Path, warm: Warm, gate: bool, changes: dict[str, Any], newest: int
) -> None:
    """It is not compared with itself, nor exported again unless another content is asked for."""
    settings = {"warm_start": model_folder(place), "export.gate": gate, **changes}
    metrics_file = warm.result.folder / "metrics.json"
    files = (metrics_file, warm.result.folder / CONFIG_FILE)
    kept = {path: path.read_bytes() for path in files}
    metrics_file.unlink()
    watched = Watched()
    again = run(today(place, **settings), warm.result.folder, progress=watched)
    assert versions_of(model_folder(place)) == [1, 2, 3][:newest]
    for name in ("models", "differences"):
        expected = dict(warm.result.metrics[name])
        if not gate:
            del expected[IN_SERVICE]
        assert again.metrics[name] == expected
    if newest == 2:
        assert again.export_folder == warm.result.export_folder
        assert again.metrics["index"] == warm.result.metrics["index"]
        assert "exported before the run was stopped, is kept" in watched.reports["export"].notes[0]
    else:
        shutil.rmtree(model_folder(place) / "3")
    for path, content in kept.items():
        path.write_bytes(content)


@pytest.mark.nightly
def test_a_new_training_in_a_folder_is_its_own(place: Path, warm: Warm, tmp_path: Path) -> None:
    """The version that the folder's earlier run published is in service; an equal model passes."""
    folder = warm.result.folder
    for name in ("metrics.json", "checkpoints"):
        shutil.move(folder / name, tmp_path / name)
    again = run(today(place, warm_start=model_folder(place), **{"export.gate": True}), folder)
    assert again.export_folder == (model_folder(place) / "3").resolve()
    own, served = (again.metrics["models"][name] for name in ("two_tower", IN_SERVICE))
    assert own["ndcg@20"]["mean"] == pytest.approx(served["ndcg@20"]["mean"], abs=1e-5)
    shutil.rmtree(again.export_folder)
    shutil.rmtree(folder / "checkpoints")
    for name in ("metrics.json", "checkpoints"):
        shutil.move(tmp_path / name, folder / name)


def test_each_training_starts_from_its_own(yesterday: RunResult, warm: Warm) -> None:
    """The first starts from the training that validation ended, which saw no validation data."""
    assert warm.started_from == ["selection", "refit"]
    best = yesterday.metrics["training"]["two_tower"]["best_epoch"]
    found = []
    for step in ("selection", "refit"):
        source = trained_in(yesterday.folder, step)
        assert source is not None
        assert source.network.optimizer.iterations.numpy() > 0
        found.append(source.network.candidate_tower.id_tables[0].numpy())
        training_ = yesterday.folder / "checkpoints" / "two_tower" / step
        saved = tf.train.load_checkpoint(str(training_ / f"epoch-{best}"))
        names = [x for x in saved.get_variable_to_shape_map() if "OPTIMIZER" not in x]
        (name,) = [x for x in names if "candidate_tower/id_embedding" in x]
        np.testing.assert_array_equal(found[-1], saved.get_tensor(name))
    assert not np.array_equal(*found)
    assert trained_in(yesterday.folder, "refit", "two_tower_uncorrected") is None


def test_a_damaged_file_of_its_source_is_told(yesterday: RunResult) -> None:
    names = "samples/final/corpus.parquet", "samples/final/queries.parquet", "data/split.parquet"
    for name, how in zip(names, DAMAGES, strict=True):
        path = yesterday.folder / name
        content = path.read_bytes()
        damage(path, how)
        with pytest.raises(Damaged, match=rf"{name} is not as it was written"):
            trained_in(yesterday.folder)
        path.write_bytes(content)


@pytest.mark.nightly
def test_a_stopped_warm_start_ends_as_an_unbroken_one(place: Path, warm: Warm) -> None:
    """It is stopped in both trainings, with another version in service than at its start."""
    whole = warm.result
    config = with_settings(RunFolder(whole.folder).settings(), {"export.name": "others"})
    folder = place / "runs" / "stopped"
    for name in ("two_tower, selection", "two_tower, refit"):
        with pytest.raises(Stopped):
            run(config, folder, progress=Watched((name, 1)))
    ended = run(config, folder)
    assert ended.metrics["training"] == whole.metrics["training"]
    assert ended.metrics["models"]["two_tower"] == whole.metrics["models"]["two_tower"]
    answers = [
        load(str(x.export_folder)).retrieve([{"history": ids_of([7])}], 20) for x in (ended, whole)
    ]
    (ids, scores), (whole_ids, whole_scores) = answers
    np.testing.assert_array_equal(ids, whole_ids)
    # Only the unbroken one was rotated to an earlier version, which rounds its scores again.
    np.testing.assert_allclose(scores, whole_scores, rtol=1e-6)


def test_a_worse_model_is_published_only_if_asked_for(
    place: Path, warm: Warm, command: Any
) -> None:
    """It is refused with its own exit code; the run is kept and can still be exported."""
    served = model_folder(place)
    before = {path: path.read_bytes() for path in served.rglob("*") if path.is_file()}
    untrained = {"training.learning_rate": 1e-9, "training.max_epochs": 1, "training.refit": False}
    untrained["training.history_bonus"] = False
    config = today(place, **untrained, **{"export.gate": True})
    (place / "worse.toml").write_text(dump_config(config))
    folder = place / "runs" / "worse"
    code, shown, told = command("run", "--config", place / "worse.toml", "--run-dir", folder)
    assert code == NOT_PUBLISHED == 3
    assert re.match(
        r"not published: The new model is worse .* 0\.\d+ of version 2 in service: "
        rf"-0\.\d+ \[-0\.\d+, -0\.\d+\] on the same .* {served} stays as it is\. "
        rf"The trained run is kept: --run-dir {folder} with",
        told,
    )
    assert {path: path.read_bytes() for path in served.rglob("*") if path.is_file()} == before
    # The reasons can be inspected as after any run.
    assert re.search(rf"^{IN_SERVICE} +0\.\d+", shown, re.MULTILINE)
    assert f"report   {folder}/report.html\nmodel    not exported\n" in shown
    assert "next:" not in shown
    assert (folder / "report.html").is_file()
    metrics = read_record(folder / "metrics.json")
    assert metrics["differences"][IN_SERVICE]["ndcg@20"]["low"] > 0
    # It is refused again if run again; without the gate it is exported, without more training.
    assert command("run", "--run-dir", folder).code == 3
    trained = {x: x.stat().st_mtime_ns for x in (folder / "checkpoints").rglob("*") if x.is_file()}
    code, told, _ = command("run", "--run-dir", folder, "--no-export.gate")
    assert code == 0
    assert "exported anyway, without the gate: The new model is worse" in told
    assert re.search(rf"^{IN_SERVICE} +0\.\d+", told, re.MULTILINE)
    forced = read_record(folder / "metrics.json")
    for kind in ("models", "differences"):
        assert forced[kind][IN_SERVICE] == metrics[kind][IN_SERVICE]
    assert {x: x.stat().st_mtime_ns for x in trained} == trained
    assert versions_of(served) == [1, 2, 3]
    assert RunFolder(folder).settings().export.gate is False
    shutil.rmtree(served / "3")


def holdout_of(result: RunResult) -> Holdout:
    split: Split = split_in(RunFolder(result.folder))
    return split.holdout("test", by=result.metrics["asked_by"])


def test_what_is_in_service_finds_what_it_has_and_is_still_there(
    yesterday: RunResult, place: Path
) -> None:
    folder, split = model_folder(place), split_in(RunFolder(yesterday.folder))
    ids = np.array(ids_of((*range(40, 75), 78, 79)), object)
    assert version_in_service(folder.with_name("none"), ids, split) is None
    only = place / "one service"
    shutil.copytree(folder / "1", only / "1")
    served: Any = version_in_service(only, ids, split)
    queries = [{"user_id": "user 3", "history": ids_of((3, 45))}, {}]
    found, scores = served.retrieve(queries, len(ids))
    gone = ids_of(range(40))
    expected, expected_scores = load(only, exact=True).retrieve(queries, 35, [gone, gone])
    assert found[:, 35:].tolist() == [["", ""]] * 2
    np.testing.assert_array_equal(found[:, :35], expected)
    np.testing.assert_allclose(scores[:, :35], expected_scores, atol=1e-6)


def test_the_command_takes_the_settings_that_are_not_given_from_the_source(
    yesterday: RunResult, warm: Warm, place: Path, tmp_path: Path
) -> None:
    """Such settings may be those of a winning recipe; from Python, all settings count as given."""
    other = {"model.dim": 48, "training.learning_rate": 0.5, "training.max_epochs": 9}
    asked = today(place, warm_start=yesterday.folder, **other)
    theirs = RunFolder(yesterday.folder).settings()

    def taken_from(config: RunConfig, folder: RunFolder, fixed: list[str]) -> RunConfig:
        return resolve_settings(with_settings(config, {"fixed": fixed}), folder)

    got = taken_from(asked, RunFolder(tmp_path), ["data", "training.max_epochs"])
    assert got.model == theirs.model
    assert got.training == theirs.training.model_copy(update={"max_epochs": 9})
    assert got.data == asked.data
    # The items that rankings exclude are those of the service that goes on.
    rules = {"evaluation.exclude": "none", "evaluation.by": "users"}
    differs = with_settings(asked, rules)
    taken = taken_from(differs, RunFolder(tmp_path), ["training.max_epochs"]).evaluation
    assert (taken.exclude, taken.by) == (theirs.evaluation.exclude, theirs.evaluation.by)
    assert (taken.exclude, taken.by) != ("none", "users")
    kept = taken_from(differs, RunFolder(tmp_path), [*rules, "training.max_epochs"]).evaluation
    assert (kept.exclude, kept.by) == ("none", "users")
    # The same command again, in the folder of the run that it has started.
    begun = RunFolder(Path(shutil.copytree(warm.result.folder, tmp_path / "begun")))
    begun._write_settings(with_settings(begun.settings(), {"training.max_epochs": 7}))
    again = taken_from(asked, begun, ["data"])
    assert (again.model, again.training.max_epochs) == (theirs.model, 7)
    for given in ([], ["model.dim"], ["model"]):
        with pytest.raises(ConfigError, match=r"model.dim: got 48"):
            taken_from(asked, RunFolder(tmp_path), given)


@pytest.mark.parametrize(("needed", "taken"), [(26, 6), (25, 5), (6, 2), (1, 2)])
def test_the_command_takes_a_fifth_of_the_epochs_that_the_source_needed(
    yesterday: RunResult, place: Path, tmp_path: Path, needed: int, taken: int
) -> None:
    """Once, and not again where the source was a warm start itself."""
    source = RunFolder(Path(shutil.copytree(yesterday.folder, tmp_path / "source")))
    metrics = read_record(source.metrics_file)
    metrics["training"]["two_tower"]["best_epoch"] = needed
    write_record(source.metrics_file, metrics)
    asked = today(place, warm_start=source.path, **{"training.max_epochs": 9})

    def epochs(config: RunConfig, *given: str, folder: str = "new") -> int:
        config = with_settings(config, {"fixed": ["warm_start", *given]})
        return resolve_settings(config, RunFolder(tmp_path / folder)).training.max_epochs

    assert epochs(asked) == taken
    for name in ("training", "training.max_epochs"):
        assert epochs(asked, name) == 9
    assert resolve_settings(asked, RunFolder(tmp_path / "new")).training.max_epochs == 9
    # The next day, and the same run once it has begun.
    first = RunFolder(Path(shutil.copytree(source.path, tmp_path / "first")))
    known = with_settings(asked, {"fixed": ["warm_start"]})
    first._write_settings(resolve_settings(known, RunFolder(tmp_path / "new")))
    trained = ensemble_of(first.settings()).model_dump(mode="json")
    write_record(first.metrics_file, {**metrics, "ensemble": trained})
    assert first.settings().training.max_epochs == taken
    assert epochs(today(place, warm_start=first.path)) == taken
    assert epochs(asked, folder="first") == taken


def test_what_cannot_be_started_from_is_said(
    yesterday: RunResult, warm: Warm, place: Path, tmp_path: Path
) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(ConfigError) as error:
            resolve_settings(today(place, warm_start=path), RunFolder(tmp_path))
        return str(error.value)

    assert "is neither a run's folder nor an exported model's" in refused(tmp_path / "nowhere")
    version = tmp_path / "model" / "1"
    version.mkdir(parents=True)
    about = {"run": str(tmp_path / "gone"), "training": ["a hash"]}
    write_record(version / MANIFEST_FILE, about)
    for named in (version.parent, version):
        assert f"was made by a run in {tmp_path}/gone, which is gone" in refused(named)
    write_record(version / MANIFEST_FILE, {})
    assert "was exported from Python: no run holds its optimizer state" in refused(version)
    # The folder may have been reused by a run that a gate has refused.
    write_record(version / MANIFEST_FILE, {**about, "run": str(yesterday.folder)})
    assert "or another run is there now" in refused(version)
    # A run does not start from its own version, but its settings are fixed by then.
    own = today(place, warm_start=model_folder(place) / "1")
    with pytest.raises(ValueError, match=r"other settings \(.*warm_start: None, now '.*yesterday'"):
        run(own, yesterday.folder)
    # A finished run is returned even if its source is gone.
    done = Path(shutil.copytree(warm.result.folder, tmp_path / "done"))
    again = today(place, warm_start=model_folder(place))
    model_folder(place).rename(tmp_path / "moved")
    assert resolve_settings(again, RunFolder(done)).warm_start == yesterday.folder
    (tmp_path / "moved").rename(model_folder(place))
    half = Path(shutil.copytree(yesterday.folder, tmp_path / "half"))
    (half / "metrics.json").unlink()
    for read in (
        trained_in,
        lambda path: resolve_settings(today(place, warm_start=path), RunFolder(tmp_path)),
    ):
        with pytest.raises(
            ValueError, match=r"holds no finished run: .* finish it with:  tfrs-pipe"
        ):
            read(half)


@pytest.mark.nightly
def test_a_source_that_has_seen_the_test_is_told(yesterday: RunResult, place: Path) -> None:
    """In two splits by time, the second one's test begins before the first one's."""
    by_time = {"split.kind": "time", "training.max_epochs": 1, "split.test": 0.1}
    first = run(config_of(place, "yesterday", YESTERDAY, **by_time), place / "runs" / "a day")
    settings = {**by_time, "split.test": 0.6, "warm_start": first.folder, "export.name": "timed"}
    watched = Watched("train two_tower")
    with pytest.raises(Stopped):
        run(today(place, **settings), place / "runs" / "too early", progress=watched)
    notes = watched.reports["train two_tower"].notes
    told = [x for x in notes if "its metrics are too good" in x]
    assert ["test begins" in x for x in told].count(True) == len(told) - 1 == 1
