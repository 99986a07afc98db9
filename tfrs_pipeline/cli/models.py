"""The commands that need an exported model: ask it, serve it, measure or exchange its index."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import pydantic
from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg, CliToggleFlag
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tfrs_pipeline.cli.console import native_errors_to, progress, say
from tfrs_pipeline.cli.flags import Command
from tfrs_pipeline.messages import counted, printable
from tfrs_pipeline.serving.settings import ServeSettings
from tfrs_pipeline.settings import ConfigError

if TYPE_CHECKING:
    from tfrs_pipeline.serving.refresh import Refreshed
    from tfrs_pipeline.serving.retriever import LoadedRetriever

TargetRecall: TypeAlias = Annotated[float, Field(gt=0, le=1)]


class OfModel(Command):
    """Flags of what is done with an exported model."""

    model: CliPositionalArg[Path]
    """Folder saved_models/NAME[/VERSION]."""


class Query(OfModel):
    """Ask an exported model for a user's items.

    Prints the best items for a user or a history, with ids, titles and scores. The user's known
    items, or those of the given history, are excluded; an unknown user gets the answer for an empty
    history.
    """

    user: str | None = None
    """Id of the user, as in the logs."""
    history: tuple[str, ...] | None = None
    """Ids of the items that the user liked, oldest first, for a user whom the model does not know,
    or instead of the history that it stores."""
    history_timestamps: tuple[str, ...] | None = None
    """Time of each item of the history, such as 2026-01-31T08:00Z, or none where it is not known,
    for a model that reads times."""
    request: dict[str, str] = {}
    """Values of the model's request features, such as device=ios hour=8; lists and vectors with
    commas, tags=a,b place=1,2,3. From timestamp, the time of the request, such as
    2026-01-31T08:00Z, the model computes an hour or weekday, and how long ago the history was."""
    k: PositiveInt = 10
    """Number of items to print."""
    exclude: tuple[str, ...] = ()
    """Ids of more items to exclude."""
    filter: tuple[str, ...] | None = None
    """Print only items with one of these values of the model's filter feature
    (export.filter_by)."""
    exact: CliToggleFlag[bool] = False
    """Use the brute-force fallback instead of the index."""
    as_json: CliToggleFlag[bool] = Field(False, alias="json")
    """Print JSON instead of a table; notes are what is said above the table."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Query:
        if self.user is None and self.history is None:
            message = "required, or --history ITEM ... for someone without an id"
            raise ConfigError([("user", message)])
        if self.history is None and self.history_timestamps is not None:
            message = "given without --history ITEM ..., whose items they are the times of"
            raise ConfigError([("history_timestamps", message)])
        return self

    def __call__(self) -> int:
        """Asks and prints the answer."""
        from tfrs_pipeline.serving.retriever import load

        retriever = load(self.model, exact=self.exact)
        about, ids, scores, notes = self._ask(retriever)
        titles = retriever.titles()
        items = [
            {"rank": rank, "item_id": id_, "title": titles.get(id_), "score": round(score, 6)}
            for rank, (id_, score) in enumerate(zip(ids, scores, strict=True), 1)
            if score > -float("inf")
        ]
        if self.as_json:
            print(json.dumps({**about, "notes": notes, "items": items}, ensure_ascii=False))
            return 0
        console = Console()
        for note in notes:
            say(console, note)
        table = Table("rank", "item", *(["title"] if titles else []), "score")
        for item in items:
            title = [item["title"] or ""] if titles else []
            cells = [str(item["rank"]), str(item["item_id"]), *title, f"{item['score']:.4f}"]
            table.add_row(*(Text(printable(cell)) for cell in cells))
        console.print(table)
        if len(items) < self.k:
            say(console, f"Left for this user: {counted(len(items), 'item')}.")
        return 0

    def _ask(
        self, retriever: LoadedRetriever
    ) -> tuple[dict[str, Any], list[Any], list[float], list[str]]:
        """Returns what to say of the question, ids and scores of the best items, and notes."""
        from tfrs_pipeline.features.timestamp import Timestamp

        about = {} if self.user is None else {"user_id": retriever.parse_user_id(self.user)}
        exclude = [retriever.parse_item_id(text) for text in self.exclude]
        allowed = None if self.filter is None else [list(self.filter)]
        k = min(self.k, retriever.num_candidates)
        request = retriever.parse_request(self.request)
        if request:
            about["request"] = dict(self.request)
        notes = list(_request_notes(retriever, self.request, request))
        if exclude:
            known = set(retriever.candidate_ids())
            about["unknown_excluded"] = unknown = [id_ for id_ in exclude if id_ not in known]
            if unknown:
                notes.append(
                    f"{len(unknown)} of {len(exclude)} items to exclude are not among this model's "
                    f"items, first {unknown[0]!r}."
                )
        if self.history is None:
            users = [about["user_id"]]
            ids, scores, (is_known,) = retriever.retrieve_user(
                users, k, [exclude], allowed=allowed, requests=[request]
            )
            about["is_known_user"] = bool(is_known)
            if not is_known:
                notes.append(
                    f"User {self.user} is unknown to this model: the answer for an empty history."
                )
        else:
            about["history"] = history = [retriever.parse_item_id(text) for text in self.history]
            query = {"history": history, "request": request}
            if self.user is not None:
                query["user_id"] = about["user_id"]
            if self.history_timestamps is not None:
                name = "history_timestamps"
                query[name] = [
                    None if text in ("", "none") else Timestamp(name).parse(text)
                    for text in self.history_timestamps
                ]
            ids, scores = retriever.retrieve([query], k, [[*history, *exclude]], allowed=allowed)
            is_known = retriever.knows(history)
            unknown = [id_ for id_, known in zip(history, is_known, strict=True) if not known]
            about["unknown_items"] = unknown
            notes += _history_notes(retriever, query, unknown)
        return about, ids[0].tolist(), scores[0].tolist(), notes


