"""What people took near each item, and the bonus that it gives, against plain loops."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfrs_pipeline.samples.store import RowLists
from tfrs_pipeline.search import item_graph
from tfrs_pipeline.search.history_bonus import HistoryBonus, NeighbourBonus, RepeatBonus
from tfrs_pipeline.search.item_graph import ItemGraph

NUM_ITEMS = 9
# Most recent first; 0 is an unknown item.
HISTORIES = st.lists(st.lists(st.integers(0, NUM_ITEMS), max_size=25), max_size=6)
NEXT, TOGETHER = item_graph.KINDS


def counts_by_hand(
    histories: Sequence[Sequence[int]], kind: str
) -> Mapping[int, Mapping[int, float]]:
    """Counts the pairs of histories, most recent first, by earlier and later item."""
    window = {NEXT: 3, TOGETHER: 10}[kind]
    counts: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for history in histories:
        for place, later in enumerate(history):
            for steps, earlier in enumerate(history[place + 1 : place + 1 + window], 1):
                if 0 in (later, earlier) or later == earlier:
                    continue
                counts[earlier][later] += 1 / steps
                if kind == TOGETHER:
                    counts[later][earlier] += 1 / steps
    return counts


def weights_by_hand(
    histories: Sequence[Sequence[int]], kind: str
) -> Mapping[int, Mapping[int, float]]:
    """Makes weights of the counts: a share of what came next, or a cosine."""
    counts = counts_by_hand(histories, kind)
    total = {row: 2 + sum(counts[row].values()) for row in [*counts]}
    return {
        row: {
            other: count / (total[row] if kind == NEXT else (total[row] * total[other]) ** 0.5)
            for other, count in counts[row].items()
        }
        for row in [*counts]
    }


def neighbour_bonuses_by_hand(
    bonus: NeighbourBonus, history: Sequence[int], weights: Mapping[int, Mapping[int, float]]
) -> Mapping[int, float]:
    """Adds up what the latest ten known items of a history, most recent first, make likely."""
    sums: dict[int, float] = defaultdict(float)
    for age, row in enumerate([row for row in history if row][:10]):
        for other, weight in weights.get(row, {}).items():
            sums[other] += bonus.weight * bonus.decay**age * weight
    return sums


def graph_of(
    histories: Sequence[Sequence[int]], kind: str, num_items: int = NUM_ITEMS
) -> ItemGraph:
    lists = [np.array(history, np.int32) for history in [[], *histories]]
    return ItemGraph.build(RowLists.from_lists(lists), num_items, kind)


@pytest.mark.parametrize("kind", [NEXT, TOGETHER])
@given(histories=HISTORIES)
def test_counts_and_weights_are_those_of_a_loop(
    kind: str, histories: Sequence[Sequence[int]]
) -> None:
    graph = graph_of(histories, kind)
    counts, weights = counts_by_hand(histories, kind), weights_by_hand(histories, kind)
    every_weight = []
    for row in range(NUM_ITEMS + 1):
        rows, numbers = graph.counts_of(row)
        assert rows.dtype == np.int32
        assert numbers.dtype == np.float32
        found = dict(zip(rows.tolist(), numbers.tolist(), strict=True))
        assert found == pytest.approx(counts.get(row, {}), rel=1e-5)
        assert graph.totals[row] == pytest.approx(sum(found.values()), rel=1e-5)
        rows, numbers = graph.of(row)
        found = dict(zip(rows.tolist(), numbers.tolist(), strict=True))
        assert found == pytest.approx(weights.get(row, {}), rel=1e-5)
        assert (np.diff(numbers) <= 1e-6).all()
        every_weight.append(numbers)
    np.testing.assert_allclose(graph.weights(), np.concatenate(every_weight), rtol=1e-6)


@pytest.mark.parametrize("kind", [NEXT, TOGETHER])
@given(histories=HISTORIES)
def test_an_item_keeps_the_neighbours_of_highest_weight(
    kind: str, histories: Sequence[Sequence[int]]
) -> None:
    with patch.object(item_graph, "NUM_NEIGHBOURS", 2):
        few = graph_of(histories, kind)
    every = graph_of(histories, kind)
    # What is left out still counts in the sums.
    np.testing.assert_array_equal(few.totals, every.totals)
    for row in range(NUM_ITEMS + 1):
        for kept, all_ in zip(few.of(row), every.of(row), strict=True):
            np.testing.assert_array_equal(kept, all_[:2])


def test_of_equal_weights_the_smaller_row_comes_first() -> None:
    history = [*range(NUM_ITEMS, 1, -1), 1]  # 1, then 2, then 3, ...
    graph = graph_of([[row, 1] for row in history[:-1]], NEXT)
    assert graph.of(1)[0].tolist() == list(range(2, NUM_ITEMS + 1))


def test_what_came_next_knows_the_direction() -> None:
    histories = [[2, 1], [2, 1], [2, 1]]  # 1 came first.
    graph = graph_of(histories, NEXT)
    assert graph.of(1)[0].tolist() == [2]
    assert graph.of(1)[1].tolist() == pytest.approx([3 / (3 + 2)])
    assert not len(graph.of(2)[0])
    together = graph_of(histories, TOGETHER)
    assert [together.of(row)[0].tolist() for row in (1, 2)] == [[2], [1]]


@pytest.mark.parametrize("kind", [NEXT, TOGETHER])
def test_no_pair_spans_two_users(kind: str) -> None:
    graph = graph_of([[1], [2], [], [3, 0]], kind)
    assert not len(graph.neighbours.values)
    assert not graph.totals.any()


@pytest.mark.parametrize("kind", [NEXT, TOGETHER])
def test_long_histories_count_as_the_loop_does(kind: str) -> None:
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 301, n).tolist() for n in (5_000, 1, 3_000)]
    graph, weights = graph_of(histories, kind, 300), weights_by_hand(histories, kind)
    for row in (1, 150, 300):
        rows, numbers = graph.of(row)
        assert len(rows) == min(100, len(weights[row]))
        for other, number in zip(rows.tolist(), numbers.tolist(), strict=True):
            assert number == pytest.approx(weights[row][other], rel=1e-5)
        # Whatever is left out weighs no more.
        others = {*weights[row]} - {*rows.tolist()}
        assert max([weights[row][other] for other in others], default=0) <= numbers[-1] + 1e-6


@pytest.mark.parametrize("kind", [NEXT, TOGETHER])
@given(HISTORIES, st.lists(st.integers(0, NUM_ITEMS), max_size=25), st.sampled_from([0.3, 1.0]))
def test_the_bonus_of_neighbours_is_what_a_loop_adds_up(
    kind: str, histories: Sequence[Sequence[int]], history: Sequence[int], decay: float
) -> None:
    neighbours, repeats = NeighbourBonus(kind, 2.5, decay), RepeatBonus(-1.5, 0.5, 0.5)
    graph, weights = graph_of(histories, kind), weights_by_hand(histories, kind)
    rows = np.array(history, np.int32)
    expected = dict(neighbour_bonuses_by_hand(neighbours, history, weights))
    for bonus in (HistoryBonus(None, neighbours, graph), HistoryBonus(repeats, neighbours, graph)):
        near, numbers = bonus.of(rows)
        assert numbers.dtype == np.float32
        found = dict(zip(near.tolist(), numbers.tolist(), strict=True))
        assert len(found) == len(near)  # Each item once, also one with both parts.
        if bonus.repeats is not None:
            for row, number in zip(*repeats.of(rows), strict=True):
                expected[int(row)] = expected.get(int(row), 0.0) + float(number)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_eleventh_latest_item_has_no_say() -> None:
    histories = [[row + 1, row] for row in range(1, 13)]
    graph = graph_of(histories, NEXT, 13)
    bonus = HistoryBonus(None, NeighbourBonus(NEXT, 3.0, 0.5), graph)
    # The unknown item has no age.
    history = np.array([12, 0, *range(11, 0, -1)], np.int32)
    rows, numbers = bonus.of(history)
    assert rows.tolist() == [*range(4, 14)]
    expected = [3.0 * 0.5**age / 3 for age in range(10)]
    np.testing.assert_allclose(numbers, expected[::-1], rtol=1e-6)


def test_a_bonus_is_read_as_it_was_written() -> None:
    bonus = HistoryBonus(RepeatBonus(1.0, 0.5, 0.0), NeighbourBonus(NEXT, 2.0, 0.7), notes=("so",))
    again = HistoryBonus.read(bonus.as_dict(), None)
    assert (again.repeats, again.neighbours, again.notes) == (
        bonus.repeats,
        bonus.neighbours,
        ("so",),
    )
    assert not HistoryBonus.read(HistoryBonus().as_dict(), None)
