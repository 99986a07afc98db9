"""What a model is built from and trained on: ids, encoded features and samples of a log."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import ibis
import numpy as np

from tfrs_pipeline.data.ids import Ids, as_id_array
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.request_features import is_from_timestamp
from tfrs_pipeline.data.schema import DataError
from tfrs_pipeline.durable import hold_to, read_record, read_whole, refuse_others, write_record
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.kinds import KINDS
from tfrs_pipeline.negatives.samplers import FunnelLosers, HardNegatives
from tfrs_pipeline.samples.build import build_samples
from tfrs_pipeline.samples.never_negatives import are_all_never
from tfrs_pipeline.samples.store import Samples, read_ids, read_raw, read_samples

# A file beside samples and checkpoints that says what they were made of.
MADE_OF_FILE = "made_of.json"


@dataclass(frozen=True)
class Corpus:
    """The ids that the rows of samples stand for; features of items, users and requests."""

    candidate_ids: Ids  # Of rows 1, 2, ...
    query_ids: Ids
    candidate_features: tuple[Feature, ...] = ()
    query_features: tuple[Feature, ...] = ()
    # Encoded features of rows 1, 2, ... by name.
    candidate_columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    query_columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    request_features: tuple[Feature, ...] = ()  # The samples hold their values.
    has_times: bool = False
    # [1 + users] bool, the query rows with a positive; None if all have one.
    has_positive: np.ndarray | None = None
    # [1 + items] bool, the items that came after the training (`Log.later_items`). They are new:
    # they have the unknown id's embedding and are never negatives. None if there are none.
    is_later: np.ndarray | None = None

    @classmethod
    def read(cls, log: Log, folder: Path) -> Self:
        """Reads the ids behind a folder's samples, and encodes their features in the log."""
        candidate_ids, query_ids = read_ids(folder)
        has_times = "timestamp" in log.events.columns
        end = log.events["timestamp"].max().to_pyarrow().as_py() if has_times else None
        items, users = log.items.order_by("item_id"), log.users.order_by("user_id")
        # Features are fitted without later items: training cannot have known their values.
        is_later = is_there = None
        if log.later_items is not None and log.later_items.count().to_pyarrow().as_py():
            later = as_id_array(log.later_items["item_id"].to_pyarrow().to_pylist())
            is_later = np.isin(np.arange(len(candidate_ids) + 1), candidate_ids.rows(later))
            is_there = ~is_later[1:]
        candidate_features, candidate_columns = _encode(items, log.item_features, end, is_there)
        query_features, query_columns = _encode(users, log.user_features, end)
        return cls(
            candidate_ids,
            query_ids,
            candidate_features,
            query_features,
            candidate_columns,
            query_columns,
            tuple(
                # Fitted to the samples, which hold only the training part.
                replace(
                    KINDS[kind].fit(name, read_raw(folder, name), reference=end),
                    is_from_timestamp=is_from_timestamp(name, log.events.columns),
                )
                for name, kind in log.request_features.items()
            ),
            has_times,
            np.isin(np.arange(len(query_ids) + 1), read_samples(folder).query_rows),
            is_later,
        )


def _encode(
    table: ibis.Table,
    kinds: Mapping[str, str],
    end: datetime | None,
    is_there: np.ndarray | None = None,
) -> tuple[tuple[Feature, ...], dict[str, np.ndarray]]:
    """Fits features to the rows that `is_there` marks (None: to all); encodes all rows."""
    # Ages count from the end of the log.
    features, columns = [], {}
    data = table.select(*kinds).to_pyarrow() if kinds else {}
    for name, kind in kinds.items():
        fitted_to = data[name] if is_there is None else data[name].filter(is_there)
        features.append(KINDS[kind].fit(name, fitted_to, reference=end))
        columns[name] = features[-1].encode_column(data[name])
    return tuple(features), columns


@dataclass(frozen=True)
class TrainingSet:
    """Samples of a log, the corpus behind their rows, and a report of how they were built."""

    samples: Samples
    corpus: Corpus
    report: Mapping[str, Any]
    log: Log

    @classmethod
    def build(
        cls, log: Log, folder: Path | str, *, seed: int, hard: FunnelLosers | None = None
    ) -> Self:
        """Builds the samples of a training part in a folder, or reads them if they are complete.

        The seed draws the hard pools from the losers that `hard` asks for. Raises a `DataError`
        if there is no positive; a `ValueError` if another log, seed or `hard` made the folder.
        """
        folder = Path(folder)
        made_of = folder / MADE_OF_FILE
        if read_whole(folder / "report.json") is not None:
            hold_to(made_of, _made_of(log, seed, hard))
        else:
            refuse_others(folder.glob("[!.]*"), made_of)
            folder.mkdir(parents=True, exist_ok=True)
            # Written first: without it, samples could be of any log.
            write_record(made_of, _made_of(log, seed, hard))
            build_samples(log, folder, seed=seed, hard=hard)
        # The files were hashed when the samples were built or held to their record.
        report = read_record(folder / "report.json", check_files=False)
        corpus = Corpus.read(log, folder)
        samples = read_samples(
            folder,
            request_features=corpus.request_features,
            is_later=corpus.is_later,
            query_ids=corpus.query_ids,
            candidate_ids=corpus.candidate_ids,
        )
        return cls(samples, corpus, report, log)

    def check_negatives_left(self, hard: HardNegatives | None) -> None:
        """Refuses (`DataError`) a log in which every user clicked or saw every item.

        The masks leave no negatives there, unless exposed items are hard negatives (`hard`).
        """
        if are_all_never(self.samples, hard):
            raise DataError(
                "No item is anyone's negative, so there is nothing to train on: every user with a "
                "click in the training part clicked or saw every item. Give the log items that "
                "were not shown to everyone, for instance in the item table."
            )


def _made_of(log: Log, seed: int, hard: FunnelLosers | None) -> dict[str, Any]:
    """Returns what the samples of a log depend on, as JSON."""
    return {
        "log": log.fingerprint(),
        "order": log.order,
        "ties": log.ties,
        "request_features": dict(log.request_features),
        "seed": seed,
        "hard": repr(hard),
    }
