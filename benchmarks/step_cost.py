"""Measures what masks and a row's own hard negatives add to a training step.

An id-only candidate tower and a mean of the history, 64-d, Adagrad, B = 1024 positives, M = 1024
shared easy negatives, a corpus of 20,000. A step is the model's, fed by the pipeline that makes its
batches, as in `fit`. All variants run in turn, over several rounds; ratios are of medians.

    bare          no masks (accidental hits alone), no hard negatives
    masks L       known positives and exposed items masked, L together on average
    hard H        H hard negatives for each row
    both          lists of 50 and H = 8

    python benchmarks/step_cost.py --json benchmarks/results/step_cost.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import numpy as np
import tensorflow as tf
from record import write_json

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.model.corpus import Corpus
from tfrs_pipeline.samples.store import RowLists, Samples

NUM_CANDIDATES, NUM_QUERIES, NUM_SAMPLES = 20_000, 20_000, 200_000
BATCH_SIZE, DIM, HISTORY_LENGTH = 1024, 64, 20
NEGATIVES = (tp.InBatch(), tp.Uniform(512), tp.Popularity(512))
LIST_LENGTHS = (50, 200, 1000)
POOL = 20


def random_lists(rng: np.random.Generator, num: int, mean_length: int) -> RowLists:
    """Makes sorted lists of 1 to 2 * mean_length rows, low ones often; repeats are removed."""
    lengths = rng.integers(1, 2 * mean_length, num)
    values = 1 + (NUM_CANDIDATES * rng.random(lengths.sum()) ** 3).astype(np.int32)
    key = np.repeat(np.arange(num), lengths)
    pairs = np.unique(key.astype(np.int64) << 32 | values)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(pairs >> 32, minlength=num))])
    return RowLists(offsets.astype(np.int64), (pairs & 0xFFFFFFFF).astype(np.int32))


def make_samples(mean_list: int, seed: int) -> Samples:
    """Generates samples with Zipf-like positives and pools of 20 hard negatives."""
    rng = np.random.default_rng(seed)
    candidate_rows = 1 + (NUM_CANDIDATES * rng.random(NUM_SAMPLES) ** 3).astype(np.int32)
    half = mean_list // 2
    nothing = RowLists.from_lists([np.zeros(0, np.int32)] * (NUM_QUERIES + 1))
    query_rows = rng.integers(1, NUM_QUERIES + 1, NUM_SAMPLES).astype(np.int32)
    sequences = random_lists(rng, NUM_QUERIES + 1, HISTORY_LENGTH)
    num_earlier = rng.integers(0, HISTORY_LENGTH // 2, NUM_SAMPLES)
    return Samples(
        query_rows=query_rows,
        candidate_rows=candidate_rows,
        weights=np.ones(NUM_SAMPLES, np.float32),
        sequences=sequences,
        # A history is a part of its sequence.
        num_earlier=np.minimum(num_earlier, np.diff(sequences.offsets)[query_rows]).astype(
            np.int32
        ),
        known_positives=random_lists(rng, NUM_QUERIES + 1, half) if half else nothing,
        exposed=random_lists(rng, NUM_QUERIES + 1, half) if half else nothing,
        counts=np.bincount(candidate_rows, minlength=NUM_CANDIDATES + 1),
        hard_pools={"pre_ranked": random_lists(rng, NUM_SAMPLES, POOL)},
    )


def make_step(mean_list: int, num_hard: int, seed: int) -> Callable[[int], float]:
    """Returns a function that runs n steps and returns the milliseconds per step."""
    samples = make_samples(mean_list, seed)
    examples = tp.SinglePositives(
        samples, batch_size=BATCH_SIZE, history_length=HISTORY_LENGTH, seed=seed
    )
    hard = tp.FunnelLosers(share=0.05, stages=("pre_ranked",), num=num_hard) if num_hard else None
    batches = tp.HybridBatches(
        samples,
        examples,
        NEGATIVES,
        hard=hard,
        seed=seed,
    )
    model = tp.TwoTower(
        dim=DIM, history_pooling=("mean",), history_length=HISTORY_LENGTH, id_dropout=0.0
    )
    ids = Ids(np.arange(1, NUM_CANDIDATES + 1)), Ids(np.arange(1, NUM_QUERIES + 1))
    network = model.build(Corpus(*ids))
    network.compile(optimizer=tf.keras.optimizers.Adagrad(0.05))
    train = tf.function(network.train_step)
    stream = iter(batches.dataset())

    def run(num_steps: int) -> float:
        start = time.perf_counter()
        for _ in range(num_steps):
            train(next(stream))
        return 1000 * (time.perf_counter() - start) / num_steps

    run(5)
    return run


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20, help="Steps a round and variant (20).")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where to write the figures.")
    options = parser.parse_args()
    variants = {
        "bare": (0, 0),
        **{f"masks {length}": (length, 0) for length in LIST_LENGTHS},
        **{f"hard {num}": (0, num) for num in (4, 8, 16)},
        "both": (50, 8),
    }
    steps = {name: make_step(*variant, options.seed) for name, variant in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(step(options.steps))
    figures = {}
    for name, milliseconds in times.items():
        figures[name] = {
            "ms_per_step": float(np.median(milliseconds)),
            "ratio_to_bare": float(np.median(milliseconds) / np.median(times["bare"])),
        }
        print(
            f"{name:12} {figures[name]['ms_per_step']:7.1f} ms a step, "
            f"{figures[name]['ratio_to_bare']:.2f} times bare"
        )
    if options.json:
        write_json(options.json, {"variants": figures}, seed=options.seed)


if __name__ == "__main__":
    main()
