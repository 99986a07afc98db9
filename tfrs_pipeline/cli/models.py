"""The commands that query or serve an exported model, replace its items, or write their vectors."""

import gc
import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import AfterValidator, Field, PositiveInt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tfrs_pipeline.answers.publish import version_at
from tfrs_pipeline.cli.console import native_errors_to, say, shown
from tfrs_pipeline.cli.flags import OfModel, PositionalPath
from tfrs_pipeline.durable import parquet_destination
from tfrs_pipeline.messages import as_interrupts, counted, printable
from tfrs_pipeline.service.settings import ServeSettings

ParquetPath: TypeAlias = Annotated[Path, AfterValidator(parquet_destination)]
"""A Parquet file to write."""


class Serve(ServeSettings, OfModel):
    """Serve an exported model over HTTP.

    Answers TensorFlow Serving's REST requests for a model, loads its new versions, and has a page
    to try it. Listens on this machine alone unless --host says otherwise; docs/guides/serving.md
    says how to open it to a network. SIGTERM or Ctrl-C stops it.
    """

    def __call__(self) -> int:
        """Serves until it is told to stop."""
        from tfrs_pipeline.service.server import serve

        # Answers report errors too, but a server's log must say when they happened.
        logging.getLogger("tfrs_pipeline").setLevel(logging.INFO)
        serve(self.model, self, lambda at: print(f"serving {self.model} at {at}", flush=True))
        return 0


class RefreshIndex(OfModel):
    """Replace the items of an exported model, without training.

    Writes a new version of a model that retrieves the items of a file: new items are embedded by
    their features, items missing from the file are removed. The towers stay as they are. A running
    server loads the new version. Settings that are not given stay as in the version before.
    """

    items: Path
    """CSV or Parquet of all items to retrieve, with the item features of the model."""
    keep_versions: PositiveInt | None = None
    """How many versions to keep: the newest two, then the newest of each training, then further
    refreshes; the others are deleted."""
    allow_all_new: bool = False
    """Accept a file without a known item, or without a known category or any value of a feature."""

    def __call__(self) -> int:
        """Writes the new version and says where it is."""
        version_at(self.model)  # Refuses at once, before libraries are imported.
        from tfrs_pipeline.run.refresh import refresh_index

        console = Console()
        with native_errors_to(Path(os.devnull)), shown(console) as progress:
            # The flags are named as the arguments are.
            done = refresh_index(**self.model_dump(exclude={"verbose"}), progress=progress)
        say(console, f"model  {done.folder}")
        return 0


class Recommend(OfModel):
    """Write the best items of all users into a file.

    Each item is a row of the Parquet file: user_id, item_id, rank, score. The answers are those of
    the server, which leaves known items out, unless the training had evaluation.exclude none. After
    a kill, the same command goes on.
    """

    out: ParquetPath
    """Parquet file to write; an earlier one is replaced once the new one is complete."""
    users: Path | None = None
    """CSV or Parquet with user_id and, optionally, history: item ids, oldest first, which are then
    read in place of the stored ones, and left out where those would be. If not given, all users of
    the model, and those with recorded events."""
    k: PositiveInt = 100
    """Number of items for each user."""
    filter: tuple[str, ...] = ()
    """Write only items with one of these values of the model's filter (export.filter_by)."""

    def __call__(self) -> int:
        """Writes the file and says how fast."""
        from tfrs_pipeline.answers.recommend import recommend
        from tfrs_pipeline.answers.retriever import load

        console = Console()
        options: dict[str, Any] = {"users": self.users, "k": self.k, "allowed": self.filter}
        try:
            with shown(console) as progress, as_interrupts():
                about = recommend(load(self.model), self.out, **options, progress=progress)
        except KeyboardInterrupt:
            say(console, "\nstopped; the same command goes on")
            raise
        say(
            console,
            f"recommendations  {self.out}: {counted(about['num_rows'], 'row')} for "
            f"{counted(about['num_users'], 'user')}, {about['users_per_second']:,.0f} users/s",
        )
        if num_unknown := about["num_unknown_items"]:
            items = counted(num_unknown, "item")
            say(console, f"{items} of the histories left unread: the training did not have them")
        return 0


