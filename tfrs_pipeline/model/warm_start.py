"""What a training starts from: factors of the clicks, or what a fitted model has learned, by id."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy.sparse
import tensorflow as tf
from scipy.sparse.linalg import LinearOperator, eigsh
from threadpoolctl import threadpool_limits

from tfrs_pipeline.cluster import this_worker
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.messages import plain
from tfrs_pipeline.model.corpus import Corpus
from tfrs_pipeline.model.distribution import on_chief
from tfrs_pipeline.model.fitted_model import FittedTwoTower
from tfrs_pipeline.model.network import TwoTowerNetwork
from tfrs_pipeline.model.optimizer import slots_of
from tfrs_pipeline.model.settings import (
    TrainingSettings,
    TwoTowerSettings,
    reads_times,
    shape_problems,
)
from tfrs_pipeline.model.towers import Tower
from tfrs_pipeline.samples.store import RowLists
from tfrs_pipeline.settings import refuse

# Chosen on validation: docs/archive/tried.md.
_EXPONENT = 0.4
# Whose features a corpus holds, and the settings' word for them.
SIDES = {"candidate": "item", "query": "user", "request": "request"}


def item_factors(clicked: RowLists, num_items: int, dim: int) -> np.ndarray:
    """Computes factors of items, which are close for items that the same users clicked.

    Factors are V S^2, scaled to a mean length of 1 over the items with clicks. U S V^T is the
    truncated singular value decomposition of the matrix, users by items, of
    1 / (clicks of the user * clicks of the item)^0.4 where the user clicked the item, else 0.

    `clicked` lists the distinct candidate rows of each user. Returns [num_items + 1, dim] float32;
    0 in row 0 and, to rounding, for items without clicks and in columns beyond the clicks' rank.

    Example:
        >>> clicked = RowLists.from_lists([[], [1, 2], [1, 2], [3]])
        >>> abs(item_factors(clicked, num_items=3, dim=1)).round(3)
        array([[0. ],
               [1.5],
               [1.5],
               [0. ]], dtype=float32)
    """
    factors = np.zeros((num_items + 1, dim), np.float32)
    num_vectors = min(dim, num_items - 1)
    if num_vectors < 1 or not len(clicked.values):
        return factors
    items, per_user = clicked.values - 1, np.diff(clicked.offsets)
    per_item = np.bincount(items, minlength=num_items)
    cells = (np.repeat(per_user, per_user) * per_item[items]) ** -_EXPONENT
    clicks = scipy.sparse.csr_matrix((cells, items, clicked.offsets), (len(clicked), num_items))
    transposed = clicks.T.tocsr()
    # The Gram matrix's eigenvectors are the right singular vectors. It is dense, so it is never
    # made: only its products with vectors are computed.
    gram = LinearOperator(
        (num_items, num_items), matvec=lambda vector: transposed @ (clicks @ vector)
    )
    rng = np.random.default_rng(0)
    # Not `svds`: it has no seed for the restarts that equal items need. One thread adds in order.
    with threadpool_limits(1, "blas"):
        values, vectors = eigsh(gram, num_vectors, v0=rng.random(num_items), rng=rng)
    scaled = vectors * values  # The values of the Gram matrix are S^2.
    factors[1:, :num_vectors] = scaled / np.linalg.norm(scaled[per_item > 0], axis=1).mean()
    return factors


def add_item_factors(network: TwoTowerNetwork, clicked: RowLists, folder: Path | None) -> None:
    """Adds the factors of items (`item_factors`) to their random initial embeddings.

    A separate item table of the history gets them too. With several workers, the chief passes them
    to the others in a file in the folder. Raises a `ConfigError` if there is no such table.
    """
    query, candidate = network.query_tower, network.candidate_tower
    tables: list[tf.Variable | None] = []
    if isinstance(candidate, Tower) and candidate.id_embedding is not None:
        tables.append(candidate.id_embedding.embeddings)
    if isinstance(query, Tower) and query.history is not None:
        tables.append(query.history.item_table)
    item_tables = [table for table in tables if table is not None]
    if not item_tables:
        refuse([("model.item_init", "got 'svd', and no built-in tower embeds item ids")])
    num_items, dim = network.num_candidates, item_tables[0].shape[1]
    if folder is None or this_worker().count == 1:
        factors = item_factors(clicked, num_items, dim)
    else:
        # Other processors may round differently, and replicas must begin with the same bits.
        path = folder / "item_factors.npy"
        folder.mkdir(parents=True, exist_ok=True)
        on_chief(lambda: np.save(path, item_factors(clicked, num_items, dim)))
        factors = np.load(path)
        on_chief(lambda: None)  # Waits until every worker has read it.
        on_chief(lambda: path.unlink(missing_ok=True))
    for table in item_tables:
        table.assign_add(factors)


class WarmStart:
    """Gives a new network what a fitted model has learned.

    Items, users and feature values that are still there keep their embeddings and optimizer state.
    New ones start from the embedding of row 0, which stands for unknown ids, if it was trained,
    else at random. Their optimizer state starts at its initial value. Other weights, their state
    and the count of steps (`first_step`) are carried over; a learning rate's warm-up and decay
    start again. If the optimizer has changed, its state and step count start again too.

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
        self._source, self._corpora = source.network, (source.corpus, corpus)
        self._optimizers = source.training.optimizer, training.optimizer
        # The source's row for each row here; 0 is new.
        self._candidate_rows = _rows_there(source.corpus.candidate_ids, corpus.candidate_ids)
        self._query_rows = _rows_there(source.corpus.query_ids, corpus.query_ids)
        self._num_trained = len(source.corpus.candidate_ids)
        if (is_later := source.corpus.is_later) is not None:  # The source did not train these.
            self._num_trained -= int(is_later.sum())
            self._candidate_rows[is_later[self._candidate_rows]] = 0
        if not self._candidate_rows.any():
            log_id, known_id = (plain(c.candidate_ids.values[0]) for c in (corpus, source.corpus))
            message = (
                f"its model knows no item of this log: ids are like {log_id} in the log, and like "
                f"{known_id} in the model. Start from a model of this log's items"
            )
            refuse([("warm_start", message)])
        source_optimizer, optimizer = self._optimizers
        is_same = source_optimizer == optimizer
        self.first_step = int(self._source.optimizer.iterations) if is_same else 0

    def apply(self, network: TwoTowerNetwork) -> None:
        """Sets the weights and the optimizer state of an untrained network, compiled and built."""
        rows = {table.ref(): rows for table, rows in self._tables(network)}
        # Both networks have the same settings, so their variables come in the same order.
        pairs = zip(network.trainable_variables, self._source.trainable_variables, strict=True)
        # Row 0 was trained if its optimizer state is not what it was at first.
        at_first = getattr(self._source.optimizer, "initial_accumulator_value", 0.0)
        for variable, source in pairs:
            old_slots = slots_of(self._source.optimizer, source)
            # Another optimizer starts with an empty state.
            new_slots = slots_of(network.optimizer, variable) if self.first_step else []
            slots = list(zip(new_slots, old_slots, strict=bool(new_slots)))
            rows_there = rows.get(variable.ref())
            if rows_there is None:  # Not a table.
                for new, old in [(variable, source), *slots]:
                    new.assign(old)
                continue
            is_new = (rows_there == 0) & (np.arange(len(rows_there)) > 0)
            # SGD-like optimizers without a state would count as untrained; the package has none.
            has_stand_in = any((slot[0].numpy() != at_first).any() for slot in old_slots)
            keeps_random = is_new & (not has_stand_in)
            tables = [(variable, source, keeps_random), *((*pair, is_new) for pair in slots)]
            for new, old, is_kept in tables:
                new.assign(tf.where(is_kept[:, np.newaxis], new, tf.gather(old, rows_there)))
        network.optimizer.iterations.assign(self.first_step)

    def describe(self) -> list[str]:
        """Describes what is carried over, what is new and what is gone."""
        parts = []
        for what, rows, num_there in (
            ("items", self._candidate_rows, self._num_trained),
            ("users", self._query_rows, len(self._corpora[0].query_ids)),
        ):
            num, new = np.count_nonzero(rows), np.count_nonzero(rows[1:] == 0)
            parts.append(f"{num:,} {what} kept, {new:,} new, {num_there - num:,} gone")
        notes = [f"warm start: {'; '.join(parts)}"]
        before, now = self._optimizers
        if before != now:
            notes.append(f"    the optimizer's state starts again: it was {before}, now {now}")
        return notes

    def _tables(self, network: TwoTowerNetwork) -> Iterator[tuple[tf.Variable, np.ndarray]]:
        """Yields the tables of a network with the source's row for each of their rows."""
        query, candidate = network.query_tower, network.candidate_tower
        yield from ((table, self._candidate_rows) for table in candidate.id_tables)
        yield from ((table, self._query_rows) for table in query.id_tables)
        if query.history is not None and (table := query.history.item_table) is not None:
            yield table, self._candidate_rows
        for side in SIDES:
            tower = candidate if side == "candidate" else query
            pairs = zip(*(getattr(x, f"{side}_features") for x in self._corpora), strict=True)
            for old, new in pairs:
                if (codes := tower.feature_table(new.name)) is not None:
                    yield codes, new.codes_of(old)


