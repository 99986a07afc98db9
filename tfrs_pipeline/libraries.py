"""Large libraries, imported when they are first used, and what to install if one is missing."""

import contextlib
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ibis
    import ibis.expr.types as ir
    import pyarrow as pa
    import pyarrow.compute as pc
    import tensorflow as tf
    import tomli_w
else:

    class _Library:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

    names = ("ibis", "ibis.expr.types", "pyarrow", "pyarrow.compute", "tensorflow", "tomli_w")
    ibis, ir, pa, pc, tf, tomli_w = map(_Library, names)


_quieting = threading.Lock()


@contextlib.contextmanager
def quiet_natives() -> Iterator[None]:
    """Discards what libraries write to the standard error past Python, such as lines of C++."""
    with _quieting:  # Two threads at once would keep, and so restore, each other's nothing.
        kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nothing, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nothing)


_DATA = ("duckdb", "ibis", "sqlglot")
# Extra -> the modules that the package imports from it, as setup.cfg has it.
EXTRAS = {
    "serve": ("httptools", "prometheus_client", "starlette", "uvicorn"),
    "data": _DATA,
    "train": (
        *_DATA,
        "implicit",
        "jinja2",
        "markupsafe",
        "matplotlib",
        "scipy",
        "tensorflow",
        "tensorflow_recommenders",
        "tf_keras",
        "threadpoolctl",
        "tomli_w",
    ),
}


class MissingExtra(ImportError):
    """A library is missing, and the message says how to install it."""


def require(extra: str, what: str) -> None:
    """Raises `MissingExtra` if `what`, such as a command, needs a library that is missing."""
    for module in EXTRAS[extra]:
        if importlib.util.find_spec(module) is None:
            raise MissingExtra(_remedy(extra, module, what))


def raise_missing(error: ModuleNotFoundError, what: str) -> None:
    """Raises `MissingExtra` if an import failed because an extra is not installed."""
    module = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if module in modules:
            raise MissingExtra(_remedy(extra, module, what)) from error


def _remedy(extra: str, module: str, what: str) -> str:
    missing = f"{what} needs {module}, which is not installed here"
    if module == "tensorflow_recommenders" and sys.platform == "darwin":
        # It asks for tensorflow-macos, which ended before TensorFlow 2.20.
        return f"{missing}: pip install --no-deps tensorflow-recommenders==0.7.7"
    return (
        f"{missing}. Install the extra '{extra}': pip install -c constraints.txt -e '.[{extra}]', "
        "in the project's folder; docs/start/install.md has the way without a clone."
    )
