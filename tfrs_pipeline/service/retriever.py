"""Loads an exported model and queries it from Python."""

import itertools
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow.parquet as pq
import tensorflow as tf

from tfrs_pipeline import retrieval
from tfrs_pipeline.durable import Damaged, read_record
from tfrs_pipeline.export.encoder import (
    SavedEncoder,
    feature_arrays,
    features_of,
    join_lines,
    query_arrays,
)
from tfrs_pipeline.features.encoding import raw_columns
from tfrs_pipeline.features.raw import to_text
from tfrs_pipeline.messages import suggest
from tfrs_pipeline.model.tf_tables import as_ids, id_lists_of, signature_inputs
from tfrs_pipeline.retrieval import Excluded, Query, Retrieved, history_of
from tfrs_pipeline.search.candidates import Candidates, FilterValues
from tfrs_pipeline.search.exclusions import left_out_by_history, rule_of_version
from tfrs_pipeline.search.searcher import Searcher
from tfrs_pipeline.search.settings import Level, has_scann
from tfrs_pipeline.service import publish
from tfrs_pipeline.service.live_items import Item, LiveItems, Store
from tfrs_pipeline.service.user_events import Event, Journal, check_events
from tfrs_pipeline.service.user_histories import Activity

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
        encoder: Embeds users, queries and items, parses ids, and has what the version holds of the
            users and items of its training.
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
            Store(folder.parent).check()
        self.saved_model: Any = tf.saved_model.load(str(folder))
        functions = self.saved_model.signatures
        self.signatures = {
            name: signature_inputs(functions[name])
            for name in functions
            if name != publish.DEFAULT_SIGNATURE  # The server answers it as `retrieve_user`.
        }
        self.encoder = SavedEncoder(self.saved_model.encoder)
        self.user_dtype, self.item_dtype = self.encoder.user_dtype, self.encoder.item_dtype
        self.features = features_of(self.manifest)
        self.item_filter: dict[str, Any] | None = self.manifest["filter"]
        if self.item_filter is not None:
            # The SavedModel has no filter, so only this class answers these signatures.
            allowed = {"allowed": tf.TensorSpec([None, None], tf.string, "allowed")}
            self.signatures |= {
                f"{name}{publish.FILTERED}": self.signatures[name] | allowed
                for name in publish.RETRIEVALS
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
            self._live = LiveItems(model, self.manifest, self.candidates, self.encoder, num_leaves)
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
        self._check_request(queries, k, exclude, allowed)
        answer = self._search(self._embed_queries(queries), k, exclude, allowed)
        return answer["candidate_ids"], answer["scores"]

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
        self._check_request(queries, k, exclude, allowed)
        embedded = self._embed("embed_user", self._arrays("embed_user", queries))
        answer = self._search(embedded, k, exclude, allowed)
        return answer["candidate_ids"], answer["scores"], answer["is_known_user"]

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
        retrieval.check_ids([item_ids], are_text=self.encoder.items_are_text)
        self._check_request([{}] * len(item_ids), k, exclude, allowed)
        answer = self._search(self._item_queries(item_ids), k, exclude, allowed)
        return answer["candidate_ids"], answer["scores"]

    def embed_queries(self, queries: Sequence[Query]) -> np.ndarray:
        """Embeds queries, which are read and checked as in `retrieve`: [n, D] float32."""
        retrieval.check_queries(queries, ids_are_text=self.encoder.items_are_text)
        return self._embed_queries(queries)["embeddings"]

    def embed_candidates(
        self, item_ids: Sequence[Any], features: Mapping[str, Sequence[Any] | np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embeds items, which need not be in the index.

        Items new since the training are embedded by their `features`: [n] raw values by name, as
        in the item table; None is missing. Returns embeddings [n, D] float32, and is_known_item [n]
        bool: whether the training had the item. Raises a `ValueError` if a feature is missing.
        """
        read = self.features["candidate"]
        return self.encoder.embed_items(item_ids, read, raw_columns(read, features, len(item_ids)))

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
        retrieval.check_ids([[user_id]], are_text=self.encoder.users_are_text)
        return Journal(self.live.folder).forget([user_id])[0]

    def checked_events(self, events: Sequence[Mapping[str, Any]]) -> list[Event]:
        """Reads events as `record` does, or raises its `ValueError`."""
        return check_events(
            events,
            users_are_text=self.encoder.users_are_text,
            items_are_text=self.encoder.items_are_text,
        )

    def stored_history(self, user_id: Any) -> list[Any]:
        """Returns the history of a user until now, most recent first; [] for an unknown user."""
        if self.activity is not None and (now := self.activity.until_now([user_id])):
            return now[0].history[::-1]
        (row,) = self.encoder.user_rows([user_id])
        return [item_id for item_id, _ in self.encoder.history(row)][::-1]

    def disliked_items(self, user_ids: Sequence[Any]) -> list[list[Any]]:
        """Returns what each user disliked until now, in the training's log and in service."""
        return [disliked for _, disliked in self._known_and_disliked(user_ids)]

    def _known_and_disliked(self, user_ids: Sequence[Any]) -> list[tuple[list[Any], list[Any]]]:
        recent = {} if self.activity is None else self.activity.until_now(user_ids)
        return [
            (recent[line].known, recent[line].disliked)
            if line in recent
            else (self.encoder.known(row), self.encoder.disliked(row))
            for line, row in enumerate(self.encoder.user_rows(user_ids))
        ]

    def left_out(self, queries: Sequence[Query]) -> list[list[Any]]:
        """Returns what answers by history have to `exclude`, as answers by user id do themselves.

        For each query, this is what its user disliked and, if `excludes_known`, its history; if the
        model was trained with `evaluation.exclude` "seen", also what its user has seen. A user whom
        the training did not have may have seen or disliked items in service.
        """
        users = self._known_and_disliked([query.get("user_id") for query in queries])
        return [
            left_out_by_history(self._rule, history_of(query), *known_and_disliked)
            for query, known_and_disliked in zip(queries, users, strict=True)
        ]

    def _embed_queries(self, queries: Sequence[Query]) -> dict[str, Any]:
        """Embeds queries by their history, those with features by a signature of their own."""
        has_features = np.array([query.get("features") is not None for query in queries], bool)
        parts = []
        # Each signature is called once, because a call costs more than a query in it. An empty
        # batch still needs a call: its answer has the shapes and the names.
        for with_features in np.unique(has_features) if len(queries) else [False]:
            lines = np.flatnonzero(has_features == with_features).tolist()
            some = [queries[line] for line in lines]
            name = "embed_query_with_features" if with_features else "embed_query"
            arrays = self._arrays(name, some)
            if with_features:
                arrays |= feature_arrays(self.features["query"], some)
            parts.append((lines, self._embed(name, arrays)))
        return join_lines(parts)

    def _arrays(self, name: str, queries: Sequence[Query]) -> dict[str, np.ndarray]:
        """Makes the inputs of a signature, but for the features of users."""
        requests = [query.get("request") for query in queries]
        known = [feature.name for feature in self.features["request"]]
        retrieval.check_requests(requests, known, may_have_others=True)
        return query_arrays(self.signatures[name], self.features, queries)

    def _embed(self, name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Embeds by the inputs of a signature: users by what they did until now."""
        if name == "embed_user" and self.activity is not None:
            return self.activity.embed(arrays)
        if name == publish.SIMILAR:
            return self._item_queries(as_ids(arrays["item_id"].tolist()))
        return self.encoder.embed(name, arrays)

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

    def answer(
        self, signature: str, inputs: Mapping[str, np.ndarray], *, exact: bool = False
    ) -> dict[str, np.ndarray]:
        """Answers one of `signatures` as the SavedModel does, with live items and filters too.

        With `exact`, every candidate is scored. Raises an `UnknownItem` for `similar`.
        """
        # TensorFlow only embeds: the SavedModel's own search knows neither filters nor live items.
        embed_name = publish.RETRIEVALS.get(signature.removesuffix(publish.FILTERED))
        if embed_name is None:
            return self.encoder.call(signature, inputs)
        query = {name: x for name, x in inputs.items() if name not in ("exclude", "allowed", "k")}
        exclude = id_lists_of(inputs["exclude"])
        allowed = id_lists_of(inputs["allowed"]) if "allowed" in inputs else None
        embedded = self._embed(embed_name, query)
        return self._search(embedded, int(inputs["k"]), exclude, allowed, exact=exact)

    def _item_queries(self, item_ids: Sequence[Any]) -> dict[str, Any]:
        """Makes queries of items, which exclude the item itself."""
        vectors = self.candidates.vectors_of(item_ids)  # A copy.
        if self._has_bias:
            vectors[:, -1] = 1  # As in a query: the item's own bias does not count.
        return {"embeddings": vectors, "known_items": [[id_] for id_ in item_ids]}

    def _search(
        self,
        embedded: dict[str, Any],
        k: int,
        exclude: Excluded,
        allowed: Allowed,
        *,
        exact: bool = False,
    ) -> dict[str, np.ndarray]:
        """Answers embedded queries: ids, scores, and what the encoder knew of each query."""
        vectors, repeated = embedded.pop("embeddings"), embedded.pop("repeated_items", None)
        if (lists := embedded.pop("known_items", None)) is not None:
            more = [()] * len(lists) if exclude is None else exclude
            exclude = [[*known_ids, *ids] for known_ids, ids in zip(lists, more, strict=True)]
        bonuses = None
        if repeated is not None:
            bonuses = zip(repeated, embedded.pop("bonuses"), strict=True)
        ids, scores = self.candidates.search(
            vectors, k, exclude, allowed, exact=exact, bonuses=bonuses
        )
        return {"candidate_ids": ids, "scores": scores, **embedded}

    def _check_request(
        self, queries: Sequence[Query], k: int, exclude: Excluded, allowed: Allowed
    ) -> None:
        retrieval.check_asked(queries, k, exclude, ids_are_text=self.encoder.items_are_text)
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
