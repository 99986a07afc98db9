"""Large libraries, imported when they are first used: settings name kinds without them."""

import contextlib
import importlib
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ibis
    import ibis.expr.types as ir
    import pyarrow as pa
    import pyarrow.compute as pc
    import tensorflow as tf
else:

    class _Library:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

    names = ("ibis", "ibis.expr.types", "pyarrow", "pyarrow.compute", "tensorflow")
    ibis, ir, pa, pc, tf = map(_Library, names)


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
