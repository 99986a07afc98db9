r"""Kills exports without warning, and checks that the newest version still answers.

A process exports an untrained model again and again, keeping one version, and is killed (SIGKILL)
after a random time. Whatever it left behind, the newest version must load, answer like the model in
memory, and not be older than the one before. `tests/serving` does the same a hundred times with
small files.

    python benchmarks/publishing.py --kills 10 --json benchmarks/results/publishing.json

Needs the extra dev, because the model is from the tests. Takes about 15 seconds per kill.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from record import write_json

ROOT = Path(__file__).parents[1]
# An export takes about this long: saving, then the check in a fresh process.
EXPORT_SECONDS = 12.0

EXPORTER = """
import sys
from pathlib import Path
from tests.serving.conftest import make_served
from tests.serving.test_export import publish

served = make_served("str")
print("ready", flush=True)
while True:
    publish(served, Path(sys.argv[1]), "exact", keep_versions=1)
"""


def run(num_kills: int, folder: Path) -> dict[str, int]:
    """Kills that many exports.

    Returns:
        "num_kills"; "num_within", those that left a half-written version; "num_wrong", after which
        the newest version did not load, answered otherwise or was an older one.
    """
    sys.path.insert(0, str(ROOT))
    from tests.serving.conftest import make_served
    from tests.serving.test_export import publish
    from tfrs_pipeline.serving.retriever import load

    served = make_served("str")
    publish(served, folder, "exact")
    expected, _ = served.in_memory.retrieve(served.queries(), 15)
    rng = np.random.default_rng(0)
    newest, figures = 1, {"num_kills": num_kills, "num_within": 0, "num_wrong": 0}
    for kill in range(num_kills):
        kill_exporter(folder, float(rng.uniform(0, EXPORT_SECONDS)))
        partial = list((folder / "films").glob(".partial-*"))
        figures["num_within"] += len(partial)
        for path in partial:
            shutil.rmtree(path, ignore_errors=True)
        try:
            loaded = load(folder / "films")
            ids, _ = loaded.retrieve(served.queries(), 15)
            is_right = int(loaded.folder.name) >= newest and ids.tolist() == expected.tolist()
            newest = int(loaded.folder.name)
        except (OSError, ValueError) as error:
            print(error)
            is_right = False
        figures["num_wrong"] += not is_right
        where = "within an export" if partial else "between exports"
        print(f"kill {kill + 1}: {where}; version {newest} {'answers' if is_right else 'FAILS'}")
    return figures


def kill_exporter(folder: Path, seconds: float) -> None:
    """Starts an exporter, and kills it this long after it has begun to export."""
    exporter = subprocess.Popen(
        [sys.executable, "-c", EXPORTER, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    assert exporter.stdout is not None
    exporter.stdout.readline()
    time.sleep(seconds)
    exporter.kill()
    exporter.wait()
    exporter.stdout.close()


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10, metavar="N", help="How many (10).")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where to write the figures.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = run(options.kills, Path(folder))
    print(
        f"{figures['num_kills']} exports killed, {figures['num_within']} of them half written: "
        f"{figures['num_wrong']} left a model that failed"
    )
    if options.json:
        write_json(options.json, figures)


if __name__ == "__main__":
    main()
