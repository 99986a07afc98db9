"""Measures the package's models, baselines and the TFRS tutorial's model on MovieLens-100K.

The split of the main job: ratings of 4 and 5 are likes, the last fifth of each user's likes is the
test (938 users, 11,442 likes), everything before it trains. NDCG@100, recall@100 and recall@20 over
the whole corpus, means over users with 95% bootstrap intervals, once with the user's earlier likes
left out of the ranking (clicked) and once with every rated item left out (seen).

    tutorial               the TFRS retrieval tutorial as it stands: embeddings of user and item
                           ids, 32-d, in-batch negatives, batch 8192, Adagrad 0.1, 3 epochs
    tutorial_corrected     the same with candidate_sampling_probability and 20 epochs
    two_tower              the package's default
    two_tower_uncorrected  the same without log_q
    in_batch               the default with in-batch negatives alone
    in_batch_uncorrected   the same without log_q
    popularity, ease, ials

No setting is chosen on the test: the tutorial's are its own, the number of epochs of the package's
models is chosen on validation, all others are the defaults of the main job. With several seeds a
user's value is the mean over the seeds.

    python benchmarks/movielens_100k.py --seeds 3 --json benchmarks/results/movielens_100k.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# Before TensorFlow Recommenders, since it selects Keras 2.
from tfrs_pipeline import RunConfig, main_job_config, with_settings

# isort: split
import numpy as np
from record import write_json
from tutorial import NUM_EPOCHS, NUM_EPOCHS_CORRECTED, fit_tutorial

from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.split import Holdout
from tfrs_pipeline.evaluation.bootstrap import bootstrap_intervals
from tfrs_pipeline.evaluation.evaluate import evaluate
from tfrs_pipeline.evaluation.results import EvaluationResult
from tfrs_pipeline.model.queries import exact_retriever
from tfrs_pipeline.retrieval import Retriever
from tfrs_pipeline.run import (
    Corpus,
    fit_baselines,
    load_data,
    read_corpus,
    split_log,
    train_model,
    training_batches,
    training_samples,
)
from tfrs_pipeline.samples.build import Samples

METRICS = ("ndcg@100", "recall@100", "recall@20")
EXCLUDES: tuple[Literal["clicked", "seen"], ...] = ("clicked", "seen")


@dataclass(frozen=True)
class Task:
    """What every model is fitted to and measured on.

    Args:
        config: Of the main job, with the seed of this turn.
        corpus: Ids and features behind the rows.
        selection: Samples of the training part.
        final: Samples of training and validation part.
        validation_queries: To choose the number of epochs on.
        test_queries: To measure.
    """

    config: RunConfig
    corpus: Corpus
    selection: Samples
    final: Samples
    validation_queries: Holdout
    test_queries: Holdout


Fitted = tuple[Retriever, dict[str, Any]]


def fit_tutorial_model(task: Task, *, num_epochs: int, corrected: bool) -> Fitted:
    """Trains the tutorial's model; a query is a user's id, whatever the history."""
    retriever = fit_tutorial(
        task.final,
        task.corpus.query_ids,
        task.corpus.candidate_ids,
        num_epochs=num_epochs,
        corrected=corrected,
        seed=task.config.seed,
    )
    return retriever, {"num_epochs": num_epochs}


def fit_two_tower(task: Task, settings: dict[str, Any]) -> Fitted:
    """Trains the package's model as the pipeline does: epochs chosen on validation, then a refit.

    Args:
        task: What to fit.
        settings: Where it differs from the main job's config, by dotted name.
    """
    config = with_settings(task.config, settings)
    _, chosen = train_model(
        config,
        config.model,
        task.corpus,
        training_batches(config, task.selection),
        validation_queries=task.validation_queries,
    )
    model, _ = train_model(
        config,
        config.model,
        task.corpus,
        training_batches(config, task.final),
        max_epochs=chosen.best_epoch,
    )
    retriever = exact_retriever(model, task.corpus.query_ids, task.corpus.candidate_ids)
    best = max(chosen.history[f"val_{config.training.monitor}"])
    return retriever, {
        "num_epochs": chosen.best_epoch,
        f"validation_{config.training.monitor}": best,
    }


def fit_baseline(task: Task, name: str) -> Fitted:
    """Fits one baseline with the main job's settings."""
    config = with_settings(task.config, {"evaluation.baselines": (name,)})
    baselines, _ = fit_baselines(
        config, task.corpus, task.selection, task.final, task.validation_queries
    )
    return baselines[name], {}


