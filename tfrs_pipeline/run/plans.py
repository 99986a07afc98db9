"""The sampling plans of a comparison: the negatives with which each is trained."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from tfrs_pipeline.config import RunConfig, with_settings
from tfrs_pipeline.negatives.hard import FunnelLosers, Mined
from tfrs_pipeline.negatives.kinds import InBatch, Popularity, Uniform

Plan: TypeAlias = Mapping[str, Any]
"""A way of choosing negatives: the settings that it changes in the config, by dotted name."""

# Columns that a row draws from its hard negatives, in plans of one stage and of several.
NUM_HARD = 8


def every_loser(config: RunConfig) -> FunnelLosers:
    """Returns losers of every stage that any plan may need; each plan draws from its own."""
    losers = _losers_of(config)
    stages = losers.stages
    if "exposed" in config.compare.plans and "exposed" not in stages:
        stages = (*stages, "exposed")
    return dataclasses.replace(losers, stages=stages, allow_exposed="exposed" in stages)


def _losers_of(config: RunConfig) -> FunnelLosers:
    hard = config.model.hard
    return hard if isinstance(hard, FunnelLosers) else FunnelLosers()


def sampling_plans(
    config: RunConfig, logged: Sequence[str], num_candidates: int, max_epochs: int | None = None
) -> tuple[dict[str, Plan], list[str]]:
    """Turns the plans of a config into settings by name, with notes on those that are missing.

    `logged` are the stages whose losers the samples hold. Raises a `ValueError` if the reference is
    missing, or a plan contradicts the other settings.
    """
    common: dict[str, Any] = {
        "model.correction": "mixture",
        "model.hard": None,
        "model.resampling_exponent": 0.0,
    }
    notes: list[str] = []
    if config.training.examples != "single":
        # The same for every plan, because in-batch negatives need single examples.
        common["training.examples"] = "single"
        notes.append("every plan is trained with training.examples 'single'")
    plans: dict[str, Plan] = {}
    for kind in config.compare.plans:
        found, note = _plans_of_kind(
            kind, config, logged, num_candidates, max_epochs or config.training.max_epochs
        )
        plans |= {name: {**common, **plan} for name, plan in found.items()}
        notes += [note] if note else []
    if config.compare.reference not in plans:
        raise ValueError(
            f"compare.reference is {config.compare.reference!r}, a plan that is missing here "
            f"({'; '.join(notes)}). Choose another reference."
        )
    for plan in plans.values():  # Refused before the first one is trained.
        with_settings(config, plan)
    return plans, notes


def _plans_of_kind(
    kind: str, config: RunConfig, logged: Sequence[str], num_candidates: int, max_epochs: int
) -> tuple[dict[str, Plan], str]:
    """Returns the plans of a kind, one for each of its values, and a note on them."""
    # Every plan but in-batch has as many shared columns as the config's mixture.
    num = sum(
        config.training.batch_size - 1 if isinstance(shared, InBatch) else shared.num
        for shared in config.model.negatives
    )
    in_batch = {"model.negatives": (InBatch(),)}
    simple: dict[str, Plan] = {
        "in_batch_uncorrected": {**in_batch, "model.correction": "none"},
        "in_batch": in_batch,
        "uniform": {"model.negatives": (Uniform(num),)},
        "popularity": {"model.negatives": (Popularity(num),)},
        "mixed": {},
    }
    if kind in simple:
        return {kind: simple[kind]}, ""
    if kind == "resampled":
        return {
            f"resampled_{exponent:g}": {"model.resampling_exponent": exponent}
            for exponent in config.compare.resampling_exponents
        }, ""
    hard, note = _hard_kind(kind, config, logged, num_candidates, max_epochs)
    if hard is None:
        return {}, f"plan {kind} is missing: {note}"
    name = "mined" if isinstance(hard, Mined) else "exposed" if kind == "exposed" else "hybrid"
    shares = (0.5,) if kind == "hybrid_50_50" else config.compare.hard_shares
    return {
        f"{name}_50_50" if share == 0.5 else f"{name}_{share:g}": {
            "model.hard": dataclasses.replace(hard, share=share)
        }
        for share in shares
    }, note


def _hard_kind(
    kind: str, config: RunConfig, logged: Sequence[str], num_candidates: int, max_epochs: int
) -> tuple[FunnelLosers | Mined | None, str]:
    """Chooses the hard negatives of a kind of plan, or None, with a reason or a note."""
    losers = _losers_of(config)
    stages = tuple(stage for stage in losers.stages if stage in logged)
    if kind == "exposed":
        hard = FunnelLosers(stages=("exposed",), num=NUM_HARD, allow_exposed=True)
        return (hard, "") if "exposed" in logged else (None, "the log holds no exposed items")
    if kind != "mined" and stages:
        if not isinstance(config.model.hard, FunnelLosers):
            losers = dataclasses.replace(losers, num=NUM_HARD // len(stages))
        return losers.of_stages(stages), ""
    mined = config.model.hard if isinstance(config.model.hard, Mined) else Mined(num=NUM_HARD)
    if mined.every >= max_epochs:
        return None, (
            f"negatives are mined every {mined.every} epochs (model.hard.every), and a plan has "
            f"{max_epochs} (training.max_epochs, compare.max_steps)"
        )
    if num_candidates <= mined.min_rank:
        rank = mined.min_rank
        return None, f"{num_candidates:,} items have no rank {rank} (model.hard.min_rank)"
    if kind == "mined":
        return mined, ""
    of_stages = " or ".join(losers.stages)
    return mined, f"plan {kind}: the log holds no losers of {of_stages}; mined instead"
