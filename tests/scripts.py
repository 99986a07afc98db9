"""Imports scripts outside the package as modules."""

import importlib.util
import sys
from pathlib import Path
from typing import Any


def script(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # Its dataclasses look for their module there.
    spec.loader.exec_module(module)
    return module
