"""What a run's numbers come to, in words, and what to try where a baseline wins.

All from `metrics.json` and the run's settings, for the terminal and the page alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.messages import counted
from tfrs_pipeline.presets import PRESETS

# Fewer positives an item than this leave an embedding an item little to learn from.
_FEW_POSITIVES = 10
# Numbers a feature beyond which no more are suggested: docs/guides/new_items.md.
_LARGE_FEATURE_DIM = 32
_NOT_EMBEDDED = {"numeric", "timestamp"}  # Kinds that model.feature_dim is nothing to.
# Of what is new to a model, a share that its numbers are mostly about.
_MANY_NEW = 0.3
# Above it a model tends to rank by popularity alone: docs/guides/debugging.md.
_HIGH_TEMPERATURE = 0.2
_READS_HISTORIES = ("ease", "ials")

Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """An answer to one of the questions that a run is made for, and the sentence that it rests on.

    `is_good` says whether it is what one hopes for; None where it is neither.
    """

    answer: str
    why: str
    is_good: bool | None


def compared_with_baselines(metrics: Metrics, metric: str) -> Verdict:
    """Tells whether the model is better than each baseline, by 95% intervals of the difference.

    Another form of the model itself, such as the uncorrected one or the version in service, is no
    baseline.
    """
    first, *_ = metrics["models"]
    others = {n: x[metric] for n, x in metrics["differences"].items() if not _is_form(n)}
    measured = {name: x for name, x in others.items() if x["low"] is not None}
    ahead = [name for name, x in measured.items() if x["low"] > 0]
    behind = [name for name, x in measured.items() if x["high"] < 0]
    level = [name for name in measured if name not in (*ahead, *behind)]
    if not measured:
        return Verdict("not compared", f"no other model was measured beside {first}", None)
    parts = []
    if ahead:
        parts.append(f"{_listed(ahead)} {'is' if len(ahead) == 1 else 'are'} better than {first}")
    if level:
        parts.append(f"{first} does not clearly differ from {_listed(level)}")
    if behind:
        parts.append(f"{first} is better than {_listed(behind)}")
    nearest = max(measured, key=lambda name: measured[name]["mean"])
    gap = f"the nearest, {nearest}, is {_gap(measured[nearest])}"
    answer = "no" if ahead else "not clearly" if level else "yes"
    return Verdict(answer, f"in {metric} {'; '.join(parts)} ({gap})", answer == "yes")


def by_popularity(metrics: Metrics, metric: str) -> Verdict:
    """Tells where in popularity the model is ahead of all baselines, and where one is ahead.

    By 95% intervals of the difference, query by query. Another form of the model itself, such as
    the uncorrected one, is no baseline; where it finds more, that is said besides.
    """
    first, *others = metrics["models"]
    baselines = [name for name in others if not _is_form(name)]
    found: dict[str, list[str]] = {"ahead in": [], "level in": [], "behind in": []}
    other_forms: list[str] = []
    for part in metrics["models"][first]["slices"]:
        means = {n: m["slices"][part][metric]["mean"] for n, m in metrics["models"].items()}
        above = {
            name: x[f"{part}/{metric}"]
            for name, x in metrics["differences"].items()
            if x[f"{part}/{metric}"]["low"] is not None
        }
        rivals = {name: above[name] for name in baselines if name in above}
        if not rivals:
            continue
        shown = {name: f"{part} ({means[first]:.2f}, {name} {means[name]:.2f})" for name in above}
        ahead = [name for name, x in rivals.items() if x["low"] > 0]
        if all(x["high"] < 0 for x in rivals.values()):
            found["ahead in"].append(part)
        elif ahead:
            found["behind in"].append(shown[max(ahead, key=lambda name: rivals[name]["mean"])])
        else:
            found["level in"].append(part)
        better = (name for name, x in above.items() if name not in rivals and x["low"] > 0)
        other_forms += [shown[name] for name in better]
    passed = _listed(baselines) if found["ahead in"] else ""
    words: list[tuple[list[str], str]] = [
        (found["ahead in"], f"ahead of {passed} in the"),
        (found["level in"], "level with the best one in the"),
        (found["behind in"], "behind one in the"),
    ]
    why = "; ".join(f"{word} {_listed(parts)}" for parts, word in words if parts)
    if not why:
        return Verdict("not compared", "no baseline was measured beside it", None)
    if other_forms:
        why += f"; another form of it finds more in the {_listed(other_forms)}"
    is_good = not found["behind in"] or (None if found["ahead in"] or found["level in"] else False)
    answer = next(f"{word} the {_listed(found[word])}" for word in found if found[word])
    return Verdict(answer.partition(" (")[0], f"in {metric} it is {why}", is_good)


def found_by_index(index: Metrics) -> Verdict:
    """Tells what the index finds of the exact answers."""
    if index["kind"] != "scann":
        exact = index["kind"] == "exact"
        why = "exact search: nothing is lost" if exact else index["kind"]
        return Verdict("exact" if exact else "none", why, True if exact else None)
    requests = index.get("requests", [])
    lowest = min((x["recall"] for x in requests), default=None)
    target = index["target_recall"]
    if lowest is None:
        return Verdict("not measured", f"tuned to find {target:.0%} of the exact answer", None)
    why = f"at least {lowest:.1%} of the exact answer is found, where {target:.0%} were asked for"
    return Verdict("yes" if lowest >= target else "below its target", why, lowest >= target)


def advice(metrics: Metrics, metric: str, config: RunConfig) -> Iterator[str]:
    """Says what to try, each from what was measured.

    The models are compared by `metric`; where this one is clearly better, only what would be more
    or otherwise measured is said. What the run's settings have already is not suggested.
    """
    models, monitor = metrics["models"], config.training.monitor
    first, *_ = models
    measures = list(_beside_the_question(models[first], config))
    yield from measures
    training = metrics["training"][first]
    values = training["history"].get(f"val_{monitor}", [])
    if training["best_epoch"] == len(values):
        yield (
            f"trained too shortly: validation {monitor} was best after the last of "
            f"{counted(len(values), 'epoch')}. Raise training.max_epochs"
        )
    if measures:  # What else the numbers say would be of another question.
        return
    if _is_better("two_tower_uncorrected", metrics, metric):
        yield (
            "the correction costs here: two_tower_uncorrected is better. Set model.correction none"
        )
    if compared_with_baselines(metrics, metric).is_good is not False:
        return
    slices = models[first]["slices"].values()
    num_items = max(sum(part["num_candidates"] for part in slices), 1)
    num_positives = metrics["split"]["train"]["num_positives"]
    is_small = num_positives < _FEW_POSITIVES * num_items
    if is_small:
        yield (
            f"too few positives: {num_positives:,} in training for {num_items:,} items, "
            f"{num_positives / num_items:.1f} each. A longer log, or {_for_few_positives(config)}"
        )
    if "popularity" in models:
        yield from _beside_popularity(metrics, metric, config)
    if not _is_better("popularity", metrics, metric):
        yield from _behind_linear_models(metrics, metric, config, is_small)


def _for_few_positives(config: RunConfig) -> str:
    """Says what may help, besides a longer log, where items have few positives."""
    features, length = config.data.item_features, config.model.feature_dim
    if not features:
        return "item features (data.item_features)"
    if length < _LARGE_FEATURE_DIM and not set(features.values()) <= _NOT_EMBEDDED:
        return f"a model.feature_dim above {length}"
    return "a smaller model.dim"


def _beside_the_question(model: Metrics, config: RunConfig) -> Iterator[str]:
    """Says what the test measures instead of how well a user's next items are found."""
    num_queries, num_empty = model["num_queries"], model.get("num_empty_histories", 0)
    if num_empty > num_queries / 2:
        remedy = ". To measure users by their history set split.kind to last_share"
        yield (
            f"{num_empty:,} of {num_queries:,} test queries have an empty history: the test is of "
            f"new users{remedy if config.split.kind != 'last_share' else ''}"
        )
    num_left, num_excluded = model["num_relevant"], model["num_relevant_excluded"]
    if num_excluded > num_left and config.evaluation.exclude != "none":
        yield (
            f"{num_excluded:,} of {num_left + num_excluded:,} items to find are excluded, since "
            f"their users had {config.evaluation.exclude} them before. If they may come again, set "
            "evaluation.exclude to none"
        )
    num_new = model.get("num_relevant_unclicked", 0)
    if num_new > _MANY_NEW * num_left:
        features = "" if config.data.item_features else ", of which data.item_features has none"
        yield (
            f"{num_new:,} of {num_left:,} items to find have no positive in training: only their "
            f"features can find them{features} (docs/guides/new_items.md)"
        )


