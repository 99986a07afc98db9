"""Measures the package's models, baselines and the TFRS tutorial's model on MovieLens-100K.

The split is the default run's: ratings of 4 and 5 are likes, the last fifth of each user's likes is
the test (938 users, 11,442 likes), everything before it trains. NDCG@100, recall@100 and recall@20
are over the whole corpus. Their means over users have 95% bootstrap intervals. The ranking excludes
the user's earlier likes (clicked) or every item that the user rated before (seen).

    tutorial               the TFRS retrieval tutorial as it stands: embeddings of user and item
                           ids, 32-d, in-batch negatives, batch 8192, Adagrad 0.1, 3 epochs
    tutorial_corrected     the same with candidate_sampling_probability and 20 epochs
    tutorial_hybrid        the tutorial with in-batch and 512 uniform negatives, masked and
                           corrected, as docs/guides/pieces.md changes it
    tutorial_hybrid_20     the same with 20 epochs
    two_tower              the package's default
    two_tower_uncorrected  the same without log_q
    in_batch               the default with in-batch negatives alone
    in_batch_uncorrected   the same without log_q
    popularity, ease, ials

No setting is chosen on the test. The tutorial keeps its own settings. The package's models have the
default run's, with the number of epochs chosen on validation. With several seeds, a user's value is
the mean over the seeds.

    python benchmarks/movielens_100k.py --seeds 3 --json benchmarks/results/movielens_100k.json
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

# Before TensorFlow Recommenders, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import numpy as np
import tutorial
from leaderboard import Fit, baseline, fit_ours, of_tutorial, summarise
from record import parser_with_json, write_json

from tfrs_pipeline.run.data import RunData, prepare

METRICS = ("ndcg@100", "recall@100", "recall@20")
EXCLUDES: tuple[Literal["clicked", "seen"], ...] = ("clicked", "seen")


@contextlib.contextmanager
def prepared(config: tp.RunConfig) -> Iterator[RunData]:
    """Loads, splits and samples the log of a config as a run does, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield prepare(config, Path(folder))


def two_tower(settings: dict[str, Any]) -> Fit:
    """Makes the fit of the package's model with some settings, by dotted name."""
    return lambda config, data, folder: fit_ours(tp.with_settings(config, settings), data, folder)


UNCORRECTED = {"model.correction": "none"}
IN_BATCH = {"model.negatives": (tp.InBatch(),)}
MODELS: dict[str, Fit] = {
    "tutorial": of_tutorial(tutorial.NUM_EPOCHS),
    "tutorial_corrected": of_tutorial(tutorial.NUM_EPOCHS_CORRECTED, corrected=True),
    "tutorial_hybrid": of_tutorial(tutorial.NUM_EPOCHS, hybrid=True),
    "tutorial_hybrid_20": of_tutorial(tutorial.NUM_EPOCHS_CORRECTED, hybrid=True),
    "two_tower": two_tower({}),
    "two_tower_uncorrected": two_tower(UNCORRECTED),
    "in_batch": two_tower(IN_BATCH),
    "in_batch_uncorrected": two_tower({**IN_BATCH, **UNCORRECTED}),
    "popularity": baseline("popularity"),
    "ease": baseline("ease"),
    "ials": baseline("ials"),
}
SEEDLESS = ("popularity", "ease")


def run(models: Sequence[str], num_seeds: int) -> Iterator[dict[str, Any]]:
    """Fits and measures the models; yields the results so far after each seed."""
    results: dict[str, dict[str, list[tp.EvaluationResult]]] = {
        name: {exclude: [] for exclude in EXCLUDES} for name in models
    }
    fits: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    for seed in range(num_seeds):
        config = tp.with_settings(tp.movielens_config(), {"seed": seed})
        with prepared(config) as data:
            num_positives = len(data.final.samples)
            for name in models:
                if seed and name in SEEDLESS:
                    continue
                start = time.monotonic()
                retriever, notes = MODELS[name](config, data, None)
                seconds = time.monotonic() - start
                fits[name].append({"seed": seed, "seconds": round(seconds, 1), **notes})
                for exclude in EXCLUDES:
                    measured = tp.evaluate(retriever, data.test, exclude=exclude, num_bootstrap=0)
                    results[name][exclude].append(measured.first)
                ndcg = np.mean(results[name]["clicked"][-1].per_query["ndcg@100"])
                print(f"seed {seed}  {name:22} ndcg@100 {ndcg:.4f}  {seconds:6.1f} s", flush=True)
        yield {
            "seeds": list(range(seed + 1)),
            "num_training_positives": num_positives,
            "protocol": {
                exclude: {
                    "num_users": len(of_seeds[0].user_ids),
                    "num_relevant": of_seeds[0].overall.num_relevant,
                }
                for exclude, of_seeds in results[models[0]].items()
            },
            "models": {
                name: {
                    "fits": fits[name],
                    **{e: summarise([r.per_query for r in of], METRICS) for e, of in by.items()},
                }
                for name, by in results.items()
            },
        }


def print_table(figures: dict[str, Any]) -> None:
    """Prints a line for each model and kind of exclusion."""
    print(f"\n{'':22} {'excluded':8}" + "".join(f"  {metric:>22}" for metric in METRICS))
    for exclude in EXCLUDES:
        for name, model in figures["models"].items():
            cells = [model[exclude][metric] for metric in METRICS]
            line = "".join(f"  {c['mean']:.4f} [{c['low']:.4f}, {c['high']:.4f}]" for c in cells)
            print(f"{name:22} {exclude:8}{line}")


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="Seeds 0 to N - 1 (1).")
    options = parser.parse_args()
    for figures in run(options.models, options.seeds):
        write_json(options.json, figures)  # After each seed, since all of them take an hour.
    print_table(figures)


if __name__ == "__main__":
    main()
