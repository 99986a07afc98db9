"""Explains a run's numbers in words, from `metrics.json`; the terminal and the page show them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tfrs_pipeline.data.schema import ASKED
from tfrs_pipeline.evaluation.bootstrap import Interval, Outcome
from tfrs_pipeline.serving.index import SMALLEST_SCANN_CORPUS

Metrics = Mapping[str, Any]
# Readable names of the models in a run.
WRITTEN = {
    "transitions": "item-to-item transitions",
    "ease": "EASE",
    "ials": "iALS",
    "two_tower_uncorrected": "the model trained without the correction",
    "in_service": "the model in service",
}
# What the slices hold, for a reader who does not know their names.
_ITEMS = {"head": "popular", "torso": "middling", "tail": "rare"}
# What the model does with a baseline.
_VERBS = {Outcome.WORSE: "is behind", Outcome.LEVEL: "ties with", Outcome.BETTER: "beats"}


@dataclass(frozen=True)
class Compared:
    """The model compared with another by one metric: both means, and the model minus the other."""

    name: str  # For people.
    is_variant: bool  # A variant of the model, or the version in service: not a baseline.
    own: float
    other: float
    gain: Interval


@dataclass(frozen=True)
class Verdict:
    """The answer to a question about a run, the reason, and the outcome if it was measured."""

    answer: str
    why: str
    outcome: Outcome | None


def _compare(metrics: Metrics, metric: str, part: str = "") -> list[Compared]:
    """Compares the first model with each other one that has an interval; `part` is a slice."""
    models = {
        name: (model["slices"][part] if part else model)[metric]["mean"]
        for name, model in metrics["models"].items()
    }
    own, *_ = models.values()
    found = []
    for name, differences in metrics["differences"].items():
        x = differences[f"{part}/{metric}" if part else metric]
        if x["low"] is not None:
            gain = _gain(x)
            is_variant = name.startswith("two_tower_") or name == "in_service"
            written = WRITTEN.get(name, name)
            found.append(Compared(written, is_variant, own, models[name], gain))
    return found


def _gain(difference: Mapping[str, Any]) -> Interval:
    """Turns another model minus the first into the first minus the other."""
    # 0.0 - x, because -x would print zero as -0.0.
    return Interval(*(0.0 - difference[end] for end in ("mean", "high", "low")))


def gains(metrics: Metrics, metric: str) -> dict[str, dict[str, Any]]:
    """Returns the first model minus each other one that has an interval: mean, low and high."""
    return {
        name: _gain(differences[metric]).as_dict()
        for name, differences in metrics["differences"].items()
        if differences[metric]["low"] is not None
    }


def exported(metrics: Metrics) -> Verdict:
    """Says whether the run's model is in service, and where or why not."""
    folder, refusal = metrics.get("export_folder"), metrics.get("refusal")
    if folder is not None:
        return Verdict("exported", f"as {folder}", Outcome.BETTER)
    if refusal is None:
        return Verdict("not exported", "export.index is none", None)
    return Verdict("not exported", refusal.removesuffix("."), Outcome.WORSE)


def compared_with_baselines(metrics: Metrics, metric: str) -> Verdict:
    """Says whether the model is better than each baseline, by the question that was asked."""
    compared = [x for x in _compare(metrics, metric) if not x.is_variant]
    if not compared:
        return Verdict("not compared", "no baseline was measured beside it", None)
    best, *others = sorted(compared, key=lambda x: x.gain.mean)
    parts = [
        f"it {_VERBS[best.gain.outcome]} the best baseline, {best.name}: {best.gain.written('+')}"
    ]
    for outcome, verb in _VERBS.items():
        if names := [x.name for x in others if x.gain.outcome is outcome]:
            parts.append(f"it {verb} {listed(names)}")
    lowest = _lowest(compared)
    answers = {Outcome.BETTER: "yes", Outcome.LEVEL: "a tie", Outcome.WORSE: "no"}
    asked = ASKED[metrics["asked_by"]]
    return Verdict(answers[lowest], f"{asked}, in {metric} {'; '.join(parts)}", lowest)


def remarks(metrics: Metrics, metric: str, recall: str) -> dict[str, str]:
    """Returns the other findings that were measured and matter, by heading."""
    found = {
        "but": other_question(metrics, metric),
        "evenly": shown_evenly(metrics, recall),
    }
    return {head: text for head, text in found.items() if text is not None}


def other_question(metrics: Metrics, metric: str) -> str | None:
    """Says how the other question would decide; None if that is the same, or there is none."""
    other = metrics.get("other", {})
    if "models" not in other:
        return None
    decisive, otherwise = (compared_with_baselines(asked, metric) for asked in (metrics, other))
    best, best_otherwise = (
        max(asked["models"], key=lambda name: asked["models"][name][metric]["mean"] or 0.0)
        for asked in (metrics, other)
    )
    if decisive.outcome is otherwise.outcome and best == best_otherwise:
        return None
    by = other["asked_by"]
    for_whom = "lists that are made once, as for a daily mail" if by == "users" else "a service"
    return (
        f"{otherwise.answer}, {otherwise.why}. For {for_whom}, decide by that: set evaluation.by "
        f"to {by}"
    )


