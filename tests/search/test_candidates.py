"""Candidates that change while they are searched, against a plain dictionary of vectors."""

import itertools
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from tests.search.test_settings import clustered
from tfrs_pipeline.search import candidates as candidates_module
from tfrs_pipeline.search.candidates import Candidates, FilterValues
from tfrs_pipeline.search.searcher import Searcher
from tfrs_pipeline.search.settings import Level

NUM, DIM = 400, 16
VECTORS, QUERIES = clustered(NUM, DIM), clustered(12, DIM, seed=1)
NEW = clustered(3000, DIM, seed=2)
COLOURS = ["red", "green", "blue"]


def build(vectors: np.ndarray) -> Searcher:
    return Searcher.build(vectors, 10)


class Plain:
    """The current candidates as a dictionary, id -> (vector, colours), and as `Candidates`."""

    def __init__(self, kind: str, ids: str) -> None:
        rng = np.random.default_rng(3)
        self.kind = kind
        self.id_of = int if ids == "int" else lambda number: f"é{number}"
        colours = [[COLOURS[i]] for i in rng.integers(0, 3, NUM)]
        self.now = {self.id_of(i): x for i, x in enumerate(zip(VECTORS, colours, strict=True))}
        values = FilterValues()
        codes = values.encode(colours)
        searcher = build(VECTORS) if kind == "scann" else None
        # Searches all leaves, so that a missed item is an error and not an approximation.
        levels = [Level(150, 10, 10_000)] if searcher else []
        self.candidates = Candidates(*(list(self.now), VECTORS, searcher, levels, values, codes))

    def put(self, numbers: list[int], vectors: np.ndarray, colours: list[list[str]]) -> None:
        ids = [self.id_of(number) for number in numbers]
        self.candidates.change(ids, vectors, colours)
        self.now |= dict(zip(ids, zip(vectors, colours, strict=True), strict=True))

    def remove(self, numbers: list[int]) -> None:
        ids = [self.id_of(number) for number in numbers]
        self.candidates.change([], np.zeros((0, DIM), np.float32), [], ids)
        for id_ in ids:
            self.now.pop(id_, None)

    def best(
        self,
        query: np.ndarray,
        k: int,
        excluded: set[Any],
        allowed: list[str],
        bonuses: Mapping[Any, float] = MappingProxyType({}),
    ) -> tuple[set[Any], list[float]]:
        left = ((id_, *x) for id_, x in self.now.items() if id_ not in excluded)
        found = (x for x in left if not allowed or set(allowed) & set(x[2]))
        scores = {id_: float(vector @ query) + bonuses.get(id_, 0) for id_, vector, _ in found}
        best = sorted(scores, key=lambda id_: -scores[id_])[:k]
        return set(best), [scores[id_] for id_ in best]

    def bonuses(self, rng: np.random.Generator, sign: int) -> list[dict[Any, float]]:
        """Draws bonuses for each query, of one sign or (0) of both; some ids are no candidates.

        The best candidates of a query without them have one too.
        """
        by_query = []
        for query in QUERIES:
            best, _ = self.best(query, 5, set(), [])
            numbers = rng.permutation(NUM + 210)[: rng.integers(0, 40)].tolist()
            ids = [*best, *({self.id_of(number) for number in numbers} - best)]
            drawn = 3 * rng.normal(size=len(ids)).astype(np.float32)
            drawn = sign * np.abs(drawn) if sign else drawn
            by_query.append(dict(zip(ids, drawn.tolist(), strict=True)))
        by_query[3] = {}
        return by_query

    def check(self, rng: np.random.Generator, sign: int | None = None) -> None:
        """Compares searches with a loop: without bonuses, or with those of a sign."""
        ids = list(self.now)
        drawn = [rng.integers(0, len(ids), n) for n in rng.integers(0, 30, len(QUERIES))]
        excluded = [{ids[i] for i in places} | {self.id_of(-5)} for places in drawn]
        filters: list[list[str]] = [[], ["red"], ["blue", "grey"], ["none"]]
        allowed = [filters[i] for i in rng.integers(0, 4, len(QUERIES))]
        added = [{}] * len(QUERIES) if sign is None else self.bonuses(rng, sign)
        padding = np.array([7, 7], np.float32)
        pairs = [
            ([*line], np.append(np.array([*line.values()], np.float32), padding)) for line in added
        ]
        for k in (1, 10, 60, len(self.now) + 9):
            found, scores = self.candidates.search(
                QUERIES, k, excluded, allowed, bonuses=None if sign is None else pairs
            )
            for i, query in enumerate(QUERIES):
                best, best_scores = self.best(query, k, excluded[i], allowed[i], added[i])
                num = len(best)
                assert set(found[i][:num].tolist()) == best
                np.testing.assert_allclose(scores[i][:num], best_scores, rtol=1e-5, atol=1e-6)
                assert np.isneginf(scores[i][num:]).all()
                assert {*found[i][num:].tolist()} <= {-1, ""}
        assert len(self.candidates) == len(self.now)
        all_ids, vectors = self.candidates.ids_and_vectors()
        assert set(all_ids.tolist()) == set(self.now)
        expected = [self.now[id_][0] for id_ in all_ids.tolist()]
        np.testing.assert_array_equal(vectors, np.stack(expected))
        known = self.candidates.vectors_of(ids[:5])
        np.testing.assert_array_equal(known, np.stack([self.now[id_][0] for id_ in ids[:5]]))


