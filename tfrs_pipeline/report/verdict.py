"""Explains a run's numbers in words, from `metrics.json`; the terminal and the page show them.

Each question compares the model with others by one metric. The outcome of the paired difference
chooses the sentence: `ANSWERS` and `VERBS` have the words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tfrs_pipeline.data.schema import ASKED
from tfrs_pipeline.evaluation.bootstrap import Interval, Outcome
from tfrs_pipeline.evaluation.results import find_metric
from tfrs_pipeline.search.settings import SMALLEST_SCANN_CORPUS

Metrics = Mapping[str, Any]
# Outcomes of the model against a baseline: the answer to "is it better?", and what it does.
ANSWERS = {Outcome.WORSE: "no", Outcome.LEVEL: "a tie", Outcome.BETTER: "yes"}
VERBS = {Outcome.WORSE: "is behind", Outcome.LEVEL: "ties with", Outcome.BETTER: "beats"}
# Other models of a run, which are no baselines.
_VARIANTS = {
    "two_tower_uncorrected": "the model trained without the correction",
    "in_service": "the model in service",
    "best_member": "the best recipe alone",
}
# What the slices hold, for a reader who does not know their names.
_ITEMS = {"head": "popular", "torso": "middling", "tail": "rare"}


@dataclass(frozen=True)
class Compared:
    """The model compared with another by one metric: both means, and the model minus the other."""

    name: str  # For people.
    mine: float
    theirs: float
    gain: Interval

    @property
    def outcome(self) -> Outcome:
        """What the model does: it is better, level or worse."""
        return self.gain.outcome


@dataclass(frozen=True)
class Verdict:
    """The answer to a question about a run, the reason, and the outcome if it was measured."""

    answer: str
    why: str
    outcome: Outcome | None


def compared(metrics: Metrics, column: str) -> dict[str, Compared]:
    """Compares the first model with each other one that has an interval, by its name in the run.

    `column` is a metric, or a metric in a slice, such as "tail/recall@20".
    """
    from tfrs_pipeline.evaluation.baselines import BASELINES  # Imports the libraries of logs.

    means = {name: find_metric(x, column) for name, x in metrics["models"].items()}
    first, *_ = means.values()
    labels = _VARIANTS | {name: baseline.label for name, baseline in BASELINES.items()}
    pairs = {}
    for name, differences in metrics["differences"].items():
        gap = differences.get(column)
        if gap is not None and gap["low"] is not None:
            # From another model minus the first to the first minus the other. Taken from 0.0,
            # because -x would print zero as -0.0.
            gain = Interval(*(0.0 - gap[end] for end in ("mean", "high", "low")))
            label = labels.get(name, name)
            pairs[name] = Compared(label, first["mean"], means[name]["mean"], gain)
    return pairs


def baselines_in(metrics: Metrics, column: str) -> list[Compared]:
    """Compares the model with the baselines alone."""
    return [x for name, x in compared(metrics, column).items() if name not in _VARIANTS]


def exported(metrics: Metrics) -> Verdict:
    """Says whether the run's model is in service, and where or why not."""
    folder, refusal = metrics.get("export_folder"), metrics.get("refusal")
    if folder is not None:
        return Verdict("exported", f"as {folder}", Outcome.BETTER)
    # Without a refusal, an export was not asked for.
    if refusal is None:
        return Verdict("not exported", "export.index is none", None)
    return Verdict("not exported", refusal.removesuffix("."), Outcome.WORSE)


def compared_with_baselines(metrics: Metrics, metric: str) -> Verdict:
    """Says whether the model is better than each baseline, by the question that was asked."""
    pairs = sorted(baselines_in(metrics, metric), key=lambda x: x.gain.mean)
    if not pairs:
        return Verdict("not compared", "no baseline was measured beside it", None)
    best, *others = pairs  # The baseline with the smallest gain is the one to beat.
    clauses = [f"it {VERBS[best.outcome]} the best baseline, {best.name}: {best.gain.written('+')}"]
    for outcome, verb in VERBS.items():
        if names := [x.name for x in others if x.outcome is outcome]:
            clauses.append(f"it {verb} {listed(names)}")
    lowest, asked = _lowest(pairs), ASKED[metrics["asked_by"]]
    return Verdict(ANSWERS[lowest], f"{asked}, in {metric} {'; '.join(clauses)}", lowest)


