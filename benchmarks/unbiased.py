"""Measures how far sampled denominators and gradients are from the exact ones.

A query has one positive in a corpus of a few hundred items with Zipf counts. The means over draws
of the denominator, and of the gradient with respect to the scores, are compared with the exact
ones: |mean - exact| / |exact| for the gradient. This is done for every mixture of negatives, hard
share f, spread of the logits and number of shared columns, with three corrections:

    mixture   log n(c) of the mixture that the columns were drawn from (tfrs_pipeline)
    unigram   the in-batch probability for all columns, as in libraries that know one sampler
    none      no correction

The denominator is unbiased with the mixture's log_q. The gradient is a ratio of two means. Its bias
falls with the number of columns and grows with the spread of the logits.

    python benchmarks/unbiased.py --json unbiased.json
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from record import parser_with_json, write_json

from tfrs_pipeline.negatives.mixture import Mixture
from tfrs_pipeline.negatives.samplers import InBatch, Negatives, Popularity, SamplingFrame, Uniform

NUM_CANDIDATES = 300
NUM_QUERIES = 4
HARD_SHARES = (0.0, 0.05, 0.5)
LOGIT_STDS = (1.0, 3.0)
NUM_COLUMNS = (128, 512, 2048)
CORRECTIONS = ("mixture", "unigram", "none")
# Share of the shared columns that each kind draws.
MIXTURES: dict[str, dict[str, float]] = {
    "in-batch": {"in_batch": 1},
    "uniform": {"uniform": 1},
    "clicks^0.75": {"smoothed": 1},
    "in-batch + uniform": {"in_batch": 0.5, "uniform": 0.5},
    "in-batch + clicks^0.75": {"in_batch": 0.5, "smoothed": 0.5},
    "uniform + clicks^0.75": {"uniform": 0.5, "smoothed": 0.5},
    "in-batch + uniform + clicks^0.75": {"in_batch": 0.5, "uniform": 0.25, "smoothed": 0.25},
}
# Two stages: their share of the hard part, size of the row's pool, columns drawn from it.
STAGES = ((0.5, 12, 8), (0.5, 30, 8))


@dataclass(frozen=True)
class Problem:
    """One query: its scores, its positive, what it excludes, its pools of hard negatives."""

    scores: np.ndarray
    positive: int
    excluded: np.ndarray
    pools: list[np.ndarray]


def make_problems(counts: np.ndarray, logit_std: float, seed: int) -> Iterator[Problem]:
    """Makes queries whose positive is drawn by popularity; row 0 is "unknown"."""
    rng = np.random.default_rng(seed)
    q = counts / counts.sum()
    for _ in range(NUM_QUERIES):
        scores = rng.normal(scale=logit_std, size=len(counts))
        positive = int(rng.choice(len(counts), p=q))
        others = rng.permutation(np.setdiff1d(np.arange(1, len(counts)), positive))
        excluded = np.zeros(len(counts), bool)
        excluded[[0, positive, *others[:20]]] = True
        pools, start = [], 20
        for _, size, _ in STAGES:
            pools.append(others[start : start + size])
            start += size
        yield Problem(scores, positive, excluded, pools)


def target_weights(problem: Problem, hard_share: float) -> np.ndarray:
    """Returns what each item's exp(score) weighs in the exact sum over negatives."""
    num_candidates = len(problem.scores) - 1
    weights = np.where(problem.excluded, 0.0, 1 - hard_share)
    for (share, size, _), pool in zip(STAGES, problem.pools, strict=True):
        weights[pool] += hard_share * num_candidates * share / size
    return weights


