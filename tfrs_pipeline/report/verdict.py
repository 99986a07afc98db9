"""What a run's numbers come to, in words, and what to try where a baseline wins.

All from `metrics.json`, for the terminal and the page alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tfrs_pipeline.settings import counted

# Fewer positives an item than this leave an embedding an item little to learn from.
_FEW_POSITIVES = 10
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
    """Tells whether the model is better than each other, by 95% intervals of the difference."""
    first, others = _first(metrics), metrics["differences"]
    measured = {name: x[metric] for name, x in others.items() if x[metric]["low"] is not None}
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
    x = measured[nearest]
    gap = f"the nearest, {nearest}: {x['mean']:+.4f} [{x['low']:+.4f}, {x['high']:+.4f}]"
    answer = "no" if ahead else "not clearly" if level else "yes"
    return Verdict(answer, f"in {metric} {'; '.join(parts)} ({gap})", answer == "yes")


def by_popularity(metrics: Metrics, metric: str) -> Verdict:
    """Tells where in popularity the model is ahead of all baselines, and where one is ahead.

    Another form of the model itself, such as the uncorrected one, is no baseline.
    """
    first, *others = metrics["models"]
    found: dict[str, list[str]] = {"ahead in": [], "level in": [], "behind in": []}
    for part in metrics["models"][first]["slices"]:
        of_part = {n: m["slices"][part][metric] for n, m in metrics["models"].items()}
        rivals = {n: of_part[n] for n in _baselines(others) if of_part[n]["low"] is not None}
        own = of_part[first]
        if own["low"] is None or not rivals:
            continue
        name, best = max(rivals.items(), key=lambda item: item[1]["mean"])
        if own["low"] > best["high"]:
            found["ahead in"].append(part)
        elif own["high"] < best["low"]:
            found["behind in"].append(f"{part} ({own['mean']:.2f}, {name} {best['mean']:.2f})")
        else:
            found["level in"].append(part)
    passed = _listed(_baselines(others)) if found["ahead in"] else ""
    words = [
        (found["ahead in"], f"ahead of {passed} in the"),
        (found["level in"], "level with the best one in the"),
        (found["behind in"], "behind one in the"),
    ]
    why = "; ".join(f"{word} {_listed(parts)}" for parts, word in words if parts)
    if not why:
        return Verdict("not compared", "no baseline was measured beside it", None)
    is_good = not found["behind in"] or (None if found["ahead in"] or found["level in"] else False)
    answer = next(f"{word} the {_listed(found[word])}" for word in found if found[word])
    return Verdict(answer.partition(" (")[0], f"in {metric} {why}", is_good)


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


def advice(metrics: Metrics, metric: str, monitor: str) -> Iterator[str]:
    """Says what to try, each from what was measured; nothing where the model is clearly better.

    The models are compared by `metric`; `monitor` chose the epoch on validation.
    """
    if compared_with_baselines(metrics, metric).is_good is not False:
        return
    first, models = _first(metrics), metrics["models"]
    training = metrics["training"][first]
    values = training["history"].get(f"val_{monitor}", [])
    if training["best_epoch"] == len(values):
        yield (
            f"trained too shortly: validation {monitor} was best after the last of "
            f"{counted(len(values), 'epoch')}. Raise training.max_epochs"
        )
    num_positives, num_items = metrics["split"]["train"]["num_positives"], _num_items(metrics)
    if num_positives < _FEW_POSITIVES * num_items:
        yield (
            f"too few positives: {num_positives:,} in training for {num_items:,} items, "
            f"{num_positives / num_items:.1f} each. A longer log, item features "
            "(data.item_features), or a smaller model.dim"
        )
    if "popularity" in models:
        popular = models["popularity"][metric]
        reading = {n: models[n][metric] for n in _READS_HISTORIES if n in models}
        if (
            reading
            and popular["high"]
            and all(x["mean"] <= popular["high"] for x in reading.values())
        ):
            yield (
                f"little signal in the histories: {_listed(reading)}, which read them too, "
                f"{'does' if len(reading) == 1 else 'do'} not clearly beat popularity either. "
                "Look at what counts as a click, and whether training and test are of one time"
            )
    uncorrected = metrics["differences"].get("two_tower_uncorrected", {}).get(metric)
    if uncorrected and (uncorrected["low"] or 0) > 0:
        yield (
            "the correction costs here: two_tower_uncorrected is better. Set model.correction none"
        )


def _first(metrics: Metrics) -> str:
    return str(next(iter(metrics["models"])))


def _num_items(metrics: Metrics) -> int:
    slices = metrics["models"][_first(metrics)]["slices"].values()
    return max(sum(part["num_candidates"] for part in slices), 1)


def _baselines(names: Sequence[str]) -> list[str]:
    return [name for name in names if not name.startswith("two_tower")]


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
