"""Which items no answer to a user holds: what the user disliked, always, and what they know.

This is the one module that decides it for service: for the exported graph (`exports/encoder.py`),
for events (`answers/users.py`), and for answers by a history that the query brings
(`LoadedRetriever.left_out`, which `recommend` and the command `query` call). The rule is the
`evaluation.exclude` of the training, so that answers by user id leave out what the rankings of the
test left out (`Holdout.excluded`). `Users` also takes disliked items out of histories.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from tfrs_pipeline.data.schema import SEEN, Exclude, Stage
from tfrs_pipeline.search.history_bonus import HistoryBonus

KNOWN_STAGES: Mapping[Exclude, Collection[Stage]] = {
    "clicked": [Stage.CLICKED],
    "seen": SEEN,
    "none": [],
}
"""Rule -> the stages of events that make an item known to its user."""


def rule_with(exclude: Exclude, bonus: HistoryBonus | None) -> Exclude:
    """Returns the rule of a model: `exclude`, or "none" with a repeat bonus, which needs them."""
    return exclude if bonus is None or bonus.repeats is None else "none"


def left_out(rule: Exclude, known: Iterable[Any], disliked: Iterable[Any]) -> list[Any]:
    """Returns what an answer to a user leaves out: ids, or tables that hold them.

    Disliked items are left out by every rule.

    Args:
        rule: As `rule_with` returns it.
        known: What the user knows by that rule.
        disliked: What the user disliked, in the training's log or in service.

    Example:
        >>> left_out("clicked", ["v1", "v2"], ["v3"])
        ['v1', 'v2', 'v3']
        >>> left_out("none", ["v1", "v2"], ["v3"])
        ['v3']
    """
    return [*(() if rule == "none" else known), *disliked]


def left_out_by_history(
    rule: Exclude, history: Iterable[Any], known: Iterable[Any], disliked: Iterable[Any]
) -> list[Any]:
    """Returns what an answer to a query that brings its history leaves out; see `left_out`.

    The history takes the place of the clicks that the model knows; no history holds what the user
    was only shown. Each item comes once.

    Example:
        >>> left_out_by_history("seen", ["v4"], ["v1", "v2"], ["v3"])
        ['v4', 'v1', 'v2', 'v3']
        >>> left_out_by_history("clicked", ["v4"], ["v1", "v2"], ["v3"])
        ['v4', 'v3']
    """
    of_rule = left_out(rule, [*history, *(known if rule == "seen" else ())], disliked)
    return list(dict.fromkeys(of_rule))  # What was clicked or disliked was also shown.
