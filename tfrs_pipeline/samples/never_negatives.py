"""What is never a negative: decided here for stored pools, for the masks of batches and for checks.

| reason | never a negative of | what it covers |
|---|---|---|
| the row's own positive | the row | the item that this row is to find |
| `KNOWN` | the user | items that the user clicked in training, whatever another request did |
| `EXPOSED` | the user | other items that the user was shown or disliked in training |
| `LATER` | anyone | items that came after the training |

Only a pool of hard negatives that is meant to hold exposed items may have some (`reasons_in`).

A shown item that was not clicked says little against it: the funnel had chosen it for this user
from millions. Which of the few shown items is clicked is for ranking to learn.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tfrs_pipeline.data.schema import was_shown
from tfrs_pipeline.libraries import ibis
from tfrs_pipeline.samples.store import RowLists, Samples

KNOWN, EXPOSED = REASONS = "known positives", "exposed items"
"""Reasons that depend on the user."""
LATER = "items that came later"
ROW_PAIR = ["query_row", "candidate_row"]


def reasons_in(pool: str, hard: Any) -> tuple[str, ...]:
    """Returns the `REASONS` that keep candidates out of a pool of a kind of hard negatives.

    The pool "exposed" of a kind with `allow_exposed` may hold exposed items; no other may.
    """
    is_allowed = pool == "exposed" and getattr(hard, "allow_exposed", False)
    return (KNOWN,) if is_allowed else REASONS


def exposed_pairs(events: ibis.Table, known: ibis.Table) -> ibis.Table:
    """Finds the pairs of a user and an item that `EXPOSED` covers; `known` has those of `KNOWN`.

    These are all that were shown and are not known; a disliked item had been shown.
    """
    return events.filter(was_shown).select(*ROW_PAIR).distinct().anti_join(known, ROW_PAIR)


def possible_losers(
    losers: ibis.Table, known: ibis.Table, exposed: ibis.Table, hard: Any
) -> ibis.Table:
    """Leaves out the losers that are never negatives of their user; their `stage` is their pool."""
    losers = losers.anti_join(known, ROW_PAIR)
    stages = [stage for stage in hard.stages if EXPOSED in reasons_in(stage, hard)]
    is_masked = losers["stage"].isin(stages)
    # One join with both conditions would compare all pairs of rows.
    masked = losers.filter(is_masked).anti_join(exposed, ROW_PAIR)
    return masked.union(losers.filter(~is_masked))


def by_query(samples: Samples) -> dict[str, RowLists]:
    """Returns, by reason, the candidates of each query row that are never its negatives."""
    return {KNOWN: samples.known_positives, EXPOSED: samples.exposed}


def is_never(
    samples: Samples, index: np.ndarray, lists: RowLists, reasons: tuple[str, ...]
) -> np.ndarray:
    """Marks the candidates that are never negatives of a sample, by its list: [total] bool.

    `index`, [n] int, says which sample each of the `lists` belongs to.
    """
    candidates, pairs = lists.values, lists.pairs()
    marks = candidates == np.repeat(samples.candidate_rows[index], np.diff(lists.offsets))
    queries = samples.query_rows[index]
    for reason in reasons:
        never = np.append(by_query(samples)[reason].take(queries).pairs(), -1)
        marks |= never[np.searchsorted(never[:-1], pairs)] == pairs  # Pairs are ascending.
    if samples.is_later is not None:
        marks |= samples.is_later[candidates]
    return marks


def are_all_never(samples: Samples, hard: Any = None) -> bool:
    """Returns whether no user with a positive has a negative left, hard ones included."""
    lists = by_query(samples)
    queries = np.unique(samples.query_rows)
    num_never = sum(
        np.diff(lists[reason].offsets)[queries] for reason in reasons_in("exposed", hard)
    )
    return bool(np.all(num_never >= samples.num_possible_negatives))
