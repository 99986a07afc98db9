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
from tfrs_pipeline.durable import write_record
from tfrs_pipeline.negatives.kinds import FunnelLosers
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


def test_files_and_folders_of_parts_are_mapped_as_they_are(built: Path, tmp_path: Path) -> None:
    # As Spark writes them.
    for path in built.glob("*.parquet"):
        table = pq.read_table(path)
        (tmp_path / path.name).mkdir()
        (tmp_path / path.name / "_SUCCESS").touch()
        for i, rows in enumerate(np.array_split(np.arange(len(table)), 3)):
            part = tmp_path / path.name / f"part-{i:05d}.parquet"
            pq.write_table(table.take(rows), part, row_group_size=70)
    write_record(tmp_path / "report.json", {})
    found, of_parts = arrays(read_samples(built)), arrays(read_samples(tmp_path))
    table = pq.read_table(built / "samples.parquet")
    np.testing.assert_array_equal(found["query_rows"], table["query_row"])
    np.testing.assert_array_equal(found["weights"], table["weight"].to_numpy().astype(np.float32))
    assert found.keys() == of_parts.keys() >= {"exposed/values", "sequences/offsets"}
    for name, array in of_parts.items():
        np.testing.assert_array_equal(array, found[name])
        assert array.dtype == found[name].dtype
        # Each array is a view of the mapped file, and is read-only.
        for base in (array, found[name]):
            window: Any = base
            while isinstance(window, np.ndarray):
                assert not window.flags.writeable
                window = window.base
            assert isinstance(window, mmap.mmap)


def test_columns_are_made_again_once_samples_change(built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "samples"))
    weights = read_samples(folder).weights.copy()
    column = folder / "columns" / "weight.npy"
    first = column.stat().st_ino, column.read_bytes()
    read_samples(folder)
    assert (column.stat().st_ino, column.read_bytes()) == first
    damage(column, "flipped")
    np.testing.assert_array_equal(read_samples(folder).weights, weights)
    table = pq.read_table(folder / "samples.parquet")
    place = table.column_names.index("weight")
    other = table.set_column(place, "weight", pa.array(table["weight"].to_numpy()[::-1]))
    pq.write_table(other, folder / "samples.parquet")
    write_record(folder / "report.json", {}, folder.glob("*.parquet"))
    np.testing.assert_array_equal(read_samples(folder).weights, weights[::-1])
