"""Settings of the two-tower model and of its training."""

from collections.abc import Iterator
from enum import Enum
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from tfrs_pipeline.evaluation.metrics import metric_of
from tfrs_pipeline.negatives.samplers import HardKind, InBatch, Popularity, SharedKind, Uniform
from tfrs_pipeline.settings import Config, Distinct, Listed

DropoutShare: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
OptimizerName: TypeAlias = Literal["adagrad", "adam", "lazy_adam"]

Pooling: TypeAlias = Literal["mean", "recency", "attention"]

ATTENTION_HEADS = 2  # In each block of the self-attention.


class Meaning(Enum):
    """Marks a setting that decides what weights mean; a warm start must not change it."""

    ALWAYS = "always"
    WITH_ATTENTION = "with attention in history_pooling"


class TwoTowerSettings(Config):
    """The two towers, their score, and their negatives."""

    dim: Annotated[PositiveInt, Meaning.ALWAYS] = 64
    """Length of the query and candidate embeddings."""
    negatives: Listed[SharedKind] = (InBatch(), Uniform(256), Popularity(256, 0.75))
    """Easy negatives, shared by the rows of a batch; all kinds given are used together."""
    hard: HardKind | None = None
    """Hard negatives for each row: losers of the funnel, such as funnel:share=0.01."""
    resampling_exponent: float = Field(0.0, ge=0, le=1)
    """Down-samples positives of popular items and up-samples the others, by counts to the power of
    minus this: 0 changes nothing, 1 makes every clicked item equally likely."""
    correction: Literal["mixture", "recent", "none"] = "mixture"
    """The logQ correction: mixture, by the log of each candidate's expected count in the batch;
    recent, the same, and retrieval also raises items whose share of the latest clicks is above
    their share of all, and lowers the others, in a log with timestamps; or none."""
    temperature: PositiveFloat = 0.15
    """Divisor of the scores in the loss."""
    normalize: Annotated[bool, Meaning.ALWAYS] = True
    """Whether embeddings have length 1, so that scores are cosines, plus an item's bias, if any."""
    hidden_layers: Annotated[Listed[PositiveInt], Meaning.ALWAYS] = ()
    """Sizes of the hidden layers of each tower."""
    use_user_id: Annotated[bool, Meaning.ALWAYS] = False
    """Whether the query tower has an embedding for each user id."""
    use_candidate_id: Annotated[bool, Meaning.ALWAYS] = True
    """Whether the candidate tower has an embedding for each item id."""
    item_init: Literal["random", "svd"] = "random"
    """What the embeddings of item ids begin with: random, or svd, which adds the singular vectors
    of the clicks, so that items with the same users begin near each other. A warm start begins with
    the embeddings of the earlier training instead."""
    id_dropout: DropoutShare = 0.05
    """ID dropout: share of the ids that training replaces by the unknown id, at random. It trains
    the embedding that new users and items get, besides their features."""
    candidate_bias: Annotated[bool, Meaning.ALWAYS] = False
    """Whether each item has a learned bias that is added to its scores."""
    feature_dim: Annotated[PositiveInt, Meaning.ALWAYS] = 16
    """Length of the embedding of each feature."""
    feature_dropout: DropoutShare = 0.0
    """Feature dropout: share of the features that training makes missing, at random."""
    history_length: Annotated[PositiveInt, Meaning.WITH_ATTENTION] = 50
    """Number of the latest positives before the event that the query holds."""
    history_pooling: Annotated[Distinct[Pooling], Meaning.ALWAYS] = ("mean", "recency")
    """How the history becomes a vector: its mean, a mean weighted by recency, causal
    self-attention, or several of them."""
    history_dropout: DropoutShare = 0.5
    """Share of the history's items that training drops, at random."""
    history_shrinkage: NonNegativeFloat | None = None
    """Pulls short histories towards the answer for an empty one, in retrieval: a query with n items
    in its history is n parts itself and this many parts the same query without them. 0 is off. If
    None, a race chooses it for each recipe on validation, and elsewhere it is off."""
    share_item_embedding: Annotated[bool, Meaning.ALWAYS] = True
    """Whether the history's items use the candidates' vectors, features included, where the
    candidate tower is the built-in one and knows ids; else their ids have a separate embedding."""
    recency_decay: float = Field(0.85, gt=0, le=1)
    """With history_pooling recency: weight of an item relative to the item after it. In a log with
    timestamps, a learned weight of the item's age multiplies it."""
    attention_blocks: Annotated[PositiveInt, Meaning.WITH_ATTENTION] = 2
    """Blocks of the self-attention, with history_pooling attention."""
    attention_dropout: DropoutShare = 0.2
    """Share of the self-attention's activations that training drops, at random."""

    def _problems(self) -> Iterator[tuple[str, str]]:
        if "attention" in self.history_pooling and self.dim % ATTENTION_HEADS:
            message = f"must be a multiple of {ATTENTION_HEADS}, the heads of the self-attention"
            yield "dim", f"got {self.dim}; {message}"
        if self.candidate_bias and not self.use_candidate_id:
            yield "candidate_bias", "needs use_candidate_id"
        if self.correction == "recent" and not self.candidate_bias:
            yield "correction", "got 'recent', which needs candidate_bias"
        if self.item_init == "svd" and not (self.use_candidate_id or self.history_pooling):
            yield "item_init", "got 'svd', which needs use_candidate_id or a history"


