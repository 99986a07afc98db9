"""The settings of a run: one frozen, validated class a stage.

The sentence under each field is its documentation and its help in the command line. Every table of
settings refuses unknown keys and names the nearest known one.
"""

from __future__ import annotations

import json
import re
import tomllib
import zoneinfo
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import tomli_w
from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from tfrs_pipeline.data.schema import FeatureKind
from tfrs_pipeline.settings import Config, ConfigError, from_text, refuse, setting_names, suggest

StageName: TypeAlias = Literal["retrieved", "pre_ranked", "ranked", "exposed", "clicked"]
PlanKind: TypeAlias = Literal[
    "in_batch_uncorrected",
    "in_batch",
    "uniform",
    "popularity",
    "mixed",
    "hybrid",
    "hybrid_50_50",
    "mined",
    "resampled",
    "exposed",
]
HardSource: TypeAlias = Literal["retrieved", "pre_ranked", "ranked", "exposed", "mined"]

Share: TypeAlias = Annotated[float, Field(gt=0, lt=1)]

_COLUMNS = (
    "user_id",
    "item_id",
    "timestamp",
    "stage",
    "rating",
    "request_id",
    "rank",
    "score",
    "weight",
    "part",
)


class DataConfig(Config):
    """Where events, items and users come from."""

    source: Literal["movielens-100k", "kuairand", "recflow", "events", "clicks", "ratings"] = (
        "movielens-100k"
    )
    """MovieLens-100K, KuaiRand, RecFlow, or a file of the user's own: an event log with stages, a
    plain click log, or ratings with a threshold."""
    path: Path | None = None
    """CSV or Parquet file of events, or a folder of them; for kuairand and recflow the folder as
    published; for movielens-100k a folder with u.data, u.item and u.user, fetched if not given."""
    items_path: Path | None = None
    """CSV or Parquet file of items, or a folder of them."""
    users_path: Path | None = None
    """CSV or Parquet file of users, or a folder of them."""
    columns: dict[str, str] = {}
    """Names of the columns in the user's files, by the name this package gives them, such as
    user_id=viewer; a column that is not listed keeps its name."""
    item_columns: dict[str, str] = {}
    """The same of the item table, such as item_id=sku."""
    user_columns: dict[str, str] = {}
    """The same of the user table."""
    stage_values: dict[str, StageName] = {}
    """Stages by the value that the file's stage column holds, such as impression=exposed."""
    rating_threshold: float | None = None
    """Ratings at or above this are clicks, those below are exposures; only for ratings, which need
    it."""
    timestamp_unit: Literal["s", "ms", "us", "ns"] | None = None
    """Unit of timestamps that are stored as numbers, those of features too."""
    label: dict[str, PositiveFloat] = {}
    """Columns that make an exposed event a positive, each with the weight that it adds, such as
    is_click=1 long_view=2; if not given, the stage clicked does: is_click in kuairand,
    effective_view in recflow."""
    time_zone: str | None = None
    """Time zone of timestamps that are stored without one, such as UTC or Europe/Paris; those of
    features too."""
    ordered: bool = True
    """Whether the order of the rows is the order of the events, for events without timestamps."""
    item_features: dict[str, FeatureKind] = {}
    """Columns of the item table that the model reads, and the kind of each: categorical, or hashed
    for very many values; multi_categorical; text; numeric, or bucketized for a number whose effect
    is no straight line; timestamp; vector, a list of numbers from another model."""
    user_features: dict[str, FeatureKind] = {}
    """Columns of the user table that the model reads, and the kind of each, as of items."""
    list_separator: str = Field("|", min_length=1)
    """What separates the values of a multi_categorical feature, or the numbers of a vector, in a
    CSV file."""
    unknown_items: Literal["keep", "drop", "error"] = "keep"
    """What to do with events whose item is not in the item table: keep them with empty features,
    drop and count them, or stop."""
    duplicates: Literal["keep", "drop", "error"] = "keep"
    """What to do with events equal in user, item, time, stage, request and part: keep all of them,
    drop and count all but the first, or stop."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        refuse([*self._source_problems(), *self._value_problems()])
        return self

    def _source_problems(self) -> Iterator[tuple[str, str]]:
        """Yields what the source needs and lacks, and what was set although it has no effect."""
        files = ("events", "clicks", "ratings")
        is_file = self.path is not None and self.path.suffix in (".csv", ".parquet")
        if self.source == "movielens-100k" and is_file:
            message = "one of 'clicks', 'events' and 'ratings' reads a file of your own"
            yield "source", f"got {self.source!r} with the path {self.path}; {message}"
        if self.source != "movielens-100k" and self.path is None:
            yield "path", f"required for source {self.source!r}: the file or folder of its events"
        if self.source == "ratings" and self.rating_threshold is None:
            yield (
                "rating_threshold",
                "required for source 'ratings': the lowest rating that is a click",
            )
        for table in ("item", "user"):
            features, path = getattr(self, f"{table}_features"), getattr(self, f"{table}s_path")
            if self.source in files and features and path is None:
                yield f"{table}s_path", f"required for {table}_features: the file that holds them"
        # What decides which events are positives: without effect, the model would learn others.
        of_positives: dict[str, tuple[str, ...]] = {
            "stage_values": ("events",),
            "label": ("events", "kuairand", "recflow"),
            "rating_threshold": ("ratings",),
        }
        for name, sources in of_positives.items():
            if getattr(self, name) and self.source not in sources:
                where = " or ".join(repr(source) for source in sources)
                yield name, f"has no effect with source {self.source!r}: only with {where}"

    def _value_problems(self) -> Iterator[tuple[str, str]]:
        for name in self.columns:
            if name not in _COLUMNS:
                yield f"columns.{name}", f"unknown column; {suggest(name, _COLUMNS)}"
        if self.time_zone is not None and not _is_time_zone(self.time_zone):
            zones = zoneinfo.available_timezones()
            yield (
                "time_zone",
                f"unknown time zone {self.time_zone!r}; {suggest(self.time_zone, zones)}",
            )


class SplitConfig(Config):
    """Which events train the model, which choose its settings, which test it."""

    kind: Literal["last_share", "last_n", "time", "held_out_users", "column"] = "last_share"
    """Test on the last share or the last few positives of each user, on what came after a point in
    time, on users that training never saw, or as the log's own column part says: train, validation
    or test."""
    test_share: Share = 0.2
    """Share of positives (or of held-out users) that tests."""
    validation_share: Share = 0.1
    """Share that validates: of what the test left of each user for last_share, else of all."""
    num_test: PositiveInt = 1
    """Positives of each user that test, for last_n."""
    num_validation: PositiveInt = 1
    """Positives of each user that validate, for last_n."""
    validation_start: datetime | None = None
    """Start of validation, with a time zone, for time; if not given, the shares decide."""
    test_start: datetime | None = None
    """Start of the test, with a time zone, for time; if not given, the shares decide."""
    target_share: Share = 0.2
    """Share of a held-out user's last positives that is to be found, for held_out_users."""
    min_positives: PositiveInt = 5
    """Users with fewer positives are left out, except by time and by column, which keep every
    user."""

    @model_validator(mode="after")
    def _check(self) -> SplitConfig:
        refuse(self._problems())
        return self

    def _problems(self) -> Iterator[tuple[str, str]]:
        if self.test_share + self.validation_share >= 1:
            yield "", "test_share and validation_share must sum to less than 1: the rest trains"
        starts = {"validation_start": self.validation_start, "test_start": self.test_start}
        given = {name: start for name, start in starts.items() if start is not None}
        for name, start in given.items():
            if self.kind != "time":
                yield name, f"has no effect with kind {self.kind!r}: only with 'time'"
            if start.tzinfo is None:
                text = start.isoformat()
                yield name, f"got {text} without a time zone; write {text}Z if it is UTC"
        if len(given) == 1:
            yield "", "give both validation_start and test_start, or neither"
        elif self.validation_start and self.test_start and not _is_before(**given):
            yield "test_start", "must be after validation_start"