def measure(
    problem: Problem,
    draws: np.ndarray,
    hard: np.ndarray,
    weight: np.ndarray,
    hard_weight: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Sums denominators and gradients over draws.

    Args:
        problem: The query.
        draws: [num_draws, num_rows] copies of each item among the shared columns.
        hard: [num_draws, num_rows] the same of the row's own columns.
        weight: [num_rows] exp(-log_q) of a shared column.
        hard_weight: [num_rows] exp(-log_q) of an own column.

    Returns:
        [num_draws] denominators without the positive, [num_rows] mean gradient.
    """
    exp_scores = np.exp(problem.scores)
    mass = draws * np.where(problem.excluded, 0, weight * exp_scores) + hard * (
        hard_weight * exp_scores
    )
    denominator = mass.sum(axis=1)
    total = denominator + exp_scores[problem.positive]
    gradient = (mass / total[:, None]).mean(axis=0)
    gradient[problem.positive] += (exp_scores[problem.positive] / total).mean() - 1
    return denominator, gradient


def run(num_draws: int, seed: int) -> list[dict[str, object]]:
    """Measures every combination."""
    counts = np.concatenate([[0], np.ceil(3000 / np.arange(1, NUM_CANDIDATES + 1))]).astype(int)
    # What each kind should draw, computed independently of the package.
    shares = {"in_batch": counts / 1, "uniform": (counts > 0) / 1, "smoothed": counts**0.75}
    shares = {kind: mass / mass.sum() for kind, mass in shares.items()}
    q = shares["in_batch"]
    rng = np.random.default_rng(seed)
    rows: list[dict[str, object]] = []
    for name, parts in MIXTURES.items():
        for columns in NUM_COLUMNS:
            nums = {kind: round(part * columns) for kind, part in parts.items()}
            frame = SamplingFrame.of_counts(counts, nums.get("in_batch", 0) + 1)
            n = Mixture([_kind(*pair) for pair in nums.items()], frame).expected_count
            draws = sum(rng.multinomial(num, shares[kind], num_draws) for kind, num in nums.items())
            for hard_share in HARD_SHARES:
                log_q = {
                    "mixture": np.log(np.where(n > 0, n, 1)) - np.log(1 - hard_share),
                    "unigram": np.log(np.where(q > 0, columns * q, 1)),
                    "none": np.zeros(len(q)),
                }
                for logit_std in LOGIT_STDS:
                    for correction in CORRECTIONS:
                        rows.append(
                            {
                                "name": name,
                                "f": hard_share,
                                "log_q": correction,
                                "logit_std": logit_std,
                                "columns": columns,
                                **compare(
                                    counts,
                                    np.asarray(draws),
                                    log_q[correction],
                                    correction,
                                    hard_share,
                                    logit_std,
                                    rng,
                                    seed,
                                ),
                            }
                        )
    return rows


def _kind(name: str, num: int) -> Negatives:
    if name == "in_batch":  # The batch has one positive more.
        return InBatch()
    return Uniform(num) if name == "uniform" else Popularity(num)


def compare(
    counts: np.ndarray,
    draws: np.ndarray,
    log_q: np.ndarray,
    correction: str,
    hard_share: float,
    logit_std: float,
    rng: np.random.Generator,
    seed: int,
) -> dict[str, float]:
    """Compares with the exact sums; returns means over the queries."""
    ratios, errors, biases, noises = [], [], [], []
    num_rows, num_draws = len(counts), len(draws)
    weight = np.exp(-log_q)
    for problem in make_problems(counts, logit_std, seed):
        hard = np.zeros((num_draws, num_rows), np.int64)
        hard_weight = np.zeros(num_rows)
        if hard_share:
            for (share, size, num), pool in zip(STAGES, problem.pools, strict=True):
                # As the pipeline draws: consecutive entries of the pool from a random start.
                start = rng.integers(size, size=(num_draws, 1))
                place = (start + np.arange(num)) % size
                np.add.at(hard, (np.arange(num_draws)[:, None], pool[place]), 1)
                own_log_q = np.log(num / ((num_rows - 1) * hard_share * share))
                hard_weight[pool] = np.exp(-own_log_q) if correction == "mixture" else weight[pool]
        denominators, gradient = measure(problem, draws, hard, weight, hard_weight)
        half = measure(problem, draws[::2], hard[::2], weight, hard_weight)[1]
        mass = target_weights(problem, hard_share) * np.exp(problem.scores)
        total = mass.sum() + np.exp(problem.scores[problem.positive])
        exact = mass / total
        exact[problem.positive] += np.exp(problem.scores[problem.positive]) / total - 1
        ratios.append(denominators.mean() / mass.sum())
        errors.append(denominators.std() / np.sqrt(num_draws) / mass.sum())
        biases.append(np.linalg.norm(gradient - exact) / np.linalg.norm(exact))
        # Half of the draws differ from all by as much, on average, as all from their expectation.
        noises.append(np.linalg.norm(half - gradient) / np.linalg.norm(exact))
    return {
        "denominator_ratio": float(np.mean(ratios)),
        "denominator_standard_error": float(np.linalg.norm(errors) / len(errors)),
        "gradient_bias": float(np.mean(biases)),
        "gradient_noise": float(np.mean(noises)),
    }


def print_table(rows: list[dict[str, object]]) -> None:
    """Prints the worst of the mixtures for each correction, f, spread and number of columns."""
    print(f"{'log_q':8} {'f':>5} {'std':>4} {'columns':>7}  worst denominator  worst gradient bias")
    keys = [
        (c, f, s, n)
        for c in CORRECTIONS
        for f in HARD_SHARES
        for s in LOGIT_STDS
        for n in NUM_COLUMNS
    ]
    for key in keys:
        chosen = [r for r in rows if (r["log_q"], r["f"], r["logit_std"], r["columns"]) == key]
        ratio = max(
            (float(str(r["denominator_ratio"])) for r in chosen), key=lambda x: abs(np.log(x))
        )
        bias = max(float(str(r["gradient_bias"])) for r in chosen)
        correction, f, std, columns = key
        print(f"{correction:8} {f:5.2f} {std:4.0f} {columns:7d}  {ratio:17.4f}  {bias:19.4f}")


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("--draws", type=int, default=20_000, help="Draws a combination (20000).")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = run(options.draws, options.seed)
    print_table(rows)
    if options.json:
        write_json(options.json, {"mixtures": rows})


if __name__ == "__main__":
    main()
