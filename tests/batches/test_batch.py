"""Slices of a batch: together they are the batch, cut between queries."""

import numpy as np
import pytest

from tests.small_batches import REQUESTED, UNORDERED, batch_list, flat, make_batches
from tfrs_pipeline.batches.batch import Batch, Slices
from tfrs_pipeline.negatives.samplers import FunnelLosers

HARD = FunnelLosers(share=0.3, num=2)
# Fields that a slice renumbers; they are checked by what they point at.
POINTERS = ("state", "positive_query")
# Fields that every slice has whole, named here so that a field with a wrong axis shows.
WHOLE = ("shared_row", "dropout_seed")


def with_own_lines(batch: Batch) -> Batch:
    """Gives each query its own row of log_q if all share one row."""
    return batch._replace(log_q=np.broadcast_to(batch.log_q, batch.is_counted.shape))


def reads(batch: Batch) -> list[list[int]]:
    """Lists each positive's history rows, oldest first or padded, in any order of samples."""
    if batch.sequence_rows is not None:
        width = batch.sequence_rows.shape[1] + 1
        windows, lengths = np.divmod(batch.state, width)
        return [batch.sequence_rows[i][:n].tolist() for i, n in zip(windows, lengths, strict=True)]
    rows = batch.history_rows
    return (rows if batch.positive_query is None else rows[batch.positive_query]).tolist()


@pytest.mark.parametrize(("order", "total"), [("single", 3), ("sequences", 2), ("sets", 3)])
def test_the_slices_of_a_batch_are_the_batch(order: str, total: int) -> None:
    samples = UNORDERED if order == "sets" else REQUESTED
    batches = make_batches(order, samples, hard=None if order == "sets" else HARD)
    whole = batch_list(batches, 2, start=4)
    sliced = list(batches.dataset(4, 2, Slices(0, total, total)).as_numpy_iterator())
    assert len(sliced) == 2 * total
    for i, batch in enumerate(whole):
        parts = sliced[i * total : (i + 1) * total]
        for name, values in flat(with_own_lines(batch)).items():
            of_parts = [flat(with_own_lines(part))[name] for part in parts]
            if name in WHOLE:
                for value in of_parts:
                    np.testing.assert_array_equal(value, values, name)
            elif name not in POINTERS:
                np.testing.assert_array_equal(np.concatenate(of_parts), values, name)
        assert [line for part in parts for line in reads(part)] == reads(batch)
        sizes = [len(part.query_row) for part in parts]
        if order != "sequences":
            assert max(sizes) - min(sizes) <= 1
        for part in parts:
            assert part.total_weight == pytest.approx(batch.weight.sum())
    # A worker builds only its own slices.
    own = list(batches.dataset(4, 2, Slices(1, total - 1, total)).as_numpy_iterator())
    others = [part for i, part in enumerate(sliced) if i % total]
    for got, expected in zip(own, others, strict=True):
        np.testing.assert_array_equal(got.weight, expected.weight)


def test_no_thread_tunes_the_dataset() -> None:
    """Else deleting an iterator often waits until that thread wakes up, up to a minute later."""
    assert make_batches("single").dataset(0, 1).options().autotune.enabled is False
