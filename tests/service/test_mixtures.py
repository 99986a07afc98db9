"""The recall target of an index, for requests and live writes in any mixture, against plain NumPy.

Each request limits the answer by k, a filter and exclusions. Before it, near items were removed,
and others were added or moved.
"""

import itertools
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.search.test_settings import clustered
from tfrs_pipeline.search.candidates import Candidates, FilterValues
from tfrs_pipeline.search.searcher import Searcher
from tfrs_pipeline.search.tune import Requests, Tuned, tune_index

NUM, DIM, TARGET = 20_000, 32, 0.98
KS, EXCLUDED = (10, 100, 400), (0, 20, 300)
FILTERS = ("", "half", "rare", "near", "far")
REMOVED, ADDED = (0, 300), (0, 20, 1424)
VECTORS, NEW = clustered(NUM, DIM), clustered(max(ADDED), DIM, seed=3)


class State(NamedTuple):
    """Candidates after some writes, and the same as arrays: ids, vectors, which have a value."""

    candidates: Candidates
    ids: np.ndarray
    vectors: np.ndarray
    has: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def tuned() -> Tuned:
    queries = clustered(400, DIM, seed=2)
    requests = Requests(queries, [np.zeros(0, np.int32)] * len(queries))
    return tune_index(VECTORS, requests, target_recall=TARGET)


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    """Half of the queries are in the cluster of the first, from which items are removed."""
    queries = clustered(600, DIM, seed=1)
    order = np.argsort(-(queries @ queries[0]))
    return queries[np.concatenate([order[:8], order[20:600:73]])]


@pytest.fixture(scope="module")
def values(queries: np.ndarray) -> dict[str, np.ndarray]:
    """Which vectors have each value of the filter."""
    nearness, drawn = VECTORS @ queries[0], np.random.default_rng(4).random(NUM)
    return {
        "half": drawn < 0.5,
        "rare": drawn < 0.003,
        "near": nearness > np.quantile(nearness, 0.95),
        "far": nearness < np.quantile(nearness, 0.05),
    }


def written(
    tuned: Tuned, nearest: np.ndarray, values: dict[str, np.ndarray], num_gone: int, num_added: int
) -> State:
    """Removes the nearest and adds others that have all values; a quarter are old ones, moved."""
    column = [[name for name, has in values.items() if has[i]] for i in range(NUM)]
    filter_values = FilterValues()
    codes = filter_values.encode(column)
    with tempfile.TemporaryDirectory() as folder:
        tuned.searcher.save(Path(folder))
        searcher = Searcher.load(Path(folder))  # Additions change it.
    rows = np.arange(1, NUM + 1)
    candidates = Candidates(rows, VECTORS, searcher, tuned.levels, filter_values, codes)
    gone, moved = np.split(nearest[: num_gone + num_added // 4], [num_gone])
    added = np.concatenate([moved, NUM + 1 + np.arange(num_added - len(moved))])
    first = num_added // 2
    for part in (slice(first), slice(first, num_added)):
        num = len(added[part])
        candidates.change(added[part].tolist(), NEW[part], [[*values]] * num, gone.tolist())
    assert searcher.search(NEW[:1], tuned.levels[0])[2] == NUM + num_added
    old = np.setdiff1d(np.arange(NUM), np.concatenate([gone, moved]) - 1)
    has = {name: np.concatenate([x[old], np.ones(num_added, bool)]) for name, x in values.items()}
    vectors = np.concatenate([VECTORS[old], NEW[:num_added]])
    return State(candidates, np.concatenate([old + 1, added]), vectors, has)


@pytest.mark.parametrize("num_added", ADDED)
@pytest.mark.parametrize("num_removed", REMOVED)
def test_the_recall_target_holds_in_any_mixture(
    tuned: Tuned,
    queries: np.ndarray,
    values: dict[str, np.ndarray],
    num_removed: int,
    num_added: int,
) -> None:
    nearest = 1 + np.argsort(-(VECTORS @ queries[0]))
    state = written(tuned, nearest, values, num_removed, num_added)
    order = np.argsort(-(queries @ state.vectors.T), axis=1)
    for value, num_excluded, k in itertools.product(FILTERS, EXCLUDED, KS):
        # The nearest are excluded, so the exact answer begins behind them.
        excluded, rest = state.ids[order[:, :num_excluded]].tolist(), order[:, num_excluded:]
        allowed = [[value] if value else []] * len(queries)
        found, _ = state.candidates.search(queries, k, excluded, allowed)
        recalls = []
        for ids, line in zip(found, rest, strict=True):
            fine = state.ids[line[state.has[value][line]] if value else line]
            ids = ids[ids > 0]
            assert len(ids) == len(set(ids.tolist())) == min(k, len(fine))
            assert np.isin(ids, fine).all()
            recalls.append(np.isin(fine[:k], ids).mean())
        cell = f"k {k}, filter {value!r}, {num_excluded} excluded: {np.round(recalls, 2)}"
        # Both bounds allow for luck, by the deviation of a share of that many draws.
        deviation = np.sqrt(TARGET * (1 - TARGET) / k)
        assert np.mean(recalls) >= TARGET - 3 * deviation / np.sqrt(len(queries)), cell
        assert min(recalls) >= TARGET - 5 * deviation, cell
