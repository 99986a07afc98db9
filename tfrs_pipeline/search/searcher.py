"""ScaNN's own searcher, without TensorFlow."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np

from tfrs_pipeline.search.settings import Level

# ScaNN has this many codes per block, and learns them from as many vectors or more.
SMALLEST_HASHED_CORPUS = 16
# With two dimensions per block, a deep search has to rescore several times as many.
_DIMENSIONS_PER_BLOCK, _ANISOTROPIC_THRESHOLD = 1, 0.2
_TRAINING_SAMPLE = 100_000
_FILE_LIST = "scann_assets.pbtxt"  # ScaNN's list of the files of a saved index.
# An addition waits this long for a moment without a search; then it holds up new searches.
_PATIENCE_SECONDS = 0.02
_ADDED_AT_ONCE = 16  # A small block, so that searches go on between two of them.


def _module(name: str, *path: str) -> ModuleType:
    """Imports one module of ScaNN, because the package itself imports TensorFlow."""
    try:
        file = importlib.metadata.distribution("scann").locate_file(Path("scann", *path))
        spec = importlib.util.spec_from_file_location(name, str(file))
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
    def load(cls, folder: Path) -> Self:
        """Loads a saved index."""
        return cls(_scann_numpy()(str(folder), (folder / _FILE_LIST).read_text()))

    def save(self, folder: Path) -> None:
        """Saves the index with its vectors, as `scann_ops_pybind.load_searcher` reads it too."""
        folder.mkdir(parents=True, exist_ok=True)
        # Names without the folder: the index is moved once it is complete.
        self._scann.serialize(str(folder), True)

    @property
    def num_rows(self) -> int:
        """Number of vectors in the index."""
        return int(self._scann.size())

    def search(self, queries: np.ndarray, level: Level) -> tuple[np.ndarray, np.ndarray, int]:
        """Finds roughly the `depth` best of [B, D] float32 queries, as widely as a level says.

        Returns rows [B, depth] int32, best first, 0 in empty slots; scores [B, depth] float32, -inf
        in them; the number of rows that were searched.
        """
        change = self._change
        with change:
            # A waiting addition goes first. A steady stream of searches would starve it.
            change.wait_for(lambda: not self._is_held_up)
            self._num_searches += 1
        try:
            num_rows = self.num_rows
            indices, scores = self._scann.search_batched(
                queries, level.depth, level.num_reordered, level.num_leaves_to_search, False, 0
            )
        finally:
            with change:
                self._num_searches -= 1
                if not self._num_searches:
                    change.notify_all()
        # ScaNN's rows are uint32 and count from 0. A corpus is far below the 2**31 of int32.
        rows = indices.view(np.int32) + 1
        is_empty = np.isnan(scores)  # The searched leaves hold fewer than `depth`.
        if is_empty.any():
            rows[is_empty], scores[is_empty] = 0, -np.inf
        return rows, scores, num_rows

    def add(self, vectors: np.ndarray) -> None:
        """Adds [n, D] float32 vectors, a few at a time: searches wait some 20 microseconds each."""
        for start in range(0, len(vectors), _ADDED_AT_ONCE):
            block = vectors[start : start + _ADDED_AT_ONCE]
            with self._change:
                if not self._change.wait_for(self._is_idle, _PATIENCE_SECONDS):
                    self._is_held_up = True
                    self._change.wait_for(self._is_idle)
                    self._is_held_up = False
                    self._change.notify_all()
                self._scann.upsert([None] * len(block), block, 1)

    def _is_idle(self) -> bool:
        return not self._num_searches


def build_in_subprocess(vectors: np.ndarray, num_leaves: int) -> Searcher:
    """Builds an index in another process, because ScaNN holds Python's lock while it builds."""
    with tempfile.TemporaryDirectory(prefix="tfrs_pipeline-index-") as name:
        np.save(Path(name, "vectors.npy"), vectors)
        done = in_fresh_process(f"{__name__}:build_in_folder", name, str(num_leaves))
        if done.returncode:
            why = done.stderr.decode(errors="replace").strip()[-2000:]
            raise RuntimeError(
                f"The process that built the index ended with {done.returncode}: {why}"
            )
        return Searcher.load(Path(name))


def build_in_folder(folder: str, num_leaves: str) -> None:
    """Builds an index of the vectors in a folder, and saves it beside them."""
    Searcher.build(np.load(Path(folder, "vectors.npy")), int(num_leaves)).save(Path(folder))


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
