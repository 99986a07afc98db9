"""A fitted two-tower model: it retrieves, can be exported, and can start another training."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeAlias

import numpy as np
import pyarrow as pa

from tfrs_pipeline.data.held_out_queries import Holdout
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import Exclude
from tfrs_pipeline.model.bonus_choice import bonus_for
from tfrs_pipeline.model.checkpoints import TrainingResult
from tfrs_pipeline.model.corpus import Corpus
from tfrs_pipeline.model.custom_parts import tables_in
from tfrs_pipeline.model.exportable import Exportable
from tfrs_pipeline.model.network import TwoTowerNetwork
from tfrs_pipeline.model.settings import TrainingSettings, TwoTowerSettings
from tfrs_pipeline.model.tf_tables import embed_corpus, tower_of
from tfrs_pipeline.model.towers import Tower
from tfrs_pipeline.retrieval import Excluded, Query, Retrieved, check_queries, check_requests
from tfrs_pipeline.samples.latest_histories import disliked_rows, latest_histories, seen_rows
from tfrs_pipeline.search.history_bonus import HistoryBonus
from tfrs_pipeline.search.topk import ExactRetriever, ScoreRetriever

QueryEncoder: TypeAlias = Callable[[Sequence[Query]], np.ndarray]
"""Embeds queries that `check_queries` has passed: [n, D] float32."""


def towers_of(network: TwoTowerNetwork, corpus: Corpus) -> Exportable:
    """Describes a network as an export does, but without what users did."""
    towers = network.query_tower, network.candidate_tower
    return Exportable(
        embed_queries=network.embed_queries,
        embed_candidates=network.embed_candidates,
        variables=[
            *network.query_table.variables,
            *(variable for tower in towers for variable in tower.variables),
            *tables_in(*towers),
        ],
        items=pa.table({"item_id": corpus.candidate_ids.values}),
        query_ids=corpus.query_ids.values,
        history_length=network.history_length,
        history_times=np.zeros(0) if network.reads_times else None,
        query_features=corpus.query_features,
        query_columns=corpus.query_columns,
        request_features=corpus.request_features,
        candidate_features=corpus.candidate_features,
        # A user's own candidate tower has no bias, whatever the setting says.
        has_item_bias=isinstance(towers[1], Tower) and towers[1].has_item_bias,
    )


def encoder_of(towers: Exportable) -> QueryEncoder:
    """Makes a function that embeds queries, which bring their history, by an export's towers."""
    inputs = towers.inputs
    known = [feature.name for feature in towers.request_features]
    tower = tower_of(towers.embed_queries, inputs.tower_inputs)

    def embed(queries: Sequence[Query]) -> np.ndarray:
        requests = [query.get("request") for query in queries]
        check_requests(requests, known, may_have_others=True)
        return inputs.embed(tower, queries)

    return embed


def query_encoder(network: TwoTowerNetwork, corpus: Corpus) -> QueryEncoder:
    """Makes a function that embeds with the current network."""
    return encoder_of(towers_of(network, corpus))


