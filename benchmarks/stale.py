"""Lists the results whose code has changed since they were made, with the changed files.

A result names its commit. The code behind it is the script of its command and every module of this
repository that the script imports, directly or through another one.

    python benchmarks/stale.py --json stale.json

Ends with code 1 if there is a stale result.
"""

from __future__ import annotations

import argparse
import ast
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import write_json

ROOT = Path(__file__).parents[1]


def imported(path: Path) -> Iterator[Path]:
    """Yields the files of this repository that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # What is imported may be a name or a module.
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            place = name.replace(".", "/")
            for found in (f"{place}.py", f"{place}/__init__.py", f"benchmarks/{place}.py"):
                if (ROOT / found).is_file():
                    yield ROOT / found


def closure(script: Path) -> list[str]:
    """Returns a script and all that it imports, relative to the repository, sorted."""
    found, left = set[Path](), [script]
    while left:
        if (path := left.pop()) not in found:
            found.add(path)
            left += imported(path)
    return sorted(str(path.relative_to(ROOT)) for path in found)


def changed_since(commit: str, paths: list[str]) -> list[str] | None:
    """Returns which of some files differ from those of a commit; None if it is unknown here."""
    git = ["git", "-C", str(ROOT), "diff", "--name-only", commit, "--", *paths]
    done = subprocess.run(git, capture_output=True, text=True)
    return None if done.returncode else done.stdout.split()


def state(result: Path) -> dict[str, Any]:
    """Returns a result's commit and script, and which files of its code have changed."""
    record = json.loads(result.read_text())
    commit = record.get("commit")
    script = ROOT / shlex.split(record.get("command", "python none"))[1]
    found: dict[str, Any] = {"commit": commit, "script": script.name, "changed": None}
    if not script.is_file():
        found["why"] = "the script is gone"
    elif commit is None:
        found["why"] = "no commit is recorded"
    elif commit.endswith("+"):
        found["why"] = "made of code that was not committed"
    elif (changed := changed_since(commit, closure(script))) is None:
        found["why"] = "the commit is not in this repository"
    else:
        found["changed"] = changed
        found["why"] = f"{len(changed)} files changed since" if changed else ""
    return found


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where to write the list.")
    parser.add_argument("--files", action="store_true", help="Name the files that changed.")
    options = parser.parse_args()
    states = {path.name: state(path) for path in sorted((ROOT / "benchmarks/results").glob("*"))}
    for name, found in states.items():
        print(f"{name:32} {found['commit'] or '-':9} {found['why'] or 'up to date'}")
        for path in found["changed"] or () if options.files else ():
            print(f"    {path}")
    if options.json:
        write_json(options.json, {"results": states})
    sys.exit(any(found["why"] for found in states.values()))


if __name__ == "__main__":
    main()
