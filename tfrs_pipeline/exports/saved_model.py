"""The SavedModel: an encoder and an index behind raw ids. Nothing else here reads it."""

import errno
import functools
import json
import os
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tensorflow as tf
from google.protobuf import json_format
from tensorflow.core.protobuf import saved_model_pb2

from tfrs_pipeline.answers import publish
from tfrs_pipeline.answers.proof import PLACES, ExportError, difference
from tfrs_pipeline.answers.signatures import (
    DEFAULT_K,
    DEFAULT_SIGNATURE,
    RETRIEVALS,
    SIMILAR,
    missing_value,
)
from tfrs_pipeline.answers.stored import read_array
from tfrs_pipeline.exports.encoder import EMBEDDINGS, Encoder
from tfrs_pipeline.exports.graph_index import (
    ExactIndex,
    ScannIndex,
    load_scann_ops,
    search_with_bonuses,
)
from tfrs_pipeline.model import tf_tables
from tfrs_pipeline.model.tf_tables import as_tensors, signature_inputs
from tfrs_pipeline.search.searcher import Searcher
from tfrs_pipeline.search.settings import Level


class RetrievalModule(tf.Module):
    """An encoder, built or loaded, and an index behind raw ids.

    Its signatures are attributes too; saved_models/README.md lists them. Those that retrieve take
    the inputs of the encoder's function for the query, then `exclude` and `k`. `candidate_ids` are
    in the order of the index's embeddings.
    """

    def __init__(
        self,
        encoder: Encoder,
        index: ExactIndex | ScannIndex,
        candidate_ids: np.ndarray,
        has_item_bias: bool = False,
    ) -> None:
        super().__init__(name="retrieval")
        self.encoder, self.index = encoder, index
        self._has_item_bias = has_item_bias
        self._candidate_rows = tf_tables.row_table(candidate_ids)
        self._candidate_ids = tf_tables.stored(tf_tables.with_empty(candidate_ids))
        self._names: tuple[str, ...] = ()
        self._trace()

    @property
    def exported(self) -> dict[str, Any]:
        """The signatures by name."""
        return {name: getattr(self, name) for name in self._names}

    def _export(self, name: str, function: Any, inputs: Sequence[tf.TensorSpec]) -> None:
        # An attribute can be called on the loaded object too.
        setattr(self, name, tf_tables.traced(function, inputs))
        self._names += (name,)

    def _trace(self) -> None:
        item_id = tf.TensorSpec([None], self._candidate_ids.dtype, "item_id")
        exclude = tf.TensorSpec([None, None], self._candidate_ids.dtype, "exclude")
        k = tf.TensorSpec([], tf.int32, "k")
        # How queries become embeddings, and the inputs for it, by the name in RETRIEVALS.
        embeds: dict[str, Callable[..., Any]] = {SIMILAR: self._item_queries}
        inputs = {SIMILAR: [item_id]}
        for name in EMBEDDINGS:
            # An encoder lacks the functions that its model does not support.
            if (function := getattr(self.encoder, name, None)) is not None:
                embeds[name] = functools.partial(_embedded, function)
                inputs[name] = [*signature_inputs(function).values()]
                self._export(name, embeds[name], inputs[name])
        for name, embed_name in RETRIEVALS.items():
            if embed_name in embeds:
                answer = functools.partial(self._answer, embeds[embed_name])
                self._export(name, answer, [*inputs[embed_name], exclude, k])
        if "embed_user" in embeds:
            self._export(DEFAULT_SIGNATURE, self._answer_default, inputs["embed_user"][:1])

    def _answer_default(self, user_id: tf.Tensor) -> dict[str, tf.Tensor]:
        known = {"user_id": user_id, "k": tf.constant(DEFAULT_K)}
        inputs = []
        for name, spec in signature_inputs(self.retrieve_user).items():  # Others are missing.
            shape = [tf.shape(user_id)[0], *(size or 0 for size in spec.shape[1:])]
            missing = tf.constant(missing_value(spec.dtype.name), spec.dtype)
            inputs.append(known[name] if name in known else tf.fill(shape, missing))
        return self.retrieve_user(*inputs)

    def _answer(
        self, embed: Callable[..., Any], /, exclude: tf.Tensor, k: tf.Tensor, **query: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Answers queries; empty ids pad `exclude` [B, E]."""
        with tf.control_dependencies([tf.debugging.assert_positive(k, "k must be 1 or more")]):
            k = tf.identity(k)
        embedded = dict(embed(**query))
        # Items of a given history are not excluded, unless `exclude` holds them.
        if "known_items" in embedded:
            exclude = tf.concat([embedded.pop("known_items"), exclude], axis=1)
        # Row 0 is padding, an unknown item, or one that the index does not have.
        excluded = tf_tables.lookup(self._candidate_rows, exclude)
        vectors = embedded.pop("embeddings")
        if "bonuses" in embedded:
            with_bonus = tf_tables.lookup(self._candidate_rows, embedded.pop("items_with_bonus"))
            rows, scores = search_with_bonuses(
                self.index, vectors, k, excluded, with_bonus, embedded.pop("bonuses")
            )
        else:
            rows, scores = self.index.search(vectors, k, excluded)
        # The rest says what the encoder knew of the query.
        return {
            "candidate_ids": tf.gather(self._candidate_ids, rows),
            "scores": scores,
            **embedded,
        }

    def _item_queries(self, item_id: tf.Tensor) -> dict[str, tf.Tensor]:
        """Makes queries of items as `LoadedRetriever.similar` does."""
        rows = tf_tables.lookup(self._candidate_rows, item_id)
        unknown = tf.boolean_mask(item_id, rows == 0)
        check = tf.debugging.Assert(
            tf.size(unknown) == 0, ["Not among the model's items:", unknown]
        )
        with tf.control_dependencies([check]):
            vectors = tf.gather(self.index.embeddings, rows - 1)
        if self._has_item_bias:
            vectors = tf.concat([vectors[:, :-1], tf.ones_like(vectors[:, -1:])], axis=1)
        return {"embeddings": vectors, "known_items": item_id[:, tf.newaxis]}


def _embedded(embed: Callable[..., Any], /, **inputs: tf.Tensor) -> Any:
    return tf_tables.call(embed, inputs)


def save_graphs(
    folder: Path, encoder: Any, about: Mapping[str, Any], queries: np.ndarray | None = None
) -> dict[str, RetrievalModule]:
    """Writes the SavedModels of a version whose items and index are in its folder.

    `encoder` is an `Encoder`, or that of a loaded SavedModel. `about` are the "index" and
    "has_item_bias" of the manifest. With an index, [n, D] `queries` show that ScaNN's operation
    scores as its searcher does. Returns the modules, by the folder of each below the version's.
    """
    ids = pq.read_table(folder / publish.ITEMS_FILE, columns=["item_id"])["item_id"].to_numpy()
    exact = ExactIndex(read_array(folder / publish.SERVICE_FOLDER, publish.VECTORS))
    # Both SavedModels share the vectors in memory, but each folder holds them on its own.
    modules = {"": RetrievalModule(encoder, exact, ids, about["has_item_bias"])}
    if levels := about["index"].get("levels"):
        scann = ScannIndex(exact, folder / publish.INDEX_FOLDER, [Level(**x) for x in levels])
        if queries is not None:
            check_operation(scann, Searcher.load(folder / publish.INDEX_FOLDER), queries)
        module = RetrievalModule(encoder, scann, ids, about["has_item_bias"])
        modules[str(publish.SCANN_FOLDER)] = module
    allowed_ops = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
    for name, module in modules.items():
        try:
            tf.saved_model.save(module, str(folder / name), module.exported, allowed_ops)
        except tf.errors.ResourceExhaustedError as error:
            if (text := os.strerror(errno.ENOSPC)) not in error.message:
                raise
            # TensorFlow names a file of its own, which is gone by now.
            raise OSError(errno.ENOSPC, text) from error
    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString((folder / "saved_model.pb").read_bytes())
    options = {"preserving_proto_field_name": True, "always_print_fields_with_no_presence": True}
    signatures = {
        name: json_format.MessageToDict(signature, **options)
        for name, signature in saved.meta_graphs[0].signature_def.items()
    }
    path = folder / publish.SIGNATURES_FILE
    path.unlink(missing_ok=True)  # A refresh has a link to the file of the version before.
    path.write_text(json.dumps(signatures))
    return modules


def save_again(folder: str, before: str) -> None:
    """Writes the SavedModels of a refreshed version, with the encoder of the version before.

    Runs in a process of its own, so that a refresh imports no TensorFlow. Reads what the manifest
    says of the index, and inputs of probes, from standard input; writes the answers to these.
    """
    about, probes = pickle.load(sys.stdin.buffer)
    modules = save_graphs(Path(folder), tf.saved_model.load(before).encoder, about)
    answers = {part: answers_of(module, probes) for part, module in modules.items()}
    sys.stdout.buffer.write(pickle.dumps(answers))


def check_operation(index: ScannIndex, searcher: Searcher, queries: np.ndarray) -> None:
    """Checks that ScaNN's operation scores as its searcher does, at every level."""
    for level in index.levels:
        _, scores, _ = searcher.search(queries, level)
        _, others = index.approximate(tf.constant(queries), *astuple(level))
        if problem := difference({"scores": scores}, {"scores": others.numpy()}):
            raise ExportError(
                f"ScaNN's TensorFlow operation does not answer as its searcher does: {problem}"
            )


def answers_of(
    module: RetrievalModule, probes: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, dict[str, np.ndarray]]:
    """Returns the answers of a module in memory to the inputs of each signature that it has."""
    answers = {}
    for name, inputs in probes.items():
        if name in module.exported:
            function = module.exported[name]
            tensors = as_tensors(signature_inputs(function), inputs)
            answers[name] = _arrays(tf_tables.call(function, tensors))
    return answers


def _arrays(tensors: Mapping[str, tf.Tensor]) -> dict[str, np.ndarray]:
    """Returns tensors as arrays; text is `str`, not bytes."""
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    for name, array in arrays.items():
        if array.dtype == object:
            flat = [text.decode(errors="replace") for text in array.ravel().tolist()]
            arrays[name] = np.array(flat, object).reshape(array.shape)
    return arrays


def answer_graph_probes() -> str | None:
    """Answers the probes on standard input by SavedModels; returns how these differ, or None.

    Exact models come first: the process then shows that they load without ScaNN's operation.
    """
    folder, expected = pickle.load(sys.stdin.buffer)
    problems = []
    for part, answers in expected.items():
        if part:
            load_scann_ops()
        signatures = tf.saved_model.load(str(Path(folder, part))).signatures
        for name, (inputs, outputs) in answers.items():
            tensors = as_tensors(signature_inputs(signatures[name]), inputs)
            if problem := difference(outputs, _arrays(signatures[name](**tensors)), PLACES):
                problems.append(f"{Path(folder, part)}: {name}: {problem}")
    return "\n".join(problems) or None
