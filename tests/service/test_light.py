"""What reads an export needs neither an extra nor what the image that serves leaves out."""

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.service.conftest import Exported
from tfrs_pipeline.libraries import EXTRAS

ROOT = Path(__file__).parents[2]
# Commands, in a process in which no library of an extra can be imported.
WITHOUT_EXTRAS = """
import sys
from tfrs_pipeline.cli import main
sys.modules |= dict.fromkeys(sys.argv[1].split(","))
model, out = sys.argv[2:]
assert not main(["query", model, "--user", "1", "-k", "2"])
assert not main(["recommend", model, "--out", f"{out}/all.parquet", "-k", "2"])
assert not main(["vectors", model, f"{out}/vectors.parquet"])
assert main(["recommend", model, "--out", f"{out}/few.parquet", "--users", "users.csv"]) == 1
"""


@pytest.mark.slow
def test_what_reads_an_export_needs_no_extra(exported: Exported, tmp_path: Path) -> None:
    missing = ",".join({name: None for names in EXTRAS.values() for name in names})
    command = [
        sys.executable,
        "-c",
        WITHOUT_EXTRAS,
        missing,
        str(exported("int", "scann")),
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [
        line.partition(" which")[0] for line in done.stderr.splitlines() if "error" in line
    ] == [
        "error: Reading a file of users needs duckdb,",
    ]


# Prints the files that a server has loaded after it answered through ScaNN and built an index.
LOADED_FILES = """
import json, sys
sys.modules["pyarrow._s3fs"] = None  # pyarrow loads it only if it is there.
import numpy as np, pyarrow.csv
import tfrs_pipeline as tp
import tfrs_pipeline.service.server
from tfrs_pipeline.search.searcher import Searcher
model = tp.load(sys.argv[1])
model.retrieve_user([1], k=2)
Searcher.build(np.random.default_rng(0).normal(size=(99, 8)).astype("float32"), 1)
files = {line.split()[-1] for line in open("/proc/self/maps")}
files |= {getattr(module, "__file__", None) for module in sys.modules.values()}
print(json.dumps([*filter(None, files)]))
"""


@pytest.mark.slow
def test_the_image_leaves_out_nothing_that_a_server_loads(exported: Exported) -> None:
    command = [sys.executable, "-c", LOADED_FILES, str(exported("int", "scann"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = set(map(Path, json.loads(done.stdout)))
    site = Path(sysconfig.get_path("purelib"))
    assert any(path.is_relative_to(site / "pyarrow") for path in loaded)
    text = (ROOT / "Containerfile").read_text().replace("\\\n", " ")
    (patterns,) = re.findall(r"site-packages\s+&& rm -rf (.*)", text)
    for pattern in patterns.split():
        removed = list(site.glob(pattern))
        assert removed, f"{pattern} is not there: what takes its place?"
        for path in loaded:
            assert not any(path.is_relative_to(gone) for gone in removed), path
