r"""Measures models on public data sets, by published protocols, beside the published numbers.

    ml-100k   MovieLens-100K, the package's default run; fetched by the package
    ml-1m     MovieLens-1M in SASRec's version, leave-one-out: HR@10 and NDCG@10
    gowalla   LightGCN's split, ids alone: recall@20 and NDCG@20

The last two are read from a folder (--data-dir) and not downloaded: `leaderboard_data.py` says
which files they are, where they come from and how they are split. Settings are chosen on the
validation part, never on the test; then the model is fitted again to training and validation.

    popularity
    itemknn              decay and shrinkage by validation
    ease, ials           settings by a grid on validation; EASE up to 20,000 items
    tutorial             the TFRS retrieval tutorial's model with its own settings
    tutorial_corrected   the same with candidate_sampling_probability and 20 epochs
    two_tower, ...       the package's models (OUR_MODELS), epochs chosen on validation

    python benchmarks/leaderboard.py --data ml-1m --data-dir ml-1m --run-dir runs/leaderboard \
        --json benchmarks/results/leaderboard_ml_1m.json

With --run-dir, finished pairs of model and seed are kept and not repeated, and a stopped training
of the package's models resumes from its last epoch: the table can be filled a few models at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import numpy as np
import tensorflow as tf
import tutorial
from leaderboard_data import PROTOCOLS, Protocol
from pydantic_core import to_jsonable_python
from record import COMMIT, command, machine, parser_with_json, write_json

from tfrs_pipeline.evaluation.bootstrap import bootstrap_intervals
from tfrs_pipeline.messages import Progress
from tfrs_pipeline.model.corpus import Corpus
from tfrs_pipeline.presets import PRESETS
from tfrs_pipeline.run.data import RunData, prepare
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.run.measure import baselines_of, fit_best
from tfrs_pipeline.run.steps import RunContext
from tfrs_pipeline.run.training import train_and_refit

_SEQUENCES = {
    "model.negatives": ("uniform:num=512", "popularity:num=512"),
    "model.history_length": 200,
    "model.id_dropout": 0.0,
    "training.examples": "sequences",
    "training.decay": "cosine",
    "training.warmup_steps": 40,
    "training.patience": 6,
}
# The history is a mean over a separate table. The user's items have no order: a random half is
# input, and the other half is the target.
_USER_SETS = {
    "model.negatives": ("popularity:num=4096:alpha=0.5",),
    "model.history_length": 300,
    "model.id_dropout": 0.0,
    "model.dim": 512,
    "model.candidate_bias": True,
    "model.history_pooling": ("mean",),
    "model.history_dropout": 0.0,
    "model.share_item_embedding": False,
    "model.temperature": 0.07,
    "training.examples": "sets",
    "training.batch_size": 3072,
    "training.decay": "cosine",
    "training.learning_rate": 0.01,
    "training.warmup_steps": 50,
    "training.max_epochs": 60,
    "training.patience": 20,
}
# Model -> data set -> what differs from the package's defaults, by dotted name.
OUR_MODELS: dict[str, dict[str, Mapping[str, Any]]] = {
    "two_tower": {
        "ml-100k": {},
        "ml-1m": {},
        # Without an order there is no recency.
        "gowalla": {"model.history_pooling": ("mean",)},
    },
    # Pooled histories, sequence-level training.
    "histories": {
        "ml-100k": {
            **_SEQUENCES,
            "model.share_item_embedding": True,
            "model.item_init": "svd",
            "model.dim": 128,
            "model.history_dropout": 0.2,
            "model.recency_decay": 0.75,
            "model.candidate_bias": True,
            "model.feature_dropout": 0.6,
            "training.max_epochs": 12,
            "training.learning_rate": 0.004,
        },
    },
    # The preset, with batches and temperature for a million positives.
    "sequence": {
        "ml-1m": {
            **_SEQUENCES,
            "data.item_features": {},
            "data.user_features": {},
            "model.history_pooling": ("attention",),
            "model.history_dropout": 0.1,
            "model.temperature": 0.07,
            "training.batch_size": 8192,
            "training.max_epochs": 80,
            "training.patience": 20,
        },
    },
    **{
        f"user_sets_{dim}": {
            "gowalla": {
                **_USER_SETS,
                "model.dim": dim,
                "model.temperature": 0.1,
                "training.max_epochs": 25,
            }
        }
        for dim in (64, 128, 256, 512)
    },
    # The history uses the candidates' vectors: fewer numbers to learn, and more epochs.
    "user_sets_shared_64": {
        "gowalla": {
            **_USER_SETS,
            "model.dim": 64,
            "model.share_item_embedding": True,
            "model.item_init": "svd",
            "model.temperature": 0.1,
            "training.max_epochs": 150,
        }
    },
    "user_sets": {"gowalla": _USER_SETS},
    # The preset unchanged: only the number of epochs is chosen on this data.
    "preset_sets": {"gowalla": PRESETS["sets"].settings},
}

# Values to choose from on validation; without any, the default run's own.
IALS_GRIDS: dict[str, dict[str, Any]] = {
    "ml-100k": {},
    "ml-1m": {"regularization": (10.0, 30.0, 100.0), "alpha": (3.0, 10.0)},
    "gowalla": {"regularization": (3.0, 10.0, 30.0), "alpha": (10.0, 50.0)},
}
# Gowalla's 40,981 items are over its cap: 20 GB of memory.
EASE_GRIDS: dict[str, dict[str, Any]] = {
    "ml-100k": {},
    "ml-1m": {"l2": (100.0, 300.0, 1000.0, 3000.0)},
}


# A retriever, and notes for the record, JSON-compatible.
Fitted = tuple[tp.Retriever, dict[str, Any]]
# Takes settings, data and a folder for checkpoints.
Fit = Callable[[tp.RunConfig, RunData, Path], Fitted]


@dataclass(frozen=True)
class Task:
    """A data set, and how it is split.

    Args:
        data: Its name.
        protocol: Its protocol.
        config: Its settings, without any model's.
        folder: Where data, samples and results are kept.
    """

    data: str
    protocol: Protocol
    config: tp.RunConfig
    folder: Path

    def fit_folder(self, name: str, seed: int) -> Path:
        """Returns the folder of a model's fit with a seed."""
        return self.folder / "fits" / f"{name}-seed{seed}"

    def prepare(self, config: tp.RunConfig) -> RunData:
        """Makes the split and samples, or reads those that the folder holds."""
        folder = self.folder / f"data-seed{config.seed}"
        # A model may leave out features that the files hold.
        whole = tp.with_settings(
            config,
            {f"data.{name}": getattr(self.config.data, name) for name in FEATURES},
        )
        data = prepare(whole, folder)
        log = dataclasses.replace(
            data.split.log, **{name: getattr(config.data, name) for name in FEATURES}
        )
        selection, final = (
            dataclasses.replace(x, corpus=Corpus.read(log, folder / "samples" / name))
            for name, x in (("selection", data.selection), ("final", data.final))
        )
        return dataclasses.replace(data, selection=selection, final=final)


