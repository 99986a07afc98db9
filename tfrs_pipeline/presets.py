"""Recipes: settings that suit a kind of log. Each is a preset; those that suit any log race.

A new recipe is an entry of `_ALL`. Nothing else has to change: the race, the flags, their help
and the reference read it from here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tfrs_pipeline.negatives.samplers import FunnelLosers, Popularity, Uniform


@dataclass(frozen=True)
class Recipe:
    """Settings that suit a kind of log, such as an entrant of `tp.race`.

    Attributes:
        name: Its name in a race, in flags and in the report.
        settings: New values by dotted name, such as `{"model.dim": 32}`.
        words: What it is good for.
        races: Whether it races unless other recipes are named. Those that need a funnel do not.

    Example:
        >>> small = Recipe("small", {"model.dim": 16, "data.is_ordered": False})
        >>> small.of_training()
        {'model.dim': 16}
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    words: str = ""
    races: bool = True

    def of_training(self) -> dict[str, Any]:
        """Returns the settings that a race reads.

        Settings of the data, the evaluation and the export are left out, because all recipes are
        compared on the same validation.
        """
        shared = ("data.", "split.", "evaluation.", "export.")
        return {name: x for name, x in self.settings.items() if not name.startswith(shared)}


_SEQUENCE: dict[str, Any] = {
    "model.negatives": (Uniform(512), Popularity(512)),
    "model.history_length": 200,
    "model.history_pooling": ("attention",),
    "model.history_dropout": 0.2,
    "model.id_dropout": 0.01,
    "model.item_init": "svd",
    "model.feature_dim": 4,  # 16 lost on sparse 1M: docs/archive/tried.md.
    "model.temperature": 0.1,
    "training.examples": "sequences",
    "training.max_epochs": 100,
    # An epoch of a sparse log has few steps: the metric may fluctuate for ten or more epochs.
    "training.patience": 20,
}

_ALL = (
    Recipe(
        "default",
        words="any log: two means of the history, one of them weighted by recency; one positive at "
        "a time",
    ),
    Recipe(
        "quick",
        {
            "model.negatives": (Uniform(256), Popularity(256)),
            "model.dim": 32,
            "training.examples": "sequences",
            "training.max_epochs": 10,
            "training.patience": 2,
            "training.learning_rate": 0.004,
            "evaluation.baselines": ("popularity", "repeats", "transitions", "ease"),
        },
        "a first look at a log with an order: small embeddings, sequence-level training, ten "
        "epochs at most, compared with popularity, transitions and EASE",
    ),
    Recipe(
        "sets",
        {
            "data.is_ordered": False,
            "model.negatives": (Popularity(2048, 0.5),),
            "model.dim": 128,
            "model.history_length": 300,
            "model.history_pooling": ("mean",),
            "model.history_dropout": 0.0,
            "model.candidate_bias": True,
            "model.item_init": "svd",
            # Between the best values for small and large catalogs: docs/archive/tried.md.
            "model.temperature": 0.12,
            "training.examples": "sets",
            "training.batch_size": 3072,
            "training.learning_rate": 0.01,
            "training.decay": "cosine",
            "training.warmup_steps": 10,
            "training.max_epochs": 40,
            # No early stop: as the rate falls, a model may improve again after ten epochs.
            "training.patience": 40,
        },
        "a log without an order: the mean of the history; a random half of a user's items is the "
        "input, the other half the target; users who come later are answered by their history",
    ),
    Recipe(
        "sequence",
        _SEQUENCE,
        "logs in which the order of the events tells what comes next: causal self-attention over "
        "the history, sequence-level training",
    ),
    Recipe(
        "sparse",
        {
            **_SEQUENCE,
            "model.dim": 128,
            "model.candidate_bias": True,
            "model.correction": "recent",
            "training.batch_size": 2048,
            "training.learning_rate": 0.004,
        },
        "ordered logs with few events per item: `sequence` with larger embeddings, and scores that "
        "follow what is popular at the end of the training",
    ),
    Recipe(
        "hybrid_1_100",
        {"model.hard": FunnelLosers(share=0.01)},
        "funnel logs: losers of pre-rank and rank have 1% of the negatives' weight",
        races=False,
    ),
    Recipe(
        "hybrid_50_50",
        {"model.hard": FunnelLosers(share=0.5)},
        "funnel logs, by the rule of thumb: losers have half of the negatives' weight",
        races=False,
    ),
)
PRESETS = {recipe.name: recipe for recipe in _ALL}
"""The recipes by name."""

RECIPES = tuple(name for name, recipe in PRESETS.items() if recipe.races)
"""Names of the recipes of a race, in the order in which they train: the fast ones first."""

if TYPE_CHECKING:
    RecipeName: TypeAlias = str
else:
    RecipeName: TypeAlias = Literal[RECIPES]