class EasySampler(Config):
    """A sampler of easy negatives: p(c) proportional to clicks(c)^alpha."""

    alpha: float = Field(0.75, ge=0)
    """Power of the training clicks: 0 is uniform, 1 is the popularity itself."""
    num: PositiveInt = 256
    """Negatives drawn a batch, with replacement, shared by all its rows."""


class HardSampler(Config):
    """Where hard negatives come from: a stage of the funnel that they lost in, or the model."""

    stage: HardSource = "pre_ranked"
    """Furthest stage that the items reached: retrieved lost in pre-rank, pre_ranked lost in rank,
    ranked ended low in rank; or mined: what the model itself retrieves, for logs without losers."""
    share: PositiveFloat = 0.5
    """Part of the hard share, relative to the other stages."""
    num: PositiveInt = 4
    """Columns drawn for each row from its pool of this stage."""


_MINED = ({"stage": "mined", "num": 8},)
_EVEN_LOSERS = ({"stage": "retrieved"}, {"stage": "pre_ranked"})
PRESETS: dict[str, dict[str, Any]] = {
    "easy": {"hard_share": 0.0},
    "hybrid_1_100": {"hard_share": 0.01, "hard_negatives": _EVEN_LOSERS},
    "hybrid_50_50": {"hard_share": 0.5, "hard_negatives": _EVEN_LOSERS},
    "mined_1_100": {"hard_share": 0.01, "hard_negatives": _MINED},
}


