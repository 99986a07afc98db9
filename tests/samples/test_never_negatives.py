"""One rule says what is never a negative, for stored pools and for those of a batch."""

from types import SimpleNamespace
from typing import Any

import ibis
import numpy as np
import pytest

from tests.small_log import in_ibis
from tfrs_pipeline.negatives.samplers import FunnelLosers
from tfrs_pipeline.samples.never_negatives import (
    EXPOSED,
    KNOWN,
    are_all_never,
    exposed_pairs,
    is_never,
    possible_losers,
    reasons_in,
)
from tfrs_pipeline.samples.store import RowLists, Samples

ALLOWED = FunnelLosers(stages=("exposed", "retrieved"), allow_exposed=True)


def lists_of(*rows: int) -> RowLists:
    return RowLists.from_lists([np.array([], int), np.array(rows)])


# Of the user of query row 1: 1 is clicked and shown, 2 shown, 3 disliked, 4 only lost. 5 is later.
SAMPLES = Samples(
    query_rows=np.array([1], np.int32),
    candidate_rows=np.array([1], np.int32),
    weights=np.ones(1, np.float32),
    sequences=lists_of(1),
    num_earlier=np.zeros(1, np.int32),
    known_positives=lists_of(1),
    exposed=lists_of(2, 3),
    counts=np.array([0, 1, 0, 0, 0, 0]),
    is_later=np.arange(6) == 5,
)


@pytest.mark.parametrize(
    ("pool", "hard", "reasons"),
    [
        ("exposed", ALLOWED, (KNOWN,)),
        ("retrieved", ALLOWED, (KNOWN, EXPOSED)),
        ("exposed", FunnelLosers(), (KNOWN, EXPOSED)),
        ("exposed", SimpleNamespace(), (KNOWN, EXPOSED)),
        ("exposed", None, (KNOWN, EXPOSED)),
    ],
)
def test_only_an_allowed_pool_may_hold_exposed_items(pool: str, hard: Any, reasons: Any) -> None:
    assert reasons_in(pool, hard) == reasons


def test_tables_and_arrays_leave_out_the_same() -> None:
    stages = ["clicked", "exposed", "exposed", "disliked", "retrieved"]
    events = in_ibis({"query_row": [1] * 5, "candidate_row": [1, 1, 2, 3, 4], "stage": stages})
    known = events.filter(events["stage"] == "clicked").select("query_row", "candidate_row")
    exposed = exposed_pairs(events, known)
    assert sorted(exposed["candidate_row"].to_pyarrow().to_pylist()) == [2, 3]
    for pool, hard in (("exposed", ALLOWED), ("retrieved", ALLOWED), ("retrieved", FunnelLosers())):
        # As if everything had lost in some request.
        losers = events.drop("stage").distinct().mutate(stage=ibis.literal(pool))
        left = possible_losers(losers, known, exposed, hard)["candidate_row"].to_pyarrow()
        rows = RowLists.from_lists([np.arange(1, 6)])
        never = is_never(SAMPLES, np.array([0]), rows, reasons_in(pool, hard))
        expected = [2, 3, 4] if pool == "exposed" else [4]
        assert sorted(left.to_pylist()) == rows.values[~never].tolist() == expected


def test_whether_anything_is_left_depends_on_what_may_be_hard() -> None:
    assert not are_all_never(SAMPLES)  # Item 4.
    without = np.array([False, False, False, False, True, True])
    few = Samples(**{**vars(SAMPLES), "is_later": without})
    assert are_all_never(few)
    assert are_all_never(few, FunnelLosers())
    assert not are_all_never(few, ALLOWED)
