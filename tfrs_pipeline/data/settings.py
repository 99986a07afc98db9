"""The settings of a log: how tables are read, where they lie, and how the log is split.

The text under each field is its documentation and its help in the command line.
"""

import contextlib
import zoneinfo
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from tfrs_pipeline.data import schema
from tfrs_pipeline.features.kinds import kind_problem
from tfrs_pipeline.messages import suggest
from tfrs_pipeline.settings import Config

StageName: TypeAlias = Literal[
    "retrieved", "pre_ranked", "ranked", "exposed", "clicked", "disliked"
]
_NOT_POSITIVE = [stage for stage in get_args(StageName) if stage != "clicked"]
LabelWeight: TypeAlias = Annotated[float, Field(ge=schema.MIN_WEIGHT, le=schema.MAX_WEIGHT)]


def _meaning(value: Any) -> Any:
    with contextlib.suppress(ValueError, TypeError):
        if value in _NOT_POSITIVE or schema.MIN_WEIGHT <= float(value) <= schema.MAX_WEIGHT:
            return value
    stages = ", ".join(_NOT_POSITIVE)
    raise ValueError(f"must be the weight of a positive, a number above 0, or one of {stages}")


EventMeaning: TypeAlias = Annotated[float | StageName, BeforeValidator(_meaning)]
Period: TypeAlias = tuple[datetime, datetime]
"""The first moment at which an event may have happened, and the first that is too late for one."""


