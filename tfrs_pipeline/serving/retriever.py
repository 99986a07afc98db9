"""Loads an exported model and queries it from Python."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import tensorflow as tf

from tfrs_pipeline import retrieval
from tfrs_pipeline.durable import Damaged, read_record
from tfrs_pipeline.features.encoding import raw_columns, raw_signature
from tfrs_pipeline.features.raw import to_text
from tfrs_pipeline.features.timestamp import Timestamp
from tfrs_pipeline.messages import suggest
from tfrs_pipeline.model.encoder import as_inputs, features_of, query_inputs, request_inputs
from tfrs_pipeline.model.graph import id_list, signature_inputs
from tfrs_pipeline.serving import publish
from tfrs_pipeline.serving.candidates import Candidates
from tfrs_pipeline.serving.graph_index import read_saved_index
from tfrs_pipeline.serving.index import Level
from tfrs_pipeline.serving.item_values import ItemValues
from tfrs_pipeline.serving.journal import Journal
from tfrs_pipeline.serving.live import Item, LiveItems
from tfrs_pipeline.serving.searcher import Searcher
from tfrs_pipeline.serving.signatures import Retrieval, ask
from tfrs_pipeline.serving.similar import find_similar


def load(path: str | Path, *, exact: bool = False, live: bool = True) -> "LoadedRetriever":
    """Loads an exported model.

    Args:
        path: A version's folder, or a model's folder to load its newest complete version.
        exact: Whether to score all candidates, also if there is a ScaNN index.
        live: Whether to take in the items written since the export, and to allow `upsert` and
            `remove`.

    Raises:
        FileNotFoundError: If there is no complete export at `path`.
        ImportError: If the index needs the package scann and it is not installed.
        Damaged: If a file has changed since the export.
    """
    return LoadedRetriever(publish.version_at(path), exact=exact, live=live)


class LoadedRetriever:
    """A `Retriever` on an exported model; see `load`.

    TensorFlow embeds the queries. The search is ScaNN's own or NumPy's, so that a TensorFlow for
    which ScaNN has no operation will do.

    Attributes:
        folder: The version's folder.
        manifest: The content of `manifest.json`.
        saved_model: What `tf.saved_model.load` returned, of a module that needs no operation.
        candidates: The items to retrieve, and their search.
        user_dtype: Type of the user ids, int64 or string.
        item_dtype: Type of the item ids.
        features: The fitted features that the model reads, by side: "query" (the user's), "request"
            or "candidate".
        item_filter: "name" and "values" of the column that requests may filter by, or None.
    """

    def __init__(self, folder: Path, *, exact: bool, live: bool) -> None:
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
        self.item_filter: dict[str, Any] | None = self.manifest["filter"]
        self.features = features_of(self.manifest)
        self._has_bias: bool = self.manifest.get("has_item_bias", False)
        self.candidates = self._candidates(with_index=is_scann and not exact)
        self._live: LiveItems | None = None
        if live and folder.name.isdecimal():
            self._live = LiveItems(
                self.candidates,
                Journal(folder.parent),
                int(folder.name),
                self.features["candidate"],
                self.item_filter and self.item_filter["name"],
                self.manifest["index"]["num_leaves"] if is_scann and not exact else 0,
                self.embed_candidates,
            )

    def _candidates(self, *, with_index: bool) -> Candidates:
        ids = pq.read_table(self.folder / publish.ITEMS_FILE, columns=["item_id"])["item_id"]
        # A view, because a copy would double the memory.
        vectors = np.asarray(memoryview(self.saved_model.exact.embeddings.read_value()))
        searcher, values, codes = None, None, None
        levels: tuple[Level, ...] = ()
        if with_index:
            searcher = Searcher.load(read_saved_index(self.folder), vectors)
            levels = tuple(Level(**level) for level in self.manifest["index"]["levels"])
        if self.item_filter is not None:
            codes = self.saved_model._item_filter._codes.numpy()[1:]
            values = ItemValues(self.item_filter["values"], codes)
        return Candidates(ids.to_numpy(), vectors, searcher, levels, values, codes)

    def retrieve(
        self,
        queries: Sequence[retrieval.Query],
        k: int,
        exclude: retrieval.Excluded = None,
        *,
        allowed: Sequence[Collection[str]] | None = None,
    ) -> retrieval.Retrieved:
        """Retrieves the k best candidates of each query; see `Retriever.retrieve`.

        Excludes only `exclude`; items that a user is known to have clicked are retrieved too.

        Args:
            queries: Each may have `user_id`, `history`, `history_timestamps`, `features` and
                `request`. `features` are raw values by name; they replace all stored ones of the
                user. `request` holds raw request features, all optional, and `timestamp`, an aware
                datetime. From it the model derives a missing hour or weekday and, if it reads
                times, the age of the history's items.
            k: See `Retriever.retrieve`.
            exclude: See `Retriever.retrieve`.
            allowed: Values of the item filter (`filter_by` of the export) for each query. Only
                items with one of them are retrieved; an empty list allows all.

        Raises:
            ValueError: If a query has another key, a user feature that the model does not read, or
                a request feature that looks misspelt (others are ignored); if `allowed` is given
                without an item filter, or holds a value that no item has.
        """
        ids, scores, _ = self._retrieved(queries, "history", k, exclude, allowed)
        return ids, scores

    def retrieve_user(
        self,
        user_ids: Sequence[Any],
        k: int,
        exclude: retrieval.Excluded = None,
        *,
        allowed: Sequence[Collection[str]] | None = None,
        requests: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Retrieves by users' stored histories, and excludes their known positives.

        Unknown users get the answer for an empty history. `exclude` adds ids to exclude. `allowed`
        and `requests` have one entry for each user, as in `retrieve`.

        Returns:
            candidate_ids [n, k], scores [n, k] float32, is_known_user [n] bool.

        Raises:
            ValueError: As for `retrieve`; if the model was exported without user data, or an id
                has the wrong type.
        """
        if not self.manifest["user_data"]:
            raise ValueError(
                "This model was exported without user data and knows no users. Ask by history: "
                "`retrieve`, or --history on the command line."
            )
        if isinstance(user_ids, str):
            raise ValueError(f"User ids come in a list, also a single one: [{user_ids!r}]")
        queries = [{"user_id": id_} for id_ in user_ids]
        if requests is not None:
            retrieval.check_one_each("requests", requests, len(queries))
            queries = [{**x, "request": y} for x, y in zip(queries, requests, strict=True)]
        return self._retrieved(queries, "user", k, exclude, allowed)

    def similar(
        self,
        item_ids: Sequence[Any],
        k: int,
        exclude: retrieval.Excluded = None,
        *,
        allowed: Sequence[Collection[str]] | None = None,
    ) -> retrieval.Retrieved:
        """Finds the k items most similar to each item, which is left out itself.

        They answer the same queries; they need not be clicked or bought together. An item's vector
        searches as a query's does, so the score is the dot product of both vectors: their cosine,
        as they have length 1 unless `model.normalize` is off or the tower is your own, plus the
        bias of the item that is found, if the model has one. `exclude` and `allowed` have one entry
        for each item, as in `retrieve`.

        Raises:
            ValueError: If an item is not among the candidates; otherwise as for `retrieve`.
        """
        if isinstance(item_ids, str):
            raise ValueError(f"Item ids come in a list, also a single one: [{item_ids!r}]")
        is_text = self.item_dtype == tf.string
        retrieval.check_ids([item_ids], are_text=is_text)
        retrieval.check_asked([{}] * len(item_ids), k, exclude, ids_are_text=is_text)
        if allowed is not None:
            self._check_allowed(allowed, len(item_ids))
        limits = k, exclude, allowed
        return find_similar(self.candidates, item_ids, *limits, has_bias=self._has_bias)

    def upsert(self, items: Sequence[Item]) -> int:
        """Adds items, or replaces those with the same ids, for all later queries.

        An item that training did not have is embedded by its features, as in a refresh. The items
        are on disk, beside the versions, when this returns; other processes that serve or load the
        model take them in too. A newer version that knows an item itself goes before them. To
        replace the whole catalogue, `refresh_index` is the way.

        Args:
            items: Mappings of `item_id` and raw values by the names of the log's item table: each
                feature that the model reads, and the column of the item filter. None is missing.
                A `title` is shown; other values are kept for later versions.

        Returns:
            How many of the items are new.

        Raises:
            Damaged: If the file of live items has changed since it was written.
            StorageError: If the items cannot be put on disk; then nothing has changed.
            ValueError: If an item has the wrong form, or cannot be embedded; if the model was
                loaded without `live`, or from a folder that is not one of its versions.
        """
        return self._writable.upsert(items)

    def remove(self, item_ids: Sequence[Any]) -> int:
        """Removes items from all later answers; unknown ids are ignored. Raises as `upsert`.

        Returns:
            How many of the items there were.
        """
        return self._writable.remove(item_ids)

    def catch_up(self) -> None:
        """Takes in the items that other processes have written since the last call or write."""
        if self._live is not None:
            self._live.catch_up()

    @property
    def _writable(self) -> LiveItems:
        if self._live is None:
            raise ValueError(
                "This model takes no items: load it with live=True, by its own folder or one of "
                f"the versions in it. Received: {self.folder}"
            )
        return self._live

    def embed_queries(self, queries: Sequence[retrieval.Query]) -> np.ndarray:
        """Embeds queries, which are read and checked as in `retrieve`: [n, D] float32."""
        retrieval.check_queries(queries, ids_are_text=self.item_dtype == tf.string)
        names = [Retrieval("history", has_features).embed_name for has_features in (False, True)]
        return self._embedded(queries, names)["embeddings"]

    def embed_candidates(
        self, item_ids: Sequence[Any], features: Mapping[str, Sequence[Any] | np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embeds items, which need not be in the index.

        Items new since the training are embedded by their `features`: [n] raw values by name, as
        in the item table; None is missing. Raises a `ValueError` if a whole feature is missing.

        Returns:
            embeddings [n, D] float32, is_known_item [n] bool: whether the training had the item.
        """
        read = self.features["candidate"]
        raw = as_inputs(raw_signature(read), raw_columns(read, features, len(item_ids)))
        answer = self.saved_model.signatures["embed_candidate"](
            item_id=id_list(item_ids, self.item_dtype), **raw
        )
        return answer["embeddings"].numpy(), answer["is_known_item"].numpy()

    def knows(self, item_ids: Sequence[Any]) -> np.ndarray:
        """Returns which items the training had, [n] bool; histories ignore all others."""
        nothing = {x.name: [None] * len(item_ids) for x in self.features["candidate"]}
        return self.embed_candidates(item_ids, nothing)[1]

    def stored_history(self, user_id: Any) -> list[Any]:
        """Returns the stored history of a user, most recent first; [] for an unknown user."""
        ids = self.saved_model.encoder.stored_history(id_list([user_id], self.user_dtype))
        return _id_lists(ids.numpy())[0]

    def parse_user_id(self, text: str) -> Any:
        """Parses a typed user id into the type of the model's ids, or raises a `ValueError`."""
        return _parse_id(text, self.user_dtype, "user")

    def parse_item_id(self, text: str) -> Any:
        """Parses a typed item id into the type of the model's ids, or raises a `ValueError`."""
        return _parse_id(text, self.item_dtype, "item")

    def parse_request(self, texts: Mapping[str, str]) -> dict[str, Any]:
        """Parses typed request features, and the timestamp.

        Commas separate lists; times are ISO 8601 with a time zone. Raises a `ValueError` if the
        model does not read a feature, or a value is of the wrong kind.
        """
        retrieval.check_requests([texts], self._request_names)
        known = {feature.name: feature for feature in self.features["request"]}
        return {name: known.get(name, Timestamp(name)).parse(text) for name, text in texts.items()}

    @property
    def num_candidates(self) -> int:
        """Number of candidates."""
        return len(self.candidates)

    def candidate_ids(self) -> list[Any]:
        """Returns the ids of the candidates, in the order of their embeddings."""
        ids: list[Any] = self.candidates.ids().tolist()
        return ids

    def candidate_embeddings(self) -> np.ndarray:
        """Returns the embeddings of the candidates: [num_candidates, D] float32."""
        return self.candidates.vectors()

    def held_out_queries(self) -> list[retrieval.Query]:
        """Reads the queries stored with the export, 1,000 at most."""
        return pq.read_table(self.folder / publish.QUERIES_FILE).to_pylist()

    def title_of(self, item_id: Any) -> str | None:
        """Returns the title that an item was written with, None if it is not a live item."""
        return None if self._live is None else self._live.title_of(item_id)

    def live_search_lines(self) -> dict[Any, str]:
        """Returns what a search by words looks through, by the id of each live item."""
        ids = () if self._live is None else self._live.ids()
        return {id_: search_line(id_, self.title_of(id_)) for id_ in ids}

    def titles(self) -> dict[Any, str]:
        """Reads the titles of the version's own items by id; empty if they have none."""
        items = pq.read_table(self.folder / publish.ITEMS_FILE).to_pydict()
        return dict(zip(items["item_id"], items["title"], strict=True)) if "title" in items else {}

    def _retrieved(
        self,
        queries: Sequence[retrieval.Query],
        asks_by: Literal["user", "history"],
        k: int,
        exclude: retrieval.Excluded,
        allowed: Sequence[Collection[str]] | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Checks the arguments, embeds the queries, and searches."""
        retrieval.check_asked(queries, k, exclude, ids_are_text=self.item_dtype == tf.string)
        if allowed is not None:
            self._check_allowed(allowed, len(queries))
        names = [Retrieval(asks_by, has_features).embed_name for has_features in (False, True)]
        embedded = self._embedded(queries, names)
        found = self._searched(embedded, k, exclude, allowed)
        return *found, embedded["is_known_user"]

    def answer(
        self, asked: Retrieval, inputs: Mapping[str, np.ndarray], *, exact: bool = False
    ) -> dict[str, np.ndarray]:
        """Answers a signature that retrieves as the SavedModel does, with live items too."""
        lists = (inputs.get(name) for name in ("exclude", "allowed"))
        exclude, allowed = (None if x is None else _id_lists(x) for x in lists)
        limits = int(inputs["k"]), exclude, allowed
        if asked.asks_by == "item":
            of_items = self.candidates, _as_ids(inputs["item_id"].tolist()), *limits
            ids, scores = find_similar(*of_items, has_bias=self._has_bias, exact=exact)
            return {"candidate_ids": ids, "scores": scores}
        function = self.saved_model.signatures[asked.embed_name]
        embedded = ask(function, {name: inputs[name] for name in signature_inputs(function)})
        ids, scores = self._searched(embedded, *limits, exact=exact)
        is_known_user = embedded["is_known_user"]
        return {"candidate_ids": ids, "scores": scores, "is_known_user": is_known_user}

    def _searched(
        self,
        embedded: Mapping[str, np.ndarray],
        k: int,
        exclude: retrieval.Excluded,
        allowed: Sequence[Collection[str]] | None,
        *,
        exact: bool = False,
    ) -> retrieval.Retrieved:
        if (known := embedded.get("known_items")) is not None:
            lists = _id_lists(known)
            exclude = [[*x, *y] for x, y in zip(lists, exclude or [()] * len(lists), strict=True)]
        return self.candidates.search(embedded["embeddings"], k, exclude, allowed, exact=exact)

    def _embedded(
        self, queries: Sequence[retrieval.Query], names: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Asks the first signature about queries without features, the second about the rest."""
        requests = [query.get("request") for query in queries]
        retrieval.check_requests(requests, self._request_names, may_have_others=True)
        has_features = np.array([query.get("features") is not None for query in queries], bool)
        parts, order = [], []
        for which in np.unique(has_features) if len(queries) else [False]:
            places = np.flatnonzero(has_features == which).tolist()
            some = [queries[i] for i in places]
            given = self.raw_query_features(some) if which else {}
            function = self.saved_model.signatures[names[int(which)]]
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

    @property
    def _request_names(self) -> list[str]:
        return [feature.name for feature in self.features["request"]]

    def _check_allowed(self, allowed: Sequence[Collection[str]], num_queries: int) -> None:
        if self.item_filter is None:
            raise ValueError("This model has no item filter: export it with filter_by.")
        retrieval.check_one_each("allowed", allowed, num_queries)
        assert self.candidates.values is not None
        known = self.candidates.values.code_of
        unknown = next(
            (value for values in allowed for value in values if to_text(value) not in known), None
        )
        if unknown is not None:
            hint = suggest(str(unknown), known)
            raise ValueError(f"No item has {unknown!r} as its {self.item_filter['name']}; {hint}")


def search_line(item_id: Any, title: str | None) -> str:
    """Returns what a search by words looks through: an item's title and id."""
    return f"{title or ''} {item_id}".casefold()


def _parse_id(text: str, dtype: tf.DType, what: str) -> Any:
    if dtype == tf.string:
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"This model's {what} ids are integers. Received: {text!r}") from None


def _id_lists(ids: np.ndarray) -> list[list[Any]]:
    """Returns the ids in each row of [n, any] padded ids of a graph, which are bytes if text."""
    if ids.dtype.kind == "i":
        return [row[row != -1].tolist() for row in ids]
    return [_as_ids(id_ for id_ in row if id_ != b"") for row in ids.tolist()]


def _as_ids(values: Iterable[Any]) -> list[Any]:
    return [x.decode(errors="replace") if isinstance(x, bytes) else x for x in values]
