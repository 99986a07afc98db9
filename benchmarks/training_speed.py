"""Measures training speed against the TFRS retrieval tutorial's own loop, on MovieLens-100K.

Speed: positives per second of `fit` and per CPU second of the process. All loops run in turn, some
epochs each, over several rounds; ratios are taken round by round, and medians are reported. Each
loop runs once before, so that tracing and the tutorial's cache do not count. Ids alone, 32-d, batch
8192, likes of the training part; the tutorial's loop with its Adagrad of 0.1, the package's with
lazy_adam of 0.03, chosen on validation.

    tutorial              the tutorial's loop as it stands, its FactorizedTopK metrics in training
    tutorial_no_metrics   the same with compute_metrics=False
    in_batch              this package: the other rows' positives as negatives, masks and correction
    in_batch_easy         the same with 512 easy negatives
    easy                  512 easy negatives alone

The towers are the same, an embedding of the id; the package normalises it.

Quality: NDCG@100 on validation of each loop, trained anew for the same numbers of epochs. The
metrics change no weight, so the tutorial's loop is trained once, without them, and once more with
the correction.

Time to quality: seconds in `fit` until NDCG@100 on the test (main protocol, trained on everything
before it) first reaches each target. It is measured after every epoch; measuring is not counted,
tracing is. Models: the tutorial's, without and with the correction, and as the guide changes it;
this package's default and presets; EASE and implicit's iALS, which are fitted in one go.

    python benchmarks/training_speed.py --json benchmarks/results/training_speed.json
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

# Before TensorFlow Recommenders, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import numpy as np
import tensorflow as tf
from leaderboard import OUR_MODELS
from movielens_100k import prepared
from record import parser_with_json, write_json
from tutorial import (
    BATCH_SIZE,
    EMBEDDING_DIM,
    HybridTutorialModel,
    TutorialModel,
    tutorial_batches,
    tutorial_retriever,
)

from tfrs_pipeline.evaluation.interactions import Interactions
from tfrs_pipeline.model.fitted_model import query_encoder
from tfrs_pipeline.model.optimizer import make_optimizer
from tfrs_pipeline.presets import PRESETS
from tfrs_pipeline.run.data import RunData
from tfrs_pipeline.search.topk import ExactRetriever

METRIC = "ndcg@100"
# CPU time is affected neither by other processes nor by idle cores.
CLOCKS: dict[str, Callable[[], float]] = {
    "second": time.perf_counter,
    "cpu_second": time.process_time,
}
# Ids alone and the tutorial's batch size. Not its optimizer: its loss is a sum, but the package's a
# mean, whose gradients are small beside Adagrad's initial accumulator.
LIKE_TUTORIAL = {
    "data.item_features": {},
    "data.user_features": {},
    "model.use_user_id": True,
    "model.history_pooling": (),
    "model.dim": EMBEDDING_DIM,
    "training.batch_size": BATCH_SIZE,
    "training.learning_rate": 0.03,
}
EASY = (tp.Uniform(256), tp.Popularity(256))
OURS: dict[str, dict[str, Any]] = {
    name: {**LIKE_TUTORIAL, "model.negatives": negatives}
    for name, negatives in {
        "in_batch": (tp.InBatch(),),
        "in_batch_easy": (tp.InBatch(), *EASY),
        "easy": EASY,
    }.items()
}
# The package's models whose time to the targets is measured: the default, presets, and the best
# model of the leaderboard.
TO_TARGET: dict[str, Mapping[str, Any]] = {
    "default": {},
    "histories": OUR_MODELS["histories"]["ml-100k"],
    "ids": {"model.use_user_id": True, "model.history_pooling": (), "model.id_dropout": 0.01},
    **{name: PRESETS[name].settings for name in ("quick", "sequence")},
}


@dataclass
class Loop:
    """A model and its training loop.

    Args:
        fit: Trains the next n epochs.
        num_positives: Positives per epoch.
        measure: Returns NDCG@100 on the queries the loop was made for.
    """

    fit: Callable[[int], None]
    num_positives: int
    measure: Callable[[], float]


def measure_on(holdout: tp.Holdout, retriever: tp.Retriever) -> float:
    """Measures NDCG@100."""
    return tp.evaluate(retriever, holdout, num_bootstrap=0).first.overall.intervals[METRIC].mean


def tutorial_loop(
    config: tp.RunConfig,
    data: tp.TrainingSet,
    holdout: tp.Holdout,
    *,
    corrected: bool = False,
    hybrid: bool = False,
    compute_metrics: bool = False,
) -> Loop:
    """Makes the tutorial's loop."""
    tf.keras.utils.set_random_seed(config.seed)
    if hybrid:
        model: TutorialModel = HybridTutorialModel(data)
    else:
        model = TutorialModel(data, compute_metrics=compute_metrics)
    batches = tutorial_batches(data, corrected=corrected)
    return Loop(
        lambda num_epochs: model.fit(batches, epochs=num_epochs, verbose=0),
        len(data.samples),
        lambda: measure_on(holdout, tutorial_retriever(model, data.corpus.candidate_ids)),
    )