class Audience(OfModel):
    """Write the users who would want items most into a file.

    Each user of an item is a row of the Parquet file: item_id, user_id, rank, score, by what the
    users did until now. Users whose answers leave an item out, such as those who clicked it, are
    not in its audience.
    """

    items: Path
    """CSV or Parquet with item_id."""
    out: ParquetPath
    """Parquet file to write; an earlier one is replaced once the new one is complete."""
    k: PositiveInt = 1000
    """Number of users of each item."""

    def __call__(self) -> int:
        """Writes the file and says how many rows it has."""
        from tfrs_pipeline.answers.audience import audience
        from tfrs_pipeline.answers.retriever import load

        console = Console()
        with shown(console) as progress:
            model = load(self.model)
            about = audience(model, self.items, self.out, k=self.k, progress=progress)
        say(
            console,
            f"audience  {self.out}: {counted(about['num_rows'], 'row')} for "
            f"{counted(about['num_items'], 'item')}, of {counted(about['num_users'], 'user')}",
        )
        return 0


class WriteLog(OfModel):
    """Count the clicks on each version's answers, and write the log of the next training.

    The file is an event table, which --data.path of a run reads as it is: items that the server
    recorded as served are retrieved, those shown exposed, those clicked clicked, and those
    disliked disliked.
    """

    out: ParquetPath | None = None
    """Parquet file to write; an earlier one is replaced once the new one is complete. Once rows
    were dropped, it is refused, since it may be their only copy."""
    drop_older_days: float | None = Field(None, gt=0, le=36_500)
    """Delete events and answers that are older than this many days, after the file is written."""

    def __call__(self) -> int:
        """Prints the outcomes, then writes and deletes rows as the flags say."""
        from tfrs_pipeline.answers.log_of_service import write_log
        from tfrs_pipeline.answers.outcomes import outcomes
        from tfrs_pipeline.records.journal import Journal

        console, journal = Console(), Journal(version_at(self.model).parent)
        by_version = outcomes(self.model)
        for outcome in by_version:
            say(console, str(outcome))
        if not (by_version or self.out or self.drop_older_days):
            say(
                console,
                "No answer is recorded yet: serve the model with --record-share.",
            )
        written_before = None
        if self.out is not None:
            # An old event that comes while the file is written stays for the next file.
            written_before = None if self.drop_older_days is None else journal.moment()
            say(console, f"log  {self.out}: {counted(write_log(self.model, self.out), 'row')}")
        if self.drop_older_days is not None:
            before = datetime.now(UTC) - timedelta(days=self.drop_older_days)
            numbers = journal.drop_older(round(1000 * before.timestamp()), written_before)
            rows = " and ".join(map(counted, numbers, ("event", "answer")))
            say(console, f"dropped  {rows} from before {before:%Y-%m-%d %H:%M} UTC")
        return 0


class Vectors(OfModel):
    """Write the vectors of an exported model's items, for another engine.

    The file has a row for each item: id, title if the export has titles, embedding and its length.
    The metric is the inner product. docs/guides/engines.md loads the file into other engines.
    """

    file: Annotated[PositionalPath, AfterValidator(parquet_destination)]
    """Parquet file to write; an earlier one is replaced."""

    def __call__(self) -> int:
        """Writes the file and says what is in it."""
        from tfrs_pipeline.answers.retriever import load
        from tfrs_pipeline.answers.vectors import write_vectors

        about = write_vectors(load(self.model, exact=True), self.file)
        lengths = "{min_norm:.3g} to {max_norm:.3g}".format(**about)
        if about["unit_length"]:
            lengths = "1, so cosine similarity ranks alike"
        say(
            Console(),
            f"vectors  {self.file}: {counted(about['num_items'], 'item')} of version "
            f"{about['version']}, {about['dim']} dimensions, inner product; lengths {lengths}",
        )
        if aligned := about["aligned"]:
            near = "mean cosine {mean_cosine:.3f} with version {version} on {num_items:,} items"
            say(Console(), f"they stay where they were: {near.format(**aligned)}")
        return 0


