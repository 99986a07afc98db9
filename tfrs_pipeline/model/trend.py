"""How an item's popularity at the end of the training part differs from that in all of it."""

import itertools

import numpy as np

from tfrs_pipeline.samples.store import Samples

# Half-lives of a click's weight, as shares of all clicks; with infinity all clicks count alike.
_HALF_LIVES = (*(0.5**k for k in range(1, 11)), np.inf)
# The latest tenth of the clicks, in five slices.
_SLICES = np.linspace(0.9, 1.0, 6)


def popularity_shift(samples: Samples) -> np.ndarray:
    """Computes log(share of the clicks now / share of all clicks): [num_candidates + 1] float32.

    An item's share now is a mixture of its shares with several half-lives, counted in clicks, and
    a uniform share; the share of all clicks is mixed with the same uniform share. Expectation
    maximisation finds the weights that make the latest tenth of the clicks likeliest, each slice of
    it given the clicks before. The shift is 0 in row 0, and everywhere if the log has no timestamps
    or fewer than 100 clicks.
    """
    num_clicks, num_rows = len(samples), len(samples.counts)
    if samples.sequence_times is None or num_clicks < 100:
        return np.zeros(num_rows, np.float32)
    rows = samples.sequences.values[np.argsort(samples.sequence_times, kind="stable")]

    def shares(num: int) -> np.ndarray:
        """Returns each kind of the items' shares among the first `num` clicks."""
        age = np.arange(num, 0, -1) / num_clicks
        kinds = [np.bincount(rows[:num], 0.5 ** (age / x), num_rows) for x in _HALF_LIVES]
        return np.stack(
            [*(counts / counts.sum() for counts in kinds), np.full(num_rows, 1 / num_rows)]
        )

    slices = itertools.pairwise((num_clicks * _SLICES).astype(int))
    likelihoods = np.hstack([shares(start)[:, rows[start:end]] for start, end in slices])
    mixture = np.full(len(likelihoods), 1 / len(likelihoods))
    for _ in range(100):
        joint = mixture[:, np.newaxis] * likelihoods
        mixture = (joint / joint.sum(axis=0)).mean(axis=1)
    now = shares(num_clicks)
    of_all = (1 - mixture[-1]) * now[-2] + mixture[-1] * now[-1]
    shift = np.log(mixture @ now / of_all)
    shift[0] = 0.0
    return shift.astype(np.float32)
