r"""Measures models on public data sets, by published protocols, beside the published numbers.

    ml-100k   MovieLens-100K, the package's main job; fetched by the package
    ml-1m     MovieLens-1M in SASRec's version, leave-one-out: HR@10 and NDCG@10
    gowalla   LightGCN's split, ids alone: recall@20 and NDCG@20

The last two are read from a folder (--data-dir), nothing is downloaded: `leaderboard_data.py` says
which files, from where, and how they are split. Every setting is chosen on the validation part,
then the model is fitted again to training and validation part; the test chooses nothing.

    popularity
    ease, ials           settings by a grid on validation; EASE up to 20,000 items
    gfcf                 GF-CF; its published numbers check the evaluator (gowalla)
    tutorial             the TFRS retrieval tutorial's model with its own settings
    tutorial_corrected   the same with candidate_sampling_probability and 20 epochs
    two_tower, ...       the package's models (OUR_MODELS), epochs chosen on validation

    python benchmarks/leaderboard.py --data ml-1m --data-dir ml-1m --run-dir runs/leaderboard \
        --json benchmarks/results/leaderboard_ml_1m.json

With --run-dir every finished (model, seed) is kept there and not repeated, and a stopped training
of the package's models goes on from its last epoch: the table can be filled a few models at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Before TensorFlow, since it selects Keras 2.
from tfrs_pipeline import RunConfig, with_settings

# isort: split
import numpy as np
import tensorflow as tf
import tutorial
from gfcf import GfcfRetriever
from leaderboard_data import PROTOCOLS, Protocol
from record import command, machine, write_json

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.log import Log, Split
from tfrs_pipeline.data.split import Holdout
from tfrs_pipeline.evaluation.baselines import Interactions
from tfrs_pipeline.evaluation.bootstrap import bootstrap_intervals
from tfrs_pipeline.model.queries import exact_retriever
from tfrs_pipeline.retrieval import Retriever
from tfrs_pipeline.run import (
    Corpus,
    evaluate_retriever,
    fit_baselines,
    parts_before_test,
    read_corpus,
    stored_data,
    stored_split,
    train_and_refit,
    training_samples,
)
from tfrs_pipeline.samples.build import Samples

NUM_BOOTSTRAP = 1000

_ALL_POSITIONS = {
    "samples.in_batch": False,
    "samples.easy_negatives": ({"alpha": 0, "num": 512}, {"alpha": 0.75, "num": 512}),
    "samples.history_length": 200,
    "training.positions": "all",
    "training.decay": "cosine",
    "training.warmup_steps": 40,
    "model.share_item_embedding": True,
}
# The mean of the history, of a table of its own: the user's items without an order, at random
# half read and half found.
_USER_SETS = {
    "samples.in_batch": False,
    "samples.easy_negatives": ({"alpha": 0.5, "num": 4096},),
    "samples.history_length": 300,
    "model.unknown_rate": 0.0,
    "model.embedding_dim": 512,
    "model.candidate_bias": True,
    "model.history_pooling": ("mean",),
    "model.history_dropout": 0.0,
    "model.combination": "sum",
    "model.temperature": 0.07,
    "training.positions": "all",
    "training.batch_size": 3072,
    "training.decay": "cosine",
    "training.learning_rate": 0.01,
    "training.warmup_steps": 50,
    "training.max_epochs": 60,
    "training.patience": 20,
}
# Model -> data set -> what differs from the package's defaults, by dotted name.
OUR_MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "two_tower": {
        "ml-100k": {},
        "ml-1m": {},
        # Without an order there is no recency.
        "gowalla": {"model.history_pooling": ("mean",)},
    },
    # Pooled histories, all positions of a sequence at once.
    "histories": {
        "ml-100k": {
            **_ALL_POSITIONS,
            "model.unknown_rate": 0.0,
            "model.embedding_dim": 128,
            "model.recency_decay": 0.8,
            "model.candidate_bias": True,
            "model.feature_dropout": 0.2,
            "training.max_epochs": 20,
            "training.patience": 6,
            "training.learning_rate": 0.004,
        },
    },
    # The preset, with batches and temperature for a million positives.
    "sequence": {
        "ml-1m": {
            **_ALL_POSITIONS,
            "data.item_features": {},
            "data.user_features": {},
            "model.unknown_rate": 0.0,
            "model.history_pooling": ("attention",),
            "model.combination": "sum",
            "model.history_dropout": 0.1,
            "model.temperature": 0.07,
            "training.batch_size": 8192,
            "training.max_epochs": 40,
            "training.patience": 6,
        },
    },
    "user_sets_256": {"gowalla": {**_USER_SETS, "model.embedding_dim": 256}},
    "user_sets": {"gowalla": _USER_SETS},
}

IALS_GRIDS: dict[str, dict[str, Any]] = {
    "ml-100k": {},  # The main job's own settings.
    "ml-1m": {
        "evaluation.ials_num_factors": (128,),
        "evaluation.ials_regularization": (10.0, 30.0, 100.0),
        "evaluation.ials_alpha": (3.0, 10.0),
    },
    "gowalla": {
        "evaluation.ials_num_factors": (128,),
        "evaluation.ials_regularization": (3.0, 10.0, 30.0),
        "evaluation.ials_alpha": (10.0, 50.0),
    },
}
EASE_GRIDS: dict[str, dict[str, Any]] = {
    "ml-100k": {},
    "ml-1m": {"evaluation.ease_l2": (100.0, 300.0, 1000.0, 3000.0)},
    "gowalla": {},
}


@dataclass(frozen=True)
class Fold:
    """The samples that a model is fitted to.

    Args:
        corpus: Ids and features behind the rows.
        selection: Samples of the training part.
        final: Samples of training and validation part.
        seconds: What it took to build and read them; next to nothing where the folder held them.
    """

    corpus: Corpus
    selection: Samples
    final: Samples
    seconds: float


@dataclass(frozen=True)
class Task:
    """A data set, split.

    Args:
        data: Its name.
        protocol: Its protocol.
        config: Its settings before any model's.
        tables: Events, items and users.
        split: The events with their part.
        validation_queries: To choose settings on.
        test_queries: To measure.
        folder: Where samples and results are kept.
    """

    data: str
    protocol: Protocol
    config: RunConfig
    tables: Log
    split: Split
    validation_queries: Holdout
    test_queries: Holdout
    folder: Path

    def fold(self, config: RunConfig) -> Fold:
        """Builds the samples of a config, or reads those that the folder holds."""
        start = time.monotonic()
        folder = self.folder / "samples" / f"seed{config.seed}"
        selection, final = (
            training_samples(config, self.tables, self.split, parts, folder / name)
            for name, parts in (("selection", ("train",)), ("final", parts_before_test(config)))
        )
        # A model may leave features out that the files hold.
        tables = dataclasses.replace(
            self.tables,
            item_features=config.data.item_features,
            user_features=config.data.user_features,
        )
        corpus = read_corpus(tables, folder / "final")
        return Fold(corpus, selection, final, time.monotonic() - start)


@dataclass(frozen=True)
class Fit:
    """A fitted model and how it came about.

    Args:
        retriever: To be measured.
        notes: For the record, JSON-able.
    """

    retriever: Retriever
    notes: dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A line of the table.

    Args:
        settings: Data set -> settings by dotted name; a data set that is missing has no such line.
        fit: Given task, settings, fold, folder for checkpoints and the budget in seconds.
        is_seeded: Whether the seed changes anything.
    """

    settings: dict[str, dict[str, Any]]
    fit: Callable[[Task, RunConfig, Fold, Path, float | None], Fit]
    is_seeded: bool


