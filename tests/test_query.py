"""The query command on models that read requests and times."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import Served, make_served
from tests.serving.test_requests import FEATURES, READ, TYPED, K, query_of
from tfrs_pipeline import cli
from tfrs_pipeline.features.lists import Text
from tfrs_pipeline.serving import retriever
from tfrs_pipeline.serving.export import export
from tfrs_pipeline.serving.index import Exact
from tfrs_pipeline.serving.retriever import LoadedRetriever, load

pytestmark = pytest.mark.usefixtures("trusted_exports")


@pytest.fixture(scope="module")
def served() -> Served:
    return make_served("int", use_user_id=False, request_features=FEATURES, reads_times=True)


@pytest.fixture(scope="module")
def loaded(
    served: Served, tmp_path_factory: pytest.TempPathFactory, trusted_exports: None
) -> LoadedRetriever:
    return load(export(served.exportable(), tmp_path_factory.mktemp("films"), index=Exact()))


@pytest.fixture
def model(loaded: LoadedRetriever, monkeypatch: pytest.MonkeyPatch) -> LoadedRetriever:
    """A model that the command takes as it is."""
    monkeypatch.setattr(retriever, "load", lambda *arguments, **options: loaded)
    return loaded


def given(request: dict[str, str]) -> list[str]:
    return ["--request", *(f"{name}={value}" for name, value in request.items())] if request else []


def test_requests_and_times_are_asked_with(
    served: Served, model: LoadedRetriever, capsys: pytest.CaptureFixture[str]
) -> None:
    query = query_of(served, 3, request=READ)
    history, times = query["history"], query["history_timestamps"]
    later = {**query_of(served, 3), "history_timestamps": [None, *times[1:-1], None]}
    command = ["query", str(model.folder), "--history", *map(str, history), "-k", str(K), "--json"]
    command.append("--history_timestamps")
    texts = [time.isoformat() for time in times]
    for flags, asked in (
        ([*texts, *given(TYPED)], query),
        (["none", *texts[1:-1], ""], later),
    ):
        assert cli.main([*command, *flags]) == 0
        items = json.loads(capsys.readouterr().out)["items"]
        expected = model.retrieve([asked], K, [history])[0][0].tolist()
        assert [item["item_id"] for item in items] == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--history_timestamps", "soon"], "history_timestamps (timestamp) is written like 20"),
        (["--history_timestamps", "2024-05-01"], "write 2024-05-01T00:00:00Z if it is UTC"),
        (given({"place": "north"}), "place (vector) is written like 1,2,3"),
        (given({"free space": "much"}), "free space (numeric) is written like 1.5"),
        (given({"free space": "inf"}), "(it is not finite)"),
        (given({"place": "1,nan,3"}), "(it is not finite)"),
    ],
)
def test_what_cannot_be_read_is_refused(
    model: LoadedRetriever, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert cli.main(["query", str(model.folder), "--history", "3", *flags]) != 0
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_the_json_holds_no_control_characters(
    model: LoadedRetriever, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    title = "a\u202eb\x9b2Jc\x1b[0m é"
    titles = dict.fromkeys(model.candidate_ids(), title)
    monkeypatch.setattr(LoadedRetriever, "titles", lambda self: titles)
    assert cli.main(["query", str(model.folder), "--history", "3", "--json"]) == 0
    shown = capsys.readouterr().out
    assert shown.strip().isprintable()
    assert "é" in shown
    assert {item["title"] for item in json.loads(shown)["items"]} == {title}


def notes_of(capsys: pytest.CaptureFixture[str], *command: Any) -> list[str]:
    """Returns the notes of a query: those in its JSON, which are the lines above its table."""
    assert cli.main(["query", *map(str, command)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert cli.main(["query", *map(str, command), "--json"]) == 0
    notes: list[str] = json.loads(capsys.readouterr().out)["notes"]
    assert table[: len(notes)] == notes
    assert table[len(notes)].startswith("┏")
    return notes


def test_notes_say_what_of_a_history_is_not_read(
    served: Served, loaded: LoadedRetriever, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = served.known(2)[:2]
    times = ["--history-timestamps", "none", "2024-05-01T07:30Z"]
    unread, no_times = "This model reads no history", "This model reads no history timestamps"
    unknown = "1 of 3 items of the history are ignored"
    ids, histories = (
        export(make_served("int", **options).exportable(), tmp_path / name, index=Exact())
        for name, options in (("1", {"reads_history": False}), ("2", {"use_user_id": False}))
    )
    for at, flags, expected in (
        (ids, [], [unread]),
        (ids, ["4"], [unread]),
        (ids, times, [unread]),
        (histories, [], []),
        (histories, ["4"], [unknown]),
        (histories, times, [no_times]),
        (loaded.folder, times, []),
    ):
        found = notes_of(capsys, at, "--history", *items, *flags)
        found = [note for note in found if "Not given" not in note]
        assert len(found) == len(expected)
        assert all(note.startswith(x) for note, x in zip(found, expected, strict=True))
    found = notes_of(capsys, histories, "--history", "4")
    assert any(note.startswith("No item of the history was in the model's tr") for note in found)


@pytest.mark.parametrize(
    ("request_", "lacking"),
    [
        ({}, "Gender, hour, free space, words, place (--request Gender=VALUE)"),
        (TYPED, "place (--request place=VALUE)"),
        (TYPED | {"place": "1,0"}, None),
    ],
)
def test_notes_say_what_a_request_lacks(
    served: Served,
    model: LoadedRetriever,
    capsys: pytest.CaptureFixture[str],
    request_: dict[str, str],
    lacking: str | None,
) -> None:
    notes = notes_of(capsys, model.folder, "--history", served.known(2)[0], *given(request_))
    assert notes == ([f"Not given, taken as missing: {lacking}."] if lacking else [])


def test_notes_name_unknown_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = Text.fit("search", ["red shoes", "blue shoes"])
    served = make_served("int", use_user_id=False, request_features=(search,))
    folder = export(served.exportable(), tmp_path / "model", index=Exact())
    asked = [folder, "--history", served.known(2)[0], "--request"]
    (note,) = notes_of(capsys, *asked, "search=green hats")
    assert note == "search 'green hats' is unknown to the model: taken as missing."
    assert notes_of(capsys, *asked, "search=green shoes") == []
