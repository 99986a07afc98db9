"""ScaNN's own searcher, without TensorFlow.

An index is saved as the arrays and bytes of `FILES`, beside its vectors. ScaNN's TensorFlow
operation reads the same, so an exported model holds them once.
"""

import importlib.metadata
import importlib.util
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Self, TypeAlias

import numpy as np

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.serving.index import Level

# ScaNN has this many codes per block, and learns them from as many vectors or more.
SMALLEST_HASHED_CORPUS = 16
# With two dimensions per block, a deep search has to rescore several times as many.
_DIMENSIONS_PER_BLOCK, _ANISOTROPIC_THRESHOLD = 1, 0.2
_TRAINING_SAMPLE = 100_000
_CONFIG, _VECTORS = "scann_config.pb", "dataset.npy"
# What ScaNN saves besides its settings and the vectors -> ScaNN's name for it. An index without
# partitions lacks the second and the third.
_ASSETS = {
    "ah_codebook.pb": "AH_CENTERS",
    "serialized_partitioner.pb": "PARTITIONER",
    "datapoint_to_token.npy": "TOKENIZATION_NPY",
    "hashed_dataset.npy": "AH_DATASET_NPY",
}
FILES = (_CONFIG, *_ASSETS)
# An addition waits this long for a moment without a search; then it holds up new searches.
_PATIENCE_SECONDS = 0.02

Saved: TypeAlias = Mapping[str, "np.ndarray | bytes"]
"""A saved index by the names of `FILES`: arrays, and serialized messages."""


def _module(name: str, *place: str) -> ModuleType:
    """Imports one module of ScaNN, because the package itself imports TensorFlow."""
    try:
        path = importlib.metadata.distribution("scann").locate_file(Path("scann", *place))
        spec = importlib.util.spec_from_file_location(name, str(path))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:
        raise ImportError(
            "A ScaNN index needs the package scann: pip install 'scann==1.4.2', or use exact "
            f"search. The import said: {error}"
        ) from error
    return module


def _scann_numpy() -> Any:
    return _module("scann_pybind", "scann_ops", "cc", "python", "scann_pybind.so").ScannNumpy