def _losers(samplers: Sequence[Mapping[str, Any]]) -> tuple[HardSampler, ...]:
    return tuple(HardSampler(**sampler) for sampler in samplers)


_EXPOSED_REASON = (
    "an item that was exposed to a user and not clicked is never a negative of that user in "
    "retrieval: the funnel chose it, and it is for ranking to learn from; to see what it does all "
    "the same, set allow_exposed_as_negatives"
)


class SamplesConfig(Config):
    """Which items a positive is compared with."""

    preset: Literal["easy", "hybrid_1_100", "hybrid_50_50", "mined_1_100"] | None = None
    """Named mixture: sets hard_share to 0, .01 or .5, half of it from pre-rank losers and half from
    rank losers; or to .01, mined from the model."""

    history_length: PositiveInt = 50
    """Latest positives before the event that the query holds."""
    in_batch: bool = True
    """Whether the positives of the other rows of the batch are negatives too."""
    easy_negatives: tuple[Annotated[EasySampler, BeforeValidator(from_text)], ...] = (
        EasySampler(alpha=0),
        EasySampler(alpha=0.75),
    )
    """Samplers of easy negatives, all of them used together."""
    bank_batches: int = Field(0, ge=0)
    """Earlier batches whose positives' embeddings are negatives too, as they were then."""
    mask_known_positives: bool = True
    """Whether a user's other training positives are kept from being negatives."""
    mask_exposed: bool = True
    """Whether items that the user was shown and did not click are kept from being negatives."""
    hard_share: float = Field(0.0, ge=0, lt=1)
    """Share of the negatives' weight that hard negatives hold, in rows that have any."""
    hard_negatives: tuple[Annotated[HardSampler, BeforeValidator(from_text)], ...] = (
        HardSampler(stage="retrieved"),
        HardSampler(stage="pre_ranked"),
    )
    """Stages whose losers are hard negatives, used if hard_share is above 0."""
    hard_min_pool: int = Field(4, ge=0)
    """Losers of a stage in the positive's own request below which those of the user's recent
    requests are taken too."""
    hard_max_pool: PositiveInt = 100
    """Losers kept for a positive and stage, at most."""
    hard_window_hours: PositiveFloat = 24.0
    """How far back recent requests may lie; in a log without timestamps, any earlier one may."""
    ranked_bottom_share: float = Field(0.5, gt=0, le=1)
    """Low part of the ranked list that may be hard negatives: a share of the request's ranks."""
    ranked_min_rank: int | None = Field(None, ge=0)
    """Low part of the ranked list as a rank instead (0 is the best): this one and worse."""
    mined_min_rank: int = Field(100, ge=0)
    """Best rank that mining keeps, 0 being the top, known positives and exposed items left out:
    above it stands much that the user would like and has not met."""
    mined_max_rank: PositiveInt = 500
    """First rank that mining does not keep."""
    mined_margin: float | None = Field(None, ge=0)
    """Mining drops what scores above the positive's score less this; if not given, nothing."""
    mined_every: PositiveInt = 3
    """Epochs between two minings; before the first one there are no mined negatives."""
    allow_exposed_as_negatives: bool = False
    """Insist on exposed and not clicked items as negatives, to see what they do."""
    resampling: Literal["none", "power_law", "keep_rule"] = "none"
    """Down-sample positives of popular items and up-sample the others: by counts to the power of
    -resampling_exponent, or by word2vec's keep-rule."""
    resampling_as: Literal["drawing", "weights"] = "drawing"
    """Whether positives are drawn by that rate, or weighted by it."""
    resampling_exponent: float = Field(0.5, ge=0, le=1)
    """Exponent of the power law: 0 changes nothing, 1 makes every clicked item equally likely."""
    resampling_threshold: float = Field(0.001, gt=0)
    """Share of the positives above which the keep-rule begins to thin an item out."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, settings: Any) -> Any:
        preset = settings.get("preset") if isinstance(settings, Mapping) else None
        if preset not in PRESETS:
            return settings
        return {**PRESETS[preset], **settings}  # What differs from the preset is refused below.

    @model_validator(mode="after")
    def _check(self) -> SamplesConfig:
        if not self.in_batch and not self.easy_negatives:
            refuse([("", "no negatives: set in_batch or list at least one easy_negatives sampler")])
        if self.bank_batches and not self.in_batch:
            message = "the batch's own positives are the same negatives, up to date: set in_batch"
            refuse([("bank_batches", f"got {self.bank_batches} without in_batch; {message}")])
        refuse(self._hard_problems())
        return self

    def _hard_problems(self) -> Iterator[tuple[str, str]]:
        stages = [sampler.stage for sampler in self.hard_negatives]
        preset = PRESETS.get(self.preset or "", {})
        for name, value in preset.items():
            expected = _losers(value) if name == "hard_negatives" else value
            if getattr(self, name) != expected:
                yield name, f"is not what preset {self.preset!r} sets; leave one of the two out"
        if len(set(stages)) < len(stages):
            yield "hard_negatives", f"got {stages}: a stage twice"
        if self.hard_share > 0 and not stages:
            yield "hard_negatives", "needs a stage, since hard_share is above 0"
        if self.mined_min_rank >= self.mined_max_rank:
            yield "mined_max_rank", f"got {self.mined_max_rank}; must be above mined_min_rank"
        if not self.allow_exposed_as_negatives:
            if "exposed" in stages:
                yield "hard_negatives", f"got 'exposed'; {_EXPOSED_REASON}"
            if not self.mask_exposed:
                yield "mask_exposed", f"got no; {_EXPOSED_REASON}"


class ModelConfig(Config):
    """The two towers and their score."""

    embedding_dim: PositiveInt = 64
    """Length of the query and candidate embeddings."""
    query_layers: tuple[PositiveInt, ...] = ()
    """Sizes of the hidden layers of the query tower."""
    candidate_layers: tuple[PositiveInt, ...] = ()
    """Sizes of the hidden layers of the candidate tower."""
    use_user_id: bool = False
    """Whether the query tower has an embedding for each user id."""
    use_candidate_id: bool = True
    """Whether the candidate tower has an embedding for each item id."""
    unknown_rate: float = Field(0.05, ge=0, lt=1)
    """Share of the ids that training takes for unknown, at random: it trains what stands for a new
    user or item, besides its features."""
    candidate_bias: bool = False
    """Whether each item has a number of its own that is added to its scores."""
    share_item_embedding: bool = False
    """Whether the history's items have the same embedding as the candidates."""
    history_pooling: tuple[Literal["mean", "recency", "attention"], ...] = ("mean", "recency")
    """How the history becomes a vector: a plain mean, one weighted by recency, causal
    self-attention, or several of them."""
    recency_decay: float = Field(0.85, gt=0, le=1)
    """Weight of a step back in the history, relative to the step after it."""
    history_dropout: float = Field(0.5, ge=0, lt=1)
    """Share of the history's items that is dropped at random in training."""
    attention_blocks: PositiveInt = 2
    """Blocks of the self-attention, with history_pooling attention."""
    attention_heads: PositiveInt = 2
    """Heads of each block of the self-attention; must divide embedding_dim."""
    attention_dropout: float = Field(0.2, ge=0, lt=1)
    """Share of the activations of the self-attention that is dropped at random in training."""
    feature_dim: PositiveInt = 4
    """Length of the embedding of each feature."""
    feature_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the features that is taken for missing at random in training."""
    combination: Literal["concat", "sum"] = "concat"
    """How a tower joins what it reads: concat, end to end and mapped by its layers, or sum, each
    brought to embedding_dim and added up."""
    normalize: bool = True
    """Whether embeddings have length 1, so that scores are cosines, plus an item's bias if there is
    one."""
    temperature: PositiveFloat = 0.15
    """What scores are divided by in the loss."""
    correction: Literal["mixture", "streaming", "none"] = "mixture"
    """Whether logits are corrected by the expected count of each candidate in the batch: from the
    training counts, or with the popularity of positives estimated from the batches so far."""
    correct_positive: bool = False
    """Whether the positive's own logit is corrected too (Yi et al. 2019)."""
    score_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which training multiplies embeddings; bfloat16 is less exact and, where the machine
    has it, faster."""
    frequency_learning_rate: float = Field(0.01, gt=0, le=1)
    """Weight of an item's latest gap in its popularity, with correction 'streaming'."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if len(set(self.history_pooling)) < len(self.history_pooling):
            refuse([("history_pooling", f"got {list(self.history_pooling)!r}: a pooling twice")])
        if "attention" in self.history_pooling and self.embedding_dim % self.attention_heads:
            message = f"got {self.attention_heads}; must divide embedding_dim {self.embedding_dim}"
            refuse([("attention_heads", message)])
        if not self.use_candidate_id:
            for name in ("share_item_embedding", "candidate_bias"):
                if getattr(self, name):
                    refuse([(name, "needs use_candidate_id")])
        return self