def fit_ours(
    task: Task, config: RunConfig, fold: Fold, folder: Path, max_seconds: float | None
) -> Fit:
    """Trains the package's model as its pipeline does: epochs by validation, then a refit."""
    model, chosen, notes = train_and_refit(
        config,
        fold.corpus,
        fold.selection,
        fold.final,
        task.validation_queries,
        max_seconds=max_seconds,
        folder=folder,
        on_progress=lambda what, done, total: print(f"    {what} {done}/{total}", flush=True),
    )
    monitored = chosen.history[f"val_{config.training.monitor}"]
    return Fit(
        exact_retriever(model, fold.corpus.query_ids, fold.corpus.candidate_ids),
        {
            "num_epochs": chosen.best_epoch,
            f"validation_{config.training.monitor}": max(monitored),
            "validation_by_epoch": list(monitored),
            "selection_seconds": round(chosen.seconds, 1),
            "notes": notes,
        },
    )


def fit_baseline(name: str) -> Callable[[Task, RunConfig, Fold, Path, float | None], Fit]:
    """Makes the fit of one of the package's baselines."""

    def fit(
        task: Task, config: RunConfig, fold: Fold, folder: Path, max_seconds: float | None
    ) -> Fit:
        del folder, max_seconds
        found, notes = fit_baselines(
            with_settings(config, {"evaluation.baselines": (name,)}),
            fold.corpus,
            fold.selection,
            fold.final,
            task.validation_queries,
        )
        return Fit(found[name], {"notes": notes})

    return fit


def fit_gfcf(
    task: Task, config: RunConfig, fold: Fold, folder: Path, max_seconds: float | None
) -> Fit:
    """Fits GF-CF with the settings that its published numbers have on Gowalla."""
    del task, config, folder, max_seconds
    corpus, samples = fold.corpus, fold.final
    items = Ids(corpus.candidate_ids)
    train = Interactions.from_rows(items, samples.query_rows, samples.candidate_rows)
    return Fit(GfcfRetriever(train), {"alpha": 0.3, "num_factors": 256})


