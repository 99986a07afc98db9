"""log_q from the model's own estimate of how often positives come."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.model.conftest import LOSERS, NUM_ITEMS, tiny
from tfrs_pipeline.model.corpus import TrainingSet
from tfrs_pipeline.model.network import TwoTowerNetwork
from tfrs_pipeline.model.streaming import StreamingFrequency
from tfrs_pipeline.negatives.in_batch import InBatch
from tfrs_pipeline.negatives.uniform import Uniform

B = 32


def streaming(data: TrainingSet, **options: Any) -> tuple[TwoTowerNetwork, Any]:
    model = tiny(correction="streaming", **options)
    return model.build(data.corpus), model.batches(data.samples)


def frequency_of(network: TwoTowerNetwork) -> StreamingFrequency:
    assert network.frequency is not None
    return network.frequency


@pytest.mark.parametrize("negatives", [[InBatch(), Uniform(12), Uniform(3)], [Uniform(15)]])
@pytest.mark.parametrize("hard", [None, LOSERS])
def test_with_the_true_frequency_log_q_is_the_counted_one(
    data: TrainingSet, monkeypatch: pytest.MonkeyPatch, negatives: list[Any], hard: Any
) -> None:
    network, batches = streaming(data, negatives=negatives, hard=hard)
    q = tf.constant(data.samples.counts / data.samples.counts.sum(), tf.float32)
    monkeypatch.setattr(network, "frequency", lambda rows: tf.gather(q, rows))
    batch = batches.batch(2)
    assert "log_q" not in batch
    counted = tiny(negatives=negatives, hard=hard).batches(data.samples).batch(2)
    got = tf.broadcast_to(network.log_q(batch), counted["is_counted"].shape)
    expected = tf.broadcast_to(counted["log_q"], got.shape)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    for name in batch.keys() & counted.keys():
        np.testing.assert_array_equal(batch[name], counted[name])


def test_training_alone_moves_the_estimate_once_a_step_before_the_loss(data: TrainingSet) -> None:
    network, batches = streaming(data, history_dropout=0, id_dropout=0)
    network.compile(optimizer=tf.keras.optimizers.SGD(0.0))
    network.fit(batches.dataset(0, 3), verbose=0)
    second = StreamingFrequency(1000)
    for step in range(3):
        second.update(batches.batch(step)["candidate_row"])
    corpus = tf.range(1, NUM_ITEMS + 1)
    batch = batches.batch(3)
    before = network.compute_loss(batch).numpy()
    network.evaluate(batches.dataset(4, 1), verbose=0)
    network.diagnose(batch)
    np.testing.assert_allclose(frequency_of(network)(corpus), second(corpus), rtol=1e-6)
    in_training = network.compute_loss(batch, training=True).numpy()
    second.update(batch["candidate_row"])
    np.testing.assert_allclose(frequency_of(network)(corpus), second(corpus), rtol=1e-6)
    assert in_training == pytest.approx(network.compute_loss(batch).numpy(), rel=1e-6)
    assert abs(before - in_training) > 1e-4


def test_batches_of_the_other_correction_are_refused(data: TrainingSet) -> None:
    network, batches = streaming(data)
    batch, counted = batches.batch(0), tiny().batches(data.samples).batch(0)
    with pytest.raises(ValueError, match=r"no 'in_batch_draws'.*estimates_frequency=True"):
        network.compute_loss(counted)
    with pytest.raises(ValueError, match=r"no 'log_q'.*estimates_frequency=False"):
        tiny().build(data.corpus).compute_loss(batch)
    plain = tiny(correction="none").build(data.corpus)
    assert plain.compute_loss(counted).numpy() == plain.compute_loss(batch).numpy()


def test_buckets_follow_the_corpus() -> None:
    sizes = (100, 2**15, 2**15 + 1, 2**21)
    buckets = [StreamingFrequency.of_corpus(n).num_buckets for n in sizes]
    assert buckets == [2**16, 2**17, 2**18, 2**22]
