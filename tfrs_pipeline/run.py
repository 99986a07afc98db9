"""The stages composed: from a config to a model in service, one folder a run."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import ibis
import numpy as np
import pyarrow as pa
import tensorflow as tf

from tfrs_pipeline import __version__
from tfrs_pipeline.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    SamplesConfig,
    SplitConfig,
    check_model_name,
    dump_config,
    load_config,
)
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.log import Log, Split
from tfrs_pipeline.data.schema import DataError, Stage
from tfrs_pipeline.data.split import Holdout
from tfrs_pipeline.evaluation.baselines import Ease, Ials, Interactions, MostPopular
from tfrs_pipeline.evaluation.evaluate import evaluate, popularity_slices
from tfrs_pipeline.evaluation.results import EvaluationResult
from tfrs_pipeline.model.features import Feature
from tfrs_pipeline.model.fit import BeforeEpochs, TrainingResult, train
from tfrs_pipeline.model.mining import MinedPools
from tfrs_pipeline.model.queries import QueryEncoder, exact_retriever
from tfrs_pipeline.model.two_tower import TwoTowerModel
from tfrs_pipeline.negatives.batches import TrainingBatches, evaluation_batches
from tfrs_pipeline.negatives.mined import (
    MINED,
    MiningReport,
    MiningRules,
    query_of_sample,
)
from tfrs_pipeline.negatives.mixture import num_unreachable
from tfrs_pipeline.negatives.sequences import SequenceBatches
from tfrs_pipeline.negatives.user_sets import UserSetBatches
from tfrs_pipeline.retrieval import Retriever
from tfrs_pipeline.samples.build import (
    RowLists,
    Samples,
    build_samples,
    read_ids,
    read_samples,
)
from tfrs_pipeline.samples.hard_pools import HardNegativeRules
from tfrs_pipeline.samples.positives import (
    keep_rate,
    positive_probability,
    power_law_rate,
    select_positives,
)
from tfrs_pipeline.serving.export import LIBRARIES, describe_index, export, file_hash
from tfrs_pipeline.serving.index import Exact, IndexRetriever, Scann, index_for
from tfrs_pipeline.serving.publish import MANIFEST_FILE
from tfrs_pipeline.serving.tune import tune_index
from tfrs_pipeline.sources.kuairand import load_kuairand
from tfrs_pipeline.sources.movielens import load_movielens_100k
from tfrs_pipeline.sources.recflow import load_recflow

logger = logging.getLogger(__name__)

NUM_INDEX_PROBES = 1000
NUM_EXAMPLES = 4
EXAMPLE_LENGTH = 10

NOTHING_MINED = "no hard negatives were mined"

OnStage = Callable[["StageReport"], None]
OnProgress = Callable[[str, int, int], None]


@dataclass
class StageReport:
    """What one stage did.

    Args:
        name: Of the stage.
        notes: Lines for the user: counts, what was dropped.
        seconds: Wall time.
    """

    name: str
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Stages:
    """Times the stages of a command, shows them and keeps their notes.

    Args:
        on_stage: Called as each stage ends.
        on_progress: Called as each stage begins, with its name and no total.

    Attributes:
        notes: Stage -> its lines.
        seconds: Stage -> wall time.
    """

    def __init__(self, on_stage: OnStage, on_progress: OnProgress) -> None:
        self._on_stage = on_stage
        self._on_progress = on_progress
        self.notes: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[StageReport]:
        """Runs a stage within; what is noted in its report is kept."""
        report = StageReport(name)
        start = time.monotonic()
        self._on_progress(name, 0, 0)
        yield report
        self.notes[name] = report.notes
        report.seconds = self.seconds[name] = round(time.monotonic() - start, 3)
        self._on_stage(report)


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Args:
        folder: Of the run: config.toml, metrics.json, data, samples, checkpoints.
        export_folder: The new version of the model.
        metrics: What metrics.json holds.
    """

    folder: Path
    export_folder: Path
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Corpus:
    """Ids and encoded features behind the rows of a run.

    Args:
        candidate_ids: [num_candidates] item ids, in the order of the rows from 1.
        query_ids: [num_queries] user ids, likewise.
        candidate_features: How item columns are encoded.
        query_features: How user columns are encoded.
        candidate_columns: Encoded item features by name.
        query_columns: Encoded user features by name.
    """

    candidate_ids: np.ndarray
    query_ids: np.ndarray
    candidate_features: tuple[Feature, ...]
    query_features: tuple[Feature, ...]
    candidate_columns: dict[str, np.ndarray]
    query_columns: dict[str, np.ndarray]


