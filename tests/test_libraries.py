"""What is missing is named, with the extra that brings it."""

import sys
from pathlib import Path
from typing import Any

import pytest

import tfrs_pipeline as tp
from tfrs_pipeline.cli.commands import COMMAND_LINE, EXTRA_OF
from tfrs_pipeline.libraries import EXTRAS, MissingExtra, require


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns what makes a module seem to be missing."""
    return lambda module: monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize(("words", "module", "extra"), [
    (["serve", "models/films"], "uvicorn", "serve"),
    (["refresh-index", "models/films", "--items", "items.csv"], "ibis", "data"),
    (["run"], "tensorflow", "train"),
    (["run", "--check"], "duckdb", "train"),
    (["compare"], "tf_keras", "train"),
    (["report", "runs/films"], "jinja2", "train"),
])  # fmt: skip
def test_a_command_says_what_to_install_before_it_does_anything(
    words: list[str], module: str, extra: str, command: Any, without: Any, here: Path
) -> None:
    without(module)
    done = command(*words)
    assert done.code == 1
    assert f"tfrs-pipeline {words[0]} needs {module}, which is not installed" in done.err
    assert f"pip install -c constraints.txt -e '.[{extra}]'" in done.err
    assert len(done.err.splitlines()) == 1
    assert not list(here.iterdir())


def test_a_public_name_says_what_to_install(without: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tfrs_pipeline.run.refresh", raising=False)
    monkeypatch.delitem(vars(tp), "refresh_index", raising=False)
    monkeypatch.delitem(sys.modules, "tfrs_pipeline.data.tables", raising=False)
    without("ibis")
    with pytest.raises(MissingExtra, match=r"tfrs_pipeline.refresh_index needs ibis.*\.\[data\]"):
        _ = tp.refresh_index


def test_on_a_mac_tensorflow_recommenders_has_a_command_of_its_own(
    without: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    without("tensorflow_recommenders")
    with pytest.raises(MissingExtra, match=r"\.\[train\]"):
        require("train", "run")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(MissingExtra, match="pip install --no-deps tensorflow-recommenders"):
        require("train", "run")
    page = (Path(__file__).parents[1] / "docs/start/install.md").read_text()
    assert "pip install --no-deps tensorflow-recommenders==0.7.7" in page


def test_every_command_that_needs_an_extra_is_one() -> None:
    assert EXTRA_OF.keys() <= set(COMMAND_LINE.commands)
    assert set(EXTRA_OF.values()) == set(EXTRAS)
