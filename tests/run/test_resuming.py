"""Killed and damaged runs: runs the benchmark with a few of each."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "resuming.py"


def figures_of(folder: Path, *flags: str) -> dict[str, Any]:
    """Runs the benchmark; returns its figures, and what it wrote to stderr under "told"."""
    command = [sys.executable, str(BENCHMARK), *flags, "--json", str(folder / "figures.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "figures.json").read_text()) | {"told": done.stderr}


@pytest.mark.slow
def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    figures = figures_of(tmp_path, "--kills", "2")
    kills = figures["kills"]
    assert kills["num_kills"] == 2
    assert (kills["num_failed"], kills["num_other"]) == (0, 0), figures["told"]


# Each kind of file is damaged in fast tests: samples, checkpoints, versions, what a day reads.
@pytest.mark.nightly
def test_a_damaged_run_ends_as_an_undisturbed_one_or_names_the_file(tmp_path: Path) -> None:
    damage = figures_of(tmp_path, "--damage", "4")["damage"]
    assert (damage["num_damages"], damage["wrong"]) == (4, [])
