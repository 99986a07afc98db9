"""The query command on models that read requests and times."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.service.conftest import Served, make_served
from tests.service.test_requests import FEATURES, READ, TYPED, K, query_of
from tfrs_pipeline import Exact, LoadedRetriever, export
from tfrs_pipeline.answers import retriever
from tfrs_pipeline.features.categorical import Text

pytestmark = pytest.mark.usefixtures("trusted_exports", "few_signatures")


@pytest.fixture(scope="module")
def served() -> Served:
    return make_served("int", use_user_id=False, request_features=FEATURES, reads_times=True)


@pytest.fixture(scope="module")
def model(served: Served, module_path: Path, trusted_exports: None) -> Iterator[LoadedRetriever]:
    """Returns a loaded model; the command loads each model only once."""
    folder = export(served.exportable(), module_path, index=Exact())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retriever, "load", functools.cache(retriever.load))
        yield retriever.load(folder)


def given(request: dict[str, str]) -> list[str]:
    return ["--request", *(f"{name}={value}" for name, value in request.items())] if request else []


def asked(command: Any, *arguments: Any) -> dict[str, Any]:
    """Returns the JSON of a query; checks that its notes are the lines above the table."""
    table = command("query", *arguments).out.splitlines()
    answer = command("query", *arguments, "--json")
    assert answer.code == 0
    found: dict[str, Any] = json.loads(answer.out)
    assert answer.out.strip().isprintable()
    num_notes = len(found["notes"])
    assert table[:num_notes] == found["notes"]
    assert table[num_notes].startswith("┏")
    return found


def test_requests_are_asked(served: Served, model: LoadedRetriever, command: Any) -> None:
    history = query_of(served, 3)["history"]
    query = {"history": history, "request": READ}
    ids, _ = model.retrieve([query], K, [history])
    items = asked(command, model.folder, "--history", *history, "-k", K, *given(TYPED))["items"]
    assert [item["item_id"] for item in items] == ids[0].tolist()


@pytest.mark.parametrize(("flags", "message"), [
    (["--user", "Ann"], "user ids are integers. Received: 'Ann'"),
    (["--exclude", "30", "Alien"], "item ids are integers. Received: 'Alien'"),
    (given({"place": "north"}), "place (vector) is written like 1,2,3"),
    (given({"free space": "much"}), "free space (numeric) is written like 1.5"),
    (given({"free space": "inf"}), "(it is not finite)"),
    (given({"place": "1,nan,3"}), "(it is not finite)"),
])  # fmt: skip
def test_what_cannot_be_read(
    model: LoadedRetriever, command: Any, flags: Any, message: str
) -> None:
    answer = command("query", model.folder, "--history", "3", *flags)
    assert answer.code
    assert message in answer.err.replace("\n", " ")


def test_the_json_holds_no_control_characters(
    model: LoadedRetriever, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    title = "a\u202eb\x9b2Jc\x1b[0m é"
    titles = dict.fromkeys(model.candidate_ids(), title)
    monkeypatch.setattr(LoadedRetriever, "titles", lambda self: titles)
    items = asked(command, model.folder, "--history", 3)["items"]  # `asked` checks the JSON.
    assert {item["title"] for item in items} == {title}
    assert "é" in command("query", model.folder, "--history", 3, "--json").out


def test_notes_say_what_of_a_history_is_not_read(
    served: Served, model: LoadedRetriever, tmp_path: Path, command: Any
) -> None:
    items = served.known(2)[:2]
    unknown = "1 of 3 items of the history are ignored"
    histories = export(make_served("int", use_user_id=False).exportable(), tmp_path, index=Exact())
    for at, flags, expected in ((histories, [], ""), (histories, ["4"], unknown)):
        notes = asked(command, at, "--history", *items, *flags)["notes"]
        found = [note for note in notes if "Not given" not in note]
        assert len(found) == bool(expected)
        assert "".join(found).startswith(expected)
    found = asked(command, histories, "--history", "4")["notes"]
    assert any(note.startswith("1 of 1 items of the history are ignored") for note in found)


def test_notes_say_what_a_request_lacks_or_holds_that_is_unknown(
    served: Served, model: LoadedRetriever, command: Any, tmp_path: Path
) -> None:
    def notes(folder: Path, *flags: str) -> Any:
        return asked(command, folder, "--history", served.known(2)[0], *flags)["notes"]

    for request, lacking in (
        ({}, "Gender, hour, free space, words, place (--request Gender=VALUE)"),
        (TYPED, "place (--request place=VALUE)"),
    ):
        told = [f"Not given, taken as missing: {lacking}."]
        assert notes(model.folder, *given(request)) == told
    assert notes(model.folder, *given(TYPED | {"place": "1,0"})) == []
    search = Text.fit("search", ["red shoes", "blue shoes"])
    searched = make_served("int", use_user_id=False, request_features=(search,))
    folder = export(searched.exportable(), tmp_path / "model", index=Exact())
    (note,) = notes(folder, "--request", "search=green hats")
    assert note == "search 'green hats' is unknown to the model: taken as missing."
    assert notes(folder, "--request", "search=green shoes") == []