class Searcher:
    """A dot-product index: partitions, asymmetric hashing, exact rescoring of the best.

    Rows count from 1: first the vectors that it was built of, then those added. Threads may search
    at the same time, also while another adds.
    """

    def __init__(self, scann: Any) -> None:
        self._scann = scann
        # ScaNN releases Python's lock in a search, which a change meanwhile would corrupt.
        self._change = threading.Condition()
        self._num_searches, self._is_held_up = 0, False

    @classmethod
    def build(cls, vectors: np.ndarray, num_leaves: int) -> Self:
        """Builds the index of [n, D] float32 vectors; one leaf means no partitions."""
        if len(vectors) < SMALLEST_HASHED_CORPUS:
            raise ValueError(
                f"ScaNN learns its hashing from {SMALLEST_HASHED_CORPUS} candidates or more: take "
                f"the exact index. Received: {len(vectors)} candidates"
            )
        scann_numpy, sample = _scann_numpy(), min(len(vectors), _TRAINING_SAMPLE)
        builder = _module("scann_builder", "scann_ops", "py", "scann_builder.py").ScannBuilder
        configured = builder(np.ascontiguousarray(vectors), 1, "dot_product")
        if num_leaves > 1:
            configured = configured.tree(
                num_leaves=num_leaves,
                num_leaves_to_search=num_leaves,
                training_sample_size=sample,
                min_partition_size=1,
            )
        hashed = configured.score_ah(
            _DIMENSIONS_PER_BLOCK,
            anisotropic_quantization_threshold=_ANISOTROPIC_THRESHOLD,
            training_sample_size=sample,
        )
        # Each search sets its own width.
        complete = hashed.reorder(1).set_builder_lambda(
            lambda db, config, num_threads, **_: scann_numpy(db, config, num_threads)
        )
        return cls(complete.build())

    @classmethod
    def load(cls, saved: Saved, vectors: np.ndarray) -> Self:
        """Loads a saved index of the same vectors."""
        with tempfile.TemporaryDirectory(prefix="tfrs_pipeline-index-") as name:
            folder = Path(name)
            np.save(folder / _VECTORS, vectors)
            for file, content in saved.items():
                if isinstance(content, bytes):
                    (folder / file).write_bytes(content)
                else:
                    np.save(folder / file, content)
            return cls._from_folder(folder)

    @classmethod
    def _from_folder(cls, folder: Path) -> Self:
        assets = [
            f'assets {{ asset_type: {kind} asset_path: "{folder / file}" }}'
            for file, kind in {**_ASSETS, _VECTORS: "DATASET_NPY"}.items()
            if (folder / file).exists()
        ]
        return cls(_scann_numpy()(str(folder), "\n".join(assets)))

    def save(self) -> Saved:
        """Returns what `load` takes besides the vectors."""
        with tempfile.TemporaryDirectory(prefix="tfrs_pipeline-index-") as name:
            self._scann.serialize(name, True)
            files = [path for path in map(Path(name).joinpath, FILES) if path.exists()]
            return {
                path.name: np.load(path) if path.suffix == ".npy" else path.read_bytes()
                for path in files
            }

    @property
    def num_rows(self) -> int:
        """Number of vectors."""
        return int(self._scann.size())

    def search(self, queries: np.ndarray, level: Level) -> tuple[np.ndarray, np.ndarray, int]:
        """Finds roughly the `depth` best of [B, D] float32 queries, as widely as a level says.

        Returns rows [B, depth] int32, best first, 0 in empty slots; scores [B, depth] float32, -inf
        in them; the number of rows that were searched.
        """
        change = self._change
        with change:
            change.wait_for(lambda: not self._is_held_up)
            self._num_searches += 1
        try:
            num_rows = self._scann.size()
            places, scores = self._scann.search_batched(
                queries, level.depth, level.num_reordered, level.num_leaves_to_search, False, 0
            )
        finally:
            with change:
                self._num_searches -= 1
                if not self._num_searches:
                    change.notify_all()
        rows = places.view(np.int32) + 1
        is_empty = np.isnan(scores)  # The searched leaves hold fewer than `depth`.
        if is_empty.any():
            rows[is_empty], scores[is_empty] = 0, -np.inf
        return rows, scores, num_rows

    def add(self, vectors: np.ndarray) -> None:
        """Adds [n, D] float32 vectors. Searches wait meanwhile: some 20 microseconds a vector."""
        with self._change:
            if not self._change.wait_for(self._is_idle, _PATIENCE_SECONDS):
                self._is_held_up = True
                self._change.wait_for(self._is_idle)
                self._is_held_up = False
                self._change.notify_all()
            self._scann.upsert([None] * len(vectors), vectors, 1)

    def _is_idle(self) -> bool:
        return not self._num_searches


def build_in_subprocess(vectors: np.ndarray, num_leaves: int) -> Searcher:
    """Builds an index in another process, because ScaNN holds Python's lock while it builds."""
    with tempfile.TemporaryDirectory(prefix="tfrs_pipeline-index-") as name:
        np.save(Path(name, _VECTORS), vectors)
        in_fresh_process(f"{__name__}:build_in_folder", name, str(num_leaves)).check_returncode()
        return Searcher._from_folder(Path(name))


def build_in_folder(folder: str, num_leaves: str) -> None:
    """Builds an index of the vectors in a folder, and saves it beside them."""
    vectors = np.load(Path(folder, _VECTORS))
    Searcher.build(vectors, int(num_leaves))._scann.serialize(folder, True)


