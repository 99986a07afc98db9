"""Histories: pooling, padding, the empty history, and all prefixes of a sequence at once."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfrs_pipeline.features.raw import relative_seconds
from tfrs_pipeline.model import history as histories
from tfrs_pipeline.model.history import NUM_GAPS, HistoryEncoder, drop_gaps, gap_buckets
from tfrs_pipeline.model.randomness import Dropout
from tfrs_pipeline.model.settings import TwoTowerSettings

ALL = ("mean", "recency", "attention")
LENGTHS = [8, 3, 0, 5]


def make_encoder(*poolings: str, reads_times: bool = False, **options: Any) -> HistoryEncoder:
    sizes = {"dim": 4, "history_length": 8, "recency_decay": 0.5}
    sizes |= {"history_dropout": 0.5, "attention_dropout": 0.2, **options}
    settings = TwoTowerSettings(history_pooling=poolings or ALL, **sizes)
    tf.keras.utils.set_random_seed(0)  # Some weights would hide the effect of a time.
    encoder = HistoryEncoder(9, settings, reads_times=reads_times)
    encoder(tf.zeros([1, 1], tf.int32))
    return encoder


@pytest.fixture(scope="module")
def timed() -> dict[str, HistoryEncoder]:
    """Returns encoders by pooling: attention reads gaps between times, recency reads ages."""
    encoders = {name: make_encoder(name, reads_times=True) for name in ("attention", "recency")}
    tables: Any = encoders["attention"].attention.gap_vectors, encoders["recency"].ages
    for table in tables:
        table.assign(tf.random.stateless_normal(table.shape, [5, 6]) / 4)
    return encoders


def times_of(lengths: list[int]) -> np.ndarray:
    """Returns [n, 9] rising seconds, of the items and then of the query; some are unknown (NaN)."""
    rng = np.random.default_rng(2)
    times = 1.7e9 + np.cumsum(rng.integers(0, 10 ** rng.integers(0, 7, (len(lengths), 9))), axis=1)
    times[rng.random(times.shape) < 0.2] = np.nan
    return np.where(np.arange(9) <= np.array(lengths)[:, None], times, np.nan)


def table_of(encoder: HistoryEncoder) -> tf.Variable:
    return next(v for v in encoder.trainable_variables if v.shape == (10, 4))


def sequences(lengths: list[int]) -> np.ndarray:
    """[n, 8] rows, oldest first, padded with 0."""
    rows = np.random.default_rng(1).integers(1, 10, (len(lengths), 8)).astype(np.int32)
    return np.where(np.arange(8) < np.array(lengths)[:, None], rows, 0)


def test_history_is_pooled_as_a_loop_would() -> None:
    encoder = make_encoder("mean", "recency")
    pooled = encoder(tf.constant([[4, 2, 7, 0]])).numpy()[0]
    rows = table_of(encoder).numpy()[[4, 2, 7]]
    np.testing.assert_allclose(pooled[:4], rows.mean(axis=0), rtol=1e-5)
    # The most recent item comes first and weighs most.
    np.testing.assert_allclose(pooled[4:], np.average(rows, axis=0, weights=[4, 2, 1]), rtol=1e-5)


def test_an_items_age_weighs_it_as_a_loop_would(timed: dict[str, HistoryEncoder]) -> None:
    aged, history, since = timed["recency"], [4, 2, 7, 5], [500.0, 400.0, float("nan"), 190.0]
    ages: Any = aged.ages
    # Ages 0, 100, unknown, 310; the query's own time has no effect.
    number = ages.numpy()[[1, 14, 0, 17]]
    weights = 0.5 ** np.arange(4) * np.exp(4 * number)
    expected = np.average(table_of(aged).numpy()[history], axis=0, weights=weights)
    for query in (9e3, float("nan")):
        times = 1.7e9 + tf.constant([[query, *since]], tf.float64)
        got = aged(tf.constant([history]), times=times).numpy()[0]
        np.testing.assert_allclose(got, expected, rtol=1e-4)
    none = tf.fill([1, 5], tf.constant(np.nan, tf.float64))
    got = aged(tf.constant([history]), times=none)
    np.testing.assert_allclose(got, aged(tf.constant([history])), rtol=1e-5)
    first, asked = make_encoder("recency", reads_times=True), tf.constant([history])
    np.testing.assert_array_equal(first(asked, times=times), first(asked))


def test_an_empty_history_has_a_vector_that_learns_and_padding_changes_nothing() -> None:
    encoder = make_encoder()
    for history in ([4, 2], []):
        wide = tf.constant([history + [0] * (5 - len(history))], tf.int32)
        alone = encoder(tf.constant([history], tf.int32))
        np.testing.assert_allclose(encoder(wide), alone, rtol=1e-5, atol=1e-6)
    encoder = make_encoder("mean", "recency")
    with tf.GradientTape() as tape:
        pooled = encoder(tf.constant([[0, 0], [3, 0], [0, 0]]))
        loss = tf.reduce_sum(pooled[0])
    empty = next(v for v in encoder.trainable_variables if "empty_history" in v.name)
    for place in (0, 2):
        np.testing.assert_array_equal(pooled[place], empty)
    np.testing.assert_array_equal(pooled[1], np.tile(table_of(encoder).numpy()[3], 2))
    assert (tape.gradient(loss, empty).numpy() == 1).all()


def beginnings() -> tuple[list[tuple[int, int]], np.ndarray, np.ndarray]:
    """Returns the places of all prefixes of the sequences; their rows and times, latest first."""
    rows, times = sequences(LENGTHS), times_of(LENGTHS)
    places = [(w, j) for w, length in enumerate(LENGTHS) for j in range(length + 1)]
    latest_rows = np.zeros((len(places), 8), np.int32)
    latest_times = np.full((len(places), 9), np.nan)
    for line, line_times, (w, j) in zip(latest_rows, latest_times, places, strict=True):
        line[:j] = rows[w, :j][::-1]
        line_times[: j + 1] = times[w, : j + 1][::-1]
    return places, latest_rows, latest_times


@pytest.mark.parametrize("pooling", [*ALL, "attention to times", "recency by ages"])
def test_each_state_is_the_encoding_of_its_beginning(
    pooling: str, timed: dict[str, HistoryEncoder]
) -> None:
    """Therefore no state depends on what comes after it."""
    encoder = make_encoder(pooling) if pooling in ALL else timed[pooling.split()[0]]
    places, latest_rows, latest_times = beginnings()
    times = tf.constant(times_of(LENGTHS))
    states = encoder.states(tf.constant(sequences(LENGTHS)), times=times).numpy()
    alone = encoder(tf.constant(latest_rows), times=tf.constant(latest_times)).numpy()
    for (w, j), expected in zip(places, alone, strict=True):
        np.testing.assert_allclose(states[w, j], expected, rtol=1e-4, atol=1e-5)


def test_the_querys_own_time_tells(timed: dict[str, HistoryEncoder]) -> None:
    """Changing or removing that time changes the result; all times missing equals no times."""
    encoder, (_, latest_rows, latest_times) = timed["attention"], beginnings()
    alone = encoder(tf.constant(latest_rows), times=tf.constant(latest_times))
    is_told = np.isfinite(latest_times[:, :2]).all(axis=1)
    for query in (2e9, np.nan):
        latest_times[:, 0] = query
        other = encoder(tf.constant(latest_rows), times=tf.constant(latest_times))
        assert (np.abs(other - alone).max(axis=1) > 1e-3)[is_told].all()
    rows, none = tf.constant(sequences(LENGTHS)), tf.constant(np.full((4, 9), np.nan))
    np.testing.assert_array_equal(encoder.states(rows), encoder.states(rows, times=none))


def test_gaps_begin_as_if_there_were_none() -> None:
    encoders = []
    for reads_times in (False, True):
        tf.keras.utils.set_random_seed(1)
        encoders.append(make_encoder(reads_times=reads_times))
    plain, timed = encoders
    rows, times = tf.constant(sequences(LENGTHS)), tf.constant(times_of(LENGTHS))
    np.testing.assert_array_equal(timed.states(rows, times=times), plain.states(rows))
    # An encoder that reads no times has no weights for them: a log without times trains as before.
    assert len(timed.weights) == len(plain.weights) + 2
    np.testing.assert_array_equal(plain.states(rows, times=times), plain.states(rows))


def test_gaps_are_sorted_by_their_logarithm() -> None:
    whole = np.arange(5000)
    bucket = np.array([1 + (np.log2(1.0 + s) * 2 + 1e-9) // 1 for s in whole.tolist()])
    times = np.stack([np.zeros(len(whole)), whole], axis=1)
    np.testing.assert_array_equal(gap_buckets(tf.constant(times))[:, 1], bucket)
    (odd,) = gap_buckets(tf.constant([[9.0, 3.0, 1e12, np.nan, 7.0]], tf.float64))
    assert odd.numpy().tolist() == [0, 1, NUM_GAPS - 1, 0, 0]


def test_training_drops_gaps_and_sometimes_all() -> None:
    rng = np.random.default_rng(0)
    gaps = tf.constant(rng.integers(1, NUM_GAPS, (4000, 6)), tf.int32)
    dropped = drop_gaps(gaps, Dropout(tf.constant([1, 2]))).numpy()
    np.testing.assert_array_equal(dropped[dropped > 0], gaps.numpy()[dropped > 0])
    is_whole = (dropped == 0).all(axis=1)
    # Five standard deviations of 5%.
    assert abs(is_whole.mean() - 0.05) < 5 * np.sqrt(0.05 * 0.95 / 4000)
    assert abs((dropped[~is_whole] == 0).mean() - 0.05) < 5 * np.sqrt(0.05 * 0.95 / 22_000)


@pytest.mark.parametrize("pooling", ALL)
def test_dropout_is_a_function_of_its_seed_and_of_training(pooling: str) -> None:
    encoder, rows = make_encoder(pooling), tf.constant(sequences([8] * 50))
    for encode in (encoder, encoder.states):
        seeds = map(tf.constant, ([1, 2], [1, 2], [1, 3]))
        first, again, other = (encode(rows, dropout=Dropout(seed)).numpy() for seed in seeds)
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()
        assert (first != encode(rows).numpy()).any()


@pytest.mark.parametrize("pooling", ALL)
def test_a_slice_of_a_batch_drops_what_the_whole_does(
    pooling: str, timed: dict[str, HistoryEncoder]
) -> None:
    encoder = timed.get(pooling) or make_encoder(pooling)
    # Only one of the slices has the longest history.
    histories = tf.constant(sequences([2, 1, 3, 8, 5]), tf.int32)
    times = tf.constant(relative_seconds(np.tile(1e9 - 10.0 ** np.arange(9), (5, 1))))
    seed = tf.constant([3, 4], tf.int32)
    whole = encoder(histories, times, Dropout(seed))
    slices = [
        encoder(histories[part], times[part], Dropout(seed, tf.constant([part.start, 5], tf.int32)))
        for part in (slice(0, 3), slice(3, 5))
    ]
    np.testing.assert_allclose(tf.concat(slices, axis=0), whole, rtol=1e-5, atol=1e-6)


def test_training_drops_the_times_of_some_histories() -> None:
    encoder = make_encoder("recency", history_dropout=0.0, reads_times=True)
    ages: Any = encoder.ages
    ages.assign(tf.linspace(0.0, -1.0, NUM_GAPS))
    rows = tf.constant(np.tile([1, 2, 3], (4000, 1)))
    times = tf.constant(relative_seconds(np.tile([9e6, 8e6, 7e6, 1e6], (4000, 1))))
    with_times, without = encoder(rows[:1], times[:1]).numpy(), encoder(rows[:1]).numpy()
    pooled = encoder(rows, times, Dropout(tf.constant([4, 5]))).numpy()
    is_dropped, is_kept = (np.isclose(pooled, x).all(axis=1) for x in (without, with_times))
    assert (is_dropped ^ is_kept).all()
    # Five standard deviations of 5%.
    assert abs(is_dropped.mean() - 0.05) < 5 * np.sqrt(0.05 * 0.95 / 4000)


def test_dropout_drops_its_share() -> None:
    encoder = make_encoder("mean", history_dropout=0.3)
    empty = encoder(tf.zeros([1, 3], tf.int32)).numpy()
    # Row i's embedding is the i-th unit vector, so a pooled vector shows what was kept.
    table_of(encoder).assign(np.eye(10, 4, k=-1))
    rows = tf.constant(np.tile([1, 2, 3], (4000, 1)))
    pooled = encoder(rows, dropout=Dropout(tf.constant([0, 1]))).numpy()
    is_empty = (pooled == empty).all(axis=1)
    share = (pooled[~is_empty] > 0).sum() / rows.shape.num_elements()
    # 4 standard errors of 12,000 draws.
    assert abs(share - 0.7) < 4 * np.sqrt(0.7 * 0.3 / 12_000)
    assert abs(is_empty.mean() - 0.3**3) < 4 * np.sqrt(0.027 / 4000)


def test_one_pass_drops_an_item_for_every_pooling_or_for_none() -> None:
    encoder = make_encoder(attention_dropout=0.0)
    rows = tf.constant([[4] + [0] * 7] * 99)
    empty, whole = encoder(tf.zeros([1, 8], tf.int32)).numpy(), encoder(rows[:1]).numpy()
    trained = encoder(rows, dropout=Dropout(tf.constant([1, 5]))).numpy()
    parts = [slice(0, 4), slice(4, 8), slice(8, 12)]
    is_whole = [np.isclose(trained[:, x], whole[:, x], atol=1e-5).all(axis=1) for x in parts]
    np.testing.assert_array_equal(is_whole, [is_whole[0]] * 3)
    assert 20 < is_whole[0].sum() < 80
    dropped = trained[~is_whole[0], :8]
    np.testing.assert_allclose(dropped, np.repeat(empty[:, :8], len(dropped), 0))


def test_attention_is_that_of_a_loop() -> None:
    """One block and two heads, computed with NumPy from the layer's own weights."""
    small: Any = {"dim": 4, "history_length": 5, "attention_blocks": 1, "attention_dropout": 0.3}
    layer = histories.SelfAttention(TwoTowerSettings(**small), reads_gaps=True)
    gaps = np.array([[0, 3, 1, 63], [0, 0, 9, 0]])
    vectors = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    layer(tf.constant(vectors))
    for variable in layer.trainable_variables:  # Zeros and ones could hide a missing term.
        variable.assign(variable + tf.random.stateless_normal(variable.shape, [1, 2], stddev=0.3))
    got = layer(tf.constant(vectors), gaps=tf.constant(gaps)).numpy()
    block = {name: [w.numpy() for w in part.weights] for name, part in layer.blocks[0].items()}
    of_heads = layer.by_distance[0].numpy()

    def norm(x: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
        gamma, beta = weights
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * gamma + beta

    def dense(x: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
        return x @ weights[0] + weights[1]

    for sequence, of_gaps, expected in zip(vectors, gaps, got, strict=True):
        start = layer.start.numpy()[0]
        hidden = np.concatenate([start, sequence * 2.0]) + layer.positions.numpy()[:4]
        table: Any = layer.gap_vectors
        hidden = hidden + table.numpy()[of_gaps]
        projected = dense(norm(hidden, block["attention_norm"]), block["query_key_value"])
        query, key, value = projected[:, :4], projected[:, 4:8], projected[:, 8:]
        attended = np.zeros((4, 4))
        for head, by_distance in zip((slice(0, 2), slice(2, 4)), of_heads, strict=True):
            for j in range(4):
                scores = key[: j + 1, head] @ query[j, head] / np.sqrt(2)
                weights = np.exp(scores + by_distance[j::-1])  # The earliest place is furthest.
                attended[j, head] = weights / weights.sum() @ value[: j + 1, head]
        hidden = hidden + dense(attended, block["attended"])
        inner = np.maximum(dense(norm(hidden, block["mlp_norm"]), block["hidden"]), 0)
        hidden = hidden + dense(inner, block["output"])
        weights = [w.numpy() for w in layer.norm.weights]
        np.testing.assert_allclose(norm(hidden, weights), expected, rtol=1e-3, atol=1e-4)


def test_added_to_features_a_history_is_as_long_as_an_embedding() -> None:
    """A longer one would drown request features, which start as large as embeddings."""
    settings = TwoTowerSettings(history_pooling=("attention",))
    encoder = HistoryEncoder(500, settings)
    rows = tf.reshape(tf.range(1, 501), [20, 25])
    vectors = encoder(rows)
    items = tf.gather(encoder.item_table, rows)
    lengths = [tf.reduce_mean(tf.norm(x, axis=-1)) for x in (vectors, items)]
    assert 0.8 < lengths[0] / lengths[1] < 1.25


def test_a_longer_history_is_refused() -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match="8 items at most"):
        make_encoder("attention").states(tf.ones([1, 9], tf.int32))
