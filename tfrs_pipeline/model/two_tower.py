"""The two-tower retrieval model: fitted to a log, it retrieves, and can be exported."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import tensorflow as tf

from tfrs_pipeline.batches.hybrid import HybridBatches
from tfrs_pipeline.data.holdout import Holdout, check_holdout
from tfrs_pipeline.data.log import Log, check_log
from tfrs_pipeline.data.schema import Exclude
from tfrs_pipeline.durable import hold_to, refuse_others
from tfrs_pipeline.evaluation.evaluate import check_measurable, evaluate
from tfrs_pipeline.evaluation.topk import ExactRetriever
from tfrs_pipeline.messages import check_integer
from tfrs_pipeline.model.batching import make_batches
from tfrs_pipeline.model.corpus import MADE_OF_FILE, Corpus, TrainingSet
from tfrs_pipeline.model.distribution import (
    check_shared,
    chief_first,
    naming_lost_workers,
    training_strategy,
)
from tfrs_pipeline.model.exportable import Exportable
from tfrs_pipeline.model.fit import OnEpoch, Start, TrainingResult, train
from tfrs_pipeline.model.item_init import SvdStart
from tfrs_pipeline.model.mining import MinedPools
from tfrs_pipeline.model.network import TwoTowerNetwork, feature_table
from tfrs_pipeline.model.notes import (
    EpochProgress,
    OnProgress,
    OnSteps,
    describe_batches,
    describe_features,
    describe_order,
    describe_sample,
    writers,
)
from tfrs_pipeline.model.own import describe_own, is_own, mark_trained, tables_in, trained_part
from tfrs_pipeline.model.queries import QueryEncoder
from tfrs_pipeline.model.settings import (
    TrainingSettings,
    TwoTowerSettings,
    check_examples,
    reads_times,
)
from tfrs_pipeline.model.towers import candidate_tower, query_tower
from tfrs_pipeline.model.warm_start import Trained, WarmStart
from tfrs_pipeline.negatives.funnel import FunnelLosers
from tfrs_pipeline.negatives.mined import Mined
from tfrs_pipeline.negatives.protocol import Negatives, SamplingFrame
from tfrs_pipeline.retrieval import Excluded, Query, Retrieved
from tfrs_pipeline.samples.histories import latest_histories
from tfrs_pipeline.samples.store import Samples
from tfrs_pipeline.settings import refuse

_NOT_FITTED = "The model is not fitted: call fit first."

TowerLike: TypeAlias = tf.keras.layers.Layer | Callable[[Corpus], tf.keras.layers.Layer]


class TwoTower:
    """A two-tower model over the negatives that it is given: `fit`, then `retrieve` or `export`.

    Args:
        settings: Of the model; None is the defaults.
        training: How it is fitted.
        query_tower: Own Keras layer instead of the built-in tower, or a function that makes one of
            the corpus, whose sizes it may need (see `TwoTowerNetwork` for what it is called with).
        candidate_tower: Likewise.
        negatives: Instead of the settings': `InBatch`, `Uniform`, `Popularity`, short forms of
            these, or own kinds (`Negatives`), which come last.
        seed: Of everything random.
        name: Of the Keras model.
        **changes: Settings by name that differ from `settings`, such as `dim=32` (see
            `TwoTowerSettings`).

    Attributes:
        network: The Keras model, once fitted.
        corpus: Ids and features behind its rows.
        result: How training went.
        notes: Lines for a person: what was masked and mined, and what is never drawn.

    Raises:
        ConfigError: If a setting is unknown, out of range or does not go with another.

    Example:
        >>> import pandas as pd
        >>> from tfrs_pipeline.negatives.in_batch import InBatch
        >>> clicks = pd.DataFrame({"user_id": [1, 1, 2, 2, 3], "item_id": [7, 8, 7, 8, 7]})
        >>> model = TwoTower(
        ...     dim=4,
        ...     negatives=[InBatch()],
        ...     training=TrainingSettings(batch_size=4, max_epochs=5, learning_rate=0.1),
        ... ).fit(Log.from_table(clicks))
        >>> model.retrieve([{"history": [7]}], k=1, exclude=[[7]])[0]
        array([[8]])
    """

    def __init__(
        self,
        settings: TwoTowerSettings | None = None,
        *,
        training: TrainingSettings | None = None,
        query_tower: TowerLike | None = None,
        candidate_tower: TowerLike | None = None,
        negatives: Sequence[Negatives | str] | None = None,
        seed: int = 0,
        name: str = "two_tower",
        **changes: Any,
    ) -> None:
        for argument, value, kind in (
            ("settings", settings, TwoTowerSettings),
            ("training", training, TrainingSettings),
        ):
            if not isinstance(value, kind | None):
                raise TypeError(f"{argument} must be a tp.{kind.__name__}. Received: {value!r}.")
        given = settings.model_dump() if settings else {}
        if negatives is not None and not isinstance(negatives, list | tuple):
            raise TypeError(f"negatives must be a list of kinds. Received: {negatives!r}.")
        own: list[Any] = []
        if negatives is not None:
            # Own kinds are no settings: they cannot be written into a file.
            own = [kind for kind in negatives if is_own(kind)]
            changes["negatives"] = tuple(kind for kind in negatives if not is_own(kind))
        refuse(
            (name, f"is a setting of the training: training=tp.TrainingSettings({name}={value!r})")
            for name, value in changes.items()
            if name in TrainingSettings.model_fields
        )
        self.settings = TwoTowerSettings(**{**given, **changes})
        self.training = training or TrainingSettings()
        refuse(check_examples(self.settings, self.training))
        self.negatives: tuple[Negatives, ...] = (*self.settings.negatives, *own)
        if not self.negatives:
            refuse([("model.negatives", "needs one kind or more, such as uniform:num=256")])
        check_integer(0, seed=seed)
        self.seed = seed
        self.name = name
        self._towers = {"query_tower": query_tower, "candidate_tower": candidate_tower}
        self._log: Log | None = None
        self._network: TwoTowerNetwork | None = None
        training_strategy()  # Joins the other workers, if there are any: nothing may come before.
        self.notes: list[str] = []

    def __repr__(self) -> str:
        kinds = ", ".join(type(kind).__name__ for kind in self.negatives)
        fitted = "not fitted"
        if self._network is not None:
            fitted = (
                f"fitted to {len(self.candidate_ids):,} items and {len(self.query_ids):,} users"
            )
        return f"TwoTower(dim {self.settings.dim}, negatives {kinds}; {fitted})"

    def fit(
        self,
        train: Log,
        validation: Holdout | None = None,
        *,
        warm_start: TwoTower | Trained | None = None,
        folder: Path | str | None = None,
        exclude: Exclude = "clicked",
        on_epoch: OnEpoch | None = None,
        verbose: bool | None = None,
    ) -> Self:
        """Fits the model to the events of a log.

        Args:
            train: The training part. Rows are those of all its items and users.
            validation: Chooses the epoch to keep and stops training early; None trains all of
                `training.max_epochs`.
            warm_start: Another model, fitted, or what `trained_in` reads of a run, that this one
                starts from (`WarmStart` says how): of the same shape, trained on nothing that
                validates or tests here.
            folder: Where samples and checkpoints lie, so that a stopped training goes on: one a
                training, of the same log, settings and own code, as far as its lines tell. It ends
                as an unbroken one, bit for bit, unless an own tower draws from a state of its own,
                as `tf.keras.layers.Dropout` does. None is a temporary folder. Several workers need
                one that all see (`docs/guides/scale.md`).
            exclude: What validation excludes from a user's ranking.
            on_epoch: Called after each epoch with what was done so far.
            verbose: Whether standard error shows each epoch, and the steps of a long one; None
                shows them on a terminal alone.

        Returns:
            The model itself.

        Raises:
            TypeError: If `train` is no log, such as a DataFrame, `validation` no holdout, an own
                tower no layer, or `warm_start` neither of the two.
            DataError: If there is no positive to train on, no item is left as anyone's negative, or
                `hard` asks for losers and there is none.
            ConfigError: If the model to start from is of another shape.
            ValueError: If there are too few positives for a batch, training diverges, several
                workers have no folder, the folder is that of another log or other settings, or its
                `samples` or `checkpoints` hold what no training wrote, an own layer, or one within
                it, has been trained before, or validation has nothing to find.
            WorkerLost: If another worker fails or does not answer.
        """
        check_log(train)
        if validation is not None:
            check_holdout(validation)
        hard = self.settings.hard
        funnel = hard if isinstance(hard, FunnelLosers) else None
        with tempfile.TemporaryDirectory() as temporary:
            place = Path(temporary if folder is None else folder)
            check_shared(folder)
            source = None if folder is None else _trained(warm_start)

            def build() -> TrainingSet:
                refuse_others((place / "checkpoints").glob("[!.]*"), place / MADE_OF_FILE)
                data = TrainingSet.build(
                    train,
                    place / "samples",
                    seed=self.seed,
                    hard=funnel,
                    min_positives=self.training.min_positives,
                )
                chosen_by = {
                    "validation": None if validation is None else validation.fingerprint(),
                    "exclude": exclude,
                    "warm_start": None if source is None else source.fingerprint(),
                }
                hold_to(place / MADE_OF_FILE, self._made_of(train, data.samples) | chosen_by)
                return data

            data = chief_first(build)
            write_epoch, write_steps = writers(self.training, verbose)
            return self.fit_samples(
                data,
                validation,
                warm_start=warm_start,
                folder=None if folder is None else place / "checkpoints",
                exclude=exclude,
                on_epoch=on_epoch or write_epoch,
                on_steps=write_steps,
                log=train,
            )

    def fit_samples(
        self,
        data: TrainingSet,
        validation: Holdout | None = None,
        *,
        max_epochs: int | None = None,
        max_seconds: float | None = None,
        warm_start: TwoTower | Trained | None = None,
        folder: Path | None = None,
        exclude: Exclude = "clicked",
        cutoffs: Sequence[int] = (20, 100),
        on_epoch: OnEpoch | None = None,
        on_steps: OnSteps | None = None,
        on_progress: OnProgress = lambda *task: None,
        log: Log | None = None,
    ) -> Self:
        """Fits the model to samples that are built already; `fit` says what is not said here.

        `max_epochs` stands for the settings' number (see `fit.train`), and no epoch is begun after
        `max_seconds`. Checkpoints lie in `folder`. `cutoffs` are those of validation's metrics,
        besides that of the monitored one. `on_steps` is called now and then in a long epoch,
        `on_progress` while mining with a task's name, steps done and in all. An export needs the
        `log` that the samples are of.
        """
        check_shared(folder)
        data.check_negatives_left(self.settings.hard)
        # Before anything is replaced: it may be this model.
        warm_start = _trained(warm_start)
        with self._unchanged_on_failure(), naming_lost_workers():
            self._log, self.corpus = log, data.corpus
            # What is later in this log may be known from an earlier one.
            if warm_start is not None:
                self.corpus = dataclasses.replace(data.corpus, is_later=None)
            tf.keras.utils.set_random_seed(self.seed)
            with training_strategy().scope():
                self._network = self.build(self.corpus)
            ids = self.corpus.query_ids, self.corpus.candidate_ids
            features = self.corpus.request_features
            self._query_encoder = QueryEncoder(self._network, *ids, features)
            start: Start | None = None
            if warm_start is not None:
                start = WarmStart(warm_start, self.settings, self.training, self.corpus)
            elif self.settings.item_init == "svd":
                start = SvdStart(data.samples.known_positives, folder)
            batches = self.batches(data.samples)
            mining = self._mining(batches, folder, on_progress)
            validate = None
            if validation is not None:
                validation = validation.sample(self.training.validation_users, self.seed)
                check_measurable(validation, exclude)
                cutoffs = sorted({*cutoffs, int(self.training.monitor.partition("@")[2])})
                validate = functools.partial(self._validate, validation, exclude, cutoffs)
            # Also where no step is left to train: a checkpoint is read.
            mark_trained(self._network.query_tower, self._network.candidate_tower)
            self.result = train(
                self._network,
                batches,
                self.training,
                max_epochs=max_epochs,
                validate=validate,
                max_seconds=max_seconds,
                mining=mining,
                start=start,
                folder=folder,
                callbacks=[] if on_steps is None else [EpochProgress(on_steps)],
                on_epoch=on_epoch,
            )
            self._retriever = self._exact_retriever()
            self.notes = [
                *(start.describe() if start else []),
                *describe_sample(validation),
                *(mining.describe() if mining else []),
                *describe_features(data.corpus),
                *describe_order(data.samples, self.settings),
                *describe_batches(batches, self.settings),
            ]
        return self

    @contextlib.contextmanager
    def _unchanged_on_failure(self) -> Iterator[None]:
        """Leaves the model as it was if training fails: never half fitted, nor exportable so."""
        before = dict(vars(self))
        try:
            yield
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise

    def batches(self, samples: Samples) -> HybridBatches:
        """Makes the training batches of samples: a plain `tf.data.Dataset` by their `dataset()`.

        Raises:
            DataError: If `hard` asks for losers of the funnel and no positive has any.
        """
        return make_batches(samples, self.settings, self.training, self.negatives, self.seed)

    def build(self, corpus: Corpus) -> TwoTowerNetwork:
        """Builds the Keras model, untrained, with the features of a corpus in it.

        Raises:
            ValueError: If the towers do not go together, an own one does not read what
                `training.examples` gives it, or holds a layer that a training has had.
        """
        if not reads_times(self.settings, self.training):
            corpus = dataclasses.replace(corpus, has_times=False)
        query, candidate = (
            None if own is None else _layer(name, own, corpus) for name, own in self._towers.items()
        )
        candidate = candidate or candidate_tower(self.settings, corpus)
        table = feature_table(corpus, "candidate")
        query = query or query_tower(self.settings, corpus, candidate, table)
        network = TwoTowerNetwork(query, candidate, self.settings, corpus, table, self.name)
        if self.training.examples == "sequences":
            network.check_sequences()
        return network

    @property
    def network(self) -> TwoTowerNetwork:
        """The Keras model.

        Raises:
            ValueError: If the model is not fitted.
        """
        if self._network is None:
            raise ValueError(_NOT_FITTED)
        return self._network

    # Training assigns these two: a value that is assigned hides a cached property.

    @functools.cached_property
    def corpus(self) -> Corpus:
        """Ids and features behind the rows; errors as `network`."""
        raise ValueError(_NOT_FITTED)

    @functools.cached_property
    def result(self) -> TrainingResult:
        """How training went; errors as `network`."""
        raise ValueError(_NOT_FITTED)

    @property
    def trained(self) -> Trained:
        """What another training may start from."""
        return Trained(self.settings, self.training, network=self.network, corpus=self.corpus)

    def retrieve(self, queries: Sequence[Query], k: int, exclude: Excluded = None) -> Retrieved:
        """Retrieves the k best candidates of each query, exactly; see `Retriever.retrieve`.

        Queries are read and refused as by `query_embeddings`; `exclude` holds ids of the items'
        type.
        """
        _ = self.network
        return self._retriever.retrieve(queries, k, exclude)

    def query_embeddings(self, queries: Sequence[Query]) -> np.ndarray:
        """Embeds queries by `user_id`, `history` and `request`: [num_queries, D] float32.

        User features are those of the log; an exported model reads a query's `features` too.

        Raises:
            ValueError: If a query has an unknown key, an id of another type than the log's or a
                misspelt request feature; others that the model does not read are ignored.
        """
        _ = self.network
        return self._query_encoder(queries)

    def _exact_retriever(self) -> ExactRetriever:
        """Makes a retriever of the network as it is now."""
        embeddings = self.network.embed_corpus()
        return ExactRetriever(self.candidate_ids, embeddings, self._query_encoder)

    def _made_of(self, log: Log, samples: Samples) -> dict[str, Any]:
        frame = SamplingFrame.of_counts(samples.counts, self.training.batch_size)
        later = samples.is_later  # By the whole log, which may have grown since.
        return {
            **self.settings.model_dump(mode="json"),
            **self.training.model_dump(mode="json"),
            "seed": self.seed,
            "later_items": None
            if later is None
            else hashlib.sha256(later.tobytes()).hexdigest()[:12],
            "item_features": dict(log.item_features),
            "user_features": dict(log.user_features),
            **describe_own(self.negatives, self._towers, frame),
        }

    def _validate(
        self, holdout: Holdout, exclude: Exclude, cutoffs: Sequence[int]
    ) -> dict[str, float]:
        result = evaluate(
            self._exact_retriever(), holdout, exclude=exclude, cutoffs=cutoffs, num_bootstrap=0
        )
        measured = result.first
        tail = measured.slices["tail"].intervals
        return {
            **{name: interval.mean for name, interval in measured.overall.intervals.items()},
            **{f"tail/{name}": x.mean for name, x in tail.items() if name.startswith("recall")},
        }

    def _mining(
        self, batches: HybridBatches, folder: Path | None, on_progress: OnProgress
    ) -> MinedPools | None:
        mined = self.settings.hard
        if not isinstance(mined, Mined):
            return None
        return MinedPools(
            batches,
            mined,
            make_retrieval=self._query_encoder.row_retrieval,
            history_length=self.settings.history_length,
            seed=self.seed,
            folder=folder,
            on_progress=lambda done, total: on_progress(f"{self.name}, mining", done, total),
        )

    @property
    def query_ids(self) -> np.ndarray:
        """[num_queries] user ids, in the order of the rows from 1."""
        return self.corpus.query_ids.values

    @property
    def candidate_ids(self) -> np.ndarray:
        """[num_candidates] item ids, in the order of the rows from 1."""
        return self.corpus.candidate_ids.values

    def exportable(self) -> Exportable:
        """Gathers what an export holds: the towers, and all that has happened, test part included.

        A `ValueError` if the model is not fitted, or to samples without their log.
        """
        network, corpus = self.network, self.corpus
        if self._log is None:
            raise ValueError("The model was fitted to samples alone: give fit_samples their log.")
        log = self._log.whole
        histories, known, times = latest_histories(log, corpus.query_ids, corpus.candidate_ids)
        towers = network.query_tower, network.candidate_tower
        return Exportable(
            embed_queries=network.embed_queries,
            embed_candidates=network.embed_candidates,
            variables=[
                *network.query_table.variables,
                *(variable for tower in towers for variable in tower.variables),
                *tables_in(*towers),
            ],
            items=log.items.order_by("item_id").to_pyarrow(),
            query_ids=self.query_ids,
            history_length=self.settings.history_length,
            histories=histories,
            known_positives=known,
            history_times=times if network.reads_times else None,
            query_features=corpus.query_features,
            request_features=corpus.request_features,
            candidate_features=corpus.candidate_features,
            reading=log.reading,
        )


def _trained(source: TwoTower | Trained | None) -> Trained | None:
    if source is None or isinstance(source, Trained):
        return source
    if not isinstance(source, TwoTower):
        raise TypeError(
            "warm_start must be a fitted TwoTower, or what tp.trained_in reads of a run's folder. "
            f"Received: {source!r}"
        )
    return source.trained


def _layer(name: str, own: Any, corpus: Corpus) -> tf.keras.layers.Layer:
    """Returns an own tower, or what a function makes of the corpus; a `TypeError` if no layer."""
    # A layer of another Keras is callable, but no function of the corpus: it has a `call`.
    is_made = not isinstance(own, type) and hasattr(own, "call")
    layer = own if is_made else own(corpus)
    if not isinstance(layer, tf.keras.layers.Layer):
        raise TypeError(
            f"{name} must be a layer of tf.keras, which is Keras 2 here, or a function of the "
            f"corpus that returns one. Received: {layer!r}{'' if is_made else f', from {own!r}'}."
        )
    part = trained_part(layer)
    if part is not None:
        inner = "" if part is layer else f", or rather its {part!r},"
        raise ValueError(
            f"{name} {layer!r}{inner} was given to a training before, which would go on here "
            "instead of beginning, and change that model. Give new layers to a new model, or a "
            "function of the corpus that makes them; a frozen layer (trainable=False) may be "
            "shared."
        )
    return layer
