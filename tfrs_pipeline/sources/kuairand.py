"""KuaiRand: short videos with real exposures, a part of them random (Gao et al., CIKM 2022).

Licence: CC BY-SA 4.0. A folder holds one of two forms, told apart by its files:

- as published (KuaiRand-Pure, -1K or -27K): CSV logs of all exposures. Time is `time_ms`, UTC;
  `date` and `hourmin`, which are UTC+8, are not read. Exposures of the random policy are exposures
  like any other: an item shown at random and not clicked is never a negative;
- a cut of KuaiRand-Pure in Parquet files: `user_sequences.parquet` to train on, the last 50
  exposures and the last 50 long views of each user without times, and the exposures of later days
  in `val.parquet` and `test.parquet`.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import duckdb
import ibis
import ibis.expr.types as ir
from ibis.backends.duckdb import Backend as DuckDB

from tfrs_pipeline.data.columns import MILLISECONDS, count_rows, is_integer_id
from tfrs_pipeline.data.files import (
    Duplicates,
    File,
    UnknownItems,
    connect,
    csv_scan,
    finish_tables,
    open_file,
    read_entities,
)
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

OUTCOMES = (
    "is_click",
    "is_like",
    "is_follow",
    "is_comment",
    "is_forward",
    "is_hate",
    "long_view",
    "play_time_ms",
    "profile_stay_time",
    "comment_stay_time",
    "is_profile_enter",
)
"""Columns of the published logs that may be a label."""

_LOG = re.compile(
    r"log_(?P<policy>standard|random)_(?P<days>\d+_\d+_to_\d+_\d+)_(?P<version>[A-Za-z0-9]+)"
    r"(_part(?P<part>\d+))?\.csv(\.gz)?"
)
_FEATURES = re.compile(
    r"(?P<table>user_features|video_features_basic)(_(?P<version>[A-Za-z0-9]+))?"
    r"\.(csv|csv\.gz|parquet)"
)
_CUT_FILES = ("user_sequences.parquet", "val.parquet", "test.parquet")
_CUT_LABEL = "long_view"
# Numbers that pandas wrote as floats because some were missing: categories all the same.
_WHOLE_NUMBER = r"^-?(0|[1-9][0-9]*)(\.0)?$"


def load_kuairand(
    folder: Path,
    *,
    label: Mapping[str, float] | None = None,
    item_features: Mapping[str, FeatureKind] | None = None,
    user_features: Mapping[str, FeatureKind] | None = None,
    unknown_items: UnknownItems = "keep",
    duplicates: Duplicates = "keep",
    connection: DuckDB | None = None,
) -> Tables:
    """Loads KuaiRand, as published or cut.

    As published: one event an exposure, `event_number` in the order of the logs (standard before
    random, by date and part, then by row), with the context columns `is_rand`, `tab` and those of
    the label.

    The cut: one event a list entry, in the order of the lists, then `val.parquet` and
    `test.parquet`, each by `time_ms`. The entries have no times, so there is no `timestamp`:
    `event_number` is the order. The two lists of a user are each in time order, but cut on their
    own, so that nothing says how they lie within each other: a user's exposures are numbered before
    the long views. Entries of `watch_seq` whose video is in the user's `long_watch_seq` are long
    views, not exposures without one: they are dropped and counted. `part` is train, validation or
    test by file, for `split.split_by_column`.

    Args:
        folder: Holds the files, or a folder `data` with them.
        label: Outcome (see `OUTCOMES`) -> weight, as in `labels.relabel`. None or empty: is_click
            as published, long_view in the cut, which can have no other.
        item_features: Column of video_features_basic -> kind, such as author_id, video_type,
            upload_type, music_type (categorical), tag (multi_categorical), video_duration
            (numeric, ms), upload_dt (timestamp; days of UTC+8).
        user_features: Column of user_features -> kind, such as user_active_degree or onehot_feat0.
        unknown_items: As in `load_tables`, for videos that video_features_basic lacks.
        duplicates: As in `load_tables`. The cut's lists have no times: a video watched twice is two
            events equal in all that is known, and would be dropped.
        connection: DuckDB connection for the tables; a new one, in memory, if None.

    Returns:
        Tables with int64 ids; `dropped` counts what was left out.

    Raises:
        DataError: If files, columns or values are missing or are not what they should be.
        ValueError: If the label is another than the form allows.
    """
    connection = connection or connect()
    label = dict(label or {})
    folder, names = _find_files(Path(folder))
    source = Source(str(folder), {"item_id": "video_id"})
    logger.info("KuaiRand from %s. Licence: CC BY-SA 4.0, by its authors.", folder)
    if set(_CUT_FILES) & set(names):
        _check_cut(folder, names, label)
        events, dropped = _read_cut(connection, folder, source)
        version = None
    else:
        logs, version = _list_logs(folder, names)
        events, dropped = _read_logs(connection, folder, logs, label), ()
    check_events(events, source, requires_positives=not label)
    item_features, user_features = dict(item_features or {}), dict(user_features or {})
    video_file = _open_features(connection, folder, "video_features_basic", item_features, version)
    user_file = _open_features(connection, folder, "user_features", user_features, version)
    tables = finish_tables(
        connection,
        Tables(
            events=events,
            items=_read_features(video_file, "item_id", "video_id", item_features, events),
            users=_read_features(user_file, "user_id", "user_id", user_features, events),
            item_features=item_features,
            user_features=user_features,
            dropped=dropped,
        ),
        source,
        items_path=video_file.path if video_file else None,
        users_path=user_file.path if user_file else None,
        unknown_items=unknown_items,
        duplicates=duplicates,
        requires_positives=not label,
    )
    for opened in (video_file, user_file):
        if opened is not None:
            connection.drop_table(opened.name)
    return dataclasses.replace(tables, events=relabel(tables.events, label)) if label else tables


def _find_files(folder: Path) -> tuple[Path, list[str]]:
    """Returns the folder that holds KuaiRand's files, and the names of all its files."""
    for each in (folder, folder / "data"):
        names = sorted(path.name for path in each.iterdir()) if each.is_dir() else []
        if set(names) & set(_CUT_FILES) or any(_LOG.fullmatch(name) for name in names):
            return each, names
    raise DataError(
        f"{folder}: no KuaiRand log in it or in its folder 'data'. Name the folder that holds "
        "log_standard_4_08_to_4_21_pure.csv and its like (or _1k, _27k), or the cut in "
        f"{', '.join(_CUT_FILES)}."
    )