def run(
    config: RunConfig,
    folder: Path,
    *,
    on_stage: OnStage = lambda report: None,
    on_progress: OnProgress = lambda task, done, total: None,
) -> RunResult:
    """Runs the whole pipeline.

    A folder that holds a stopped run of the same config is resumed: finished data and samples are
    kept, training goes on from its last epoch. A finished run whose export is still there is given
    back as it is: another export would be another version for a server to take up.

    Args:
        config: What to do.
        folder: The run's folder; made if missing.
        on_stage: Called as each stage ends.
        on_progress: Called within long stages with a task's name, steps done and steps in all.

    Returns:
        Where things lie, and the metrics.

    Raises:
        ValueError: If the folder holds a run of another config, or the data is refused
            (`DataError`).
    """
    check_model_name(config)
    claim_folder(config, folder)
    if (finished := _finished_run(folder)) is not None:
        on_stage(StageReport("finished before", ["its results follow; nothing was done"]))
        return finished
    stage = Stages(on_stage, on_progress)
    with stage("data") as report:
        log, report.notes = stored_data(config.data, folder / "data")
    with stage("split") as report:
        split, report.notes = stored_split(log, config, folder / "data")
        validation_queries, test_queries = split.validation, split.test
    with stage("samples") as report:
        samples_folder = folder / "samples"
        selection = training_samples(config, log, split, ("train",), samples_folder / "selection")
        final_parts = parts_before_test(config)
        final = training_samples(config, log, split, final_parts, samples_folder / "final")
        corpus = read_corpus(log, samples_folder / "final")
        report.notes += describe_samples(samples_folder / "final")
        _require_hard_negatives(config.samples, final)
    models: dict[str, Retriever] = {}
    trained: dict[str, TrainingResult] = {}
    two_tower: TwoTowerModel | None = None
    for name, model_config in _variants(config).items():
        with stage(f"train {name}") as report:
            model, trained[name], report.notes = train_and_refit(
                config,
                corpus,
                selection,
                final,
                validation_queries,
                model_config=model_config,
                folder=folder / "checkpoints" / name,
                name=name,
                on_progress=on_progress,
            )
            models[name] = exact_retriever(model, corpus.query_ids, corpus.candidate_ids)
        two_tower = two_tower or model
    assert two_tower is not None
    with stage("baselines") as report:
        baselines, notes = fit_baselines(
            config, corpus, selection, final, validation_queries, on_progress=on_progress
        )
        models |= baselines
        report.notes += notes
    with stage("evaluate") as report:
        evaluation = evaluate(
            models,
            test_queries,
            exclude=config.evaluation.exclude,
            cutoffs=config.evaluation.cutoffs,
            num_bootstrap=config.evaluation.num_bootstrap,
            seed=config.seed,
            on_progress=on_progress,
        )
        report.notes += _describe_evaluation(evaluation.first)
    with stage("export") as report:
        metrics: dict[str, Any] = {
            "dataset": config.model_name,
            "split": split.report(),
            **evaluation.summary(),
            "training": {
                name: {"best_epoch": result.best_epoch, "history": result.history}
                for name, result in trained.items()
            },
            "examples": _examples(models["two_tower"], test_queries, corpus, config),
            "versions": library_versions(),
        }
        data_files = sorted((folder / "data").glob("*.parquet"))
        export_folder, metrics["index"] = export_model(
            config,
            log,
            corpus,
            two_tower,
            test_queries,
            manifest={
                "data": {path.name: file_hash(path) for path in data_files},
                "counts": json.loads((samples_folder / "final" / "report.json").read_text()),
                "metrics": metrics["models"]["two_tower"],
            },
        )
        report.notes.append(describe_index(metrics["index"], len(corpus.candidate_ids)))
        report.notes.append("a fresh process loaded the export and gave the same answers")
    metrics["export_folder"] = str(export_folder)
    metrics["notes"] = stage.notes
    metrics["seconds"] = stage.seconds
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2))
    return RunResult(folder, export_folder, metrics)


def _finished_run(folder: Path) -> RunResult | None:
    """Reads what a finished run left behind; None if it is not finished, or its export is gone."""
    path = folder / "metrics.json"
    if not path.exists():
        return None
    metrics = json.loads(path.read_text())
    export_folder = Path(metrics["export_folder"])
    return RunResult(folder, export_folder, metrics) if export_folder.is_dir() else None


def load_data(config: DataConfig) -> Log:
    """Loads the log that a config names."""
    features: dict[str, Any] = {
        "item_features": config.item_features,
        "user_features": config.user_features,
    }
    if config.source == "movielens-100k":
        log = load_movielens_100k(config.path, **features)
        return dataclasses.replace(log, is_ordered=config.ordered)
    assert config.path is not None  # The config's own check.
    if config.source == "kuairand":
        return load_kuairand(
            config.path,
            label=config.label,
            unknown_items=config.unknown_items,
            duplicates=config.duplicates,
            **features,
        )
    if config.source == "recflow":
        return load_recflow(
            config.path, label=config.label, duplicates=config.duplicates, **features
        )
    return Log.from_files(
        config.path,
        items=config.items_path,
        users=config.users_path,
        columns=config.columns,
        item_columns=config.item_columns,
        user_columns=config.user_columns,
        rating_threshold=config.rating_threshold,
        stage_values=config.stage_values,
        label=config.label,
        timestamp_unit=config.timestamp_unit,
        time_zone=config.time_zone,
        list_separator=config.list_separator,
        unknown_items=config.unknown_items,
        duplicates=config.duplicates,
        is_ordered=config.ordered,
        **features,
    )


