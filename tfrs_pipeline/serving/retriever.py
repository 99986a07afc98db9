"""An exported model, loaded and queried from Python."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tensorflow as tf

from tfrs_pipeline.evaluation.topk import check_one_each
from tfrs_pipeline.retrieval import Query
from tfrs_pipeline.serving.export import EXACT_TWIN, ITEMS_FILE, MANIFEST_FILE, versions_of
from tfrs_pipeline.serving.index import load_scann_ops

# What a `Retriever` may be asked with; `features` are not read by this one.
_QUERY_KEYS = ("user_id", "history", "features")


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

        Raises:
            ValueError: If a query holds another key than `user_id`, `history` and `features`.
        """
        _check_keys(queries)
        users = [query.get("user_id", _empty(self._user_dtype)) for query in queries]
        answer = self._loaded.signatures["retrieve"](
            user_id=_ids(users, self._user_dtype),
            history=self._padded([query.get("history", ()) for query in queries]),
            exclude=self._excluded(exclude, len(queries)),
            k=_checked_k(k),
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
            exclude=self._excluded(exclude, len(user_ids)),
            k=_checked_k(k),
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

    @property
    def saved_model(self) -> Any:
        """The model as `tf.saved_model.load` gives it: its signatures and its parts."""
        return self._loaded

    @property
    def num_candidates(self) -> int:
        """Size of the corpus."""
        return int(pq.read_metadata(self.folder / ITEMS_FILE).num_rows)

    def titles(self) -> dict[Any, str]:
        """Reads the titles of the items, by id; empty if there are none."""
        items = pq.read_table(self.folder / ITEMS_FILE).to_pydict()
        if "title" not in items:
            return {}
        return dict(zip(items["item_id"], items["title"], strict=True))

    def _excluded(self, exclude: Sequence[Collection[Any]] | None, num_queries: int) -> tf.Tensor:
        if exclude is None:
            return self._padded([()] * num_queries)
        check_one_each("exclude", exclude, num_queries)
        return self._padded(exclude)

    def _padded(self, lists: Sequence[Collection[Any]]) -> tf.Tensor:
        width = max((len(ids) for ids in lists), default=0)
        fill = _empty(self._item_dtype)
        known = ([id_ for id_ in ids if _can_be(id_, self._item_dtype)] for ids in lists)
        rows = [[*ids, *[fill] * (width - len(ids))] for ids in known]
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


def _check_keys(queries: Sequence[Query]) -> None:
    """Refuses a misspelt key: its query would have the answer for an empty history."""
    for query in queries:
        if unknown := sorted(set(query) - set(_QUERY_KEYS)):
            near = difflib.get_close_matches(unknown[0], _QUERY_KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_QUERY_KEYS)}"
            raise ValueError(f"Unknown key {unknown[0]!r} in a query; {hint}")


def _checked_k(k: int) -> tf.Tensor:
    if not 1 <= k <= tf.int32.max:
        raise ValueError(f"k must be 1 or more, and an int32. Received: {k}")
    return tf.constant(k, tf.int32)


def _parse_id(text: str, dtype: tf.DType, what: str) -> Any:
    if dtype == tf.string:
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"This model's {what} ids are integers. Received: {text!r}") from None


def _empty(dtype: tf.DType) -> int | str:
    return "" if dtype == tf.string else -1


def _can_be(id_: Any, dtype: tf.DType) -> bool:
    """Tells whether an id is of the model's type; of another it is unknown."""
    if dtype == tf.string:
        return isinstance(id_, str)
    return isinstance(id_, int | np.integer) and tf.int64.min <= id_ <= tf.int64.max


def _ids(ids: Sequence[Any], dtype: tf.DType) -> tf.Tensor:
    known = [id_ if _can_be(id_, dtype) else _empty(dtype) for id_ in ids]
    return tf.reshape(tf.constant(known, dtype), [len(known)])


def _decoded(ids: tf.Tensor) -> np.ndarray:
    array = ids.numpy()
    if array.dtype != object:
        return array
    return np.array([[id_.decode() for id_ in row] for row in array], object).reshape(array.shape)
