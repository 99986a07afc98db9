"""The versions of a model on disk: the newest is served, and changed without a dropped request."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow as tf
from google.protobuf import json_format
from tensorflow.core.protobuf import saved_model_pb2

from tfrs_pipeline.serving.batching import Arrays
from tfrs_pipeline.serving.encoder import signature_inputs
from tfrs_pipeline.serving.publish import MANIFEST_FILE, versions_of
from tfrs_pipeline.serving.rest import InputSpec, RequestError
from tfrs_pipeline.serving.retriever import LoadedRetriever, load
from tfrs_pipeline.serving.saved_model import missing_input

logger = logging.getLogger(__name__)

# By the first part of a signature's name.
OUTPUTS = {
    "serving": {"candidate_ids", "scores", "is_known_user"},
    "retrieve": {"candidate_ids", "scores", "is_known_user"},
    "embed": {"embeddings", "is_known_user"},
}
OUTPUTS_OF_CANDIDATES = {"embeddings", "is_known_item"}
# A version that could not be loaded is tried again after 10 s, 20 s, 40 s, ..., 10 minutes:
# a folder that is still being copied is whole a little later.
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 10.0, 600.0
MAX_REPORTED = 20

State = Literal["LOADING", "AVAILABLE", "UNLOADING", "END"]
# A version's number, and what tells it from another that took its number later.
Identity = tuple[int, int, int]


class SavedModelCalls:
    """A loaded SavedModel, called by signature; see `SignatureModel`."""

    def __init__(self, retriever: LoadedRetriever) -> None:
        self.retriever = retriever
        self._functions = dict(retriever.saved_model.signatures)
        self._specs = {name: signature_inputs(fn) for name, fn in self._functions.items()}
        self.signatures = {
            name: {input_name: _input_spec(spec) for input_name, spec in specs.items()}
            for name, specs in self._specs.items()
        }

    def call(self, signature: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Answers inputs of as many queries each."""
        specs = self.signatures[signature]
        tensors = {
            name: tf.constant(array, specs[name].dtype, shape=array.shape)
            for name, array in inputs.items()
        }
        answer = self._functions[signature](**tensors)
        return {name: tensor.numpy() for name, tensor in answer.items()}

    def warm(self) -> None:
        """Asks each signature once: the first call is slow, and shows a broken model.

        Raises:
            ValueError: If an answer has not the form it should have.
        """
        for name, specs in self._specs.items():
            inputs = {key: missing_input(spec, 1).numpy() for key, spec in specs.items()}
            answer = self.call(name, inputs)
            expected = OUTPUTS.get(name.partition("_")[0], set())
            if name == "embed_candidate":
                expected = OUTPUTS_OF_CANDIDATES
            shapes = {key: array.shape for key, array in answer.items()}
            if set(answer) != expected or any(shape[:1] != (1,) for shape in shapes.values()):
                raise ValueError(
                    f"Signature {name} must answer one query with "
                    f"{', '.join(sorted(expected)) or 'what a known one does'}. Received: {shapes}"
                )

    def release(self) -> None:
        """Frees what would outlive the model: TensorFlow keeps tables and ScaNN's index by name."""
        module = self.retriever.saved_model
        handles = [table.resource_handle for table in _tables(module)]
        state = getattr(getattr(module, "_index", None), "_state", None)
        if state is not None:
            handles.append(state.recreate_handle())
        for handle in handles:
            tf.raw_ops.DestroyResourceOp(resource=handle)


def _tables(root: Any) -> Iterator[tf.saved_model.experimental.TrackableResource]:
    """Yields the hash tables in a loaded SavedModel: those of ids, of vocabularies, of a filter."""
    seen, left = {id(root)}, [root]
    while left:
        for child in left.pop()._trackable_children().values():
            if id(child) in seen:
                continue
            seen.add(id(child))
            left.append(child)
            if isinstance(child, tf.saved_model.experimental.TrackableResource):
                yield child


