"""The bonus of the items in a history, and how validation chooses it."""

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
from tfrs_pipeline import Holdout, Log, TrainingSet, TrainingSettings, metric_of
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.model.bonus_choice import choose_bonus
from tfrs_pipeline.search import topk
from tfrs_pipeline.search.history_bonus import HistoryBonus, NeighbourBonus, RepeatBonus
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


@pytest.mark.parametrize(
    ("kind", "forgettings"),
    [("favourites", {0.0, 0.5}), ("latest", {1.5}), ("chance", set()), ("never", set())],
)
def test_validation_chooses_a_bonus_where_items_come_again(
    kind: str, forgettings: set[float]
) -> None:
    split = log_of(kind).split("last_n", validation=2, test=2)
    rng = np.random.default_rng(6)
    items = rng.normal(size=(NUM_ITEMS, DIM)).astype(np.float32)
    queries = rng.normal(size=(NUM_USERS, DIM)).astype(np.float32)
    # In another order than the holdout's, so that a mix-up of rows shows.
    ids = split.validation.candidate_ids[::-1]
    chosen = choose_bonus(ids, items, queries, split.validation, metric_of("ndcg@10"))
    if not forgettings:
        assert chosen is None
        return
    assert chosen is not None
    assert chosen.weight > 0
    assert chosen.power == 0.5
    assert chosen.forgetting in forgettings
    # The second route: exact search with the bonus finds what validation counted on.
    exact = ExactRetriever(ids, items, lambda _: queries)
    hits = {}
    for name, retriever in {"with": chosen.added_to(exact), "without": exact}.items():
        retrieved, _ = retriever.retrieve(split.validation.as_queries(), 10)
        pairs = zip(retrieved, split.validation.relevant, strict=True)
        hits[name] = np.mean([np.isin(relevant, line).mean() for line, relevant in pairs])
    assert hits["with"] > hits["without"] + 0.3


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
        choose_bonus(holdout.candidate_ids, items, queries, holdout, metric_of("recall@5"))
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
        choose_bonus(holdout.candidate_ids, items, queries, holdout, metric) for metric in metrics
    )
    assert plain is not None
    assert plain.weight > 0
    # All items were shown equally often, and each query is to find two.
    assert even == plain


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


def test_nothing_is_chosen_where_rankings_exclude_or_the_user_says_so(tmp_path: Any) -> None:
    split = log_of("favourites").split("last_n", validation=2, test=2)
    training = {"monitor": "ndcg@10", "max_epochs": 1}
    model = tiny(training=training).fit(split.train, split.validation, exclude="none")
    assert model.repeat_bonus is not None
    for exclude, changes in {"clicked": {}, "seen": {}, "none": {"repeat_bonus": False}}.items():
        settings = TrainingSettings(**dict(model.training) | changes)
        off = dataclasses.replace(model, training=settings, repeat_bonus=None)
        assert off.with_repeat_bonus(split.validation, exclude, 0) is off
    assert tiny(training=training).fit(split.train, split.validation).repeat_bonus is None
