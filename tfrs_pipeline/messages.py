"""Wording of messages, progress of long work, and shared checks."""

import contextlib
import difflib
import itertools
import numbers
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

SECONDS_BETWEEN_LINES = 15.0  # Between reports of progress within an epoch.


@dataclass
class StepReport:
    """What a step did: its name, lines for the user, seconds of wall time."""

    name: str
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Progress:
    """Receives the progress of long work and shows nothing; subclasses show it."""

    def step(self, report: StepReport) -> None:
        """Called at the end of each step."""

    def task(self, name: str, done: int, total: int, note: str = "", /) -> None:
        """Called within long steps with a task's name, its steps done and in all."""


SILENT = Progress()


def line_writer(verbose: bool | None = None) -> Callable[[str], None] | None:
    """Returns a function that writes a line of progress; None if nobody would read it.

    In a notebook, a line is shown in the cell, where it replaces the one before. Elsewhere it goes
    to standard error, if that is a terminal or `verbose` is True.
    """
    # Jupyter's kernels replace the standard streams. They need IPython, so it is installed there.
    in_notebook = type(sys.stderr).__module__.startswith("ipykernel")
    if not (in_notebook or sys.stderr.isatty() if verbose is None else verbose):
        return None
    if not in_notebook:
        return lambda line: print(line, file=sys.stderr, flush=True)
    from IPython.display import DisplayHandle

    handle, calls = DisplayHandle(), itertools.count()
    return lambda line: (handle.update if next(calls) else handle.display)(
        {"text/plain": line}, raw=True
    )


class _Written(Progress):
    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write

    def task(self, name: str, done: int, total: int, note: str = "", /) -> None:
        if total:  # Other work has no number of epochs.
            self._write(f"{name}, {done}/{total} epochs: {note}")


def written() -> Progress:
    """Returns a progress that writes a line for each epoch; silent if nobody would read it."""
    return SILENT if (write := line_writer()) is None else _Written(write)


@contextlib.contextmanager
def as_interrupts() -> Iterator[None]:
    """Raises `KeyboardInterrupt` in place of an error that Ctrl-C caused in a library."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise KeyboardInterrupt from error


class Lines(list[str]):
    """Lines for a person, which a notebook or a prompt shows as text."""

    def __repr__(self) -> str:
        return "\n".join(self)


def check_integer(least: int, **values: object) -> None:
    """Refuses (`ValueError`) values, by name, that are not integers or are below `least`."""
    for name, value in values.items():
        is_bool = isinstance(value, bool)  # A subclass of int.
        if is_bool or not isinstance(value, numbers.Integral) or value < least:
            message = f"{name} must be a whole number, {least} or more. Received: {plain(value)}"
            raise ValueError(message)


def plain(value: object) -> str:
    """Shows a value as Python writes it, NumPy's scalars too: 5, not np.int64(5)."""
    return repr(value.item() if getattr(value, "shape", None) == () else value)  # type: ignore[attr-defined]


def printable(text: str, max_chars: int = 80) -> str:
    r"""Shortens external text to one line, and escapes control characters.

    Text from a log may hold what a terminal would obey, such as a change of its colours.

    Example:
        >>> printable("a title\n", max_chars=20)
        'a title\\n'
    """
    cut = text if len(text) <= max_chars else text[:max_chars] + "..."
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in cut)


def sentence(text: str) -> str:
    """Ends a text with a full stop, unless it has one or a question mark."""
    return text if text.endswith((".", "?")) else f"{text}."


def counted(number: int, what: str) -> str:
    """Writes a count with its noun.

    Example:
        >>> counted(1, "item"), counted(1682, "category")
        ('1 item', '1,682 categories')
    """
    many = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{number:,} {what if number == 1 else many}"


def in_percent(part: int, whole: int) -> str:
    """Formats a part of a whole in percent; only zero is 0.0%.

    Example:
        >>> in_percent(1, 3), in_percent(1, 100_000)
        ('33.3%', '<0.1%')
    """
    percent = f"{part / whole:.1%}"
    return "<0.1%" if part and percent == "0.0%" else percent


def suggest(name: str, known: Collection[str]) -> str:
    """Suggests the known name with the same last part, or the nearest one, or lists all.

    Example:
        >>> suggest("batch_size", ["training.batch_size", "seed"])
        "did you mean 'training.batch_size'?"
        >>> suggest("epochs", ["seed", "dim"])
        'known: dim, seed'
    """

    def last(name: str) -> str:
        return name.lstrip("-").rpartition(".")[2]

    near = [other for other in known if last(other) == last(name)]
    near = near or difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    if len(known) > 30:
        return "no known one is near"
    return "known: " + ", ".join(sorted(known))


def suggest_part(name: str, known: Collection[str]) -> str:
    """Suggests a known part as `suggest` does, and says how a command gets a user's own."""
    hint = "A piece of your own? Start from the script that imports it (docs/guides/pieces.md)"
    return f"{sentence(suggest(name, known))} {hint}"


def beside(path: Path, is_meant: Callable[[Path], object] = Path.exists) -> str:
    """Suggests neighbours of a missing path with nearly its name; "" if there are none."""
    folder = path.parent
    names = [other.name for other in folder.iterdir() if is_meant(other)] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, sorted(names), cutoff=0.7)
    return (
        f" Did you mean {' or '.join(str(path.with_name(name)) for name in near)}?" if near else ""
    )