def _rows_there(there: Ids, here: Ids) -> np.ndarray:
    return np.concatenate([[0], there.rows(here.values)])


def _problems(
    source: FittedTwoTower, settings: TwoTowerSettings, training: TrainingSettings, corpus: Corpus
) -> Iterator[tuple[str, str]]:
    """Yields (setting, message) for all that makes the weights mean different things."""
    yield from shape_problems(source.settings, settings)
    towers = source.network.query_tower, source.network.candidate_tower
    if not all(isinstance(tower, Tower) for tower in towers):
        message = "own towers cannot be carried over: what their rows stand for is not known"
        yield "warm_start", message
    # The learned weights of ages and gaps exist only in a model that reads times.
    has_times = corpus.has_times and reads_times(settings, training)
    if has_times != source.network.reads_times:
        one, other = ("this", "that") if has_times else ("that", "this")
        message = f"{one} model reads times and {other} one does not"
        yield "warm_start", f"{message}: give both logs timestamps, or neither"
    for side, name in SIDES.items():
        old, new = (
            " ".join(map(_specification, features)) or "none"
            for features in (getattr(x, f"{side}_features") for x in (source.corpus, corpus))
        )
        if old != new:
            message = f"got {new}, where the model to start from has {old}"
            if sorted(old.split()) == sorted(new.split()):  # Weights follow the order.
                message += ": give them in that order"
            yield f"data.{name}_features", message


def _specification(feature: Feature) -> str:
    lengths = (f" of {length} numbers" for length in feature.raw_shape if length)
    return f"{feature.name}={feature.kind}{''.join(lengths)}"
