"""Loads an exported model and queries it from Python."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tfrs_pipeline import retrieval
from tfrs_pipeline.answers import publish
from tfrs_pipeline.answers.engine import Engine
from tfrs_pipeline.answers.live_graph import LiveGraph
from tfrs_pipeline.answers.parts import Parts
from tfrs_pipeline.answers.signatures import (
    FILTERED,
    signatures_of,
)
from tfrs_pipeline.answers.stored import read_array
from tfrs_pipeline.answers.users import Users
from tfrs_pipeline.data.settings import Reading
from tfrs_pipeline.durable import Damaged, read_record
from tfrs_pipeline.features.encoding import raw_columns
from tfrs_pipeline.messages import suggest
from tfrs_pipeline.records.journal import Journal
from tfrs_pipeline.records.live_items import Item, LiveItems
from tfrs_pipeline.records.user_events import Event, check_events, event_types
from tfrs_pipeline.retrieval import Excluded, Query, Retrieved, history_of
from tfrs_pipeline.search.candidates import Allowed, Candidates, FilterValues
from tfrs_pipeline.search.queries import (
    CANDIDATE_FEATURES,
    REQUEST_FEATURES,
    Arrays,
)
from tfrs_pipeline.search.searcher import Searcher
from tfrs_pipeline.search.settings import Level, has_scann

logger = logging.getLogger(__name__)


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

    A query has one path, whoever asks: raw arrays, the inputs of the query tower, its vector, and
    the search over `candidates`. None of it needs TensorFlow.

    Attributes:
        candidates: The items to retrieve, and their search.
        features: The fitted features that the model reads, by side: "query" (the user's), "request"
            or "candidate".
        engine: Answers raw arrays: the path that all queries take.
        folder: The version's folder.
        graph: What people took near each item until now.
        inputs: What the query tower reads, and how raw queries become that.
        item_filter: "name" and "values" of the column that requests may filter by, or None.
        manifest: The content of the version's `manifest.json`.
        signatures: The inputs of all signatures that the engine answers, by name.
        stored: What the version holds of the users and items of its training.
        users: The users until now, with the events since the training.
    """

    def __init__(self, folder: Path, *, exact: bool, live: bool) -> None:
        self.folder, self.manifest = folder, _manifest(folder)
        # The live items of a model lie beside its versions, so a copied version has none.
        is_live = live and folder.name.isdecimal()
        has_users = self.manifest["user_data"]
        parts = Parts.read(folder / publish.SERVICE_FOLDER, self.manifest)
        self.stored, self.inputs = parts.stored, parts.inputs
        self.features = self.inputs.features
        self.item_filter: dict[str, Any] | None = self.manifest["filter"]
        signatures = signatures_of(self.inputs, has_filter=self.item_filter is not None)
        self.signatures = {
            name: inputs
            for name, inputs in signatures.items()
            if has_users or name.removesuffix(FILTERED) not in ("embed_user", "retrieve_user")
        }
        index = self.manifest["index"]
        if index["kind"] == "scann" and not exact and not has_scann():
            logger.warning("ScaNN is not installed here: %s is searched exactly", folder)
            exact = True
        if exact:
            index = {}
        self.candidates = self._candidates(index.get("levels", ()))
        events = folder.parent if is_live and has_users else None
        self.users = Users(self.stored, self.manifest["exclude"], self.manifest, events)
        self.graph = LiveGraph(self.stored.graph, self.users, self.stored.items)
        self.engine = Engine(parts, self.users, self.candidates, self.manifest, self.graph)
        self._live: LiveItems | None = None
        if is_live:
            model, num_leaves = folder.parent, index.get("num_leaves", 0)
            embed = self.engine.embed_items
            self._live = LiveItems(model, self.manifest, self.candidates, embed, num_leaves)

    def _candidates(self, levels: Sequence[Mapping[str, int]]) -> Candidates:
        """Reads the candidates, and the index too, unless `levels` is empty."""
        items = publish.read_table(self.folder / publish.ITEMS_FILE)
        vectors = read_array(self.folder / publish.SERVICE_FOLDER, publish.VECTORS)
        searcher = Searcher.load(self.folder / publish.INDEX_FOLDER) if levels else None
        values, codes = None, None
        if self.item_filter is not None:
            # Read, not encoded: Arrow would import pandas, where it is installed, for a second.
            reading = Reading(**self.manifest.get("reading", {}))
            values = FilterValues(self.item_filter["values"], reading.list_separator)
            codes = read_array(self.folder / publish.SERVICE_FOLDER, publish.FILTER_CODES)
        widths = [Level(**level) for level in levels]
        ids = items["item_id"].to_pylist()
        return Candidates(ids, vectors, searcher, widths, values, codes)

    def retrieve(
        self, queries: Sequence[Query], k: int, exclude: Excluded = None, *, allowed: Allowed = None
    ) -> Retrieved:
        """Retrieves the k best candidates of each query; see `Retriever.retrieve`.

        Excludes only `exclude`: items of the history, and those that a user is known to have
        clicked or disliked (`users.disliked`), are retrieved too. Reads only the history in the
        query; `retrieve_user` reads the stored history of a known user, and excludes its items
        unless the training had `evaluation.exclude none` or the model has a repeat bonus. Items of
        a history that the training did not have are ignored; `stored.has_items` says which ones it
        had.

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
        answer = self.engine.search(self._embed_queries(queries), k, exclude, allowed)
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
        without either get the answer for an empty history. Excluded are clicks, stored and
        recorded, unless the training had `evaluation.exclude none` or the model has a repeat bonus;
        views, in the log and recorded since, if the training's `evaluation.exclude` was seen;
        dislikes, in the log and recorded since, always; and the ids of `exclude`. `allowed` and
        `requests` have one entry for each user, as in `retrieve`. Returns candidate_ids [n, k],
        scores [n, k] float32, is_known_user [n] bool.
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
        embedded = self.engine.embed("embed_user", self._read(queries))
        answer = self.engine.search(embedded, k, exclude, allowed)
        return answer["candidate_ids"], answer["scores"], answer["is_known_user"]

    def similar(
        self,
        item_ids: Sequence[Any],
        k: int,
        exclude: Excluded = None,
        *,
        allowed: Allowed = None,
        kind: Literal["alike", "also_taken"] = "alike",
    ) -> Retrieved:
        """Finds the k items most similar to each item, leaving out the item itself.

        Items that are `alike` answer the same queries; they need not be clicked or bought together.
        An item's vector is used like a query's. The score is the dot product of both vectors, plus
        the bias of the similar item if the model has one. The product is their cosine, as vectors
        have length 1, unless `model.normalize` is off or the tower is your own.

        Items that are `also_taken` stood near the item in people's histories, until now. The score
        is the weight in the item graph (see `ItemGraph`). There may be fewer than k, or none.

        `exclude` and `allowed` have one entry for each item, as in `retrieve`. Raises as
        `retrieve`, and a `ValueError` if an item is not a candidate, or of another `kind`.
        """
        retrieval.check_collection("item_ids", item_ids)
        retrieval.check_ids([item_ids], are_text=self.stored.items.are_text)
        self._check_request([{}] * len(item_ids), k, exclude, allowed)
        queries = {"alike": self.engine.item_queries, "also_taken": self.engine.neighbour_queries}
        if kind not in queries:
            raise ValueError(f"kind is one of {', '.join(queries)}. Received: {kind!r}")
        embedded = queries[kind](item_ids)
        answer = self.engine.search(embedded, k, exclude, allowed)
        return answer["candidate_ids"], answer["scores"]

    def embed_queries(self, queries: Sequence[Query]) -> np.ndarray:
        """Embeds queries, which are read and checked as in `retrieve`: [n, D] float32."""
        retrieval.check_queries(queries, ids_are_text=self.stored.items.are_text)
        return self._embed_queries(queries)["embeddings"]

    def embed_candidates(
        self, item_ids: Sequence[Any], features: Mapping[str, Sequence[Any] | np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embeds items, which need not be in the index.

        Items new since the training are embedded by their `features`: [n] raw values by name, as
        in the item table; None is missing. Returns embeddings [n, D] float32, and is_known_item [n]
        bool: whether the training had the item. Raises a `ValueError` if a feature is missing.
        """
        read = self.features[CANDIDATE_FEATURES]
        return self.engine.embed_items(item_ids, raw_columns(read, features, len(item_ids)))

    def record(self, events: Sequence[Mapping[str, Any]]) -> int:
        """Records what users did; it counts from the next query by user on.

        The events are on disk, beside the versions, when this returns; other processes that serve
        or load the model read them too. They outlive versions: one reads those that came after the
        end of its log. An event that is there already changes nothing.

        Args:
            events: Mappings of `user_id`, `item_id` and `type`: "click", "view" (shown), "dislike",
                a stage of a log, or a type of the training log (`event_weights`). Optional are
                `time` (a datetime with a zone, ISO 8601, or seconds since 1970; default: now),
                `request_id` (of the answer that it belongs to), `event_id` (the client's; makes a
                repeat harmless), `session_id`, and `weight` (an amount as in the log).

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
        retrieval.check_ids([[user_id]], are_text=self.stored.users.are_text)
        return Journal(self.live.folder).forget([user_id])[0]

    def checked_events(self, events: Sequence[Mapping[str, Any]]) -> list[Event]:
        """Reads events as `record` does, or raises its `ValueError`."""
        return check_events(
            events,
            users_are_text=self.stored.users.are_text,
            items_are_text=self.stored.items.are_text,
            types=event_types(self.manifest),
        )

    def left_out(self, queries: Sequence[Query]) -> list[list[Any]]:
        """Returns what answers by history have to `exclude`; see `Users.left_out_by_history`."""
        user_ids = [query.get("user_id") for query in queries]
        return self.users.left_out_by_history(user_ids, [history_of(query) for query in queries])

    def _embed_queries(self, queries: Sequence[Query]) -> dict[str, Any]:
        return self.engine.embed("embed_query", self._read(queries))

    def _read(self, queries: Sequence[Query]) -> Arrays:
        requests = [query.get("request") for query in queries]
        known = [feature.name for feature in self.features[REQUEST_FEATURES]]
        retrieval.check_requests(requests, known, may_have_others=True)
        return self.inputs.read(queries)

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

    def violations(self) -> list[str]:
        """Returns the violated invariants of candidates and live items, a line each."""
        live = () if self._live is None else self._live.violations()
        return [*self.candidates.violations(), *live]

    def catch_up(self) -> None:
        """Takes in items that other processes have written since the last call, and all clicks."""
        self.graph.catch_up()
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
        return publish.read_table(self.folder / publish.QUERIES_FILE).to_pylist()

    def titles(self) -> dict[Any, str]:
        """Reads the titles of items by id, live ones included; empty if they have none."""
        items = publish.read_table(self.folder / publish.ITEMS_FILE)
        titles = {}
        if "title" in items.column_names:
            columns = (items[name].to_pylist() for name in ("item_id", "title"))
            titles = dict(zip(*columns, strict=True))
        # A live write without a title keeps the title of the version.
        live = {} if self._live is None else dict(self._live.titles)
        return titles | {id_: title for id_, title in live.items() if title is not None}

    def _check_request(
        self, queries: Sequence[Query], k: int, exclude: Excluded, allowed: Allowed
    ) -> None:
        retrieval.check_asked(queries, k, exclude, ids_are_text=self.stored.items.are_text)
        if allowed is None:
            return
        if self.item_filter is None:
            raise ValueError("This model has no item filter: export it with filter_by.")
        retrieval.check_one_each("allowed", allowed, len(queries))
        assert self.candidates.values is not None
        values = self.candidates.values
        # Here a misspelt value is an error. Over HTTP it finds nothing, because a client may be
        # ahead of the items.
        for value in itertools.chain.from_iterable(map(values.split, itertools.chain(*allowed))):
            if value not in values.code_of:
                hint = suggest(value, values.code_of)
                raise ValueError(f"No item has {value!r} as its {self.item_filter['name']}; {hint}")


def _manifest(folder: Path) -> dict[str, Any]:
    """Reads a version's manifest, and refuses a version that is damaged or of another format."""
    try:
        manifest = read_record(folder / publish.MANIFEST_FILE, leave_out=publish.SAVED_MODEL_PARTS)
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
