"""No item that a user clicked, disliked, or saw without a click is ever a negative of that user.

Random funnels run all the way from the event table to the gradient of the loss; the tests look for
a forbidden item that gets through.
"""

from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.small_batches import ORDERS
from tests.small_log import in_ibis
from tfrs_pipeline import Batch, HybridBatches, HybridRetrieval, Log
from tfrs_pipeline.data.schema import Stage
from tfrs_pipeline.negatives.samplers import FunnelLosers, InBatch, Popularity, Uniform
from tfrs_pipeline.samples.build import build_samples
from tfrs_pipeline.samples.store import Samples, read_samples

START = datetime(2024, 1, 1, tzinfo=UTC)
NUM_ITEMS = 25
LOST: Any = ("retrieved", "pre_ranked", "ranked")
HARD = FunnelLosers(share=0.5, stages=LOST, num=2, bottom_share=0.9)


def random_log(seed: int, num_users: int) -> tuple[Log, dict[int, set[int]], dict[int, set[int]]]:
    """Returns a log with a random funnel for each user, and by user the forbidden items and losers.

    An item may be exposed in one request and lose in another, be clicked first and passed over or
    disliked later, come twice in a request, or lose at the very time it is shown.
    """
    rng = np.random.default_rng(seed)
    columns: dict[str, list[Any]] = defaultdict(list)
    forbidden: dict[int, set[int]] = defaultdict(set)
    lost: dict[int, set[int]] = defaultdict(set)
    for user in range(1, num_users + 1):
        chances = rng.dirichlet([1, 1, 1, 1, 0.7, 0.2])
        num_items = rng.integers(3, NUM_ITEMS + 1)
        for request in range(rng.integers(1, 5)):
            second = int(rng.integers(0, 4))
            for item in rng.integers(1, num_items + 1, rng.integers(1, 12)).tolist():
                stage = rng.choice([s.value for s in Stage], p=chances)
                if not columns["stage"]:
                    stage = Stage.CLICKED.value  # Each log has at least one positive.
                columns["user_id"].append(user)
                columns["item_id"].append(item)
                columns["stage"].append(stage)
                columns["timestamp"].append(START + timedelta(seconds=second))
                columns["request_id"].append(request if rng.random() < 0.9 else None)
                columns["rank"].append(int(rng.integers(0, 9)) if rng.random() < 0.8 else None)
                shown = stage in (Stage.EXPOSED, Stage.CLICKED, Stage.DISLIKED)
                (forbidden if shown else lost)[user].add(item)
    columns["event_number"] = list(range(len(columns["user_id"])))

    items, users = {"item_id": range(1, NUM_ITEMS + 1)}, {"user_id": range(1, num_users + 1)}
    return Log(in_ibis(columns), in_ibis(items), in_ibis(users)), forbidden, lost


@dataclass(frozen=True)
class Funnels:
    """Samples of random funnels; by user, the items that are never negatives, and the losers."""

    samples: Samples
    forbidden: dict[int, set[int]]
    lost: dict[int, set[int]]


def build(folder: Path, seed: int, num_users: int) -> Funnels:
    log, forbidden, lost = random_log(seed, num_users)
    build_samples(log, folder, seed=seed, hard=HARD)
    return Funnels(read_samples(folder), forbidden, lost)


@pytest.fixture(scope="module")
def funnels(tmp_path_factory: pytest.TempPathFactory) -> Funnels:
    return build(tmp_path_factory.mktemp("funnels"), 0, 300)


def acting_negatives(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Returns which cells the loss depends on, and the candidates of all: both [W, C + H]."""
    num_rows = len(batch.query_row)
    embeddings = tf.random.stateless_normal([NUM_ITEMS + 1, 3], [0, 1])
    corrections = [tf.tile(batch.log_q, [num_rows // len(batch.log_q), 1])]
    columns = [tf.tile(batch.shared_row[tf.newaxis], [num_rows, 1])]
    hard = {}
    if batch.hard is not None:
        corrections.append(batch.hard.log_q)
        columns.append(batch.hard.candidate_row)
        hard = {"hard_log_q": corrections[1], "hard_mask": batch.hard.is_counted}
        hard["hard_embeddings"] = tf.gather(embeddings, batch.hard.candidate_row)
    with tf.GradientTape() as tape:
        tape.watch(corrections)
        loss = HybridRetrieval()(
            tf.random.stateless_normal([num_rows, 3], [2, 3]),
            tf.gather(embeddings, batch.candidate_row),
            positive_query=batch.positive_query,
            negative_embeddings=tf.gather(embeddings, batch.shared_row),
            log_q=corrections[0],
            score_mask=batch.is_counted,
            **hard,
        )
    gradients = tape.gradient(loss, corrections)
    return tf.concat(gradients, axis=1).numpy() != 0, tf.concat(columns, axis=1).numpy()


def check(funnels: Funnels, seed: int, batch_size: int) -> None:
    samples = funnels.samples
    for name, order in ORDERS.items():
        examples = order(samples, batch_size=batch_size, history_length=5, seed=seed)
        batches = HybridBatches(
            samples,
            examples,
            [*([InBatch()] if name == "single" else []), Uniform(20), Popularity(20)],
            hard=None if name == "sets" else HARD,
            seed=seed,
        )
        num_forbidden = num_negatives = 0
        for step in range(batches.steps_per_epoch):
            batch = batches.batch(step)
            acts, candidates = acting_negatives(batch)
            num_negatives += acts.sum()
            for i, user in enumerate(batch.query_row.numpy().tolist()):
                never = [0, *funnels.forbidden[user]]
                num_forbidden += np.isin(candidates[i][acts[i]], never).sum()
        assert num_forbidden == 0, f"{num_forbidden} of {num_negatives} negatives, {name}, {seed}"
        assert num_negatives > 1000


def test_three_hundred_random_funnels(funnels: Funnels) -> None:
    check(funnels, seed=0, batch_size=64)


@pytest.mark.nightly
def test_ten_thousand_random_funnels(tmp_path: Path) -> None:
    # Few logs and large batches: the time depends on how many of both there are.
    for seed in range(2, 7):
        check(build(tmp_path / str(seed), seed, 2000), seed, batch_size=256)


def test_hard_negatives_do_reach_the_loss(funnels: Funnels) -> None:
    """The guard would prove nothing if nothing passed: allowed losers do become negatives."""
    samples = funnels.samples
    num_pooled = 0
    for pool in samples.hard_pools.values():
        for i, user in enumerate(samples.query_rows.tolist()):
            assert set(pool[i].tolist()) <= funnels.lost[user] - funnels.forbidden[user]
            num_pooled += len(pool[i])
    assert num_pooled > 500
    examples = ORDERS["single"](samples, batch_size=64, history_length=5, seed=0)
    batches = HybridBatches(samples, examples, [Uniform(20)], hard=HARD, seed=0)
    acts, _ = acting_negatives(batches.batch(0))
    assert acts[:, 20:].sum() > 50