class TrainingConfig(Config):
    """How the model is fitted."""

    batch_size: int = Field(1024, ge=2)
    """Positives in a batch."""
    positions: Literal["one", "all"] = "one"
    """Whether each positive is an example by itself, or one pass over a user's sequence trains all
    its positions; then batches have about batch_size positives. In a log without an order, all
    makes one query a user and epoch: it reads a random half of the user's positives, less what
    history_dropout drops, and has the other half to find."""
    max_epochs: PositiveInt = 30
    """Epochs at most."""
    optimizer: Literal["adagrad", "adam", "lazy_adam"] = "lazy_adam"
    """Optimizer; lazy_adam is Adam that updates only the rows of a table that a batch has, and
    costs what they do, where adam goes over the whole table each step."""
    learning_rate: PositiveFloat = 0.002
    """Step size of the optimizer; with a warm-up or a decay, its peak."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the step size rises from 0 to its peak."""
    decay: Literal["none", "cosine", "linear"] = "none"
    """How the step size falls after the warm-up, over the steps of max_epochs; a training that
    stops early stops on the way, and the second training goes the same way, epoch by epoch."""
    decay_to: float = Field(0.0, ge=0, le=1)
    """Share of the peak that the decay ends at."""
    patience: PositiveInt = 3
    """Epochs without a better validation metric after which training stops."""
    monitor: str = "ndcg@100"
    """Validation metric that chooses the epoch: recall or ndcg, at one of the cutoffs."""
    refit: bool = True
    """Whether to train again on training and validation events for the chosen number of epochs;
    held-out users are never trained on."""
    tensorboard: bool = False
    """Whether to write event files for TensorBoard beside the checkpoints: loss, step size,
    validation metrics with the recall of tail items, range of log_q, share of masked columns,
    norms of embeddings, once an epoch."""

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        refuse(self._problems())
        return self

    def _problems(self) -> Iterator[tuple[str, str]]:
        if not re.fullmatch(r"(recall|ndcg)@[1-9]\d*", self.monitor):
            message = "must be recall or ndcg at a cutoff, such as 'ndcg@100'"
            yield "monitor", f"got {self.monitor!r}; {message}"