def _check_cut(folder: Path, names: Collection[str], label: Mapping[str, float]) -> None:
    if missing := sorted(set(_CUT_FILES) - set(names)):
        raise DataError(
            f"{folder}: the cut is not whole, it lacks {', '.join(missing)}. Add what is missing."
        )
    if any(_LOG.fullmatch(name) for name in names):
        raise DataError(
            f"{folder} holds both published logs (log_*.csv) and the cut "
            f"({', '.join(_CUT_FILES)}). Give each a folder of its own."
        )
    if other := sorted(set(label) - {_CUT_LABEL}):
        raise DataError(
            f"{folder}: this cut cannot have the label {', '.join(other)}: user_sequences.parquet "
            f"knows of exposures and of long views alone. Leave the label out, or use {_CUT_LABEL}."
        )


def _list_logs(folder: Path, names: Collection[str]) -> tuple[list[Path], str]:
    """Returns the logs, standard before random, by date and part, and their version ("pure")."""
    found = [match for match in map(_LOG.fullmatch, names) if match]
    versions = sorted({match["version"] for match in found})
    if len(versions) > 1:
        raise DataError(
            f"{folder} holds logs of several versions: {', '.join(versions)}. Each numbers its "
            "users and videos anew, so give each a folder of its own."
        )
    policies = {match["policy"] for match in found}
    if "random" not in policies:
        logger.warning(
            "%s: no log_random_*.csv: what was shown at random and not clicked is not known, and "
            "may be drawn as a negative",
            folder,
        )
    found.sort(key=lambda m: (m["policy"] == "random", m["days"], int(m["part"] or 0)))
    return [folder / match[0] for match in found], versions[0]


