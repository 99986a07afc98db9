"""Serves the newest version of a model on disk, and switches without dropping a request."""

import contextlib
import copy
import ctypes
import gc
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from prometheus_client import Counter, Gauge, Histogram
from starlette.exceptions import HTTPException

from tfrs_pipeline.answers.publish import (
    MANIFEST_FILE,
    SIGNATURES_FILE,
    no_model_at,
    versions_of,
)
from tfrs_pipeline.answers.retriever import load
from tfrs_pipeline.answers.signatures import (
    ALSO_TAKEN,
    DEFAULT_SIGNATURE,
    FILTERED,
    SIMILAR,
    completed,
)
from tfrs_pipeline.records.database import Replaced
from tfrs_pipeline.records.journal import Journal
from tfrs_pipeline.search.candidates import UnknownItem
from tfrs_pipeline.service.request_metrics import BUCKETS_SECONDS
from tfrs_pipeline.service.rest import SignatureInputs, bad_request
from tfrs_pipeline.service.settings import ServeSettings

logger = logging.getLogger(__name__)

# Wait before a version that failed to load is tried again: its folder may still be incomplete.
RETRY_SECONDS = 30.0
# Between two checks of a version's candidates and live items.
CHECK_SECONDS = 60.0
# A small request that takes less is answered at once: a change of threads takes as long.
QUICK_SECONDS = 0.002

CALL_SECONDS = Histogram(
    "tfrs_model_call_seconds", "Seconds of a model call.", buckets=BUCKETS_SECONDS
)
CALL_QUERIES = Histogram(
    "tfrs_model_call_queries", "Queries in a model call.", buckets=(1, 2, 4, 8, 16, 32, 64, 128)
)
VERSION = Gauge("tfrs_model_version", "Version in use.", ["model"])
LOADS = Counter(
    "tfrs_model_loads", "Versions that were loaded or failed to load.", ["model", "outcome"]
)
VIOLATIONS = Gauge("tfrs_violations", "Violated invariants of the version in use.", ["model"])
LOAD_SECONDS = Gauge("tfrs_model_load_seconds", "Seconds that the last load took.", ["model"])

State: TypeAlias = Literal["LOADING", "AVAILABLE", "UNLOADING", "END"]
# A version's number, inode and time; a later version may reuse the number.
Identity: TypeAlias = tuple[int, int, int]


class ServedVersion:
    """A loaded version of a model, from a folder named by its number.

    It `is_quick` if a query takes less than 2 ms. Without a `journal`, it reads events by its own.
    """

    def __init__(
        self, folder: Path, settings: ServeSettings, journal: Journal | None = None
    ) -> None:
        if not folder.name.isdigit():
            raise ValueError(
                "A version's folder is named by its number, such as saved_models/NAME/3. "
                f"Received: {folder}"
            )
        self.number = int(folder.name)
        self.num_uses = 0
        self.retriever = load(folder)
        # First, since the calls below read events: the server's journal goes on without them if
        # they cannot be read, and so does the version.
        if journal is not None and self.retriever.users.journal is not None:
            self.retriever.users.journal = journal
        self.retriever.graph.catch_up()  # Counts all clicks: no write has to wait for that.
        # The page needs the titles. They are read now, because the folder may be deleted later.
        self.titles: dict[Any, str | None] = {}
        if settings.page:
            self.titles = dict.fromkeys(self.retriever.candidate_ids()) | self.retriever.titles()
        self.signature_def: dict[str, Any] = json.loads((folder / SIGNATURES_FILE).read_text())
        # A SavedModel has no item graph, which takes and returns what `similar` does, and no
        # filters: lists of text beside lists of ids to exclude.
        for name in [name for name in self.retriever.signatures if name not in self.signature_def]:
            base = name.removesuffix(FILTERED)
            definition = self.signature_def[SIMILAR if base == ALSO_TAKEN else base]
            definition = self.signature_def[name] = copy.deepcopy(definition)
            if name != base:
                exclude = definition["inputs"]["exclude"]
                definition["inputs"]["allowed"] = {**exclude, "dtype": "DT_STRING", "name": ""}
        specs = self.retriever.signatures.copy()
        if "retrieve_user" in specs:
            specs[DEFAULT_SIGNATURE] = {"user_id": specs["retrieve_user"]["user_id"]}
        names = self.retriever.manifest["feature_inputs"]
        self.signatures = {}
        for signature, inputs in specs.items():
            # An item feature may have the name of a user or request feature.
            sides = ("candidate",) if "item_id" in inputs else ("query", "request")
            features = {
                names[side][feature.name]: feature
                for side in sides
                for feature in self.retriever.features[side]
            }
            optional = names["request"].values() if "request" in sides else ()
            self.signatures[signature] = SignatureInputs(inputs, settings, features, optional)
        # The first call makes what later ones reuse, and would fail for a broken model.
        for name, inputs in self.retriever.signatures.items():
            example = completed(inputs, {}, 1)
            with contextlib.suppress(HTTPException):  # `similar` refuses the missing item.
                self.call(name, example)
        # Without the waits for other threads.
        start = time.thread_time()
        self.call("retrieve", completed(self.retriever.signatures["retrieve"], {}, 1))
        self.is_quick = time.thread_time() - start < QUICK_SECONDS

    def call(
        self, signature: str, inputs: Mapping[str, np.ndarray], *, exact: bool = False
    ) -> dict[str, np.ndarray]:
        """Calls a signature with arrays that all have the same number of queries.

        With `exact`, every candidate is scored. Raises a 400 if the item of `similar` is unknown.
        """
        CALL_QUERIES.observe(max(len(array) for array in inputs.values() if array.ndim))
        with CALL_SECONDS.time():
            try:
                return self.retriever.engine.answer(signature, inputs, exact=exact)
            except UnknownItem as error:
                raise bad_request(str(error)) from None

    def title_of(self, item_id: Any) -> str | None:
        """Returns the title of an item, as it was last written."""
        return self.retriever.live.titles.get(item_id) or self.titles.get(item_id)