class EvaluationConfig(Config):
    """What is measured on the test, and against which baselines."""

    cutoffs: tuple[PositiveInt, ...] = (20, 100)
    """Lengths of the ranking at which metrics are reported."""
    exclude: Literal["clicked", "seen", "none"] = "clicked"
    """What is left out of a user's ranking: clicked items, all items shown, or nothing."""
    num_bootstrap: PositiveInt = 1000
    """Resamples of the queries behind each confidence interval."""
    uncorrected: bool = True
    """Whether to train the same model without the correction too, and to show it in the table."""
    baselines: tuple[Literal["popularity", "ease", "ials"], ...] = ("popularity", "ease", "ials")
    """Baselines in the same table."""
    ease_l2: tuple[PositiveFloat, ...] = (200.0,)
    """Regularisation of EASE; of several values, validation chooses."""
    max_ease_candidates: PositiveInt = 20_000
    """EASE is skipped above this many items: it inverts a matrix of items by items."""
    ials_num_factors: tuple[PositiveInt, ...] = (128,)
    """Factors of iALS; of several values, validation chooses."""
    ials_regularization: tuple[PositiveFloat, ...] = (30.0,)
    """Regularisation of iALS; of several values, validation chooses."""
    ials_alpha: tuple[PositiveFloat, ...] = (6.0,)
    """Weight of a positive in iALS; of several values, validation chooses."""

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        refuse(self._problems())
        return self

    def _problems(self) -> Iterator[tuple[str, str]]:
        for name, values in self:
            if not isinstance(values, tuple):
                continue
            if not values and name != "baselines":
                yield name, "must list at least one value"
            if len(set(values)) < len(values):
                yield name, f"got {list(values)!r}: a value twice"


class ExportConfig(Config):
    """The model in service: its index and where it is saved."""

    name: str | None = None
    """Name of the model's folder; if not given, that of the events' file or of the data source."""
    directory: Path = Path("saved_models")
    """Folder that holds the models, as DIRECTORY/NAME/VERSION."""
    index: Literal["auto", "scann", "exact"] = "auto"
    """Search structure: ScaNN, exact search, or whichever suits the size of the corpus."""
    target_recall: float = Field(0.98, gt=0, le=1)
    """Share of the exact top items that the ScaNN index must find; it is tuned to that."""
    filter_by: str | None = None
    """Item feature, categorical or multi_categorical, by whose values requests may filter items."""
    keep_versions: PositiveInt | None = None
    """Versions of the model to keep, the newest; older ones are deleted. If not given, all."""

    @model_validator(mode="after")
    def _check(self) -> ExportConfig:
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            message = "must be letters, digits, '.', '_' and '-', a letter or digit first"
            refuse([("name", f"got {self.name!r}; {message}")])
        return self


