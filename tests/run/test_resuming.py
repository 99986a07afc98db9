"""Killed and damaged runs: runs the benchmark with a few of each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "resuming.py"


@pytest.mark.slow
def test_killed_and_damaged_runs_end_as_an_undisturbed_one(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    few = ["--kills", "2", "--damage", "2", "--json", str(figures)]
    done = subprocess.run([sys.executable, str(BENCHMARK), *few], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found["kills"]["num_kills"] == found["damage"]["num_damages"] == 2
    assert (found["kills"]["num_failed"], found["kills"]["num_other"]) == (0, 0), done.stderr
    assert found["damage"]["wrong"] == []