def fit_tutorial(
    num_epochs: int, *, corrected: bool
) -> Callable[[Task, RunConfig, Fold, Path, float | None], Fit]:
    """Makes the fit of the tutorial's model, on everything before the test."""

    def fit(
        task: Task, config: RunConfig, fold: Fold, folder: Path, max_seconds: float | None
    ) -> Fit:
        del task, folder, max_seconds
        retriever = tutorial.fit_tutorial(
            fold.final,
            fold.corpus.query_ids,
            fold.corpus.candidate_ids,
            num_epochs=num_epochs,
            corrected=corrected,
            seed=config.seed,
        )
        return Fit(
            retriever, {**tutorial.SETTINGS, "num_epochs": num_epochs, "corrected": corrected}
        )

    return fit


def _everywhere() -> dict[str, dict[str, Any]]:
    return {data: {} for data in PROTOCOLS}


def _without_gowalla(grids: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {data: grid for data, grid in grids.items() if data != "gowalla"}


MODELS: dict[str, Model] = {
    "popularity": Model(_everywhere(), fit_baseline("popularity"), is_seeded=False),
    # Gowalla's 40,981 items are over its cap: 20 GB of memory.
    "ease": Model(_without_gowalla(EASE_GRIDS), fit_baseline("ease"), is_seeded=False),
    "ials": Model(IALS_GRIDS, fit_baseline("ials"), is_seeded=True),
    "gfcf": Model({"gowalla": {}}, fit_gfcf, is_seeded=False),
    "tutorial": Model(
        _everywhere(), fit_tutorial(tutorial.NUM_EPOCHS, corrected=False), is_seeded=True
    ),
    "tutorial_corrected": Model(
        _everywhere(), fit_tutorial(tutorial.NUM_EPOCHS_CORRECTED, corrected=True), is_seeded=True
    ),
    **{name: Model(settings, fit_ours, is_seeded=True) for name, settings in OUR_MODELS.items()},
}


def open_task(data: str, data_dir: Path | None, folder: Path) -> Task:
    """Loads and splits a data set, or opens what the folder holds of it."""
    protocol = PROTOCOLS[data]
    config = protocol.config(data_dir, folder / "source")
    tables, notes = stored_data(config.data, folder / "data")
    split, more = stored_split(tables, config, folder / "data")
    print(f"{data}: {'; '.join([*notes, *more])}", flush=True)
    return Task(
        data=data,
        protocol=protocol,
        config=config,
        tables=tables,
        split=split,
        validation_queries=split.validation,
        test_queries=split.test,
        folder=folder,
    )


def run_model(task: Task, name: str, seed: int, max_seconds: float | None) -> dict[str, Any]:
    """Fits and measures one model with one seed, or reads the result that the folder holds.

    Returns:
        What `result.json` of the fit's folder holds; each user's values lie beside it.

    Raises:
        ValueError: If the folder holds this model with other settings.
    """
    model = MODELS[name]
    own = model.settings[task.data]
    budget = max_seconds if name in OUR_MODELS else None
    asked: dict[str, Any] = {"settings": {**task.protocol.settings, **own}, "max_seconds": budget}
    asked = json.loads(json.dumps(asked))  # As it is read back: tuples are lists.
    folder = task.folder / "fits" / f"{name}-seed{seed}"
    _claim(folder, asked)
    if (folder / "result.json").exists():
        return {**json.loads((folder / "result.json").read_text()), "is_new": False}
    config = with_settings(task.config, {**own, "seed": seed})
    fold = task.fold(config)
    tf.keras.backend.clear_session()
    start = time.monotonic()
    fit = model.fit(task, config, fold, folder, budget)
    fitted = time.monotonic()
    measured = evaluate_retriever(config, fit.retriever, fold.corpus, fold.final, task.test_queries)
    seconds = {"samples": fold.seconds, "fit": fitted - start}
    seconds["evaluate"] = time.monotonic() - fitted
    metrics = task.protocol.metrics
    np.savez(
        folder / "per_query.npz",
        user_ids=measured.user_ids,
        **{metric: measured.per_query[metric] for metric in metrics},
    )
    result = {
        "seed": seed,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command(sys.argv),
        "machine": machine(),
        "seconds": {what: round(value, 1) for what, value in seconds.items()},
        "metrics": {metric: float(np.nanmean(measured.per_query[metric])) for metric in metrics},
        "num_users": len(measured.user_ids),
        "num_relevant": measured.overall.num_relevant,
        "num_relevant_excluded": measured.num_relevant_excluded,
        **asked,
        **fit.notes,
    }
    # Written last: a folder that has it is whole.
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    return {**result, "is_new": True}


def _claim(folder: Path, asked: dict[str, Any]) -> None:
    """Writes a fit's settings into its folder, or checks that it holds the same."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(asked, indent=1))
    elif (held := json.loads(path.read_text())) != asked:
        raise ValueError(
            f"{folder} holds a fit with other settings: {held}, not {asked}. Delete it to fit "
            "again, or give another --run-dir."
        )


def summarise(task: Task, name: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Averages a model over its seeds.

    Returns:
        By metric: mean, "low" and "high" of a 95% bootstrap interval over users (of each user's
        mean over the seeds), "by_seed" and, with two seeds or more, their "std".
    """
    values = []
    for result in results:
        with np.load(task.folder / "fits" / f"{name}-seed{result['seed']}" / "per_query.npz") as of:
            values.append(np.stack([of[metric] for metric in task.protocol.metrics], axis=1))
    by_seed = np.stack(values)
    intervals = bootstrap_intervals(by_seed.mean(axis=0), num_bootstrap=NUM_BOOTSTRAP, seed=0)
    means = by_seed.mean(axis=1)
    return {
        metric: {
            **interval.as_dict(),
            "by_seed": means[:, i].tolist(),
            **({"std": float(means[:, i].std(ddof=1))} if len(means) > 1 else {}),
        }
        for i, (metric, interval) in enumerate(zip(task.protocol.metrics, intervals, strict=True))
    }


def run(
    task: Task, models: Sequence[str], num_seeds: int, max_seconds: float | None
) -> dict[str, Any]:
    """Fits and measures the models, all of them with one seed before the next."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    for seed in range(num_seeds):
        for name in models:
            if seed and not MODELS[name].is_seeded:
                continue
            result = run_model(task, name, seed, max_seconds)
            print(describe(name, result), flush=True)
            del result["is_new"]
            results[name].append(result)
    return {
        "data": task.data,
        "protocol": task.protocol.description,
        "models": {
            name: {"metrics": summarise(task, name, fits), "fits": fits}
            for name, fits in results.items()
        },
        "published": [dataclasses.asdict(line) for line in task.protocol.published],
    }


def describe(name: str, result: dict[str, Any]) -> str:
    """Says how one fit went."""
    metrics = "  ".join(f"{metric} {value:.4f}" for metric, value in result["metrics"].items())
    seconds = ", ".join(f"{what} {value:.0f} s" for what, value in result["seconds"].items())
    origin = seconds if result["is_new"] else "kept from before"
    return f"seed {result['seed']}  {name:20} {metrics}  ({origin})"


def print_table(task: Task, figures: dict[str, Any]) -> None:
    """Prints measured and published models in one table, the best last."""
    metrics = task.protocol.metrics
    lines = []
    for name, model in figures["models"].items():
        cells = [model["metrics"][metric] for metric in metrics]
        text = [
            f"{c['mean']:.4f} ±{c['std']:.4f}" if "std" in c else f"{c['mean']:.4f}" for c in cells
        ]
        lines.append((cells[-1]["mean"], name, text, f"measured, {len(model['fits'])} seed(s)"))
    for line in task.protocol.published:
        text = [f"{value:.4f}" for value in line.values]
        lines.append((line.values[-1], line.model, text, f"published: {line.source}"))
    print(f"\n{task.protocol.description}\n")
    print(f"{'':40}" + "".join(f"  {metric:>15}" for metric in metrics))
    for _, name, text, source in sorted(lines, key=lambda line: line[0]):
        print(f"{name:40}" + "".join(f"  {cell:>15}" for cell in text) + f"  {source}")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=PROTOCOLS, required=True)
    parser.add_argument("--data-dir", type=Path, help="Folder of the data set; see the top.")
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", help="Not all.")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="Seeds 0 to N - 1 (1).")
    parser.add_argument(
        "--max-seconds",
        type=float,
        help="After this time the package's models begin no epoch of the training that chooses the "
        "number of epochs; baselines take what they take.",
    )
    parser.add_argument("--run-dir", type=Path, help="Where results are kept, to be resumed.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where to write the figures.")
    options = parser.parse_args()
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # Retracing a model is no fault here.
    models = options.models or [n for n, m in MODELS.items() if options.data in m.settings]
    if missing := [name for name in models if options.data not in MODELS[name].settings]:
        parser.error(f"{', '.join(missing)}: not measured on {options.data}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.run_dir or Path(scratch)) / options.data
        task = open_task(options.data, options.data_dir, folder)
        figures = run(task, models, options.seeds, options.max_seconds)
    print_table(task, figures)
    if options.json:
        write_json(options.json, figures)


if __name__ == "__main__":
    main()