def _is_form(name: str) -> bool:
    """Whether a model is another form of the two-tower model, or an earlier version of it."""
    # As serving.gate calls it: the page needs nothing else of there.
    return name.startswith("two_tower_") or name == "in_service"


def _beside_popularity(metrics: Metrics, metric: str, config: RunConfig) -> Iterator[str]:
    """Says what to try where popularity is better, or as good as what reads histories."""
    models, model = metrics["models"], config.model
    remedies = []
    if model.use_candidate_id and not model.candidate_bias:
        remedies.append("set model.candidate_bias")
    if model.temperature < _HIGH_TEMPERATURE:
        remedies.append(f"raise model.temperature, which is {model.temperature:g}")
    if config.split.kind in (None, "time"):
        remedies.append("see with split.kind last_share whether what is popular has changed")
    if remedies and _is_better("popularity", metrics, metric):
        yield f"behind popularity: {', or '.join(remedies)}"
    popular = models["popularity"][metric]
    reading = {n: models[n][metric] for n in _READS_HISTORIES if n in models}
    if reading and popular["high"] and all(x["mean"] <= popular["high"] for x in reading.values()):
        is_one = len(reading) == 1
        yield (
            f"{_listed(reading)}, which {'reads' if is_one else 'read'} neither order nor "
            f"features, {'does' if is_one else 'do'} not clearly beat popularity either. "
            "Look at what counts as a click, and whether training and test are of one time"
        )


