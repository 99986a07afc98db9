"""Measures a training step of each optimizer on tables of growing size.

Two embedding tables of n rows, 64-d, and a batch of 4096 pairs, whose rows are drawn by popularity
(p ~ 1 / rank). The in-batch softmax is over the dot products of 512 of them, so that the optimizer
and not the score matrix is measured; every row of the batch has a gradient. At each size the
optimizers take turns, a few steps each, over several rounds; the result is the median.

    python benchmarks/optimizers.py --json benchmarks/results/optimizers.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np

# Before TensorFlow, since it selects Keras 2.
from tfrs_pipeline.model.optimizer import make_optimizer
from tfrs_pipeline.model.settings import OptimizerName, TrainingSettings

# isort: split
import tensorflow as tf
from record import write_json

NUM_ROWS = (10_000, 100_000, 1_000_000)
BATCH_SIZE, EMBEDDING_DIM, GROUP = 4096, 64, 512
NUM_BATCHES = 8


def make_step(name: OptimizerName, num_rows: int, seed: int) -> Callable[[int], float]:
    """Returns a function that runs n steps and returns the milliseconds per step."""
    rng = np.random.default_rng(seed)
    # Log-uniform rows: p ~ 1 / rank.
    drawn = num_rows ** rng.random([NUM_BATCHES, 2, BATCH_SIZE])
    rows = tf.constant(np.minimum(drawn, num_rows - 1).astype(np.int32))
    tables = [
        tf.Variable(tf.random.stateless_uniform([num_rows, EMBEDDING_DIM], [seed, i], -0.05, 0.05))
        for i in range(2)
    ]
    optimizer = make_optimizer(TrainingSettings(optimizer=name), 1)
    optimizer.build(tables)

    @tf.function
    def train(number: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            queries, candidates = (
                tf.reshape(tf.gather(table, rows[number, i]), [-1, GROUP, EMBEDDING_DIM])
                for i, table in enumerate(tables)
            )
            logits = tf.linalg.matmul(queries, candidates, transpose_b=True)
            labels = tf.broadcast_to(tf.range(GROUP), tf.shape(logits)[:2])
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, tables)
        optimizer.apply_gradients(zip(gradients, tables, strict=True))

    def run(num_steps: int) -> float:
        start = time.perf_counter()
        for step in range(num_steps):
            train(tf.constant(step % NUM_BATCHES))
        tables[0][0].numpy()
        return 1000 * (time.perf_counter() - start) / num_steps

    run(2)
    return run


def measure(num_rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measures every optimizer at one size, in turn."""
    steps = {name: make_step(name, num_rows, options.seed) for name in get_args(OptimizerName)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(step(options.steps))
    return {
        name: {
            "ms_per_step": float(np.median(values)),
            "ms_per_step_by_round": values,
            # Round by round, so that other load on the machine cancels out.
            "ratio_to_adam": float(np.median(np.array(values) / np.array(times["adam"]))),
        }
        for name, values in times.items()
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="Steps a round and optimizer (8).")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where to write the figures.")
    options = parser.parse_args()
    sizes = {}
    for num_rows in NUM_ROWS:
        sizes[str(num_rows)] = figures = measure(num_rows, options)
        line = "   ".join(f"{name} {f['ms_per_step']:7.1f} ms" for name, f in figures.items())
        print(f"{num_rows:9,} rows   {line}", flush=True)
    if options.json:
        write_json(options.json, {"rows": sizes}, seed=options.seed)


if __name__ == "__main__":
    main()
