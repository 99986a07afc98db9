"""The settings of a log and of its split.

The sentence under each field is its documentation and its help in the command line.
"""

from __future__ import annotations

import contextlib
import zoneinfo
from collections.abc import Iterator, Mapping
from datetime import date, datetime, time
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from tfrs_pipeline.data.schema import (
    Duplicates,
    SplitKind,
    TimestampUnit,
    UnknownItems,
    is_time_zone,
    name_problem,
    part_problems,
)
from tfrs_pipeline.features.kinds import FeatureKind, kind_problem
from tfrs_pipeline.messages import suggest
from tfrs_pipeline.settings import Config, refuse

StageName: TypeAlias = Literal["retrieved", "pre_ranked", "ranked", "exposed", "clicked"]
Share: TypeAlias = Annotated[float, Field(gt=0, lt=1)]


def _kind(value: Any) -> Any:
    if problem := kind_problem(value):
        raise ValueError(problem)
    return value


Kind: TypeAlias = Annotated[FeatureKind, BeforeValidator(_kind)]
# What says how to read tables that are no log yet: arguments of `Log.from_files`.
OF_RAW_TABLES = (
    *("columns", "item_columns", "user_columns", "label", "timestamp_unit", "time_zone"),
    *("list_separator", "unknown_items", "duplicates", "earliest_time"),
    "max_bad_share",
)
# What says which data there are, and which events are positives: MovieLens says it itself.
_WHICH_DATA = (
    *("items_path", "users_path", "columns", "item_columns", "user_columns", "label"),
    *("earliest_time", "max_bad_share", "unknown_items", "duplicates"),
)


def _amount(value: Any) -> Any:
    """Reads a share, a number or a moment; of a day its midnight, without a zone as it is."""
    if type(value) is date:  # A moment is one, too.
        value = datetime.combine(value, time())
    for read in (int, float, datetime.fromisoformat):
        with contextlib.suppress(ValueError, TypeError):
            amount: Any = value if isinstance(value, int | float | datetime) else read(value)
            is_number = isinstance(amount, int) and amount >= 1 and value is not True
            if isinstance(amount, datetime) or is_number or 0 < amount < 1:
                return amount
    raise ValueError("must be a share in (0, 1), a whole number of 1 or more, or a moment")


Amount: TypeAlias = Annotated[int | float | datetime, BeforeValidator(_amount)]


