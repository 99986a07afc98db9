"""The wording of messages."""

import io
import sys
from typing import Any

import IPython.display
import numpy as np
import pytest

from tfrs_pipeline.messages import (
    SILENT,
    check_integer,
    counted,
    in_percent,
    line_writer,
    plain,
    printable,
    suggest,
    written,
)
from tfrs_pipeline.retrieval import check_one_each


def test_numbers_and_text_from_outside_are_written_in_a_short_line() -> None:
    values = (np.int64(5), np.float32(0.5), np.str_("a"), np.array(3), 5, "a", [1])
    assert list(map(plain, values)) == ["5", "0.5", "'a'", "3", "5", "'a'", "[1]"]
    with pytest.raises(ValueError, match=r"k must be .* Received: -5$"):
        check_integer(1, k=np.int64(-5))
    with pytest.raises(ValueError, match=r"Received: 5; did you mean \[5\]"):
        check_one_each("exclude", [np.int64(5)], 1)
    assert [counted(1, "epoch"), counted(1000, "query")] == ["1 epoch", "1,000 queries"]
    shares = [in_percent(part, 143_609) for part in (0, 67, 71_805)]
    assert shares == ["0.0%", "<0.1%", "50.0%"]
    assert printable("a film\x1b[2J and more", max_chars=11) == r"a film\x1b[2J ..."


def test_the_setting_of_a_table_is_suggested_before_a_similar_name() -> None:
    known = ["--seed", "--compare.seeds", "--training.max_epochs"]
    assert suggest("--seeds", known) == "did you mean '--compare.seeds'?"
    assert suggest("--sed", known) == "did you mean '--seed'?"
    assert suggest("max_epochs", ["seed", "training.max_epochs"]).endswith("'training.max_epochs'?")


# Progress


class OutStream(io.StringIO):
    """What a notebook's kernel puts in the place of `sys.stderr`."""

    __module__ = "ipykernel.iostream"


def test_progress_is_a_line_of_a_notebook_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, str, Any]] = []

    def record(name: str) -> Any:
        return lambda handle, data, raw: shown.append((name, data["text/plain"], handle.display_id))

    for name in ("display", "update"):
        monkeypatch.setattr(IPython.display.DisplayHandle, name, record(name))
    monkeypatch.setattr(sys, "stderr", OutStream())
    progress = written()
    assert shown == []  # Nothing until there is a line.
    progress.task("a plan", 1, 2, "loss 3.1")
    progress.task("a plan", 2, 2, "loss 3.0")
    write = line_writer(verbose=True)
    assert write is not None
    write("epoch 1/2")
    assert [x[:2] for x in shown] == [
        ("display", "a plan, 1/2 epochs: loss 3.1"),
        ("update", "a plan, 2/2 epochs: loss 3.0"),
        ("display", "epoch 1/2"),
    ]
    assert shown[0][2] == shown[1][2] != shown[2][2]  # Another training has a line of its own.
    assert line_writer(verbose=False) is None
    assert sys.stderr.getvalue() == ""  # type: ignore[union-attr]


def test_progress_goes_to_a_terminal_or_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (line_writer(), written()) == (None, SILENT)  # Nobody reads what a test writes.
    for is_terminal, verbose in ((False, True), (True, None)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
        write = line_writer(verbose)
        assert write is not None
        write("epoch 1/2")
        assert capsys.readouterr().err == "epoch 1/2\n"
