"""Counts known ids, filled slots and popular items in a server's answers.

docs/guides/watching.md says what to look at. A label never holds an id, because Prometheus keeps a
time series for each value.
"""

from collections.abc import Mapping

import numpy as np
from prometheus_client import Counter

from tfrs_pipeline.evaluation.metrics import popularity_slices
from tfrs_pipeline.model.tf_tables import id_list
from tfrs_pipeline.serving.retriever import LoadedRetriever

# Popularity is counted for the first items of an answer alone: a long answer would take too long.
NUM_TOP = 10
_PARTS = ("new", "head", "torso", "tail")

ANSWERS = Counter("tfrs_answers", "Queries answered, and items embedded.", ["version"])
USER_IDS = Counter("tfrs_user_ids", "User ids in queries.", ["known"])
HISTORY = Counter("tfrs_history_items", "Items of the histories in queries.", ["known"])
SLOTS = Counter("tfrs_slots", "Slots of answers: the k of each query.", ["filled"])
FILTERED_QUERIES = Counter("tfrs_filtered_queries", "Queries with a filter.", ["empty"])
TOP_ITEMS = Counter("tfrs_top_items", "The first ten items of answers.", ["popularity"])
UNRECORDED = Counter("tfrs_unrecorded_answers", "Answers that waited too long to be recorded.")
LIVE_UNKNOWN_VALUES = Counter("tfrs_live_unknown_values", "Unknown values of live items.")


class Watch:
    """Counts the answers of a version.

    The most clicked items that together have half of the log's clicks are the head, those with the
    next 30% the torso, those with the rest the tail. An item without a click is new.
    """

    def __init__(self, retriever: LoadedRetriever) -> None:
        self._number, self._items = retriever.folder.name, retriever.candidates.corpus
        ids = id_list(self._items.values.tolist(), retriever.item_dtype)
        clicks = retriever.saved_model.encoder.num_clicks(ids).numpy()
        slices = popularity_slices(clicks)
        parts = np.stack([slices[part] for part in _PARTS[1:]]).argmax(axis=0) + 1
        # Row 0 stands for items that came live, after the training.
        self._part_by_row = np.append(0, parts * (clicks > 0))

    def count(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        """Counts the answers of a call, by the arrays that it was given and those it returned."""
        ANSWERS.labels(self._number).inc(len(next(iter(outputs.values()))))
        if "is_known_user" in outputs:
            _count(USER_IDS, _num(outputs["is_known_user"]), _num_ids(inputs["user_id"]))
        if "num_known_items" in outputs and "history" in inputs:
            _count(HISTORY, sum(outputs["num_known_items"].tolist()), _num_ids(inputs["history"]))
        if "scores" not in outputs:
            return
        is_filled = outputs["scores"] > -np.inf
        _count(SLOTS, _num(is_filled), is_filled.size)
        if "allowed" in inputs:
            is_filtered = (inputs["allowed"] != b"").any(axis=1)
            _count(FILTERED_QUERIES, _num(is_filtered & ~is_filled[:, 0]), _num(is_filtered))
        top = outputs["candidate_ids"][:, :NUM_TOP][is_filled[:, :NUM_TOP]]
        nums = np.bincount(self._part_by_row[self._items.rows(top)], minlength=len(_PARTS))
        for part, num in zip(_PARTS, nums.tolist(), strict=True):
            TOP_ITEMS.labels(part).inc(num)


def _count(counter: Counter, num_true: int, num: int) -> None:
    """Adds `num_true` of `num` to the counter's label "true", and the rest to "false"."""
    counter.labels("true").inc(num_true)
    counter.labels("false").inc(num - num_true)


def _num_ids(ids: np.ndarray) -> int:
    """Counts the ids in an array that is padded with empty ones."""
    return _num(ids != (b"" if ids.dtype == object else -1))


def _num(is_true: np.ndarray) -> int:
    return int(np.count_nonzero(is_true))  # Takes a fifth of the time of `sum`.
