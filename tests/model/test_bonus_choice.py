"""The bonus that a history gives to its items and their neighbours: validation chooses it."""

import dataclasses
import tracemalloc
from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.model.conftest import tiny, untrained
from tfrs_pipeline import Holdout, Log, TrainingSet, TrainingSettings, evaluate, metric_of
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.model.bonus_choice import choose_bonus, item_graph
from tfrs_pipeline.search import topk
from tfrs_pipeline.search.history_bonus import HistoryBonus, RepeatBonus
from tfrs_pipeline.search.item_graph import KINDS
from tfrs_pipeline.search.topk import ExactRetriever

NUM_USERS, NUM_ITEMS, DIM = 150, 60, 8
HISTORIES = st.lists(st.lists(st.integers(0, 5), max_size=12), min_size=1, max_size=4)


@given(HISTORIES, st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5]))
def test_the_bonus_is_what_a_loop_adds_up(
    histories: list[list[int]], power: float, forgetting: float
) -> None:
    """`histories` are most recent first; 0 is an unknown item, and not counted."""
    bonus = RepeatBonus(-1.5, power, forgetting)
    for history in histories:
        rows, values = bonus.of(np.array(history, np.int32))
        known = [row for row in history if row]
        n: dict[int, float] = defaultdict(float)
        for age, row in enumerate(known):
            n[row] += 1 / (1 + age) ** forgetting
        assert rows.tolist() == list(dict.fromkeys(known))
        np.testing.assert_allclose(values, [-1.5 * n[row] ** power for row in rows], rtol=1e-5)


def log_of(kind: str) -> Log:
    """Makes a log: "favourites" come again and again, others never, or by chance as any other.

    "latest" is like messages: most go to whoever was written to just before, whoever that is.
    """
    rng = np.random.default_rng(5)
    users, items = [], []
    for user in range(NUM_USERS):
        favourites = rng.choice(NUM_ITEMS, 3, replace=False)
        if kind == "favourites":
            clicked = np.where(
                rng.random(20) < 0.6, rng.choice(favourites, 20), rng.integers(0, NUM_ITEMS, 20)
            )
        elif kind == "chance":
            clicked = rng.integers(0, NUM_ITEMS, 20)
        elif kind == "latest":
            clicked = rng.integers(0, NUM_ITEMS, 20)
            for position in np.flatnonzero(rng.random(19) < 0.7) + 1:
                clicked[position] = clicked[position - 1]
        else:  # No item comes twice.
            clicked = rng.permutation(NUM_ITEMS)[:20]
        users += [user] * 20
        items += (10 + clicked).tolist()
    return Log.from_table(pa.table({"user_id": users, "item_id": items}))


Vectors = tuple[Any, np.ndarray, np.ndarray]


def vectors_of(holdout: Holdout) -> Vectors:
    """Draws vectors of items and queries, without regard to the log."""
    rng = np.random.default_rng(6)
    items = rng.normal(size=(NUM_ITEMS, DIM)).astype(np.float32)
    queries = rng.normal(size=(NUM_USERS, DIM)).astype(np.float32)
    # In another order than the holdout's, so that a mix-up of rows shows.
    return holdout.candidate_ids[::-1], items, queries


@pytest.mark.parametrize(
    ("kind", "forgettings"),
    [("favourites", {0.0, 0.5}), ("latest", {1.5}), ("chance", set()), ("never", set())],
)
def test_validation_chooses_a_bonus_where_items_come_again(
    kind: str, forgettings: set[float]
) -> None:
    split = log_of(kind).split("last_n", validation=2, test=2)
    vectors = vectors_of(split.validation)
    metric: Any = metric_of("ndcg@10")
    chosen = choose_bonus(*vectors, split.validation, metric, exclude="none", graphs={})
    if not forgettings:
        assert chosen is None
        return
    assert chosen is not None
    assert chosen.repeats is not None
    assert chosen.neighbours is None
    assert chosen.repeats.weight > 0
    assert chosen.repeats.power == 0.5
    assert chosen.repeats.forgetting in forgettings
    assert gain_of(chosen, vectors, split.validation, "none") > 0.2


def gain_of(bonus: HistoryBonus, vectors: Vectors, holdout: Holdout, exclude: Any) -> float:
    """Measures by a second route, exact search, what a bonus gains; the notes have to say it."""
    ids, items, queries = vectors
    by_user = dict(zip(holdout.user_ids.tolist(), queries, strict=True))
    exact = ExactRetriever(
        ids, items, lambda asked: np.stack([by_user[q["user_id"]] for q in asked])
    )
    models: dict[str, Any] = {"without": exact}
    so_far = HistoryBonus()
    for part in (HistoryBonus(bonus.repeats), HistoryBonus(None, bonus.neighbours, bonus.graph)):
        if part:
            so_far = so_far.plus(part)
            models[str(part)] = so_far.added_to(exact)
    measured = evaluate(models, holdout, exclude=exclude, metrics=[metric_of("ndcg@10")])
    means = [np.mean(result.per_query["ndcg@10"]) for result in measured.results.values()]
    gains = np.diff(means)
    for name, gain, note in zip([*models][1:], gains, bonus.notes, strict=True):
        assert note.startswith(f"{name}, chosen on validation: ndcg@10 {gain:+.4f}")
    return float(means[-1] - means[0])


