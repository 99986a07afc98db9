"""How widely an index is set to search, against exact answers to every kind of request."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.search.test_settings import clustered
from tfrs_pipeline.search import candidates as candidates_module
from tfrs_pipeline.search import tune
from tfrs_pipeline.search.candidates import Candidates, FilterValues
from tfrs_pipeline.search.searcher import Searcher
from tfrs_pipeline.search.settings import Level
from tfrs_pipeline.search.tune import (
    Requests,
    lowest_recall,
    measure_requests,
    share_found,
    tune_index,
)

EMBEDDINGS, QUERIES = clustered(2000), clustered(60, seed=1)
NUM, TARGET = 20_000, 0.98


def tuned_on(embeddings: np.ndarray, queries: np.ndarray, target: float = 0.9) -> tune.Tuned:
    """Tunes an index on queries whose users know no items."""
    requests = Requests(queries, [np.zeros(0, np.int32)] * len(queries))
    return tune_index(embeddings, requests, target_recall=target)


class Tuned(NamedTuple):
    """An index of many vectors, queries that it was not tuned on, and their exact answers."""

    embeddings: np.ndarray
    queries: np.ndarray
    built: tune.Tuned
    order: np.ndarray

    @property
    def candidates(self) -> Candidates:
        return self.built.candidates(self.embeddings)


@pytest.fixture(scope="module")
def tuned() -> Tuned:
    embeddings, queries = clustered(NUM, dim=32), clustered(600, dim=32, seed=1)
    index = tuned_on(embeddings, queries[:400], TARGET)
    return Tuned(embeddings, queries[400:], index, ranked(embeddings, queries[400:]))


def ranked(embeddings: np.ndarray, queries: np.ndarray) -> np.ndarray:
    order = np.argsort(-(queries @ embeddings.T), axis=1, kind="stable")
    return (1 + order).astype(np.int32)


def recalls(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Returns the share of each query's exact answer that was found; rows 0 are empty slots."""
    pairs = zip(found, exact, strict=True)
    return np.array([len(set(a[a > 0]) & set(b[b > 0])) / np.count_nonzero(b) for a, b in pairs])