class CompareConfig(Config):
    """What `tfrs-pipeline compare` tries."""

    plans: tuple[PlanKind, ...] = (
        "in_batch_uncorrected",
        "in_batch",
        "uniform",
        "popularity",
        "mixed",
        "hybrid",
        "hybrid_50_50",
        "resampled",
        "exposed",
    )
    """Sampling plans; exposed is left out unless samples.allow_exposed_as_negatives is set."""
    reference: Literal["in_batch_uncorrected", "in_batch", "uniform", "popularity", "mixed"] = (
        "mixed"
    )
    """Plan that the others are compared with, query by query."""
    hard_shares: tuple[Share, ...] = (0.01, 0.05, 0.2)
    """Hard shares of the plans hybrid, mined and exposed: one plan each."""
    resampling_exponents: tuple[Share, ...] = (0.3, 0.6)
    """Exponents of the power law in the plan resampled: one plan each."""
    max_steps: PositiveInt | None = None
    """Budget of a plan in steps, rounded up to whole epochs; if not given, training.max_epochs."""
    max_seconds: PositiveFloat | None = None
    """Budget of a plan in seconds, after which no epoch is begun."""
    num_corpus_items: PositiveInt = 1000
    """Items of the corpus, drawn uniformly, that positives are set against in the AUC."""

    @model_validator(mode="after")
    def _check(self) -> CompareConfig:
        refuse(self._problems())
        return self

    def _problems(self) -> Iterator[tuple[str, str]]:
        for name in ("plans", "hard_shares", "resampling_exponents"):
            values = getattr(self, name)
            if not values:
                yield name, "must list at least one value"
            if len(set(values)) < len(values):
                yield name, f"got {list(values)!r}: a value twice"
        if self.reference not in self.plans:
            yield "reference", f"got {self.reference!r}, which is not among compare.plans"


class RunConfig(Config):
    """Everything a run depends on."""

    data: DataConfig = DataConfig()
    """Where events, items and users come from."""
    split: SplitConfig = SplitConfig()
    """Which events train the model, which choose its settings, which test it."""
    samples: SamplesConfig = SamplesConfig()
    """Which items a positive is compared with."""
    model: ModelConfig = ModelConfig()
    """The two towers and their score."""
    training: TrainingConfig = TrainingConfig()
    """How the model is fitted."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured on the test, and against which baselines."""
    export: ExportConfig = ExportConfig()
    """The model in service: its index and where it is saved."""
    compare: CompareConfig = CompareConfig()
    """What `tfrs-pipeline compare` tries."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of everything random in the run."""

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        refuse(self._problems())
        return self

    def _problems(self) -> Iterator[tuple[str, str]]:
        """Yields what stages ask of each other and do not get."""
        model = self.model
        if self.split.kind == "column" and self.data.source in ("movielens-100k", "recflow"):
            yield (
                "split.kind",
                f"got 'column' with source {self.data.source!r}, whose log has no column part; "
                "choose another kind",
            )
        stages = [sampler.stage for sampler in self.samples.hard_negatives]
        is_mined = self.samples.hard_share > 0 and "mined" in stages
        if is_mined and self.samples.mined_every >= self.training.max_epochs:
            yield (
                "samples.mined_every",
                f"got {self.samples.mined_every} with training.max_epochs "
                f"{self.training.max_epochs}: nothing would be mined",
            )
        logged = [stage for stage in stages if stage not in ("mined", "exposed")]
        if self.samples.hard_share and logged and self.data.source not in ("events", "recflow"):
            yield (
                "samples.hard_negatives",
                f"got {logged} with source {self.data.source!r}, which holds no losers of a "
                "funnel: only 'events' and 'recflow' do. Mine them from the model: preset "
                "mined_1_100, or stage 'mined'",
            )
        cutoffs = self.evaluation.cutoffs
        if int(self.training.monitor.partition("@")[2]) not in cutoffs:
            yield (
                "training.monitor",
                f"got {self.training.monitor!r}; evaluation.cutoffs are {list(cutoffs)}",
            )
        if model.correction == "streaming":
            yield from self._counting()
        if self.training.positions == "all":
            yield from self._sequence_problems()
        filter_by = self.export.filter_by
        kinds = ("categorical", "multi_categorical")
        if filter_by is not None and self.data.item_features.get(filter_by) not in kinds:
            yield (
                "export.filter_by",
                f"got {filter_by!r}, which is no item feature of kind {' or '.join(kinds)}; "
                f"data.item_features has {', '.join(self.data.item_features) or 'none'}",
            )
        if not (model.use_user_id or model.history_pooling or self.data.user_features):
            yield (
                "model",
                "the query tower reads nothing: set use_user_id, history_pooling or user_features",
            )
        if not (model.use_candidate_id or self.data.item_features):
            yield (
                "model",
                "the candidate tower reads nothing: set use_candidate_id or item_features",
            )

    def _sequence_problems(self) -> Iterator[tuple[str, str]]:
        """Yields what does not go with training all positives of a user at once."""
        samples, reason = self.samples, "with training.positions 'all'"
        if samples.in_batch:
            yield (
                "samples.in_batch",
                f"got yes {reason}: a batch holds whole users and is no fair draw; set it to "
                "no, and use an easy_negatives sampler with alpha 1, which draws as often",
            )
        if samples.resampling != "none" and samples.resampling_as == "drawing":
            yield "samples.resampling_as", f"got 'drawing' {reason}: use 'weights'"
        if not self.model.history_pooling:
            yield "model.history_pooling", f"got none {reason}, which reads the history"
        if self.model.correction == "streaming":
            yield "model.correction", f"got 'streaming' {reason}, which has no in-batch negatives"
        if not self.data.ordered:
            yield from self._set_problems(reason)
            return
        shortest = 2 * (samples.history_length + 1)
        if self.training.batch_size < shortest:
            yield (
                "training.batch_size",
                f"got {self.training.batch_size} {reason}: must be {shortest} or more, twice "
                "(samples.history_length + 1)",
            )

    def _set_problems(self, reason: str) -> Iterator[tuple[str, str]]:
        """Yields what does not go with queries that have many positives."""
        reason += " in a log without an order (data.ordered is no)"
        if self.samples.hard_share:
            yield (
                "samples.hard_share",
                f"got {self.samples.hard_share} {reason}: hard negatives are those of one "
                "positive, where a query has many; set it to 0, or training.positions to 'one'",
            )
        if not self.samples.mask_known_positives:
            yield (
                "samples.mask_known_positives",
                f"got no {reason}: all of a user's positives have the same negatives, which must "
                "hold none of them; set it to yes, or training.positions to 'one'",
            )

    def _counting(self) -> Iterator[tuple[str, str]]:
        """Yields what needs training counts, which a streaming correction does without."""
        reason = "needs training counts, which model.correction 'streaming' does without"
        alphas = [sampler.alpha for sampler in self.samples.easy_negatives if sampler.alpha > 0]
        if alphas:
            yield (
                "samples.easy_negatives",
                f"got alpha {alphas}, which {reason}: use alpha 0 and in_batch",
            )
        if self.samples.resampling != "none":
            yield "samples.resampling", f"got {self.samples.resampling!r}, which {reason}"

    @property
    def model_name(self) -> str:
        """Name of the model's folder: letters, digits, '.', '_' and '-'."""
        if self.export.name is not None:
            return self.export.name
        name = self.data.source if self.data.path is None else self.data.path.stem
        return re.sub(r"^[._-]+|-+$", "", re.sub(r"[^A-Za-z0-9._-]+", "-", name))