def in_fresh_process(
    function: str, *arguments: str, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """Calls a function, named as "package.module:name", in another process."""
    # With -P, Python imports no file such as queue.py from the working directory. The package comes
    # last on the path, so that it hides no module of the standard library.
    program = "import pkgutil, sys; sys.path.append(sys.argv[1]); "
    program += "sys.exit(pkgutil.resolve_name(sys.argv[2])(*sys.argv[3:]))"
    command = [sys.executable, "-P", "-c", program, str(Path(__file__).parents[2])]
    return subprocess.run([*command, function, *arguments], input=stdin, capture_output=True)


_NEVER = np.iinfo(np.int64).max
# Arrays that grow reserve this factor, and this many rows more.
_GROWTH, _LEAST_ROOM = 1.25, 1024


@dataclass(frozen=True)
class View:
    """What a search sees: neither rows beyond `num_rows`, nor removals after `num_changes`."""

    corpus: Ids
    # By row from 1; place 0 is the empty slot. The ends of the arrays are reserved for new rows.
    ids: np.ndarray
    vectors: np.ndarray  # Without place 0: row r is at r - 1.
    codes: np.ndarray | None
    removed_by: np.ndarray | None  # Number of the change that did; None if none ever did.
    searcher: Searcher | None
    levels: tuple[Level, ...]
    num_rows: int
    num_removed: int = 0
    num_changes: int = 0
    # The rows after the corpus, by id. Later views share it, so it may hold rows beyond `num_rows`.
    new_rows: dict[Any, list[int]] = field(default_factory=dict)

    @property
    def num_candidates(self) -> int:
        """Number of rows that are not removed."""
        return self.num_rows - self.num_removed

    def rows_of(self, ids: Collection[Any]) -> np.ndarray:
        """Returns all rows that ids have or had: [any] int32, ascending."""
        rows = self.corpus.known_rows(ids)
        if not self.new_rows:
            return rows
        more = [row for id_ in set(ids) for row in self._new_rows_of(id_)]
        return np.union1d(rows, np.array(more, np.int32))

    def row_of(self, id_: Any) -> int:
        """Returns the row that an id has now, 0 if it is not a candidate."""
        row = max(self._new_rows_of(id_), default=0) or int(self.corpus.rows([id_])[0])
        return row if row and not self.is_removed(np.array([row]))[0] else 0

    def _new_rows_of(self, id_: Any) -> list[int]:
        return [row for row in self.new_rows.get(id_, ()) if row <= self.num_rows]

    def live_rows(self) -> np.ndarray:
        """Returns the rows that are not removed: [any] int, ascending."""
        rows = np.arange(1, self.num_rows + 1)
        return rows[~self.is_removed(rows)]

    def is_removed(self, rows: np.ndarray) -> np.ndarray:
        """Returns which rows, [n], are removed: [n] bool."""
        if self.removed_by is None:
            return np.zeros(len(rows), bool)
        return self.removed_by[rows] <= self.num_changes


def with_room(view: View, num: int, width: int, *, removes: bool) -> View:
    """Makes room for `num` new rows with `width` codes each; copies arrays that have to grow."""
    capacity = len(view.ids) - 1
    if view.num_rows + num > capacity or not view.vectors.flags.writeable:
        capacity = round(_GROWTH * (view.num_rows + num)) + _LEAST_ROOM
    parts: dict[str, Any] = {}
    if removes and view.removed_by is None:
        parts["removed_by"] = np.full(capacity + 1, _NEVER)
    for name in ("ids", "vectors", "codes", "removed_by"):
        array: np.ndarray | None = getattr(view, name)
        if array is None:
            continue
        shape = [capacity + (name != "vectors"), *array.shape[1:]]
        if name == "codes":
            shape[1] = max(shape[1], width)
        if tuple(shape) != array.shape:
            fill = _NEVER if name == "removed_by" else "" if array.dtype == object else 0
            parts[name] = grown = np.full(shape, fill, array.dtype)
            grown[tuple(map(slice, array.shape))] = array
    return replace(view, **parts)