def by_popularity(metrics: Metrics, metric: str) -> Verdict:
    """Says for which items the model beats every baseline or is beaten, or variants find more.

    `metric` is recall@k. A slice of at most k items says nothing: one list could hold all of it.
    """
    slices: dict[Outcome, list[str]] = {}
    clauses, variants, reason = [], [], "no baseline was measured beside it"
    fewer = {
        x.name: f", but fewer of all items ({x.other:.2f} against {x.own:.2f})"
        for x in _compare(metrics, metric)
        if x.gain.outcome is Outcome.BETTER
    }
    k = int(metric.partition("@")[2])
    for part, own in next(iter(metrics["models"].values()))["slices"].items():
        compared = _compare(metrics, metric, part)
        baselines = [x for x in compared if not x.is_variant]
        if not baselines:
            continue
        if own["num_candidates"] <= k:
            reason = f"one list of {k} could hold all items of a slice"
            continue
        lowest, items = _lowest(baselines), f"{_ITEMS[part]} items ({part})"
        slices.setdefault(lowest, []).append(items)
        best = max((x for x in baselines if x.gain.outcome is lowest), key=lambda x: x.other)
        numbers = f"({best.own:.2f} against {best.other:.2f})"
        clauses.append(f"{items}: it {_VERBS[lowest]} {best.name} {numbers}")
        more = f"{'still ' if lowest is Outcome.BETTER else ''}more {_ITEMS[part]} items"
        variants += [
            f"{x.name} finds {more} ({x.other:.2f} against {x.own:.2f}){fewer.get(x.name, '')}"
            for x in compared
            if x.is_variant and x.gain.outcome is Outcome.WORSE
        ]
    if not clauses:
        return Verdict("not compared", reason, None)
    first = min(slices, key=[*Outcome].index)
    outcome = first if len(slices) == 1 else Outcome.LEVEL
    why = f"by {metric}, {'; '.join([*clauses, *variants])}"
    answer = f"{_VERBS[first]} the best baseline for {listed(slices[first])}"
    return Verdict(answer, why, outcome)


def shown_evenly(metrics: Metrics, metric: str) -> str | None:
    """Says for which models a recall and its even form, if there is one, clearly disagree."""
    if f"even_{metric}" not in next(iter(metrics["models"].values())):
        return None
    even = {x.name: x for x in _compare(metrics, f"even_{metric}")}
    told = []
    for plain in _compare(metrics, metric):
        both = plain, even[plain.name]
        if {x.gain.outcome for x in both} == {Outcome.BETTER, Outcome.WORSE}:
            found, evenly = (f"{x.other:.2f} against {x.own:.2f}" for x in both)
            words = ("more", "less") if plain.gain.outcome is Outcome.WORSE else ("less", "more")
            told.append(
                f"{plain.name} finds {words[0]} of what users clicked ({found}), but {words[1]} "
                f"as if the log had shown every item equally often ({evenly})"
            )
    if not told:
        return None
    return (
        f"by {metric} and even_{metric}, {'; '.join(told)}: go by the second if the log's "
        "recommender favours popular items more than users do (docs/guides/negatives.md)"
    )


def found_by_index(index: Metrics, num_items: int) -> Verdict:
    """Says which share of the exact answers the index loses, and whether it is worth having."""
    if index["kind"] == "exact":
        return Verdict("nothing", "search is exact: it scores every item", Outcome.BETTER)
    if index["kind"] != "scann":
        return Verdict("there is none", index["kind"], None)
    target = index["target_recall"]
    lowest = min((x["recall"] for x in index.get("requests", [])), default=None)
    if lowest is None:
        return Verdict("not measured", f"tuned to find {target:.0%} of the exact answer", None)
    why = f"it finds at least {lowest:.1%} of the exact answer; the target is {target:.0%}"
    if lowest < target:
        return Verdict(f"{1 - lowest:.1%}, more than allowed", why, Outcome.WORSE)
    if num_items < SMALLEST_SCANN_CORPUS:
        why += f". With {num_items:,} items exact search is as fast and loses nothing"
        return Verdict(f"at most {1 - lowest:.1%}, and gains no time", why, Outcome.LEVEL)
    return Verdict(f"at most {1 - lowest:.1%}", why, Outcome.BETTER)


def _lowest(compared: Sequence[Compared]) -> Outcome:
    """Worse if any is worse, better if all are better, else level."""
    return max((x.gain.outcome for x in compared), key=[*Outcome].index)


def listed(names: Sequence[str]) -> str:
    """Writes names as "a, b and c"."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