def split_log(log: Log, config: SplitConfig, seed: int) -> Split:
    """Splits a log as a config says."""
    validation: Any = config.validation_share
    test: Any = config.test_share
    if config.kind == "last_n":
        validation, test = config.num_validation, config.num_test
    elif config.validation_start is not None:
        validation, test = config.validation_start, config.test_start
    return log.split(
        config.kind,
        validation=validation,
        test=test,
        target_share=config.target_share,
        min_positives=config.min_positives,
        seed=seed,
    )


def training_samples(
    config: RunConfig, log: Log, split: Split, parts: Sequence[str], folder: Path
) -> Samples:
    """Builds the samples of a config from some parts of the split, or reads those of the folder.

    Args:
        config: Of the run.
        log: As loaded.
        split: Of it (`split_log`).
        parts: Those to train on: "train", and "validation" once it has chosen the settings.
        folder: Where the samples lie; whole ones are read as they are, whatever made them.

    Returns:
        One sample per positive of these parts, with counts and masks from the same parts alone.
    """
    if not (folder / "report.json").exists():
        build_samples(
            log,
            split.events.filter(split.events["part"].isin(list(parts))),
            folder,
            seed=config.seed,
            order=log.order,
            hard_negatives=hard_negative_rules(config.samples),
        )
    return read_samples(folder)


def read_corpus(log: Log, samples_folder: Path) -> Corpus:
    """Reads the ids behind the rows of samples, and encodes the features that stand beside them.

    Args:
        log: The one that the samples were built from.
        samples_folder: As given to `training_samples`; all samples of the same log share rows.
    """
    candidate_ids, query_ids = read_ids(samples_folder)
    items = log.items.order_by("item_id").to_pyarrow()
    users = log.users.order_by("user_id").to_pyarrow()
    end = None
    if "timestamp" in log.events.columns:
        end = log.events["timestamp"].max().to_pyarrow().as_py()
    candidate_features, candidate_columns = _encode(items, log.item_features, end)
    query_features, query_columns = _encode(users, log.user_features, end)
    return Corpus(
        candidate_ids,
        query_ids,
        candidate_features,
        query_features,
        candidate_columns,
        query_columns,
    )


def build_model(
    config: ModelConfig,
    samples: SamplesConfig,
    corpus: Corpus,
    *,
    cutoffs: tuple[int, ...] = (20, 100),
    bank_size: int = 0,
    name: str = "two_tower",
) -> TwoTowerModel:
    """Builds the two-tower model of a config, with the corpus' features in it, untrained.

    Args:
        config: The model's settings.
        samples: Those of the samples.
        corpus: Ids and features behind the model's rows.
        cutoffs: Of the metrics that `evaluate` reports.
        bank_size: That of the batches (`TrainingBatches.bank_size`).
        name: Of the model.
    """
    model = TwoTowerModel(
        num_queries=len(corpus.query_ids),
        num_candidates=len(corpus.candidate_ids),
        query_features=[feature.spec for feature in corpus.query_features],
        candidate_features=[feature.spec for feature in corpus.candidate_features],
        history_length=samples.history_length,
        cutoffs=cutoffs,
        bank_size=bank_size,
        name=name,
        **config.model_dump(),
    )
    model.set_features(corpus.query_columns, corpus.candidate_columns)
    return model


def training_batches(
    config: RunConfig, samples: Samples, *, seed: int | None = None
) -> TrainingBatches:
    """Makes the hybrid batches of a config from samples; mined pools are empty to begin with."""
    if _is_mined(config.samples):
        nothing = RowLists.from_lists([np.zeros(0, np.int32)] * len(samples))
        samples = dataclasses.replace(samples, hard_pools={**samples.hard_pools, MINED: nothing})
    rate = resampling_rate(config.samples, samples.counts)
    is_drawn = config.samples.resampling_as == "drawing"
    common: dict[str, Any] = {
        "batch_size": config.training.batch_size,
        "easy_negatives": [(easy.alpha, easy.num) for easy in config.samples.easy_negatives],
        "history_length": config.samples.history_length,
        "seed": config.seed if seed is None else seed,
        "mask_known_positives": config.samples.mask_known_positives,
        "mask_exposed": config.samples.mask_exposed,
        "hard_share": config.samples.hard_share,
        "hard_negatives": [
            (hard.stage, hard.share, hard.num) for hard in config.samples.hard_negatives
        ],
        "positive_weight": None if is_drawn else rate,
    }
    if config.training.positions == "all":
        is_ordered = samples.num_earlier is not None
        return (SequenceBatches if is_ordered else UserSetBatches)(samples, **common)
    return TrainingBatches(
        samples,
        in_batch=config.samples.in_batch,
        positive_rate=rate if is_drawn else None,
        bank_batches=config.samples.bank_batches,
        frequency="streaming" if config.model.correction == "streaming" else "counted",
        **common,
    )


def hard_negative_rules(config: SamplesConfig) -> HardNegativeRules | None:
    """Makes the rules for hard negatives from the log; None if a config asks for none."""
    stages = [Stage(s.stage) for s in config.hard_negatives if s.stage != MINED]
    if config.hard_share == 0 or not stages:
        return None
    return HardNegativeRules(
        stages=stages,
        min_pool=config.hard_min_pool,
        max_pool=config.hard_max_pool,
        window=timedelta(hours=config.hard_window_hours),
        bottom_share=config.ranked_bottom_share,
        min_rank=config.ranked_min_rank,
        allow_exposed=config.allow_exposed_as_negatives,
    )