@pytest.mark.parametrize("k", [10, 100, 1000])
def test_one_call_reaches_the_target_for_near_and_far_exclusions(tuned: Tuned, k: int) -> None:
    _, queries, _, order = tuned
    for most in (0, 20, 50, 110, 400, 1000, 5000):
        excluded = [np.zeros(0, np.int32)] * len(queries)
        excluded[::4] = order[::4, :most]  # The nearest.
        excluded[1::4] = order[1::4, 10 * most // 9 - most : 10 * most // 9]
        excluded[2::4] = order[2::4, NUM - most :]  # The farthest. The rest exclude nothing.
        found, _ = tuned.candidates.search(queries, k, excluded)
        pairs = zip(order, excluded, strict=True)
        exact = np.stack([line[~np.isin(line, out)][:k] for line, out in pairs])
        assert not any(np.isin(a, b).any() for a, b in zip(found, excluded, strict=True))
        per_query = recalls(found, exact)
        for kind in range(4):
            assert per_query[kind::4].mean() >= TARGET, (most, kind)


def test_a_query_alone_is_answered_as_in_a_call_of_many(tuned: Tuned) -> None:
    _, queries, _, order = tuned
    excluded = [order[0, :num].tolist() for num in (0, 1, 30, 100, 900, 2000, 5000, 0)]
    excluded[1] *= 40  # A repeated item counts once.
    together = tuned.candidates.search(queries[:8], 90, excluded)
    for i in range(8):
        one = slice(i, i + 1)
        alone = tuned.candidates.search(queries[one], 90, excluded[one])
        np.testing.assert_array_equal(together[0][one], alone[0])
        np.testing.assert_allclose(together[1][one], alone[1], rtol=1e-5)


@pytest.mark.parametrize("kind", ["at random", "near", "far"])
@pytest.mark.parametrize("share", [0.5, 0.1, 0.01, 0.0001])
def test_filters_reach_the_target(tuned: Tuned, kind: str, share: float) -> None:
    embeddings, queries, index, exact_order = tuned
    rng, num = np.random.default_rng(7), round(share * NUM)
    # "near" and "far" items lie along a direction and against it, as those of a genre do.
    value = rng.random(NUM) if kind == "at random" else embeddings @ queries[0]
    order = np.argsort(value if kind != "near" else -value)
    column = np.full(NUM, "", object)
    column[order[:num]] = "some"
    values = FilterValues()
    codes = values.encode(column)
    rows = np.arange(1, NUM + 1)
    candidates = Candidates(rows, embeddings, index.searcher, index.levels, values, codes)
    request = queries, 10, list(exact_order[:, :20]), [["some"]] * len(queries)
    rows, scores = candidates.search(*request)
    exact, exact_scores = candidates.search(*request, exact=True)
    assert codes[rows[np.isfinite(scores)] - 1].all()
    np.testing.assert_array_equal(np.isneginf(scores), np.isneginf(exact_scores))
    some = (exact > 0).any(axis=1)
    # The empty id is -1.
    assert recalls(np.maximum(rows, 0)[some], np.maximum(exact, 0)[some]).mean() >= TARGET


@pytest.mark.parametrize(
    ("num_excluded", "num_values", "is_exact"),
    [(0, 0, False), (150, 0, False), (15_000, 0, True), (10, 4, False), (0, 10_000, True)],
)
def test_only_unusual_requests_are_searched_exactly(
    tuned: Tuned, monkeypatch: Any, num_excluded: int, num_values: int, is_exact: bool
) -> None:
    embeddings, queries, index, order = tuned
    exactly: list[int] = []
    score_all = candidates_module._Search.score_all

    def counted(search: Any, lines: list[int]) -> None:
        exactly.append(len(lines))
        score_all(search, lines)

    monkeypatch.setattr(candidates_module._Search, "score_all", counted)
    values, codes = None, None
    if num_values:
        values = FilterValues()
        codes = values.encode(np.random.default_rng(7).integers(0, num_values, NUM))
    rows = np.arange(1, NUM + 1)
    candidates = Candidates(rows, embeddings, index.searcher, index.levels, values, codes)
    allowed = [["1"]] * len(queries) if num_values else None
    candidates.search(queries, 10, list(order[:, :num_excluded]), allowed)
    assert exactly == ([len(queries)] if is_exact else [])


def test_equal_data_give_an_equal_index(tmp_path: Path) -> None:
    first, second = (tuned_on(EMBEDDINGS, QUERIES) for _ in range(2))
    assert first.levels == second.levels
    first.searcher.save(tmp_path / "first")
    second.searcher.save(tmp_path / "second")
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert names >= {"hashed_dataset.npy"}
    for name in names:
        one, other = (tmp_path / part / name for part in ("first", "second"))
        assert one.read_bytes() == other.read_bytes()


def test_levels_double_up_to_a_sixteenth_of_the_candidates(tuned: Tuned) -> None:
    levels = tuned.built.levels
    assert [level.depth for level in levels] == [128, 256, 512, 1024]
    assert levels[0].num_leaves_to_search < tuned.built.num_leaves
    # Deeper searches are at least as wide.
    widths = [(level.num_leaves_to_search, level.num_reordered) for level in levels]
    assert widths == sorted(widths)


NUM_LISTED = 200
# 40 queries have the same exact answer: rows 1 to 128, of falling scores.
EXACT = (
    np.tile(np.arange(1, 129, dtype=np.int32), (40, 1)),
    np.tile(np.arange(128, 0, -1, dtype=np.float32), (40, 1)),
)


def lowest(is_found: np.ndarray, known: Any = ()) -> float:
    """Returns the lowest recall if a search finds these ranks of `EXACT`, [40, 128] or [128]."""
    is_found = np.broadcast_to(is_found, EXACT[0].shape)
    found = np.where(is_found, EXACT[0], 0), np.where(is_found, EXACT[1], -np.inf)
    return lowest_recall(EXACT, found, [np.array(known, np.int32)] * 40, NUM_LISTED)


def test_the_recall_is_that_of_the_worst_kind_of_request() -> None:
    ranks = np.arange(128)
    # The first are found, half of the last are not: a request without the nearest misses half.
    assert lowest(ranks < 123) == pytest.approx(0.5)
    # The last are all found, but only four fifths of what the users do not know.
    assert lowest(ranks >= 4) == 1
    assert lowest(ranks >= 4, [*range(17, 125)]) == pytest.approx(0.8)
    # With few queries, a difference may be luck.
    is_found = np.tile(ranks >= 4, (40, 1))
    is_found[0] = False
    assert lowest(is_found) < 0.975 - 3 * 0.15 / np.sqrt(40)


def test_a_target_out_of_reach_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "lowest_recall", lambda *arguments: 0.5)
    with pytest.raises(RuntimeError, match=r"finds 0.5000. Lower the recall"):
        tuned_on(EMBEDDINGS, QUERIES)


