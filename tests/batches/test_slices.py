"""Slices of a batch: together they are the batch, cut between queries."""

from typing import Any

import numpy as np
import pytest

from tests.small_batches import REQUESTED, UNORDERED, batch_list, make_batches
from tfrs_pipeline.batches.slices import Slices
from tfrs_pipeline.negatives.funnel import FunnelLosers

HARD = FunnelLosers(share=0.3, num=2)
OF_SEQUENCES = ("sequence_rows", "sequence_times")
OF_QUERIES = (
    "query_row",
    "history_rows",
    "history_times",
    "is_counted",
    "hard_candidate_row",
    "hard_log_q",
)
OF_REQUESTS = ("request place", "request vector")


def reads(batch: dict[str, Any]) -> list[list[int]]:
    """Lists what is read for each positive, oldest first or padded, whatever the order."""
    if "sequence_rows" in batch:
        width = batch["sequence_rows"].shape[1] + 1
        windows, lengths = np.divmod(batch["state"], width)
        return [
            batch["sequence_rows"][i][:n].tolist() for i, n in zip(windows, lengths, strict=True)
        ]
    rows = batch["history_rows"]
    return rows[batch.get("positive_query", np.arange(len(rows)))].tolist()


@pytest.mark.parametrize(("order", "total"), [("single", 3), ("sequences", 2), ("sets", 3)])
def test_the_slices_of_a_batch_are_the_batch(order: str, total: int) -> None:
    samples = UNORDERED if order == "sets" else REQUESTED
    batches = make_batches(order, samples, hard=None if order == "sets" else HARD)
    whole = batch_list(batches, 2, start=4)
    sliced = list(batches.dataset(4, 2, Slices(0, total, total)).as_numpy_iterator())
    assert len(sliced) == 2 * total
    for i, batch in enumerate(whole):
        parts = sliced[i * total : (i + 1) * total]
        for name in ("candidate_row", "weight", *OF_QUERIES, *OF_REQUESTS, *OF_SEQUENCES):
            if name in batch:
                joined = np.concatenate([part[name] for part in parts])
                np.testing.assert_array_equal(joined, batch[name], name)
        assert [line for part in parts for line in reads(part)] == reads(batch)
        log_q = [np.broadcast_to(x["log_q"], x["is_counted"].shape) for x in (batch, *parts)]
        np.testing.assert_array_equal(np.concatenate(log_q[1:]), log_q[0])
        sizes = [len(part["query_row"]) for part in parts]
        if order != "sequences":
            assert max(sizes) - min(sizes) <= 1
        for part in parts:
            np.testing.assert_array_equal(part["shared_row"], batch["shared_row"])
    # A worker builds its own slices alone.
    own = list(batches.dataset(4, 2, Slices(1, total - 1, total)).as_numpy_iterator())
    others = [part for i, part in enumerate(sliced) if i % total]
    for got, expected in zip(own, others, strict=True):
        np.testing.assert_array_equal(got["weight"], expected["weight"])
