"""Training that starts from a fitted model: what was learned is carried over by id."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.messages import kept_new_gone
from tfrs_pipeline.model.corpus import Corpus
from tfrs_pipeline.model.fitted import FittedTwoTower
from tfrs_pipeline.model.network import TwoTowerNetwork
from tfrs_pipeline.model.optimizer import slots_of
from tfrs_pipeline.model.settings import (
    TrainingSettings,
    TwoTowerSettings,
    reads_times,
    shape_problems,
)
from tfrs_pipeline.model.towers import Tower
from tfrs_pipeline.settings import refuse


class WarmStart:
    """Gives a new network what a fitted model has learned.

    Items, users and feature values that are still there keep their embeddings and optimizer state.
    New ones start from the embedding of row 0, which stands for unknown ids, if it was trained,
    else at random. Their optimizer state is that of a row without a gradient. Other weights, their
    state and the count of steps (`first_step`) are carried over; a learning rate's warm-up and
    decay start again. If the optimizer has changed, its state and step count start again too.

    Raises a `ConfigError` if weights of the two models mean different things, or no item is known.
    """

    def __init__(
        self,
        source: FittedTwoTower,
        settings: TwoTowerSettings,
        training: TrainingSettings,
        corpus: Corpus,
    ) -> None:
        refuse(_problems(source, settings, training, corpus))
        self._source = source.network
        self._corpora = source.corpus, corpus
        self._optimizers = source.training.optimizer, training.optimizer
        # The source's row for each row here; 0 is new.
        self._candidate_rows, self._query_rows = (
            np.concatenate([[0], there.rows(here.values)])
            for there, here in (
                (source.corpus.candidate_ids, corpus.candidate_ids),
                (source.corpus.query_ids, corpus.query_ids),
            )
        )
        self._num_trained = len(source.corpus.candidate_ids)
        if (is_later := source.corpus.is_later) is not None:  # They were new to it, too.
            self._num_trained -= int(is_later.sum())
            self._candidate_rows[is_later[self._candidate_rows]] = 0
        if not self._candidate_rows.any():
            here, there = (c.candidate_ids.values[0] for c in (corpus, source.corpus))
            message = f"no item is known there: ids are like {here!r} here and {there!r} there"
            refuse([("warm_start", f"{message}. Start from a model of this log's items")])
        is_same = len(set(self._optimizers)) == 1
        self.first_step = int(self._source.optimizer.iterations) if is_same else 0

    def apply(self, network: TwoTowerNetwork) -> None:
        """Sets the weights and the optimizer state of an untrained network, compiled and built."""
        rows = {table.ref(): own for table, own in self._tables(network)}
        pairs = zip(network.trainable_variables, self._source.trainable_variables, strict=True)
        for variable, source in pairs:
            self._carry(network, variable, source, rows.get(variable.ref()))
        network.optimizer.iterations.assign(self.first_step)

    def describe(self) -> list[str]:
        """Describes what is carried over, what is new and what is gone."""
        there, here = self._corpora
        items, users = (
            kept_new_gone(what, int(np.count_nonzero(rows)), len(rows) - 1, num_there)
            for what, rows, num_there in (
                ("items", self._candidate_rows, self._num_trained),
                ("users", self._query_rows, len(there.query_ids)),
            )
        )
        notes = [f"warm start: {items}; {users}"]
        sides = (_features(there, here, side) for side in ("candidate", "query", "request"))
        for old, new in itertools.chain.from_iterable(zip(*side, strict=True) for side in sides):
            if change := _change(old, new):
                notes.append(f"    {new.name}: {change}")
        if len(set(self._optimizers)) > 1:
            before, now = self._optimizers
            notes.append(f"    the optimizer's state starts again: it was {before}, now {now}")
        return notes

    def _tables(self, network: TwoTowerNetwork) -> Iterator[tuple[tf.Variable, np.ndarray]]:
        """Yields the tables of a network with the source's row for each of their rows."""
        there, here = self._corpora
        for tower, own_rows, sides in (
            (network.candidate_tower, self._candidate_rows, ("candidate",)),
            (network.query_tower, self._query_rows, ("query", "request")),
        ):
            yield from ((table, own_rows) for table in tower.id_tables)
            if tower.history is not None and (table := tower.history.item_table) is not None:
                yield table, self._candidate_rows
            for side in sides:
                for before, now in zip(*_features(there, here, side), strict=True):
                    if (codes := tower.feature_table(now.name)) is not None:
                        yield codes, now.codes_of(before)

    def _carry(
        self,
        network: TwoTowerNetwork,
        variable: tf.Variable,
        source: tf.Variable,
        rows: np.ndarray | None,
    ) -> None:
        """Carries over a weight and its optimizer state; a table row by row."""
        old_slots = slots_of(self._source.optimizer, source)
        new_slots = slots_of(network.optimizer, variable) if self.first_step else []
        slots = list(zip(new_slots, old_slots, strict=bool(new_slots)))
        if rows is None:
            for new, old in [(variable, source), *slots]:
                new.assign(old)
            return
        is_new = (rows == 0) & (np.arange(len(rows)) > 0)
        # The optimizer state of a weight that has had no gradient.
        at_first = getattr(self._source.optimizer, "initial_accumulator_value", 0.0)
        has_stand_in = any((slot[0].numpy() != at_first).any() for slot in old_slots)
        keeps_own = is_new & (not has_stand_in)
        for new, old, is_kept in [(variable, source, keeps_own), *((*x, is_new) for x in slots)]:
            new.assign(tf.where(is_kept[:, np.newaxis], new, tf.gather(old, rows)))


