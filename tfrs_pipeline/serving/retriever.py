"""An exported model, loaded and queried from Python."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tensorflow as tf

from tfrs_pipeline.retrieval import Query
from tfrs_pipeline.serving.export import EXACT_TWIN, ITEMS_FILE, MANIFEST_FILE, versions_of
from tfrs_pipeline.serving.index import load_scann_ops


class LoadedRetriever:
    """A `Retriever` on an exported model; see `load_retriever`."""

    def __init__(self, folder: Path, *, exact: bool) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text())
        is_scann = self.manifest["index"]["kind"] == "scann"
        if is_scann and not exact:
            load_scann_ops()
        self._loaded = tf.saved_model.load(
            str(folder / EXACT_TWIN if exact and is_scann else folder)
        )
        spec = self._loaded.signatures["retrieve"].structured_input_signature[1]
        self._user_dtype, self._item_dtype = spec["user_id"].dtype, spec["history"].dtype

    def retrieve(
        self,
        queries: Sequence[Query],
        k: int,
        exclude: Sequence[Collection[Any]] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Retrieves the k best candidates of each query; see `Retriever.retrieve`.

        `user_id` and `history` are read. Nothing is left out but `exclude`: not what the user is
        known to have clicked.
        """
        users = [query.get("user_id", _empty(self._user_dtype)) for query in queries]
        answer = self._loaded.signatures["retrieve"](
            user_id=_ids(users, self._user_dtype),
            history=self._padded([query.get("history", ()) for query in queries]),
            exclude=self._padded([()] * len(queries) if exclude is None else exclude),
            k=tf.constant(k),
        )
        return _decoded(answer["candidate_ids"]), answer["scores"].numpy()

    def retrieve_user(
        self, user_ids: Sequence[Any], k: int, exclude: Sequence[Collection[Any]] | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Retrieves by the stored history of users, their known positives left out.

        Args:
            user_ids: [n] ids; an unknown one gets the answer for an empty history.
            k: How many candidates.
            exclude: Per user, further ids to leave out.

        Returns:
            candidate_ids [n, k], scores [n, k] float32, is_known_user [n] bool.
        """
        answer = self._loaded.signatures["retrieve_user"](
            user_id=_ids(user_ids, self._user_dtype),
            exclude=self._padded([()] * len(user_ids) if exclude is None else exclude),
            k=tf.constant(k),
        )
        ids = _decoded(answer["candidate_ids"])
        return ids, answer["scores"].numpy(), answer["is_known_user"].numpy()

    def parse_user_id(self, text: str) -> Any:
        """Turns a user id typed by a person into the type of the model's ids.

        Raises:
            ValueError: If the model's ids are integers and the text is not one.
        """
        return _parse_id(text, self._user_dtype, "user")

    def parse_item_id(self, text: str) -> Any:
        """Turns an item id typed by a person into the type of the model's ids; as above."""
        return _parse_id(text, self._item_dtype, "item")

    def titles(self) -> dict[Any, str]:
        """Reads the titles of the items, by id; empty if there are none."""
        items = pq.read_table(self.folder / ITEMS_FILE).to_pydict()
        if "title" not in items:
            return {}
        return dict(zip(items["item_id"], items["title"], strict=True))

    def _padded(self, lists: Sequence[Collection[Any]]) -> tf.Tensor:
        width = max((len(ids) for ids in lists), default=0)
        fill = _empty(self._item_dtype)
        rows = [
            [*ids, *[fill] * (width - len(ids))] for ids in map(_of_type(self._item_dtype), lists)
        ]
        return tf.reshape(tf.constant(rows, self._item_dtype), [len(lists), width])


def load_retriever(path: str | Path, *, exact: bool = False) -> LoadedRetriever:
    """Loads an exported model.

    Args:
        path: A version's folder, or the model's, whose newest complete version is taken.
        exact: Whether to load the brute-force twin instead of the index.

    Raises:
        FileNotFoundError: If there is no complete export at `path`.
        ImportError: If the index needs ScaNN and it is missing.
    """
    folder = Path(path)
    if not (folder / MANIFEST_FILE).is_file():
        versions = versions_of(folder)
        if not versions:
            raise FileNotFoundError(
                f"No exported model at '{folder}': expected {folder}/{MANIFEST_FILE} or "
                f"{folder}/<version>/{MANIFEST_FILE}. `tfrs-pipeline run` writes one."
            )
        folder = folder / str(versions[-1])
    return LoadedRetriever(folder, exact=exact)


def _parse_id(text: str, dtype: tf.DType, what: str) -> Any:
    if dtype == tf.string:
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"This model's {what} ids are integers. Received: {text!r}") from None


def _empty(dtype: tf.DType) -> int | str:
    return "" if dtype == tf.string else -1


def _of_type(dtype: tf.DType) -> Any:
    """Returns a function that keeps the ids that can be ids of the type: others are unknown."""
    kind = str if dtype == tf.string else int | np.integer
    return lambda ids: [id_ for id_ in ids if isinstance(id_, kind)]


def _ids(ids: Sequence[Any], dtype: tf.DType) -> tf.Tensor:
    kind = str if dtype == tf.string else int | np.integer
    known = [id_ if isinstance(id_, kind) else _empty(dtype) for id_ in ids]
    return tf.reshape(tf.constant(known, dtype), [len(known)])


def _decoded(ids: tf.Tensor) -> np.ndarray:
    array = ids.numpy()
    if array.dtype != object:
        return array
    return np.array([[id_.decode() for id_ in row] for row in array], object).reshape(array.shape)
