"""Training and evaluation batches, against slow loops."""

from collections import Counter

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

from tfrs_pipeline.negatives.batches import TrainingBatches, evaluation_batches, shared_columns
from tfrs_pipeline.samples.build import RowLists, Samples

NUM_QUERIES, NUM_CANDIDATES, NUM_SAMPLES = 20, 40, 150
MIXTURE = ((0.0, 12), (0.75, 10))


def make_samples(seed: int = 0) -> Samples:
    rng = np.random.default_rng(seed)
    query_rows = rng.integers(1, NUM_QUERIES + 1, NUM_SAMPLES).astype(np.int32)
    popularity = 1 / np.arange(1, NUM_CANDIDATES + 1)
    candidate_rows = 1 + rng.choice(NUM_CANDIDATES, NUM_SAMPLES, p=popularity / popularity.sum())
    known = [np.unique(candidate_rows[query_rows == row]) for row in range(NUM_QUERIES + 1)]
    exposed = [
        np.setdiff1d(rng.integers(1, NUM_CANDIDATES + 1, rng.integers(0, 6)), known[row])
        for row in range(NUM_QUERIES + 1)
    ]
    # A query's samples in their order; a tie is a sample that knows fewer than precede it.
    place = np.array([np.sum(query_rows[:i] == row) for i, row in enumerate(query_rows)])
    sequences = [candidate_rows[query_rows == row] for row in range(NUM_QUERIES + 1)]
    return Samples(
        query_rows=query_rows,
        candidate_rows=candidate_rows.astype(np.int32),
        weights=rng.random(NUM_SAMPLES).astype(np.float32),
        sequences=RowLists.from_lists(sequences),
        num_earlier=(place - (rng.random(NUM_SAMPLES) < 0.3)).clip(0).astype(np.int32),
        known_positives=RowLists.from_lists(known),
        exposed=RowLists.from_lists(exposed),
        counts=np.bincount(candidate_rows, minlength=NUM_CANDIDATES + 1),
    )


SAMPLES = make_samples()


def make_batches(**options: object) -> TrainingBatches:
    settings = {"batch_size": 32, "easy_negatives": MIXTURE, "history_length": 4, "seed": 3}
    return TrainingBatches(SAMPLES, **{**settings, **options})  # type: ignore[arg-type]


def batch_list(
    batches: TrainingBatches, num_steps: int, start: int = 0
) -> list[dict[str, np.ndarray]]:
    return list(batches.dataset(start, num_steps).as_numpy_iterator())


def columns_of(batch: dict[str, np.ndarray]) -> np.ndarray:
    return shared_columns(batch).numpy()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("exposed", [True, False])
@pytest.mark.parametrize("in_batch", [True, False])
def test_mask_matches_a_loop(known: bool, exposed: bool, in_batch: bool) -> None:
    batches = make_batches(mask_known_positives=known, mask_exposed=exposed, in_batch=in_batch)
    num_masked = 0
    for batch in batch_list(batches, 6):
        columns = columns_of(batch)
        for i, query in enumerate(batch["query_row"]):
            left_out = {batch["candidate_row"][i]}
            left_out |= set(SAMPLES.known_positives[query]) if known else set()
            left_out |= set(SAMPLES.exposed[query]) if exposed else set()
            expected = [
                (in_batch and j == i) or column not in left_out for j, column in enumerate(columns)
            ]
            assert batch["is_counted"][i].tolist() == expected
            num_masked += expected.count(False)
    assert num_masked > 0


def test_rows_of_a_batch_belong_together() -> None:
    table = {
        (int(q), int(c), float(w)): SAMPLES.history(i)[::-1][:4].tolist()
        for i, (q, c, w) in enumerate(
            zip(SAMPLES.query_rows, SAMPLES.candidate_rows, SAMPLES.weights, strict=True)
        )
    }
    for batch in batch_list(make_batches(), 5):
        for i in range(32):
            key = (int(batch["query_row"][i]), int(batch["candidate_row"][i]))
            history = table[(*key, float(batch["weight"][i]))]
            assert batch["history_rows"][i].tolist() == history + [0] * (4 - len(history))