def _read_logs(
    connection: DuckDB, folder: Path, logs: list[Path], label: Mapping[str, float]
) -> ibis.Table:
    """Reads the published logs in one pass, without loading them."""
    for name in label:
        require_column(OUTCOMES, name, Source("KuaiRand's outcomes"), "A label is one of them.")
    header, scan = csv_scan(logs)
    source = Source(str(folder))
    flags = ("is_click", "is_rand")
    context = dict.fromkeys(("is_rand", "tab", *label))
    needed = dict.fromkeys(("user_id", "video_id", "time_ms", *flags, *context))
    for name in needed:
        require_column(header, name, source, "Take the logs as they were published.")
    whole = {name: _whole(name) for name in needed}
    first, last = MILLISECONDS
    # An unreadable time may not stop the scan: it is counted below, with all else.
    in_range = f"CASE WHEN {whole['time_ms']} BETWEEN {first} AND {last} THEN"
    table = ibis.util.gen_name("kuairand_events")
    columns = [
        f"{whole['user_id']} AS user_id",
        f"{whole['video_id']} AS item_id",
        f"{in_range} make_timestamptz({whole['time_ms']} * 1000) END AS timestamp",
        # A row number without an order runs in the order of the scan, on one thread.
        "row_number() OVER () - 1 AS event_number",
        f"CASE {whole['is_click']} WHEN 1 THEN '{Stage.CLICKED}' WHEN 0 THEN '{Stage.EXPOSED}' END"
        " AS stage",
        *(f"{whole[name]} AS {name}" for name in context),
    ]
    _execute(
        connection, folder, f'CREATE TABLE "{table}" AS SELECT {", ".join(columns)} FROM {scan}'
    )
    events = connection.table(table)
    unread = {
        "user_id": events["user_id"].isnull(),
        "video_id": events["item_id"].isnull(),
        "time_ms": events["timestamp"].isnull(),
        "is_click": events["stage"].isnull(),
        **{name: events[name].isnull() for name in context if name != "is_click"},
    }
    unread["is_rand"] = unread["is_rand"] | events["is_rand"].notin([0, 1])
    what = {"time_ms": "milliseconds since 1970", **dict.fromkeys(flags, "0 or 1")}
    for name, number in _counts(events, unread).items():
        if number:
            raise DataError(
                f"{source.column(name)} must hold {what.get(name, 'whole numbers')}; {number} of "
                f"{count_rows(events)} rows do not. Take the logs as they were published, or drop "
                "these rows."
            )
    return events


def _whole(column: str) -> str:
    """Writes SQL for a whole number in a text column; null for anything else, 1.5 included."""
    as_integer = f'TRY_CAST("{column}" AS BIGINT)'
    return f'(CASE WHEN TRY_CAST("{column}" AS DOUBLE) = {as_integer} THEN {as_integer} END)'


def _read_cut(
    connection: DuckDB, folder: Path, source: Source
) -> tuple[ibis.Table, tuple[Dropped, ...]]:
    """Makes events of the lists and of the two logs of the cut."""
    sequences = connection.read_parquet(folder / _CUT_FILES[0])
    lists = ("watch_seq", "long_watch_seq")
    for name in ("user_id", *lists):
        require_column(sequences.columns, name, Source(str(folder / _CUT_FILES[0])), _CUT_REMEDY)
    for name in lists:
        if not sequences.schema()[name].is_array():
            raise DataError(
                f"{folder / _CUT_FILES[0]}: column {name!r} must be a list of videos, it is "
                f"{sequences.schema()[name]} ({count_rows(sequences)} rows). {_CUT_REMEDY}"
            )
    _check_users(sequences, folder / _CUT_FILES[0])
    for name in _CUT_FILES[1:]:
        _check_exposures(connection.read_parquet(folder / name), folder / name)
    table = ibis.util.gen_name("kuairand_events")
    _execute(connection, folder, _CUT_SQL.format(table=table), *map(str, _files_of(folder)))
    num_long_views = sequences.aggregate(
        n=sequences["watch_seq"]
        .filter(lambda video: sequences["long_watch_seq"].contains(video))
        .length()
        .sum()
    )
    number = int(num_long_views.to_pyarrow()["n"][0].as_py() or 0)
    _log_cut(sequences, folder)
    reason = "entry of watch_seq whose video is in the user's long_watch_seq: a long view"
    return connection.table(table), (Dropped(reason, number),) if number else ()


