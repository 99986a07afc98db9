"""Batches of whole users: what is read, what is found, and that a query's rows are its own."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.negatives.test_batches import NUM_SAMPLES, SAMPLES
from tests.negatives.test_hybrid_batches import HYBRID, SAMPLE_OF
from tfrs_pipeline.negatives.batches import TrainingBatches, shared_columns
from tfrs_pipeline.negatives.user_sets import UserSetBatches
from tfrs_pipeline.samples.build import RowLists, Samples

UNORDERED = Samples(**{**vars(SAMPLES), "num_earlier": None})
QUERIES = np.unique(UNORDERED.query_rows)
EVERYTHING = NUM_SAMPLES  # A history that leaves nothing out.
SETTINGS: dict[str, Any] = {
    "batch_size": 16,
    "easy_negatives": ((0.0, 12), (0.75, 10)),
    "history_length": 4,
    "seed": 3,
}


def make_batches(samples: Samples = UNORDERED, **options: Any) -> UserSetBatches:
    return UserSetBatches(samples, **{**SETTINGS, **options})


def batch_list(batches: TrainingBatches, num_steps: int, start: int = 0) -> list[dict[str, Any]]:
    return list(batches.dataset(start, num_steps).as_numpy_iterator())


def parts(batch: dict[str, Any]) -> Iterator[tuple[int, list[int], list[int]]]:
    """Yields each query with the candidates that it reads and the samples that it finds."""
    found: list[list[int]] = [[] for _ in batch["query_row"]]
    for place, row in enumerate(batch["positive_query"]):
        sample = SAMPLE_OF[float(batch["weight"][place])]
        assert batch["candidate_row"][place] == UNORDERED.candidate_rows[sample]
        found[row].append(sample)
    for row, query in enumerate(batch["query_row"].tolist()):
        rows = batch["history_rows"][row]
        read = rows[rows > 0].tolist()
        assert rows[: len(read)].tolist() == read  # Padding comes last.
        yield query, read, found[row]


@pytest.mark.parametrize("read_share", [0.5, 0.3])
def test_a_positive_is_read_or_found_by_a_coin_of_its_own(read_share: float) -> None:
    batches = make_batches(history_length=EVERYTHING, read_share=read_share)
    steps, num_epochs = batches.steps_per_epoch, 150
    assert steps == round(NUM_SAMPLES * (1 - read_share) / 16)
    # Per epoch and query: how many of its distinct candidates were found.
    num_found = np.zeros((num_epochs, len(QUERIES)))
    num_samples_found, visits = 0, []
    for step, batch in enumerate(batch_list(batches, num_epochs * steps)):
        for query, read, found in parts(batch):
            assert found
            assert {UNORDERED.query_rows[sample] for sample in found} == {query}
            candidates = UNORDERED.candidate_rows[found].tolist()
            # Nothing is lost, copies included, and no copy is on both sides.
            assert sorted(read + candidates) == sorted(UNORDERED.sequences[query].tolist())
            assert not set(read) & set(candidates)
            num_found[step // steps, np.searchsorted(QUERIES, query)] = len(set(candidates))
            num_samples_found += len(found)
            visits.append((step // steps, query))
    assert len(set(visits)) == len(visits)  # Once an epoch.
    orders = [[query for at, query in visits if at == epoch] for epoch in range(2)]
    assert orders[0] != orders[1]

    p = 1 - read_share
    num_coins = np.array([len(UNORDERED.known_positives[query]) for query in QUERIES])
    n = num_epochs * num_coins.sum()
    assert num_found.sum() / n == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / n))
    # Independent coins: the count of a query has the variance of a binomial.
    z = (num_found - p * num_coins) ** 2 / (p * (1 - p) * num_coins)
    # Var z^2 = 2 + (1 / (p (1 - p)) - 6) / num_coins.
    sd = np.sqrt(np.mean(2 + (1 / (p * (1 - p)) - 6) / num_coins) / z.size)
    assert z.mean() == pytest.approx(1, abs=4 * sd)
    # A candidate's copies fall together.
    copies = np.unique(UNORDERED.query_rows * 1000 + UNORDERED.candidate_rows, return_counts=True)
    sd = np.sqrt(num_epochs * p * (1 - p) * np.sum(copies[1] ** 2))
    assert num_samples_found == pytest.approx(num_epochs * batches.positives_per_epoch, abs=4 * sd)


def test_a_long_history_is_read_in_part_any_of_it() -> None:
    batches = make_batches(history_length=2)
    read_of: dict[int, set[int]] = {}
    num_full = 0
    for batch in batch_list(batches, 300):
        assert batch["history_rows"].shape[1] <= 2
        for query, read, found in parts(batch):
            candidates = set(UNORDERED.candidate_rows[found].tolist())
            assert set(read) <= set(UNORDERED.known_positives[query].tolist()) - candidates
            num_left = len(UNORDERED.sequences[query]) - len(found)
            assert len(read) == min(2, num_left)
            num_full += num_left > 2
            read_of.setdefault(query, set()).update(read)
    assert num_full > 0
    for query in QUERIES.tolist():
        assert sorted(read_of[query]) == UNORDERED.known_positives[query].tolist()


def test_users_are_spread_evenly_over_an_epoch() -> None:
    batches = make_batches()
    steps = batches.steps_per_epoch
    for epoch in range(5):
        sizes = [len(b["query_row"]) for b in batch_list(batches, steps, epoch * steps)]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("exposed", [True, False])
def test_mask_matches_a_loop(exposed: bool) -> None:
    num_masked = 0
    for batch in batch_list(make_batches(mask_exposed=exposed), 8):
        columns = shared_columns(batch).numpy()
        assert batch["is_counted"].shape == (len(batch["query_row"]), 22)
        for i, query in enumerate(batch["query_row"]):
            left_out = set(UNORDERED.known_positives[query])
            left_out |= set(UNORDERED.exposed[query]) if exposed else set()
            expected = [column not in left_out for column in columns]
            assert batch["is_counted"][i].tolist() == expected
            num_masked += expected.count(False)
    assert num_masked > 0


def test_negatives_weigh_and_fall_as_those_of_single_positives() -> None:
    weighted: dict[str, Any] = {"positive_weight": np.linspace(1, 3, len(UNORDERED.counts))}
    single = TrainingBatches(UNORDERED, in_batch=False, **SETTINGS, **weighted)
    log_q_of = np.log(single.expected_count[1:])
    weight_of = dict(zip(UNORDERED.weights.tolist(), single._weights.numpy(), strict=True))
    plain, other = make_batches(), make_batches(**weighted)
    for step in range(4):
        expected, got = single.batch(step), plain.batch(step)
        for name in ("easy_candidate_row", "log_q", "dropout_seed"):
            np.testing.assert_array_equal(got[name], expected[name])
        np.testing.assert_allclose(
            got["positive_log_q"], log_q_of[got["candidate_row"].numpy() - 1], rtol=1e-6
        )
        of_samples = [weight_of[weight] for weight in got["weight"].numpy().tolist()]
        np.testing.assert_array_equal(other.batch(step)["weight"], of_samples)


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    steps = make_batches().steps_per_epoch
    unbroken = batch_list(make_batches(), 3 * steps)
    resumed = batch_list(make_batches(), 2 * steps - 1, start=steps + 1)
    batches = make_batches()
    for step, (expected, got) in enumerate(
        zip(unbroken[steps + 1 :], resumed, strict=True), steps + 1
    ):
        alone = batches.batch(step)
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name])
            np.testing.assert_array_equal(alone[name], expected[name])
    other = batch_list(make_batches(seed=4), 3 * steps)
    assert any(
        a["weight"].tolist() != b["weight"].tolist() for a, b in zip(unbroken, other, strict=True)
    )


def singles(num: int) -> Samples:
    """Users with one positive each, the candidate of their own row."""
    rows = np.arange(1, num + 1)
    lists = RowLists.from_lists([np.zeros(0, int), *rows[:, np.newaxis]])
    return Samples(
        query_rows=rows.astype(np.int32),
        candidate_rows=rows.astype(np.int32),
        weights=np.ones(num, np.float32),
        sequences=lists,
        num_earlier=None,
        known_positives=lists,
        exposed=RowLists.from_lists([np.zeros(0, int)] * (num + 1)),
        counts=np.bincount(rows),
    )


@pytest.mark.parametrize(("num_users", "batch_size"), [(2, 2), (40, 2), (40, 20)])
def test_users_of_one_positive_find_it_with_nothing_read(num_users: int, batch_size: int) -> None:
    """Or are left out, when they read it; and no batch is left without a user."""
    batches = make_batches(singles(num_users), batch_size=batch_size)
    steps, num_epochs = batches.steps_per_epoch, 60
    visited = np.zeros((num_epochs, num_users))
    for step, batch in enumerate(batch_list(batches, num_epochs * steps)):
        assert len(batch["query_row"]) >= 1
        assert batch["history_rows"].shape == (len(batch["query_row"]), 0)
        np.testing.assert_array_equal(batch["positive_query"], np.arange(len(batch["query_row"])))
        np.testing.assert_array_equal(batch["candidate_row"], batch["query_row"])
        visited[step // steps, batch["query_row"] - 1] += 1
    assert set(np.unique(visited)) == {0, 1}
    if num_users == 40:
        assert visited.mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(visited.size))


def test_masked_shares_are_those_of_the_positives_columns() -> None:
    batches = make_batches()
    shares = batches.masked_shares(num_steps=4)
    counts = dict.fromkeys(shares, 0)
    num_cells = 0
    for batch in batch_list(batches, 4):
        columns = shared_columns(batch).numpy()
        for place, row in enumerate(batch["positive_query"]):
            query = batch["query_row"][row]
            for column in columns:
                num_cells += 1
                if column == batch["candidate_row"][place]:
                    counts["accidental hits"] += 1
                elif column in UNORDERED.known_positives[query]:
                    counts["known positives"] += 1
                elif column in UNORDERED.exposed[query]:
                    counts["exposed items"] += 1
    assert min(counts.values()) > 0
    assert shares == pytest.approx({name: count / num_cells for name, count in counts.items()})


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"mask_known_positives = False.*'one'"):
        make_batches(mask_known_positives=False)
    with pytest.raises(ValueError, match=r"hard_share = 0.1.*'one'"):
        make_batches(HYBRID, hard_share=0.1, hard_negatives=(("retrieved", 1.0, 5),))
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"read_share must be in \(0, 1\)"):
            make_batches(read_share=share)
    with pytest.raises(ValueError, match="No shared column"):
        make_batches(easy_negatives=())
