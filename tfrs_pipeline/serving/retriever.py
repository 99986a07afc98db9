"""Loads an exported model and queries it from Python."""

import itertools
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow.parquet as pq
import tensorflow as tf

from tfrs_pipeline import retrieval
from tfrs_pipeline.durable import Damaged, read_record
from tfrs_pipeline.features.encoding import raw_columns, raw_signature
from tfrs_pipeline.features.numeric import Timestamp
from tfrs_pipeline.features.raw import to_text
from tfrs_pipeline.messages import suggest
from tfrs_pipeline.model import tf_tables
from tfrs_pipeline.model.encoder import (
    SavedEncoder,
    as_inputs,
    features_of,
    history_arrays,
    query_inputs,
    request_inputs,
)
from tfrs_pipeline.model.exclusions import left_out, rule_of_version
from tfrs_pipeline.model.tf_tables import as_ids, id_lists_of, signature_inputs
from tfrs_pipeline.retrieval import HISTORY_TIMESTAMPS, Excluded, Query, Retrieved, history_of
from tfrs_pipeline.serving import publish, signatures
from tfrs_pipeline.serving.candidates import Candidates, FilterValues
from tfrs_pipeline.serving.database import Store
from tfrs_pipeline.serving.index import Level, has_scann
from tfrs_pipeline.serving.live_items import Item, LiveItems
from tfrs_pipeline.serving.searcher import Searcher
from tfrs_pipeline.serving.user_events import Event, Journal, check_events
from tfrs_pipeline.serving.user_histories import Activity

logger = logging.getLogger(__name__)

Allowed: TypeAlias = Sequence[Collection[str]] | None
"""For each query, values of the item filter: items need one of them. An empty list allows all."""


def load(path: str | Path, *, exact: bool = False, live: bool = True) -> "LoadedRetriever":
    """Loads an exported model.

    Args:
        path: A version's folder, or a model's folder to load its newest complete version.
        exact: Whether to score every candidate, even if the version has a ScaNN index. Without
            ScaNN installed, every candidate is scored anyway, with a warning in the log.
        live: Whether to take in the items and events written since the export, and to allow
            `upsert`, `remove`, `record` and `forget`.

    Raises:
        FileNotFoundError: If there is no complete export at `path`.
        ValueError: If the version has the format of another version of this package.
        Damaged: If a file has changed since the export, or the file of live items is damaged.

    Example:
        >>> model = load("saved_models/videos")  # doctest: +SKIP
        >>> ids, scores = model.retrieve([{"history": ["v7", "v31"]}], k=10)  # doctest: +SKIP
    """
    return LoadedRetriever(publish.version_at(path), exact=exact, live=live)


