"""The settings of a log and of its split.

The sentence under each field is its documentation and its help in the command line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from datetime import date, datetime, time
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from tfrs_pipeline.data.reading import Reading
from tfrs_pipeline.data.schema import SplitKind, part_problems
from tfrs_pipeline.features.kinds import kind_problem
from tfrs_pipeline.settings import Config, refuse

Share: TypeAlias = Annotated[float, Field(gt=0, lt=1)]


def _kind(value: Any) -> Any:
    if problem := kind_problem(value):
        raise ValueError(problem)
    return value


Kind: TypeAlias = Annotated[str, BeforeValidator(_kind)]
# Setting -> the sources that heed it; the others are read as they were published, or are a log.
_HEEDED_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(Reading.model_fields, ("files",)),
    **dict.fromkeys(("items_path", "users_path"), ("files", "spark")),
    "is_ordered": ("files", "spark", "movielens-100k"),
    "memory_limit": ("files", "movielens-100k"),
}


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
    """Item table columns that the model reads, each with its kind: categorical; hashed, for very
    many values; multi_categorical; text; numeric; bucketized, for numbers with a non-linear
    effect; timestamp; vector, a list of numbers from another model."""
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

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        refuse([*self._source_problems(), *self.name_problems(self.request_features)])
        return self

    def reading(self) -> Reading:
        """Returns how the tables are read, for `Log.from_files`."""
        return Reading(**{name: getattr(self, name) for name in Reading.model_fields})

    def _source_problems(self) -> Iterator[tuple[str, str]]:
        """Yields what the source needs and lacks, and what it would not heed."""
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
            if is_set and self.source not in sources:
                known = " or ".join(map(repr, sources))
                yield name, f"has no effect with source {self.source!r}: only with {known}"


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
