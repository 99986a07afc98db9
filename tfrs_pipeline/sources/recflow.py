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
the numbers are kept as they are: only their order within a request counts, unless the `min_rank` of
`FunnelLosers` is set.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.dataset
from ibis.backends.duckdb import Backend as DuckDB

from tfrs_pipeline.data.engines import connect
from tfrs_pipeline.data.files import scan
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import (
    DataError,
    Dropped,
    Duplicates,
    Refusal,
    Source,
    Stage,
    count_rows,
    refuse_rows,
    require_column,
)
from tfrs_pipeline.features.kinds import FeatureKind

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

_REMEDY = "Take the files as they were published."


def load_recflow(
    folder: Path,
    *,
    label: Mapping[str, float] | None = None,
    item_features: Mapping[str, FeatureKind] | None = None,
    user_features: Mapping[str, FeatureKind] | None = None,
    request_features: Mapping[str, FeatureKind] | None = None,
    duplicates: Duplicates = "keep",
    connection: DuckDB | None = None,
) -> Log:
    """Loads RecFlow: all stages, or the exposures alone where there is no all_stage.

    Events have `timestamp` (request_timestamp, UTC), `request_id`, the columns of the label and
    `rank`: rerank_index of an item that was exposed or reranked, rank_index of another one that was
    ranked (rank_pos, rank_neg), null before that. A request's two lists have scales of their own,
    so that an item known by its place in rank alone (rank_pos, without a rerank flag) counts among
    the others by that place.

    Items and users come from the rows: of each id the values of its latest row, by
    request_timestamp, then by place in the log. Ids are int64; `dropped` counts the rows without a
    flag.

    Args:
        folder: Holds all_stage, realshow, or both.
        label: Outcome (see `OUTCOMES`) -> weight. None: effective_view.
        item_features: Column among `ITEM_COLUMNS` -> "categorical" or "numeric".
        user_features: Column among `USER_COLUMNS` -> "categorical" or "numeric".
        request_features: `hour` and `weekday` of the request -> kind.
        duplicates: As in `Log.from_files`.
        connection: As there.

    Raises:
        DataError: If files, columns or values are missing or are not what they should be.
    """
    label = dict(label or {})
    features = {"item": dict(item_features or {}), "user": dict(user_features or {})}
    for names, known, what in (
        (label, OUTCOMES, "outcomes"),
        (features["item"], ITEM_COLUMNS, "video columns"),
        (features["user"], USER_COLUMNS, "user columns"),
    ):
        for name in names:
            require_column(known, name, Source(f"RecFlow's {what}"), "Choose among these.")
    paths = _list_days(Path(folder))
    logger.info("RecFlow from %s. Licence: CC BY-SA 4.0, by its authors.", folder)
    carried = dict.fromkeys([*label, *features["item"], *features["user"]])
    connection = connection or connect()
    rows, num_rows = _stage_rows(connection, paths, list(carried), label)
    if not (num_flagged := count_rows(rows)):
        raise DataError(
            f"{paths[0].parent}: none of {num_rows} rows has a flag that says which stage it "
            f"reached ({', '.join(_FLAGS)}). {_REMEDY}"
        )
    log = Log.from_table(
        rows.drop(*(name for name in carried if name not in label)),
        columns={"item_id": "video_id", "timestamp": "request_timestamp"},
        item_columns={"item_id": "video_id"},
        items=_latest(rows, "video_id", features["item"]),
        users=_latest(rows, "user_id", features["user"]),
        item_features=features["item"],
        user_features=features["user"],
        request_features=request_features,
        label=label,
        timestamp_unit="ms",
        duplicates=duplicates,
        max_bad_share=0,
        connection=connection,
    )
    if num_flagged == num_rows:
        return log
    unflagged = Dropped("no flag says which stage the item reached", num_rows - num_flagged)
    return dataclasses.replace(log, dropped=(unflagged, *log.dropped))


def _list_days(folder: Path) -> list[Path]:
    """Lists the files to read, by date."""
    # Operating systems and engines leave files beside them whose names begin so.
    days = {
        name: {path.name: path for path in (folder / name).glob("[!._]*")}
        for name in ("realshow", "all_stage")
    }
    files = days["realshow"] | days["all_stage"]
    if other := [path for name, path in files.items() if not _is_named_by_date(name)]:
        raise DataError(
            f"{other[0]}: a file of this folder must be named by its date, as 2024-01-13.feather. "
            "Rename it, or take it out of the folder."
        )
    if not files:
        raise DataError(
            f"{folder}: no all_stage/YYYY-MM-DD.feather and no realshow/YYYY-MM-DD.feather. Name "
            "the folder that holds these folders."
        )
    # What was shown on a day without all stages still must never be a negative.
    if shown := sorted(days["realshow"].keys() - days["all_stage"]):
        logger.warning(
            "%s: %d days are read from realshow, for want of all_stage: exposures, and no losers "
            "of the funnel: %s",
            folder,
            len(shown),
            ", ".join(shown[:5]),
        )
    return [files[name] for name in sorted(files)]