FEATURES = ("item_features", "user_features")


@dataclass(frozen=True)
class Model:
    """A line of the table.

    Args:
        settings: Data set -> settings by dotted name; only these data sets have the line.
        fit: How it is fitted.
        grids: Data set -> values to choose from on validation, of a baseline.
        is_seeded: Whether the seed changes anything.
    """

    settings: Mapping[str, Mapping[str, Any]]
    fit: Fit
    grids: dict[str, dict[str, Any]] = field(default_factory=dict)
    is_seeded: bool = True


class Printed(Progress):
    """Prints a line for each step of a task."""

    def task(self, name: str, done: int, total: int, note: str = "", /) -> None:
        """Prints how far a task is."""
        print(f"    {name} {done}/{total} {note}", flush=True)


def fit_ours(config: tp.RunConfig, data: RunData, folder: Path) -> Fitted:
    """Trains the package's model as its pipeline does: epochs by validation, then a refit."""
    run = RunContext(config, RunFolder(folder), Printed())
    model = train_and_refit(run, data, config=config, folder=folder)
    chosen = model.result
    monitored = chosen.history[f"val_{config.training.monitor}"]
    return model, {
        "num_epochs": chosen.best_epoch,
        f"validation_{config.training.monitor}": max(monitored),
        "validation_by_epoch": list(monitored),
        "selection_seconds": round(chosen.seconds, 1),
        "notes": model.notes,
    }


def baseline(name: str, grid: Mapping[str, Sequence[float]] | None = None) -> Fit:
    """Makes the fit of one of the package's baselines, chosen from a grid on validation."""

    def fit(config: tp.RunConfig, data: RunData, folder: Path) -> Fitted:
        settings = tp.with_settings(config, {"evaluation.baselines": (name,)})
        forms: Sequence[Any] = baselines_of(settings, data)[name]
        if grid:
            make = {"ease": tp.Ease, "ials": functools.partial(tp.Ials, seed=config.seed)}[name]
            values = itertools.product(*grid.values())
            forms = [make(**dict(zip(grid, point, strict=True))) for point in values]
        retriever, notes = fit_best(name, forms, settings, data)
        return retriever, {"notes": notes}

    return fit


def of_tutorial(num_epochs: int, **kind: bool) -> Fit:
    """Makes the fit of a model of the tutorial (see `fit_tutorial`), on all before the test."""

    def fit(config: tp.RunConfig, data: RunData, folder: Path) -> Fitted:
        options: dict[str, Any] = {"num_epochs": num_epochs, **kind}
        retriever = tutorial.fit_tutorial(data.final, seed=config.seed, **options)
        return retriever, {**tutorial.SETTINGS, **options}

    return fit


def _everywhere() -> dict[str, dict[str, Any]]:
    return {data: {} for data in PROTOCOLS}