if TYPE_CHECKING:
    from tfrs_pipeline.answers.retriever import LoadedRetriever
    from tfrs_pipeline.features.feature import Feature


class OfQuery(OfModel):
    """Flags of commands that ask a model as a user or with a history."""

    user: str | None = None
    """Id of the user, as in the logs."""
    history: tuple[str, ...] | None = None
    """Ids of the items that the user liked, oldest first, for a user whom the model does not know,
    or instead of the history that it stores."""
    request: dict[str, str] = {}
    """Values of the model's request features, such as device=ios hour=8; lists and vectors with
    commas, tags=a,b place=1,2,3. From timestamp, the time of the request, such as
    2026-01-31T08:00Z, the model computes an hour or weekday, and how long ago the history was."""
    k: PositiveInt = 10
    """Number of items in the answer."""
    exclude: tuple[str, ...] = ()
    """Ids of more items to exclude."""
    filter: tuple[str, ...] | None = None
    """Take only items with one of these values of the model's filter (export.filter_by)."""
    as_json: bool = Field(False, alias="json")
    """Print JSON instead of text; its notes are the lines above the answer."""

    def _problems(self) -> Iterator[tuple[str, str]]:
        if self.user is None and self.history is None:
            yield "user", "required, or --history ITEM ... for someone without an id"

    def read(self, retriever: "LoadedRetriever") -> "_Asked":
        """Reads ids and request as the model's, and notes what it cannot use."""
        from tfrs_pipeline.features.encoding import parse_request

        parse_id, features = retriever.stored.parse_id, retriever.features["request"]
        request = parse_request(features, self.request)
        notes = [*_request_notes(features, self.request, request)]
        user_id = None if self.user is None else parse_id(self.user, "user")
        exclude, query = list(map(parse_id, self.exclude)), None
        if self.history is not None:
            history = list(map(parse_id, self.history))
            query = {"user_id": user_id, "history": history, "request": request}
            exclude = retriever.left_out([query])[0] + exclude
        return _Asked(user_id, request, exclude, query, notes)


class _Asked(NamedTuple):
    user_id: Any
    request: dict[str, Any]
    exclude: list[Any]
    query: dict[str, Any] | None  # With a history.
    notes: list[str]


