"""The versions of a model on disk: a new one appears whole or not at all.

A version is written to a temporary folder and renamed once it is complete, so that readers never
see a broken one. One process publishes at a time, and removes what a killed one left behind.
"""

import contextlib
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tfrs_pipeline.durable import Damaged, flush, locked, naming, read_record
from tfrs_pipeline.messages import beside

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
ITEMS_FILE = Path("assets.extra") / "items.parquet"
QUERIES_FILE = Path("assets.extra") / "queries.parquet"
# Column of the items file with the values of the filter, as in the item table.
FILTER_COLUMN = "filter"
# A ScaNN index as ScaNN saves it, and the same model with ScaNN's TensorFlow operation.
INDEX_FOLDER, SCANN_FOLDER = Path("index"), Path("scann") / "1"
# What a service without TensorFlow reads: towers, vectors and users, which are mapped.
SERVICE_FOLDER, VECTORS, FILTER_CODES = Path("service"), "vectors", "filter_codes"
SAVED_MODEL_FILE = "saved_model.pb"
# The signatures of the SavedModel, as TensorFlow Serving's metadata have them.
SIGNATURES_FILE = SERVICE_FOLDER / "signatures.json"
# Files and folders of the SavedModels, which nothing else here reads.
SAVED_MODEL_PARTS = SAVED_MODEL_FILE, "fingerprint.pb", "variables", "assets", "scann"
# The layout of a version. A version of another format is refused, with this number in the error.
FORMAT = 4
_PARTIAL, _DISCARDED, _LOCK = ".partial-", ".discarded-", ".lock"


class NotPublished(RuntimeError):
    """A trained model was not put into service."""


def versions_of(folder: Path) -> list[int]:
    """Lists the complete versions below a model's folder, ascending."""
    if not folder.is_dir():
        return []
    names = [child.name for child in folder.iterdir() if (child / MANIFEST_FILE).is_file()]
    # 001 is not a version: its number, 1, would not lead back to it.
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name))


def no_model_at(path: Path) -> FileNotFoundError:
    """Makes the error for a path without a complete version; it suggests a model nearby."""
    within = (
        sorted(str(child) for child in path.iterdir() if versions_of(child))
        if path.is_dir()
        else []
    )
    hint = f" Did you mean {' or '.join(within)}?" if within else beside(path, versions_of)
    return FileNotFoundError(
        f"No exported model at '{path}': it must hold {MANIFEST_FILE}, or versions that do."
        f"{hint or ' `tfrs-pipeline run` writes one.'}"
    )


def version_at(path: str | Path) -> Path:
    """Returns the folder of the version that `load` loads, or raises a `FileNotFoundError`."""
    folder = Path(path).resolve()
    if (folder / MANIFEST_FILE).is_file():
        return folder
    versions = versions_of(folder)
    if not versions:
        raise no_model_at(Path(path))
    return folder / str(versions[-1])


def keep_parts(before: Path, files: Path) -> None:
    """Fills a new version's folder with what does not depend on its items, of the one before."""
    for source in (before / SERVICE_FOLDER).rglob("*"):
        name = source.relative_to(before / SERVICE_FOLDER)
        if source.is_file() and name.stem not in (VECTORS, FILTER_CODES):
            (files / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, files / name)  # Versions share the file: none ever changes one.
            except OSError:  # A disk without links.
                shutil.copyfile(source, files / name)


def read_table(path: Path) -> Any:
    """Reads a Parquet file of a version; PyArrow's own function imports what folders need."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read()


@contextlib.contextmanager
def publishing(parent: Path) -> Iterator[None]:
    """Locks a model's folder, so that nobody else publishes a version within the block."""
    with naming(parent):
        parent.mkdir(parents=True, exist_ok=True)
    with locked(parent / _LOCK, wait=True):
        yield


@contextlib.contextmanager
def new_version(parent: Path, *, keep: int | None = None) -> Iterator[tuple[Path, Path]]:
    """Yields a folder to write to, and the version's, which it becomes if the block succeeds."""
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be 1 or more, or None. Received: {keep}")
    with naming(parent), publishing(parent):
        for left in [*parent.glob(f"{_PARTIAL}*"), *parent.glob(f"{_DISCARDED}*")]:
            shutil.rmtree(left, ignore_errors=True)
        partial = parent / f"{_PARTIAL}{uuid.uuid4().hex}"
        partial.mkdir()
        # An incomplete version keeps its number too, because its folder is never written over.
        taken = [int(child.name) for child in parent.iterdir() if child.name.isdecimal()]
        folder = parent / str(max(taken, default=0) + 1)
        try:
            yield partial, folder
            if not (partial / MANIFEST_FILE).is_file():
                raise ValueError(f"A version needs a {MANIFEST_FILE}. Received: none in {parent}")
            # Flushed before the rename and after it: a power cut leaves a whole version or none.
            flush([*partial.rglob("*"), partial])
            os.rename(partial, folder)
            flush([parent])
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for number in _least_needed_first(parent)[:-keep] if keep else ():
            # Renamed first, so that nobody sees a half-deleted version.
            hidden = parent / f"{_DISCARDED}{uuid.uuid4().hex}"
            os.rename(parent / str(number), hidden)
            logger.info("deleted version %s of %s", number, parent)
            shutil.rmtree(hidden, ignore_errors=True)


def _least_needed_first(parent: Path) -> list[int]:
    """Lists the complete versions in the order in which to delete them."""
    numbers, trainings = versions_of(parent), dict[int, int]()
    for number in numbers:
        trainings[number] = number  # Also if its manifest is damaged.
        with contextlib.suppress(Damaged, OSError):
            manifest = read_record(parent / str(number) / MANIFEST_FILE, check_files=False)
            trainings[number] = manifest.get("refreshed", {}).get("trained_as", number)
    # Servers may still load the newest two. Other refreshes of a training have the same towers.
    # Numbers ascend, so the last version of each training overwrites the earlier ones.
    newest = {training: number for number, training in trainings.items()}.values()
    return sorted(numbers, key=lambda number: (number in numbers[-2:], number in newest, number))
