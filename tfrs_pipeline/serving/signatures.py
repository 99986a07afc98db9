"""The signatures of an exported model, and its towers, which call them with raw values."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import tensorflow as tf

from tfrs_pipeline import retrieval
from tfrs_pipeline.durable import Damaged, read_record
from tfrs_pipeline.features.encoding import raw_columns, raw_signature
from tfrs_pipeline.features.numeric import Timestamp
from tfrs_pipeline.model.encoder import as_inputs, features_of, query_inputs, request_inputs
from tfrs_pipeline.model.graph import empty_id, id_list, signature_inputs
from tfrs_pipeline.serving import publish

AsksBy: TypeAlias = Literal["user", "history", "item"]


@dataclass(frozen=True)
class Retrieval:
    """A signature that retrieves; saved_models/README.md lists the inputs."""

    asks_by: AsksBy
    has_features: bool = False
    is_filtered: bool = False

    @property
    def name(self) -> str:
        """Name of the signature."""
        verb = {"user": "retrieve_user", "history": "retrieve", "item": "similar"}[self.asks_by]
        return f"{verb}{'_with_features' * self.has_features}{'_filtered' * self.is_filtered}"

    @property
    def embed_name(self) -> str:
        """Name of the encoder's function, and of the signature, that embeds its queries."""
        # There is no "embed_item": the index has the vectors.
        side = {"user": "user", "history": "query", "item": "item"}[self.asks_by]
        return f"embed_{side}{'_with_features' * self.has_features}"


_UNFILTERED = (
    *(Retrieval("user"), Retrieval("history"), Retrieval("history", has_features=True)),
    Retrieval("item"),
)
RETRIEVALS = (*_UNFILTERED, *(replace(each, is_filtered=True) for each in _UNFILTERED))
DEFAULT_K = 100