class ServedVersion:
    """A loaded version of a model.

    Args:
        folder: Of the version; its name is the number.
        with_exact: Whether to load the brute-force fallback of a ScaNN index too.

    Attributes:
        index: What answers requests.
        exact: Exact search over the same: the fallback, or `index` itself where that is exact; None
            where it was not loaded.
        signature_def: The signatures as TensorFlow Serving's metadata shows them.
    """

    def __init__(self, folder: Path, *, with_exact: bool) -> None:
        if not folder.name.isdigit():
            raise ValueError(
                "A version's folder is named by its number, such as saved_models/NAME/3. "
                f"Received: {folder}"
            )
        self.number = int(folder.name)
        retriever = load(folder)
        self.manifest = retriever.manifest
        self.index = SavedModelCalls(retriever)
        self.index.warm()
        self.exact: SavedModelCalls | None = self.index
        if self.manifest["index"]["kind"] == "scann":
            self.exact = None
            if with_exact:
                self.exact = SavedModelCalls(load(folder, exact=True))
                self.exact.warm()
        self.signature_def = _signature_def(folder)

    @property
    def signatures(self) -> Mapping[str, Mapping[str, InputSpec]]:
        """The inputs of each signature."""
        return self.index.signatures

    def release(self) -> None:
        """Frees its memory; it must not be called any more."""
        self.index.release()
        if self.exact is not None:
            self.exact.release()


def _input_spec(tensor: tf.TensorSpec) -> InputSpec:
    name = tensor.dtype.name
    if name not in ("int32", "int64", "float32", "float64", "string"):
        raise ValueError(f"Input {tensor.name} must hold numbers or strings. Received: {name}")
    width = tensor.shape[1] if tensor.shape.rank > 1 else None
    return InputSpec(name, tensor.shape.rank, width)


def _signature_def(folder: Path) -> dict[str, Any]:
    saved_model = saved_model_pb2.SavedModel()
    saved_model.ParseFromString((folder / "saved_model.pb").read_bytes())
    return {
        name: json_format.MessageToDict(
            signature,
            preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
        )
        for name, signature in saved_model.meta_graphs[0].signature_def.items()
    }


@dataclass
class _Failure:
    message: str
    num_tries: int
    retry_at: float


@dataclass
class _Status:
    state: State
    error: str = ""


