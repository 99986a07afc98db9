"""Measures whether the input pipeline keeps up, and what its parts cost, over a generated corpus.

A million items with Zipf counts, a million samples, 50 known positives and 50 exposed items a user
on average, histories of up to 50. Batches of B = 1024 positives and M = 1024 easy negatives, half
of them uniform, half ~ clicks^0.75.

    pipeline    batches a second of HybridBatches alone
    step        training steps a second of a model of ids alone, 64-d, Adagrad, on one batch
                repeated: the fastest consumer there is
    together    training steps a second fed by the pipeline
    masks       batches a second without masks, with one of the two kinds, with both

Variants are measured in turn, over several rounds, and the fastest round of each is reported: other
jobs on the machine can only slow it. CPU time of all threads is steadier still, and shows what
share of the machine the pipeline takes from the training.

    python benchmarks/batches.py --json benchmarks/results/batches.json
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import numpy as np
import tensorflow as tf
from record import parser_with_json, write_json

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.model.corpus import Corpus
from tfrs_pipeline.samples.store import RowLists, Samples

BATCH_SIZE = 1024
NEGATIVES = (tp.InBatch(), tp.Uniform(512), tp.Popularity(512))
DIM = 64
MEAN_LIST = 50
HISTORY_LENGTH = 50
ZIPF_EXPONENT = 0.9

# Known positives, exposed items.
MASKS = {
    "none": (False, False),
    "known_positives": (True, False),
    "exposed": (False, True),
    "both": (True, True),
}


def make_samples(num_candidates: int, num_samples: int, seed: int) -> Samples:
    """Generates samples whose users have 50 positives, and 50 exposed items, on average."""
    rng = np.random.default_rng(seed)
    num_users = num_samples // MEAN_LIST
    mass = np.arange(1, num_candidates + 1) ** -ZIPF_EXPONENT
    cdf = np.cumsum(mass) / mass.sum()

    def draw(num: int) -> np.ndarray:
        place = np.minimum(np.searchsorted(cdf, rng.random(num)), num_candidates - 1)
        return (1 + place).astype(np.int32)

    # In the order of time; a sample's history is the user's samples before it.
    users = 1 + np.sort(rng.integers(num_users, size=num_samples))
    samples = Samples.from_pairs(
        users, draw(num_samples), num_queries=num_users, num_candidates=num_candidates
    )
    viewers = 1 + rng.integers(num_users, size=num_samples)
    exposed = np.unique(viewers.astype(np.int64) << 32 | draw(num_samples))
    offsets = np.searchsorted(exposed >> 32, np.arange(num_users + 2))
    lists = RowLists(offsets, (exposed & 0xFFFFFFFF).astype(np.int32))
    return dataclasses.replace(samples, exposed=lists)


def make_batches(
    samples: Samples, seed: int, masks: tuple[bool, bool] = MASKS["both"]
) -> tp.HybridBatches:
    """Makes the batches of this benchmark, without the lists that should not be masked."""
    nothing = RowLists.from_lists([np.zeros(0, np.int32)] * len(samples.exposed))
    kept = zip(("known_positives", "exposed"), masks, strict=True)
    samples = dataclasses.replace(samples, **{name: nothing for name, is_in in kept if not is_in})
    examples = tp.SinglePositives(
        samples, batch_size=BATCH_SIZE, history_length=HISTORY_LENGTH, seed=seed
    )
    return tp.HybridBatches(
        samples,
        examples,
        NEGATIVES,
        seed=seed,
    )


Rates = dict[str, dict[str, float]]


def rates(workloads: Mapping[str, Callable[[], int]], rounds: int) -> Rates:
    """Runs workloads in turn.

    Args:
        workloads: Each does some units of work and returns how many.
        rounds: Turns, after one that is not counted.

    Returns:
        Per workload, units `per_second` and `cpu_ms` a unit, each of its best round.
    """
    found: Rates = {name: {"per_second": 0.0, "cpu_ms": np.inf} for name in workloads}
    for turn in range(rounds + 1):
        for name, work in workloads.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            num_units = work()
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            if turn:
                best = found[name]
                best["per_second"] = max(best["per_second"], num_units / seconds)
                best["cpu_ms"] = min(best["cpu_ms"], 1000 * cpu_seconds / num_units)
    return found


def measure_training(samples: Samples, seed: int, steps: int, rounds: int) -> dict[str, Any]:
    """Measures the pipeline alone, the step alone, and both together."""
    batches = make_batches(samples, seed)
    num_queries, num_candidates = len(samples.known_positives) - 1, len(samples.counts) - 1
    ids = Ids(np.arange(1, num_candidates + 1)), Ids(np.arange(1, num_queries + 1))
    model = tp.TwoTower(
        dim=DIM,
        use_user_id=True,
        history_pooling=(),
        history_length=HISTORY_LENGTH,
        id_dropout=0.0,
    ).build(Corpus(*ids))
    model.compile(optimizer=tf.keras.optimizers.Adagrad(0.05))
    one_batch = next(iter(batches.dataset(num_steps=1)))
    repeated = tf.data.Dataset.from_tensors(one_batch).repeat()
    place = iter(range(0, 2**31, steps))

    def fit(dataset: tf.data.Dataset) -> int:
        model.fit(dataset, steps_per_epoch=steps, verbose=0)
        return steps

    found = rates(
        {
            "pipeline": lambda: consume(batches, next(place), steps),
            "step": lambda: fit(repeated),
            "together": lambda: fit(batches.dataset(next(place), steps)),
        },
        rounds,
    )
    pipeline, step = found["pipeline"], found["step"]
    return {
        **found,
        "rate_of_pipeline_over_step": pipeline["per_second"] / step["per_second"],
        "cpu_of_pipeline_over_step": pipeline["cpu_ms"] / step["cpu_ms"],
    }


def consume(batches: tp.HybridBatches, start_step: int, num_steps: int) -> int:
    """Builds batches and drops them."""
    for _ in batches.dataset(start_step, num_steps):
        pass
    return num_steps


def measure_masks(samples: Samples, seed: int, steps: int, rounds: int) -> Rates:
    """Measures the pipeline with and without masks."""
    kinds = {name: make_batches(samples, seed, masks) for name, masks in MASKS.items()}
    place = iter(range(0, 2**31, steps))

    def workload(batches: tp.HybridBatches) -> Callable[[], int]:
        return lambda: consume(batches, next(place), steps)

    return rates({name: workload(batches) for name, batches in kinds.items()}, rounds)


def run(
    num_candidates: int, num_samples: int, seed: int, steps: int, rounds: int
) -> dict[str, Any]:
    """Measures everything."""
    samples = make_samples(num_candidates, num_samples, seed)
    return {
        "num_candidates": num_candidates,
        "num_samples": num_samples,
        "batch_size": BATCH_SIZE,
        "num_easy": sum(kind.num for kind in NEGATIVES[1:]),
        "mean_list": {
            "known_positives": len(samples.known_positives.values)
            / (len(samples.known_positives) - 1),
            "exposed": len(samples.exposed.values) / (len(samples.exposed) - 1),
        },
        "steps_per_round": steps,
        "rounds": rounds,
        "training": measure_training(samples, seed, steps, rounds),
        "masks": measure_masks(samples, seed, steps, rounds),
    }


def print_report(figures: Mapping[str, Any]) -> None:
    """Prints the figures."""
    for title in ("training", "masks"):
        print(f"{title:20} {'a second':>12} {'CPU ms each':>12}")
        for name, found in figures[title].items():
            if isinstance(found, dict):
                print(f"  {name:18} {found['per_second']:12.1f} {found['cpu_ms']:12.2f}")
    for name in ("rate_of_pipeline_over_step", "cpu_of_pipeline_over_step"):
        print(f"{name:33} {figures['training'][name]:12.2f}")


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("--candidates", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--samples", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--steps", type=int, default=50, help="Batches in a round (50).")
    parser.add_argument("--rounds", type=int, default=7, help="Turns that are counted (7).")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    figures = run(options.candidates, options.samples, options.seed, options.steps, options.rounds)
    print_report(figures)
    if options.json:
        write_json(options.json, figures, seed=options.seed)


if __name__ == "__main__":
    main()