def ask(signature: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Asks a signature of a loaded model."""
    specs = signature_inputs(signature)
    given = {n: tf.constant(array, specs[n].dtype, array.shape) for n, array in inputs.items()}
    return {name: tensor.numpy() for name, tensor in signature(**given).items()}


def completed(
    specs: Mapping[str, tf.TensorSpec], given: Mapping[str, Any], num_rows: Any
) -> dict[str, Any]:
    """Returns all inputs of a signature, in its order; absent ones are missing values, k is 1."""
    inputs = {}
    for name, spec in specs.items():
        if name in given:
            inputs[name] = given[name]
        elif spec.shape.rank == 0:
            inputs[name] = tf.constant(1, spec.dtype)
        else:
            shape = [num_rows, *(size or 0 for size in spec.shape[1:])]
            inputs[name] = tf.fill(shape, tf.constant(missing_value(spec.dtype), spec.dtype))
    return inputs


def missing_value(dtype: tf.DType) -> Any:
    """Returns the missing value of a type: NaN, an empty string, or the empty id."""
    if dtype.is_floating:
        return np.nan
    return b"" if dtype == tf.string else empty_id(dtype)


class LoadedTowers:
    """The towers of a version on disk.

    `saved_model` is what `tf.saved_model.load` returned for the module with exact search;
    `user_dtype` and `item_dtype` are the types of the ids, int64 or string. `features` are the
    fitted ones that the model reads, by side: "query" (the user's), "request" or "candidate".
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest = read_record(folder / publish.MANIFEST_FILE)
        except Damaged as error:
            raise Damaged(
                f"{error} A version's towers and index belong together: copy it whole, or export "
                "it again."
            ) from None
        is_scann = self.manifest["index"]["kind"] == "scann"
        place = publish.EXACT_FOLDER if is_scann else Path()
        self.saved_model: Any = tf.saved_model.load(str(folder / place))
        spec = self.saved_model.signatures["retrieve"].structured_input_signature[1]
        self.user_dtype, self.item_dtype = spec["user_id"].dtype, spec["history"].dtype
        self.features = features_of(self.manifest)

    def embed_queries(self, queries: Sequence[retrieval.Query]) -> np.ndarray:
        """Embeds queries, which are read and checked as in `retrieve`: [n, D] float32."""
        retrieval.check_queries(queries, ids_are_text=self.item_dtype == tf.string)
        return self._embedded(queries, "history")["embeddings"]

    def embed_candidates(
        self, item_ids: Sequence[Any], features: Mapping[str, Sequence[Any] | np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embeds items, which need not be in the index.

        Items new since the training are embedded by their `features`: [n] raw values by name, as
        in the item table; None is missing. Returns embeddings [n, D] float32, and is_known_item [n]
        bool: whether the training had the item. Raises a `ValueError` if a feature is missing.
        """
        raw = raw_columns(self.features["candidate"], features, len(item_ids))
        return self.embed_raw(item_ids, raw)

    def embed_raw(
        self, item_ids: Sequence[Any], raw: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embeds items as `embed_candidates`, by the arrays that `raw_columns` makes."""
        answer = self.saved_model.signatures["embed_candidate"](
            item_id=id_list(item_ids, self.item_dtype),
            **as_inputs(raw_signature(self.features["candidate"]), raw),
        )
        return answer["embeddings"].numpy(), answer["is_known_item"].numpy()

    def knows(self, item_ids: Sequence[Any]) -> np.ndarray:
        """Returns which items the training had, [n] bool; histories ignore all others."""
        nothing = {x.name: [None] * len(item_ids) for x in self.features["candidate"]}
        return self.embed_candidates(item_ids, nothing)[1]

    def stored_history(self, user_id: Any) -> list[Any]:
        """Returns the stored history of a user, most recent first; [] for an unknown user."""
        ids = self.saved_model.encoder.stored_history(id_list([user_id], self.user_dtype))
        return id_lists_of(ids.numpy())[0]

    def parse_id(self, text: str, of: Literal["user", "item"] = "item") -> Any:
        """Parses a typed id into the type of the model's ids, or raises a `ValueError`."""
        if (self.user_dtype if of == "user" else self.item_dtype) == tf.string:
            return text
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"This model's {of} ids are integers. Received: {text!r}") from None

    def parse_request(self, texts: Mapping[str, str]) -> dict[str, Any]:
        """Parses typed request features, and the timestamp.

        Commas separate lists; times are ISO 8601 with a time zone. Raises a `ValueError` if the
        model does not read a feature, or a value is of the wrong kind.
        """
        known = {feature.name: feature for feature in self.features["request"]}
        retrieval.check_requests([texts], known)
        return {name: known.get(name, Timestamp(name)).parse(text) for name, text in texts.items()}

    def _embedded(
        self, queries: Sequence[retrieval.Query], asks_by: AsksBy
    ) -> dict[str, np.ndarray]:
        """Asks two signatures, one about the queries with features and one about the others."""
        requests = [query.get("request") for query in queries]
        known = [feature.name for feature in self.features["request"]]
        retrieval.check_requests(requests, known, may_have_others=True)
        has_features = np.array([query.get("features") is not None for query in queries], bool)
        parts, order = [], []
        for which in np.unique(has_features) if len(queries) else [False]:
            places = np.flatnonzero(has_features == which).tolist()
            some = [queries[i] for i in places]
            given = self.raw_query_features(some) if which else {}
            function = self.saved_model.signatures[Retrieval(asks_by, bool(which)).embed_name]
            given |= query_inputs(function, some)
            given |= request_inputs(function, self.features, [requests[i] for i in places])
            parts.append({name: x.numpy() for name, x in function(**given).items()})
            order.append(places)
        back = np.argsort(np.concatenate(order))
        return {name: np.concatenate([part[name] for part in parts])[back] for name in parts[0]}

    def raw_query_features(self, queries: Sequence[retrieval.Query]) -> dict[str, tf.Tensor]:
        """Makes the inputs for given features, or raises a `ValueError` if one is unknown."""
        read = self.features["query"]
        names = [feature.name for feature in read]
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
        return as_inputs(raw_signature(read), raw_columns(read, columns, len(queries)))


def id_lists_of(ids: np.ndarray) -> list[list[Any]]:
    """Returns the ids in each row of [n, any] padded ids from a graph, where text is bytes."""
    if ids.dtype.kind == "i":
        return [row[row != -1].tolist() for row in ids]
    return [as_ids(id_ for id_ in row if id_ != b"") for row in ids.tolist()]


def as_ids(values: Iterable[Any]) -> list[Any]:
    """Returns the ids of a graph as Python's: text is text, not bytes."""
    return [x.decode(errors="replace") if isinstance(x, bytes) else x for x in values]