class ModelVersions:
    """The version in use of a model's folder, and the states of the others.

    `path` is a model's folder, which is watched for new versions, or the folder of one version.
    Live items are taken in either way.

    Attributes:
        folder: The model's folder. A link to a model is not resolved, because it may be set anew.
        name: The model's name.
    """

    def __init__(self, path: Path, load_version: Callable[[Path], ServedVersion]) -> None:
        self._is_version = (path / MANIFEST_FILE).is_file()
        # A symbolic link to a model keeps its own name, and is followed again each time.
        self._path = path.resolve() if self._is_version else Path(os.path.abspath(path))
        self._load_version = load_version
        self.folder = self._path.parent if self._is_version else self._path
        self.name = self.folder.name
        # `writing` is held while live items are written, and while the version in use changes.
        self._lock, self.writing = threading.Lock(), threading.Lock()
        self._current: ServedVersion | None = None
        self._identity: Identity | None = None
        self._loading: int | None = None
        self._retired: list[ServedVersion] = []
        # What was wrong with each version, and when to try again.
        self._failures: dict[Identity, tuple[str, float]] = {}
        self._next_check = 0.0
        if not self._on_disk():
            raise no_model_at(path)

    def load_first(self) -> None:
        """Loads the newest version that can be loaded, or raises a `RuntimeError`."""
        self.refresh()
        if self._current is None:
            problems = " ".join(message for message, _ in self._failures.values())
            raise RuntimeError(f"No version of '{self._path}' can be served. {problems}")

    def refresh(self) -> None:
        """Loads and switches to the newest version, takes in live items, frees unused versions."""
        on_disk = self._on_disk()
        # A failure is forgotten with its folder: a new one of this number gets a first try.
        self._failures = {i: failure for i, failure in self._failures.items() if i in on_disk}
        for identity in sorted(on_disk, reverse=True):
            if identity == self._identity:
                break
            _, retry_at = self._failures.get(identity, ("", 0.0))
            if retry_at <= time.monotonic() and self._load(identity, on_disk[identity]):
                break
        if self._current is not None:
            try:
                self._current.retriever.catch_up()
            except Replaced as error:
                logger.warning("%s The server does so at its next look.", error)
                self._identity = None
        # Released here and not by the last request, so that no request waits for it.
        if self._release_idle():
            gc.collect()  # What the version held may have reference cycles.
            # Each thread that loads has its own heap, which would keep the freed memory.
            with contextlib.suppress(AttributeError):  # Only glibc has it.
                ctypes.CDLL(None).malloc_trim(0)

    def watch(self, poll_seconds: float, stop: threading.Event) -> None:
        """Looks for new versions and live items until it is told to stop."""
        problem = ""
        while not stop.wait(poll_seconds):
            try:
                self.refresh()
                self._check_if_idle()
                problem = ""
            except Exception as error:  # As of a disk that is offline: the next look may succeed.
                if problem != str(error):  # Once, and not every two seconds.
                    logger.exception("cannot look for versions of %s", self.name)
                problem = str(error)

    def _check_if_idle(self) -> None:
        """Logs violated invariants of the version in use, between calls, at most once a minute."""
        version, begun = self._current, time.monotonic()
        if version is None or version.num_uses or begun < self._next_check:
            return
        violations = version.retriever.violations()
        VIOLATIONS.labels(self.name).set(len(violations))
        for line in violations:
            logger.error("version %d of %s is broken: %s", version.number, self.name, line)
        # So checks take at most a twentieth of the time, however many items there are.
        ended = time.monotonic()
        self._next_check = ended + max(CHECK_SECONDS, 20 * (ended - begun))

    @contextlib.contextmanager
    def use(self, number: str | None = None) -> Iterator[ServedVersion]:
        """Yields the version in use, kept loaded within the block; raises a 404 for another."""
        with self._lock:
            version = self._current
            if version is None or number not in (None, str(version.number)):
                lacking = f"Servable not found for request: Specific({self.name}, {number!s:.40})."
                served = version and version.number
                raise HTTPException(404, f"{lacking} Version {served} is served.")
            version.num_uses += 1
        try:
            yield version
        finally:
            with self._lock:
                version.num_uses -= 1

    def statuses(self) -> dict[int, tuple[State, str]]:
        """Returns the state and error of each version loaded, loading or failed, newest first."""
        with self._lock:
            states: dict[int, tuple[State, str]] = {
                identity[0]: ("END", message) for identity, (message, _) in self._failures.items()
            }
            if self._loading is not None:
                states[self._loading] = ("LOADING", "")
            states |= {version.number: ("UNLOADING", "") for version in self._retired}
            if self._current is not None:
                states[self._current.number] = ("AVAILABLE", "")
        return dict(sorted(states.items(), reverse=True))

    def _on_disk(self) -> dict[Identity, Path]:
        folders = [self._path]
        if not self._is_version:
            folders = [self._path / str(number) for number in versions_of(self._path)]
        on_disk = {}
        for folder in folders:
            with contextlib.suppress(FileNotFoundError):  # It was deleted meanwhile.
                stat = (folder / MANIFEST_FILE).stat()
                number = int(folder.name) if folder.name.isdigit() else 0
                on_disk[number, stat.st_ino, stat.st_mtime_ns] = folder
        return on_disk

    def _load(self, identity: Identity, folder: Path) -> bool:
        self._loading = identity[0]
        start = time.monotonic()
        try:
            version = self._load_version(folder)
        except Exception as error:  # Whatever is wrong, the version in use goes on.
            problem = " ".join(f"{type(error).__name__}: {error}".split())  # In one line.
            message = f"Version {folder.name} cannot be loaded: {problem}"
            self._failures[identity] = (message, time.monotonic() + RETRY_SECONDS)
            LOADS.labels(self.name, "failed").inc()
            logger.error("%s", message)
            return False
        finally:
            self._loading = None
        with self.writing:
            version.retriever.catch_up()  # Items may have been written while it loaded.
            with self._lock:
                self._failures.pop(identity, None)
                if self._current is not None:
                    self._retired.append(self._current)
                self._current, self._identity = version, identity
        LOADS.labels(self.name, "ok").inc()
        LOAD_SECONDS.labels(self.name).set(time.monotonic() - start)
        VERSION.labels(self.name).set(version.number)
        logger.info("%s: version %d in use", self.name, version.number)
        return True

    def _release_idle(self) -> bool:
        with self._lock:
            idle = [version for version in self._retired if not version.num_uses]
            self._retired = [version for version in self._retired if version.num_uses]
        for version in idle:
            logger.info("%s: version %d unloaded", self.name, version.number)
        return bool(idle)
