import mmap
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from implicit.cpu.als import AlternatingLeastSquares
from threadpoolctl import threadpool_info, threadpool_limits

import tfrs_pipeline as tp
from tests.small_log import in_ibis
from tfrs_pipeline.data.held_out_queries import numbered
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.schema import Ties
from tfrs_pipeline.evaluation import baselines
from tfrs_pipeline.evaluation.interactions import Interactions, clicked_rows


def random_interactions(
    num_users: int, num_items: int, first_id: int = 0, density: float = 0.2
) -> Interactions:
    clicks = np.random.default_rng(0).random((num_users, num_items)) < density
    users, columns = np.nonzero(clicks)
    return Interactions.from_rows(Ids(np.arange(num_items) + first_id), users, columns + 1)


def test_a_log_marks_each_positive_once() -> None:
    events = {"user_id": [*"vuvvwv"], "item_id": [30, 10, 30, 20, 10, 10]}
    events["stage"] = ["clicked"] * 4 + ["exposed"] * 2
    items, users = {"item_id": [30, 40, 10, 20]}, {"user_id": [*"uvw"]}
    log = tp.Log(in_ibis(events), in_ibis(items), in_ibis(users))
    found = Interactions.of(log)
    assert found.items.values.tolist() == [10, 20, 30, 40]
    # A row for u and for v; w has no positive.
    assert found.matrix.toarray().tolist() == [[1, 0, 0, 0], [0, 1, 1, 0]]
    ids, scores = tp.MostPopular().fit(log).retrieve([{}], 4)
    # Of equal counts, the items of the user with more items come first.
    assert ids.tolist() == [[20, 30, 10, 40]]
    assert np.floor(scores).tolist() == [[1, 1, 1, 0]]


@pytest.mark.parametrize("kind", [tp.MostPopular, tp.Transitions, tp.Ease])
def test_a_log_whose_items_lack_a_clicked_one_is_refused(kind: Any) -> None:
    log = tp.Log.from_table(pd.DataFrame({"user_id": [1, 1], "item_id": [1, 2]}))
    lacking = replace(log, items=log.items.filter(log.items["item_id"] == 1))
    with pytest.raises(ValueError, match="1 of 2 clicked items are not among"):
        kind().fit(lacking)


def test_popularity_ranks_by_users_and_breaks_ties_by_what_else_they_clicked() -> None:
    users, columns = np.nonzero([[1, 1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1]])
    train = Interactions.from_rows(Ids(["d", "c", "b", "a"]), users, columns + 1)
    ids, scores = tp.MostPopular().fit(train).retrieve([{}, {}], 3, [[], ["a", "unheard of"]])
    assert ids.tolist() == [["a", "c", "d"], ["c", "d", "b"]]
    assert np.floor(scores).tolist() == [[3, 2, 1], [2, 1, 0]]


def test_popularity_of_late_counts_the_last_positives_first() -> None:
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 20, 400), rng.integers(0, 30, 400)
    events = pd.DataFrame({"user_id": users, "item_id": items})
    events["timestamp"] = pd.to_datetime(10**9 + rng.permutation(400), unit="s", utc=True)
    log = tp.Log.from_table(events)
    last = events[events["timestamp"] >= pd.Timestamp(10**9 + 300, unit="s", tz="UTC")]
    numbers = [x.groupby("item_id")["user_id"].nunique() for x in (last, events)]
    ties = Interactions.of(log).rarity[1]
    ranked = sorted(range(30), key=lambda item: (*(-x.get(item, 0) for x in numbers), -ties[item]))
    ids, _ = tp.MostPopular(latest=0.25).fit(log).retrieve([{}], 30)
    assert ids.tolist() == [ranked]
    assert ids.tolist() != tp.MostPopular().fit(log).retrieve([{}], 30)[0].tolist()