@pytest.mark.parametrize(
    ("scores", "share"),
    [
        ([9, 8, 7, 7], 1),  # Whichever of those that score 7 they are.
        ([9, 7, 7, 7], 1),  # None replaces the 8, which is missing, but k are at least as good.
        ([9, 8, 7, 6.99], 0.75),
        ([9, 8, -np.inf, -np.inf], 0.5),
    ],
)
def test_equal_scores_are_found(scores: list[float], share: float) -> None:
    exact = np.array([[9, 8, 7, 7]], np.float32)
    np.testing.assert_array_equal(share_found(exact, np.array([scores], np.float32)), [share])
    # Slots that exclusions emptied are not looked for.
    exact[0, 0] = -np.inf
    assert share_found(exact, np.array([[8, 7, 7, 5]], np.float32)) == 1


@pytest.mark.parametrize("num_candidates", [16, 40])
def test_a_corpus_smaller_than_k_is_found_whole(num_candidates: int) -> None:
    index = tuned_on(EMBEDDINGS[:num_candidates], QUERIES, 0.99)
    assert [level.depth for level in index.levels] == [num_candidates]
    candidates = index.candidates(EMBEDDINGS[:num_candidates])
    rows, _ = candidates.search(QUERIES, 100, [[1]] * len(QUERIES))
    everything = [[*[-1] * (101 - num_candidates), *range(2, num_candidates + 1)]] * len(QUERIES)
    np.testing.assert_array_equal(np.sort(rows, axis=1), everything)


def test_the_measured_recall_is_that_of_a_slow_loop() -> None:
    levels = [Level(128, 1, 128), Level(1999, 9, 1999)]
    rows = np.arange(1, len(EMBEDDINGS) + 1)
    candidates = Candidates(rows, EMBEDDINGS, Searcher.build(EMBEDDINGS, 45), levels)
    queries = QUERIES[:16]
    known = [np.arange(1, 1 + 9 * i, dtype=np.int32) for i in range(len(queries))]
    requests = measure_requests(candidates, Requests(queries, known))
    measured = {(x["k"], x["excluded"]): x for x in requests}
    order = ranked(EMBEDDINGS, queries)
    for (k, name), figures in measured.items():
        per_query = []
        for i, line in enumerate(order):
            out = known[i] if name == "known" else line[:name]
            exact = line[~np.isin(line, out)][:k]
            found, _ = candidates.search(queries[i : i + 1], k, [out])
            per_query.append(len(set(found[0]) & set(exact)) / k)
        # A candidate that scores like the last of the k may replace it.
        assert figures["recall"] == pytest.approx(np.mean(per_query), abs=2e-3)
    assert 0.2 < measured[10, 0]["recall"] < 1
    assert (1000, 1000) not in measured  # There are only 2,000 candidates.


def test_refuses_too_few_queries_or_candidates() -> None:
    with pytest.raises(ValueError, match="0 queries"):
        tuned_on(EMBEDDINGS, QUERIES[:0])
    with pytest.raises(ValueError, match="Received: 15 candidates"):
        tuned_on(EMBEDDINGS[:15], QUERIES)


def test_an_index_is_measured_on_other_queries_than_it_is_tuned_on() -> None:
    queries = np.arange(500, dtype=np.float32)[:, np.newaxis]
    requests = Requests(queries, [np.array([i]) for i in range(500)])
    tuning, measured = requests.for_tuning_and_measuring()
    assert (len(tuning.queries), len(measured.queries)) == (372, 128)
    assert sorted([*tuning.queries[:, 0], *measured.queries[:, 0]]) == list(range(500))
    for part in (tuning, measured):
        assert [known.item() for known in part.known] == part.queries[:, 0].tolist()
    few = Requests(queries[:300], requests.known[:300])
    assert few.for_tuning_and_measuring() == (few, few)