MODELS: dict[str, Model] = {
    "popularity": Model(_everywhere(), baseline("popularity"), is_seeded=False),
    "itemknn": Model(_everywhere(), baseline("itemknn"), is_seeded=False),
    "ease": Model({data: {} for data in EASE_GRIDS}, baseline("ease"), EASE_GRIDS, is_seeded=False),
    "ials": Model({data: {} for data in IALS_GRIDS}, baseline("ials"), IALS_GRIDS),
    "tutorial": Model(_everywhere(), of_tutorial(tutorial.NUM_EPOCHS)),
    "tutorial_corrected": Model(
        _everywhere(), of_tutorial(tutorial.NUM_EPOCHS_CORRECTED, corrected=True)
    ),
    **{name: Model(settings, fit_ours) for name, settings in OUR_MODELS.items()},
}


def run_model(task: Task, name: str, seed: int) -> dict[str, Any]:
    """Fits and measures one model with one seed, or reads the result that the folder holds.

    Returns:
        What `result.json` of the fit's folder holds; each user's values lie beside it.

    Raises:
        ValueError: If the folder holds this model with other settings.
    """
    model = MODELS[name]
    own = model.settings[task.data]
    grid = model.grids.get(task.data)
    settings = {**task.protocol.settings, **own, **(grid or {})}
    asked = to_jsonable_python({"settings": settings})  # As read back from JSON: tuples are lists.
    folder = task.fit_folder(name, seed)
    _claim(folder, asked)
    if (folder / "result.json").exists():
        return {**json.loads((folder / "result.json").read_text()), "is_new": False}
    config = tp.with_settings(task.config, {**own, "seed": seed})
    start = time.monotonic()
    data = task.prepare(config)
    tf.keras.backend.clear_session()
    prepared = time.monotonic()
    fit = baseline(name, grid) if grid else model.fit
    retriever, notes = fit(config, data, folder)
    fitted = time.monotonic()
    measured = tp.evaluate(
        retriever,
        data.test,
        exclude=config.evaluation.exclude,
        cutoffs=config.evaluation.cutoffs,
        num_bootstrap=0,
    ).first
    seconds = {
        "samples": prepared - start,
        "fit": fitted - prepared,
        "evaluate": time.monotonic() - fitted,
    }
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
        "commit": COMMIT,
        "machine": machine(),
        "seconds": {what: round(value, 1) for what, value in seconds.items()},
        "metrics": {metric: float(np.nanmean(measured.per_query[metric])) for metric in metrics},
        "num_users": len(measured.user_ids),
        "num_relevant": measured.overall.num_relevant,
        "num_relevant_excluded": measured.num_relevant_excluded,
        **asked,
        **notes,
    }
    # Written last: a folder that has it is complete.
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


def summarise(
    seeds: Sequence[Mapping[str, np.ndarray]], metrics: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Averages a model over its seeds.

    Args:
        seeds: Each user's values by metric, [num_users] each, of each seed.
        metrics: Names of those to average.

    Returns:
        By metric: mean, "low" and "high" of a 95% bootstrap interval over users (of each user's
        mean over the seeds), "by_seed" and, with two seeds or more, their "std".
    """
    by_seed = np.stack([np.stack([values[m] for m in metrics], axis=1) for values in seeds])
    intervals = bootstrap_intervals(by_seed.mean(axis=0), seed=0)
    means = by_seed.mean(axis=1)
    return {
        metric: {
            **interval.as_dict(),
            "by_seed": means[:, i].tolist(),
            **({"std": float(means[:, i].std(ddof=1))} if len(means) > 1 else {}),
        }
        for i, (metric, interval) in enumerate(zip(metrics, intervals, strict=True))
    }


def run(task: Task, models: Sequence[str], num_seeds: int) -> dict[str, Any]:
    """Fits and measures the models: all of them with one seed, then with the next."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    for seed in range(num_seeds):
        for name in models:
            if seed and not MODELS[name].is_seeded:
                continue
            result = run_model(task, name, seed)
            print(describe(name, result), flush=True)
            del result["is_new"]
            results[name].append(result)
    values_of = {
        name: [np.load(task.fit_folder(name, fit["seed"]) / "per_query.npz") for fit in fits]
        for name, fits in results.items()
    }
    return {
        "data": task.data,
        "protocol": task.protocol.description,
        "models": {
            name: {"metrics": summarise(values_of[name], task.protocol.metrics), "fits": fits}
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
    parser = parser_with_json(__doc__)
    parser.add_argument("--data", choices=PROTOCOLS, required=True)
    parser.add_argument("--data-dir", type=Path, help="Folder of the data set; see the top.")
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", help="Not all.")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="Seeds 0 to N - 1 (1).")
    parser.add_argument("--run-dir", type=Path, help="Where results are kept, to be resumed.")
    options = parser.parse_args()
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # Hides warnings of retracing.
    models = options.models or [n for n, m in MODELS.items() if options.data in m.settings]
    if missing := [name for name in models if options.data not in MODELS[name].settings]:
        parser.error(f"{', '.join(missing)}: not measured on {options.data}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.run_dir or Path(scratch)) / options.data
        protocol = PROTOCOLS[options.data]
        config = protocol.config(options.data_dir, folder / "source")
        task = Task(options.data, protocol, config, folder)
        figures = run(task, models, options.seeds)
    print_table(task, figures)
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
