"""Kept samples are reused for the same log, built again if damaged, refused for another log."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.damage import DAMAGES, damage
from tests.small_batches import assert_same_samples
from tests.small_log import event_table, write
from tfrs_pipeline import FunnelLosers, Log, Samples, TrainingSet, TwoTower
from tfrs_pipeline.model.corpus import MADE_OF_FILE
from tfrs_pipeline.samples.store import RowLists


def copied(samples: Samples) -> Samples:
    """Copies samples into memory: damage to a mapped file must not change what is expected."""

    def copy(value: Any) -> Any:
        if isinstance(value, RowLists):
            return RowLists(copy(value.offsets), copy(value.values))
        return np.array(value) if isinstance(value, np.ndarray) else value

    changes = {x.name: copy(getattr(samples, x.name)) for x in dataclasses.fields(Samples)}
    return dataclasses.replace(samples, **changes)


def test_a_damaged_file_has_the_samples_built_again_and_none_else(tmp_path: Path) -> None:
    log = Log.from_table(event_table("int").drop_columns(["rating"]))
    expected = TrainingSet.build(log, tmp_path, seed=0)
    expected = dataclasses.replace(expected, samples=copied(expected.samples))
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) == 18
    for path, how in zip(files, itertools.cycle(DAMAGES), strict=False):
        damage(path, how)
        built = TrainingSet.build(log, tmp_path, seed=0)
        assert_same_samples(built.samples, expected.samples)
        assert built.report == expected.report
        ids, of_first = (x.corpus.candidate_ids.values.tolist() for x in (built, expected))
        assert ids == of_first
        assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(files)
    times = [path.stat().st_mtime_ns for path in files]
    TrainingSet.build(log, tmp_path, seed=0)
    assert [path.stat().st_mtime_ns for path in files] == times
    # As many events and items, but one event has another item.
    changed = event_table("int").drop_columns(["rating"]).to_pylist()
    changed[5]["item_id"] = changed[4]["item_id"]
    requested = dataclasses.replace(log, request_features={"hour": "numeric"})
    others: Any = ((Log.from_table(pa.Table.from_pylist(changed)), {"seed": 0}), (log, {"seed": 1}))
    others += ((requested, {"seed": 0}), (log, {"seed": 0, "hard": FunnelLosers()}))
    for other, options in others:
        with pytest.raises(ValueError, match=r"made of something else .* Give another folder"):
            TrainingSet.build(other, str(tmp_path), **options)
    assert [path.stat().st_mtime_ns for path in files] == times


def test_files_that_no_build_wrote_stay_as_they_are(tmp_path: Path) -> None:
    log = Log.from_table(event_table("int").drop_columns(["rating"]))
    own, samples = tmp_path / "samples" / "july.parquet", tmp_path / "samples"
    write(event_table("int"), own)
    before = own.read_bytes()
    not_ours = r"july\.parquet may not be this package's: .* another"
    with pytest.raises(ValueError, match=not_ours):
        TrainingSet.build(log, samples, seed=0)
    with pytest.raises(ValueError, match=not_ours):
        TwoTower().fit(log, folder=tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [own]
    own.unlink()
    TrainingSet.build(log, samples, seed=0)
    # Files that were put there later stay too.
    own.write_bytes(before)
    (samples / "report.json").unlink()
    TrainingSet.build(log, samples, seed=0)
    assert own.read_bytes() == before
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "epoch-9.pt").touch()
    with pytest.raises(ValueError, match=r"epoch-9\.pt may not be this package's"):
        TwoTower().fit(log, folder=tmp_path)
    assert (tmp_path / "checkpoints" / "epoch-9.pt").exists()


def test_a_build_that_was_killed_while_it_wrote_its_first_file_goes_on(tmp_path: Path) -> None:
    log = Log.from_table(event_table("int").drop_columns(["rating"]))
    samples = tmp_path / "samples"
    samples.mkdir()
    (samples / f"{MADE_OF_FILE}.partial").write_text('{"lo', encoding="utf-8")
    assert len(TrainingSet.build(log, samples, seed=0).samples) > 0