def main_job_config() -> RunConfig:
    """Returns the settings of the main job: MovieLens-100K, served by ScaNN."""
    return RunConfig(
        data=DataConfig(
            item_features={"title": "text", "year": "categorical", "genres": "multi_categorical"},
            user_features={
                "age_group": "categorical",
                "gender": "categorical",
                "occupation": "categorical",
            },
        ),
        export=ExportConfig(name="movielens-100k", index="scann"),
    )


_NO_IN_BATCH = {"samples.in_batch": False, "training.positions": "all"}
# Name -> what it is good for, and the settings that it changes, by dotted name.
RUN_PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "quick": (
        "a first look at a log with an order: small embeddings, histories pooled at all positions "
        "at once, ten epochs at most, popularity and EASE beside it",
        {
            **_NO_IN_BATCH,
            "samples.easy_negatives": ({"alpha": 0, "num": 256}, {"alpha": 0.75, "num": 256}),
            "model.embedding_dim": 32,
            "training.max_epochs": 10,
            "training.patience": 2,
            "training.learning_rate": 0.004,
            "evaluation.uncorrected": False,
            "evaluation.baselines": ("popularity", "ease"),
        },
    ),
    "ids": (
        "a fixed set of users without an order in their events: an embedding a user and an item, "
        "no history, no features; whoever is not in the log gets the answer for an unknown user",
        {
            "data.item_features": {},
            "data.user_features": {},
            "model.use_user_id": True,
            "model.history_pooling": (),
            "model.unknown_rate": 0.01,
            "model.combination": "sum",
        },
    ),
    "sets": (
        "a log without an order: the mean of the history, of which training reads a random half "
        "and finds the other, a user at a time; users who come later are answered by their history",
        {
            **_NO_IN_BATCH,
            "data.ordered": False,
            "samples.history_length": 300,
            "samples.easy_negatives": ({"alpha": 0.5, "num": 2048},),
            "model.embedding_dim": 128,
            "model.candidate_bias": True,
            "model.history_pooling": ("mean",),
            "model.history_dropout": 0.0,
            "model.combination": "sum",
            "model.temperature": 0.07,
            "training.batch_size": 3072,
            "training.learning_rate": 0.01,
            "training.decay": "cosine",
            "training.warmup_steps": 10,
            "training.max_epochs": 40,
            "training.patience": 10,
        },
    ),
    "sequence": (
        "logs in which the order of the events tells what comes next: causal self-attention over "
        "the history, trained at all positions at once",
        {
            **_NO_IN_BATCH,
            "samples.history_length": 200,
            "samples.easy_negatives": ({"alpha": 0, "num": 512}, {"alpha": 0.75, "num": 512}),
            "model.history_pooling": ("attention",),
            "model.share_item_embedding": True,
            "model.combination": "sum",
            "model.history_dropout": 0.2,
            "training.max_epochs": 100,
        },
    ),
}


