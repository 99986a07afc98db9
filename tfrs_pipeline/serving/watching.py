"""Counts what the answers of a server knew and held; docs/guides/watching.md says what to look at.

Labels have few values: never an id, which would make a series for each user or item.
"""

from collections.abc import Callable, Mapping

import numpy as np
from prometheus_client import Counter

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.evaluation.evaluate import popularity_slices

# Popularity is that of the first items of an answer: all of a long one would take too long.
NUM_TOP = 10


def _yes_no(name: str, text: str, label: str) -> Callable[[int, int], None]:
    """Makes a counter of things that are so or not, and the function that counts some of each."""
    counter = Counter(name, text, [label])
    yes, no = counter.labels("true"), counter.labels("false")

    def count(num_yes: int, num: int) -> None:
        yes.inc(num_yes)
        no.inc(num - num_yes)

    return count


ANSWERS = Counter("tfrs_answers", "Queries answered, and items embedded.", ["version"])
LIVE_UNKNOWN_VALUES = Counter(
    "tfrs_live_unknown_values", "Values of live items that the model does not know."
)
_TOP_ITEMS = Counter(
    "tfrs_top_items",
    "The first ten items of answers, by their popularity in the log.",
    ["popularity"],
)
_PARTS = ("new", "head", "torso", "tail")
_TOP_ITEMS_OF = [_TOP_ITEMS.labels(part) for part in _PARTS]
_count_users = _yes_no("tfrs_user_ids", "User ids in queries.", "known")
_count_history = _yes_no("tfrs_history_items", "Items of the histories in queries.", "known")
_count_slots = _yes_no("tfrs_slots", "Slots of answers: the k of each query.", "filled")
_count_filtered = _yes_no("tfrs_filtered_queries", "Queries with a filter.", "empty")


class Watch:
    """Counts the answers of a version.

    `num_clicks`, [n], say how often each of the version's `items` was clicked in the log: the head
    and the torso hold half and 30% of the clicks, and an item without any is new. An export that
    does not hold them has None; the popularity of its answers is not counted.
    """

    def __init__(self, number: int, items: Ids, num_clicks: np.ndarray | None) -> None:
        self._number, self._items = str(number), items
        self._part_of: np.ndarray | None = None
        if num_clicks is not None:
            slices = popularity_slices(num_clicks)
            parts = np.stack([slices[part] for part in _PARTS[1:]]).argmax(axis=0) + 1
            self._part_of = np.append(0, parts * (num_clicks > 0))

    def count(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        """Counts the answers to queries: the arrays of a call, and what it returned."""
        ANSWERS.labels(self._number).inc(len(next(iter(outputs.values()))))
        if "is_known_user" in outputs:
            _count_users(_num(outputs["is_known_user"]), _num_ids(inputs["user_id"]))
        if "num_known_items" in outputs and "history" in inputs:
            _count_history(sum(outputs["num_known_items"].tolist()), _num_ids(inputs["history"]))
        if "scores" not in outputs:
            return
        is_filled = outputs["scores"] > -np.inf
        _count_slots(_num(is_filled), is_filled.size)
        if "allowed" in inputs:
            is_filtered = (inputs["allowed"] != b"").any(axis=1)
            _count_filtered(_num(is_filtered & ~is_filled[:, 0]), _num(is_filtered))
        if self._part_of is not None:
            top = outputs["candidate_ids"][:, :NUM_TOP][is_filled[:, :NUM_TOP]]
            nums = np.bincount(self._part_of[self._items.rows(top)], minlength=len(_PARTS))
            for counter, num in zip(_TOP_ITEMS_OF, nums.tolist(), strict=True):
                counter.inc(num)


def _num_ids(ids: np.ndarray) -> int:
    """Counts the ids in an array of an encoder: all but the empty ones."""
    return _num(ids != (b"" if ids.dtype == object else -1))


def _num(are_so: np.ndarray) -> int:
    return int(np.count_nonzero(are_so))  # In a fifth of the time of `sum`.
