"""A machine without TensorFlow asks, serves, records and refreshes a model as others do."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.service.conftest import Exported, make_served
from tests.service.running_server import GOOD
from tfrs_pipeline import load
from tfrs_pipeline.answers.publish import SAVED_MODEL_FILE
from tfrs_pipeline.answers.recommend import recommend

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
for name in ("tensorflow", "tf_keras", "keras", "tensorflow_recommenders"):
    sys.modules[name] = None  # Importing it fails.
from pathlib import Path
from tfrs_pipeline import cli, load
from tests.service.running_server import GOOD, Running

folder, work = map(Path, sys.argv[1:])
model = load(folder)
ids, _ = model.retrieve([{"history": [10, 17], "features": {"gender": "F"}}], 5)
by_user, _, _ = model.retrieve_user([101, 102], 5)
similar, _ = model.similar([24], 5)
assert model.candidates._view.searcher is not None
new, _ = model.embed_candidates([4], {"genres": [["a", "c"]]})
with Running(folder) as running:
    served = running.predict(**GOOD)["outputs"]["candidate_ids"]
    page = running.post("/page/query", json={"user_id": "101", "k": 5}).json()["index"]["items"]
heavy = {"scann", "matplotlib", "ibis", "duckdb", "implicit", "scipy"}
imported = heavy & {name for name, module in sys.modules.items() if module is not None}
assert not imported, imported
assert "_scann_ops" not in open("/proc/self/maps").read()  # ScaNN's operation.
model.record([{"user_id": 103, "item_id": 3, "type": "view", "time": 1.77e9}])
for command in (
    ["query", folder, "--user", "101", "-k", "5"],
    ["recommend", folder, "--out", work / "best.parquet", "-k", "4"],
    ["vectors", folder, work / "vectors.parquet"],
    ["log", folder, "--out", work / "log.parquet"],
    ["refresh-index", folder, "--items", work / "items.parquet"],
):
    assert cli.main([str(part) for part in command]) == 0, command
after = load(folder)
assert after.folder.name == "2"
refreshed, _ = after.retrieve([{"history": [10, 17]}], 5)
answers = {"ids": ids, "by_user": by_user, "similar": similar, "new": new, "refreshed": refreshed}
answers = {name: array.tolist() for name, array in answers.items()}
answers |= {"served": served, "page": [item["item_id"] for item in page]}
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_all_of_service_works_without_tensorflow(exported: Exported, tmp_path: Path) -> None:
    served, model = make_served("int"), Path(exported("int", "scann"))
    folder = Path(shutil.copytree(model, tmp_path / "films"))
    items = {"item_id": served.candidate_ids.tolist()[5:], "genres": served.genres[5:]}
    pq.write_table(pa.table(items), tmp_path / "items.parquet")
    command = [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no SavedModel is written: TensorFlow is not installed here" in " ".join(
        (done.stdout + done.stderr).split()
    )
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])

    here = load(model)
    query: Any = {"history": [10, 17], "features": {"gender": "F"}}
    by_user = here.retrieve_user([101, 102], 5)[0].tolist()
    assert answers["ids"] == here.retrieve([query], 5)[0].tolist()
    assert answers["by_user"] == by_user
    assert answers["similar"] == here.similar([24], 5)[0].tolist()
    vectors, _ = here.embed_candidates([4], {"genres": [["a", "c"]]})
    np.testing.assert_allclose(answers["new"], vectors, atol=1e-6)
    assert answers["served"] == by_user[:1]
    assert GOOD["inputs"]["user_id"] == [101]
    assert answers["page"] == by_user[0]
    recommend(here, tmp_path / "here.parquet", k=4)
    assert pq.read_table(tmp_path / "best.parquet").equals(pq.read_table(tmp_path / "here.parquet"))
    written = pq.read_table(tmp_path / "vectors.parquet")
    by_id = dict(zip(written["item_id"].to_pylist(), written["embedding"].to_pylist(), strict=True))
    expected = dict(zip(here.candidate_ids(), here.candidate_embeddings(), strict=True))
    assert by_id.keys() == expected.keys()
    for id_, vector in expected.items():
        np.testing.assert_allclose(by_id[id_], vector, atol=1e-6)
    assert pq.read_table(tmp_path / "log.parquet").num_rows == 1

    # The refreshed version has no SavedModel, and is served here too.
    assert not (folder / "2" / SAVED_MODEL_FILE).exists()
    assert answers["refreshed"] == load(folder).retrieve([{"history": [10, 17]}], 5)[0].tolist()
    kept = set(served.candidate_ids.tolist()[5:])
    assert set(load(folder).candidate_ids()) == kept