_CUT_REMEDY = "Take the files of the cut as they are."
_CUT_SQL = """
CREATE TABLE "{table}" AS
WITH users AS (
    SELECT user_id, coalesce(watch_seq, []) AS watch_seq,
        coalesce(long_watch_seq, []) AS long_watch_seq
    FROM read_parquet($1)
), watched AS (
    SELECT user_id, long_watch_seq, unnest(watch_seq) AS video_id,
        generate_subscripts(watch_seq, 1) AS place
    FROM users
), events AS (
    SELECT user_id, video_id, 0 AS long_view, NULL AS is_rand, NULL AS tab, 'train' AS part,
        0 AS file, user_id AS first, 0 AS second, place AS third
    FROM watched WHERE list_contains(long_watch_seq, video_id) IS NOT TRUE
    UNION ALL
    SELECT user_id, unnest(long_watch_seq), 1, NULL, NULL, 'train',
        0, user_id, 1, generate_subscripts(long_watch_seq, 1)
    FROM users
    UNION ALL
    SELECT user_id, video_id, long_view, is_rand, tab, 'validation',
        1, time_ms, 0, file_row_number
    FROM read_parquet($2, file_row_number = true)
    UNION ALL
    SELECT user_id, video_id, long_view, is_rand, tab, 'test', 2, time_ms, 0, file_row_number
    FROM read_parquet($3, file_row_number = true)
)
SELECT user_id::BIGINT AS user_id, video_id::BIGINT AS item_id,
    row_number() OVER (ORDER BY file, first, second, third) - 1 AS event_number,
    CASE long_view WHEN 1 THEN 'clicked' ELSE 'exposed' END AS stage,
    is_rand::BIGINT AS is_rand, tab::BIGINT AS tab, long_view::BIGINT AS long_view, part
FROM events
"""


def _files_of(folder: Path) -> list[Path]:
    return [folder / name for name in _CUT_FILES]


def _check_users(sequences: ibis.Table, path: Path) -> None:
    num_rows = count_rows(sequences)
    num_users = int(sequences["user_id"].nunique().to_pyarrow().as_py())
    if num_users != num_rows:
        raise DataError(
            f"{path}: column 'user_id' holds {num_users} different users in {num_rows} rows. "
            f"It must hold one row a user. {_CUT_REMEDY}"
        )


def _check_exposures(exposures: ibis.Table, path: Path) -> None:
    for name in ("user_id", "video_id", "time_ms", "long_view", "is_rand", "tab"):
        require_column(exposures.columns, name, Source(str(path)), _CUT_REMEDY)
        if not exposures.schema()[name].is_integer():
            raise DataError(
                f"{path}: column {name!r} must be an integer, it is {exposures.schema()[name]} "
                f"({count_rows(exposures)} rows). {_CUT_REMEDY}"
            )
    long_view = exposures["long_view"]
    wrong = {
        "long_view": (long_view.isnull() | long_view.notin([0, 1]), "0 or 1"),
        "time_ms": (exposures["time_ms"].isnull(), "a time in milliseconds"),
    }
    for name, number in _counts(exposures, {k: bad for k, (bad, _) in wrong.items()}).items():
        if number:
            raise DataError(
                f"{path}: column {name!r} must hold {wrong[name][1]}; {number} of "
                f"{count_rows(exposures)} rows do not. {_CUT_REMEDY}"
            )