@pytest.fixture(params=[("exact", "int"), ("scann", "str"), ("scann", "int")])
def plain(request: pytest.FixtureRequest) -> Plain:
    return Plain(*request.param)


def test_every_change_is_in_the_next_search(plain: Plain) -> None:
    rng, fresh = np.random.default_rng(4), iter(range(len(NEW)))
    plain.check(rng)
    for step in range(40):
        numbers = np.unique(rng.integers(0, NUM + 200, rng.integers(1, 30))).tolist()
        if step % 3 == 2:
            plain.remove(numbers)
        else:
            vectors = NEW[[next(fresh) for _ in numbers]]
            colours = [COLOURS[: rng.integers(0, 4)] for _ in numbers]
            colours[0] = ["grey"]  # A value that no item had before.
            plain.put(numbers, vectors, colours)
        if step % 13 == 10:
            plain.candidates.rebuild(build if plain.kind == "scann" or step > 30 else None)
        if step % 4 == 3:
            plain.check(rng)
    plain.check(rng)


@pytest.mark.parametrize("sign", [1, -1, 0])
def test_bonuses_count_for_candidates_that_change(plain: Plain, sign: int) -> None:
    """A positive one brings a candidate up from below, a negative one makes room for others."""
    rng = np.random.default_rng(6)
    plain.check(rng, sign)
    # Some are replaced, some are new, and some of the best are gone.
    plain.put([*range(0, 40), *range(NUM, NUM + 20)], NEW[:60], [["red"], []] * 30)
    best, _ = plain.best(QUERIES[0], 3, set(), [])
    plain.candidates.change([], np.zeros((0, DIM), np.float32), [], [*best])
    for id_ in best:
        del plain.now[id_]
    plain.check(rng, sign)
    plain.candidates.rebuild(build if plain.kind == "scann" else None)
    plain.check(rng, sign)
    # Hardly any is left.
    plain.remove([*range(30, NUM + 20)])
    plain.check(rng, sign)


def test_a_search_sees_a_change_whole_or_not_at_all(plain: Plain) -> None:
    """Two items replace each other in turn; every search finds just one of them, in first place."""
    best = 5 * QUERIES[:1]
    names, stop, seen = (plain.id_of(9001), plain.id_of(9002)), threading.Event(), set()
    plain.put([9001], best, [[]])

    def search() -> None:
        while not stop.is_set():
            found, _ = plain.candidates.search(QUERIES[:1], 2)
            seen.add(tuple(id_ in names for id_ in found[0].tolist()))

    with ThreadPoolExecutor(2) as pool:
        searches = [pool.submit(search) for _ in range(2)]
        for step in range(300):
            put, gone = names[(step + 1) % 2], names[step % 2]
            plain.candidates.change([put], best, [[]], [gone])
        stop.set()
    assert [done.exception() for done in searches] == [None] * 2
    assert seen == {(True, False)}


