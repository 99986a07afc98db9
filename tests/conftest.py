"""Shared by every test: Keras 2 is chosen before any test imports TensorFlow."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import settings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if "PYTEST_XDIST_WORKER" in os.environ:
    # There is a worker for each core, so more threads in each would only take turns.
    for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ.setdefault(name, "1")

import tfrs_pipeline  # noqa: F401

# No deadline, because the first example of a test may build a graph or open a database.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


def pytest_collection_finish() -> None:
    """Leaves what was imported out of garbage collections, which would search it each time."""
    gc.freeze()


class Answer(NamedTuple):
    """What a command returned and printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command line within this process, and returns its `Answer`."""
    from tfrs_pipeline import cli

    def run(*arguments: Any) -> Answer:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stopped:  # After a help.
            code = int(stopped.code or 0)
        return Answer(code, *capsys.readouterr())

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes an empty folder the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def module_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder for what the tests of a module share."""
    return tmp_path_factory.mktemp("module")


@pytest.fixture(scope="module")
def trusted_exports() -> Iterator[None]:
    """Leaves out what fresh processes do, which takes seconds and has its own tests.

    These are the check of every export, and the SavedModel of a refresh.
    """
    from tfrs_pipeline.answers import version
    from tfrs_pipeline.run import refresh

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(version, "prove", lambda *arguments: None)
        patch.setattr(refresh, "_save_graphs", lambda *arguments: {})
        yield


@pytest.fixture(scope="module")
def few_signatures() -> Iterator[None]:
    """Exports only the signatures for users and histories, which takes half the time."""
    from tfrs_pipeline.answers import signatures
    from tfrs_pipeline.exports import saved_model

    with pytest.MonkeyPatch.context() as patch:
        few = {"retrieve_user": "embed_user", "retrieve": "embed_query"}
        for module in (saved_model, signatures):
            patch.setattr(module, "RETRIEVALS", few)
        yield


@pytest.fixture(scope="module")
def figures_undrawn() -> Iterator[None]:
    """Leaves the figures of reports empty: drawing them takes seconds, and has tests of its own."""
    from tfrs_pipeline import drawing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "finish", lambda figure, label: drawing.Drawing(label, "<svg/>"))
        yield


@pytest.fixture(scope="module")
def traced_once() -> Iterator[None]:
    """Makes the trainings of a module share traces; its tests read no model after the next one."""
    from tests.tracing import tracing_once

    with tracing_once():
        yield


@pytest.fixture(scope="module")
def quick_runs(trusted_exports: None, few_signatures: None, figures_undrawn: None) -> None:
    """Leaves out of runs what takes seconds and has tests of its own."""
