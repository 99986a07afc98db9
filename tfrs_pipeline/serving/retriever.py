"""An exported model, loaded and queried from Python."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import tensorflow as tf

from tfrs_pipeline.durable import Damaged, read_record
from tfrs_pipeline.features.encoding import raw_columns, raw_signature
from tfrs_pipeline.features.raw import to_text
from tfrs_pipeline.features.timestamp import Timestamp
from tfrs_pipeline.messages import suggest
from tfrs_pipeline.retrieval import (
    Excluded,
    Query,
    Retrieved,
    check_asked,
    check_one_each,
    check_queries,
    check_requests,
)
from tfrs_pipeline.serving.encoder import (
    as_inputs,
    features_of,
    known_rows,
    query_inputs,
    request_inputs,
)
from tfrs_pipeline.serving.id_tensors import id_list, id_lists
from tfrs_pipeline.serving.index import load_scann_ops
from tfrs_pipeline.serving.publish import (
    EXACT_FOLDER,
    ITEMS_FILE,
    MANIFEST_FILE,
    QUERIES_FILE,
    no_model_at,
    versions_of,
)
from tfrs_pipeline.serving.signatures import Retrieval
from tfrs_pipeline.serving.tune import Requests


def load(path: str | Path, *, exact: bool = False) -> LoadedRetriever:
    """Loads an exported model.

    Args:
        path: A version's folder, or the model's, whose newest complete version is taken.
        exact: Whether to load the brute-force fallback instead of a ScaNN index.

    Raises:
        FileNotFoundError: If there is no complete export at `path`.
        ImportError: If the index needs ScaNN and it is missing.
        Damaged: If a file is not the one that was exported: the towers and the index over their
            embeddings belong together.
    """
    return LoadedRetriever(version_at(path), exact=exact)


def version_at(path: str | Path) -> Path:
    """Returns the folder of the version that `load` takes, or raises a `FileNotFoundError`."""
    folder = Path(path).resolve()
    if (folder / MANIFEST_FILE).is_file():
        return folder
    versions = versions_of(folder)
    if not versions:
        raise no_model_at(Path(path))
    return folder / str(versions[-1])


class LoadedRetriever:
    """A `Retriever` on an exported model; see `load`.

    Attributes:
        folder: Of the version.
        manifest: What `manifest.json` holds.
        saved_model: The model as `tf.saved_model.load` gives it: its signatures and its parts.
        user_dtype: Type of the user ids, int64 or string.
        item_dtype: Of the item ids.
        features: Fitted ones of the query (what `features` of a query may hold), of the request
            (likewise `request`) and of the candidate.
        item_filter: "name" of the column that requests may filter by and all its "values"; None
            without a filter.
    """

    def __init__(self, folder: Path, *, exact: bool) -> None:
        self.folder = folder
        try:
            self.manifest = read_record(folder / MANIFEST_FILE)
        except Damaged as error:
            raise Damaged(
                f"{error} A version's towers and index belong together: copy it whole, or export "
                "it again."
            ) from None
        is_scann = self.manifest["index"]["kind"] == "scann"
        place = EXACT_FOLDER if is_scann and exact else Path()
        if is_scann and not exact:
            load_scann_ops()
        self.saved_model: Any = tf.saved_model.load(str(folder / place))
        spec = self.saved_model.signatures["retrieve"].structured_input_signature[1]
        self.user_dtype, self.item_dtype = spec["user_id"].dtype, spec["history"].dtype
        self.item_filter: dict[str, Any] | None = self.manifest.get("filter")
        self.features = features_of(self.manifest)

    def retrieve(
        self,
        queries: Sequence[Query],
        k: int,
        exclude: Excluded = None,
        *,
        allowed: Sequence[Collection[str]] | None = None,
    ) -> Retrieved:
        """Retrieves the k best candidates of each query; see `Retriever.retrieve`.

        `user_id`, `history`, `history_timestamps`, `features` and `request` are read. Features, raw
        values by column name, replace all of the user's stored ones. A request is those of the
        request features, of which any may be missing, and `timestamp`, an aware datetime: of it
        come an hour or weekday that the log made of its own, and how long ago the items of the
        history were, where the model reads times. Nothing is excluded but `exclude`: not what the
        user is known to have clicked. `allowed` are, per query, values of the model's item filter
        (`filter_by` of the export): items that have one of them are retrieved alone; an empty list
        allows all.

        Raises:
            ValueError: If a query holds another key than these, a user feature that the model does
                not read, or a request feature that looks misspelt (others say nothing); if
                `allowed` is given and the model has no item filter, or holds a value that no item
                has.
        """
        answer = self._retrieved(queries, "history", k, exclude, allowed)
        return _decoded(answer["candidate_ids"]), answer["scores"]

    def retrieve_user(
        self,
        user_ids: Sequence[Any],
        k: int,
        exclude: Excluded = None,
        *,
        allowed: Sequence[Collection[str]] | None = None,
        requests: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Retrieves by the stored history of users, their known positives excluded.

        User ids, [n], are of the type of the model's; an unknown one gets the answer for an empty
        history. Per user, `exclude` are further ids to exclude; `allowed` and `requests` are as in
        `retrieve`.

        Returns:
            candidate_ids [n, k], scores [n, k] float32, is_known_user [n] bool.

        Raises:
            ValueError: As `retrieve`; if the model was exported without user data, or an id is of
                another type.
        """
        if not self.manifest.get("user_data", True):
            raise ValueError(
                "This model was exported without user data and knows no users. Ask by history: "
                "`retrieve`, or --history on the command line."
            )
        if isinstance(user_ids, str):
            raise ValueError(f"User ids come in a list, also a single one: [{user_ids!r}]")
        queries = [{"user_id": id_} for id_ in user_ids]
        if requests is not None:
            check_one_each("requests", requests, len(queries))
            queries = [{**x, "request": y} for x, y in zip(queries, requests, strict=True)]
        answer = self._retrieved(queries, "user", k, exclude, allowed)
        return _decoded(answer["candidate_ids"]), answer["scores"], answer["is_known_user"]

    def embed_queries(self, queries: Sequence[Query]) -> np.ndarray:
        """Embeds queries, [n, D] float32; what is read of them, or refused, is as in `retrieve`."""
        check_queries(queries, ids_are_text=self.item_dtype == tf.string)
        names = [Retrieval("history", has_features).embed_name for has_features in (False, True)]
        return self._answer(queries, names, {})["embeddings"]

    def embed_candidates(
        self, item_ids: Sequence[Any], features: Mapping[str, Sequence[Any] | np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embeds items, those too that are not in the index.

        One that the training did not have is embedded by its `features`: by name, [n] raw values as
        in the item table; None is missing, a `ValueError` if one that the model reads is not there
        at all.

        Returns:
            embeddings [n, D] float32, is_known_item [n] bool: whether the training had it.
        """
        read = self.features["candidate"]
        raw = as_inputs(raw_signature(read), raw_columns(read, features, len(item_ids)))
        answer = self.saved_model.signatures["embed_candidate"](
            item_id=id_list(item_ids, self.item_dtype), **raw
        )
        return answer["embeddings"].numpy(), answer["is_known_item"].numpy()

    def knows(self, item_ids: Sequence[Any]) -> np.ndarray:
        """Tells which items the training had, [n] bool: a history is read without the others."""
        nothing = {x.name: [None] * len(item_ids) for x in self.features["candidate"]}
        return self.embed_candidates(item_ids, nothing)[1]

    def stored_history(self, user_id: Any) -> list[Any]:
        """Returns what is stored of a user's history, most recent first; [] of an unknown one."""
        ids = self.saved_model.encoder.stored_history(id_list([user_id], self.user_dtype))
        history: list[Any] = _decoded(ids.numpy())[0].tolist()
        return history

    def parse_user_id(self, text: str) -> Any:
        """Turns a user id, as typed, into the type of the model's; or raises a `ValueError`."""
        return _parse_id(text, self.user_dtype, "user")

    def parse_item_id(self, text: str) -> Any:
        """Turns an item id typed by a person into the type of the model's ids; as above."""
        return _parse_id(text, self.item_dtype, "item")

    def parse_request(self, texts: Mapping[str, str]) -> dict[str, Any]:
        """Turns request features typed by a person, and the timestamp, into their values.

        Lists are written with commas, times in ISO 8601 with their zone. A `ValueError` if the
        model reads no such feature, or it holds something else.
        """
        check_requests([texts], self._request_names)
        known = {feature.name: feature for feature in self.features["request"]}
        return {name: known.get(name, Timestamp(name)).parse(text) for name, text in texts.items()}

    @property
    def num_candidates(self) -> int:
        """Size of the corpus."""
        return int(pq.read_metadata(self.folder / ITEMS_FILE).num_rows)

    def candidate_ids(self) -> list[Any]:
        """Reads the ids of the items, in the order of their embeddings."""
        return pq.read_table(self.folder / ITEMS_FILE)["item_id"].to_pylist()

    def candidate_embeddings(self) -> np.ndarray:
        """Returns the embeddings of the items: [num_candidates, D] float32."""
        return self.saved_model.exact.embeddings.numpy()

    def held_out_queries(self) -> list[Query]:
        """Reads the queries that the index was measured on, with what they were asked with."""
        return pq.read_table(self.folder / QUERIES_FILE).to_pylist()

    def held_out_requests(self) -> Requests:
        """Embeds the held-out queries, each with the rows of what its user knows."""
        queries, ids = self.held_out_queries(), np.array(self.candidate_ids())
        known = known_rows(self.saved_model.encoder, queries, ids)
        return Requests(self.embed_queries(queries), known)

    def titles(self) -> dict[Any, str]:
        """Reads the titles of the items, by id; empty if there are none."""
        items = pq.read_table(self.folder / ITEMS_FILE).to_pydict()
        return dict(zip(items["item_id"], items["title"], strict=True)) if "title" in items else {}

    def _retrieved(
        self,
        queries: Sequence[Query],
        asks_by: Literal["user", "history"],
        k: int,
        exclude: Excluded,
        allowed: Sequence[Collection[str]] | None,
    ) -> dict[str, np.ndarray]:
        """Checks what is asked, and asks it, of the filtered form where values are allowed."""
        check_asked(queries, k, exclude, ids_are_text=self.item_dtype == tf.string)
        exclude = [()] * len(queries) if exclude is None else exclude
        asked = {"k": tf.constant(k, tf.int32), "exclude": id_lists(exclude, self.item_dtype)}
        if allowed is not None:
            self._check_allowed(allowed, len(queries))
            texts = [list(map(to_text, values)) for values in allowed]
            lists = tf.ragged.constant(texts, tf.string, ragged_rank=1)
            asked["allowed"] = lists.to_tensor("")
        names = [Retrieval(asks_by, x, allowed is not None).name for x in (False, True)]
        return self._answer(queries, names, asked)

    def _answer(
        self, queries: Sequence[Query], names: Sequence[str], asked: Mapping[str, tf.Tensor]
    ) -> dict[str, np.ndarray]:
        """Asks the first signature for queries without features, the second for those with."""
        function = self.saved_model.signatures[names[0]]
        requests = [query.get("request") for query in queries]
        check_requests(requests, self._request_names, may_have_others=True)
        inputs = {
            **query_inputs(function, queries),
            **request_inputs(function, self.features, requests),
            **asked,
        }
        has_features = np.array([query.get("features") is not None for query in queries], bool)
        if not has_features.any():
            answer = function(**inputs)
            return {name: tensor.numpy() for name, tensor in answer.items()}
        order = [np.flatnonzero(~has_features), np.flatnonzero(has_features)]
        raw = self.raw_query_features([queries[i] for i in order[1].tolist()])
        parts = [
            self.saved_model.signatures[name](
                **{n: x if n == "k" else tf.gather(x, places) for n, x in inputs.items()}, **more
            )
            for places, name, more in zip(order, names, ({}, raw), strict=True)
        ]
        back = np.argsort(np.concatenate(order))
        return {name: np.concatenate([p[name].numpy() for p in parts])[back] for name in parts[0]}

    def raw_query_features(self, queries: Sequence[Query]) -> dict[str, tf.Tensor]:
        """Makes inputs of the signatures `..._with_features`; a `ValueError` if one is not read."""
        names = [feature.name for feature in self.features["query"]]
        if not names:
            raise ValueError(
                "The model reads no user features: remove `features` from the queries."
            )
        if unknown := {name for query in queries for name in query["features"]} - set(names):
            raise ValueError(
                f"The model reads no user feature {', '.join(map(repr, sorted(unknown)))}; known: "
                f"{', '.join(names)}"
            )
        columns = {name: [query["features"].get(name) for query in queries] for name in names}
        read = self.features["query"]
        return as_inputs(raw_signature(read), raw_columns(read, columns, len(queries)))

    @property
    def _request_names(self) -> list[str]:
        return [feature.name for feature in self.features["request"]]

    def _check_allowed(self, allowed: Sequence[Collection[str]], num_queries: int) -> None:
        if self.item_filter is None:
            raise ValueError("This model has no item filter: export it with filter_by.")
        check_one_each("allowed", allowed, num_queries)
        known = set(self.item_filter["values"])
        unknown = next(
            (value for values in allowed for value in values if to_text(value) not in known), None
        )
        if unknown is not None:
            hint = suggest(str(unknown), known)
            raise ValueError(f"No item has {unknown!r} as its {self.item_filter['name']}; {hint}")


def _parse_id(text: str, dtype: tf.DType, what: str) -> Any:
    if dtype == tf.string:
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"This model's {what} ids are integers. Received: {text!r}") from None


def _decoded(ids: np.ndarray) -> np.ndarray:
    if ids.dtype != object:
        return ids
    return np.array([[id_.decode() for id_ in row] for row in ids], object).reshape(ids.shape)
