"""Trainings that share a trace: tracing a training step takes most of a small training's time."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfrs_pipeline import TwoTower, TwoTowerNetwork
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.model import two_tower
from tfrs_pipeline.model.corpus import Corpus


@contextlib.contextmanager
def tracing_once() -> Iterator[None]:
    """Makes trainings with the same settings share one network, so that its step is traced once.

    Each starts as with a new network: from the weights of its seed, with an empty optimizer state.
    Their corpora have equal content. An earlier model then has the weights of the next.
    """
    built: dict[Any, TwoTowerNetwork] = {}
    starts: dict[Any, list[np.ndarray]] = {}
    compiled: dict[int, tuple[Any, list[np.ndarray]]] = {}
    encoders: dict[int, Any] = {}
    build, compile_ = TwoTower.build, TwoTowerNetwork.compile
    make_encoder = two_tower.query_encoder

    def build_once(self: TwoTower, corpus: Corpus) -> TwoTowerNetwork:
        key = repr((self.settings, self.training.examples, self._custom_towers)), content(corpus)
        if (key, self.seed) not in starts:
            network = build(self, corpus)
            built.setdefault(key, network)
            starts[key, self.seed] = [weight.copy() for weight in network.get_weights()]
        built[key].set_weights(starts[key, self.seed])
        return built[key]

    def compile_once(self: TwoTowerNetwork, optimizer: Any) -> None:
        settings = tf.keras.optimizers.serialize(optimizer)
        if id(self) not in compiled or compiled[id(self)][0] != settings:
            compile_(self, optimizer=optimizer)
            optimizer.build(self.trainable_variables)
            compiled[id(self)] = settings, [x.numpy() for x in optimizer.variables]
        for variable, value in zip(self.optimizer.variables, compiled[id(self)][1], strict=True):
            variable.assign(value)

    def encoder_once(network: TwoTowerNetwork, corpus: Corpus) -> Any:
        if id(network) not in encoders:
            # With the network, whose number another one would get once it is gone.
            encoders[id(network)] = network, make_encoder(network, corpus)
        return encoders[id(network)][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TwoTower, "build", build_once)
        patch.setattr(TwoTowerNetwork, "compile", compile_once)
        patch.setattr(two_tower, "query_encoder", encoder_once)
        yield


def content(value: Any) -> Any:
    """Returns a key of a corpus and its parts: equal if the content is."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, Ids):
        return tuple(value.values.tolist())
    if isinstance(value, Feature):
        return repr(value.to_dict())
    if isinstance(value, tuple):
        return tuple(map(content, value))
    if isinstance(value, Mapping):
        return tuple((name, content(part)) for name, part in value.items())
    if isinstance(value, Corpus):
        return tuple(content(getattr(value, field.name)) for field in dataclasses.fields(value))
    return value