def _behind_linear_models(
    metrics: Metrics, metric: str, config: RunConfig, is_small: bool
) -> Iterator[str]:
    """Says what to try where EASE or iALS is better than the model."""
    better = [name for name in _READS_HISTORIES if _is_better(name, metrics, metric)]
    if not better:
        return
    model, remedies = config.model, []
    if all(attrgetter(name)(config) == value for name, value in PRESETS["quick"][1].items()):
        remedies.append("leave out --preset quick, a small model of ten epochs at most")
    else:
        if not config.data.is_ordered and config.training.examples != "sets":
            remedies.append("take --preset sets")
        reads_ids = model.use_candidate_id or model.history_pooling
        if reads_ids and model.item_init == "random" and config.warm_start is None:
            remedies.append("set model.item_init svd")
        if not (config.data.item_features or is_small):  # If it is small, that has been said.
            remedies.append("give features of the items (data.item_features)")
        remedies.append("more model.negatives")
    yield f"behind {_listed(better)}: {', or '.join(remedies)}"


def _is_better(name: str, metrics: Metrics, metric: str) -> bool:
    """Whether another model is clearly better than the first."""
    above = metrics["differences"].get(name, {}).get(metric)
    return bool(above) and (above["low"] or 0) > 0


def _gap(above: Mapping[str, float]) -> str:
    """Says by how much another is behind or ahead, as positive numbers with their interval."""
    mean, low, high = above["mean"], above["low"], above["high"]
    if mean <= 0:
        # Not -0.0, which would be shown with its sign.
        mean, low, high = 0.0 - mean, 0.0 - high, 0.0 - low
    return f"{mean:.4f} [{low:.4f}, {high:.4f}] {'ahead' if above['mean'] > 0 else 'behind'}"


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
