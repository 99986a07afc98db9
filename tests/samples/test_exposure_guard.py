"""No item that was exposed to a user and not clicked, or clicked, is ever that user's negative.

Random funnels go the whole way, from event table to loss matrix; the test looks for one forbidden
item that got through.
"""

from collections import defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf

from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import Stage
from tfrs_pipeline.model.loss import MASKED_LOGIT, HybridRetrieval
from tfrs_pipeline.negatives.batches import TrainingBatches
from tfrs_pipeline.samples.build import Samples, build_samples, read_samples
from tfrs_pipeline.samples.hard_pools import HardNegativeRules

START = datetime(2024, 1, 1, tzinfo=UTC)
CONNECTION = ibis.duckdb.connect()
FUNNELS_PER_TABLE = 250
NUM_ITEMS = 25
LOSERS = (Stage.RETRIEVED, Stage.PRE_RANKED, Stage.RANKED)


def random_tables(seed: int) -> tuple[Log, dict[int, set[int]]]:
    """Makes a table of users with a random funnel each, and their forbidden items.

    An item may be exposed in one request and lose in another, be clicked first and passed over
    later, come twice in a request, lose at the very time it is shown.
    """
    rng = np.random.default_rng(seed)
    columns: dict[str, list[Any]] = defaultdict(list)
    forbidden: dict[int, set[int]] = defaultdict(set)
    for user in range(1, FUNNELS_PER_TABLE + 1):
        chances = rng.dirichlet([1, 1, 1, 1, 0.7])
        num_items = rng.integers(3, NUM_ITEMS + 1)
        for request in range(rng.integers(1, 5)):
            second = int(rng.integers(0, 4))
            for item in rng.integers(1, num_items + 1, rng.integers(1, 12)).tolist():
                stage = rng.choice([s.value for s in Stage], p=chances)
                columns["user_id"].append(user)
                columns["item_id"].append(item)
                columns["stage"].append(stage)
                columns["timestamp"].append(START + timedelta(seconds=second))
                columns["request_id"].append(request if rng.random() < 0.9 else None)
                columns["rank"].append(int(rng.integers(0, 9)) if rng.random() < 0.8 else None)
                if stage in (Stage.EXPOSED, Stage.CLICKED):
                    forbidden[user].add(item)
    columns["event_number"] = list(range(len(columns["user_id"])))
    # Each table of its own has at least one positive.
    columns["stage"][0] = Stage.CLICKED.value
    forbidden[1].add(columns["item_id"][0])
    table = pa.table(columns, schema=pa.schema([
        ("user_id", pa.int64()), ("item_id", pa.int64()), ("stage", pa.string()),
        ("timestamp", pa.timestamp("us", "UTC")), ("request_id", pa.int64()),
        ("rank", pa.int32()), ("event_number", pa.int64()),
    ]))  # fmt: skip

    def create(rows: pa.Table) -> ibis.Table:
        return CONNECTION.create_table(ibis.util.gen_name("guard"), rows)

    tables = Log(
        events=create(table),
        items=create(pa.table({"item_id": pa.array(range(1, NUM_ITEMS + 1), pa.int64())})),
        users=create(pa.table({"user_id": pa.array(range(1, FUNNELS_PER_TABLE + 1), pa.int64())})),
    )
    return tables, forbidden


def build(tables: Log, folder: Path, seed: int) -> Samples:
    rules = HardNegativeRules(LOSERS, window=timedelta(seconds=2), bottom_share=0.9)
    build_samples(tables, tables.events, folder, seed=seed, hard_negatives=rules)
    return read_samples(folder)


def loss_matrix(batch: dict[str, tf.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits that reach the loss and the candidate of every cell, [B, C + H]."""
    seen = {}

    def loss(y_true: tf.Tensor, y_pred: tf.Tensor, sample_weight: tf.Tensor) -> tf.Tensor:
        seen["logits"] = y_pred.numpy()
        return tf.reduce_sum(y_pred)

    shared = tf.concat([batch["candidate_row"], batch["easy_candidate_row"]], axis=0)
    embeddings = tf.random.stateless_normal([NUM_ITEMS + 1, 3], [0, 1])
    HybridRetrieval(loss=loss)(
        tf.random.stateless_normal([len(batch["query_row"]), 3], [2, 3]),
        tf.gather(embeddings, shared),
        log_q=batch["log_q"],
        score_mask=batch["is_counted"],
        hard_embeddings=tf.gather(embeddings, batch["hard_candidate_row"]),
        hard_log_q=batch["hard_log_q"],
        hard_mask=batch["hard_is_counted"],
    )
    columns = np.tile(shared.numpy(), (len(batch["query_row"]), 1))
    return seen["logits"], np.concatenate([columns, batch["hard_candidate_row"].numpy()], axis=1)


def what_got_through(
    tables: Log, forbidden: dict[int, set[int]], folder: Path, seed: int
) -> tuple[int, int]:
    """Counts forbidden cells and all cells that act as negatives, over an epoch of batches."""
    samples = build(tables, folder, seed)
    batches = TrainingBatches(
        samples,
        batch_size=64,
        easy_negatives=[(0.0, 20), (0.75, 20)],
        history_length=5,
        seed=seed,
        hard_share=0.5,
        hard_negatives=[(stage.value, 1.0, 2) for stage in LOSERS],
    )
    num_forbidden = num_negatives = 0
    for batch in batches.dataset(0, batches.steps_per_epoch):
        logits, candidates = loss_matrix(batch)
        acts = logits > MASKED_LOGIT
        acts[np.arange(64), np.arange(64)] = False
        num_negatives += acts.sum()
        for i, user in enumerate(batch["query_row"].numpy()):
            num_forbidden += np.isin(candidates[i][acts[i]], list(forbidden[user])).sum()
            num_forbidden += (candidates[i][acts[i]] == 0).sum()
    return int(num_forbidden), int(num_negatives)


def check(folder: Path, seeds: range) -> None:
    for seed in seeds:
        tables, forbidden = random_tables(seed)
        num_forbidden, num_negatives = what_got_through(tables, forbidden, folder / str(seed), seed)
        assert num_forbidden == 0, f"{num_forbidden} of {num_negatives} negatives, seed {seed}"
        assert num_negatives > 1000


def test_a_thousand_random_funnels(tmp_path: Path) -> None:
    check(tmp_path, range(4))


@pytest.mark.slow
def test_ten_thousand_random_funnels(tmp_path: Path) -> None:
    check(tmp_path, range(4, 44))


def test_hard_negatives_do_reach_the_loss(tmp_path: Path) -> None:
    """The guard is no proof if nothing passes: losers that may be negatives are."""
    tables, forbidden = random_tables(0)
    samples = build(tables, tmp_path, 0)
    lost: dict[int, set[int]] = defaultdict(set)
    for row in tables.events.to_pyarrow().to_pylist():
        if row["stage"] in LOSERS:
            lost[row["user_id"]].add(row["item_id"])
    num_pooled = 0
    for pool in samples.hard_pools.values():
        for i, user in enumerate(samples.query_rows.tolist()):
            assert set(pool[i].tolist()) <= lost[user] - forbidden[user]
            num_pooled += len(pool[i])
    assert num_pooled > 500