@pytest.mark.parametrize(("share", "num_latest"), [(0.07, 7), (0.071, 8), (1e-12, 1)])
def test_popularity_of_late_does_not_round_float_noise_up(share: float, num_latest: int) -> None:
    times = pd.to_datetime(10**9 + np.arange(100), unit="s", utc=True)
    events = pd.DataFrame({"user_id": range(100), "item_id": range(100), "timestamp": times})
    _, scores = tp.MostPopular(latest=share).fit(tp.Log.from_table(events)).retrieve([{}], 100)
    assert np.count_nonzero(scores >= 1) == num_latest


def test_popularity_of_late_needs_times() -> None:
    clicks = {"user_id": [1, 1], "item_id": [1, 2]}
    with pytest.raises(ValueError, match="timestamps, and the log has none"):
        tp.MostPopular(latest=0.5).fit(tp.Log.from_table(pd.DataFrame(clicks)))
    with pytest.raises(ValueError, match="interactions lack"):
        tp.MostPopular(latest=0.5).fit(random_interactions(3, 3))


def test_repeats_rank_own_items_by_number_then_time_and_then_others_by_users() -> None:
    train = random_interactions(40, 12, first_id=100)
    popular = tp.MostPopular().fit(train).retrieve([{}], 12)[0][0].tolist()
    rng = np.random.default_rng(1)
    histories = [rng.integers(98, 112, n).tolist() for n in (0, 1, 9, 30)]
    queries: list[tp.Query] = [{"history": history} for history in histories]
    found, _ = tp.Repeats().fit(train).retrieve(queries, 12)
    for ids, history in zip(found.tolist(), histories, strict=True):
        own = [item for item in set(history) if 100 <= item < 112]
        last = {item: place for place, item in enumerate(history)}
        own.sort(key=lambda item: (-history.count(item), -last[item]))
        assert ids == own + [item for item in popular if item not in own]


def in_turn(histories: dict[Any, Sequence[int]], **columns: Any) -> tp.Log:
    """Makes a log in which users take turns, so that its rows are not grouped by user."""
    rows = [(i, user, item) for user, h in histories.items() for i, item in enumerate(h)]
    _, users, items = zip(*sorted(rows), strict=True)
    return tp.Log.from_table(pd.DataFrame({"user_id": users, "item_id": items}), **columns)


def test_transitions_count_what_came_next_beside_popularity() -> None:
    rng = np.random.default_rng(0)
    histories = {user: rng.integers(0, 9, rng.integers(1, 12)).tolist() for user in range(20)}
    found = tp.Transitions(prior=3.0, window=2).fit(in_turn(histories))
    num_users = np.array([sum(j in h for h in histories.values()) for j in range(9)])
    prior = 3 * num_users / num_users.sum()
    for before, last in ((3, 0), (0, 3), (5, 5), (None, 7), (8, 1)):
        num = np.zeros(9)
        for history in histories.values():
            for i, item in enumerate(history):
                for weight, later in zip((1, 0.8), history[i + 1 :], strict=False):
                    num[later] += weight * ((item == last) + 0.3 * (item == before))
        scores = (num + prior) / (num.sum() + prior.sum())
        known = [last] if before is None else [before, last]
        ids, of_ids = found.retrieve([{"history": [77, *known, 77]}], 9)
        np.testing.assert_allclose(of_ids[0], scores[ids[0]], rtol=1e-5)
        assert of_ids.sum() == pytest.approx(1, rel=1e-5)
    popular = tp.MostPopular().fit(in_turn(histories)).retrieve([{}], 9)[0]
    assert found.retrieve([{"history": [77]}], 9)[0].tolist() == popular.tolist()


