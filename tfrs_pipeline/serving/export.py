"""A trained model written as a SavedModel that answers with raw ids.

Layout, TensorFlow Serving's own:

    <directory>/<name>/<version>/
        saved_model.pb, variables/   the index, under the signatures of `RetrievalModule`
        manifest.json                config, data hash, counts, metrics, library versions
        assets.extra/items.parquet   item_id and title, for reading answers
        exact/1/                     the brute-force twin, for servers without the ScaNN op

A version is written beside its place and renamed once it is whole and proven.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from tfrs_pipeline.model.two_tower import TwoTowerModel
from tfrs_pipeline.samples.builder import RowLists
from tfrs_pipeline.serving.index import ExactIndex, ScannIndex

logger = logging.getLogger(__name__)

DEFAULT_K = 100
SIGNATURES = ("serving_default", "retrieve_user", "retrieve")
EXACT_TWIN = Path("exact") / "1"
ITEMS_FILE = Path("assets.extra") / "items.parquet"
MANIFEST_FILE = "manifest.json"
LIBRARIES = ("tensorflow", "tf-keras", "tensorflow-recommenders", "scann", "numpy")
# The reloaded model may run other kernels on another batch shape: same answer, not same bits.
SCORE_TOLERANCE = 1e-4


class ExportError(RuntimeError):
    """An export that was not whole or did not answer as the model in memory does."""


class RetrievalModule(tf.Module):
    """A query tower and an index behind raw ids.

    Signatures, ids in the types of the logs (int64 or string; -1 or "" is an empty slot):

    - `serving_default(user_id [B])`: the best 100 by the user's stored history, the user's known
      positives left out.
    - `retrieve_user(user_id [B], exclude [B, E], k [])`: the same with a k and more to leave out.
    - `retrieve(user_id [B], history [B, L], exclude [B, E], k [])`: by a history given with the
      query, oldest first; nothing is left out but `exclude`.

    Each returns `candidate_ids` [B, k], `scores` [B, k] float32 (-inf in empty slots), best first,
    and `is_known_user` [B] bool. Unknown items in `history` and `exclude` are ignored.

    Args:
        model: Trained model; only its query side is exported.
        index: Over the candidates' embeddings.
        exact: Exact search over the same: what falls short of k is answered by it.
        query_ids: [num_queries] user ids, in the order of the model's rows.
        candidate_ids: [num_candidates] item ids, likewise.
        histories: Per query row from 0, candidate rows, most recent first.
        known_positives: Per query row from 0, candidate rows.
    """

    def __init__(
        self,
        model: TwoTowerModel,
        index: ExactIndex | ScannIndex,
        exact: ExactIndex,
        *,
        query_ids: np.ndarray,
        candidate_ids: np.ndarray,
        histories: RowLists,
        known_positives: RowLists,
    ) -> None:
        super().__init__(name="retrieval")
        # Variables alone: tracking the layers would export their Keras machinery too.
        self._query_variables = [*model.query_table.variables, *model.query_tower.variables]
        self._model = _Untracked(model)
        self._index = index
        self._exact = exact
        self._num_candidates = len(candidate_ids)
        self._history_length = model.history_length
        self._query_rows = _row_table(query_ids)
        self._candidate_rows = _row_table(candidate_ids)
        self._id_dtype = tf.int64 if candidate_ids.dtype == np.int64 else tf.string
        self._user_dtype = tf.int64 if query_ids.dtype == np.int64 else tf.string
        empty = -1 if self._id_dtype == tf.int64 else ""
        # Place 0 holds the empty id: an empty slot has row 0.
        self._candidate_ids = tf.constant([empty, *candidate_ids.tolist()], self._id_dtype)
        self._histories = tf.RaggedTensor.from_row_splits(histories.values, histories.offsets)
        self._known = tf.RaggedTensor.from_row_splits(
            known_positives.values, known_positives.offsets
        )
        self._trace()

    @property
    def exported(self) -> dict[str, Any]:
        """The signatures, by name."""
        return {name: getattr(self, name) for name in SIGNATURES}

    def _trace(self) -> None:
        user_id = tf.TensorSpec([None], self._user_dtype, "user_id")
        history = tf.TensorSpec([None, None], self._id_dtype, "history")
        exclude = tf.TensorSpec([None, None], self._id_dtype, "exclude")
        k = tf.TensorSpec([], tf.int32, "k")

        @tf.function(input_signature=[user_id])
        def serving_default(user_id: tf.Tensor) -> dict[str, tf.Tensor]:
            nothing = tf.zeros([tf.shape(user_id)[0], 0], self._id_dtype)
            return self._retrieve_user(user_id, nothing, tf.constant(DEFAULT_K))

        @tf.function(input_signature=[user_id, exclude, k])
        def retrieve_user(
            user_id: tf.Tensor, exclude: tf.Tensor, k: tf.Tensor
        ) -> dict[str, tf.Tensor]:
            return self._retrieve_user(user_id, exclude, k)

        @tf.function(input_signature=[user_id, history, exclude, k])
        def retrieve(
            user_id: tf.Tensor, history: tf.Tensor, exclude: tf.Tensor, k: tf.Tensor
        ) -> dict[str, tf.Tensor]:
            known = tf.reverse(self._rows(self._candidate_rows, history), axis=[1])
            known = tf.ragged.boolean_mask(known, known > 0)
            query_rows = self._rows(self._query_rows, user_id)
            excluded = self._rows(self._candidate_rows, exclude)
            return self._answer(query_rows, known, excluded, k)

        # As attributes they are callable on the loaded object too.
        self.serving_default = serving_default
        self.retrieve_user = retrieve_user
        self.retrieve = retrieve

    def _retrieve_user(
        self, user_id: tf.Tensor, exclude: tf.Tensor, k: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        query_rows = self._rows(self._query_rows, user_id)
        known = tf.gather(self._known, query_rows).to_tensor()
        excluded = tf.concat([known, self._rows(self._candidate_rows, exclude)], axis=1)
        return self._answer(query_rows, tf.gather(self._histories, query_rows), excluded, k)

    @staticmethod
    def _rows(table: tf.lookup.StaticHashTable, ids: tf.Tensor) -> tf.Tensor:
        return tf.cast(table.lookup(ids), tf.int32)

    def _answer(
        self,
        query_rows: tf.Tensor,
        histories: tf.RaggedTensor,
        excluded: tf.Tensor,
        k: tf.Tensor,
    ) -> dict[str, tf.Tensor]:
        """Answers queries by rows; `excluded` is [B, E] rows, 0 is padding."""
        with tf.control_dependencies([tf.debugging.assert_positive(k, "k must be 1 or more")]):
            k = tf.identity(k)
        length = self._history_length
        recent = histories[:, :length].to_tensor(shape=[None, length])
        embeddings = self._model.value.embed_queries(query_rows, recent)
        excluded = tf.sort(excluded, axis=1)
        if isinstance(self._index, ExactIndex):
            rows, scores = self._search_exact(embeddings, excluded, k)
        else:
            rows, scores = self._search(embeddings, excluded, k)
        missing = k - tf.shape(rows)[1]
        rows = tf.pad(rows, [[0, 0], [0, missing]])
        scores = tf.pad(scores, [[0, 0], [0, missing]], constant_values=-np.inf)
        return {
            "candidate_ids": tf.gather(self._candidate_ids, rows),
            "scores": scores,
            "is_known_user": query_rows > 0,
        }

    def _search(
        self, embeddings: tf.Tensor, excluded: tf.Tensor, k: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Over-fetches, drops the excluded; where fewer are left than there should be, exactly."""
        num_excluded = _num_distinct(excluded)
        # The maximum of no queries is the lowest int32.
        most_excluded = tf.maximum(tf.reduce_max(num_excluded), 0)
        width = tf.minimum(k + most_excluded, self._num_candidates)
        places, scores = self._index.search(embeddings, width)
        rows = tf.where(scores > -np.inf, places + 1, 0)
        scores = tf.where(_is_in_sorted(rows, excluded) | (rows == 0), -np.inf, scores)
        depth = tf.minimum(k, tf.shape(scores)[1])
        top_scores, order = tf.math.top_k(scores, depth)
        top_rows = tf.where(top_scores > -np.inf, tf.gather(rows, order, batch_dims=1), 0)
        num_found = tf.reduce_sum(tf.cast(top_rows > 0, tf.int32), axis=1)
        is_short = num_found < tf.minimum(k, self._num_candidates - num_excluded)
        return tf.cond(
            tf.reduce_any(is_short),
            lambda: self._search_exact(embeddings, excluded, k),
            lambda: (top_rows, top_scores),
        )

    def _search_exact(
        self, embeddings: tf.Tensor, excluded: tf.Tensor, k: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        scores = self._exact.scores(embeddings)
        cells = tf.where(excluded > 0)
        columns = tf.cast(tf.gather_nd(excluded, cells), tf.int64) - 1
        cells = tf.stack([cells[:, 0], columns], axis=1)
        lowest = tf.fill([tf.shape(cells)[0]], tf.constant(-np.inf, tf.float32))
        scores = tf.tensor_scatter_nd_update(scores, cells, lowest)
        top_scores, places = tf.math.top_k(scores, tf.minimum(k, self._num_candidates))
        return tf.where(top_scores > -np.inf, places + 1, 0), top_scores


class _Untracked:
    """Keeps a model out of the exported object graph."""

    def __init__(self, value: TwoTowerModel) -> None:
        self.value = value


def _row_table(ids: np.ndarray) -> tf.lookup.StaticHashTable:
    dtype = tf.int64 if ids.dtype == np.int64 else tf.string
    rows = tf.range(1, len(ids) + 1, dtype=tf.int64)
    entries = tf.lookup.KeyValueTensorInitializer(tf.constant(ids.tolist(), dtype), rows)
    return tf.lookup.StaticHashTable(entries, default_value=0)


def _num_distinct(rows: tf.Tensor) -> tf.Tensor:
    """Counts each line's distinct rows above 0; `rows` is sorted, [B, E] -> [B]."""
    first = tf.concat([tf.ones_like(rows[:, :1], tf.bool), rows[:, 1:] != rows[:, :-1]], axis=1)
    return tf.reduce_sum(tf.cast(first & (rows > 0), tf.int32), axis=1)


def _is_in_sorted(rows: tf.Tensor, sorted_rows: tf.Tensor) -> tf.Tensor:
    """Tells which of `rows` [B, n] are in the same line of `sorted_rows` [B, E]."""
    # A last column that equals nothing keeps the lookup in range, also when E is 0.
    last = tf.fill([tf.shape(rows)[0], 1], tf.int32.max)
    lines = tf.concat([sorted_rows, last], axis=1)
    return tf.gather(lines, tf.searchsorted(lines, rows), batch_dims=1) == rows


def write_export(
    directory: Path,
    name: str,
    *,
    module: RetrievalModule,
    twin: RetrievalModule | None,
    manifest: Mapping[str, Any],
    items: pa.Table,
    probe_users: Sequence[Any],
) -> Path:
    """Writes the next version of a model, proves it in a fresh process, and puts it in place.

    Args:
        directory: Such as `saved_models`.
        name: Model name.
        module: What to serve.
        twin: The brute-force twin, where `module` needs the ScaNN op.
        manifest: JSON-able; library versions, version and signatures are added.
        items: Table with `item_id` and, if there is one, `title`.
        probe_users: User ids whose answers must come back the same from the reloaded model.

    Returns:
        The folder of the new version.

    Raises:
        ExportError: If a fresh process cannot load the export or answers otherwise; nothing is
            left in place then.
    """
    parent = directory / name
    parent.mkdir(parents=True, exist_ok=True)
    partial = parent / f".partial-{uuid.uuid4().hex}"
    options = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
    try:
        tf.saved_model.save(module, str(partial), signatures=module.exported, options=options)
        if twin is not None:
            tf.saved_model.save(twin, str(partial / EXACT_TWIN), signatures=twin.exported)
        (partial / ITEMS_FILE).parent.mkdir()
        pq.write_table(items, partial / ITEMS_FILE)
        full = {
            **manifest,
            "name": name,
            "signatures": sorted(module.exported),
            "versions": {library: importlib.metadata.version(library) for library in LIBRARIES},
        }
        (partial / MANIFEST_FILE).write_text(json.dumps(full, indent=2, default=str))
        _prove(partial, module, twin, probe_users)
        return _put_in_place(partial, parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def versions_of(folder: Path) -> list[int]:
    """Lists the complete versions below a model's folder, ascending."""
    if not folder.is_dir():
        return []
    names = [child.name for child in folder.iterdir() if (child / MANIFEST_FILE).is_file()]
    return sorted(int(name) for name in names if re.fullmatch(r"\d+", name))


def file_hash(path: Path) -> str:
    """Computes the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _put_in_place(partial: Path, parent: Path) -> Path:
    while True:
        version = max(versions_of(parent), default=0) + 1
        try:
            # Fails where another export took the number: a folder that is not empty stays.
            os.rename(partial, parent / str(version))
        except OSError:
            if not (parent / str(version)).exists():
                raise
            continue
        return parent / str(version)


def _prove(
    partial: Path,
    module: RetrievalModule,
    twin: RetrievalModule | None,
    probe_users: Sequence[Any],
) -> None:
    for folder, source in ((partial, module), (partial / EXACT_TWIN, twin)):
        if source is None:
            continue
        users = tf.constant(
            list(probe_users), source.exported["serving_default"].input_signature[0].dtype
        )
        expected = source.exported["serving_default"](users)
        probe = folder / "probe.npz"
        np.savez(
            probe,
            user_id=_plain(users.numpy()),
            candidate_ids=_plain(expected["candidate_ids"].numpy()),
            scores=expected["scores"].numpy(),
        )
        command = [sys.executable, "-m", "tfrs_pipeline.serving.check", str(folder), str(probe)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        probe.unlink()
        if done.returncode:
            raise ExportError(
                f"A fresh process could not use the export of {partial.parent.name}: "
                f"{done.stderr.strip()[-2000:]}"
            )


def _plain(ids: np.ndarray) -> np.ndarray:
    """Turns TensorFlow's byte strings into an array that needs no pickle."""
    return np.char.decode(ids.astype(bytes), "utf-8") if ids.dtype == object else ids
