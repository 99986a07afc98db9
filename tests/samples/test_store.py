"""Samples mapped from files: the same arrays, made again when what they are of has changed."""

import dataclasses
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.damage import damage
from tests.small_batches import SAMPLES, UNORDERED
from tfrs_pipeline.durable import write_record
from tfrs_pipeline.samples.store import Samples, pool_size_column, read_samples


def in_order(samples: Samples) -> Samples:
    """Sorts samples by user, as `build_samples` writes them; the sequences are of the samples."""
    order = np.argsort(samples.query_rows, kind="stable")
    pools = {stage: pool.take(order) for stage, pool in samples.hard_pools.items()}
    earlier = samples.num_earlier
    return dataclasses.replace(
        samples,
        query_rows=samples.query_rows[order],
        candidate_rows=samples.candidate_rows[order],
        weights=samples.weights[order],
        num_earlier=None if earlier is None else earlier[order],
        hard_pools=pools,
    )


ORDERED, WITHOUT_ORDER = in_order(SAMPLES), in_order(UNORDERED)


def write(columns: dict[str, Any], path: Path, num_parts: int) -> None:
    """Writes a file, or a folder of parts as Spark does; row groups are smaller than either."""
    table = pa.table(columns)
    if num_parts == 1:
        pq.write_table(table, path, row_group_size=7)
        return
    path.mkdir()
    (path / "_SUCCESS").touch()
    for i, rows in enumerate(np.array_split(np.arange(len(table)), num_parts)):
        pq.write_table(table.take(rows), path / f"part-{i:05d}.parquet", row_group_size=7)


def write_samples(samples: Samples, folder: Path, num_parts: int = 1) -> None:
    """Writes samples as `build_samples` does."""
    tables: dict[str, dict[str, Any]] = {
        "samples": {
            "query_row": samples.query_rows,
            "candidate_row": samples.candidate_rows,
            "weight": samples.weights.astype(np.float64),
        },
        "queries": {"query_row": np.arange(1, len(samples.sequences))},
        "corpus": {"candidate_row": np.arange(1, len(samples.counts)), "count": samples.counts[1:]},
    }
    if samples.num_earlier is not None:
        tables["samples"]["num_earlier"] = samples.num_earlier
    for stage, pool in samples.hard_pools.items():
        tables["samples"][pool_size_column(stage)] = np.diff(pool.offsets).astype(np.int32)
        tables[f"hard_{stage}"] = {"candidate_row": pool.values}
    for name, lists in (("known_positives", samples.known_positives), ("exposed", samples.exposed)):
        rows = np.repeat(np.arange(len(lists)), np.diff(lists.offsets))
        tables[name] = {"query_row": rows, "candidate_row": lists.values}
    for name, columns in tables.items():
        write(columns, folder / f"{name}.parquet", num_parts)
    write_record(folder / "report.json", {}, folder.rglob("*.parquet") if num_parts == 1 else ())


def arrays(samples: Samples) -> dict[str, np.ndarray]:
    found = {
        "query_rows": samples.query_rows,
        "candidate_rows": samples.candidate_rows,
        "weights": samples.weights,
        "counts": samples.counts,
    }
    if samples.num_earlier is not None:
        found["num_earlier"] = samples.num_earlier
    lists = {
        "sequences": samples.sequences,
        "known_positives": samples.known_positives,
        "exposed": samples.exposed,
        **samples.hard_pools,
    }
    for name, of_name in lists.items():
        found |= {f"{name}/offsets": of_name.offsets, f"{name}/values": of_name.values}
    return found


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("samples", [ORDERED, WITHOUT_ORDER])
def test_mapped_is_what_was_written(samples: Samples, num_parts: int, tmp_path: Path) -> None:
    write_samples(samples, tmp_path, num_parts)
    expected, found = arrays(samples), arrays(read_samples(tmp_path))
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])
        assert array.dtype == expected[name].dtype
        # A window on the file, and nobody may write into it.
        base: Any = array
        while isinstance(base, np.ndarray):
            assert not base.flags.writeable
            base = base.base
        assert isinstance(base, mmap.mmap)


def test_columns_are_made_again_once_samples_or_a_column_change(tmp_path: Path) -> None:
    write_samples(ORDERED, tmp_path)
    read_samples(tmp_path)
    column = tmp_path / "columns" / "weight.npy"
    first = column.stat().st_ino, column.read_bytes()
    read_samples(tmp_path)
    assert (column.stat().st_ino, column.read_bytes()) == first
    damage(column, "flipped")
    np.testing.assert_array_equal(read_samples(tmp_path).weights, ORDERED.weights)
    other = dataclasses.replace(ORDERED, weights=ORDERED.weights[::-1])
    write_samples(other, tmp_path)
    np.testing.assert_array_equal(read_samples(tmp_path).weights, other.weights)
