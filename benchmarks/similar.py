"""Measures whether the items similar to a user's last item include the next one.

A query holds one item, the user's last before the held-out one, and should find the held-out one
among all others. `similar` searches by the vectors of a recipe's candidates, in three ways:

    similar     by the direction of the item's vector, without an item bias
    plus bias   the same, plus the bias of the item that is found
    product     the dot product of both whole vectors, the biases multiplied too

Without a bias, all three are the same. With one, the package uses the second, chosen on validation.
Beside them are `retrieve`, which embeds a history of that item alone with the query tower, EASE's
item-to-item weights, transitions, and popularity. The recipe `lengths` is the default with vectors
of any length, where `cosine` divides by both lengths. Models are fitted to the training
part, their epochs chosen on validation.

    python benchmarks/similar.py --data-dir data --json benchmarks/results/similar.json

--data-dir holds the folder `sessions` of `unseen_logs.py`; without it, only MovieLens is measured.
An existing file keeps what is not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import numpy as np
import tensorflow as tf
from log_kinds import LAST_TWO, unseen
from record import COMMIT, write_json

from tfrs_pipeline.data.holdout import Holdout
from tfrs_pipeline.data.log import Split
from tfrs_pipeline.evaluation.topk import ExactRetriever
from tfrs_pipeline.presets import PRESETS
from tfrs_pipeline.run.data import load_log

METRICS = ("hit_rate@10", "ndcg@10")
LOGS = ("ratings", "sessions")
RECIPES = ("default", "sequence", "sparse", "sets", "lengths")
REFERENCE = "ease"  # What the others are compared with.


def split_of(log: str, data_dir: Path | None) -> Split:
    """Splits a log; holds out the last two events of each user."""
    if log != "ratings":
        assert data_dir is not None
        return unseen(log, data_dir)
    return load_log(tp.movielens_config().data).split(**LAST_TWO)


def of_last_items(holdout: Holdout) -> Holdout:
    """Cuts every history to its last item, which alone is excluded."""
    last = [history[-1:] for history in holdout.histories]
    times = holdout.history_times
    return replace(
        holdout,
        histories=last,
        clicked=last,
        history_times=None if times is None else [of_query[-1:] for of_query in times],
    )


def ways(vectors: np.ndarray, has_bias: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns, by the name of a way, the vectors to search with and those to search among."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not has_bias:
        own = vectors / np.maximum(lengths, 1e-12)
        found = {"similar": (own, vectors)}
        if np.abs(lengths - 1).max() > 1e-3:
            found["cosine"] = own, own
        return found
    own, bias = vectors.copy(), vectors.copy()
    own[:, -1], bias[:, -1] = 0, 1
    return {
        "similar": (own, vectors),
        "plus bias": (bias, vectors),
        "product": (vectors, vectors),
    }


def by_vectors(ids: np.ndarray, own: np.ndarray, among: np.ndarray) -> ExactRetriever:
    """Retrieves by the vector of the item that a query holds."""
    place = {id_: i for i, id_ in enumerate(ids.tolist())}

    def embed(queries: Any) -> np.ndarray:
        rows = [place.get(id_, -1) for query in queries for id_ in np.asarray(query["history"])]
        return np.where(np.array(rows)[:, np.newaxis] < 0, 0, own[rows])

    return ExactRetriever(ids, among, embed)


def fitted(recipe: str, split: Split) -> tuple[dict[str, tp.Retriever], dict[str, Any]]:
    """Fits a recipe; returns a retriever for each way, and how the training went."""
    tf.keras.backend.clear_session()
    settings = dict(PRESETS[recipe].settings) if recipe in PRESETS else {}
    settings.pop("data.is_ordered", None)
    if recipe == "lengths":
        # A score is then not a cosine, for whose range the default temperature was chosen.
        settings |= {"model.normalize": False, "model.temperature": 1.0}
    config = tp.with_settings(tp.RunConfig(), settings)
    plan = tp.TwoTower(**dict(config.model), training=config.training, seed=0)
    start = time.process_time()
    model = plan.fit(split.train, split.validation, exclude="none")
    about = {
        "cpu_seconds": time.process_time() - start,
        "best_epoch": model.result.best_epoch,
        "commit": COMMIT,
    }
    found = ways(model.network.embed_corpus(), config.model.candidate_bias)
    retrievers: dict[str, tp.Retriever] = {
        way: by_vectors(model.candidate_ids, *vectors) for way, vectors in found.items()
    }
    return {**retrievers, "retrieve": model}, about


def baselines(split: Split) -> dict[str, tp.Retriever]:
    """Fits what needs no training."""
    made: dict[str, Callable[[Any], tp.Retriever]] = {
        REFERENCE: tp.Ease().fit,
        "transitions": tp.Transitions().fit,
        "popularity": tp.MostPopular().fit,
    }
    return {name: fit(split.train) for name, fit in made.items()}


def measure(split: Split, retrievers: dict[str, tp.Retriever]) -> dict[str, Any]:
    """Measures retrievers on both held-out parts, and compares them with the first."""
    found: dict[str, Any] = {name: {} for name in retrievers}
    for part in ("validation", "test"):
        asked = of_last_items(getattr(split, part))
        evaluation = tp.evaluate(retrievers, asked, exclude="clicked", cutoffs=(10,))
        for name, result in evaluation.results.items():
            found[name][part] = {x: result.overall.intervals[x].mean for x in METRICS}
            found[name][part]["num_queries"] = len(result.user_ids)
            if name in evaluation.differences:
                difference = evaluation.differences[name]["ndcg@10"].as_dict()
                found[name][part]["difference"] = {"from": REFERENCE, **difference}
    return found


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="Folder of the data sets.")
    parser.add_argument("--logs", nargs="+", choices=LOGS, metavar="LOG", help="Which.")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where to write the figures.")
    options = parser.parse_args()
    tf.get_logger().setLevel("ERROR")  # Hides warnings of retracing: each recipe has its own model.
    is_there = options.json is not None and options.json.exists()
    found: dict[str, Any] = json.loads(options.json.read_text())["logs"] if is_there else {}
    for log in options.logs or LOGS[: 1 if options.data_dir is None else None]:
        split = split_of(log, options.data_dir)
        simple = baselines(split)
        of_log = found.setdefault(log, {"baselines": {}, "recipes": {}})
        of_log["baselines"] = measured = measure(split, simple)
        show(log, "", measured)
        for recipe in options.recipes:
            made, about = fitted(recipe, split)
            measured = measure(split, {REFERENCE: simple[REFERENCE], **made})
            del measured[REFERENCE]
            of_log["recipes"][recipe] = {**about, "found": measured}
            show(log, recipe, measured)
            if options.json:
                write_json(options.json, {"logs": found}, seed=0)


def show(log: str, recipe: str, measured: dict[str, Any]) -> None:
    """Prints what was measured."""
    for name, parts in measured.items():
        line = "   ".join(
            f"{part} " + " ".join(f"{metric} {values[metric]:.4f}" for metric in METRICS)
            for part, values in parts.items()
        )
        print(f"{log:10} {recipe:10} {name:12} {line}", flush=True)


if __name__ == "__main__":
    main()
