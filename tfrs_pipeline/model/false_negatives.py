"""How many hard negatives their users click later, against easy ones."""

from dataclasses import dataclass

import numpy as np

from tfrs_pipeline.batches.hybrid import HybridBatches
from tfrs_pipeline.data.held_out_queries import Holdout
from tfrs_pipeline.evaluation.bootstrap import Interval, ratio_interval
from tfrs_pipeline.samples.store import PAIR_VALUE, RowLists


@dataclass(frozen=True)
class FalseNegatives:
    """The hard negatives of a pool that their own users clicked later.

    A later click is certain proof, but only what is shown can be clicked: the true share of items
    that the user likes is higher, for easy negatives more than for hard ones.

    Attributes:
        num_pairs: Distinct pairs of a user with later clicks and one of their hard negatives.
        num_clicked: Those whose user clicked the item later.
        num_easy: How many would be clicked among as many easy negatives of the same users.
        rate: num_clicked / num_pairs, with its 95% interval over users.
        times_easy: num_clicked / num_easy, likewise; None if either is 0.
    """

    num_pairs: int
    num_clicked: int
    num_easy: float
    rate: Interval
    times_easy: Interval | None

    def __str__(self) -> str:
        words = f"{self.num_clicked:,} of {self.num_pairs:,} hard negatives ({self.rate.mean:.2%})"
        words += (
            f" were clicked by their user in validation, of as many easy ones {self.num_easy:,.1f}"
        )
        if (times := self.times_easy) is None:
            return words
        return f"{words}: {times.mean:.2g} times as many [{times.low:.2g}, {times.high:.2g}]"


def false_negatives(batches: HybridBatches, later: Holdout) -> dict[str, FalseNegatives]:
    """Counts the hard negatives of each pool that their own users clicked after the training.

    Candidates are those that batches draw from: masked ones are left out of both kinds. An easy
    negative of a user is candidate c with a probability proportional to n(c).

    Args:
        batches: The batches of a training, with hard negatives, from the samples of a log.
        later: Clicks after these samples, such as those of validation.

    Returns:
        Pool, such as the stage of losers -> what was counted; without pools that hold no pair.

    Raises:
        ValueError: If there are no hard negatives, or the samples are not those of a log.
    """
    samples, hard = batches.samples, batches.hard
    if hard is None or samples.query_ids is None or samples.candidate_ids is None:
        raise ValueError(
            "Counts false negatives among hard ones: give a model with `hard`, and samples of a "
            "log, which know the ids of their rows."
        )
    # A pair's key holds the number of its user among `users`, and the candidate row.
    users, number = np.unique(samples.query_ids.rows(later.user_ids), return_inverse=True)
    rows = RowLists.from_lists(samples.candidate_ids.rows_by_list(later.relevant))
    clicked = np.unique(rows.pairs(number))
    masked = [lists.take(users).pairs() for lists in batches.never.values()]
    never = np.unique(np.concatenate(masked))
    weights = batches.expected_count.copy()
    if samples.is_later is not None:
        weights[samples.is_later] = 0

    def sums(keys: np.ndarray, by_row: np.ndarray | float = 1.0) -> np.ndarray:
        values = np.broadcast_to(by_row, weights.shape)
        return np.bincount(keys >> 32, values[keys & PAIR_VALUE], len(users))

    # A user who had every item in training has no easy negative: 0 / 0.
    easy = sums(np.setdiff1d(clicked, never), weights)
    easy_rate = easy / np.maximum(weights.sum() - sums(never, weights), np.finfo(float).tiny)
    index = np.flatnonzero(np.isin(samples.query_rows, users))
    owners, counts = np.searchsorted(users, samples.query_rows[index]), {}
    for name, lists in hard.read(index).items():
        pairs = np.unique(lists.pairs(owners))
        num, hits = sums(pairs), sums(np.intersect1d(pairs, clicked))
        expected = num * easy_rate
        if num.any():
            # Resamples of nothing but zeros would give an interval of [0, 0].
            is_measured = hits.any() and expected.any()
            times = ratio_interval(hits, expected) if is_measured else None
            sizes = int(num.sum()), int(hits.sum()), float(expected.sum())
            counts[name] = FalseNegatives(*sizes, ratio_interval(hits, num), times)
    return counts