def _request_notes(
    retriever: LoadedRetriever, texts: Mapping[str, str], request: Mapping[str, Any]
) -> Iterator[str]:
    """Says what the model does not know, or lacks, of a request, as typed and as read."""
    features = retriever.features["request"]
    for feature in features:
        text = texts.get(feature.name, "")
        if not (text.strip() and feature.num_codes is not None):
            continue
        if not feature.encode_column([request[feature.name]]).any():
            yield f"{feature.name} {text!r} is unknown to the model: taken as missing."
    lacking = [
        feature.name
        for feature in features
        if feature.name not in request
        and not (feature.is_from_timestamp and "timestamp" in request)
    ]
    if lacking:
        yield f"Not given, taken as missing: {', '.join(lacking)} (--request {lacking[0]}=VALUE)."


def _history_notes(
    retriever: LoadedRetriever, query: Mapping[str, Any], unknown: Sequence[Any]
) -> Iterator[str]:
    """Says what the model does not read of a query's history, some items of which are unknown."""
    import numpy as np

    from tfrs_pipeline.retrieval import HISTORY_TIMESTAMPS
    from tfrs_pipeline.serving.signatures import signature_inputs

    history = query["history"]
    without = {n: x for n, x in query.items() if n not in ("history", HISTORY_TIMESTAMPS)}
    if history and len(unknown) == len(history):  # They change no model's embedding.
        yield (
            "No item of the history was in the model's training: the answer is that of an empty "
            "history."
        )
        return
    # Own towers say nowhere what they read.
    if history and np.array_equal(
        retriever.embed_queries([query]), retriever.embed_queries([without])
    ):
        yield "This model reads no history: the items given are only left out of the answer."
        return
    inputs = signature_inputs(retriever.saved_model.signatures["retrieve"])
    if HISTORY_TIMESTAMPS in query and HISTORY_TIMESTAMPS not in inputs:
        yield "This model reads no times of a history: they change nothing."
    if unknown:
        yield (
            f"{len(unknown)} of {len(history)} items of the history say nothing: the model's "
            f"training did not have them, first {unknown[0]!r}."
        )


class Serve(ServeSettings, OfModel):
    """Serve an exported model over HTTP.

    Answers TensorFlow Serving's REST requests for a model, loads its new versions, and has a page
    to try it. Listens on this machine alone unless --host says otherwise; docs/guides/serving.md
    says how to open it to a network. SIGTERM or Ctrl-C stops it.
    """

    def __call__(self) -> int:
        """Serves until it is told to stop."""
        from tfrs_pipeline.serving.server import serve

        # What went wrong is in the answers too, but a server's log must say when.
        logging.getLogger("tfrs_pipeline").setLevel(logging.INFO)
        settings = ServeSettings(**self.model_dump(include=set(ServeSettings.model_fields)))
        serve(self.model, settings, lambda at: print(f"serving {self.model} at {at}", flush=True))
        return 0