class LoadedRetriever:
    """A `Retriever` on an exported model; see `load`.

    TensorFlow embeds queries and items. ScaNN's own searcher, or NumPy, finds the candidates.

    Attributes:
        activity: What users did since the training; None without user data or live writes.
        candidates: The items to retrieve, and their search.
        encoder: What the version holds of the users and items of its training.
        features: The fitted features that the model reads, by side: "query" (the user's), "request"
            or "candidate".
        folder: The version's folder.
        item_filter: "name" and "values" of the column that requests may filter by, or None.
        manifest: The content of the version's `manifest.json`.
        saved_model: What `tf.saved_model.load` returned. It searches exactly, without a filter.
        signatures: The inputs of all signatures that `answer` takes, by name.
        user_dtype, item_dtype: The types of the ids, int64 or string.
    """

    def __init__(self, folder: Path, *, exact: bool, live: bool) -> None:
        self.folder, self.manifest = folder, _manifest(folder)
        # The live items of a model lie beside its versions, so a copied version has none.
        is_live = live and folder.name.isdecimal()
        if is_live:
            # A damaged file is refused before the graph is loaded: TensorFlow keeps the graph's
            # tables, and a server, which tries again and again, would fill its memory with them.
            Store(folder.parent).items_after(2**62)
        self.saved_model: Any = tf.saved_model.load(str(folder))
        functions = self.saved_model.signatures
        self.signatures = {name: signature_inputs(functions[name]) for name in functions}
        spec = self.signatures["retrieve"]
        self.user_dtype, self.item_dtype = spec["user_id"].dtype, spec["history"].dtype
        self.encoder = SavedEncoder(self.saved_model.encoder)
        self.features = features_of(self.manifest)
        self.item_filter: dict[str, Any] | None = self.manifest["filter"]
        if self.item_filter is not None:
            # The SavedModel has no filter, so only this class answers these signatures.
            allowed = {"allowed": tf.TensorSpec([None, None], tf.string, "allowed")}
            self.signatures |= {
                f"{name}{signatures.FILTERED}": self.signatures[name] | allowed
                for name in signatures.RETRIEVALS
                if name in self.signatures
            }
        has_bonus = "bonuses" in functions["embed_query"].structured_outputs
        self._rule = rule_of_version(self.manifest, has_bonus=has_bonus)
        self._has_bias: bool = self.manifest.get("has_item_bias", False)
        index = self.manifest["index"]
        if index["kind"] == "scann" and not exact and not has_scann():
            logger.warning("ScaNN is not installed here: %s is searched exactly", folder)
            exact = True
        if exact:
            index = {}
        self.candidates = self._candidates(index.get("levels", ()))
        self._live: LiveItems | None = None
        self.activity: Activity | None = None
        if is_live:
            model, num_leaves = folder.parent, index.get("num_leaves", 0)
            self._live = LiveItems(
                model, self.manifest, self.candidates, self.embed_raw, num_leaves
            )
            if self.manifest["user_data"]:
                self.activity = Activity(model, self.encoder, self.manifest, self._rule)

    @property
    def excludes_known(self) -> bool:
        """Whether answers by user id leave out the items that the user clicked.

        They do as the rankings of the test did: not after `evaluation.exclude none`, nor with a
        repeat bonus.
        """
        return self._rule != "none"

    def _candidates(self, levels: Sequence[Mapping[str, int]]) -> Candidates:
        """Reads the candidates, and the index too, unless `levels` is empty."""
        items = pq.read_table(self.folder / publish.ITEMS_FILE)
        # A view, because a copy would double the memory.
        vectors = np.asarray(memoryview(self.saved_model.index.embeddings.read_value()))
        searcher = Searcher.load(self.folder / publish.INDEX_FOLDER) if levels else None
        values, codes = None, None
        if self.item_filter is not None:
            values = FilterValues()
            codes = values.encode(items[publish.FILTER_COLUMN])
        widths = [Level(**level) for level in levels]
        ids = items["item_id"].to_numpy()
        return Candidates(ids, vectors, searcher, widths, values, codes)

    def retrieve(
        self, queries: Sequence[Query], k: int, exclude: Excluded = None, *, allowed: Allowed = None
    ) -> Retrieved:
        """Retrieves the k best candidates of each query; see `Retriever.retrieve`.

        Excludes only `exclude`: items of the history, and those that a user is known to have
        clicked or disliked (`disliked_items`), are retrieved too. Reads only the history in the
        query; `retrieve_user` reads the stored history of a known user, and excludes its items if
        `excludes_known`. Items of a history that the training did not have are ignored; `knows`
        says which ones it had.

        Args:
            queries: See `Query`; all keys are optional. `features` replace all stored ones of the
                user. From the `timestamp` of `request` the model derives a missing hour or weekday
                and, if it reads times, the age of the history's items.
            k: See `Retriever.retrieve`.
            exclude: See `Retriever.retrieve`.
            allowed: Values of the item filter (`filter_by` of the export) for each query. Only
                items with one of them are retrieved; an empty list allows all.

        Raises:
            ValueError: If a query has another key, a user feature that the model does not read, or
                a request feature that looks misspelt (others are ignored); if `allowed` is given
                without an item filter, or holds a value that no item has.
        """
        ids, scores, _ = self._retrieved("embed_query", queries, k, exclude, allowed)
        return ids, scores

    def retrieve_user(
        self,
        user_ids: Sequence[Any],
        k: int,
        exclude: Excluded = None,
        *,
        allowed: Allowed = None,
        requests: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Retrieves by what users did until now, and excludes what they clicked and disliked.

        What they did is the stored history and the events recorded since, in time order. Users
        without either get the answer for an empty history. Clicks, stored and recorded, are
        excluded if `excludes_known`; views, in the log and recorded since, if the training's
        `evaluation.exclude` was seen; dislikes, in the log and recorded since, always. `exclude`
        adds ids to exclude. `allowed` and `requests` have one entry for each user, as in
        `retrieve`. Returns candidate_ids [n, k], scores [n, k] float32, is_known_user [n] bool.
        Raises as `retrieve`, and a `ValueError` if the model was exported without user data.
        """
        if not self.manifest["user_data"]:
            raise ValueError(
                "This model was exported without user data and knows no users. Ask by history: "
                "`retrieve`, or --history on the command line."
            )
        retrieval.check_collection("user_ids", user_ids)
        queries = [{"user_id": id_} for id_ in user_ids]
        if requests is not None:
            retrieval.check_one_each("requests", requests, len(queries))
            pairs = zip(queries, requests, strict=True)
            queries = [{**query, "request": request} for query, request in pairs]
        return self._retrieved("embed_user", queries, k, exclude, allowed)

    def similar(
        self, item_ids: Sequence[Any], k: int, exclude: Excluded = None, *, allowed: Allowed = None
    ) -> Retrieved:
        """Finds the k items most similar to each item, leaving out the item itself.

        Similar items answer the same queries; they need not be clicked or bought together. An
        item's vector is used like a query's. The score is the dot product of both vectors, plus the
        bias of the similar item if the model has one. The product is their cosine, as vectors have
        length 1, unless `model.normalize` is off or the tower is your own. `exclude` and `allowed`
        have one entry for each item, as in `retrieve`. Raises as `retrieve`, and a `ValueError` if
        an item is not a candidate.
        """
        retrieval.check_collection("item_ids", item_ids)
        retrieval.check_ids([item_ids], are_text=self.item_dtype == tf.string)
        self._check_request([{}] * len(item_ids), k, exclude, allowed)
        return self._searched(self._embedded_items(item_ids), k, exclude, allowed)

    def embed_queries(self, queries: Sequence[Query]) -> np.ndarray:
        """Embeds queries, which are read and checked as in `retrieve`: [n, D] float32."""
        retrieval.check_queries(queries, ids_are_text=self.item_dtype == tf.string)
        return self._embedded(queries, "embed_query")["embeddings"]

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
            item_id=tf_tables.id_list(item_ids, self.item_dtype),
            **as_inputs(raw_signature(self.features["candidate"]), raw),
        )
        return answer["embeddings"].numpy(), answer["is_known_item"].numpy()

    def knows(self, item_ids: Sequence[Any]) -> np.ndarray:
        """Returns which items the training had, [n] bool; histories ignore all others."""
        return self.encoder.has_items(item_ids)

    def record(self, events: Sequence[Mapping[str, Any]]) -> int:
        """Records what users did; it counts from the next query by user on.

        The events are on disk, beside the versions, when this returns; other processes that serve
        or load the model read them too. They outlive versions: one reads those that came after the
        end of its log. An event that is there already changes nothing.

        Args:
            events: Mappings of `user_id`, `item_id` and `type`: "click", "view" (shown), "dislike"
                or a stage of a log. Optional are `time` (a datetime with a zone, ISO 8601, or
                seconds since 1970; default: now), `request_id` (of the answer that it belongs to)
                and `event_id`, the client's own, which makes a repeat harmless.

        Returns:
            How many of the events are new.

        Raises:
            Damaged: If the file of events is damaged.
            StorageError: If the events cannot be put on disk; then none is recorded.
            ValueError: If an event has the wrong form; if the model was loaded without `live`, or
                from a folder that is not one of its versions.
        """
        return Journal(self.live.folder).write([self.checked_events(events)])[0]

    def forget(self, user_id: Any) -> int:
        """Deletes a user's recorded events, also from the file; returns how many there were.

        What a version holds of the user stays. Raises as `record`, and a `ValueError` if the id is
        of another type than the model's, because nothing would be deleted.
        """
        retrieval.check_ids([[user_id]], are_text=self.user_dtype == tf.string)
        return Journal(self.live.folder).forget([user_id])[0]

    def checked_events(self, events: Sequence[Mapping[str, Any]]) -> list[Event]:
        """Reads events as `record` does, or raises its `ValueError`."""
        users_are_text = self.user_dtype == tf.string
        items_are_text = self.item_dtype == tf.string
        return check_events(events, users_are_text=users_are_text, items_are_text=items_are_text)

    def stored_history(self, user_id: Any) -> list[Any]:
        """Returns the history of a user until now, most recent first; [] for an unknown user."""
        if self.activity is not None and (now := self.activity.until_now([user_id])):
            return now[0].history[::-1]
        (row,) = self.encoder.user_rows([user_id])
        return [item_id for item_id, _ in self.encoder.history(row)][::-1]

    def disliked_items(self, user_ids: Sequence[Any]) -> list[list[Any]]:
        """Returns what each user disliked until now, in the training's log and in service."""
        recent = {} if self.activity is None else self.activity.until_now(user_ids)
        return [
            recent[line].disliked if line in recent else self.encoder.disliked(row)
            for line, row in enumerate(self.encoder.user_rows(user_ids))
        ]

    def left_out(self, queries: Sequence[Query]) -> list[list[Any]]:
        """Returns what answers by history have to `exclude`, as answers by user id do themselves.

        For each query, this is what its user disliked and, if `excludes_known`, its history. A user
        whom the training did not have may have disliked items in service. What a user was only
        shown is not included, even if the model was trained with `evaluation.exclude` "seen".
        """
        disliked = self.disliked_items([query.get("user_id") for query in queries])
        return [
            left_out(self._rule, history_of(query), ids)
            for query, ids in zip(queries, disliked, strict=True)
        ]

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
        # After this check, only the timestamp can be absent from `known`.
        retrieval.check_requests([texts], known)
        return {name: known.get(name, Timestamp(name)).parse(text) for name, text in texts.items()}

    def _embedded(self, queries: Sequence[Query], embed_name: str) -> dict[str, Any]:
        """Embeds queries: those with features by one signature, the others by another."""
        requests = [query.get("request") for query in queries]
        known = [feature.name for feature in self.features["request"]]
        retrieval.check_requests(requests, known, may_have_others=True)
        has_features = np.array([query.get("features") is not None for query in queries], bool)
        parts = []
        # Each signature is called once, because a call costs more than a query in it. An empty
        # batch still needs a call: its answer has the shapes and the names.
        for with_features in np.unique(has_features) if len(queries) else [False]:
            lines = np.flatnonzero(has_features == with_features).tolist()
            some = [queries[line] for line in lines]
            inputs = self.raw_query_features(some) if with_features else {}
            name = f"{embed_name}_with_features" if with_features else embed_name
            function = self.saved_model.signatures[name]
            inputs |= query_inputs(function, some)
            inputs |= request_inputs(function, self.features, [requests[line] for line in lines])
            arrays = {key: tensor.numpy() for key, tensor in inputs.items()}
            parts.append((lines, self._embed(name, arrays)))
        return _in_order(parts)

    def _embed(self, name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Embeds by a signature; what differs in length by query comes as a list for each."""
        if name == "embed_user":
            return self._embedded_users(inputs)
        if name == signatures.SIMILAR:
            return self._embedded_items(as_ids(inputs["item_id"].tolist()))
        return self._asked(name, inputs)

    def _asked(self, name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        answer: dict[str, Any] = tf_tables.ask(self.saved_model.signatures[name], inputs)
        for key in {"known_items", "repeated_items"} & answer.keys():
            answer[key] = id_lists_of(answer[key])
        if "bonuses" in answer:
            answer["bonuses"] = [*answer["bonuses"]]
        return answer

    def _embedded_users(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Embeds users by what they did until now."""
        users, recent = as_ids(inputs["user_id"].tolist()), {}
        if self.activity is not None:
            recent = self.activity.until_now(users)
        stored = [line for line in range(len(users)) if line not in recent]
        parts: list[tuple[list[int], dict[str, Any]]] = []
        if stored or not users:  # By the history that the graph holds.
            arrays = {name: array[stored] for name, array in inputs.items()}
            part = self._asked("embed_user", arrays)
            # Absent where the model excludes neither known nor disliked items.
            part.setdefault("known_items", [[] for _ in stored])
            parts.append((stored, part))
        if recent:  # By the history until now.
            queries = [
                {"history": user.history, HISTORY_TIMESTAMPS: user.times}
                for user in recent.values()
            ]
            arrays = {name: array[[*recent]] for name, array in inputs.items()}
            signature = self.saved_model.signatures["embed_query"]
            arrays |= history_arrays(signature_inputs(signature), queries)
            part = self._asked("embed_query", arrays)
            part["is_known_user"][:] = True
            part["known_items"] = [user.excluded for user in recent.values()]
            parts.append(([*recent], part))
        return _in_order(parts)

    def raw_query_features(self, queries: Sequence[Query]) -> dict[str, tf.Tensor]:
        """Makes the inputs for the queries' features; a `ValueError` if one is unknown."""
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

    def upsert(self, items: Sequence[Item]) -> int:
        """Adds items, or replaces those with the same ids, for all later queries.

        An item that training did not have is embedded by its features, as in a refresh. The items
        are on disk, beside the versions, when this returns; other processes that serve or load the
        model take them in too. A newer version's own items beat earlier writes.

        Args:
            items: Mappings of `item_id` and raw values by the names of the log's item table: each
                feature that the model reads, and the column of the item filter. None is missing.
                Several values come as a list, or as a text that is split as in the log's files.
                The server's page shows a `title`; other values are kept for later versions.

        Returns:
            How many of the items are new.

        Raises:
            Damaged: If the file of live items is damaged.
            StorageError: If the items cannot be put on disk, or the file of live items was deleted
                or restored since the model was loaded; then nothing has changed.
            ValueError: If an item has the wrong form, or cannot be embedded; if the model was
                loaded without `live`, or from a folder that is not one of its versions.
        """
        return self.live.write(self.live.prepare(items))[0]

    def remove(self, item_ids: Sequence[Any]) -> int:
        """Removes items from all later answers; returns how many there were. Raises as `upsert`."""
        return self.live.write(self.live.prepare(removed=item_ids))[1]

    def catch_up(self) -> None:
        """Takes in the items that other processes have written since the last call or write."""
        if self._live is not None:
            self._live.catch_up()

    @property
    def live(self) -> LiveItems:
        """The items written in service; raises a `ValueError` as `upsert`."""
        if self._live is None:
            raise ValueError(
                "This model takes no items: load it with live=True, by its own folder or one of "
                f"the versions in it. Received: {self.folder}"
            )
        return self._live

    @property
    def num_candidates(self) -> int:
        """Number of candidates."""
        return len(self.candidates)

    def candidate_ids(self) -> list[Any]:
        """Returns the ids of the candidates, in the order of their embeddings.

        If another thread may write meanwhile, take both from `candidates.ids_and_vectors()`.
        """
        return self.candidates.ids_and_vectors()[0].tolist()

    def candidate_embeddings(self) -> np.ndarray:
        """Returns the embeddings of the candidates: [num_candidates, D] float32."""
        return self.candidates.ids_and_vectors()[1]

    def held_out_queries(self) -> list[Query]:
        """Reads the queries stored with the export, 1,000 at most."""
        return pq.read_table(self.folder / publish.QUERIES_FILE).to_pylist()

    def titles(self) -> dict[Any, str]:
        """Reads the titles of items by id, live ones included; empty if they have none."""
        items = pq.read_table(self.folder / publish.ITEMS_FILE)
        titles = {}
        if "title" in items.column_names:
            columns = (items[name].to_pylist() for name in ("item_id", "title"))
            titles = dict(zip(*columns, strict=True))
        # A live write without a title keeps the title of the version.
        live = {} if self._live is None else dict(self._live.titles)
        return titles | {id_: title for id_, title in live.items() if title is not None}

    def _retrieved(
        self, embed_name: str, queries: Sequence[Query], k: int, exclude: Excluded, allowed: Allowed
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Checks the arguments, embeds the queries, and searches."""
        self._check_request(queries, k, exclude, allowed)
        embedded = self._embedded(queries, embed_name)
        return *self._searched(embedded, k, exclude, allowed), embedded["is_known_user"]

    def answer(
        self, signature: str, inputs: Mapping[str, np.ndarray], *, exact: bool = False
    ) -> dict[str, np.ndarray]:
        """Answers one of `signatures` as the SavedModel does, with live items and filters too.

        With `exact`, every candidate is scored. Raises an `UnknownItem` for `similar`.
        """
        if signature == signatures.DEFAULT_SIGNATURE:
            signature, users = "retrieve_user", inputs["user_id"]
            request = {**inputs, "k": np.int32(signatures.DEFAULT_K)}
            full = tf_tables.completed(self.signatures[signature], request, len(users))
            inputs = {name: np.asarray(value) for name, value in full.items()}
        # TensorFlow only embeds: the SavedModel's own search knows neither filters nor live items.
        embed_name = signatures.RETRIEVALS.get(signature.removesuffix(signatures.FILTERED))
        if embed_name is None:
            return tf_tables.ask(self.saved_model.signatures[signature], inputs)
        query = {name: x for name, x in inputs.items() if name not in ("exclude", "allowed", "k")}
        embedded = self._embed(embed_name, query)
        exclude = id_lists_of(inputs["exclude"])
        allowed = id_lists_of(inputs["allowed"]) if "allowed" in inputs else None
        ids, scores = self._searched(embedded, int(inputs["k"]), exclude, allowed, exact=exact)
        # These are for the search alone; the SavedModel does not return them either.
        not_answered = ("embeddings", "known_items", "repeated_items", "bonuses")
        known = {name: values for name, values in embedded.items() if name not in not_answered}
        return {"candidate_ids": ids, "scores": scores, **known}

    def _embedded_items(self, item_ids: Sequence[Any]) -> dict[str, Any]:
        """Makes queries of items, which exclude the item itself."""
        vectors = self.candidates.vectors_of(item_ids)  # A copy.
        if self._has_bias:
            vectors[:, -1] = 1  # As in a query: the item's own bias does not count.
        return {"embeddings": vectors, "known_items": [[id_] for id_ in item_ids]}

    def _searched(
        self,
        embedded: Mapping[str, Any],
        k: int,
        exclude: Excluded,
        allowed: Allowed,
        *,
        exact: bool = False,
    ) -> Retrieved:
        if (lists := embedded.get("known_items")) is not None:
            more = [()] * len(lists) if exclude is None else exclude
            exclude = [[*known_ids, *ids] for known_ids, ids in zip(lists, more, strict=True)]
        bonuses = None
        if "bonuses" in embedded:
            bonuses = zip(embedded["repeated_items"], embedded["bonuses"], strict=True)
        return self.candidates.search(
            embedded["embeddings"], k, exclude, allowed, exact=exact, bonuses=bonuses
        )

    def _check_request(
        self, queries: Sequence[Query], k: int, exclude: Excluded, allowed: Allowed
    ) -> None:
        retrieval.check_asked(queries, k, exclude, ids_are_text=self.item_dtype == tf.string)
        if allowed is None:
            return
        if self.item_filter is None:
            raise ValueError("This model has no item filter: export it with filter_by.")
        retrieval.check_one_each("allowed", allowed, len(queries))
        assert self.candidates.values is not None
        known = self.candidates.values.code_of
        # Here a misspelt value is an error. Over HTTP it finds nothing, because a client may be
        # ahead of the items.
        for value in itertools.chain.from_iterable(allowed):
            if to_text(value) not in known:
                hint = suggest(str(value), known)
                raise ValueError(f"No item has {value!r} as its {self.item_filter['name']}; {hint}")


def _in_order(parts: Sequence[tuple[Sequence[int], Mapping[str, Any]]]) -> dict[str, Any]:
    """Joins what was computed for some lines of a batch each, in the order of the lines."""
    back = np.argsort(np.concatenate([lines for lines, _ in parts]))
    joined: dict[str, Any] = {}
    for name, first in parts[0][1].items():
        values = [part[name] for _, part in parts]
        if isinstance(first, np.ndarray):
            joined[name] = np.concatenate(values)[back]
        else:  # A list for each line, of any length.
            lists = [*itertools.chain.from_iterable(values)]
            joined[name] = [lists[line] for line in back]
    return joined


def _manifest(folder: Path) -> dict[str, Any]:
    """Reads a version's manifest, and refuses a version that is damaged or of another format."""
    try:
        manifest = read_record(folder / publish.MANIFEST_FILE)
    except Damaged as error:
        raise Damaged(
            f"{error} A version's towers and index belong together: copy it whole, or export it "
            "again."
        ) from None
    if (number := manifest.get("format", 1)) != publish.FORMAT:
        raise ValueError(
            f"{folder} was exported by another version of this package: its format is {number}, "
            f"and this one reads {publish.FORMAT}. Export the model again; a run that would "
            "compare its model with this version needs --no-export.gate."
        )
    return manifest
