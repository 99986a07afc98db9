"""RecFlow: a whole funnel, from retrieval to exposure, of short videos (Liu et al., ICLR 2025).

Licence: CC BY-SA 4.0. The folder as published holds a file a day, `all_stage/YYYY-MM-DD.feather`
(every stage) and `realshow/YYYY-MM-DD.feather` (exposures alone); any number of days will do. All
columns are integers. Files are streamed one by one into DuckDB, which works out of core.

The published description of the flags, and what becomes of them (the furthest stage wins):

| flag | an item that | stage |
|---|---|---|
| realshow | was exposed | `clicked` or `exposed`, by the label |
| rerank_pos, rerank_neg | ranked among the top 10 in rerank, or below | `ranked` |
| rank_pos | ranked among the top 10 in rank | `ranked` |
| rank_neg | ranked below the top 10 in rank | `pre_ranked` |
| coarse_neg | ranked below the top 500 in coarse rank | `pre_ranked` |
| prerank_neg | ranked below the top 500 in pre-rank | `retrieved` |

`rank_index` and `rerank_index` are described as the position in the rank and in the rerank stage;
neither their first value nor what stands in rows without a position is said. So a position is read
only where the flags say that the item was in that list, a negative one there is missing (null), and
the numbers are kept as they are: only their order within a request counts, unless
`samples.ranked_min_rank` is set.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path

import duckdb
import ibis
import pyarrow as pa
import pyarrow.dataset
from ibis.backends.duckdb import Backend as DuckDB

from tfrs_pipeline.data.columns import MILLISECONDS, convert_feature
from tfrs_pipeline.data.files import Duplicates, connect, finish_tables
from tfrs_pipeline.data.labels import relabel
from tfrs_pipeline.data.schema import (
    DataError,
    Dropped,
    FeatureKind,
    Source,
    Stage,
    Tables,
    check_events,
    require_column,
)

logger = logging.getLogger(__name__)

ITEM_COLUMNS = (
    "author_id",
    "category_level_one",
    "category_level_two",
    "upload_type",
    "upload_timestamp",
    "duration",
)
"""Columns that describe a video; duration is in ms."""
USER_COLUMNS = ("device_id", "age", "gender", "province")
"""Columns that describe a user."""
BINARY_OUTCOMES = ("effective_view", "long_view", "like", "follow", "forward", "comment")
OUTCOMES = (*BINARY_OUTCOMES, "playing_time")
"""Columns that may be a label; effective_view is the default: 30% of the video was watched."""

_FLAGS = (
    "realshow",
    "rerank_pos",
    "rerank_neg",
    "rank_pos",
    "rank_neg",
    "coarse_neg",
    "prerank_neg",
)
_REQUEST_COLUMNS = ("request_id", "request_timestamp", "user_id", "video_id")
_POSITIONS = ("rank_index", "rerank_index")
COLUMNS = (*_REQUEST_COLUMNS, *USER_COLUMNS, *ITEM_COLUMNS, *_FLAGS, *_POSITIONS, *OUTCOMES)
"""All columns of a published file."""

_FILE_NAME = re.compile(r"(\d{4}-\d{2}-\d{2})\.feather")
_REMEDY = "Take the files as they were published."


def load_recflow(
    folder: Path,
    *,
    label: Mapping[str, float] | None = None,
    item_features: Mapping[str, FeatureKind] | None = None,
    user_features: Mapping[str, FeatureKind] | None = None,
    duplicates: Duplicates = "keep",
    connection: DuckDB | None = None,
) -> Tables:
    """Loads RecFlow: all stages, or the exposures alone where there is no all_stage.

    Events have `timestamp` (request_timestamp, UTC), `request_id`, the columns of the label and
    `rank`: rerank_index of an item that was exposed or reranked, rank_index of another one that was
    ranked (rank_pos, rank_neg), null before that. A request's two lists have scales of their own,
    so that an item known by its place in rank alone (rank_pos, without a rerank flag) counts among
    the others by that place.

    Items and users come from the rows: of each id the values of its latest row, by
    request_timestamp, then by place in the log.

    Args:
        folder: Holds all_stage, realshow, or both.
        label: Outcome (see `OUTCOMES`) -> weight, as in `labels.relabel`. None or empty:
            effective_view.
        item_features: Column among `ITEM_COLUMNS` -> "categorical" or "numeric".
        user_features: Column among `USER_COLUMNS` -> "categorical" or "numeric".
        duplicates: As in `load_tables`.
        connection: DuckDB connection for the tables; a new one, in memory, if None.

    Returns:
        Tables with int64 ids; `dropped` counts the rows without a flag.

    Raises:
        DataError: If files, columns or values are missing or are not what they should be.
    """
    connection = connection or connect()
    folder, label = Path(folder), dict(label or {})
    item_features, user_features = dict(item_features or {}), dict(user_features or {})
    for names, known, what in (
        (label, OUTCOMES, "outcomes"),
        (item_features, ITEM_COLUMNS, "video columns"),
        (user_features, USER_COLUMNS, "user columns"),
    ):
        for name in names:
            require_column(known, name, Source(f"RecFlow's {what}"), "Choose among these.")
    paths = _list_days(folder)
    logger.info("RecFlow from %s. Licence: CC BY-SA 4.0, by its authors.", folder)
    staging = _Staging(connection, list(label))
    for path in paths:
        staging.add(path)
    events, items, users = staging.finish()
    source = Source(str(paths[0].parent), {"item_id": "video_id", "timestamp": "request_timestamp"})
    if not staging.num_events:
        raise DataError(
            f"{source.name}: none of {staging.num_rows} rows has a flag that says which stage it "
            f"reached ({', '.join(_FLAGS)}). {_REMEDY}"
        )
    check_events(events, source, requires_positives=not label)
    num_unflagged = staging.num_rows - staging.num_events
    tables = finish_tables(
        connection,
        Tables(
            events=events,
            items=_with_features(items, item_features, source),
            users=_with_features(users, user_features, source),
            item_features=item_features,
            user_features=user_features,
            dropped=(Dropped("no flag says which stage the item reached", num_unflagged),)
            if num_unflagged
            else (),
        ),
        source,
        items_path=None,
        users_path=None,
        duplicates=duplicates,
        requires_positives=not label,
    )
    for table in (items, users):
        connection.drop_table(table.get_name())
    return dataclasses.replace(tables, events=relabel(tables.events, label)) if label else tables


def _list_days(folder: Path) -> list[Path]:
    """Lists the files to read, by date."""
    days = {
        name: {path.name: path for path in _days_of(folder / name)}
        for name in ("realshow", "all_stage")
    }
    # What was shown on a day without all stages still must never be a negative.
    if shown := sorted(set(days["realshow"]) - set(days["all_stage"])):
        logger.warning(
            "%s: %d days are read from realshow, for want of all_stage: exposures, and no losers "
            "of the funnel: %s",
            folder,
            len(shown),
            ", ".join(shown[:5]),
        )
    if files := days["realshow"] | days["all_stage"]:
        return [files[name] for name in sorted(files)]
    raise DataError(
        f"{folder}: no all_stage/YYYY-MM-DD.feather and no realshow/YYYY-MM-DD.feather. Name the "
        "folder that holds these folders."
    )


def _days_of(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "_")):  # Left by operating systems and engines.
            continue
        match = _FILE_NAME.fullmatch(path.name)
        if match is None or not _is_date(match[1]):
            raise DataError(
                f"{path}: a file of this folder must be named by its date, as 2024-01-13.feather. "
                "Rename it, or take it out of the folder."
            )
        yield path


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


class _Staging:
    """Tables that the days are added to, one file at a time."""

    def __init__(self, connection: DuckDB, outcomes: Sequence[str]) -> None:
        self.num_rows = 0
        self.num_events = 0
        self._connection = connection
        self._outcomes = outcomes
        self._made: set[str] = set()
        self._names = {
            name: ibis.util.gen_name(f"recflow_{name}") for name in ("events", "items", "users")
        }

    def add(self, path: Path) -> None:
        """Checks a file and adds its rows."""
        dataset = _open_feather(path)
        connection = self._connection.con
        scan = ibis.util.gen_name("recflow_file")
        connection.register(scan, dataset)
        try:
            num_rows = self._check_values(path, scan)
            # A row number without an order runs in the order of the scan, on one thread.
            rows = (
                f"(SELECT *, {self.num_rows} + row_number() OVER () - 1 AS _row, "
                f'{_STAGE} AS _stage FROM "{scan}")'
            )
            self._append("events", self._events_sql(rows))
            for name, id_column, columns in _ENTITIES:
                self._append(name, _latest_sql(rows, id_column, columns))
        except duckdb.Error as error:
            raise DataError(f"{path} cannot be read: {str(error).strip()} {_REMEDY}") from error
        finally:
            connection.unregister(scan)
        self.num_rows += num_rows

    def finish(self) -> tuple[ibis.Table, ibis.Table, ibis.Table]:
        """Returns events, and one row an id of items and of users."""
        events = self._connection.table(self._names["events"])
        self.num_events = int(events.count().to_pyarrow().as_py())
        entities = []
        for name, _, columns in _ENTITIES:
            staged = self._names[name]
            merged = ibis.util.gen_name(f"recflow_{name}")
            self._connection.con.execute(f'CREATE TABLE "{merged}" AS {_merge_sql(staged)}')
            self._connection.drop_table(staged)
            table = self._connection.table(merged)
            num_changed = int(table["changes"].sum().to_pyarrow().as_py() or 0)
            if num_changed:
                logger.info(
                    "RecFlow: %d of %d %s have rows that differ in %s: the latest row counts",
                    num_changed,
                    table.count().to_pyarrow().as_py(),
                    name,
                    ", ".join(columns),
                )
            entities.append(table)
        return events, entities[0], entities[1]

    def _append(self, name: str, select: str) -> None:
        table = self._names[name]
        verb = f'INSERT INTO "{table}"' if name in self._made else f'CREATE TABLE "{table}" AS'
        self._connection.con.execute(f"{verb} {select}")
        self._made.add(name)

    def _events_sql(self, rows: str) -> str:
        outcomes = "".join(f', "{name}"::BIGINT AS "{name}"' for name in self._outcomes)
        return (
            "SELECT user_id::BIGINT AS user_id, video_id::BIGINT AS item_id, "
            "make_timestamptz(request_timestamp::BIGINT * 1000) AS timestamp, "
            "_row AS event_number, _stage AS stage, request_id::BIGINT AS request_id, "
            f"{_RANK} AS rank{outcomes} FROM {rows} WHERE _stage IS NOT NULL"
        )

    def _check_values(self, path: Path, scan: str) -> int:
        """Checks flags, outcomes, times and ids; returns the number of rows."""
        first, last = MILLISECONDS
        outcomes = self._outcomes or ("effective_view",)
        wrong = {
            **{name: (f'coalesce("{name}" NOT IN (0, 1), true)', "0 or 1") for name in _FLAGS},
            **{
                # Of an item that was not exposed there is no outcome, whatever stands there.
                name: (f'realshow = 1 AND coalesce("{name}" NOT IN (0, 1), true)', "0 or 1")
                for name in outcomes
                if name in BINARY_OUTCOMES
            },
            "request_timestamp": (
                f"coalesce(request_timestamp NOT BETWEEN {first} AND {last}, true)",
                "milliseconds since 1970",
            ),
            **{
                name: (f'"{name}" IS NULL', "an id in every row")
                for name in ("request_id", "user_id", "video_id")
            },
        }
        counts = ", ".join(f"count(*) FILTER ({condition})" for condition, _ in wrong.values())
        found = self._connection.con.execute(f'SELECT count(*), {counts} FROM "{scan}"').fetchone()
        assert found is not None
        for (name, (_, what)), number in zip(wrong.items(), found[1:], strict=True):
            if number:
                raise DataError(
                    f"{path}: column {name!r} must hold {what}; {number} of {found[0]} rows do "
                    f"not. {_REMEDY}"
                )
        return int(found[0])


_ENTITIES = (("items", "video_id", ITEM_COLUMNS), ("users", "user_id", USER_COLUMNS))
_STAGE = (
    "CASE "
    f"WHEN realshow = 1 AND effective_view = 1 THEN '{Stage.CLICKED}' "
    f"WHEN realshow = 1 THEN '{Stage.EXPOSED}' "
    f"WHEN rerank_pos = 1 OR rerank_neg = 1 OR rank_pos = 1 THEN '{Stage.RANKED}' "
    f"WHEN rank_neg = 1 OR coarse_neg = 1 THEN '{Stage.PRE_RANKED}' "
    f"WHEN prerank_neg = 1 THEN '{Stage.RETRIEVED}' END"
)
_RANK = (
    "CASE "
    "WHEN realshow = 1 OR rerank_pos = 1 OR rerank_neg = 1 THEN "
    "CASE WHEN rerank_index >= 0 THEN rerank_index::BIGINT END "
    "WHEN rank_pos = 1 OR rank_neg = 1 THEN CASE WHEN rank_index >= 0 THEN rank_index::BIGINT END "
    "END"
)


def _open_feather(path: Path) -> pyarrow.dataset.Dataset:
    """Opens a file without reading its rows, and checks its columns."""
    try:
        dataset = pyarrow.dataset.dataset(path, format="feather")
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} cannot be read as Feather: {error}. {_REMEDY}") from error
    source = Source(str(path))
    for name in COLUMNS:
        require_column(dataset.schema.names, name, source, _REMEDY)
        if not pa.types.is_integer(dataset.schema.field(name).type):
            raise DataError(
                f"{source.column(name)} must be an integer, it is "
                f"{dataset.schema.field(name).type} ({dataset.count_rows()} rows). {_REMEDY}"
            )
    return dataset


def _latest_sql(rows: str, id_column: str, columns: Sequence[str]) -> str:
    """Writes SQL for the latest row of each id in a file, and whether its rows differ."""
    values = ", ".join(f'"{name}" := "{name}"::BIGINT' for name in columns)
    return (
        f"SELECT id, arg_max(entry, moment) AS entry, max(moment) AS moment, "
        "min(hash(entry)) AS low, max(hash(entry)) AS high FROM ("
        f'SELECT "{id_column}"::BIGINT AS id, struct_pack({values}) AS entry, '
        "struct_pack(ms := request_timestamp::BIGINT, place := _row) AS moment "
        f"FROM {rows} WHERE _stage IS NOT NULL) GROUP BY id"
    )


def _merge_sql(staged: str) -> str:
    """Writes SQL for the latest of the files' rows of each id."""
    return (
        "SELECT id, unnest(entry), changes FROM (SELECT id, arg_max(entry, moment) AS entry, "
        f'(min(low) <> max(high))::INTEGER AS changes FROM "{staged}" GROUP BY id)'
    )


def _with_features(
    table: ibis.Table, features: Mapping[str, FeatureKind], source: Source
) -> ibis.Table:
    """Gives the chosen columns the types of their kinds."""
    id_name = "item_id" if "author_id" in table.columns else "user_id"
    table = table.drop("changes").rename({id_name: "id"})
    converted = {
        name: convert_feature(table, name, kind, source, is_text=False, list_separator="|")
        for name, kind in features.items()
    }
    return table.mutate(**converted)