def _log_cut(sequences: ibis.Table, folder: Path) -> None:
    """Says how much of the users' pasts the lists leave out, where the file knows it."""
    if "history_len" not in sequences.columns:
        return
    row = sequences.aggregate(
        exposures=sequences["history_len"].sum(), listed=sequences["watch_seq"].length().sum()
    ).to_pyarrow()
    logger.info(
        "%s: watch_seq holds the last %d of %d exposures before validation; long_watch_seq is cut "
        "on its own",
        folder / _CUT_FILES[0],
        row["listed"][0].as_py(),
        row["exposures"][0].as_py(),
    )


def _open_features(
    connection: DuckDB,
    folder: Path,
    table: str,
    features: Mapping[str, FeatureKind],
    version: str | None,
) -> File | None:
    """Opens the features of users or videos; None where there are none and none are asked for."""
    matches = [match for path in folder.iterdir() if (match := _FEATURES.fullmatch(path.name))]
    found = sorted((match for match in matches if match["table"] == table), key=lambda m: m[0])
    if not found:
        if not features:
            logger.info("%s: no %s file; ids alone", folder, table)
            return None
        raise DataError(
            f"{folder}: no file {table}_*.csv, which holds the features {', '.join(features)}. "
            "Add it, or ask for no such features."
        )
    if len(found) > 1 or (version and found[0]["version"] not in (version, None)):
        raise DataError(
            f"{folder}: features in {', '.join(match[0] for match in found)}, and the logs are of "
            f"the version {version or 'pure'}. Each version numbers its users and videos anew: "
            "keep the one file that goes with the logs."
        )
    return open_file(connection, folder / found[0][0])


def _read_features(
    file: File | None,
    id_name: str,
    column: str,
    features: Mapping[str, FeatureKind],
    events: ibis.Table,
) -> ibis.Table:
    """Makes the item or user table."""
    if file is None:
        return read_entities(None, None, id_name, features, events, ",")
    source = Source(str(file.path))
    require_column(file.columns, column, source, "Take the file as it was published.")
    if not is_integer_id(file.table, column, source, is_text=file.is_text):
        raise DataError(
            f"{source.column(column)} must hold whole numbers ({count_rows(file.table)} rows). "
            "Take the file as it was published."
        )
    file = dataclasses.replace(file, table=_as_categories(file, features))
    ids = file.table[column].cast("int64")
    # upload_dt is a day without a zone; the logs' own `date` is UTC+8, so it is taken as that too.
    return read_entities(file, ids, id_name, features, events, ",", time_zone="Asia/Shanghai")


def _as_categories(file: File, features: Mapping[str, FeatureKind]) -> ibis.Table:
    """Makes integers of categories that were written as floats ("9.0") beside missing ones."""
    integers: dict[str, ir.Value] = {}
    for name, kind in features.items():
        if kind not in ("categorical", "hashed") or name not in file.columns:
            continue
        value = file.table[name]
        if value.type().is_floating():
            value = value.isnan().ifelse(ibis.null(), value)
            is_whole = value == value.round()
        elif file.is_text:
            is_whole = value.re_search(_WHOLE_NUMBER)
            value = value.re_replace(r"\.0$", "")  # Not by a float: ids may be long.
        else:
            continue
        if not _counts(file.table, {name: value.notnull() & ~is_whole})[name]:
            integers[name] = value.cast("int64")
    return file.table.mutate(**integers)


def _execute(connection: DuckDB, folder: Path, sql: str, *parameters: str) -> None:
    try:
        connection.con.execute(sql, list(parameters))
    except duckdb.Error as error:
        raise DataError(
            f"{folder} cannot be read: {str(error).strip()} Take the files as they were published."
        ) from error


def _counts(table: ibis.Table, conditions: Mapping[str, ir.BooleanValue]) -> dict[str, int]:
    sums = {name: condition.sum() for name, condition in conditions.items()}
    row = table.aggregate(**sums).to_pyarrow().to_pylist()[0]
    return {name: int(value or 0) for name, value in row.items()}