def test_transitions_follow_the_time_and_lead_from_one_request_to_the_next() -> None:
    """A user clicks 1 and 2, then 3 and 4, each pair from one request; rows are backwards."""
    clicks = {"user_id": 7, "item_id": [5, 4, 3, 2, 1], "request_id": [None, "b", "b", "a", "a"]}
    times = pd.to_datetime([10**9 - i for i in range(5)], unit="s", utc=True)
    log = tp.Log.from_table(pd.DataFrame(clicks | {"timestamp": times}))
    score = tp.Transitions(prior=1e-9, window=1).fit(log).score
    scores = score([{"history": [item]} for item in range(1, 6)])
    assert scores.round(3).tolist()[1:4] == [[0, 0, 0.5, 0.5, 0], [0.2] * 5, [0, 0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("ties", "after_1", "after_2"),
    [("drop", [0, 0.5, 0.5, 0], [0.25] * 4), ("order", [0, 1, 0, 0], [0, 0, 1, 0])],
)
def test_transitions_at_equal_times(ties: Ties, after_1: list[float], after_2: list[float]) -> None:
    """A user clicks 1, then 2 and 3 at one time, then 4."""
    times = pd.to_datetime(10**9 + np.array([0, 5, 5, 9]), unit="s", utc=True)
    events = pd.DataFrame({"user_id": 7, "item_id": [1, 2, 3, 4], "timestamp": times})
    log = tp.Log.from_table(events, reading=tp.Reading(ties=ties))
    score = tp.Transitions(prior=1e-9, window=1).fit(log).score
    found = score([{"history": [item]} for item in (1, 2, 3)]).round(3).tolist()
    assert found == [after_1, after_2, [0, 0, 0, 1]]


def test_transitions_need_an_order_and_no_more_positives_than_the_window() -> None:
    found = tp.Transitions(window=5).fit(in_turn({1: [1, 2]}))
    assert found.retrieve([{"history": [1]}], 2)[0].tolist() == [[2, 1]]
    log = in_turn({1: [1, 2]}, reading=tp.Reading(is_ordered=False))
    with pytest.raises(ValueError, match=r"nothing follows anything.*is_ordered"):
        tp.Transitions().fit(log)


def slow_similarities(train: Interactions, plan: tp.ItemKnn) -> np.ndarray:
    """Computes every s_ij by its formula: [num_items, num_items]."""
    clicks = train.matrix.toarray().astype(np.float64)
    num_items = clicks.shape[1]
    num, num_users = np.zeros((num_items, num_items)), np.zeros(num_items)
    for line in clicks:
        clicked = np.flatnonzero(line)
        idf = np.log(num_items / (1 + len(clicked)))
        weight = idf**2 if plan.bm25 else 1 / np.sqrt(len(clicked))
        for i in clicked:
            num_users[i] += weight
            num[i, clicked] += weight
    if plan.bm25:
        mean = clicks.sum() / num_items
        b = [101 / (1 + 100 * (0.2 + 0.8 * n / mean)) for n in clicks.sum(axis=0)]
        return num * np.outer(b, b)
    num_users = np.maximum(num_users, 1e-12)
    alone = np.outer(num_users**plan.alpha, num_users ** (1 - plan.alpha))
    return num / (alone + plan.shrinkage)


def slow_neighbors(train: Interactions, plan: tp.ItemKnn, num_kept: int) -> np.ndarray:
    """Keeps of each column the largest s_ij: [num_items, num_items]; 0 for the others."""
    similar = np.zeros((len(train.items), len(train.items)))
    for j, similarities in enumerate(slow_similarities(train, plan).T):
        if not plan.own_items:
            similarities[j] = 0
        best = np.argsort(-similarities.astype(np.float32), kind="stable")[:num_kept]
        similar[best, j] = similarities[best]
    return similar


@pytest.mark.parametrize(
    "plan",
    [
        tp.ItemKnn(0.5, 0.0, 1.0),
        tp.ItemKnn(0.8, 2.0, 0.7, own_items=True),
        tp.ItemKnn(0.2, 1.0, 0.7, 3),
        tp.ItemKnn(decay=0.7, bm25=True),
        tp.ItemKnn(num_neighbors=4, own_items=True, bm25=True),
    ],
)
def test_itemknn_equals_its_formula(plan: tp.ItemKnn) -> None:
    """Candidates without a neighbor in the history follow by popularity, below 0."""
    train = random_interactions(40, 30, first_id=100, density=0.05)
    similar = slow_neighbors(train, plan, plan.num_neighbors)
    popular = train.popularity / (1 + train.popularity.max()) - 1
    rng = np.random.default_rng(1)
    # 98, 99 and 131 are not in the corpus; a long history has items again.
    histories = [rng.integers(98, 132, n).tolist() for n in (0, 1, 2, 9, 50)]
    queries: list[tp.Query] = [{"history": history} for history in histories]
    ids, scores = plan.fit(train).retrieve(queries, 30)
    num_ranked = []
    for row_ids, row_scores, history in zip(ids, scores, histories, strict=True):
        known = [item - 100 for item in history if 100 <= item < 130]
        expected = np.zeros(30)
        for steps, column in enumerate(reversed(known)):
            expected += plan.decay**steps * similar[column]
        num_ranked.append(np.count_nonzero(expected))
        expected = np.where(expected > 0, expected, popular)
        np.testing.assert_allclose(row_scores, expected[row_ids - 100], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(np.sort(row_scores)[::-1], row_scores)
        assert sorted(row_ids) == list(range(100, 130))
    assert num_ranked[0] == 0
    assert any(0 < num < 30 for num in num_ranked)


def test_itemknn_breaks_ties_by_order_among_neighbors_and_candidates() -> None:
    """All of four items have the same two users; each candidate keeps its first two neighbors."""
    users, columns = np.nonzero(np.ones((2, 4)))
    train = Interactions.from_rows(Ids(["d", "c", "b", "a"]), users, columns + 1)
    fitted = tp.ItemKnn(num_neighbors=2).fit(train)
    queries: list[tp.Query] = [{"history": [item]} for item in "dcba"]
    ids, scores = fitted.retrieve(queries, 4)
    # The neighbors of d are c and b, those of c are d and b, those of b and a are d and c.
    assert ids.tolist() == [[*"cbad"], [*"dbac"], [*"dcba"], [*"dcba"]]
    assert (scores > 0).sum(axis=1).tolist() == [3, 3, 2, 0]
    excluded = fitted.retrieve(queries[:1], 4, [["b", "c", "d", "unheard of"]])
    assert excluded[0].tolist() == [["a", "", "", ""]]
    assert excluded[1][0, 1:].tolist() == [-np.inf] * 3


def test_itemknn_does_not_depend_on_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    train = random_interactions(60, 40)
    queries: list[tp.Query] = [{"history": [i, 2 * i, 7]} for i in range(20)]
    whole = tp.ItemKnn(num_neighbors=5).fit(train).retrieve(queries, 40)
    for size in (1, 300):
        monkeypatch.setattr(baselines, "_PAIRS_PER_BLOCK", size)
        parts = tp.ItemKnn(num_neighbors=5).fit(train).retrieve(queries, 40)
        np.testing.assert_array_equal(parts, whole)


def test_itemknn_leaves_out_the_longest_users_beyond_its_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clicks = np.zeros((4, 9))
    clicks[0, :] = clicks[1, :2] = clicks[2, 2:5] = clicks[3, [0, 1]] = 1
    users, columns = np.nonzero(clicks)
    train = Interactions.from_rows(Ids(np.arange(9)), users, columns + 1)
    is_kept = users > 0
    without = Interactions.from_rows(train.items, users[is_kept], columns[is_kept] + 1)
    queries: list[tp.Query] = [{"history": [i]} for i in range(9)]
    everything, expected = (
        tp.ItemKnn().fit(clicked).retrieve(queries, 9)[1] for clicked in (train, without)
    )
    monkeypatch.setattr(baselines, "_MAX_PAIRS", 2 * 2 + 2 * 2 + 3 * 3)
    bounded = tp.ItemKnn().fit(train).retrieve(queries, 9)[1]
    np.testing.assert_array_equal(np.maximum(bounded, 0), np.maximum(expected, 0))
    assert (everything > 0).sum() == 9 * 8
    assert (bounded > 0).sum() == 2 + 3 * 2
    monkeypatch.setattr(baselines, "_MAX_PAIRS", 1)
    popular = tp.MostPopular().fit(train).retrieve(queries, 9)[0]
    assert tp.ItemKnn().fit(train).retrieve(queries, 9)[0].tolist() == popular.tolist()


def test_itemknn_needs_no_matrix_of_a_wide_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of all pairs would take 256 MB; the neighbors of all items together are bounded."""
    rng, num_items = np.random.default_rng(0), 8_000
    users, rows = np.arange(9_000) // 5, rng.integers(1, num_items + 1, 9_000)
    train = Interactions.from_rows(Ids(np.arange(num_items)), users, rows)
    monkeypatch.setattr(baselines, "_MAX_NEIGHBORS", 2 * num_items)
    monkeypatch.setattr(baselines, "_PAIRS_PER_BLOCK", 1 << 14)
    tracemalloc.start()
    try:
        fitted = tp.ItemKnn().fit(train)
        _, scores = fitted.retrieve([{"history": (rows - 1).tolist()}] * 3, 50)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (scores > 0).all()
    assert peak < 10e6
    queries: list[tp.Query] = [{"history": [item]} for item in range(num_items)]
    num_neighbors = sum(
        (fitted.score(queries[start : start + 1000]) > 0).sum(axis=0)
        for start in range(0, num_items, 1000)
    )
    assert np.max(num_neighbors) == 2


def test_ease_equals_a_ridge_regression_of_each_column_on_the_others() -> None:
    train = random_interactions(60, 9, first_id=100)
    retriever = tp.Ease(l2=3.0).fit(train)
    weights = retriever.score([{"history": [100 + column]} for column in range(9)])
    dense = train.matrix.toarray().astype(np.float64)
    for column in range(9):
        others = np.delete(np.arange(9), column)
        x = dense[:, others]
        slow = np.linalg.solve(x.T @ x + 3.0 * np.eye(8), x.T @ dense[:, column])
        np.testing.assert_allclose(weights[others, column], slow, rtol=1e-5, atol=1e-7)
        assert weights[column, column] == 0
    # Repeats in a history count once, as in the fit; 999 is not in the corpus.
    ids, scores = retriever.retrieve([{"history": [103, 107, 103, 999]}], 9)
    expected = weights[3] + weights[7]
    np.testing.assert_allclose(scores[0], np.sort(expected)[::-1], rtol=1e-6)
    np.testing.assert_array_equal(ids[0], 100 + np.argsort(-expected, kind="stable"))


def test_ease_solves_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """With several, SciPy's OpenBLAS crashes in it from about 16,000 items on."""
    threads: dict[str, set[int]] = {}

    def watched(name: str) -> Callable[..., Any]:
        function = getattr(baselines.lapack, name)

        def call(*arguments: Any, **options: Any) -> Any:
            blas = [x for x in threadpool_info() if x["user_api"] == "blas"]
            threads[name] = {x["num_threads"] for x in blas}
            return function(*arguments, **options)

        return call

    calls = {name: watched(name) for name in ("dpotrf", "dpotri")}
    monkeypatch.setattr(baselines, "lapack", SimpleNamespace(**calls))
    with threadpool_limits(2, "blas"):
        tp.Ease().fit(random_interactions(20, 5))
        blas = [x for x in threadpool_info() if x["user_api"] == "blas"]
    assert threads == {"dpotrf": {1}, "dpotri": {1}}
    assert {x["num_threads"] for x in blas} == {2}


def test_ease_refuses_a_corpus_that_would_not_fit_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    train = Interactions.from_rows(Ids(np.arange(50_000)), np.array([0]), np.array([1]))
    with pytest.raises(ValueError, match=r"50,000 take 20\.0 GB of memory.*Use Ials"):
        tp.Ease().fit(train)
    monkeypatch.setattr(baselines, "memory_left", lambda: 19e9)
    with pytest.raises(MemoryError, match=r"50,000 take 20\.0 GB of memory, and 19\.0 GB are free"):
        tp.Ease(max_candidates=50_000).fit(train)


def test_the_memory_left_is_that_of_the_machine_or_of_its_container(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:    7000 kB\n")
    group = tmp_path / "group"
    left = {"no container": baselines.memory_left(tmp_path, group)}
    group.mkdir()
    (group / "memory.current").write_text("3000000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 1000000\n")
    for limit in ("max", "4000000", "90000000"):
        (group / "memory.max").write_text(f"{limit}\n")
        left[limit] = baselines.memory_left(tmp_path, group)
    machine = 7000 * 1024
    assert left == {"no container": machine, "max": machine, "4000000": 2_000_000,
                    "90000000": machine}  # fmt: skip
    assert 0 < baselines.memory_left() < np.inf == baselines.memory_left(group, group / "none")


def test_ials_users_solve_their_least_squares() -> None:
    train = random_interactions(80, 20)
    retriever = tp.Ials(4, 2.0, 5.0, num_threads=1).fit(train)
    settings = {"factors": 4, "regularization": 2.0, "alpha": 5.0, "random_state": 0}
    library = AlternatingLeastSquares(**settings, num_threads=1)
    users, order = map(np.argsort, train.rarity)  # Each row's start is drawn in this order.
    library.fit(train.matrix[users][:, order], show_progress=False)
    items = library.item_factors[np.argsort(order)].astype(np.float64)
    history = [3, 11, 12]
    clicked = np.isin(np.arange(20), history).astype(float)
    confidence = np.where(clicked, 5.0, 1.0)
    gram = (items * confidence[:, None]).T @ items + 2.0 * np.eye(4)
    user = np.linalg.solve(gram, items.T @ (confidence * clicked))
    ids, scores = retriever.retrieve([{"history": history}], 20)
    np.testing.assert_allclose(scores[0], (items @ user)[ids[0]], rtol=1e-3, atol=1e-5)


def test_ials_depends_on_its_seed_not_on_the_number_of_threads() -> None:
    train = random_interactions(80, 20)
    plan, options = tp.Ials(4, 1.0, 5.0, num_iterations=3), ((0, 1), (0, 2), (1, 1))
    fitted = [replace(plan, seed=seed, num_threads=num).fit(train) for seed, num in options]
    first, *others = (r.retrieve([{"history": [1, 2]}], 20)[1] for r in fitted)
    assert [np.array_equal(first, other) for other in others] == [True, False]


@pytest.mark.parametrize(
    "plan", [tp.MostPopular(), tp.Repeats(), tp.ItemKnn(), tp.Ease(), tp.Ials(2)]
)
def test_a_fit_returns_a_retriever_and_leaves_earlier_ones_as_they_were(plan: Any) -> None:
    assert not isinstance(plan, tp.Retriever)
    query: tp.Query = {"history": [1, 2]}
    first = plan.fit(random_interactions(30, 8))
    before = first.retrieve([query], 8)
    other = plan.fit(random_interactions(9, 3))
    assert isinstance(first, tp.Retriever)
    assert other.retrieve([query], 8)[0].max() < 3
    for kept, again in zip(before, first.retrieve([query], 8), strict=True):
        np.testing.assert_array_equal(kept, again)


@pytest.mark.parametrize("kind", [tp.MostPopular, tp.Transitions, tp.ItemKnn, tp.Ease, tp.Ials])
def test_refuses_to_fit_to_what_is_no_log(kind: Any) -> None:
    with pytest.raises(TypeError, match=r"fit takes a Log.* Received: dict"):
        kind().fit({})


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (tp.Ease, "l2"),
        (tp.MostPopular, "latest"),
        (tp.Ials, "alpha"),
        (tp.ItemKnn, "decay"),
        (tp.ItemKnn, "num_neighbors"),
        (tp.Transitions, "window"),
    ],
)
def test_refuses_settings_out_of_range(kind: Any, name: str) -> None:
    with pytest.raises(tp.ConfigError, match=f"{name}: got 0; must be greater than 0"):
        kind(**{name: 0})


@pytest.mark.parametrize("kind", [tp.Ease, tp.Ials])
def test_without_a_known_item_the_most_popular_come(kind: Any) -> None:
    """By the model's own scores all items are tied, and would come in the order of their ids."""
    train = random_interactions(30, 5)
    queries: list[tp.Query] = [{"history": []}, {"history": [1]}, {"history": [77]}]
    ids, scores = kind().fit(train).retrieve(queries, 3)
    expected_ids, expected = tp.MostPopular().fit(train).retrieve(queries, 3)
    items = Ids(["a", "b", "c", "d"])
    no_count = Interactions.from_rows(items, np.array([0, 1, 1]), np.array([2, 2, 1]))
    only, _ = kind().fit(no_count).retrieve([{"history": ["d"]}], 2)
    assert only.tolist() == [["b", "a"]]
    assert ids[::2].tolist() == expected_ids[::2].tolist()
    assert scores[::2].tolist() == expected[::2].tolist()
    assert scores[1].tolist() != expected[1].tolist()


def test_text_ids_of_more_than_two_gigabytes_are_numbered() -> None:
    # A chunk of text holds 2 GB at most. The pages of this one are all the system's empty page.
    length, num = 1 << 20, 1100
    offsets = pa.py_buffer(np.arange(num + 1, dtype=np.int32) * length)
    letters = pa.py_buffer(mmap.mmap(-1, num * length))
    chunk = pa.Array.from_buffers(pa.string(), num, [None, offsets, letters])
    clicked = pa.table({"item_id": pa.chunked_array([chunk, chunk])})
    rows = clicked_rows(clicked, Ids(["a", "\0" * length]))
    assert rows.tolist() == [2] * 2 * num
    assert numbered(clicked["item_id"]).tolist() == [0] * 2 * num


@pytest.fixture(scope="module")
def with_ties() -> pd.DataFrame:
    """Clicks at times of their own on 40 items, most of which share their count with others."""
    rng = np.random.default_rng(3)
    events = pd.DataFrame(
        {"user_id": rng.integers(0, 50, 600), "item_id": 39 - rng.geometric(0.06, 600) % 40}
    )
    events["timestamp"] = pd.to_datetime(10**9 + rng.permutation(600), unit="s", utc=True)
    counts = events.drop_duplicates(["user_id", "item_id"])["item_id"].value_counts()
    assert counts.duplicated(keep=False).sum() > 20
    return events


def measured(events: pd.DataFrame, kind: type[baselines.Baseline]) -> list[dict[str, float]]:
    """Measures the first and the last form of a baseline by the last clicks of all."""
    split = tp.Log.from_table(events).split("time")
    forms = kind.forms(seed=0, by_time=False, exclude="none")
    plans: list[baselines.Baseline] = [forms[0], forms[-1]]
    if kind.label == tp.Ials.label:  # Far from the solution, which does not depend on the start.
        plans = [tp.Ials(4, 2.0, num_iterations=2, num_threads=1)]
    models = {str(plan): plan.fit(split.before_test) for plan in plans}
    holdout = split.holdout("test", by="requests")
    results = tp.evaluate(models, holdout, exclude="none", cutoffs=(1, 10, 40)).results
    return [
        {name: interval.mean for name, interval in result.overall.intervals.items()}
        for result in results.values()
    ]


@pytest.mark.parametrize("name", [*baselines.BASELINES])
def test_names_and_the_order_of_rows_change_no_metric(name: str, with_ties: pd.DataFrame) -> None:
    kind = baselines.BASELINES[name]
    expected = measured(with_ties, kind)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        renamed = with_ties.sample(frac=1, random_state=seed)
        for column, num in (("user_id", 50), ("item_id", 40)):
            renamed[column] = rng.permutation(num)[renamed[column]]
        for found, by_form in zip(measured(renamed, kind), expected, strict=True):
            assert found == pytest.approx(by_form, rel=1e-9)