def following(share: float, *, is_again: bool = False) -> Log:
    """Makes a log in which each item has one that follows it, with a share, and else any follows.

    With `is_again`, half of the others are what the user clicked first.
    """
    rng = np.random.default_rng(8)
    after = rng.permutation(NUM_ITEMS)
    users, items = np.repeat(np.arange(NUM_USERS), 20), []
    for _ in range(NUM_USERS):
        first = item = int(rng.integers(NUM_ITEMS))
        for _ in range(20):
            items.append(10 + item)
            other = first if is_again and rng.random() < 0.5 else int(rng.integers(NUM_ITEMS))
            item = int(after[item]) if rng.random() < share else other
    return Log.from_table(pa.table({"user_id": users, "item_id": items}))


@pytest.mark.parametrize("exclude", ["clicked", "none"])
@pytest.mark.parametrize("share", [0.6, 0.0])
def test_validation_chooses_neighbours_where_one_item_follows_another(
    share: float, exclude: Any
) -> None:
    split = following(share).split("last_n", validation=2, test=2)
    vectors, metric = vectors_of(split.validation), metric_of("ndcg@10")
    ids = vectors[0]
    graphs = {kind: item_graph(split.train, np.arange(NUM_USERS), ids, kind) for kind in KINDS}
    chosen = choose_bonus(*vectors, split.validation, metric, exclude=exclude, graphs=graphs)
    if not share:
        assert chosen is None
        return
    assert chosen is not None
    assert chosen.repeats is None
    assert chosen.neighbours is not None
    assert chosen.neighbours.kind == "what came next"
    assert chosen.graph is graphs["what came next"]
    assert gain_of(chosen, vectors, split.validation, exclude) > 0.2
    # Items that cannot follow: the same graph with its neighbours mixed up gains nothing.
    mixed = {kind: item_graph(split.train, np.arange(NUM_USERS), ids[::-1], kind) for kind in KINDS}
    metric = metric_of("ndcg@10")
    assert not choose_bonus(*vectors, split.validation, metric, exclude=exclude, graphs=mixed)


def test_both_parts_may_be_chosen() -> None:
    """Neighbours have to gain beyond what repeats have gained."""
    split = following(0.4, is_again=True).split("last_n", validation=2, test=2)
    rng = np.random.default_rng(6)
    items = rng.normal(size=(NUM_ITEMS, DIM)).astype(np.float32)
    queries = rng.normal(size=(NUM_USERS, DIM)).astype(np.float32)
    ids, metric = split.validation.candidate_ids, metric_of("ndcg@10")
    graphs = {kind: item_graph(split.train, np.arange(NUM_USERS), ids, kind) for kind in KINDS}
    vectors = ids, items, queries
    chosen = choose_bonus(*vectors, split.validation, metric, exclude="none", graphs=graphs)
    assert chosen is not None
    assert chosen.repeats is not None
    assert chosen.neighbours is not None
    assert gain_of(chosen, vectors, split.validation, "none") > 0.2
    # Where rankings leave out the history, repeats cannot be asked for.
    chosen = choose_bonus(*vectors, split.validation, metric, exclude="clicked", graphs=graphs)
    assert chosen is not None
    assert chosen.repeats is None


def coming_again(num_queries: int, num_items: int) -> tuple[Holdout, list[np.ndarray]]:
    """Makes queries, two for each user, whose items all come again; and vectors of both sides."""
    users, items = np.arange(num_queries) // 2, np.arange(num_items)
    rng = np.random.default_rng(7)
    histories = [rng.choice(num_items, 4, replace=False) for _ in users]
    holdout = Holdout(
        user_ids=users,
        histories=histories,
        relevant=[history[:2] for history in histories],
        clicked=histories,
        seen=histories,
        candidate_ids=items,
        candidate_counts=np.ones(num_items, int),
        exposure=np.ones(num_items),
        by="requests",
    )
    return holdout, [rng.normal(size=(n, DIM)).astype(np.float32) for n in (num_items, len(users))]


def test_a_large_corpus_is_scored_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "_SCORES_PER_BLOCK", 1 << 20)  # 4 MB.
    num_items = 20_000
    holdout, (items, queries) = coming_again(256, num_items)
    tracemalloc.start()
    try:
        vectors, metric = (holdout.candidate_ids, items, queries), metric_of("recall@5")
        choose_bonus(*vectors, holdout, metric, exclude="none", graphs={})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The scores of all queries, in float32, are 20 MB.
    assert peak < len(queries) * num_items * 4