def mined_pools(
    config: RunConfig,
    corpus: Corpus,
    batches: TrainingBatches,
    *,
    folder: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> MinedPools | None:
    """Makes what mines hard negatives for a training; None if a config asks for none.

    Args:
        config: Of the run.
        corpus: Ids behind the rows of the batches.
        batches: Of `training_batches`.
        folder: Where pools are kept for a stopped training.
        on_progress: Called while mining with the samples done and their total.
    """
    settings = config.samples
    if not _is_mined(settings):
        return None
    return MinedPools(
        batches,
        MiningRules(
            settings.mined_min_rank,
            settings.mined_max_rank,
            settings.mined_margin,
            settings.hard_max_pool,
        ),
        every=settings.mined_every,
        make_retriever=lambda model: _retriever_of_rows(config, model, corpus, batches.samples),
        seed=config.seed,
        folder=folder,
        on_progress=on_progress,
    )


def resampling_rate(config: SamplesConfig, counts: np.ndarray) -> np.ndarray | None:
    """Computes the rates, by candidate row, at which a config resamples positives, if it does."""
    if config.resampling == "power_law":
        return power_law_rate(counts, config.resampling_exponent)
    if config.resampling == "keep_rule":
        return keep_rate(counts, config.resampling_threshold)
    return None


def validation_batches(
    model: TwoTowerModel,
    corpus: Corpus,
    queries: Holdout,
    exclude: Literal["clicked", "seen", "none"],
) -> tf.data.Dataset:
    """Makes the batches for `model.evaluate` from evaluation queries."""
    encoder = QueryEncoder(model, corpus.query_ids, corpus.candidate_ids)
    query_rows, histories = encoder.rows(queries.as_queries())
    nothing = [np.zeros(0, np.int64)] * len(queries)
    left_out = queries.excluded(exclude) or nothing
    items = Ids(corpus.candidate_ids)
    excluded = [items.rows(ids) for ids in left_out]
    relevant = [
        np.setdiff1d(items.rows(ids), out)
        for ids, out in zip(queries.relevant, excluded, strict=True)
    ]
    return evaluation_batches(
        query_rows,
        RowLists.from_lists([history[history > 0] for history in histories]),
        RowLists.from_lists(relevant),
        RowLists.from_lists(excluded),
        history_length=model.history_length,
    )


def train_model(
    config: RunConfig,
    model_config: ModelConfig,
    corpus: Corpus,
    batches: TrainingBatches,
    *,
    validation_queries: Holdout | None = None,
    max_epochs: int | None = None,
    decay_epochs: int | None = None,
    max_seconds: float | None = None,
    before_epochs: BeforeEpochs | None = None,
    name: str = "two_tower",
    checkpoint_folder: Path | None = None,
    on_epoch: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[TwoTowerModel, TrainingResult]:
    """Builds a model and trains it by the settings of a config (see `model.training.train`).

    Args:
        config: Of the run; its seed also starts the weights.
        model_config: The model's own settings: `config.model`, or a variant of it.
        corpus: Ids and features behind the rows of the batches.
        batches: Of `training_batches`.
        validation_queries: Queries that choose the epoch to keep and stop the training early; None
            trains all epochs and keeps the last.
        max_epochs: Epochs at most; None is the config's number.
        decay_epochs: Epochs that the decay of the step size goes over; None is the config's
            `max_epochs`, whatever `max_epochs` here: a second training goes the way of the first.
        max_seconds: No epoch is begun after this time.
        before_epochs: What prepares the batches, such as `mined_pools`.
        name: Of the model.
        checkpoint_folder: Where every epoch is saved and a stopped training is resumed from.
        on_epoch: Called after each epoch with its number, from 1, and its logs.

    Returns:
        The model with its best weights, and how it got there.

    Raises:
        ValueError: If event files are asked for and there is no folder for them.
    """
    if config.training.tensorboard and checkpoint_folder is None:
        raise ValueError(
            "training.tensorboard writes into the folder of the checkpoints, and there is none: "
            "pass checkpoint_folder, or set training.tensorboard to false."
        )
    tf.keras.utils.set_random_seed(config.seed)
    cutoffs = config.evaluation.cutoffs
    model = build_model(
        model_config,
        config.samples,
        corpus,
        cutoffs=cutoffs,
        bank_size=batches.bank_size,
        name=name,
    )
    validation = (
        validation_batches(model, corpus, validation_queries, config.evaluation.exclude)
        if validation_queries is not None
        else None
    )
    tensorboard_folder = None
    if config.training.tensorboard and checkpoint_folder is not None:
        tensorboard_folder = checkpoint_folder / "tensorboard"
        model.report_tail(popularity_slices(batches.counts[1:])["tail"])
    result = train(
        model,
        batches,
        max_epochs=config.training.max_epochs if max_epochs is None else max_epochs,
        optimizer=config.training.optimizer,
        learning_rate=config.training.learning_rate,
        warmup_steps=config.training.warmup_steps,
        decay=config.training.decay,
        decay_to=config.training.decay_to,
        decay_epochs=decay_epochs or config.training.max_epochs,
        validation=validation,
        monitor=config.training.monitor,
        patience=config.training.patience,
        max_seconds=max_seconds,
        before_epochs=before_epochs,
        checkpoint_folder=checkpoint_folder,
        tensorboard_folder=tensorboard_folder,
        on_epoch=on_epoch,
    )
    return model, result


def fit_baselines(
    config: RunConfig,
    corpus: Corpus,
    selection: Samples,
    final: Samples,
    validation_queries: Holdout,
    *,
    on_progress: OnProgress = lambda task, done, total: None,
) -> tuple[dict[str, Retriever], list[str]]:
    """Fits the baselines of a config, their settings chosen on validation where it lists several.

    Args:
        config: Of the run; `evaluation` lists the baselines and their settings.
        corpus: Ids behind the rows of the samples.
        selection: Samples of the training part.
        final: Samples of all that precedes the test; the baselines are fitted to these.
        validation_queries: Queries that choose.
        on_progress: As in `run`.

    Returns:
        The baselines by name, and notes on what was chosen and what was skipped.
    """
    settings = config.evaluation
    notes = []
    grids: dict[str, tuple[Callable[..., Any], list[dict[str, Any]]]] = {
        "popularity": (MostPopular, [{}]),
        "ease": (
            Ease,
            [{"l2": l2, "max_candidates": settings.max_ease_candidates} for l2 in settings.ease_l2],
        ),
        "ials": (
            Ials,
            [
                {
                    "num_factors": num_factors,
                    "regularization": regularization,
                    "alpha": alpha,
                    "seed": config.seed,
                }
                for num_factors, regularization, alpha in itertools.product(
                    settings.ials_num_factors, settings.ials_regularization, settings.ials_alpha
                )
            ],
        ),
    }
    found: dict[str, Retriever] = {}
    items = Ids(corpus.candidate_ids)
    training, everything = _interactions(selection, items), _interactions(final, items)
    for name in settings.baselines:
        kind, grid = grids[name]
        if name == "ease" and len(corpus.candidate_ids) > settings.max_ease_candidates:
            notes.append(
                f"ease: skipped, {len(corpus.candidate_ids):,} items are more than "
                f"evaluation.max_ease_candidates = {settings.max_ease_candidates:,}"
            )
            continue
        scores = []
        for i, options in enumerate(grid if len(grid) > 1 else []):
            on_progress(f"{name}, choosing on validation", i, len(grid))
            retriever = kind(**options).fit(training)
            result = evaluate_retriever(config, retriever, corpus, selection, validation_queries)
            scores.append(result.overall.intervals[config.training.monitor].mean)
        best = grid[int(np.argmax(scores))] if scores else grid[0]
        found[name] = kind(**best).fit(everything)
        if scores:
            chosen = ", ".join(
                f"{k}={v}" for k, v in best.items() if k not in ("seed", "max_candidates")
            )
            notes.append(f"{name}: {chosen}, best of {len(grid)} on validation")
    return found, notes


def export_model(
    config: RunConfig,
    log: Log,
    corpus: Corpus,
    model: TwoTowerModel,
    queries: Holdout,
    *,
    manifest: Mapping[str, Any] | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Exports a model with its index, proven in a fresh process (see `serving.export`).

    What is known of each user in service is all of `log.events`, the test part included: it has
    happened.

    Args:
        config: Of the run; `export` says where and with which index.
        log: As loaded.
        corpus: Ids behind the model's rows.
        model: Trained.
        queries: What a ScaNN index is tuned and measured on; the manifest's example user is the
            first.
        manifest: More to write into the manifest, such as metrics; JSON-able.

    Returns:
        The folder of the new version, and what the index is: "kind" and, for ScaNN, "settings" and
        the "index_recall@100" against exact search.

    Raises:
        ExportError: If a fresh process cannot load the export or answers otherwise.
        RuntimeError: If no ScaNN index reaches the recall.
    """
    histories, known = _latest_histories(corpus, log.events)
    indexes: dict[str, Scann | Exact] = {
        "exact": Exact(),
        "scann": Scann(config.export.target_recall),
        "auto": index_for(len(corpus.candidate_ids), config.export.target_recall),
    }
    folder = export(
        _Trained(model, corpus, histories, known, log.items.order_by("item_id").to_pyarrow()),
        config.export.directory / config.model_name,
        index=indexes[config.export.index],
        filter_by=config.export.filter_by,
        keep_versions=config.export.keep_versions,
        queries=queries.as_queries(),
        manifest={"config": config.model_dump(mode="json"), **(manifest or {})},
    )
    return folder, json.loads((folder / MANIFEST_FILE).read_text())["index"]


@dataclass(frozen=True)
class _Trained:
    """A trained model and what serving asks of the log; see `Exportable`."""

    model: TwoTowerModel
    corpus: Corpus
    histories: RowLists
    known_positives: RowLists
    items: pa.Table

    @property
    def query_ids(self) -> np.ndarray:
        return self.corpus.query_ids

    @property
    def candidate_ids(self) -> np.ndarray:
        return self.corpus.candidate_ids

    @property
    def history_length(self) -> int:
        return self.model.history_length

    @property
    def variables(self) -> list[tf.Variable]:
        model = self.model
        towers = (model.query_table, model.query_tower, model.candidate_tower)
        return [variable for tower in towers for variable in tower.variables]

    @property
    def query_features(self) -> Sequence[Feature]:
        return self.corpus.query_features

    @property
    def candidate_features(self) -> Sequence[Feature]:
        return self.corpus.candidate_features

    def embed_queries(self, rows: Any, history_rows: Any, features: Any = None) -> tf.Tensor:
        return self.model.embed_queries(rows, history_rows, features)

    def embed_candidates(self, rows: Any, features: Any = None) -> tf.Tensor:
        return self.model.embed_candidates(rows, features)


def claim_folder(config: RunConfig, folder: Path) -> None:
    """Writes the settings into a folder, or checks that they are those of what it holds.

    Raises:
        ValueError: If the folder holds a run with other settings, or its path cannot be used.
    """
    for written in (folder, config.export.directory):
        # TensorFlow takes these for a pattern when it reads, and not when it writes.
        if wrong := sorted(set("[\\") & set(str(written))):
            raise ValueError(
                f"{written} holds {' and '.join(wrong)}: TensorFlow could not read back what it "
                "writes there. Choose a folder without."
            )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.toml"
    # A run whose data was refused has left nothing behind: its settings may be mended in place.
    has_begun = path.exists() and (folder / "data" / "log.json").exists()
    if not has_begun:
        path.write_text(dump_config(config))
    elif load_config(path) != config:
        raise ValueError(
            f"{folder} holds a run with other settings (see {path}). Choose another folder, or "
            "delete this one."
        )


def stored_data(config: DataConfig, folder: Path) -> tuple[Log, list[str]]:
    """Loads the log of a config into a folder, or reads the one that it holds; with notes."""
    if not (folder / "log.json").exists():
        load_data(config).write(folder)
    log = Log.read(folder)
    return log, log.describe()


def stored_split(log: Log, config: RunConfig, folder: Path) -> tuple[Split, list[str]]:
    """Splits the events into a folder, or reads the split that it holds; with notes."""
    path = folder / "split.parquet"
    if not path.exists():
        split_log(log, config.split, config.seed).write(path)
    split = Split.read(log, config.split.kind, path)
    return split, split.describe()


def describe_samples(folder: Path) -> list[str]:
    """Says what samples hold, and what was kept from being a negative."""
    counts = json.loads((folder / "report.json").read_text())
    return [
        f"{counts['num_samples']:,} positives, {counts['num_empty_histories']:,} of them with an "
        "empty history",
        f"{counts['num_candidates']:,} candidates, {counts['num_candidates_without_count']:,} of "
        "them never clicked in training",
        f"masked as negatives of their user: {counts['num_known_positives']:,} known positives, "
        f"{counts['num_exposed']:,} exposed and not clicked",
        *(
            f"hard negatives, {stage}: {pool['num_samples']:,} positives have some, "
            f"{pool['mean_pool']:.1f} on average"
            for stage, pool in counts.get("hard_negatives", {}).items()
        ),
        *(
            f"never hard negatives, {reason}: {num_rows:,} rows"
            for reason, num_rows in counts.get("hard_negatives_removed", {}).items()
        ),
    ]


def _require_hard_negatives(config: SamplesConfig, samples: Samples) -> None:
    if _is_mined(config):
        return
    if config.hard_share and not any(len(pool.values) for pool in samples.hard_pools.values()):
        stages = ", ".join(sampler.stage for sampler in config.hard_negatives)
        raise DataError(
            f"samples.hard_share = {config.hard_share}, and none of {len(samples):,} positives has "
            f"a hard negative of the stages {stages}. The log must hold items of these stages, of "
            "the same users within samples.hard_window_hours; or set samples.hard_share to 0."
        )


def _describe_batches(batches: TrainingBatches, config: SamplesConfig) -> list[str]:
    unreachable = num_unreachable(batches.expected_count)
    notes = [f"{unreachable:,} items are never drawn as negatives"] if unreachable else []
    masked = ", ".join(f"{share:.2%} {why}" for why, share in batches.masked_shares().items())
    notes.append(f"left out of the columns that rows share: {masked}")
    if config.hard_share:
        notes.append(f"effective mean hard share {batches.mean_hard_share:.4f}")
    if config.resampling != "none":
        slices = popularity_slices(batches.counts[1:])
        for when, q in (
            ("before", positive_probability(batches.counts)),
            ("after", batches.positive_share),
        ):
            shares = ", ".join(f"{name} {q[1:][rows].sum():.3f}" for name, rows in slices.items())
            notes.append(f"positives {when} resampling: {shares}")
    return notes


def _is_mined(config: SamplesConfig) -> bool:
    return config.hard_share > 0 and any(s.stage == MINED for s in config.hard_negatives)


def _retriever_of_rows(
    config: RunConfig, model: TwoTowerModel, corpus: Corpus, samples: Samples
) -> Retriever:
    """Makes the model of the moment a retriever whose ids are rows, through its index."""
    query_rows = np.arange(1, len(corpus.query_ids) + 1)
    candidate_rows = np.arange(1, len(corpus.candidate_ids) + 1)
    if index_for(len(candidate_rows)).kind == "exact":
        return exact_retriever(model, query_rows, candidate_rows)
    encoder = QueryEncoder(model, query_rows, candidate_rows)
    embeddings = model.embed_corpus()
    probes = np.random.default_rng(config.seed).choice(len(samples), NUM_INDEX_PROBES)
    length = config.samples.history_length
    queries = [query_of_sample(samples, i, length) for i in probes.tolist()]
    index, _ = tune_index(
        embeddings,
        encoder(queries),
        k=Scann.k,
        target_recall=config.export.target_recall,
        num_structures=1,  # Built anew every few epochs.
    )
    return IndexRetriever(index, candidate_rows, encoder)


def _describe_mining(reports: Mapping[int, MiningReport]) -> list[str]:
    """Says what the last mining kept and dropped."""
    if not reports:
        return [f"{NOTHING_MINED}: training ended within the first samples.mined_every epochs"]
    epoch, report = max(reports.items())
    dropped = {
        "known positives": report.known_positives,
        "exposed and not clicked": report.exposed,
        "of a better rank": report.better_rank,
        "of a worse rank": report.worse_rank,
        "within the margin": report.within_margin,
        "beyond the pool's size": report.beyond_pool,
    }
    return [
        f"mined after epoch {epoch}: {report.num_kept:,} hard negatives for "
        f"{report.num_samples - report.num_without:,} of {report.num_samples:,} positives",
        f"dropped of {report.num_retrieved:,} retrieved: "
        + ", ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count),
    ]


def _encode(
    table: pa.Table, kinds: Mapping[str, Any], end: datetime | None
) -> tuple[tuple[Feature, ...], dict[str, np.ndarray]]:
    """Fits and encodes features; ages count from the end of the log, if it has times."""
    features, columns = [], {}
    for name, kind in kinds.items():
        min_count = 2 if kind == "text" else 1
        features.append(Feature.fit(name, kind, table[name], min_count=min_count, reference=end))
        columns[name] = features[-1].encode_column(table[name])
    return tuple(features), columns


def _variants(config: RunConfig) -> dict[str, ModelConfig]:
    variants = {"two_tower": config.model}
    if config.evaluation.uncorrected and config.model.correction != "none":
        without = {"correction": "none", "correct_positive": False}
        variants["two_tower_uncorrected"] = ModelConfig(**{**config.model.model_dump(), **without})
    return variants


def _is_refitted(config: RunConfig) -> bool:
    """Says whether there is a second training; held-out users would add nothing to it."""
    return config.training.refit and config.split.kind != "held_out_users"


def parts_before_test(config: RunConfig) -> tuple[str, ...]:
    """Returns the parts that the model in service is trained on."""
    return ("train", "validation") if _is_refitted(config) else ("train",)


def train_and_refit(
    config: RunConfig,
    corpus: Corpus,
    selection: Samples,
    final: Samples,
    validation_queries: Holdout,
    *,
    model_config: ModelConfig | None = None,
    max_epochs: int | None = None,
    max_seconds: float | None = None,
    folder: Path | None = None,
    name: str = "two_tower",
    on_progress: OnProgress = lambda task, done, total: None,
) -> tuple[TwoTowerModel, TrainingResult, list[str]]:
    """Chooses the number of epochs on validation, then trains on all that precedes the test.

    Args:
        config: Of the run; `training.refit` says whether there is a second training.
        corpus: Ids and features behind the rows.
        selection: Samples of the training part.
        final: Samples of all that precedes the test.
        validation_queries: Queries that choose the epoch.
        model_config: Instead of the config's own.
        max_epochs: Instead of the config's own.
        max_seconds: After this time the first training begins no epoch.
        folder: Where both trainings are kept, to be resumed if stopped.
        name: Of the model.
        on_progress: As in `run`.

    Returns:
        The model, how the first training went, and notes for the user.
    """
    model_config = model_config or config.model
    max_epochs = max_epochs or config.training.max_epochs
    # Of both trainings: the second one stops at the chosen epoch, at the step size that it had.
    decay_epochs = max_epochs
    notes: list[str] = []

    def fit(
        batches: TrainingBatches,
        step: str,
        max_epochs: int,
        max_seconds: float | None = None,
        validation: Holdout | None = None,
    ) -> tuple[TwoTowerModel, TrainingResult]:
        mining = mined_pools(
            config,
            corpus,
            batches,
            folder=None if folder is None else folder / step,
            on_progress=lambda done, total: on_progress(f"{name}, mining", done, total),
        )
        model, result = train_model(
            config,
            model_config,
            corpus,
            batches,
            validation_queries=validation,
            max_epochs=max_epochs,
            decay_epochs=decay_epochs,
            max_seconds=max_seconds,
            before_epochs=mining,
            name=name,
            checkpoint_folder=None if folder is None else folder / step,
            on_epoch=lambda epoch, logs: on_progress(f"{name}, {step}", epoch, max_epochs),
        )
        if mining is not None:
            notes.extend(f"{step}: {line}" for line in _describe_mining(mining.reports))
        return model, result

    batches = training_batches(config, selection)
    model, chosen = fit(batches, "selection", max_epochs, max_seconds, validation_queries)
    monitored = chosen.history[f"val_{config.training.monitor}"]
    notes.append(
        f"best validation {config.training.monitor} {max(monitored):.4f} after "
        f"{chosen.best_epoch} of {len(monitored)} epochs"
    )
    if _is_refitted(config):
        batches = training_batches(config, final)
        model, refitted = fit(batches, "refit", chosen.best_epoch)
        notes.append(
            f"trained again on training and validation positives for {chosen.best_epoch} epochs, "
            f"{batches.positives_per_epoch * chosen.best_epoch / max(refitted.seconds, 1e-9):,.0f} "
            "positives/s"
        )
    notes += _describe_batches(batches, config.samples)
    return model, chosen, notes


def _interactions(samples: Samples, items: Ids) -> Interactions:
    known = samples.known_positives
    users = np.repeat(np.arange(len(known)), np.diff(known.offsets))
    return Interactions.from_rows(items, users, known.values)


def evaluate_retriever(
    config: RunConfig,
    retriever: Retriever,
    corpus: Corpus,
    samples: Samples,
    queries: Holdout,
    name: str | None = None,
    on_progress: OnProgress | None = None,
) -> EvaluationResult:
    """Evaluates a retriever by the settings of a config; without a name, only the means."""
    return evaluate(
        {name: retriever} if name else retriever,
        queries,
        exclude=config.evaluation.exclude,
        cutoffs=config.evaluation.cutoffs,
        num_bootstrap=config.evaluation.num_bootstrap if name else 0,
        seed=config.seed,
        on_progress=on_progress if name else None,
    ).first


def _describe_evaluation(result: EvaluationResult) -> list[str]:
    return [
        f"{len(result.user_ids):,} queries, {result.overall.num_relevant:,} items to find",
        f"skipped {result.num_skipped:,} queries with nothing to find; "
        f"{result.num_relevant_excluded:,} items to find were left out of the ranking",
    ]


def _examples(
    retriever: Retriever, queries: Holdout, corpus: Corpus, config: RunConfig
) -> list[dict[str, Any]]:
    """Shows what a few test queries are answered, chosen by length of history, short to long.

    Returns:
        A dict a query: user_id; history, the latest ids first, `EXAMPLE_LENGTH` at most, of
        num_history; recommended, ids, best first, what the evaluation excludes left out; found,
        those of them that are among the num_relevant items to find.
    """
    order = np.argsort([len(history) for history in queries.histories], kind="stable")
    places = np.linspace(0, len(order) - 1, NUM_EXAMPLES + 2)[1:-1].round().astype(int)
    numbers = list(dict.fromkeys(order[places].tolist()))
    everything = queries.as_queries()
    excluded = queries.excluded(config.evaluation.exclude)
    ids, scores = retriever.retrieve(
        [everything[i] for i in numbers],
        min(EXAMPLE_LENGTH, len(corpus.candidate_ids)),
        None if excluded is None else [excluded[i] for i in numbers],
    )
    examples = []
    for i, recommended, is_item in zip(numbers, ids, scores > -np.inf, strict=True):
        relevant = set(queries.relevant[i].tolist())
        shown = recommended[is_item].tolist()
        examples.append(
            {
                "user_id": queries.user_ids[i : i + 1].tolist()[0],
                "num_history": len(queries.histories[i]),
                "history": queries.histories[i][::-1][:EXAMPLE_LENGTH].tolist(),
                "recommended": shown,
                "num_relevant": len(relevant),
                "found": [id_ for id_ in shown if id_ in relevant],
            }
        )
    return examples


def library_versions() -> dict[str, str]:
    """Returns the versions of Python, of this package and of the libraries that an export needs."""
    return {
        "tfrs-pipeline": __version__,
        "python": platform.python_version(),
        **{library: importlib.metadata.version(library) for library in LIBRARIES},
    }


def _latest_histories(corpus: Corpus, events: ibis.Table) -> tuple[RowLists, RowLists]:
    """Collects what is known of each user now, the test part included: it has happened."""
    positives = select_positives(events)
    keys = ["timestamp"] if "timestamp" in events.columns else []
    table = (
        positives.order_by(["user_id", *keys, "event_number"])
        .select("user_id", "item_id")
        .to_pyarrow()
    )
    query_rows = Ids(corpus.query_ids).rows(table["user_id"].to_numpy())
    candidate_rows = Ids(corpus.candidate_ids).rows(table["item_id"].to_numpy())
    order = np.argsort(query_rows, kind="stable")
    ends = np.cumsum(np.bincount(query_rows, minlength=len(corpus.query_ids) + 1))
    lists = np.split(candidate_rows[order], ends[:-1])
    histories = [rows[::-1] for rows in lists]
    known = [np.unique(rows) for rows in lists]
    return RowLists.from_lists(histories), RowLists.from_lists(known)