def package_model(
    config: tp.RunConfig, data: tp.TrainingSet
) -> tuple[tp.TwoTowerNetwork, tp.HybridBatches]:
    """Makes the package's network, compiled, and its batches."""
    tf.keras.utils.set_random_seed(config.seed)
    training = config.training
    model = tp.TwoTower(**dict(config.model), training=training, seed=config.seed)
    network, batches = model.build(data.corpus), model.batches(data.samples)
    optimizer = make_optimizer(training, training.max_epochs * batches.steps_per_epoch)
    network.compile(optimizer=optimizer)
    return network, batches


def package_loop(
    config: tp.RunConfig, data: tp.TrainingSet, holdout: tp.Holdout, settings: Mapping[str, Any]
) -> Loop:
    """Makes this package's loop with some settings; without item features, of ids alone."""
    config = tp.with_settings(config, settings)
    if not config.data.item_features:
        data = ids_alone(data)
    network, batches = package_model(config, data)
    steps, corpus = batches.steps_per_epoch, data.corpus
    encoder = query_encoder(network, corpus)

    def fit(num_epochs: int) -> None:
        step = int(network.optimizer.iterations)
        network.fit(
            batches.dataset(step, num_epochs * steps),
            epochs=num_epochs,
            steps_per_epoch=steps,
            verbose=0,
        )

    def measure() -> float:
        ids, embeddings = corpus.candidate_ids.values, network.embed_corpus()
        return measure_on(holdout, ExactRetriever(ids, embeddings, encoder))

    return Loop(fit, steps * batches.examples.batch_size, measure)


def ids_alone(data: tp.TrainingSet) -> tp.TrainingSet:
    """Removes the features."""
    corpus = dataclasses.replace(
        data.corpus,
        candidate_features=(),
        query_features=(),
        candidate_columns={},
        query_columns={},
    )
    return dataclasses.replace(data, corpus=corpus)


def measure_speed(
    config: tp.RunConfig, data: RunData, options: argparse.Namespace
) -> dict[str, Any]:
    """Measures positives a second of every loop, in turn."""
    train, holdout = data.selection, data.validation
    loops = {
        "tutorial": tutorial_loop(config, train, holdout, compute_metrics=True),
        "tutorial_no_metrics": tutorial_loop(config, train, holdout),
        **{name: package_loop(config, train, holdout, settings) for name, settings in OURS.items()},
    }
    for loop in loops.values():
        loop.fit(1)
    rates: dict[str, dict[str, list[float]]] = {
        clock: {name: [] for name in loops} for clock in CLOCKS
    }
    for _ in range(options.rounds):
        for name, loop in loops.items():
            starts = {clock: read() for clock, read in CLOCKS.items()}
            loop.fit(options.epochs)
            for clock, read in CLOCKS.items():
                seconds = read() - starts[clock]
                rates[clock][name].append(options.epochs * loop.num_positives / seconds)
    figures: dict[str, Any] = {name: {} for name in loops}
    for clock, by_loop in rates.items():
        for name, values in by_loop.items():
            ratios = {
                f"ratio_to_{other}": float(np.median(np.array(values) / np.array(by_loop[other])))
                for other in ("tutorial", "tutorial_no_metrics")
            }
            rate = float(np.median(values))
            figures[name][clock] = {"positives": rate, "by_round": values, **ratios}
            shown = "  ".join(f"{ratio:5.2f} x {other[9:]}" for other, ratio in ratios.items())
            print(f"{name:20} {rate:9,.0f} positives a {clock}  {shown}", flush=True)
    return figures