class Query(OfQuery):
    """Ask an exported model for a user's items, or for items similar to one.

    Prints the best items for a user or a history, with ids, titles and scores. Excluded are the
    user's known items, or those of the history, unless the training had evaluation.exclude none;
    and what the user disliked. An unknown user has an empty history.
    """

    similar_to: str | None = None
    """Id of an item, in place of a user or a history: prints the items similar to it."""
    kind: Literal["alike", "also_taken"] = "alike"
    """How items are similar: those alike answer the same queries; those also taken stood near it in
    people's histories, until now."""
    exact: bool = False
    """Score every item instead of using the index."""

    def _problems(self) -> Iterator[tuple[str, str]]:
        if self.similar_to is None:
            yield from super()._problems()
        elif given := [name for name in ("user", "history", "request") if getattr(self, name)]:
            yield given[0], "given with --similar-to, which asks by an item alone"

    def __call__(self) -> int:
        """Queries the model and prints the answer."""
        gc.disable()  # The import makes many objects, and all of them stay.
        from tfrs_pipeline.answers.retriever import load

        gc.enable()
        retriever = load(self.model, exact=self.exact)
        ids, scores, about, notes = self._ask(retriever)
        titles = retriever.titles()
        # Slots without an item, which fill an answer up to k, have the score -inf.
        items = [
            {"rank": rank, "item_id": id_, "title": titles.get(id_), "score": round(score, 6)}
            for rank, (id_, score) in enumerate(zip(ids, scores, strict=True), 1)
            if score > -float("inf")
        ]
        if self.as_json:
            _print_json({**about, "notes": notes, "items": items})
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
            whom = "user" if self.similar_to is None else "item"
            say(console, f"Left for this {whom}: {counted(len(items), 'item')}.")
        return 0

    def _ask(
        self, retriever: "LoadedRetriever"
    ) -> tuple[list[Any], list[float], dict[str, Any], list[str]]:
        """Returns ids, scores, what else the JSON says, and the lines above the table."""
        user_id, request, exclude, query, notes = self.read(retriever)
        about: dict[str, Any] = {} if user_id is None else {"user_id": user_id}
        if self.request:
            about["request"] = dict(self.request)
        # The index has no more. The table says so if fewer are left.
        k = min(self.k, retriever.num_candidates)
        allowed = None if self.filter is None else [list(self.filter)]
        if self.similar_to is not None:
            about["similar_to"] = item = retriever.stored.parse_id(self.similar_to)
            if self.kind == "also_taken":
                retriever.catch_up()
            ids, scores = retriever.similar([item], k, [exclude], allowed=allowed, kind=self.kind)
            return ids[0].tolist(), scores[0].tolist(), about, []
        if query is None:
            ids, scores, (is_known_user,) = retriever.retrieve_user(
                [user_id], k, [exclude], allowed=allowed, requests=[request]
            )
            about["is_known_user"] = bool(is_known_user)
            if not is_known_user:
                notes.append(
                    f"User {self.user} is unknown to this model: answered for an empty history."
                )
        else:
            history = query["history"]
            ids, scores = retriever.retrieve([query], k, [exclude], allowed=allowed)
            unknown = [*itertools.compress(history, ~retriever.stored.has_items(history))]
            about |= {"history": history, "unknown_items": unknown}
            if unknown:
                notes.append(
                    f"{len(unknown)} of {len(history)} items of the history are ignored: the "
                    f"model's training did not have them, first {unknown[0]!r}."
                )
        return ids[0].tolist(), scores[0].tolist(), about, notes


class Explain(OfQuery):
    """Say why an item is in the answer to a user or a history, or why it is not.

    Prints the reason, the item's rank and score among the items that the answer may hold, how far
    it is from the last place, and what each item of the history adds to its score. What the command
    query excludes is excluded here.
    """

    item: str
    """Id of the item."""

    def __call__(self) -> int:
        """Asks the model and prints the explanation."""
        from tfrs_pipeline.answers.explain import explain
        from tfrs_pipeline.answers.retriever import load

        retriever = load(self.model)
        user_id, request, exclude, query, notes = self.read(retriever)
        asked: dict[str, Any] = {"query": query}
        if query is None:
            asked = {"user_id": user_id, "request": request}
        asked |= {"k": self.k, "exclude": exclude, "allowed": self.filter or ()}
        why = explain(retriever, retriever.stored.parse_id(self.item), **asked)
        if self.as_json:
            _print_json({**asdict(why), "notes": notes})
            return 0
        for line in [*notes, *str(why).split("\n")]:
            say(Console(), line)
        return 0


def _print_json(answer: Mapping[str, Any]) -> None:
    text = json.dumps(answer, ensure_ascii=False)
    # A title's control characters must not reach a terminal.
    print("".join(x if x.isprintable() else json.dumps(x)[1:-1] for x in text))


def _request_notes(
    features: Sequence["Feature"], texts: Mapping[str, str], request: Mapping[str, Any]
) -> Iterator[str]:
    """Describes typed request values that are missing or that the model does not know."""
    for feature in features:
        text = texts.get(feature.name, "")
        if text.strip() and feature.unknown(feature.to_raw([request[feature.name]])).any():
            yield f"{feature.name} {text!r} is unknown to the model: taken as missing."
    has_time = "timestamp" in request
    absent = (x for x in features if x.name not in request)
    if lacking := [x.name for x in absent if not (x.is_from_timestamp and has_time)]:
        yield f"Not given, taken as missing: {', '.join(lacking)} (--request {lacking[0]}=VALUE)."
