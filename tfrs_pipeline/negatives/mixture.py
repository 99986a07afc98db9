"""log_q of every column of a batch: what each sampled negative weighs.

The loss of one positive c+ of query x, with corpus size V, excluded items E(x) (c+ itself, the
other known positives, the exposed items), hard share f and stage shares w_k, aims at

    -s(x, c+) + log( exp s(x, c+) + (1-f) * sum over c not in E(x) of exp s(x, c)
                     + f * V * sum_k w_k * mean over h in hard_k(x) of exp s(x, h) ).

Both sums are estimated from sampled columns with the logit s - log_q:

    the row's own positive                 0
    a shared column holding candidate c    log( n(c) / (1-f) )
    one of H_k own hard negatives          log( H_k / (V * f * w_k) )

n(c) is the expected number of copies of c among the shared columns, whichever sampler drew them:
a column does not remember its sampler, and need not. Then the expectation of the sum over columns
is the sum over the corpus. Where positives of earlier batches are columns too (a bank of K batches
of B), their term is filled * q_positive(c), `filled` being the entries that the bank holds by then:
min(step, K) * B. It grows over the first K steps, so that `TrainingBatches` takes n(c) in parts.

Where counts are unknown or drift, q_positive(c) is an estimate q_hat(c) of the model's own
(`streaming_frequency`), and n(c) = (B - 1 + filled) * q_hat(c) + the easy samplers' terms; the rest
of the table stays as it is.

All functions here are NumPy: tables are computed once, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def expected_count(
    q_positive: np.ndarray,
    batch_size: int,
    easy: Sequence[tuple[np.ndarray, int]] = (),
    *,
    in_batch: bool = True,
    bank_size: int = 0,
) -> np.ndarray:
    """Computes n(c), the expected copies of candidate c among a row's shared columns.

    n(c) = (batch_size - 1) * q_positive(c) [in-batch] + bank_size * q_positive(c)
           + sum of num * p(c) over the easy samplers.

    Args:
        q_positive: [num_rows] distribution that positives are drawn from, 0 at row 0.
        batch_size: Positives in a batch; a row's negatives are the other batch_size - 1.
        easy: Pairs of a sampler's [num_rows] distribution and how many it draws per batch, with
            replacement.
        in_batch: Whether the other rows' positives are negatives too.
        bank_size: Positives of earlier batches that are negatives too.

    Returns:
        [num_rows] float64. 0 where no sampler in use can draw the candidate.

    Raises:
        ValueError: If a distribution does not match the corpus, does not sum to 1, or gives row 0
            a probability; if there is no negative at all.

    Example:
        >>> q = np.array([0, 0.75, 0.25])
        >>> expected_count(q, batch_size=5, easy=[(np.array([0, 0.5, 0.5]), 2)])
        array([0., 4., 2.])
    """
    terms = [(q_positive, batch_size - 1)] if in_batch else []
    terms += [(q_positive, bank_size)] if bank_size else []
    terms += list(easy)
    count = np.zeros(len(q_positive), np.float64)
    for probability, num in terms:
        if len(probability) != len(q_positive):
            raise ValueError(
                "Every sampler must give a probability to each of the "
                f"{len(q_positive)} candidate rows. Received: {len(probability)}"
            )
        if not np.isclose(probability.sum(), 1.0, rtol=0, atol=1e-9) or probability[0] != 0:
            raise ValueError(
                "A sampler's probabilities must sum to 1, with 0 at row 0. "
                f"Received: sum {probability.sum()!r}, row 0 {probability[0]!r}"
            )
        count += num * np.asarray(probability, np.float64)
    if not count.any():
        raise ValueError(
            "No shared column can be a negative: use in-batch negatives with a batch of 2 or "
            "more, or an easy sampler."
        )
    return count


def log_expected_count(count: np.ndarray) -> np.ndarray:
    """Computes log n(c) in float32, -inf where no sampler can draw the candidate.

    Nothing is clipped: -inf can only meet a candidate that is in no shared column.
    """
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(count, np.float64)).astype(np.float32)


def num_unreachable(count: np.ndarray) -> int:
    """Counts the candidates that no sampler in use can draw, so that nothing pushes them down."""
    return int((count[1:] <= 0).sum())