def test_log_q_is_the_log_of_the_expected_copies() -> None:
    q = SAMPLES.counts / SAMPLES.counts.sum()
    smoothed = np.where(SAMPLES.counts > 0, SAMPLES.counts**0.75, 0)
    n = 31 * q + 12 / NUM_CANDIDATES + 10 * smoothed / smoothed.sum()
    for batch in batch_list(make_batches(), 3):
        np.testing.assert_allclose(batch["log_q"][0], np.log(n[columns_of(batch)]), rtol=1e-5)


def test_drawn_negatives_follow_the_declared_mixture() -> None:
    drawn: Counter[int] = Counter()
    num_steps = 600
    for batch in batch_list(make_batches(), num_steps):
        drawn.update(batch["easy_candidate_row"].tolist())
    smoothed = SAMPLES.counts[1:] ** 0.75 * (SAMPLES.counts[1:] > 0)
    expected = num_steps * (12 / NUM_CANDIDATES + 10 * smoothed / smoothed.sum())
    observed = np.array([drawn[row] for row in range(1, NUM_CANDIDATES + 1)])
    assert drawn[0] == 0
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-4


def test_an_epoch_is_a_permutation_and_epochs_differ() -> None:
    batches = make_batches(batch_size=30)
    rows = np.concatenate([batch["weight"] for batch in batch_list(batches, 10)])
    epochs = rows.reshape(2, NUM_SAMPLES)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.sort(SAMPLES.weights))
    assert (epochs[0] != epochs[1]).any()
    # 32 does not divide 150: batches run on into the next epoch, still one permutation each.
    strung = np.concatenate([batch["weight"] for batch in batch_list(make_batches(), 15)])
    np.testing.assert_array_equal(np.sort(strung[:150]), np.sort(SAMPLES.weights))
    np.testing.assert_array_equal(np.sort(strung[150:300]), np.sort(SAMPLES.weights))


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    unbroken = batch_list(make_batches(), 8)
    resumed = batch_list(make_batches(), 3, start=5)
    for expected, got in zip(unbroken[5:], resumed, strict=True):
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name])
    alone = make_batches().batch(tf.constant(6, tf.int64))
    np.testing.assert_array_equal(alone["easy_candidate_row"], unbroken[6]["easy_candidate_row"])
    other = batch_list(make_batches(seed=4), 1)[0]
    assert (other["candidate_row"] != unbroken[0]["candidate_row"]).any()
    assert (other["easy_candidate_row"] != unbroken[0]["easy_candidate_row"]).any()
    assert (unbroken[0]["dropout_seed"] != unbroken[1]["dropout_seed"]).any()


def test_refuses_more_batch_than_samples() -> None:
    with pytest.raises(ValueError, match=r"needs 151 positives.*has 150.*batch_size"):
        make_batches(batch_size=151)


def test_without_easy_negatives() -> None:
    batch = batch_list(make_batches(easy_negatives=()), 1)[0]
    assert batch["easy_candidate_row"].shape == (0,)
    assert batch["is_counted"].shape == (32, 32)


def test_evaluation_batches_keep_every_query_with_its_lists() -> None:
    rng = np.random.default_rng(0)
    lists = [
        RowLists.from_lists([rng.integers(1, 41, rng.integers(0, 9)) for _ in range(11)])
        for _ in range(3)
    ]
    dataset = evaluation_batches(
        np.arange(1, 12), *lists, history_length=5, batch_size=4
    ).as_numpy_iterator()
    seen = []
    for batch in dataset:
        for i, query in enumerate(batch["query_row"]):
            seen.append(query)
            for name, source, length in zip(
                ("history_rows", "relevant_rows", "excluded_rows"), lists, (5, 99, 99), strict=True
            ):
                row = batch[name][i]
                assert row[row > 0].tolist() == source[query - 1][:length].tolist()
    assert seen == list(range(1, 12))


def test_masked_shares_add_up_to_what_is_masked() -> None:
    batches = make_batches()
    shares = batches.masked_shares(num_steps=4)
    cells = np.concatenate([batch["is_counted"] for batch in batch_list(batches, 4)])
    num_others = cells.size - len(cells)
    assert sum(shares.values()) * num_others == pytest.approx((~cells).sum())
    assert min(shares.values()) > 0
    without = make_batches(mask_exposed=False).masked_shares(num_steps=4)
    assert without == {**shares, "exposed items": 0}
