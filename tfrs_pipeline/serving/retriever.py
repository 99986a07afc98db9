"""Loads an exported model and queries it from Python."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow.parquet as pq
import tensorflow as tf

from tfrs_pipeline import retrieval
from tfrs_pipeline.data.ids import as_id_array
from tfrs_pipeline.data.settings import Reading
from tfrs_pipeline.features.raw import to_text
from tfrs_pipeline.messages import suggest
from tfrs_pipeline.model.graph import signature_inputs
from tfrs_pipeline.retrieval import Excluded, Query, Retrieved
from tfrs_pipeline.serving import publish
from tfrs_pipeline.serving.candidates import Candidates, FilterValues
from tfrs_pipeline.serving.graph_index import read_saved_codes, read_saved_index
from tfrs_pipeline.serving.index import Level
from tfrs_pipeline.serving.live import Item, LiveItems
from tfrs_pipeline.serving.searcher import Searcher
from tfrs_pipeline.serving.signatures import (
    AsksBy,
    LoadedTowers,
    Retrieval,
    as_ids,
    ask,
    id_lists_of,
)
from tfrs_pipeline.serving.store import Store

Allowed: TypeAlias = Sequence[Collection[str]] | None
"""For each query, values of the item filter: items need one of them. An empty list allows all."""


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
        Damaged: If a file has changed since the export, or that of the live items is damaged.
    """
    return LoadedRetriever(publish.version_at(path), exact=exact, live=live)


class UnknownItem(ValueError):
    """The item of a request for similar ones is not among a model's candidates."""


