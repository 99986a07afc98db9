"""How raw tables, which are not a log yet, are read."""

import contextlib
import zoneinfo
from collections.abc import Collection, Iterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from tfrs_pipeline.data import schema
from tfrs_pipeline.messages import suggest
from tfrs_pipeline.settings import Config

StageName: TypeAlias = Literal["retrieved", "pre_ranked", "ranked", "exposed", "clicked"]
LabelWeight: TypeAlias = Annotated[float, Field(ge=schema.MIN_WEIGHT, le=schema.MAX_WEIGHT)]


def _meaning(value: Any) -> Any:
    with contextlib.suppress(ValueError, TypeError):
        if value == "exposed" or schema.MIN_WEIGHT <= float(value) <= schema.MAX_WEIGHT:
            return value
    raise ValueError("must be the weight of a positive, a number above 0, or exposed")


EventMeaning: TypeAlias = Annotated[float | Literal["exposed"], BeforeValidator(_meaning)]
Period: TypeAlias = tuple[datetime, datetime]
"""The first moment at which an event may have happened, and the first that is too late for one."""

_NOT_OUTCOMES = ("user_id", "item_id", "timestamp", "stage")


class Reading(Config):
    """How raw tables become a log. The text under a field is the command line's help too.

    The columns decide the kind of log. `rating_threshold` makes it a log of ratings; otherwise a
    column `stage` makes it the log of a funnel; otherwise a `label` makes it a log of impressions;
    without these, every row is a click. A `ConfigError` if options contradict each other.

    Example:
        >>> Reading(columns={"user_id": "viewer"}, duplicates="drop").list_separator
        '|'
    """

    columns: dict[str, str] = {}
    """Columns of the event table that have other names, such as user_id=viewer, for user_id,
    item_id, timestamp, stage, event, rating, request_id, rank, score, weight, part; others are
    context."""
    item_columns: dict[str, str] = {}
    """Columns of the item table by this package's names, such as item_id=sku."""
    user_columns: dict[str, str] = {}
    """Columns of the user table by this package's names, such as user_id=viewer_id."""
    stage_values: dict[str, StageName] = {}
    """Stages by the values in the file's stage column, such as impression=exposed."""
    rating_threshold: float | None = None
    """Ratings at or above this are clicks; lower ones are exposed items, never negatives."""
    timestamp_unit: schema.TimestampUnit | None = None
    """Unit of timestamps that are stored as numbers since 1970, also in features; if not given,
    seconds."""
    label: dict[str, LabelWeight] = {}
    """Columns that make an exposed event a positive, each with its weight, such as is_click=1
    long_view=2. A column counts if it is true or above 0; the weights add up."""
    event_weights: dict[str, EventMeaning] = {}
    """Weights of the types in the column event (or event_type, action, ...), such as purchase=5
    click=1 view=exposed; other types are dropped. An item's strongest event in a request counts."""
    max_weight: LabelWeight | None = None
    """Larger weights in the column weight, such as long watch times, are clipped to this."""
    time_zone: str | None = None
    """Time zone of timestamps that are stored without one, such as UTC or Europe/Paris, also in
    features; if not given, these are refused."""
    is_ordered: bool = True
    """Whether the order of the rows is the order of the events, for events without timestamps."""
    ties: schema.Ties = "auto"
    """Order of a user's events at the same time: order, as in the source; random, drawn at random;
    drop, none, so that they are not in each other's histories. If not given, drop for times
    in seconds or finer; for times by minute, hour or day order, or random if the source sorts such
    events by item id."""
    list_separator: str = Field("|", min_length=1)
    """Separator of the values of a multi_categorical feature, or the numbers of a vector, in a CSV
    file; a vector may also be written [0.1, 0.2]."""
    unknown_items: schema.UnknownItems = "keep"
    """What to do with events whose item is not in the item table: keep them with missing features
    (a run's export does not retrieve the item), drop and count them, or stop ("error")."""
    duplicates: schema.Duplicates = "keep"
    """What to do with events equal in user, item, time, stage, request and part: keep all of them,
    drop and count all but the first, or stop ("error")."""
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
        if taken := sorted(set(_NOT_OUTCOMES) & {*self.label}):
            yield "label", f"takes outcomes, and {', '.join(taken)} is not one"
        ways = ("rating_threshold", "event_weights", "stage_values", "label")
        given = [name for name in ways if getattr(self, name) not in (None, {})]
        # A label may judge what a funnel exposed.
        if len(given) > 1 and given != ["stage_values", "label"]:
            yield given[0], f"defines what a positive is, and so does {given[1]}: set one"
        if self.event_weights and "stage" in self.columns:
            yield "event_weights", "decides the stages; leave stage out of columns"

    def name_problems(self, request_features: Collection[str]) -> Iterator[tuple[str, str]]:
        """Yields columns that a log cannot have, with the reason; request features are exempt."""
        for name in (*self.columns, *self.label):
            if name not in request_features and (problem := schema.name_problem(name)):
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