class Fitted:
    """A fitted model: a retriever to evaluate, to export, and to sum with others.

    Attributes:
        log: The log that it was fitted to.
        bonus: What is added to the scores of the items in a query's history, and of what people
            took near them; None is nothing.
        notes: Lines for the user.
    """

    log: Log
    bonus: HistoryBonus | None = None
    notes: list[str]

    @property
    def towers(self) -> Exportable:
        """The towers as an export has them, without what users did."""
        raise NotImplementedError

    @property
    def first(self) -> Any:
        """The model itself; of a sum, the first member, in a run the best alone."""
        return self

    @property
    def query_ids(self) -> np.ndarray:
        """[num_queries] user ids, in the order of the rows from 1."""
        return self.towers.query_ids

    @property
    def candidate_ids(self) -> np.ndarray:
        """[num_candidates] item ids, in the order of the rows from 1."""
        return self.towers.candidate_ids

    @functools.cached_property
    def _encoder(self) -> QueryEncoder:
        return encoder_of(self.towers)

    def retrieve(self, queries: Sequence[Query], k: int, exclude: Excluded = None) -> Retrieved:
        """Retrieves the k best candidates, exactly; see `Retriever` and `query_embeddings`."""
        return self._retriever.retrieve(queries, k, exclude)

    def query_embeddings(self, queries: Sequence[Query]) -> np.ndarray:
        """Embeds queries (see `Query`), any key of which may be missing: [num_queries, D] float32.

        Unknown users are embedded as new ones, and unknown items are dropped from the history. User
        features are those of the log; an exported model also reads a query's `features`. Raises a
        `ValueError` if a query has an unknown key, an id whose type is not the log's, or a misspelt
        request feature; others that the model does not read are ignored.
        """
        check_queries(queries, ids_are_text=self.candidate_ids.dtype == object)
        return self._encoder(queries)

    def corpus_embeddings(self) -> np.ndarray:
        """Embeds all candidates: [num_candidates, D] float32."""
        return embed_corpus(self.towers.embed_candidates, len(self.candidate_ids))

    @functools.cached_property
    def _retriever(self) -> ScoreRetriever:
        exact = ExactRetriever(self.candidate_ids, self.corpus_embeddings(), self._encoder)
        return exact if self.bonus is None else self.bonus.added_to(exact)

    def with_bonus(self, validation: Holdout, exclude: Exclude, seed: int) -> Self:
        """Returns the model with the bonus that validation chooses, which may be none.

        None is chosen if `training.history_bonus` is off; in a sum, that of the first member.
        """
        bonus = bonus_for(self, validation, exclude, seed)
        if bonus is None:
            return self
        model: Any = self  # Each subclass is a dataclass.
        return dataclasses.replace(model, bonus=bonus, notes=[*self.notes, *bonus.notes])

    def exportable(self) -> Exportable:
        """Gathers what an export holds: the towers and the whole log, test part included."""
        # The graph of an export is that of the whole log.
        bonus = self.bonus and dataclasses.replace(self.bonus, graph=None)
        return dataclasses.replace(with_log(self.towers, self.log), bonus=bonus)


@dataclass(frozen=True, eq=False, repr=False)
class FittedTwoTower(Fitted):
    """What `TwoTower.fit` returns: a retriever to evaluate, export, or start another training from.

    Attributes:
        settings: Settings of the model, without the user's own negatives and towers.
        training: How it was fitted.
        corpus: Ids and features behind the rows of the network.
        network: The Keras model, with its best weights.
        encoder: Embeds raw queries with the network.
        result: How training went.
        log: The log that it was fitted to.
        notes: Lines for the user: what was masked, and what is never drawn.
        bonus: What is added to the scores of the items in a query's history, and of what people
            took near them; None is nothing.
    """

    settings: TwoTowerSettings
    training: TrainingSettings
    corpus: Corpus
    network: TwoTowerNetwork
    encoder: QueryEncoder
    result: TrainingResult
    log: Log
    notes: list[str] = field(default_factory=list)
    bonus: HistoryBonus | None = None

    def __repr__(self) -> str:
        num_items, num_users = len(self.candidate_ids), len(self.query_ids)
        dim = self.settings.dim
        return f"FittedTwoTower(dim {dim}, {num_items:,} items, {num_users:,} users)"

    @functools.cached_property
    def towers(self) -> Exportable:
        """The towers as an export has them; see `towers_of`."""
        return towers_of(self.network, self.corpus)

    @property
    def _encoder(self) -> QueryEncoder:
        return self.encoder  # It has been traced by validation.

    def corpus_embeddings(self) -> np.ndarray:
        """Embeds all candidates: [num_candidates, D] float32."""
        return self.network.embed_corpus()


def with_log(towers: Exportable, log: Log) -> Exportable:
    """Adds to towers what an export knows of a whole log, the test part included."""
    # Service should know all clicks, even those that tested the model.
    log = log.whole
    users, candidates = Ids(towers.query_ids), Ids(towers.candidate_ids)
    histories, known, times = latest_histories(log, users, candidates)
    last = log.events["timestamp"].max() if "timestamp" in log.events.columns else None
    return dataclasses.replace(
        towers,
        items=log.items.order_by("item_id").to_pyarrow(),
        histories=histories,
        known_positives=known,
        disliked=disliked_rows(log, users, candidates),
        history_times=None if towers.history_times is None else times,
        reading=log.reading,
        items_read=log.items_read,
        histories_until=None if last is None else last.to_pyarrow().as_py(),
    )


def excluding(model: Exportable, log: Log, exclude: Exclude) -> Exportable:
    """Makes answers by user id leave out what the rankings of a test do (`Holdout.excluded`).

    All of `log` counts: give the whole one, with the test part.
    """
    if exclude == "seen":
        users, candidates = Ids(model.query_ids), Ids(model.candidate_ids)
        seen = seen_rows(log, users, candidates)
        model = dataclasses.replace(model, known_positives=seen)
    return dataclasses.replace(model, exclude=exclude)
