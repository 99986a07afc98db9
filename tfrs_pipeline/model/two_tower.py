"""The two-tower retrieval model, before it is fitted."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import tensorflow as tf
from pydantic import AfterValidator, Field, model_validator

from tfrs_pipeline.batches.batch import Examples
from tfrs_pipeline.batches.examples import SinglePositives, UserSets, WholeSequences
from tfrs_pipeline.batches.hybrid import HybridBatches
from tfrs_pipeline.data.held_out_queries import Holdout, check_holdout
from tfrs_pipeline.data.log import Log, check_log
from tfrs_pipeline.data.schema import Exclude
from tfrs_pipeline.durable import hold_to, refuse_others
from tfrs_pipeline.evaluation.evaluate import Truth, evaluate
from tfrs_pipeline.evaluation.metrics import PLAIN, Metric, metric_of
from tfrs_pipeline.messages import line_writer
from tfrs_pipeline.model import distribution
from tfrs_pipeline.model.corpus import MADE_OF_FILE, Corpus, TrainingSet
from tfrs_pipeline.model.custom_parts import custom_or_setting, is_custom, name_of, own_layer
from tfrs_pipeline.model.false_negatives import FalseNegatives, false_negatives
from tfrs_pipeline.model.fit import OnEpoch, Tell, describe_data, train
from tfrs_pipeline.model.fitted_model import FittedTwoTower, QueryEncoder, query_encoder
from tfrs_pipeline.model.loss import popularity_shift
from tfrs_pipeline.model.network import TwoTowerNetwork
from tfrs_pipeline.model.settings import (
    TrainingSettings,
    TwoTowerSettings,
    check_examples,
    reads_times,
)
from tfrs_pipeline.model.towers import FeatureTable, Tower, candidate_tower, query_tower
from tfrs_pipeline.model.warm_start import WarmStart, add_item_factors
from tfrs_pipeline.negatives.samplers import FunnelLosers, HardKind, SharedKind
from tfrs_pipeline.samples.store import Samples, resampling_rate
from tfrs_pipeline.search.topk import ExactRetriever
from tfrs_pipeline.settings import Listed, refuse

TowerLike: TypeAlias = Callable[..., Any]
"""A Keras layer, or a function that makes one from the corpus, whose sizes it may need."""

if TYPE_CHECKING:
    AnyEasy: TypeAlias = Any
    AnyHard: TypeAlias = Any
else:
    AnyEasy: TypeAlias = Annotated[SharedKind, custom_or_setting("draw", "expected_count")]
    AnyHard: TypeAlias = Annotated[HardKind | None, custom_or_setting("pools", "share", "num")]


# Custom kinds come last: a kind's draws depend on its position, so adding one changes no other.
def _custom_last(kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if not kinds:
        raise ValueError("needs one kind or more, such as uniform:num=256")
    return tuple(sorted(kinds, key=is_custom))


class TwoTower(TwoTowerSettings):
    """A two-tower model before it is fitted: settings, training and your own parts.

    It never changes and can be fitted several times: `fit` returns a new `FittedTwoTower`. It takes
    the settings of `TwoTowerSettings` too, such as `dim=32`, or a table: `**dict(settings)`.

    Raises:
        ConfigError: If a setting is unknown, out of range or conflicts with another.

    Example:
        >>> import pandas as pd
        >>> from tfrs_pipeline.negatives.samplers import InBatch
        >>> clicks = pd.DataFrame({"user_id": [1, 1, 2, 2, 3], "item_id": [7, 8, 7, 8, 7]})
        >>> model = TwoTower(
        ...     dim=4,
        ...     negatives=[InBatch()],
        ...     training=TrainingSettings(batch_size=4, max_epochs=5, learning_rate=0.1),
        ... ).fit(Log.from_table(clicks))
        >>> model.retrieve([{"history": [7]}], k=1, exclude=[[7]])[0]
        array([[8]])
    """

    negatives: Annotated[Listed[AnyEasy], AfterValidator(_custom_last)] = (
        TwoTowerSettings().negatives
    )
    """Easy negatives, as in the settings; also your own kinds (`Negatives`), which come last."""
    hard: AnyHard = None
    """Hard negatives for each row: losers of the funnel, or your own kind (`HardNegatives`)."""
    training: TrainingSettings = TrainingSettings()
    """How it is fitted."""
    query_tower: TowerLike | None = None
    """Your own Keras layer in place of the built-in tower, or a function that makes one from the
    `Corpus`; `TwoTowerNetwork` says what the layer is called with."""
    candidate_tower: TowerLike | None = None
    """The same for the candidates."""
    seed: int = Field(0, ge=0)
    """Seed of everything random."""
    name: str = "two_tower"
    """Name of the Keras model."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_settings_of_training(cls, settings: Any) -> Any:
        refuse(
            (name, f"is a setting of the training: training=tp.TrainingSettings({name}={value!r})")
            for name, value in settings.items()
            if name in TrainingSettings.model_fields
        )
        return settings

    def _problems(self) -> Iterator[tuple[str, str]]:
        yield from super()._problems()
        yield from check_examples(self, self.training)

    def __repr__(self) -> str:
        kinds = ", ".join(type(kind).__name__ for kind in self.negatives)
        hard = "" if self.hard is None else f", {self.hard}"
        return f"TwoTower(dim {self.dim}, negatives {kinds}{hard})"

    __str__ = __repr__

    @property
    def settings(self) -> TwoTowerSettings:
        """The settings without custom parts, which can be written into a file."""
        values = {name: getattr(self, name) for name in TwoTowerSettings.model_fields}
        values["negatives"] = [kind for kind in self.negatives if not is_custom(kind)]
        values["hard"] = None if is_custom(self.hard) else self.hard
        return TwoTowerSettings(**values)

    @property
    def losers(self) -> FunnelLosers | None:
        """The losers that samples must hold for the hard negatives; None if they need none."""
        return self.hard if isinstance(self.hard, FunnelLosers) else None

    def fit(
        self,
        train: Log,
        validation: Holdout | None = None,
        *,
        warm_start: FittedTwoTower | None = None,
        folder: Path | str | None = None,
        exclude: Exclude = "clicked",
        on_epoch: OnEpoch | None = None,
        verbose: bool | None = None,
    ) -> FittedTwoTower:
        """Fits the model to the events of a log; returns the fitted model.

        Args:
            train: The training part. The model has rows for all its items and users.
            validation: Chooses the epoch to keep and stops training early; None trains all epochs.
            warm_start: The fitted model to start from (see `WarmStart`), such as from `trained_in`.
                It has the same shape, and was not trained on events that validate or test here.
            folder: Keeps samples and checkpoints, so that a stopped training can resume, with the
                same log, settings and custom parts. It then ends like an uninterrupted one, bit for
                bit, unless a custom tower has a random state, as `tf.keras.layers.Dropout` does.
                Custom parts are compared by name alone, and the model to start from is not compared
                at all, so do not change these in between. None is temporary. Several workers need a
                shared folder (`docs/guides/size.md`).
            exclude: What validation excludes from a user's ranking; it also chooses the model's
                `bonus`.
            on_epoch: Called after each epoch with the result so far.
            verbose: Whether to write a line for each epoch: in a notebook to its cell, elsewhere to
                standard error. None writes in a notebook or a terminal.

        Raises:
            TypeError: If an argument or a custom tower has the wrong type.
            DataError: If there is no positive, no negative for anyone, or no loser for `hard`.
            ConfigError: If `warm_start` has another shape.
            ValueError: If there is only one positive, training diverges, several workers
                have no folder, the folder belongs to another or no training, a custom layer was
                trained before, or validation has nothing to find.
            WorkerLost: If another worker fails or does not answer.
        """
        check_log(train)
        if validation is not None:
            check_holdout(validation)
        distribution.training_strategy()  # Joins any other workers, which must come first.
        distribution.check_shared(folder)
        with tempfile.TemporaryDirectory() as temporary:
            # Samples are mapped files, so they need a folder even if nothing is kept.
            path = Path(temporary if folder is None else folder)
            is_warm = warm_start is not None
            made_of = self.made_of(train, validation, exclude, is_warm=is_warm)

            def build() -> TrainingSet:
                # Checkpoints without a record of what made them could be those of any training.
                refuse_others((path / "checkpoints").glob("[!.]*"), path / MADE_OF_FILE)
                data = TrainingSet.build(train, path / "samples", seed=self.seed, hard=self.losers)
                hold_to(path / MADE_OF_FILE, made_of)
                return data

            data = distribution.chief_first(build)
            write = line_writer(verbose) or (lambda line: None)
            last = self.training.max_epochs
            model = self.fit_samples(
                data,
                validation,
                warm_start=warm_start,
                folder=None if folder is None else path / "checkpoints",
                exclude=exclude,
                on_epoch=on_epoch,
                tell=lambda done, line: write(f"epoch {done}/{last}: {line}"),
            )
        if validation is None:
            return model
        return model.with_bonus(validation, exclude, self.seed)

    def fit_samples(
        self,
        data: TrainingSet,
        validation: Holdout | None = None,
        *,
        max_epochs: int | None = None,
        warm_start: FittedTwoTower | None = None,
        folder: Path | None = None,
        exclude: Exclude = "clicked",
        cutoffs: Sequence[int] = (20, 100),
        on_epoch: OnEpoch | None = None,
        tell: Tell | None = None,
    ) -> FittedTwoTower:
        """Fits the model to samples that are built already; see also `fit`.

        `max_epochs` replaces the settings' number. `folder` keeps checkpoints.
        """
        distribution.training_strategy()  # Workers join before TensorFlow does anything else.
        distribution.check_shared(folder)
        data.check_negatives_left(self.hard)
        if not isinstance(warm_start, FittedTwoTower | None):
            raise TypeError(
                "warm_start must be a fitted TwoTower, which fit returns and tp.trained_in reads "
                f"from the folder of a run. Received: {warm_start!r}"
            )
        corpus = data.corpus
        if warm_start:  # The source may have been trained on items that come later in this log.
            corpus = dataclasses.replace(corpus, is_later=None)
        with distribution.naming_lost_workers():
            # Initial weights come from Keras's global generators.
            tf.keras.utils.set_random_seed(self.seed)
            network = self.build(corpus)
            encoder, batches = query_encoder(network, corpus), self.batches(data.samples)
            warm = WarmStart(warm_start, self, self.training, corpus) if warm_start else None
            validate = None
            if validation is not None:
                ranked = validation.sample(self.training.validation_users, self.seed)
                Truth.of(ranked, exclude)  # Refuses one in which nothing is left to find.
                # The monitored metric is measured even if nobody asked for its cutoff.
                monitor = metric_of(self.training.monitor)
                cutoffs = sorted({*cutoffs, monitor.k})
                metrics = [*(metric(k) for k in cutoffs for metric in PLAIN), monitor]
                measured = network, corpus, encoder, ranked, exclude, metrics
                validate = functools.partial(validation_metrics, *measured)

            def start(untrained: TwoTowerNetwork) -> None:
                if warm is not None:
                    warm.apply(untrained)
                elif self.item_init == "svd":
                    add_item_factors(untrained, data.samples.known_positives, folder)
                # The shift towards what is popular now is known before training and is not a
                # weight: it is added to the biases only when items are retrieved.
                tower = untrained.candidate_tower
                if isinstance(tower, Tower) and tower.shift is not None:
                    tower.shift.assign(self.temperature * popularity_shift(data.samples))

            # Marked even if no step is left to train: a checkpoint is read into the towers.
            for tower in (network.query_tower, network.candidate_tower):
                tower.was_in_training = True
            result = train(
                network,
                batches,
                self.training,
                max_epochs=max_epochs,
                validate=validate,
                start=start,
                first_step=warm.first_step if warm else 0,
                folder=folder,
                on_epoch=on_epoch,
                tell=tell,
            )
            notes = [
                *(warm.describe() if warm else ()),
                *describe_data(data, batches, self, self.training),
            ]
        return FittedTwoTower(
            self.settings, self.training, corpus, network, encoder, result, data.log, notes
        )

    def batches(self, samples: Samples) -> HybridBatches:
        """Makes the training batches of samples; their `dataset()` is a plain `tf.data.Dataset`.

        Raises a `DataError` if no positive has a hard negative of the kind `hard`.
        """
        if not reads_times(self, self.training):
            samples = dataclasses.replace(samples, sequence_times=None)
        # The rate draws single positives more or less often. Whole users come whole, so it weights
        # their positives instead.
        rate = resampling_rate(samples.counts, self.resampling_exponent)
        common: dict[str, Any] = {
            "batch_size": self.training.fitting(len(samples)).batch_size,
            "history_length": self.history_length,
            "seed": self.seed,
        }
        examples: Examples
        if self.training.examples == "single":
            examples, rate = SinglePositives(samples, rate=rate, **common), None
        else:
            kind = WholeSequences if self.training.examples == "sequences" else UserSets
            examples = kind(samples, **common)
        return HybridBatches(
            samples, examples, self.negatives, hard=self.hard, seed=self.seed, positive_weight=rate
        )

    def false_negatives(self, train: Log, later: Holdout) -> dict[str, FalseNegatives]:
        """Counts how many of the hard negatives their users click later, by pool; trains nothing.

        Args:
            train: The training part.
            later: What comes after it, such as validation.

        Raises a `ValueError` if `hard` is None, and a `DataError` as `fit`.

        Example:
            >>> import pandas as pd
            >>> pairs = {"user_id": [1, 1, 1, 2, 2, 2], "item_id": [7, 8, 9, 8, 9, 6]}
            >>> log = Log.from_table(pd.DataFrame(pairs))
            >>> split = log.split("last_n", validation=1, test=0, min_positives=2)
            >>> class Nine:
            ...     share, num = 0.01, 1
            ...
            ...     def pools(self, samples):
            ...         rows = samples.candidate_ids.rows([9])
            ...         return {"nine": ([rows], 0 * samples.query_rows)}
            >>> counts = TwoTower(hard=Nine()).false_negatives(split.train, split.validation)
            >>> counts["nine"].num_pairs, counts["nine"].num_clicked  # Only user 1's is one.
            (1, 1)
        """
        check_log(train)
        check_holdout(later)
        with tempfile.TemporaryDirectory() as folder:
            data = TrainingSet.build(train, Path(folder), seed=self.seed, hard=self.losers)
            return false_negatives(self.batches(data.samples), later)

    def build(self, corpus: Corpus) -> TwoTowerNetwork:
        """Builds the Keras model, untrained, with the features of a corpus in it.

        Raises a `ValueError` if the towers' widths differ, or a custom tower does not read what
        `training.examples` gives it or was trained before.
        """
        if not reads_times(self, self.training):
            corpus = dataclasses.replace(corpus, has_times=False)
        with distribution.training_strategy().scope():  # Each replica gets the variables.
            query, candidate = (
                None if tower is None else own_layer(name, tower, corpus)
                for name, tower in self._custom_towers.items()
            )
            # The candidate tower comes first, because it may embed the history's items.
            candidate = candidate or candidate_tower(self, corpus)
            table = FeatureTable(corpus, "candidate")
            query = query or query_tower(self, corpus, candidate, table)
            network = TwoTowerNetwork(query, candidate, self, corpus, table, self.name)
        if self.training.examples == "sequences":
            network.check_sequences()
        return network

    @property
    def _custom_towers(self) -> dict[str, TowerLike | None]:
        return {"query_tower": self.query_tower, "candidate_tower": self.candidate_tower}

    def made_of(
        self, log: Log, validation: Holdout | None, exclude: Exclude, *, is_warm: bool = False
    ) -> dict[str, Any]:
        """Says for JSON what a training is made of, besides the samples of its log."""
        return {
            **self.settings.model_dump(mode="json"),
            **self.training.model_dump(mode="json"),
            "seed": self.seed,
            "item_features": dict(log.item_features),
            "user_features": dict(log.user_features),
            "own_negatives": [name_of(kind) for kind in self.negatives if is_custom(kind)],
            "own_hard": name_of(self.hard) if is_custom(self.hard) else None,
            **{name: name_of(tower) for name, tower in self._custom_towers.items()},
            "validation": validation and validation.fingerprint(),
            "exclude": exclude,
            "warm_start": is_warm,
        }


def validation_metrics(
    network: TwoTowerNetwork,
    corpus: Corpus,
    encoder: QueryEncoder,
    holdout: Holdout,
    exclude: Exclude,
    metrics: Sequence[Metric],
) -> dict[str, float]:
    """Measures a network's current weights: means by name, and the recall of the tail."""
    retriever = ExactRetriever(corpus.candidate_ids.values, network.embed_corpus(), encoder)
    result = evaluate(retriever, holdout, metrics=metrics, exclude=exclude, num_bootstrap=0).first
    tail = result.slices["tail"].intervals
    return {
        **{name: interval.mean for name, interval in result.overall.intervals.items()},
        **{f"tail/{metric}": tail[str(metric)].mean for metric in metrics if metric.is_by_slice},
    }
