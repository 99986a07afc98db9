"""Training batches in every order: masks, corrections and hard draws, against slow loops."""

import dataclasses
import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

from tests import small_batches as small
from tests.small_batches import BATCH_SIZE, NUM_SAMPLES, SAMPLES, batch_list, make_batches
from tfrs_pipeline import DataError, FunnelLosers, InBatch, SamplingFrame, Uniform
from tfrs_pipeline.samples.store import RowLists, resampling_rate

NUM_CANDIDATES = small.NUM_CANDIDATES
F = 0.4
HARD = FunnelLosers(share=F, num=5)
RATE = resampling_rate(SAMPLES.counts, 0.6)
# Each candidate's share in each kind of draw, written out.
CLICKS = SAMPLES.counts / NUM_SAMPLES
SMOOTHED = np.where(SAMPLES.counts > 0, SAMPLES.counts**0.75, 0)
OTHERS = 12 / NUM_CANDIDATES + 10 * SMOOTHED / SMOOTHED.sum()
# [num_samples] for each stage.
HAS_POOL = {stage: np.diff(SAMPLES.hard_pools[stage].offsets) > 0 for stage in small.STAGES}


@pytest.mark.parametrize("order", ["single", "sequences"])
def test_every_sample_comes_once_an_epoch_in_another_order_each(order: str) -> None:
    batches = make_batches(order)
    steps = batches.steps_per_epoch
    assert steps == NUM_SAMPLES // BATCH_SIZE
    # Full batches of single positives run on into the next epoch.
    uneven = [make_batches(batch_size=32)] if order == "single" else []
    for each in (batches, *uneven):
        drawn = map(small.samples_of, batch_list(each, 2 * steps))
        strung = list(itertools.chain(*drawn))
        epochs = strung[:NUM_SAMPLES], strung[NUM_SAMPLES : 2 * NUM_SAMPLES]
        assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(NUM_SAMPLES))
        assert epochs[0] != epochs[1]


@pytest.mark.parametrize("is_ordered", [True, False])
def test_rows_of_a_batch_belong_together(is_ordered: bool) -> None:
    samples = SAMPLES if is_ordered else dataclasses.replace(SAMPLES, num_earlier=None)
    for batch in batch_list(make_batches("single", samples), 5):
        for i, sample in enumerate(small.samples_of(batch)):
            assert batch.query_row[i] == samples.query_rows[sample]
            assert batch.candidate_row[i] == samples.candidate_rows[sample]
            latest = samples.history(sample)[::-1][: small.LENGTH].tolist()
            assert batch.history_rows[i].tolist() == latest + [0] * (small.LENGTH - len(latest))


@pytest.mark.parametrize("order", ["single", "sequences"])
@pytest.mark.parametrize("rate", [None, RATE])
def test_request_features_are_those_of_the_positive(order: str, rate: Any) -> None:
    drawn = {} if order == "sequences" or rate is None else {"rate": rate}
    for batch in batch_list(make_batches(order, small.REQUESTED, examples=drawn), 3):
        sample = small.samples_of(batch)
        assert batch.requests["place"].tolist() == sample
        assert batch.requests["vector"].tolist() == [[2 * i, 2 * i + 1] for i in sample]


@pytest.mark.parametrize("order", small.ORDERS)
def test_mask_matches_a_loop(order: str) -> None:
    batches = make_batches(order)
    num_masked: Counter[str] = Counter()
    for batch in batch_list(batches, 6):
        columns = batch.shared_row.tolist()
        assert batch.is_counted.shape == (len(batch.query_row), len(columns))
        for i, query in enumerate(batch.query_row.tolist()):
            known = SAMPLES.known_positives[query].tolist()
            exposed = SAMPLES.exposed[query].tolist()
            own = [] if order == "sets" else [batch.candidate_row[i]]
            expected = [not (c in own or c in known or c in exposed) for c in columns]
            assert batch.is_counted[i].tolist() == expected
            num_masked["known"] += sum(c in known and c not in own for c in columns)
            num_masked["exposed"] += sum(c in exposed for c in columns)
        if order == "sets":
            np.testing.assert_allclose(batch.log_q[0], np.log(OTHERS[columns]), rtol=1e-5)
        if order == "single":  # The in-batch kind comes first: a row's own is on the diagonal.
            np.testing.assert_array_equal(columns[:BATCH_SIZE], batch.candidate_row)
            assert not batch.is_counted.diagonal().any()
    assert num_masked["known"] > 0 < num_masked["exposed"]