class Reading(Config):
    """How raw tables become a log.

    The columns decide the kind of log. `rating_threshold` makes it a log of ratings; otherwise a
    column `stage` makes it the log of a funnel; otherwise a `label` makes it a log of impressions;
    without these, every row is a click. A `ConfigError` if options contradict each other.

    Example:
        >>> Reading(columns={"user_id": "viewer"}, duplicates="drop").list_separator
        '|'
    """

    columns: dict[str, str] = {}
    """Columns of the event table that have other names, such as user_id=viewer, for user_id,
    item_id, timestamp, stage, event, session_id, rating, request_id, rank, score, weight, part;
    others are context, which is kept as it is stored (in CSV, as text)."""
    item_columns: dict[str, str] = {}
    """Columns of the item table by this package's names, such as item_id=sku."""
    user_columns: dict[str, str] = {}
    """Columns of the user table by this package's names, such as user_id=viewer_id."""
    stage_values: dict[str, StageName] = {}
    """Stages by the values in the file's stage column, such as impression=exposed."""
    rating_threshold: float | None = None
    """Ratings at or above this are clicks; lower ones are exposed items, never negatives."""
    dislike_threshold: float | None = None
    """Ratings below this are dislikes: the item is never a positive of its user, and never shown to
    them again; if not given, none is. Not above rating_threshold."""
    timestamp_unit: schema.TimestampUnit | None = None
    """Unit of timestamps that are stored as numbers since 1970, also in features; if not given,
    seconds."""
    label: dict[str, LabelWeight] = {}
    """Columns that make an exposed event a positive, each with its weight, such as is_click=1
    long_view=2. A column counts if it is true or above 0; the weights add up."""
    event_weights: dict[str, EventMeaning] = {}
    """Weights of the types of events (column event, event_type or the like), such as purchase=5
    click=1 view=exposed report=disliked; others are dropped. A user's events of an item in one
    visit become one (column session_id, or 30 minutes)."""
    max_weight: LabelWeight | None = None
    """Larger weights in the column weight, such as long watch times, are clipped to this."""
    time_zone: str | None = None
    """Time zone of timestamps that are stored without one, such as UTC or Europe/Paris, also in
    features; if not given, these are refused."""
    is_ordered: bool = True
    """Whether the order of the rows is the order of the events, for events without timestamps."""
    ties: schema.Ties = "auto"
    """Order of a user's events at the same time: order, as in the source; drop, none, so that they
    are not in each other's histories. If not given, drop for times in seconds or finer, unless more
    than half of the positives would then lose their history; else order."""
    list_separator: str = Field("|", min_length=1)
    """Separator of the values of a multi_categorical feature, or the numbers of a vector, in a CSV
    file; a vector may also be written [0.1, 0.2]."""
    unknown_items: schema.UnknownItems | None = None
    """What to do with events whose item is not in the item table: keep them with missing features
    (a run's export does not retrieve the item), drop and count them, or stop ("error"). If not
    given, keep; but stop if they are more than half of the events, or if in more than max_bad_share
    of the events the table spells the id differently (leading zeros, letter case, spaces)."""
    duplicates: schema.Duplicates = "keep"
    """What to do with events equal in user, item, time, stage, request and part: keep all of them,
    or drop and count all but the first."""
    earliest_time: datetime | None = None
    """Events before this time count as having none, such as a 0 for a missing time; in UTC if
    without a zone; if not given, 1990. So do events later than a day from now."""
    max_bad_share: float = Field(0.1, ge=0, lt=1)
    """Share of a table's rows that may be dropped, and counted, because a required value is missing
    or unreadable, and of a feature's values that may be unreadable; more is refused, with 0 any
    such row."""

    def _problems(self) -> Iterator[tuple[str, str]]:
        zone = self.time_zone
        if zone is not None and zone not in (zones := zoneinfo.available_timezones()):
            yield "time_zone", f"unknown time zone {zone!r}; {suggest(zone, zones)}"
        # These columns say who, what, when and how far; none of them happens or not.
        if taken := sorted({"user_id", "item_id", "timestamp", "stage"} & {*self.label}):
            yield "label", f"takes outcomes, and {', '.join(taken)} is not one"
        ways = ("rating_threshold", "event_weights", "stage_values", "label")
        # Two definitions of a positive would contradict each other. Only a label goes with stages:
        # it judges what a funnel exposed.
        used = [name for name in ways if getattr(self, name) not in (None, {})]
        if len(used) > 1 and used != ["stage_values", "label"]:
            yield used[0], f"defines what a positive is, and so does {used[1]}: set one"
        low, high = self.dislike_threshold, self.rating_threshold
        if low is not None and (high is None or low > high):
            yield "dislike_threshold", f"got {low:g}: needs a rating_threshold that is not below it"
        # Under its own name, it may be kept as any other column.
        if self.columns.get("event", "event") != "event" and not self.event_weights:
            yield "columns.event", "has the types of events: set event_weights to say what each is"
        if self.event_weights and "stage" in self.columns:
            yield "event_weights", "decides the stages; leave stage out of columns"

    def name_problems(self, request_features: Collection[str]) -> Iterator[tuple[str, str]]:
        """Yields columns that a log cannot have, with the reason; request features are exempt."""
        for name in (*self.columns, *self.label):
            if name not in request_features and (
                problem := schema.name_problem(name, self.columns)
            ):
                yield f"columns.{name}", problem

    def as_json(self) -> dict[str, Any]:
        """Returns the options that differ from the defaults; `Reading(**...)` reads them."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def period(self) -> Period:
        """Returns the period of possible event times; a time outside it counts as missing."""
        earliest = self.earliest_time or datetime(1990, 1, 1, tzinfo=UTC)
        if earliest.tzinfo is None:
            earliest = earliest.replace(tzinfo=UTC)
        return earliest, datetime.now(UTC) + timedelta(days=1)


def _kind(value: Any) -> Any:
    if problem := kind_problem(value):
        raise ValueError(problem)
    return value


Kind: TypeAlias = Annotated[str, BeforeValidator(_kind)]
# Setting -> the sources that read it. Other sources have a fixed format, or are a log already.
_HEEDED_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(Reading.model_fields, ("files",)),
    **dict.fromkeys(("items_path", "users_path"), ("files", "spark")),
    **dict.fromkeys(("is_ordered", "ties"), ("files", "spark", "movielens-100k")),
}


def _amount(value: Any) -> Any:
    """Parses a share, a number or a moment; a day is its midnight, and naive times stay naive."""
    if type(value) is date:  # A datetime is a date too.
        value = datetime.combine(value, time())
    for read in (int, float, datetime.fromisoformat):
        with contextlib.suppress(ValueError, TypeError):
            # As text, because int(np.float32(0.1)) and int(Decimal("0.1")) are 0.
            amount: Any = value if isinstance(value, int | float | datetime) else read(str(value))
            is_number = isinstance(amount, int) and amount >= 0 and not isinstance(value, bool)
            if isinstance(amount, datetime) or is_number or 0 <= amount < 1:
                return amount
    raise ValueError("must be a share below 1, a whole number, or a moment")


Amount: TypeAlias = Annotated[int | float | datetime, BeforeValidator(_amount)]


class Tables(Config):
    """Where events, items and users lie."""

    source: Literal["movielens-100k", "files", "spark"] = "movielens-100k"
    """Your own files, tables in Spark, or MovieLens-100K; if not given, files if there is a path.
    The columns of files tell the kind of log: a funnel has a stage, ratings have a rating (and
    rating_threshold), impressions a label; without these, every row is a click."""
    path: Path | None = None
    """CSV or Parquet file of events, or a folder of them; the folder of MovieLens-100K as
    published; for spark the name of a table (docs/reference/data.md)."""
    items_path: Path | None = None
    """CSV or Parquet file of items, or a folder of them; for spark the name of a table."""
    users_path: Path | None = None
    """The same for users."""


class DataConfig(Reading, Tables):
    """Where events, items and users come from."""

    item_features: dict[str, Kind] = {}
    """Item table columns that the model reads, each with its kind: categorical;
    multi_categorical; text; numeric; bucketized, for numbers with a non-linear effect; timestamp;
    vector, a list of numbers from another model."""
    user_features: dict[str, Kind] = {}
    """The same for columns of the user table."""
    request_features: dict[str, Kind] = {}
    """The same for columns of the events that are known when the request arrives, such as device,
    place or search text; never columns known only later. hour and weekday are made from the
    timestamp, in UTC, if there are no such columns."""
    memory_limit: str | None = Field(None, pattern=r"^[0-9]+(\.[0-9]+)? ?[KMGT]i?B$")
    """Memory of DuckDB for making the log and the samples, such as 4GB; the rest goes to the
    system's temporary folder (TMPDIR). If not given, four fifths of the machine's memory."""

    @model_validator(mode="before")
    @classmethod
    def _infer_source(cls, settings: Any) -> Any:
        if isinstance(settings, Mapping) and settings.get("path") and "source" not in settings:
            return {**settings, "source": "files"}
        return settings

    def reading(self) -> Reading:
        """Returns how the tables are read, for `Log.from_files`."""
        return Reading(**{name: getattr(self, name) for name in Reading.model_fields})

    def _problems(self) -> Iterator[tuple[str, str]]:
        yield from super()._problems()
        if self.source != "movielens-100k" and self.path is None:
            what = "name of the table" if self.source == "spark" else "file or folder"
            yield "path", f"required for source {self.source!r}: the {what} of its events"
        for table in ("item", "user"):
            features, path = getattr(self, f"{table}_features"), getattr(self, f"{table}s_path")
            if self.source in ("files", "spark") and features and path is None:
                what = "table" if self.source == "spark" else "file"
                yield f"{table}s_path", f"required for {table}_features: the {what} that holds them"
        for name, sources in _HEEDED_BY.items():
            is_set = getattr(self, name) != type(self).model_fields[name].default
            # A setting that nothing reads is a misunderstanding that only results would show.
            if is_set and self.source not in sources:
                known = " or ".join(map(repr, sources))
                is_spark = self.source == "spark"
                ready = ": a table has its stages and weights already" if is_spark else ""
                yield name, f"has no effect with source {self.source!r}: only with {known}{ready}"
        yield from self.name_problems(self.request_features)


class SplitConfig(Config):
    """Which events train the model, which choose its settings, and which test it."""

    kind: schema.SplitKind | None = None
    """Test on events after a point in time (the default for logs with timestamps), on the last
    share (the default for others) or the last n positives of each user, or by the log's own
    column part: train, validation, test, or fold_in for history that trains nothing."""
    validation: Amount | None = None
    """Share of the positives for validation (for last_share, of each user's positives before the
    test); for last_n, the number of positives per user; or, for time, when validation starts, with
    a time zone. If not given, .05, or 1 for last_n."""
    test: Amount | None = None
    """Share, number or time of the test, as for validation. If not given, .1, or 1 for last_n."""
    min_positives: PositiveInt = 5
    """Users with fewer positives are dropped, except with time and column, which keep every
    user."""

    def amounts(self) -> tuple[Any, Any]:
        """Returns the amounts of validation and test: shares, numbers or moments."""
        defaults = (1, 1) if self.kind == "last_n" else (0.05, 0.1)
        pairs = zip((self.validation, self.test), defaults, strict=True)
        validation, test = (default if value is None else value for value, default in pairs)
        return validation, test

    def _problems(self) -> Iterator[tuple[str, str]]:
        """Yields which parts are impossible, and why."""
        kind, moments = self.kind, []
        for name, value in {"validation": self.validation, "test": self.test}.items():
            if value is None:
                continue
            with_kind = f"got {value} with kind {kind!r}"
            if kind == "column":
                yield name, f"{with_kind}: the log's own column decides; leave it out"
            elif isinstance(value, datetime):
                moments.append(value)
                if value.tzinfo is None:
                    text = value.isoformat()
                    yield name, f"got {text} without a time zone; write {text}Z if it is UTC"
                if kind not in (None, "time"):
                    yield name, f"got a moment with kind {kind!r}: only with 'time'"
            elif kind == "last_n" and not isinstance(value, int):
                yield name, f"{with_kind}: must be a number of positives"
            elif kind not in (None, "last_n") and value >= 1:
                yield name, f"{with_kind}: must be a share below 1"
        if len(moments) == 1:
            yield "", "give moments for both validation and test, or for neither"
        elif len({moment.tzinfo is None for moment in moments}) == 1 and moments != sorted(moments):
            yield "validation", f"got {moments[0]}: must not be after test, {moments[1]}"
        elif kind == "time" and not moments:
            validation, test = self.amounts()
            if test == 0 or validation + test >= 1:
                yield "test", f"got {test}: must be above 0, and below 1 with validation's share"
