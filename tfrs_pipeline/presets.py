"""Presets: settings for a kind of log, which flags may replace."""

from typing import Any, Literal, TypeAlias, get_args

from tfrs_pipeline.negatives.kinds import FunnelLosers, Popularity, Uniform

_SEQUENCE: dict[str, Any] = {
    "model.negatives": (Uniform(512), Popularity(512)),
    "model.history_length": 200,
    "model.history_pooling": ("attention",),
    "model.history_dropout": 0.2,
    "model.id_dropout": 0.01,
    "model.item_init": "svd",
    "model.feature_dim": 4,  # 16 lost on sparse 1M: docs/explanation/tried.md.
    "model.temperature": 0.1,
    "training.examples": "sequences",
    "training.max_epochs": 100,
    # An epoch of a sparse log has few steps: the metric may fluctuate for ten or more epochs.
    "training.patience": 20,
}

# Name -> its purpose, and the settings that it changes, by dotted name.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "quick": (
        "a first look at a log with an order: small embeddings, sequence-level training, ten "
        "epochs at most, compared with popularity, transitions and EASE",
        {
            "model.negatives": (Uniform(256), Popularity(256)),
            "model.dim": 32,
            "training.examples": "sequences",
            "training.max_epochs": 10,
            "training.patience": 2,
            "training.learning_rate": 0.004,
            "evaluation.baselines": ("popularity", "repeats", "transitions", "ease"),
        },
    ),
    "ids": (
        "a fixed set of users without an order in their events: an embedding for each user and "
        "item, no history, no features; users not in the log get the answer for an unknown user",
        {
            "data.item_features": {},
            "export.filter_by": None,
            "data.user_features": {},
            "model.use_user_id": True,
            "model.history_pooling": (),
            "model.id_dropout": 0.01,
        },
    ),
    "sets": (
        "a log without an order: the mean of the history; a random half of a user's items is the "
        "input, the other half the target; users who come later are answered by their history",
        {
            "data.is_ordered": False,
            "model.negatives": (Popularity(2048, 0.5),),
            "model.dim": 128,
            "model.history_length": 300,
            "model.history_pooling": ("mean",),
            "model.history_dropout": 0.0,
            "model.candidate_bias": True,
            "model.item_init": "svd",
            # Between the best values for small and large catalogs: docs/explanation/tried.md.
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
    ),
    "sequence": (
        "logs in which the order of the events tells what comes next: causal self-attention over "
        "the history, sequence-level training",
        _SEQUENCE,
    ),
    "sparse": (
        "ordered logs with few events per item: `sequence` with larger embeddings, and scores that "
        "follow what is popular at the end of the training",
        {
            **_SEQUENCE,
            "model.dim": 128,
            "model.candidate_bias": True,
            "model.correction": "recent",
            "training.batch_size": 2048,
            "training.learning_rate": 0.004,
        },
    ),
    "hybrid_1_100": (
        "funnel logs: losers of pre-rank and rank have 1% of the negatives' weight",
        {"model.hard": FunnelLosers(share=0.01)},
    ),
    "hybrid_50_50": (
        "funnel logs, by the rule of thumb: losers have half of the negatives' weight",
        {"model.hard": FunnelLosers(share=0.5)},
    ),
}

Recipe: TypeAlias = Literal["default", "quick", "sequence", "sparse", "sets"]
RECIPES: tuple[Recipe, ...] = get_args(Recipe)
"""The recipes of a race, in the order in which they train; "default" changes no setting."""


def recipe(name: str) -> dict[str, Any]:
    """Returns a recipe's settings of the model and its training, by dotted name.

    Settings of data, split and evaluation are left out, so that all recipes have one validation.
    """
    settings = {} if name == "default" else PRESETS[name][1]
    return {name: x for name, x in settings.items() if name.startswith(("model.", "training."))}