class TuneIndex(OfModel):
    """Measure the recall and the latency of an index.

    Builds a ScaNN index over the items of an exported model, as `run` and `refresh-index` do, and
    prints its recall of the exact answers to the model's held-out queries and the time of a query,
    by k and by excluded items, compared with exact search. The model stays as it is.
    """

    target_recall: TargetRecall | None = None
    """Recall target, in (0, 1]; if not given, that of the model's export."""

    def __call__(self) -> int:
        """Builds, measures and prints."""
        from tfrs_pipeline.serving.index import Scann
        from tfrs_pipeline.serving.retriever import load
        from tfrs_pipeline.serving.tune import index_tables, measure_requests, tune_index

        retriever = load(self.model, exact=True)
        asked = retriever.manifest["export"]["index"]
        recall = self.target_recall or asked.get("recall", Scann.recall)
        tuning, measured = retriever.held_out_requests().parted()
        with native_errors_to(Path(os.devnull)):  # ScaNN tells of every index that it builds.
            index = tune_index(retriever.candidate_embeddings(), tuning, target_recall=recall)
        say(Console(), index_tables(index, measure_requests(index, measured)))
        return 0


class RefreshIndex(OfModel):
    """Replace the items of an exported model, without training.

    Writes a new version of a model that retrieves the items of a file: new items are embedded by
    their features, items missing from the file are removed. The towers stay as they are. A running
    server loads the new version. Settings that are not given are those of the version before.
    """

    items: Path
    """CSV or Parquet of all items to retrieve, with the item features of the model."""
    index: Literal["auto", "scann", "exact"] | None = None
    """Search structure; auto chooses by the number of items. If not given, ScaNN where there is a
    recall target, else as before."""
    target_recall: TargetRecall | None = None
    """Recall target of a ScaNN index, in (0, 1]."""
    keep_versions: PositiveInt | None = None
    """How many versions to keep: the newest two, then the newest of each training, then further
    refreshes; the others are deleted."""
    allow_all_new: CliToggleFlag[bool] = False
    """Accept a file without any item that the model knows, any known category of a feature, or any
    value of it."""

    def __call__(self) -> int:
        """Writes the new version and says what changed."""
        from tfrs_pipeline.durable import read_record
        from tfrs_pipeline.serving.export import describe_index
        from tfrs_pipeline.serving.index import Scann, search_of
        from tfrs_pipeline.serving.publish import MANIFEST_FILE
        from tfrs_pipeline.serving.refresh import refresh_index
        from tfrs_pipeline.serving.retriever import version_at

        index = None
        if self.index or self.target_recall:
            before = read_record(version_at(self.model) / MANIFEST_FILE, check_files=False)
            recall = before["export"]["index"].get("recall", Scann.recall)
            index = search_of(self.index or "scann", self.target_recall or recall)
        console = Console()
        with native_errors_to(Path(os.devnull)), progress(console) as (_, on_progress):
            done = refresh_index(
                self.model,
                self.items,
                index=index,
                keep_versions=self.keep_versions,
                allow_all_new=self.allow_all_new,
                on_progress=on_progress,
            )
        for line in (*_changes(done), describe_index(done.index, done.num_items)):
            say(console, line)
        say(console, f"model  {done.folder}")
        return 0


def _changes(done: Refreshed) -> Iterator[str]:
    yield (
        f"{done.num_items:,} items: {done.num_new:,} are new, {done.num_dropped:,} gone since the "
        "version before"
    )
    if done.num_untrained:
        yield f"{done.num_untrained:,} were in no training: embedded by their features alone"
        if not done.has_trained_unknown:
            how = ": if that was not trained, they"
            if done.has_trained_unknown is False:
                how = ", which was not trained: they"
            yield (
                f"    beside the embedding of an unknown id{how} will seldom be found. Train with "
                "model.id_dropout above 0, such as 0.1"
            )
    for name, num in done.num_unknown.items():
        if num:
            yield (
                f"{name}: {num:,} of {done.num_items:,} items have no value that the training had: "
                "taken as missing"
            )
    if done.num_skipped:
        yield (
            f"skipped {done.num_skipped:,} of the file: the model reads no item features, and "
            "its training did not have them"
        )
    yield from done.notes