class DataConfig(Config):
    """Where events, items and users come from."""

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
    columns: dict[str, str] = {}
    """Names of columns in the event files, such as user_id=viewer, of user_id, item_id, timestamp,
    stage, rating, request_id, rank, score, weight and part."""
    item_columns: dict[str, str] = {}
    """Columns of the item table by this package's names, such as item_id=sku."""
    user_columns: dict[str, str] = {}
    """Columns of the user table by this package's names, such as user_id=viewer_id."""
    stage_values: dict[str, StageName] = {}
    """Stages by the values in the file's stage column, such as impression=exposed."""
    rating_threshold: float | None = None
    """Ratings at or above this are clicks; lower ones are exposed items, never negatives."""
    timestamp_unit: TimestampUnit | None = None
    """Unit of timestamps that are stored as numbers, also in features."""
    label: dict[str, PositiveFloat] = {}
    """Columns that make an exposed event a positive, instead of the stage clicked, each with its
    weight, such as is_click=1 long_view=2."""
    time_zone: str | None = None
    """Time zone of timestamps that are stored without one, such as UTC or Europe/Paris, also in
    features."""
    is_ordered: bool = True
    """Whether the order of the rows is the order of the events, for events without timestamps."""
    item_features: dict[str, Kind] = {}
    """Item table columns that the model reads, each with its kind: categorical; hashed, for very
    many values; multi_categorical; text; numeric; bucketized, for numbers with a non-linear
    effect; timestamp; vector, a list of numbers from another model."""
    user_features: dict[str, Kind] = {}
    """The same for columns of the user table."""
    request_features: dict[str, Kind] = {}
    """The same for columns of the events that are known when the request arrives, such as device,
    place or search text; never columns known only later. hour and weekday are made from the
    timestamp, in UTC, if there are no such columns."""
    list_separator: str = Field("|", min_length=1)
    """Separator of the values of a multi_categorical feature, or the numbers of a vector, in a CSV
    file."""
    unknown_items: UnknownItems = "keep"
    """What to do with events whose item is not in the item table: keep them with missing features
    (a run's export does not retrieve the item), drop and count them, or stop."""
    duplicates: Duplicates = "keep"
    """What to do with events equal in user, item, time, stage, request and part: keep all of them,
    drop and count all but the first, or stop."""
    earliest_time: datetime | None = None
    """Events before this time count as having none, such as a 0 for a missing time; in UTC if
    without a zone; if not given, 1990. So do events of more than a day from now."""
    max_bad_share: float = Field(0.1, ge=0, lt=1)
    """Share of a table's rows that may be dropped, and counted, because a required value is missing
    or unreadable; more is refused, with 0 any such row."""

    memory_limit: str | None = Field(None, pattern=r"^[0-9]+(\.[0-9]+)? ?[KMGT]i?B$")
    """Memory of DuckDB for making the log and the samples, such as 4GB; the rest goes to disk, into
    the folder that TMPDIR names. If not given, four fifths of the machine's memory."""

    @model_validator(mode="before")
    @classmethod
    def _infer_source(cls, settings: Any) -> Any:
        if isinstance(settings, Mapping) and settings.get("path") and "source" not in settings:
            return {**settings, "source": "files"}
        return settings

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        refuse([*self._source_problems(), *self._value_problems()])
        return self

    def _source_problems(self) -> Iterator[tuple[str, str]]:
        """Yields what the source needs and lacks, and what would make other positives of it."""
        if self.source != "movielens-100k" and self.path is None:
            what = "name of the table" if self.source == "spark" else "file or folder"
            yield "path", f"required for source {self.source!r}: the {what} of its events"
        for table in ("item", "user"):
            features, path = getattr(self, f"{table}_features"), getattr(self, f"{table}s_path")
            if self.source in ("files", "spark") and features and path is None:
                what = "table" if self.source == "spark" else "file"
                yield f"{table}s_path", f"required for {table}_features: the {what} that holds them"
        for name in ("stage_values", "rating_threshold"):
            if getattr(self, name) and self.source != "files":
                yield name, f"has no effect with source {self.source!r}: only with 'files'"
        for name in _WHICH_DATA if self.source == "movielens-100k" else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                yield name, f"has no effect with source {self.source!r}, read as it was published"
        if self.source == "spark":
            for name in (*OF_RAW_TABLES, "memory_limit"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    yield name, "has no effect with source 'spark', whose tables are a log already"

    def _value_problems(self) -> Iterator[tuple[str, str]]:
        for name in self.columns:
            if name not in self.request_features and (problem := name_problem(name)):
                yield f"columns.{name}", problem
        if self.time_zone is not None and not is_time_zone(self.time_zone):
            zones = zoneinfo.available_timezones()
            yield (
                "time_zone",
                f"unknown time zone {self.time_zone!r}; {suggest(self.time_zone, zones)}",
            )


class SplitConfig(Config):
    """Which events train the model, which choose its settings, which test it."""

    kind: SplitKind | None = None
    """Test on events after a point in time (the default for logs with timestamps), on the last
    share (the default for others) or the last n positives of each user, on users that training
    never saw, or by the log's own column part: train, validation or test."""
    validation: Amount | None = None
    """Share of the positives for validation (for last_share, of each user's positives before the
    test; for held_out_users, of the users); for last_n, the number of positives per user; or, for
    time, when validation starts, with a time zone. If not given, .05, or 1 for last_n."""
    test: Amount | None = None
    """Share, number or time of the test, as for validation. If not given, .1, or 1 for last_n."""
    target_share: Share = 0.2
    """Share of a held-out user's positives, the last ones, to be found, for held_out_users."""
    min_positives: PositiveInt = 5
    """Users with fewer positives are dropped, except with time and column, which keep every
    user."""

    @model_validator(mode="after")
    def _check(self) -> SplitConfig:
        refuse(list(part_problems(self.kind, self.validation, self.test)))
        return self