UNCORRECTED = {"model.correction": "none"}
IN_BATCH = {"samples.easy_negatives": ()}
MODELS: dict[str, Callable[[Task], Fitted]] = {
    "tutorial": lambda task: fit_tutorial_model(task, num_epochs=NUM_EPOCHS, corrected=False),
    "tutorial_corrected": lambda task: fit_tutorial_model(
        task, num_epochs=NUM_EPOCHS_CORRECTED, corrected=True
    ),
    "two_tower": lambda task: fit_two_tower(task, {}),
    "two_tower_uncorrected": lambda task: fit_two_tower(task, UNCORRECTED),
    "in_batch": lambda task: fit_two_tower(task, IN_BATCH),
    "in_batch_uncorrected": lambda task: fit_two_tower(task, {**IN_BATCH, **UNCORRECTED}),
    "popularity": lambda task: fit_baseline(task, "popularity"),
    "ease": lambda task: fit_baseline(task, "ease"),
    "ials": lambda task: fit_baseline(task, "ials"),
}
SEEDLESS = ("popularity", "ease")


def make_task(tables: Log, seed: int, folder: Path) -> Task:
    """Splits the events and builds the samples as the main job does."""
    config = with_settings(main_job_config(), {"seed": seed})
    split = split_log(tables, config.split, config.seed)
    selection = training_samples(config, tables, split, ("train",), folder / "selection")
    final = training_samples(config, tables, split, ("train", "validation"), folder / "final")
    return Task(
        config=config,
        corpus=read_corpus(tables, folder / "final"),
        selection=selection,
        final=final,
        validation_queries=split.validation,
        test_queries=split.test,
    )


def measure(
    retriever: Retriever, task: Task, exclude: Literal["clicked", "seen"]
) -> EvaluationResult:
    """Measures on the test; intervals are made later, over all seeds."""
    return evaluate(
        retriever,
        task.test_queries,
        exclude=exclude,
        cutoffs=task.config.evaluation.cutoffs,
        num_bootstrap=0,
    ).first


def summarise(results: Sequence[EvaluationResult], num_bootstrap: int) -> dict[str, Any]:
    """Averages each user over the seeds, and then over users with an interval.

    Args:
        results: One a seed.
        num_bootstrap: Resamples of the users.

    Returns:
        Metric -> mean, low, high and the mean of each seed.
    """
    by_seed = np.stack(
        [np.stack([result.per_query[m] for m in METRICS], axis=1) for result in results]
    )
    intervals = bootstrap_intervals(by_seed.mean(axis=0), num_bootstrap=num_bootstrap, seed=0)
    means = by_seed.mean(axis=1)
    return {
        metric: {**interval.as_dict(), "by_seed": means[:, i].tolist()}
        for i, (metric, interval) in enumerate(zip(METRICS, intervals, strict=True))
    }


def run(models: Sequence[str], num_seeds: int) -> dict[str, Any]:
    """Fits and measures the models, all of them with one seed before the next."""
    tables = load_data(main_job_config().data)
    results: dict[str, dict[str, list[EvaluationResult]]] = {
        name: {exclude: [] for exclude in EXCLUDES} for name in models
    }
    fits: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    protocol: dict[str, Any] = {}
    for seed in range(num_seeds):
        with tempfile.TemporaryDirectory() as folder:
            task = make_task(tables, seed, Path(folder))
        for name in models:
            if seed and name in SEEDLESS:
                continue
            start = time.monotonic()
            retriever, notes = MODELS[name](task)
            seconds = time.monotonic() - start
            fits[name].append({"seed": seed, "seconds": round(seconds, 1), **notes})
            for exclude in EXCLUDES:
                result = measure(retriever, task, exclude)
                results[name][exclude].append(result)
                protocol[exclude] = {
                    "num_users": len(result.user_ids),
                    "num_relevant": result.overall.num_relevant,
                }
            ndcg = np.mean(results[name]["clicked"][-1].per_query["ndcg@100"])
            print(f"seed {seed}  {name:22} ndcg@100 {ndcg:.4f}  {seconds:6.1f} s", flush=True)
    num_bootstrap = main_job_config().evaluation.num_bootstrap
    return {
        "seeds": list(range(num_seeds)),
        "num_training_positives": len(task.final),
        "protocol": protocol,
        "models": {
            name: {
                "fits": fits[name],
                **{e: summarise(r, num_bootstrap) for e, r in results[name].items()},
            }
            for name in models
        },
    }


def print_table(figures: dict[str, Any]) -> None:
    """Prints one line a model and kind of exclusion."""
    print(f"\n{'':22} {'left out':8}" + "".join(f"  {metric:>22}" for metric in METRICS))
    for exclude in EXCLUDES:
        for name, model in figures["models"].items():
            cells = [model[exclude][metric] for metric in METRICS]
            line = "".join(f"  {c['mean']:.4f} [{c['low']:.4f}, {c['high']:.4f}]" for c in cells)
            print(f"{name:22} {exclude:8}{line}")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="Seeds 0 to N - 1 (1).")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where to write the figures.")
    options = parser.parse_args()
    figures = run(options.models, options.seeds)
    print_table(figures)
    if options.json:
        write_json(options.json, figures)


if __name__ == "__main__":
    main()