class ModelVersions:
    """The version in use of a model's folder, and what became of the others.

    As TensorFlow Serving does unless told otherwise, the newest version alone is served. A new one
    is loaded and warmed while the old one answers; then requests go to the new one, and the old
    one goes once those that it still answers are done. A version that cannot be loaded changes
    nothing but the status, and is tried again later.

    Args:
        path: A model's folder, watched, or a version's, which stays.
        with_exact: Whether to load exact search beside a ScaNN index.
        on_load: Told of every load: version, seconds, error or None.

    Raises:
        FileNotFoundError: If there is no version at `path`.
    """

    def __init__(
        self,
        path: Path,
        *,
        with_exact: bool,
        on_load: Callable[[int, float, str | None], None] = lambda *arguments: None,
    ) -> None:
        path = path.resolve()
        self._is_version = (path / MANIFEST_FILE).is_file()
        self._path = path
        self.name = path.parent.name if self._is_version else path.name
        self._with_exact = with_exact
        self._on_load = on_load
        self._lock = threading.Lock()
        self._uses: dict[ServedVersion, int] = {}
        self._failures: dict[Identity, _Failure] = {}
        self._statuses: dict[int, _Status] = {}
        self._identity: Identity | None = None
        self._current: ServedVersion | None = None
        self._has_garbage = False
        if not self._on_disk():
            raise FileNotFoundError(
                f"No exported model at '{path}': expected {MANIFEST_FILE} in it, or in a version's "
                "folder in it. `tfrs-pipeline run` writes one."
            )

    @property
    def current(self) -> ServedVersion:
        """The version that new requests go to.

        Raises:
            RequestError: 503, if none could be loaded.
        """
        if self._current is None:
            raise RequestError(503, f"No version of {self.name} is loaded.", {"Retry-After": "5"})
        return self._current

    def load_first(self) -> None:
        """Loads the newest version that can be loaded.

        Raises:
            RuntimeError: If none can.
        """
        for folder in reversed(self._on_disk()):
            if self._load(folder):
                return
        failures = [failure.message for failure in self._failures.values()]
        raise RuntimeError(f"No version of '{self._path}' can be served. {' '.join(failures)}")

    def refresh(self) -> bool:
        """Changes to the newest version on disk if it is another one; blocks while it loads.

        Returns:
            Whether the version was changed.
        """
        identities = {folder: _identity(folder) for folder in self._on_disk()}
        on_disk = set(identities.values())
        self._failures = {i: failure for i, failure in self._failures.items() if i in on_disk}
        for folder, identity in reversed(identities.items()):
            if identity is None:
                continue
            if identity == self._identity:
                return False
            failure = self._failures.get(identity)
            is_due = failure is None or failure.retry_at <= time.monotonic()
            if is_due and self._load(folder):
                return True
        return False

    async def watch(self, poll_seconds: float) -> None:
        """Looks for another version for ever."""
        while not self._is_version:
            await asyncio.sleep(poll_seconds)
            try:
                await asyncio.to_thread(self.refresh)
                if self._has_garbage:
                    # What TensorFlow built refers to itself: counting references frees nothing.
                    self._has_garbage = False
                    await asyncio.to_thread(gc.collect)
            except Exception:  # Such as a disk that is away for a moment: the next look may do.
                logger.exception("cannot look for versions of %s", self.name)

    @contextlib.contextmanager
    def use(self, number: int | None = None) -> Iterator[ServedVersion]:
        """Lends the version in use, which stays loaded for as long.

        Args:
            number: The version that must be meant; None for whichever is in use.

        Raises:
            RequestError: 404, if it is another one; 503, if there is none.
        """
        with self._lock:
            version = self.current
            if number not in (None, version.number):
                raise RequestError(
                    404,
                    f"Servable not found for request: Specific({self.name}, {number}). "
                    f"Version {version.number} is served.",
                )
            self._uses[version] = self._uses.get(version, 0) + 1
        try:
            yield version
        finally:
            self._give_back(version)

    def statuses(self) -> list[tuple[int, State, str]]:
        """Returns number, state and error of the versions that were seen, the newest first."""
        with self._lock:
            items = sorted(self._statuses.items(), reverse=True)
        return [(number, status.state, status.error) for number, status in items]

    def _on_disk(self) -> list[Path]:
        if self._is_version:
            return [self._path]
        return [self._path / str(number) for number in versions_of(self._path)]

    def _load(self, folder: Path) -> bool:
        identity = _identity(folder)
        if identity is None:
            return False
        number = identity[0]
        is_same_number = self._current is not None and self._current.number == number
        if not is_same_number:
            self._report(number, "LOADING")
        start = time.monotonic()
        try:
            version = ServedVersion(folder, with_exact=self._with_exact)
        except Exception as error:  # Whatever is wrong with it, what runs goes on.
            message = f"Version {number} cannot be loaded: {type(error).__name__}: {error}"
            self._fail(identity, message)
            if not is_same_number:
                self._report(number, "END", message)
            logger.error("%s", message)
            self._on_load(number, time.monotonic() - start, message)
            return False
        self._failures.pop(identity, None)
        self._on_load(number, time.monotonic() - start, None)
        self._swap(version, identity)
        logger.info("%s: version %d in use", self.name, number)
        return True

    def _swap(self, version: ServedVersion, identity: Identity) -> None:
        with self._lock:
            old, self._current, self._identity = self._current, version, identity
            self._uses.setdefault(version, 0)
            if old is not None:
                self._statuses[old.number] = _Status("UNLOADING")
            self._statuses[version.number] = _Status("AVAILABLE")
            self._forget_oldest()
            is_idle = old is not None and not self._uses.get(old)
        if old is not None and is_idle:
            self._unload(old)

    def _give_back(self, version: ServedVersion) -> None:
        with self._lock:
            self._uses[version] -= 1
            is_last = not self._uses[version] and version is not self._current
        if is_last:
            self._unload(version)

    def _unload(self, version: ServedVersion) -> None:
        with self._lock:
            # The last request and the swap may both come here.
            if self._uses.pop(version, None) is None:
                return
            if self._current is None or self._current.number != version.number:
                self._statuses[version.number] = _Status("END")
            self._has_garbage = True
        version.release()
        logger.info("%s: version %d unloaded", self.name, version.number)

    def _fail(self, identity: Identity, message: str) -> None:
        num_tries = self._failures[identity].num_tries + 1 if identity in self._failures else 1
        delay = min(FIRST_RETRY_SECONDS * 2 ** (num_tries - 1), LONGEST_RETRY_SECONDS)
        self._failures[identity] = _Failure(message, num_tries, time.monotonic() + delay)

    def _report(self, number: int, state: State, error: str = "") -> None:
        with self._lock:
            self._statuses[number] = _Status(state, error)

    def _forget_oldest(self) -> None:
        ended = sorted(n for n, status in self._statuses.items() if status.state == "END")
        for number in ended[: max(0, len(self._statuses) - MAX_REPORTED)]:
            del self._statuses[number]


def _identity(folder: Path) -> Identity | None:
    """Tells a version from another of its number; None if it is gone."""
    try:
        stat = (folder / MANIFEST_FILE).stat()
    except FileNotFoundError:
        return None
    return int(folder.name), stat.st_ino, stat.st_mtime_ns