def test_a_metric_that_leaves_queries_out_chooses_too() -> None:
    """An even metric has one value per user; the user's other queries have NaN."""
    holdout, (items, queries) = coming_again(200, NUM_ITEMS)
    metrics = [metric_of(name) for name in ("recall@5", "even_recall@5")]
    plain, even = (
        choose_bonus(
            holdout.candidate_ids, items, queries, holdout, metric, exclude="none", graphs={}
        )
        for metric in metrics
    )
    assert plain is not None
    assert plain.repeats is not None
    assert plain.repeats.weight > 0
    # All items were shown equally often, and each query is to find two.
    assert even is not None
    assert even.repeats == plain.repeats


def test_a_fitted_model_adds_the_bonus_to_its_dot_products(data: TrainingSet) -> None:
    model = untrained(tiny(), data.corpus)
    with_bonus = dataclasses.replace(model, bonus=HistoryBonus(RepeatBonus(0.5, 1.0, 0.0)))
    ids = model.candidate_ids.tolist()
    # Longer than the three items that the model reads.
    queries: list[dict[str, Any]] = [
        {"history": [ids[4], ids[2], ids[4], 999, ids[9], ids[1], ids[2], ids[4]]},
        {"user_id": 101},
        {"history": []},
    ]
    scores = model.query_embeddings(queries) @ model.network.embed_corpus().T
    scores[0, [4, 2, 9, 1]] += [1.5, 1.0, 0.5, 0.5]
    top_ids, top_scores = with_bonus.retrieve(queries, len(ids), [[ids[2]], [], []])
    scores[0, 2] = -np.inf
    np.testing.assert_allclose(top_scores, -np.sort(-scores, axis=1), rtol=1e-5)
    rows = np.array([Ids(ids).rows(line) for line in top_ids[1:]])
    np.testing.assert_array_equal(rows - 1, np.argsort(-scores[1:], axis=1, kind="stable"))
    assert ids[2] not in top_ids[0]
    # Off, the answers are those of the dot products, bit for bit.
    plain = ExactRetriever(ids, model.network.embed_corpus(), model.encoder)
    pairs = zip(model.retrieve(queries, 9), plain.retrieve(queries, 9), strict=True)
    for model_answer, plain_answer in pairs:
        np.testing.assert_array_equal(model_answer, plain_answer)


def test_a_fitted_model_says_its_gain_once() -> None:
    split = following(0.9, is_again=True).split("last_n", validation=2, test=2)
    training = {"monitor": "ndcg@10", "max_epochs": 1, "learning_rate": 1e-6}
    model = tiny(training=training).fit(split.train, split.validation, exclude="none")
    assert model.bonus is not None
    assert model.bonus.neighbours is not None
    assert [note for note in model.notes if "chosen on validation" in note] == [*model.bonus.notes]
    # Where rankings exclude the history, its items get no bonus, but what follows them does.
    for exclude, has_repeats in {"clicked": False, "seen": False}.items():
        again = dataclasses.replace(model, bonus=None).with_bonus(split.validation, exclude, 0)
        assert again.bonus is not None
        assert (again.bonus.repeats is not None) == has_repeats
        assert again.bonus.neighbours is not None
    # The user says so.
    settings = TrainingSettings(**dict(model.training) | {"history_bonus": False})
    off = dataclasses.replace(model, training=settings, bonus=None)
    assert off.with_bonus(split.validation, "none", 0) is off


def test_the_graph_of_an_export_is_that_of_the_whole_log() -> None:
    split = following(0.9).split("last_n", validation=2, test=2)
    training = {"monitor": "ndcg@10", "max_epochs": 1, "learning_rate": 1e-6}
    model = tiny(training=training).fit(split.train, split.validation)
    assert model.bonus is not None
    assert model.bonus.neighbours is not None
    exported = model.exportable()
    assert exported.bonus is not None
    assert exported.bonus.graph is exported.graph
    ids = model.query_ids, model.candidate_ids
    logs = {split.train: model.bonus.graph, split.train.whole: exported.graph}
    for log, graph in logs.items():
        expected = item_graph(log, *ids, model.bonus.neighbours.kind)
        assert graph is not None
        for name in ("counts", "totals"):
            np.testing.assert_array_equal(getattr(graph, name), getattr(expected, name))
        np.testing.assert_array_equal(graph.neighbours.values, expected.neighbours.values)
    assert exported.graph.totals.sum() > model.bonus.graph.totals.sum()
    # A log in other hands has the graph of its histories.
    bare = dataclasses.replace(exported, bonus=None)
    np.testing.assert_array_equal(bare.graph.totals > 0, exported.graph.totals > 0)