class TrainingSettings(Config):
    """How the model is fitted."""

    batch_size: int = Field(1024, ge=2)
    """Positives in a batch; a training part with fewer has about eight smaller batches instead."""
    examples: Literal["single", "sequences", "sets"] = "single"
    """Which positives are trained together: single, each by itself; sequences, a user's whole
    sequence in one pass (sequence-level training), for logs with an order; sets, a random half of a
    user's items from the other half, for logs without an order. Batches of the last two have about
    batch_size positives."""
    max_epochs: PositiveInt = 30
    """Most epochs to train."""
    optimizer: OptimizerName = "lazy_adam"
    """Optimizer; lazy_adam is Adam that updates only the batch's rows of an embedding table, where
    adam updates the whole table each step."""
    learning_rate: PositiveFloat = 0.002
    """Peak learning rate."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from 0 to its peak."""
    decay: Literal["none", "cosine"] = "none"
    """How the learning rate falls to 0 after the warm-up, over the steps of max_epochs; the second
    training (refit) has the same learning rates, epoch by epoch."""
    patience: PositiveInt = 5
    """Training stops after this many epochs without a better validation metric."""
    monitor: str = "ndcg@100"
    """Validation metric that chooses the epoch: recall, hit_rate, ndcg, mrr, even_recall
    or your own (`METRICS`), at one of evaluation.cutoffs."""
    validation_users: PositiveInt = 10_000
    """Most queries that validation ranks after each epoch; sampled if there are more."""
    history_bonus: bool = True
    """Whether validation may choose numbers that are added to the scores of a few items: of what
    people took near the latest items of a query's history; and of these items themselves, by how
    often they occur, where rankings exclude nothing (evaluation.exclude)."""
    refit: bool = True
    """Whether a run trains again on training and validation events, for the chosen number of
    epochs."""

    def _problems(self) -> Iterator[tuple[str, str]]:
        try:
            if not metric_of(self.monitor).more_is_better:
                yield "monitor", f"got {self.monitor!r}, of which more is not better"
        except ValueError as error:
            yield "monitor", f"got {self.monitor!r}; {error}"

    def fitting(self, num_positives: int) -> "TrainingSettings":
        """Returns the settings, with about eight smaller batches an epoch if none would be full.

        Example:
            >>> TrainingSettings(batch_size=1024).fitting(500).batch_size
            32
        """
        if self.examples != "single" or num_positives >= self.batch_size:
            return self
        # A power of two, which workers can share.
        size = 2 ** max(1, (num_positives // 8).bit_length() - 1)
        return self.model_copy(update={"batch_size": size})


def reads_times(model: TwoTowerSettings, training: TrainingSettings) -> bool:
    """Returns whether a model reads the times of a log that has them: a plain mean does not."""
    # Items of a set have no order, and no time before a request.
    return bool({"attention", "recency"} & {*model.history_pooling}) and training.examples != "sets"


def shape_settings(*, has_attention: bool) -> list[str]:
    """Lists the settings that decide what a model's weights mean."""
    meanings = set(Meaning) if has_attention else {Meaning.ALWAYS}
    fields = TwoTowerSettings.model_fields.items()
    return [name for name, field in fields if any(mark in meanings for mark in field.metadata)]


def shape_problems(there: TwoTowerSettings, here: TwoTowerSettings) -> Iterator[tuple[str, str]]:
    """Yields (setting, message) for each setting that makes weights mean something else.

    Example:
        >>> list(shape_problems(TwoTowerSettings(dim=8), TwoTowerSettings(dim=16, temperature=0.2)))
        [('model.dim', 'got 16, where the model to start from has 8')]
    """
    for name in shape_settings(has_attention="attention" in here.history_pooling):
        old, new = getattr(there, name), getattr(here, name)
        if old != new:
            yield f"model.{name}", f"got {new!r}, where the model to start from has {old!r}"


def check_examples(
    model: TwoTowerSettings, training: TrainingSettings
) -> Iterator[tuple[str, str]]:
    """Yields (dotted setting, message) for what `training.examples` excludes."""
    if training.examples == "single":
        return
    reason = f"with training.examples {training.examples!r}"
    shortest = 2 * (model.history_length + 1)
    rows = [
        (InBatch() in model.negatives, "model.negatives",
         f"got in_batch {reason}: a batch holds whole users, so it is not a fair draw; use "
         "popularity:num=512:alpha=1, which draws as often"),
        (not model.history_pooling, "model.history_pooling",
         f"got none {reason}, which reads the history"),
        (training.examples == "sets" and model.hard is not None, "model.hard",
         f"got {model.hard} {reason}: hard negatives belong to one positive, and a query has many"),
        (training.examples == "sequences" and training.batch_size < shortest, "training.batch_size",
         f"got {training.batch_size} {reason}: must be {shortest} or more, twice "
         "(model.history_length + 1)"),
    ]  # fmt: skip
    yield from ((setting, message) for is_wrong, setting, message in rows if is_wrong)