def _is_named_by_date(name: str) -> bool:
    try:
        day = date.fromisoformat(name.removesuffix(".feather"))
    except ValueError:
        return False
    return name == f"{day}.feather"


def _stage_rows(
    connection: DuckDB, paths: Sequence[Path], carried: Sequence[str], label: Mapping[str, float]
) -> tuple[ibis.Table, int]:
    """Reads the files one by one, and counts their rows.

    Those that have a flag are kept, in their order, with stage, rank and the carried columns.
    """
    # A name of its own: the connection may hold another folder's rows.
    name, num_rows = ibis.util.gen_name("recflow"), 0
    for path in paths:
        scanned = scan(connection, _open_feather(path), str(path))
        raw = scanned.load({column: column for column in COLUMNS})
        table = raw.table
        _check_values(table, raw.source, label)
        stage = _stage(table)
        rows = (
            table.filter(stage.notnull())
            .order_by("_row")
            .select(
                user_id=table["user_id"].cast("int64"),
                video_id=table["video_id"].cast("int64"),
                request_timestamp=table["request_timestamp"].cast("int64"),
                stage=stage,
                request_id=table["request_id"].cast("int64"),
                rank=_rank(table),
                **{column: table[column].cast("int64") for column in carried},
            )
        )
        if name in connection.list_tables():
            connection.insert(name, rows)
        else:
            connection.create_table(name, rows)
        num_rows += count_rows(table)
        raw.drop()
    return connection.table(name), num_rows


def _open_feather(path: Path) -> pa.RecordBatchReader:
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
    return dataset.scanner(columns=list(COLUMNS)).to_reader()


def _check_values(table: ibis.Table, source: Source, label: Mapping[str, float]) -> None:
    """Refuses flags, outcomes of exposed items, times and requests that cannot be."""

    def is_no_flag(name: str) -> ir.BooleanValue:
        return table[name].isnull() | table[name].notin([0, 1])

    is_exposed = table["realshow"] == 1
    outcomes = [name for name in label or ("effective_view",) if name in BINARY_OUTCOMES]
    time = table["request_timestamp"]
    refuse_rows(
        table,
        source,
        *(Refusal(name, is_no_flag(name), "is not 0 or 1", _REMEDY) for name in _FLAGS),
        # Of an item that was not exposed there is no outcome, whatever stands there.
        *(
            Refusal(name, is_exposed & is_no_flag(name), "is not 0 or 1", _REMEDY)
            for name in outcomes
        ),
        Refusal(
            "request_timestamp",
            time.isnull() | ~time.between(10**11, 10**14 - 1),  # 1973 to 5138.
            "does not hold milliseconds since 1970",
            _REMEDY,
        ),
        # Those of users and items the log refuses itself.
        Refusal("request_id", table["request_id"].isnull(), "is null", _REMEDY),
    )


def _stage(table: ibis.Table) -> ir.StringValue:
    """Names the furthest stage; null where no flag says one."""
    has = {name: table[name] == 1 for name in (*_FLAGS, "effective_view")}
    return ibis.cases(
        (has["realshow"] & has["effective_view"], Stage.CLICKED.value),
        (has["realshow"], Stage.EXPOSED.value),
        (has["rerank_pos"] | has["rerank_neg"] | has["rank_pos"], Stage.RANKED.value),
        (has["rank_neg"] | has["coarse_neg"], Stage.PRE_RANKED.value),
        (has["prerank_neg"], Stage.RETRIEVED.value),
    )


def _rank(table: ibis.Table) -> ir.IntegerValue:
    is_reranked = (table["realshow"] == 1) | (table["rerank_pos"] == 1) | (table["rerank_neg"] == 1)
    index = ibis.cases(
        (is_reranked, table["rerank_index"].cast("int64")),
        ((table["rank_pos"] == 1) | (table["rank_neg"] == 1), table["rank_index"].cast("int64")),
    )
    return (index >= 0).ifelse(index, ibis.null("int64"))


def _latest(rows: ibis.Table, id_name: str, features: Mapping[str, FeatureKind]) -> ibis.Table:
    """Takes the columns of each video or user from its latest row, and says how many had others."""
    if not features:
        return rows.select(id_name).distinct()
    numbered = rows.mutate(_row=ibis.row_number())
    entry = ibis.struct({name: numbered[name] for name in features})
    moment = ibis.struct({"time": numbered["request_timestamp"], "row": numbered["_row"]})
    latest = numbered.group_by(id_name).agg(
        entry=entry.argmax(moment), is_changed=entry.hash().min() != entry.hash().max()
    )
    num_changed = count_rows(latest.filter(latest["is_changed"]))
    if num_changed:
        logger.info(
            "RecFlow: %d of %d %s have rows that differ in %s: the latest row counts",
            num_changed,
            count_rows(latest),
            "videos" if id_name == "video_id" else "users",
            ", ".join(features),
        )
    return latest.select(id_name, **{name: latest["entry"][name] for name in features})
