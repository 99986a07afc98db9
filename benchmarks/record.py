"""What the benchmarks share: their command line, and figures with what is needed to judge them."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LIBRARIES = (
    "implicit",
    "numpy",
    "scann",
    "scipy",
    "tensorflow",
    "tensorflow-recommenders",
    "tf-keras",
    "tfrs-pipeline",
)


def parser_with_json(description: str | None) -> argparse.ArgumentParser:
    """Makes the parser of a benchmark, whose help is the text at its top; all take --json FILE."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where to write the figures.")
    return parser


def spent(command: Sequence[str], env: Mapping[str, str] | None = None) -> dict[str, float]:
    """Runs a command; returns its seconds, CPU seconds and the peak memory of a process in GiB.

    Processes that it starts count too. A `RuntimeError` if it fails.

    Args:
        command: The program and its arguments. What it prints is dropped, errors are not.
        env: Its environment; None is that of this process.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended with {process.returncode}")
    return {
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_gib": used.ru_maxrss / 2**20,
    }


def write_json(path: Path | None, figures: Mapping[str, Any], *, seed: int | None = None) -> None:
    """Writes figures beside the date, the command, the commit, the machine and library versions.

    Args:
        path: File to write; its folder is made if missing. Without --json it is None, and nothing
            is written.
        figures: What was measured, JSON-able.
        seed: First seed that was used, if it is not among the figures.
    """
    if path is None:
        return
    record = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command(sys.argv),
        "commit": COMMIT,
        **({} if seed is None else {"seed": seed}),
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(record), indent=1) + "\n")


def command(arguments: list[str]) -> str:
    """Returns the command line, absolute paths cut to their last part.

    Example:
        >>> command(["/home/me/benchmarks/scale.py", "--json", "/tmp/scale.json"])
        'python benchmarks/scale.py --json scale.json'
    """
    script, *options = arguments
    names = [Path(option).name if Path(option).is_absolute() else option for option in options]
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *names])


def commit(checkout: Path = Path(__file__).parents[1]) -> str | None:
    """Returns the commit of a checkout, with "+" if it was changed since; None outside git.

    The default is that of the code that runs. Results that other benchmarks wrote do not count as
    changes.
    """
    git = ["git", "-C", str(checkout)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return None
    code = ["tfrs_pipeline", "benchmarks/*.py"]
    changed = subprocess.run([*git, "status", "--porcelain", "--", *code], capture_output=True)
    return head.stdout.strip() + ("+" if changed.stdout else "")


# Taken when the code is loaded, since files may be edited while it runs.
COMMIT = commit()


def machine() -> dict[str, Any]:
    """Describes the machine: cores, memory, CPU model, Python."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / 2**30, 1),
        # Above the number of cores, something else was running and times are too long.
        "load_average_5_min": round(os.getloadavg()[1], 1),
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _rounded(value: Any) -> Any:
    """Cuts floats to six digits, in dicts and lists too."""
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
