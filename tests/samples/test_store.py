"""Samples mapped from files: the same arrays, made again when their source has changed."""

import dataclasses
import mmap
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.damage import damage
from tests.small_log import event_table
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.durable import read_whole
from tfrs_pipeline.negatives.samplers import FunnelLosers
from tfrs_pipeline.samples.build import build_samples
from tfrs_pipeline.samples.store import RowLists, Samples, read_samples


@pytest.fixture(scope="module", params=["in order", "without"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples with weights, exposed items and pools; `test_build.py` tests what they hold."""
    events = event_table("int").drop_columns(["rating"])
    weights = np.random.default_rng(0).random(len(events))
    log = Log.from_table(events.append_column("weight", pa.array(weights)))
    folder = tmp_path_factory.mktemp("samples")
    hard = FunnelLosers(stages=("exposed",), allow_exposed=True)
    log = dataclasses.replace(log, is_ordered=request.param == "in order")
    build_samples(log, folder, seed=0, hard=hard if log.is_ordered else None)
    return folder


def arrays(samples: Samples) -> dict[str, np.ndarray]:
    found = {}
    for name, value in {**vars(samples), **samples.hard_pools}.items():
        if isinstance(value, np.ndarray):
            found[name] = value
        elif isinstance(value, RowLists):
            found |= {f"{name}/offsets": value.offsets, f"{name}/values": value.values}
    return found


def test_columns_are_mapped_as_they_are(built: Path) -> None:
    found = arrays(read_samples(built))
    table = pq.read_table(built / "samples.parquet")
    np.testing.assert_array_equal(found["query_rows"], table["query_row"])
    np.testing.assert_array_equal(found["weights"], table["weight"].to_numpy().astype(np.float32))
    known = pq.read_table(built / "known_positives.parquet")
    lists = np.split(found["known_positives/values"], found["known_positives/offsets"][1:-1])
    rows = np.repeat(np.arange(len(lists)), [len(values) for values in lists])
    np.testing.assert_array_equal(rows, known["query_row"])
    np.testing.assert_array_equal(np.concatenate(lists), known["candidate_row"])
    assert found.keys() >= {"exposed/values", "sequences/offsets"}
    for array in found.values():
        # Each array is a view of the mapped file, and is read-only.
        window: Any = array
        while isinstance(window, np.ndarray):
            assert not window.flags.writeable
            window = window.base
        assert isinstance(window, mmap.mmap)


def test_the_record_of_the_samples_covers_their_columns(built: Path, tmp_path: Path) -> None:
    """So that whoever checks the record need not read the columns again."""
    folder = Path(shutil.copytree(built, tmp_path / "samples"))
    assert read_whole(folder / "report.json") is not None
    for column in sorted((folder / "columns").iterdir()):
        before = column.read_bytes()
        damage(column, "flipped")
        assert read_whole(folder / "report.json") is None
        column.write_bytes(before)
    assert read_whole(folder / "report.json") is not None