def test_a_rows_own_positive_is_masked_known_or_not() -> None:
    unknown: Any = {"known_positives": RowLists.empty(len(SAMPLES.known_positives))}
    (batch,) = batch_list(make_batches(samples=dataclasses.replace(SAMPLES, **unknown)), 1)
    is_own = batch.shared_row == batch.candidate_row[:, np.newaxis]
    assert is_own.sum() > BATCH_SIZE
    assert not batch.is_counted[is_own].any()
    assert batch.is_counted.any()


@pytest.mark.parametrize(("order", "options", "n"), [
    ("single", {}, (BATCH_SIZE - 1) * CLICKS + OTHERS),
    ("single", {"negatives": small.MIXTURE[1:]}, OTHERS),
    ("single", {"examples": {"rate": RATE}},
     (BATCH_SIZE - 1) * SAMPLES.counts**0.4 / (SAMPLES.counts[1:] ** 0.4).sum() + OTHERS),
    ("sequences", {}, OTHERS),
])  # fmt: skip
def test_corrections_and_hard_draws(order: str, options: dict[str, Any], n: np.ndarray) -> None:
    batches = make_batches(order, hard=HARD, **options)
    np.testing.assert_allclose(batches.expected_count[1:], n[1:], rtol=1e-12)
    cases = set()
    for batch in batch_list(batches, 5):
        for i, sample in enumerate(small.samples_of(batch)):
            has = [bool(HAS_POOL[stage][sample]) for stage in small.STAGES]
            cases.add(tuple(has))
            f = F if any(has) else 0.0
            assert batch.hard.share[i] == pytest.approx(f)
            np.testing.assert_allclose(
                batch.log_q[i], np.log(n[batch.shared_row] / (1 - f)), rtol=1e-4, atol=1e-5
            )
            for stage, is_there, start in zip(small.STAGES, has, (0, 5), strict=True):
                columns = slice(start, start + 5)
                assert (batch.hard.is_counted[i, columns] == is_there).all()
                if is_there:
                    drawn = set(batch.hard.candidate_row[i, columns].tolist())
                    pool = SAMPLES.hard_pools[stage][sample].tolist()
                    assert drawn <= set(pool)
                    assert len(drawn) == min(5, len(pool))
                    expected = np.log(5 / (NUM_CANDIDATES * F / sum(has)))
                    np.testing.assert_allclose(batch.hard.log_q[i, columns], expected, rtol=1e-5)
    assert len(cases) == 4


@pytest.mark.parametrize("num_later", [0, 40])
def test_the_hard_share_is_one_of_the_items_that_may_be_negatives(num_later: int) -> None:
    """With equal scores, the hard and the easy sum weigh as much as the items they stand for."""
    counts = np.concatenate([SAMPLES.counts, np.zeros(num_later, int)])
    is_later = np.arange(len(counts)) > NUM_CANDIDATES if num_later else None
    samples = dataclasses.replace(SAMPLES, counts=counts, is_later=is_later)
    batches = make_batches(samples=samples, negatives=[Uniform(80)], hard=HARD)
    easy_over_expected = []
    for batch in batch_list(batches, 200):
        has_hard = batch.hard.share > 0
        hard = (np.exp(-batch.hard.log_q) * batch.hard.is_counted).sum(axis=1)
        np.testing.assert_allclose(hard[has_hard], F * NUM_CANDIDATES, rtol=1e-5)
        easy = (np.exp(-batch.log_q) * batch.is_counted).sum(axis=1)
        num_left = [NUM_CANDIDATES - len(small.forbidden(SAMPLES, row)) for row in batch.query_row]
        easy_over_expected.append((easy / ((1 - F) * np.array(num_left)))[has_hard].mean())
    # The steps are independent draws.
    standard_error = np.std(easy_over_expected) / np.sqrt(200)
    assert abs(np.mean(easy_over_expected) - 1) < 4 * standard_error < 0.05