def _problems(
    source: FittedTwoTower, settings: TwoTowerSettings, training: TrainingSettings, corpus: Corpus
) -> Iterator[tuple[str, str]]:
    """Yields (setting, message) for all that makes the weights mean different things."""
    yield from shape_problems(source.settings, settings)
    towers = source.network.query_tower, source.network.candidate_tower
    if not all(isinstance(tower, Tower) for tower in towers):
        message = "own towers cannot be carried over: what their rows stand for is not known"
        yield "warm_start", message
    has_times = corpus.has_times and reads_times(settings, training)
    if has_times != source.network.reads_times:
        one, other = ("this", "that") if has_times else ("that", "this")
        message = f"{one} model reads times and {other} one does not"
        yield "warm_start", f"{message}: give both logs timestamps, or neither"
    for side, name in (("candidate", "item"), ("query", "user"), ("request", "request")):
        old, new = (
            " ".join(map(_specification, of_side)) or "none"
            for of_side in _features(source.corpus, corpus, side)
        )
        if old != new:
            message = f"got {new}, where the model to start from has {old}"
            yield f"data.{name}_features", message
    for name, there, here in (
        ("item", source.corpus.candidate_ids, corpus.candidate_ids),
        ("user", source.corpus.query_ids, corpus.query_ids),
    ):
        if there.values.dtype != here.values.dtype:
            kinds = ["strings" if x.values.dtype == object else "integers" for x in (here, there)]
            yield "warm_start", f"{name} ids are {kinds[0]} here and {kinds[1]} there"


def _specification(feature: Feature) -> str:
    lengths = (f" of {length} numbers" for length in feature.raw_shape if length)
    return f"{feature.name}={feature.kind}{''.join(lengths)}"


def _change(old: Feature, new: Feature) -> str:
    """Describes the values that a feature keeps, or a change of scale; "" if neither applies."""
    if old.vocabulary or new.vocabulary:
        num_kept = int(np.count_nonzero(new.codes_of(old)))
        return kept_new_gone("values", num_kept, len(new.vocabulary), len(old.vocabulary))
    if 0.5 <= new.scale / old.scale <= 2:
        return ""
    return f"on another scale than its weights: {old.scale:.4g} there, {new.scale:.4g} here"


def _features(there: Corpus, here: Corpus, side: str) -> Any:
    return (getattr(corpus, f"{side}_features") for corpus in (there, here))