def measure_quality(
    config: tp.RunConfig, data: RunData, options: argparse.Namespace
) -> dict[str, Any]:
    """Measures NDCG@100 on validation after equal numbers of epochs."""
    on = config, data.selection, data.validation
    makers: dict[str, Callable[[], Loop]] = {
        "tutorial": lambda: tutorial_loop(*on),
        "tutorial_corrected": lambda: tutorial_loop(*on, corrected=True),
        **{name: partial(package_loop, *on, settings) for name, settings in OURS.items()},
    }
    figures: dict[str, dict[str, float]] = {}
    for name, make in makers.items():
        loop, done = make(), 0
        figures[name] = {}
        for num_epochs in sorted(options.quality_epochs):
            loop.fit(num_epochs - done)
            done = num_epochs
            figures[name][str(num_epochs)] = loop.measure()
        line = "   ".join(f"{n} epochs {value:.4f}" for n, value in figures[name].items())
        print(f"{name:20} validation {METRIC}: {line}", flush=True)
    return figures


def baseline_loop(baseline: tp.Ease | tp.Ials, data: RunData) -> Loop:
    """Makes the fit of a baseline, which is complete after its first epoch."""
    interactions = Interactions.of(data.split.before_test)
    fitted: list[tp.Retriever] = []

    def fit(num_epochs: int) -> None:
        fitted[:] = [baseline.fit(interactions)]

    return Loop(fit, len(data.final.samples), lambda: measure_on(data.test, fitted[0]))


def seconds_to_targets(loop: Loop, max_epochs: int, targets: list[float]) -> dict[str, Any]:
    """Trains epoch by epoch until the last target: seconds to each, None if it is not reached."""
    seconds = np.zeros(len(CLOCKS))
    epochs: list[dict[str, float]] = []
    for _ in range(max_epochs):
        starts = [read() for read in CLOCKS.values()]
        loop.fit(1)
        seconds += np.array([read() for read in CLOCKS.values()]) - starts
        figures = {"seconds": float(seconds[0]), "cpu_seconds": float(seconds[1])}
        epochs.append(figures | {METRIC: loop.measure()})
        if epochs[-1][METRIC] >= max(targets):
            break
    reached = {
        str(target): next((epoch for epoch in epochs if epoch[METRIC] >= target), None)
        for target in targets
    }
    return {"reached": reached, "epochs": epochs}


def measure_time_to_targets(
    config: tp.RunConfig, data: RunData, options: argparse.Namespace
) -> dict[str, Any]:
    """Measures the seconds of training until NDCG@100 on the test reaches each target."""
    on = config, data.final, data.test
    makers: dict[str, Callable[[], Loop]] = {
        "tutorial": lambda: tutorial_loop(*on, compute_metrics=True),
        "tutorial_corrected": lambda: tutorial_loop(*on, corrected=True),
        "tutorial_hybrid": lambda: tutorial_loop(*on, hybrid=True),
        **{name: partial(package_loop, *on, settings) for name, settings in TO_TARGET.items()},
        "ease": lambda: baseline_loop(tp.Ease(), data),
        "ials": lambda: baseline_loop(tp.Ials(seed=config.seed), data),
    }
    figures: dict[str, Any] = {}
    for name, make in makers.items():
        is_whole = name in ("ease", "ials")
        found = seconds_to_targets(make(), 1 if is_whole else options.max_epochs, options.targets)
        figures[name] = found
        best = max(epoch[METRIC] for epoch in found["epochs"])
        times = "".join(
            f"  {target}: " + (f"{epoch['cpu_seconds']:6.1f} CPU s" if epoch else "     never  ")
            for target, epoch in found["reached"].items()
        )
        print(f"{name:20}{times}  best {best:.4f} of {len(found['epochs'])} epochs", flush=True)
    return figures


PARTS = {
    "speed": measure_speed,
    "quality": measure_quality,
    "targets": measure_time_to_targets,
}


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2, help="Epochs a round and loop (2).")
    parser.add_argument(
        "--quality-epochs",
        type=int,
        nargs="+",
        default=[3, 10],
        metavar="N",
        help="Epochs after which validation is measured (3 10).",
    )
    parser.add_argument(
        "--targets",
        type=float,
        nargs="+",
        default=[0.28, 0.3, 0.33],
        metavar="X",
        help="NDCG@100 to reach (.28 .3 .33).",
    )
    parser.add_argument("--max-epochs", type=int, default=30, help="Until the last target (30).")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = tp.with_settings(tp.movielens_config(), {"seed": options.seed})
    figures: dict[str, Any] = {}
    with prepared(config) as data:
        for part in options.only:
            figures[part] = PARTS[part](config, data, options)
            write_json(options.json, figures, seed=options.seed)


if __name__ == "__main__":
    main()
