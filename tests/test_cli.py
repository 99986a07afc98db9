"""The command line: help, flags made from the settings, errors in one line, query, Ctrl-C."""

import argparse
import io
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from tests.small_log import NUM_ITEMS, event_table, item_table, small_config, write
from tfrs_pipeline import cli
from tfrs_pipeline import run as pipeline
from tfrs_pipeline.config import (
    Config,
    EasySampler,
    HardSampler,
    RunConfig,
    dump_config,
    main_job_config,
)
from tfrs_pipeline.run import StageReport
from tfrs_pipeline.serving import export
from tfrs_pipeline.serving.retriever import load_retriever

RUN = "it's a run"  # A folder's name that a shell needs in quotes.


@dataclass(frozen=True)
class Answer:
    """What a command returned and printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command line within this process."""

    def run(*arguments: Any) -> Answer:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stopped:  # argparse's way out
            code = int(stopped.code or 0)
        return Answer(code, *capsys.readouterr())

    return run


@pytest.fixture
def config_of(command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Returns the settings that `run` would run with."""
    configs: list[RunConfig] = []

    def record(config: RunConfig, folder: Path, **options: Any) -> None:
        configs.append(config)
        raise RuntimeError("enough")

    monkeypatch.setattr(pipeline, "run", record)

    def run(*arguments: Any) -> RunConfig:
        given = [] if "--run-dir" in arguments else ["--run-dir", tmp_path / "run"]
        answer = command("run", *arguments, *given)
        assert answer.err == ("error: enough\nIt came unforeseen: --verbose shows where from.\n")
        return configs[-1]

    return run


def settings(
    table: type[Config], prefix: str = "", without: str = "compare"
) -> Iterator[tuple[str, Any]]:
    """Yields the dotted name and the field of every setting, those of a table left out."""
    for name, field in table.model_fields.items():
        if name == without:
            continue
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Config):
            yield from settings(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def commands() -> dict[str, argparse.ArgumentParser]:
    (choices,) = (
        action.choices for action in cli._parser()._actions if isinstance(action.choices, dict)
    )
    return dict(choices)


def one_line(text: str) -> str:
    return " ".join(text.split())


# Help


@pytest.mark.parametrize("name", list(commands()))
def test_a_command_explains_itself_and_each_of_its_flags(command: Any, name: str) -> None:
    answer = command(name, "--help")
    assert answer.code == 0
    parser = commands()[name]
    assert parser.description
    # argparse wraps also at hyphens.
    assert re.sub(r"\s+", "", parser.description) in re.sub(r"\s+", "", answer.out)
    for action in parser._actions:
        assert action.help, action.option_strings
    listed = command("--help").out
    # After a long name the line is broken.
    assert re.search(rf"^ +{name}\s+\w.*\.$", listed, re.MULTILINE)


@pytest.mark.parametrize(
    ("command_name", "name", "field"),
    [
        pytest.param(command_name, *setting, id=f"{command_name}-{setting[0]}")
        for command_name, without in (("run", "compare"), ("compare", "export"))
        for setting in settings(RunConfig, without=without)
    ],
)
def test_a_setting_is_a_flag_with_the_help_of_its_field(
    command_name: str, name: str, field: Any
) -> None:
    (action,) = (a for a in commands()[command_name]._actions if flag(name) in a.option_strings)
    assert field.description
    assert action.help is not None
    assert action.help.replace("%%", "%").startswith(f"{field.description} (default: ")


def test_the_help_of_run_shows_all_settings(command: Any) -> None:
    shown = command("run", "--help").out
    for name, field in settings(RunConfig):
        assert re.search(rf"^  {flag(name)}\b", shown, re.MULTILINE), name
        # argparse wraps also at hyphens.
        assert field.description.replace(" ", "") in re.sub(r"\s+", "", shown), name


def test_version(command: Any) -> None:
    answer = command("--version")
    assert (answer.code, answer.err) == (0, "")
    assert re.fullmatch(r"\d+\.\d+.*\n", answer.out)


# Settings


def as_flags(config: RunConfig) -> list[str]:
    """Writes every setting as the help shows it."""
    flags = []
    for name, field in settings(RunConfig):
        value: Any = config.model_dump()
        for key in name.split("."):
            value = value[key]
        if field.annotation is bool:
            flags.append(flag(name) if value else flag(name).replace("--", "--no-", 1))
        elif isinstance(value, tuple | list | dict):
            flags += [flag(name), *cli._shown(value).split(" ")]
        else:
            flags += [flag(name), cli._shown(value)]
    return flags


def test_what_the_help_shows_can_be_typed(config_of: Any) -> None:
    assert config_of(*as_flags(main_job_config())) == main_job_config()


def test_without_an_argument_it_is_the_main_job(config_of: Any) -> None:
    assert config_of() == main_job_config()


def test_every_kind_of_flag_is_read(config_of: Any) -> None:
    config = config_of(
        *("--data.source", "ratings", "--data.path", "stars.csv", "--data.rating-threshold", "3.5"),
        *("--data.columns", "user_id=viewer", "item_id=the=film"),
        *("--data.timestamp-unit", "ms", "--data.time-zone", "none", "--no-data.ordered"),
        *("--samples.easy-negatives", "0:16", "0.5:8"),
        *("--samples.hard-negatives", "ranked:0.25:2", "--no-samples.in-batch"),
        *("--model.use-user-id", "--model.query-layers", "64", "32", "--model.history-pooling"),
        *("--evaluation.baselines", "none", "--evaluation.cutoffs", "5", "100", "--seed", "7"),
        *("--split.kind", "time", "--split.validation-start", "2024-01-01T00:00:00Z"),
        *("--split.test-start", "2024-02-01T00:00:00+01:00"),
    )
    assert config.data.columns == {"user_id": "viewer", "item_id": "the=film"}
    assert config.data.rating_threshold == 3.5
    assert (config.data.time_zone, config.data.ordered) == (None, False)
    # A source of the user's own has no features of MovieLens.
    assert config.data.item_features == {}
    assert config.samples.easy_negatives == (
        EasySampler(alpha=0, num=16),
        EasySampler(alpha=0.5, num=8),
    )
    assert config.samples.hard_negatives == (HardSampler(stage="ranked", share=0.25, num=2),)
    assert not config.samples.in_batch
    assert (config.model.use_user_id, config.model.query_layers) == (True, (64, 32))
    assert config.model.history_pooling == ()
    assert config.evaluation.baselines == ()
    assert config.evaluation.cutoffs == (5, 100)
    assert config.seed == 7
    assert str(config.split.test_start) == "2024-02-01 00:00:00+01:00"


def test_flags_replace_what_the_file_says(config_of: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("seed = 3\n[training]\nbatch_size = 64\n[data]\nitem_features = {x = 'text'}\n")
    config = config_of("--config", path, "--training.batch-size", "32", "--model.temperature", "1")
    assert (config.seed, config.training.batch_size, config.model.temperature) == (3, 32, 1.0)
    assert config.data.item_features == {"x": "text"}


def test_the_folder_of_a_run_gives_the_settings_to_go_on_with(
    config_of: Any, tmp_path: Path
) -> None:
    saved = small_config(tmp_path, {"source": "clicks", "path": "clicks.csv"})
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "config.toml").write_text(dump_config(saved))
    assert config_of("--run-dir", tmp_path / "stopped") == saved


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --trainin.batch-size 3", "unknown flag --trainin.batch-size; did you mean "
         "'--training.batch-size'"),
        ("run --training.batch_size=3", r"unknown flag --training.batch_size; did you mean '"),
        ("run --training.batch 3", "unknown flag --training.batch;"),
        ("run --zzz", "unknown flag --zzz; see tfrs-pipeline run --help"),
        ("run mine", "unexpected 'mine'; see tfrs-pipeline run --help"),
        ("query model --user 3 --top 5", "unknown flag --top; see tfrs-pipeline query --help"),
        ("run --seed", "argument --seed: expected one argument"),
        ("run --training.batch-size many", r"training.batch_size: got 'many'; must be a valid int"),
        ("run --training.batch-size 1", r"training.batch_size: got '1'; must be greater than or"),
        ("run --export.index hnsw", r"export.index: got 'hnsw'; must be 'auto', 'scann' or"),
        ("run --data.columns user_id", r"--data.columns: got 'user_id'; write NAME=VALUE"),
        ("run --data.columns usr_id=x --data.source clicks --data.path x.csv",
         r"data.columns.usr_id: unknown column; did you mean 'user_id'\?"),
        ("run --samples.easy-negatives 5", r"easy-negatives: got '5'; write ALPHA:NUM"),
        ("run --samples.easy-negatives 1:2:3", r"easy_negatives.0.num: got '2:3'; must be a valid"),
        ("run --samples.hard-negatives ranked:3", r"got 'ranked:3'; write STAGE:SHARE:NUM"),
        ("run --data.source clicks", r"data.path: required for source 'clicks'"),
        ("run --config nowhere.toml", r"nowhere.toml:\s+cannot be read: No such file"),
        ("run --config broken.toml", r"broken.toml:\s+is not a TOML file: .*line 1"),
        ("run --config unknown.toml", r"unknown.toml:\s+training.batch_sise: .*batch_size'\?"),
        ("query", "the following arguments are required: MODEL\n"),
        ("query model", "give --user ID, or --history ITEM ... for someone without an id"),
        ("query model --user 3 -k ten", "argument -k: invalid int value: 'ten'"),
        ("query model --user 3 -k 0", "-k: got 0; must be 1 or more"),
        ("server", "argument COMMAND: invalid choice: 'server'"),
        ("", "the following arguments are required: COMMAND"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_told_in_a_line(
    command: Any, arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.toml").write_text("seed == 3")
    Path("unknown.toml").write_text("[training]\nbatch_sise = 3")
    answer = command(*shlex.split(arguments))
    assert answer.code == 2
    assert answer.out == ""
    assert re.search(message, answer.err)
    problem = answer.err[answer.err.index("error: ") :]
    # A problem of a file stands under the file's name.
    assert len(problem.splitlines()) == (2 if ".toml" in problem else 1)
    assert "Traceback" not in answer.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --data.source clicks --data.path nowhere.csv", "nowhere.csv does not exist"),
        ("run --data.source clicks --data.path other.csv", "no column 'user_id'. Nearest: usr_id"),
        ("run --data.source clicks --data.path few.csv --split.kind last_n --split.min-positives 1",
         "batch needs 1024 positives .* Lower training.batch_size"),
        ("run --data.source clicks --data.path old.csv", "pass --data.timestamp-unit ms"),
        ("run --data.source clicks --data.path naive.csv",
         "--data.time-zone UTC, or 'Europe/Berlin'"),
        ("query nowhere --user 3", r"No exported model at 'nowhere': .*`tfrs-pipeline run`"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_told_in_a_line(
    command: Any, arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(pa.table({"usr_id": [1], "item_id": [2]}), Path("other.csv"))
    few = {"user_id": [1, 1, 1, 2, 2, 2], "item_id": [1, 2, 3, 1, 2, 3]}
    write(pa.table(few), Path("few.csv"))
    for name, time_ in (("old", 1_700_000_000_000), ("naive", "2024-01-31 12:00:00")):
        write(pa.table({"user_id": [1], "item_id": [2], "timestamp": [time_]}), Path(f"{name}.csv"))
    answer = command(*shlex.split(arguments))
    assert answer.code == 1
    assert re.fullmatch(rf"error: .*{message}.*\n", answer.err)


def test_refused_data_can_be_mended_in_the_same_folder(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(pa.table({"usr_id": [1], "item_id": [2]}), Path("clicks.csv"))
    arguments = ["run", "--run-dir", "run", "--data.source", "clicks", "--data.path", "clicks.csv"]
    assert "no column 'user_id'" in command(*arguments).err
    answer = command(*arguments, "--data.columns", "user_id=usr_id")
    assert "other settings" not in answer.err
    assert "1 events, 1 items, 1 users" in answer.out


# A run and its model


@dataclass(frozen=True)
class Run:
    """A run by the command line."""

    folder: Path
    model: Path
    answer: Answer


def run_arguments(folder: Path, ids: Any, *more: Any) -> list[str]:
    data = {
        "source": "events",
        "path": write(event_table(ids), folder / "events.parquet"),
        "items_path": write(item_table(ids), folder / "items.csv"),
        "item_features": {"title": "text"},
    }
    config = small_config(folder, data)
    (folder / "small.toml").write_text(dump_config(config))
    arguments = ["run", "--config", folder / "small.toml", "--run-dir", folder / RUN, *more]
    return [str(argument) for argument in arguments]


def run_once(folder: Path, ids: Any, *more: Any) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        # The check in a fresh process takes seconds, and has its own tests.
        patch.setattr(export, "_prove", lambda *arguments: None)
        out, err = io.StringIO(), io.StringIO()
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        code = cli.main(run_arguments(folder, ids, *more))
    return Run(folder, folder / "saved_models" / "films", Answer(code, out.getvalue(), ""))


@pytest.fixture(scope="module")
def of_int(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_once(tmp_path_factory.mktemp("int"), "int")


@pytest.fixture(scope="module")
def of_str(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_once(
        tmp_path_factory.mktemp("str"),
        "str",
        *("--data.item-features", "title=text", "genre=categorical"),
        *("--export.filter-by", "genre"),
    )


def test_a_run_says_what_it_did_and_where_things_lie(of_int: Run) -> None:
    lines = of_int.answer.out.splitlines()
    assert of_int.answer.code == 0
    assert lines[0] == f"run folder: {of_int.folder / RUN}"
    seconds = json.loads((of_int.folder / RUN / "metrics.json").read_text())["seconds"]
    for stage, taken in seconds.items():
        assert f"{stage:<28}{taken:8.1f} s" in lines
    assert "    dropped nothing" in lines
    (header,) = (line for line in lines if line.startswith("model  ") and "ndcg" in line)
    assert header.split() == [
        *("model", "ndcg@20", "recall@20", "recall@5", "tail/recall@20", "coverage@5", "mrr@5"),
    ]
    for name in ("two_tower", "popularity"):
        (row,) = (line for line in lines if line.startswith(f"{name}  "))
        assert len(row) == len(header)
    for name in ("metrics.json", "config.toml", "report.html"):
        assert (of_int.folder / RUN / name).exists()
        assert any(line.endswith(f"{RUN}/{name}") for line in lines)
    assert lines[-1].startswith("next:  tfrs-pipeline query ")


@pytest.mark.parametrize("ids", ["int", "str"])
def test_the_next_command_it_names_works(
    command: Any, ids: str, request: pytest.FixtureRequest
) -> None:
    run: Run = request.getfixturevalue(f"of_{ids}")
    program, *arguments = shlex.split(run.answer.out.splitlines()[-1].removeprefix("next:"))
    assert program == "tfrs-pipeline"
    answer = command(*arguments)
    assert (answer.code, answer.err) == (0, "")
    assert "unknown" not in answer.out
    assert answer.out.count("Film ") == 10


def test_report_writes_a_page_where_it_is_told_to(
    command: Any, of_int: Run, tmp_path: Path
) -> None:
    page = of_int.folder / RUN / "report.html"
    written = page.read_text()
    assert written.startswith("<!DOCTYPE html>")
    page.unlink()
    answer = command("report", of_int.folder / RUN)
    assert (answer.code, answer.out, answer.err) == (0, f"{page}\n", "")
    assert page.read_text() == written
    assert command("report", of_int.folder / RUN, "--output", tmp_path / "page.html").code == 0
    assert (tmp_path / "page.html").read_text() == written
    assert "&quot;" in written or "&#x27;" in written  # The folder's name has a quote.


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], "is no run: it has no config.toml"),
        (["config.toml"], "not finished; finish it with:  tfrs-pipeline run --run-dir {quoted}"),
        (
            ["config.toml", "plans/mixed/x"],
            "not finished; finish it with:  tfrs-pipeline compare --run-dir {quoted}",
        ),
        (
            ["config.toml", "comparison.json"],
            "holds a comparison, and its report is there: {folder}/comparison.md, with the figure "
            "{folder}/comparison.png",
        ),
    ],
)
def test_report_says_what_to_do_with_a_folder_that_holds_no_finished_run(
    command: Any, tmp_path: Path, files: list[str], expected: str
) -> None:
    folder = tmp_path / RUN
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    answer = command("report", folder)
    assert answer.code == 1
    assert answer.out == ""
    assert answer.err.count("\n") == 1
    assert expected.format(folder=folder, quoted=shlex.quote(str(folder))) in answer.err


def test_a_folder_of_another_run_is_refused_in_a_line(command: Any, of_int: Run) -> None:
    answer = command("run", "--run-dir", of_int.folder / RUN, "--seed", 9)
    assert answer.code == 1
    assert re.fullmatch(r"error: .* holds a run with other settings .*--run-dir.*\n", answer.err)


def clicked_by(user_id: Any, ids: Any) -> set[Any]:
    return {
        row["item_id"]
        for row in event_table(ids).to_pylist()
        if row["user_id"] == user_id and row["stage"] == "clicked"
    }


def test_query_prints_the_best_with_titles_and_leaves_known_items_out(
    command: Any, of_int: Run
) -> None:
    answer = command("query", of_int.model, "--user", 7, "-k", NUM_ITEMS, "--json")
    answered = json.loads(answer.out)
    assert (answered["user_id"], answered["is_known_user"]) == (7, True)
    items = answered["items"]
    known = clicked_by(7, "int")
    assert {item["item_id"] for item in items} == set(range(0, 10 * NUM_ITEMS, 10)) - known
    assert [item["rank"] for item in items] == list(range(1, len(items) + 1))
    scores = [item["score"] for item in items]
    assert scores == sorted(scores, reverse=True)
    titles = dict(zip(*item_table("int").select(["item_id", "title"]).to_pydict().values(),
                      strict=True))  # fmt: skip
    assert all(item["title"] == titles[item["item_id"]] for item in items)

    table = command("query", of_int.model / "1", "--user", 7, "-k", 5)
    rows = re.findall(r"│ (\d+) +│ (\d+) +│ (.*?) +│ +(-?\d\.\d+) │", table.out)
    assert [(int(rank), int(id_), title) for rank, id_, title, _ in rows] == [
        (item["rank"], item["item_id"], item["title"]) for item in items[:5]
    ]
    assert [float(score) for *_, score in rows] == pytest.approx(scores[:5], abs=1e-4)


def test_query_leaves_out_what_it_is_told_to(command: Any, of_str: Run) -> None:
    def best(*more: Any) -> list[str]:
        answer = command("query", of_str.model, "--user", "user 7", "-k", 6, "--json", *more)
        return [item["item_id"] for item in json.loads(answer.out)["items"]]

    everything = best()
    assert not set(everything) & clicked_by("user 7", "str")
    left_out = [everything[0], everything[3]]
    assert best("--exclude", *left_out, "never heard of")[:4] == [
        item for item in everything if item not in left_out
    ]
    assert best("--exact") == everything


def test_query_tells_of_an_unknown_user(command: Any, of_int: Run, of_str: Run) -> None:
    answer = command("query", of_int.model, "--user", "123456", "-k", 3)
    assert answer.code == 0
    assert answer.out.startswith(
        "User 123456 is unknown to this model: the answer for an empty history.\n"
    )
    assert answer.out.count("Film ") == 3
    for model, user in (
        (of_int.model, "-5"),
        (of_int.model, "9" * 30),
        (of_str.model, "[b]nobody[/b]"),
    ):
        answered = json.loads(command("query", model, "--user", user, "--json").out)
        assert not answered["is_known_user"]
        assert len(answered["items"]) == 10
    assert "User [b]nobody[/b] is" in command("query", of_str.model, "--user", "[b]nobody[/b]").out


def test_query_answers_a_history_in_its_order_and_leaves_it_out(command: Any, of_int: Run) -> None:
    retriever = load_retriever(of_int.model)
    history = [30, 10, 50, 70]
    for order in (history, history[::-1]):
        answer = command("query", of_int.model, "-k", 5, "--json", "--history", *order, 999)
        answered = json.loads(answer.out)
        assert (answered["history"], answered["unknown_items"]) == ([*order, 999], [999])
        ids, scores = retriever.retrieve([{"history": order}], 5, [history])
        assert [item["item_id"] for item in answered["items"]] == ids[0].tolist()
        found = [item["score"] for item in answered["items"]]
        assert found == pytest.approx(scores[0], abs=1e-6)
    table = command("query", of_int.model, "--user", 7, "--history", *history, 999)
    assert table.out.startswith(
        "1 of 5 items of the history are not among this model's items, first 999.\n"
    )


def test_query_filters(command: Any, of_int: Run, of_str: Run) -> None:
    genres = dict(
        zip(*item_table("str").select(["item_id", "genre"]).to_pydict().values(), strict=True)
    )
    first, *others = sorted(set(genres.values()))
    for asked in (["--user", "user 7"], ["--history", *list(genres)[:2]]):
        for values in ([first], others):
            answer = command(
                "query", of_str.model, *asked, "-k", NUM_ITEMS, "--json", "--filter", *values
            )
            items = json.loads(answer.out)["items"]
            assert {genres[item["item_id"]] for item in items} == set(values)
    answer = command("query", of_int.model, "--user", 7, "--filter", first)
    assert answer.code == 1
    assert answer.err.startswith("error: This model has no item filter")


def test_query_refuses_an_id_of_the_wrong_type(command: Any, of_int: Run) -> None:
    for arguments, what in (
        (["--user", "Ann"], "user ids are integers. Received: 'Ann'"),
        (["--user", 7, "--exclude", 30, "Alien"], "item ids are integers. Received: 'Alien'"),
    ):
        answer = command("query", of_int.model, *arguments)
        assert (answer.code, answer.err) == (1, f"error: This model's {what}\n")


@pytest.mark.parametrize("k", [NUM_ITEMS + 1, 10**12])
def test_query_says_when_fewer_items_are_left(command: Any, of_int: Run, k: int) -> None:
    answer = command("query", of_int.model, "--user", 7, "-k", k)
    num_left = NUM_ITEMS - len(clicked_by(7, "int"))
    assert answer.out.endswith(f"Only {num_left} items are left for this user.\n")
    assert answer.out.count("Film ") == num_left


# On the way


def rendered(width: int, show: Any) -> str:
    out = io.StringIO()
    show(Console(file=out, force_terminal=True, color_system="truecolor", width=width))
    return out.getvalue()


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_the_bar_counts_and_forgets_the_count_of_what_came_before() -> None:
    def show(console: Console) -> None:
        with cli._progress(console) as (_, on_progress):
            for done in (500, 1500):
                on_progress("evaluate", done, 1500)
            time.sleep(0.15)  # A bar is drawn ten times a second.
            on_progress("export", 0, 0)

    shown = rendered(100, show)
    whole_bar = "━" * 40  # One of an unknown length is drawn in changing colours.
    before, _, after = shown.rpartition("export")
    assert "1,500/1,500" in without_colours(before)
    assert whole_bar in before
    assert "/" not in without_colours(after)
    assert whole_bar not in after


def test_the_lines_of_a_stage_stand_as_they_are() -> None:
    note = "no [b]markup[/b] :star: 12 " + "x" * 100

    def show(console: Console) -> None:
        with cli._progress(console) as (on_stage, _):
            on_stage(StageReport("data", [note], 12.34))

    shown = without_colours(rendered(80, show))
    assert f"data{' ' * 24}    12.3 s\n" in shown
    assert f"    {note}\n" in shown


@pytest.mark.parametrize("has_begun", [True, False])
def test_ctrl_c_names_the_command_only_if_there_is_something_to_go_on_with(
    command: Any, has_begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(config: RunConfig, folder: Path, **options: Any) -> None:
        if has_begun:
            (folder / "config.toml").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupt)
    answer = command("run", "--run-dir", tmp_path / "a run")
    assert answer.code == 130
    again = f"stopped; go on with:  tfrs-pipeline run --run-dir '{tmp_path}/a run'"
    assert answer.out.splitlines()[-1] == (again if has_begun else "stopped")


@pytest.mark.slow
def test_ctrl_c_in_training_can_be_gone_on_from(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tfrs_pipeline.cli"]
    more = ["--training.max-epochs", "50", "--training.patience", "50", "--no-training.refit"]
    arguments = run_arguments(tmp_path, "int", *more)
    process = subprocess.Popen(
        [*program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    state = tmp_path / RUN / "checkpoints" / "two_tower" / "selection" / "state.json"
    end = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    num_epochs = json.loads(state.read_text())["epoch"]
    assert 1 <= num_epochs < 50

    last = out.splitlines()[-1]
    assert last.startswith("stopped; go on with:  tfrs-pipeline run --run-dir ")
    again = shlex.split(last.partition("tfrs-pipeline")[2])
    done = subprocess.run([*program, *again], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(state.read_text())["epoch"] == 50
    assert (tmp_path / "saved_models" / "films" / "1" / "manifest.json").exists()


def test_a_verdict_follows_the_interval() -> None:
    def x(mean: float | None, low: float | None, high: float | None) -> dict[str, float | None]:
        return {"mean": mean, "low": low, "high": high}

    lines = list(
        cli._verdicts(
            {
                "ease": {"ndcg@9": x(0.02, 0.01, 0.03), "recall@3": x(-0.2, -0.3, -0.1)},
                "ials": {"ndcg@9": x(0.0, -0.1, 0.1), "recall@3": x(None, None, None)},
                "popularity": {"ndcg@9": x(None, None, None), "recall@3": x(None, None, None)},
            },
            ["ndcg@9", "recall@3"],
        )
    )
    assert lines == [
        "ease compared with two_tower: ndcg@9 +0.0200 [+0.0100, +0.0300], better; "
        "recall@3 -0.2000 [-0.3000, -0.1000], worse",
        "ials compared with two_tower: ndcg@9 +0.0000 [-0.1000, +0.1000], no clear difference",
    ]
