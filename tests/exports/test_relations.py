"""Relations between answers of an exported model, for all kinds of queries, after live changes."""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from tests.service.conftest import NUM_CANDIDATES, Served
from tests.service.test_live_items import item, new_id
from tests.service.test_user_events import event, new_user
from tfrs_pipeline import LoadedRetriever, load

ALL, GENRES = NUM_CANDIDATES + 10, list("abc")
WAYS = ("history", "user", "alike", "also_taken")
Answer: TypeAlias = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Asked:
    """Four queries of one of the ways to ask a model."""

    retriever: LoadedRetriever
    served: Served
    way: str

    def __call__(
        self, k: int, exclude: Any = None, allowed: Any = None, only: int | None = None
    ) -> Answer:
        """Asks all queries, or `only` one."""
        chosen = slice(only, None if only is None else only + 1)
        options = {"exclude": exclude, "allowed": allowed}
        if self.way == "history":
            return self.retriever.retrieve(self.served.queries()[2:][chosen], k, **options)
        if self.way == "user":
            users = [*self.served.query_ids[[1, 4, 5]].tolist(), new_user(self.served)]
            return self.retriever.retrieve_user(users[chosen], k, **options)[:2]
        items = self.served.candidate_ids[[1, 32, 36, 2]].tolist()[chosen]
        kind: Any = self.way
        return self.retriever.similar(items, k, kind=kind, **options)


def check(answer: Answer, expected: Answer) -> None:
    np.testing.assert_array_equal(answer[0], expected[0])
    np.testing.assert_allclose(answer[1], expected[1], rtol=1e-5, atol=1e-6)


def without(answer: Answer, gone: Sequence[Sequence[Any]], k: int) -> Answer:
    """Removes items from long answers, and cuts these to length k."""
    is_left = [~np.isin(ids, gone_ids) for ids, gone_ids in zip(answer[0], gone, strict=True)]
    ids, scores = (
        np.stack([line[left][:k] for line, left in zip(lines, is_left, strict=True)])
        for lines in answer
    )
    return ids, scores


def some_of(answer: Answer) -> list[list[Any]]:
    """Returns some items of each query's answer, best first."""
    some = [ids[scores > -np.inf][:15:3].tolist() for ids, scores in zip(*answer, strict=True)]
    assert any(len(ids) > 1 for ids in some)
    return some


def a_shorter_answer_begins_the_longer_one(ask: Asked) -> None:
    whole = ask(ALL)
    for k in (1, 5, 20, NUM_CANDIDATES - 1):
        check(ask(k), (whole[0][:, :k], whole[1][:, :k]))


def exclusions_are_a_set_and_leave_the_rest_as_it_was(ask: Asked) -> None:
    whole = ask(ALL)
    gone, strange = some_of(whole), new_id(ask.served, 77)
    expected = ask(10, gone)
    check(expected, without(whole, gone, 10))
    check(ask(10, [[*ids[::-1], strange, *ids[:2], strange] for ids in gone]), expected)
    check(ask(10, list(map(set, gone))), expected)


def a_filter_that_all_pass_leaves_out_what_has_no_value(ask: Asked) -> None:
    whole = ask(ALL)
    check(ask(ALL, allowed=[[]] * 4), whole)
    every = ask(20, allowed=[GENRES] * 4)
    check(ask(20, allowed=[[*GENRES[::-1], "a"]] * 4), every)
    genres = zip(ask.served.candidate_ids.tolist(), ask.served.genres, strict=True)
    check(every, without(whole, [[id_ for id_, values in genres if not any(values)]] * 4, 20))


def a_batch_is_its_single_queries(ask: Asked) -> None:
    gone, allowed = some_of(ask(ALL)), [["a"], [], ["b", "c"], ["a"]]
    ids, scores = ask(9, gone, allowed)
    for i in range(4):
        one = slice(i, i + 1)
        check(ask(9, gone[one], allowed[one], only=i), (ids[one], scores[one]))


RELATIONS: list[Callable[[Asked], None]] = [
    a_shorter_answer_begins_the_longer_one,
    exclusions_are_a_set_and_leave_the_rest_as_it_was,
    a_filter_that_all_pass_leaves_out_what_has_no_value,
    a_batch_is_its_single_queries,
]


@pytest.fixture(scope="module")
def changed(served: Served, folder: Path, module_path: Path) -> LoadedRetriever:
    """A model with new, replaced and removed items, and with new events."""
    retriever = load(shutil.copytree(folder, module_path / served.ids / "films"))
    ids = served.candidate_ids.tolist()
    with_genres = [id_ for id_, genres in zip(ids, served.genres, strict=True) if any(genres)]
    retriever.upsert([item(new_id(served, i), [GENRES[i % 3]]) for i in range(5)])
    retriever.upsert([item(id_, ["c"]) for id_ in with_genres[:3]])
    retriever.remove([ids[4], new_id(served, 1)])
    users = [served.query_ids[1], new_user(served)]
    retriever.record([event(user, id_) for user in users for id_ in ids[20:23]])
    retriever.record([event(users[0], ids[30], "dislike")])
    return retriever


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("relation", RELATIONS)
def test_what_the_answers_of_a_model_in_service_have_in_common(
    relation: Callable[[Asked], None], way: str, changed: LoadedRetriever, served: Served
) -> None:
    """With a bonus, `tests/service/test_history_bonus.py` tests the same."""
    relation(Asked(changed, served, way))