class LoadedRetriever(LoadedTowers):
    """A `Retriever` on an exported model; see `load`.

    ScaNN's own searcher, or NumPy, finds the candidates, without ScaNN's TensorFlow operation.

    Attributes:
        candidates: The items to retrieve, and their search.
        item_filter: "name" and "values" of the column that requests may filter by, or None.
    """

    def __init__(self, folder: Path, *, exact: bool, live: bool) -> None:
        super().__init__(folder)
        self.item_filter: dict[str, Any] | None = self.manifest["filter"]
        self._has_bias: bool = self.manifest.get("has_item_bias", False)
        index = {} if exact else self.manifest["index"]
        self.candidates = self._candidates(index.get("levels", ()))
        self._live: LiveItems | None = None
        if live and folder.name.isdecimal():
            self._live = LiveItems(
                self.candidates,
                Store(folder.parent),
                datetime.fromisoformat(self.manifest["items_read"]).timestamp(),
                self.features["candidate"],
                self.item_filter and self.item_filter["name"],
                index.get("num_leaves", 0),
                self.embed_raw,
                Reading(**self.manifest.get("reading", {})).list_separator,
            )

    def _candidates(self, levels: Sequence[Mapping[str, int]]) -> Candidates:
        """Reads the candidates, and the index too, unless `levels` is empty."""
        ids = pq.read_table(self.folder / publish.ITEMS_FILE, columns=["item_id"])["item_id"]
        # A view, because a copy would double the memory.
        vectors = np.asarray(memoryview(self.saved_model.exact.embeddings.read_value()))
        searcher = Searcher.load(read_saved_index(self.folder), vectors) if levels else None
        values, codes = None, None
        if self.item_filter is not None:
            codes = read_saved_codes(self.folder)
            values = FilterValues(self.item_filter["values"], codes)
        widths = [Level(**level) for level in levels]
        return Candidates(ids.to_numpy(), vectors, searcher, widths, values, codes)

    def retrieve(
        self, queries: Sequence[Query], k: int, exclude: Excluded = None, *, allowed: Allowed = None
    ) -> Retrieved:
        """Retrieves the k best candidates of each query; see `Retriever.retrieve`.

        Excludes only `exclude`: items of the history, and those that a user is known to have
        clicked, are retrieved too. Reads only the history in the query; `retrieve_user` reads the
        stored history of a known user, and excludes its items. Items of a history that the training
        did not have are ignored: `knows` tells which they are.

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
        ids, scores, _ = self._retrieved("history", queries, k, exclude, allowed)
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
        """Retrieves by users' stored histories, and excludes their known positives.

        Unknown users get the answer for an empty history. `exclude` adds ids to exclude. `allowed`
        and `requests` have one entry for each user, as in `retrieve`. Returns candidate_ids [n, k],
        scores [n, k] float32, is_known_user [n] bool. Raises as `retrieve`, and a `ValueError` if
        the model was exported without user data.
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
        return self._retrieved("user", queries, k, exclude, allowed)

    def similar(
        self, item_ids: Sequence[Any], k: int, exclude: Excluded = None, *, allowed: Allowed = None
    ) -> Retrieved:
        """Finds the k items most similar to each item, leaving out the item itself.

        They answer the same queries; they need not be clicked or bought together. An item's vector
        is used like a query's. The score is the dot product of both vectors, plus the bias of the
        found item if the model has one. The product is their cosine, as vectors have length 1,
        unless `model.normalize` is off or the tower is your own. `exclude` and `allowed` have one
        entry for each item, as in `retrieve`. Raises as `retrieve`, and a `ValueError` if an item
        is not a candidate.
        """
        if isinstance(item_ids, str):
            raise ValueError(f"Item ids come in a list, also a single one: [{item_ids!r}]")
        is_text = self.item_dtype == tf.string
        retrieval.check_ids([item_ids], are_text=is_text)
        retrieval.check_asked([{}] * len(item_ids), k, exclude, ids_are_text=is_text)
        if allowed is not None:
            self._check_allowed(allowed, len(item_ids))
        return self._searched(self._embedded_items(item_ids), k, exclude, allowed)

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
        items = pq.read_table(self.folder / publish.ITEMS_FILE).to_pydict()
        titles = dict(zip(items["item_id"], items.get("title", ()), strict=False))
        live = {} if self._live is None else dict(self._live.titles)
        return titles | {id_: title for id_, title in live.items() if title is not None}

    def _retrieved(
        self, asks_by: AsksBy, queries: Sequence[Query], k: int, exclude: Excluded, allowed: Allowed
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Checks the arguments, embeds the queries, and searches."""
        retrieval.check_asked(queries, k, exclude, ids_are_text=self.item_dtype == tf.string)
        if allowed is not None:
            self._check_allowed(allowed, len(queries))
        embedded = self._embedded(queries, asks_by)
        return *self._searched(embedded, k, exclude, allowed), embedded["is_known_user"]

    def answer(
        self, asked: Retrieval, inputs: Mapping[str, np.ndarray], *, exact: bool = False
    ) -> dict[str, np.ndarray]:
        """Answers a signature that retrieves as the SavedModel does, with live items too."""
        lists = (inputs.get(name) for name in ("exclude", "allowed"))
        exclude, allowed = (None if x is None else id_lists_of(x) for x in lists)
        if asked.asks_by == "item":
            embedded = self._embedded_items(as_ids(inputs["item_id"].tolist()))
        else:
            function = self.saved_model.signatures[asked.embed_name]
            embedded = ask(function, {name: inputs[name] for name in signature_inputs(function)})
        ids, scores = self._searched(embedded, int(inputs["k"]), exclude, allowed, exact=exact)
        known = {x: embedded[x] for x in embedded if x not in ("embeddings", "known_items")}
        return {"candidate_ids": ids, "scores": scores, **known}

    def _embedded_items(self, item_ids: Sequence[Any]) -> dict[str, np.ndarray]:
        """Makes queries of items, which exclude the item itself."""
        try:
            vectors = self.candidates.vectors_of(item_ids)  # A copy.
        except KeyError as error:
            raise UnknownItem(
                f"Item {error.args[0]!r} is not among the {len(self.candidates):,} items that the "
                "model retrieves. A new one comes in by `upsert`, by PUT, or by `tfrs-pipeline "
                "refresh-index`."
            ) from None
        if self._has_bias:
            vectors[:, -1] = 1  # As in a query: the item's own bias does not count.
        return {"embeddings": vectors, "known_items": as_id_array(item_ids)[:, np.newaxis]}

    def _searched(
        self,
        embedded: Mapping[str, np.ndarray],
        k: int,
        exclude: Excluded,
        allowed: Allowed,
        *,
        exact: bool = False,
    ) -> Retrieved:
        if (known := embedded.get("known_items")) is not None:
            lists = id_lists_of(known)
            given = [()] * len(lists) if exclude is None else exclude
            exclude = [[*x, *y] for x, y in zip(lists, given, strict=True)]
        return self.candidates.search(embedded["embeddings"], k, exclude, allowed, exact=exact)

    def _check_allowed(self, allowed: Sequence[Collection[str]], num_queries: int) -> None:
        if self.item_filter is None:
            raise ValueError("This model has no item filter: export it with filter_by.")
        retrieval.check_one_each("allowed", allowed, num_queries)
        assert self.candidates.values is not None
        known = self.candidates.values.code_of
        for value in itertools.chain.from_iterable(allowed):
            if to_text(value) not in known:
                hint = suggest(str(value), known)
                raise ValueError(f"No item has {value!r} as its {self.item_filter['name']}; {hint}")