@pytest.mark.parametrize("stage", ["retrieved", "exposed"])
def test_a_hard_negative_that_slipped_in_is_masked_and_not_counted(stage: Any) -> None:
    """Pools hold forbidden items here, as if they had not been cleared when they were built."""
    hard = FunnelLosers(share=F, stages=(stage,), num=6, allow_exposed=stage == "exposed")
    rows = SAMPLES.query_rows.tolist()
    pools = RowLists.from_lists([np.array([*small.forbidden(SAMPLES, x), 41, 42]) for x in rows])
    counts = np.concatenate([SAMPLES.counts, [1, 1]])
    samples = dataclasses.replace(SAMPLES, hard_pools={stage: pools}, counts=counts)
    batches, num_masked = make_batches(samples=samples, hard=hard), 0
    for batch in batch_list(batches, 8):
        for i, query in enumerate(batch.query_row.tolist()):
            never = small.forbidden(SAMPLES, query)
            if stage == "exposed":  # Allowed by `allow_exposed`.
                never = SAMPLES.known_positives[query].tolist()
            is_good = [row not in never for row in batch.hard.candidate_row[i]]
            assert batch.hard.is_counted[i].tolist() == is_good
            num_masked += is_good.count(False)
            assert batch.hard.share[i] == pytest.approx(F if any(is_good) else 0)
            if any(is_good):
                expected = np.log(sum(is_good) / (42 * F))
                assert batch.hard.log_q[i, 0] == pytest.approx(expected, rel=1e-5)
    assert num_masked > 50


def test_samples_without_losers_are_refused() -> None:
    without = dataclasses.replace(SAMPLES, hard_pools={})
    with pytest.raises(DataError, match="asks for losers of the stages retrieved, pre_ranked"):
        make_batches(samples=without, hard=HARD)


RESAMPLED: dict[str, Any] = {"hard": HARD, "examples": {"rate": RATE}}


@pytest.mark.parametrize(
    ("order", "options"), [*((x, {}) for x in small.ORDERS), ("single", RESAMPLED)]
)
def test_a_batch_is_a_function_of_seed_and_step(order: str, options: dict[str, Any]) -> None:
    batches = make_batches(order, **options)
    unbroken = list(batches.dataset(0, 7).as_numpy_iterator())
    one_thread = tf.data.Options()
    one_thread.threading.private_threadpool_size = 1
    one_thread.threading.max_intra_op_parallelism = 1
    rest = make_batches(order, **options).dataset(4, 3).with_options(one_thread)
    small.assert_same_batches(list(rest.as_numpy_iterator()), unbroken[4:])
    for step in (6, 2):
        small.assert_same_batches(batch_list(batches, 1, start=step), [unbroken[step]])
    other = batch_list(make_batches(order, seed=4, **options), 3)
    hard = ["hard.candidate_row"] if "hard" in options else []
    for name in ("weight", "shared_row", "dropout_seed", *hard):
        drawn, others = ([small.flat(x)[name].tobytes() for x in y] for y in (unbroken, other))
        assert drawn[:3] != others
        assert len(set(drawn)) == 7