def load_config(path: Path | str) -> RunConfig:
    """Reads the settings of a run from a TOML file.

    Args:
        path: File with one table a stage; what it leaves out has its default.

    Returns:
        The settings.

    Raises:
        ConfigError: If the file cannot be read, is not TOML, or holds settings that cannot be used;
            each problem has a line.
    """
    try:
        settings = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([("", f"cannot be read: {error.strerror}")], str(path)) from error
    except ValueError as error:  # Not UTF-8, or not TOML: its message holds line and column.
        raise ConfigError([("", f"is not a TOML file: {error}")], str(path)) from error
    try:
        return RunConfig(**settings)
    except ConfigError as error:
        raise ConfigError(error.problems, str(path)) from None


def dump_config(config: RunConfig) -> str:
    """Writes settings as TOML that `load_config` reads back equal.

    TOML has no null: settings that are None are left out, and every other one is there.
    """
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def with_settings(
    config: RunConfig, settings: Mapping[str, Any] | None = None, *, preset: str | None = None
) -> RunConfig:
    """Returns the settings with some of them replaced, checked as a whole.

    Args:
        config: The settings to start from.
        settings: New values by dotted name.
        preset: Name in `RUN_PRESETS`, whose values are replaced first.

    Raises:
        ConfigError: If a name is unknown, or a value cannot be used.

    Example:
        >>> config = with_settings(RunConfig(), {"training.batch_size": 512, "seed": 7})
        >>> config.training.batch_size, config.training.max_epochs, config.seed
        (512, 30, 7)
    """
    if preset is not None and preset not in RUN_PRESETS:
        raise ConfigError(
            [("preset", f"unknown preset {preset!r}; {suggest(preset, RUN_PRESETS)}")]
        )
    settings = {**(RUN_PRESETS[preset][1] if preset else {}), **(settings or {})}
    tree = config.model_dump()
    if "samples.preset" in settings:
        # A new preset replaces what the old one, or the default, had set.
        for name in ("hard_share", "hard_negatives"):
            del tree["samples"][name]
    for name, value in settings.items():
        *tables, setting = name.split(".")
        table = tree
        for key in tables:
            if not isinstance(table.get(key), dict):
                known = setting_names(RunConfig)
                raise ConfigError([(name, f"unknown setting; {suggest(name, known)}")])
            table = table[key]
        table[setting] = value
    return RunConfig(**tree)


def check_model_name(config: RunConfig) -> None:
    """Checks a name that comes from the file of the events, before anything is done in it.

    Raises:
        ConfigError: If nothing of it can name a folder, or a model of other data has it: a version
            of that model is added only if it is asked for by name.
    """
    if config.export.name is not None:
        return
    if not config.model_name:
        message = f"required: no letter or digit in the name of {config.data.path} to name it by"
        raise ConfigError([("export.name", message)])
    ours = config.model_dump(mode="json")["data"]
    for path in (config.export.directory / config.model_name).glob("*/manifest.json"):
        theirs = json.loads(path.read_text())["config"]["data"]
        if _origin(theirs) != _origin(ours):
            message = (
                f"{path.parent} is a model of {theirs['path'] or theirs['source']}: set another "
                f"name, or {config.model_name!r} to add a version to it all the same"
            )
            raise ConfigError([("export.name", message)])


def _origin(data: Mapping[str, Any]) -> Path | str:
    return Path(data["path"]).resolve() if data["path"] else data["source"]


def _is_time_zone(name: str) -> bool:
    try:
        zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        return False
    return True


def _is_before(validation_start: datetime, test_start: datetime) -> bool:
    """Compares two times, of which one may lack a time zone (that is reported by itself)."""
    if (validation_start.tzinfo is None) != (test_start.tzinfo is None):
        return True
    return validation_start < test_start