def test_changes_during_a_rebuild_are_kept(plain: Plain) -> None:
    plain.remove(list(range(0, 200, 2)))

    def build_slowly(vectors: np.ndarray) -> Searcher:
        assert len(vectors) == NUM - 100
        plain.put([1, 700, 701], NEW[:3], [["red"], [], ["blue"]])
        plain.remove([3, 700])
        return build(vectors)

    plain.candidates.rebuild(build_slowly)
    plain.check(np.random.default_rng(5))


def test_an_index_that_took_in_half_a_change_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise each later item of the index would be answered under another one's id."""
    plain, add = Plain("scann", "int"), Searcher.add

    def add_half(searcher: Searcher, vectors: np.ndarray) -> None:
        add(searcher, vectors[: len(vectors) // 2])
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Searcher, "add", add_half)
        plain.put(list(range(700, 720)), NEW[:20], [["red"]] * 20)
    assert "search is exact until a rebuild" in caplog.text
    plain.put(list(range(720, 740)), NEW[20:40], [["blue"]] * 20)
    plain.check(np.random.default_rng(6))
    assert plain.candidates.has_drifted
    plain.candidates.rebuild(build)
    plain.check(np.random.default_rng(7))
    assert not plain.candidates.has_drifted


def test_much_change_calls_for_a_rebuild(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates_module, "_LEAST_CHANGES", 10)
    for change in ("put", "remove"):
        plain = Plain("scann", "int")
        most = int(0.3 * NUM)
        for numbers, is_far in ((range(most), False), (range(most, most + 1), True)):
            if change == "put":
                plain.put(list(numbers), NEW[: len(numbers)], [[]] * len(numbers))
            else:
                plain.remove(list(numbers))
            assert plain.candidates.has_drifted == is_far
        plain.candidates.rebuild(build)
        assert not plain.candidates.has_drifted


def test_ids_and_vectors_are_of_one_moment(plain: Plain) -> None:
    """Each item's vector holds its number, whatever a writer does meanwhile."""
    stop = threading.Event()
    numbers = itertools.count(10_000)
    plain.remove(list(range(NUM)))

    def write() -> None:
        while not stop.is_set():
            new = [next(numbers) for _ in range(5)]
            vectors = np.repeat(np.array(new, np.float32), DIM).reshape(5, DIM)
            plain.put(new, vectors, [[]] * 5)
            plain.remove([new[0] - 20, new[1] - 10])

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write)
        for _ in range(300):
            ids, vectors = plain.candidates.ids_and_vectors()
            got = [int(str(id_).lstrip("é")) for id_ in ids.tolist()]
            assert got == vectors[:, 0].astype(int).tolist()
        stop.set()
    assert writer.exception() is None


def test_a_filter_takes_numbers_and_booleans_as_the_items_have_them() -> None:
    """`retrieve` lets 2020 pass, because items have it; it would find nothing as a number."""
    for column, texts in (([2020, 2021, 2020], ["2020"]), ([True, False, True], ["true"])):
        values = FilterValues()
        codes = values.encode(column)[:, 0]
        for asked in (column[:1], texts, [str(column[0])]):
            chosen = values.choose(asked)
            assert chosen is not None
            assert chosen[codes].tolist() == [True, False, True]


def test_a_text_of_several_values_chooses_each_as_the_item_table_has_them() -> None:
    values = FilterValues(["Sport", "Yoga", "R|B"], "|")
    for texts, codes in (
        (["Sport|Yoga"], [1, 2]),
        (["Yoga | Golf|"], [2]),
        (["R|B"], [3]),  # A value of its own.
        (["Sport;Yoga"], []),
        (["|"], []),
    ):
        chosen = values.choose(texts)
        assert chosen is not None
        assert np.flatnonzero(chosen).tolist() == codes


def test_values_that_come_while_a_filter_is_read() -> None:
    values = FilterValues()
    values.encode(COLOURS)

    class Growing(dict[str, int]):
        """Another thread adds a value before each look."""

        def get(self, key: Any, default: Any = None) -> Any:
            values.code_of = dict(self)  # The writer's own lookups come without this.
            values.encode([[key], [f"more {len(self)}"]])
            self.update(values.code_of)
            values.code_of = self
            return super().get(key, default)

    values.code_of = Growing(values.code_of)
    chosen = values.choose(["grey", "red", "pink"])
    assert chosen is not None
    codes = [values.code_of[x] for x in ("grey", "red", "pink")]
    assert np.flatnonzero(chosen).tolist() == sorted(codes)