def test_samples_are_drawn_by_the_rate_of_their_candidate() -> None:
    single = make_batches(examples={"rate": RATE}).examples
    drawn = np.concatenate([single.read(single.choose(step)).index for step in range(300)])
    assert RATE is not None
    share = RATE[SAMPLES.candidate_rows]
    observed = np.bincount(drawn, minlength=NUM_SAMPLES)
    expected = share / share.sum() * len(drawn)
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-4


def test_weights_of_positives_change_no_draw_and_no_hard_share() -> None:
    equal = dataclasses.replace(SAMPLES, weights=np.ones(NUM_SAMPLES, np.float32))
    rate = resampling_rate(SAMPLES.counts, 1)
    by_draw = make_batches(samples=equal, hard=HARD, examples={"rate": rate})
    by_weight = make_batches(samples=equal, hard=HARD, positive_weight=rate)
    plain = make_batches(samples=equal, hard=HARD)
    # Weights do not change the draws, nor n(c); their mean over the samples is 1.
    np.testing.assert_array_equal(by_weight.expected_count, plain.expected_count)
    drawn = [batch.weight for batch in batch_list(by_weight, plain.steps_per_epoch)]
    assert np.mean(drawn) == pytest.approx(1)
    has_any = HAS_POOL["retrieved"] | HAS_POOL["pre_ranked"]
    assert rate is not None
    of_samples = rate[SAMPLES.candidate_rows]
    assert plain.mean_hard_share == by_weight.mean_hard_share == pytest.approx(F * has_any.mean())
    mean = (of_samples * has_any).sum() / of_samples.sum()
    assert by_draw.mean_hard_share == pytest.approx(F * mean)


class OwnInBatch(InBatch):
    pass


class HalfInBatch(InBatch):
    """Draws half of the batch's positives, and expects as many."""

    def draw(self, frame: SamplingFrame, positive_rows: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return positive_rows[: frame.batch_size // 2]

    def expected_count(self, frame: SamplingFrame) -> np.ndarray:
        return (frame.batch_size // 2) * frame.q_positive


@pytest.mark.parametrize("kind", [OwnInBatch, HalfInBatch])
def test_a_subclass_of_in_batch_has_its_own_count(kind: type) -> None:
    own = make_batches(negatives=[kind(), Uniform(20)])
    (batch,) = batch_list(own, 1)
    expected = kind().expected_count(own.frame)[batch.shared_row] + 20 / NUM_CANDIDATES
    np.testing.assert_allclose(batch.log_q[0], np.log(expected), rtol=1e-5)


UNEVEN: dict[str, Any] = {"batch_size": 2.5}


@pytest.mark.parametrize(("orders", "options", "message"), [
    ("sequences sets", {"negatives": [InBatch()]}, "fair draw.*{name}"),
    ("sequences sets", {"negatives": [Uniform(3), OwnInBatch()]}, "fair draw.*{name}"),
    ("sets", {"hard": HARD}, "UserSets gives a query many positives"),
    ("sets", {"samples": small.REQUESTED}, "request features belong to one.*'single'"),
    ("single sequences sets", {"batch_size": 0}, "batch_size must be a whole .*Received: 0"),
    ("single sequences sets", UNEVEN, "batch_size must be a whole .*Received: 2.5"),
    ("sequences sets", {"examples": {"seed": -1}}, "seed must be a whole number, 0 or more"),
    ("sequences", {"history_length": 0}, "history_length must be a whole number, 1 or more"),
    ("single", {"batch_size": 151}, "needs 151 positives.*has 150.*batch_size"),
    ("sequences", {"samples": small.UNORDERED}, "need an order"),
])  # fmt: skip
def test_refusals(orders: str, options: dict[str, Any], message: str) -> None:
    for order in orders.split():
        with pytest.raises(ValueError, match=message.format(name=small.ORDERS[order].__name__)):
            make_batches(order, **options)
    wrong: Any
    for wrong in (-1, 1.0):
        with pytest.raises(ValueError, match=rf"step must be a whole .* 0 or .*Received: {wrong}"):
            make_batches().batch(wrong)