def other_question(metrics: Metrics, metric: str) -> str | None:
    """Says how the other question would decide; None if that is the same, or there is none."""
    other = metrics.get("other", {})
    if "models" not in other:
        return None
    decisive, otherwise = (compared_with_baselines(x, metric) for x in (metrics, other))
    # Also if another model is highest, since that one would be put into service.
    best, best_otherwise = (
        max(question["models"], key=lambda x: question["models"][x][metric]["mean"] or 0.0)
        for question in (metrics, other)
    )
    if decisive.outcome is otherwise.outcome and best == best_otherwise:
        return None
    by, why = other["asked_by"], otherwise.why
    if best != best_otherwise:
        why += f"; there {best_otherwise} is highest, here {best}"
    for_whom = "lists that are made once, as for a daily mail" if by == "users" else "a service"
    return f"{otherwise.answer}, {why}. For {for_whom}, decide by that: set evaluation.by to {by}"


def by_popularity(metrics: Metrics, metric: str) -> Verdict:
    """Says for which items the model beats every baseline, and for which one beats it.

    `metric` is recall@k. A slice of at most k items says nothing: one list could hold all of it.
    """
    k, reason = int(metric.partition("@")[2]), "no baseline was measured beside it"
    slices: dict[Outcome, list[str]] = {}
    clauses, small = [], []
    for part, size in next(iter(metrics["models"].values()))["slices"].items():
        if not (pairs := baselines_in(metrics, f"{part}/{metric}")):
            continue
        items = f"{_ITEMS[part]} items ({part})"
        if size["num_candidates"] <= k:
            small.append(items)
            continue
        lowest = _lowest(pairs)
        slices.setdefault(lowest, []).append(items)
        # Of those that decide the outcome, the one that finds most.
        best = max((x for x in pairs if x.outcome is lowest), key=lambda x: x.theirs)
        # A sum that finds fewer items than one of its members may still beat every baseline.
        alone = compared(metrics, f"{part}/{metric}").get("best_member")
        shown = [best, alone] if alone and alone.outcome is Outcome.WORSE else [best]
        words = (
            f"it {VERBS[x.outcome]} {x.name} ({x.mine:.2f} against {x.theirs:.2f})" for x in shown
        )
        clauses.append(f"{items}: {', and '.join(words)}")
    if small:
        reason = f"one list of {k} could hold all {listed(small)}"
    if not clauses:
        return Verdict("not compared", reason, None)
    if small:
        clauses.append(f"not compared, since {reason}")
    # Best first, so that nobody has to look for where the model loses.
    ordered = sorted(slices, key=[*Outcome].index)
    answers = [f"{VERBS[x]} the best baseline for {listed(slices[x])}" for x in ordered]
    outcome = ordered[0] if len(slices) == 1 else Outcome.LEVEL
    return Verdict("; ".join(answers), f"by {metric}, {'; '.join(clauses)}", outcome)


def found_by_index(index: Metrics, num_items: int) -> Verdict:
    """Says which share of the exact answers the index loses, and whether it is worth having."""
    if index["kind"] == "exact":
        return Verdict("nothing", "search is exact: it scores every item", Outcome.BETTER)
    if index["kind"] != "scann":
        return Verdict("there is none", index["kind"], None)
    target = index["target_recall"]
    # The worst of the measured requests, since any of them may be a user's.
    lowest = min((x["recall"] for x in index.get("requests", [])), default=None)
    if lowest is None:
        return Verdict("not measured", f"tuned to find {target:.0%} of the exact answer", None)
    why = f"it finds at least {lowest:.1%} of the exact answer; the target is {target:.0%}"
    if lowest < target:
        return Verdict(f"{1 - lowest:.1%}, more than allowed", why, Outcome.WORSE)
    # An index that saves no time is not called good.
    if num_items < SMALLEST_SCANN_CORPUS:
        why += f". With {num_items:,} items exact search is as fast and loses nothing"
        return Verdict(f"at most {1 - lowest:.1%}, and gains no time", why, Outcome.LEVEL)
    return Verdict(f"at most {1 - lowest:.1%}", why, Outcome.BETTER)


def _lowest(pairs: Sequence[Compared]) -> Outcome:
    """Worse if any is worse, better if all are better, else level."""
    return max((x.outcome for x in pairs), key=[*Outcome].index)


def listed(names: Sequence[str]) -> str:
    """Writes names as "a, b and c"."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
