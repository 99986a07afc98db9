"""KuaiRand: short videos with real exposures, a part of them random (Gao et al., CIKM 2022).

Licence: CC BY-SA 4.0. The folder as published (KuaiRand-Pure, -1K or -27K) holds CSV logs of all
exposures. Time is `time_ms`, UTC; `date` and `hourmin`, which are UTC+8, are not read. Exposures of
the random policy are exposures like any other: an item shown at random and not clicked is never a
negative.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.requests import check_names
from tfrs_pipeline.data.schema import DataError, Source, require_column
from tfrs_pipeline.features.kinds import FeatureKind

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
"""Columns of the logs that may be a label."""

_LOG = re.compile(
    r"log_(?P<policy>standard|random)_(?P<days>\d+_\d+_to_\d+_\d+)_(?P<version>[A-Za-z0-9]+)"
    r"(_part(?P<part>\d+))?\.csv(\.gz)?"
)
_FEATURES = re.compile(
    r"(?P<table>user_features|video_features_basic)_(?P<version>[A-Za-z0-9]+)\.csv(\.gz)?"
)


def load_kuairand(
    folder: Path,
    *,
    label: Mapping[str, float] | None = None,
    item_features: Mapping[str, FeatureKind] | None = None,
    user_features: Mapping[str, FeatureKind] | None = None,
    request_features: Mapping[str, FeatureKind] | None = None,
    **options: Any,
) -> Log:
    """Loads KuaiRand: one event an exposure, with the context columns `is_rand` and `tab`.

    The order of the events is that of the logs: standard before random, by date and part, then by
    row. Ids are int64.

    Args:
        folder: Holds the files, or a folder `data` with them.
        label: Outcome (see `OUTCOMES`) -> weight. None: is_click.
        item_features: Column of video_features_basic -> kind, such as author_id, video_type,
            upload_type, music_type (categorical), tag (multi_categorical), video_duration
            (numeric, ms), upload_dt (timestamp; days of UTC+8).
        user_features: Column of user_features -> kind, such as user_active_degree or onehot_feat0.
        request_features: Column of the logs -> kind: tab, or hour and weekday (UTC); no outcome.
        **options: `unknown_items`, `duplicates` and `connection` of `Log.from_files`.

    Raises:
        DataError: If files, columns or values are missing or are not what they should be.
    """
    for name in label or {}:
        require_column(OUTCOMES, name, Source("KuaiRand's outcomes"), "Set label to some of them.")
    check_names(request_features or {}, OUTCOMES)
    folder, names = _find_files(Path(folder))
    logs, version = _list_logs(folder, names)
    logger.info("KuaiRand from %s. Licence: CC BY-SA 4.0, by its authors.", folder)
    log = Log.from_files(
        logs,
        items=_find_features(folder, names, "video_features_basic", item_features or {}, version),
        users=_find_features(folder, names, "user_features", user_features or {}, version),
        columns={
            "item_id": "video_id",
            "timestamp": "time_ms",
            "stage": "is_click",
            "is_rand": "is_rand",
            "tab": "tab",
        },
        item_columns={"item_id": "video_id"},
        item_features=item_features,
        user_features=user_features,
        request_features=request_features,
        stage_values={"1": "clicked", "0": "exposed"},
        label=label,
        timestamp_unit="ms",
        # upload_dt is a day without a zone; the logs' own `date` is UTC+8, so it is taken as that.
        time_zone="Asia/Shanghai",
        list_separator=",",
        max_bad_share=0,
        **options,
    )
    for name, column in (("user_id", "user_id"), ("item_id", "video_id")):
        if not log.events.schema()[name].is_int64():
            raise DataError(
                f"{folder}: column {column!r} must hold whole numbers in all files, and does not. "
                "Take the files as they were published."
            )
    return log


def _find_files(folder: Path) -> tuple[Path, list[str]]:
    """Returns the folder that holds KuaiRand's files, and the names of all its files."""
    for each in (folder, folder / "data"):
        names = sorted(path.name for path in each.iterdir()) if each.is_dir() else []
        if any(_LOG.fullmatch(name) for name in names):
            return each, names
    raise DataError(
        f"{folder}: no KuaiRand log in it or in its folder 'data'. Name the folder that holds "
        "log_standard_4_08_to_4_21_pure.csv and its like (or _1k, _27k)."
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
    if "random" not in {match["policy"] for match in found}:
        logger.warning(
            "%s: no log_random_*.csv: what was shown at random and not clicked is not known, and "
            "may be drawn as a negative",
            folder,
        )
    found.sort(key=lambda m: (m["policy"] == "random", m["days"], int(m["part"] or 0)))
    return [folder / match[0] for match in found], versions[0]


def _find_features(
    folder: Path,
    names: Collection[str],
    table: str,
    features: Mapping[str, FeatureKind],
    version: str,
) -> Path | None:
    """Finds the features of users or videos; None where there are none and none are asked for."""
    matches = [match for match in map(_FEATURES.fullmatch, names) if match]
    found = [match for match in matches if match["table"] == table]
    if not found:
        if not features:
            logger.info("%s: no %s file; ids alone", folder, table)
            return None
        raise DataError(
            f"{folder}: no file {table}_*.csv, which holds the features {', '.join(features)}. "
            "Add it, or ask for no such features."
        )
    if len(found) > 1 or found[0]["version"] != version:
        raise DataError(
            f"{folder}: features in {', '.join(match[0] for match in found)}, and the logs are of "
            f"the version {version}. Each version numbers its users and videos anew: keep the one "
            "file that goes with the logs."
        )
    return folder / found[0][0]
