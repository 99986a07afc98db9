from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfrs_pipeline.data.ids import Ids, as_id_array

numbers = st.lists(st.integers(0, 30), unique=True, min_size=1)
words = st.lists(st.sampled_from([*"abcdefgh", "42", "7"]), unique=True, min_size=1)


@given(
    known=st.one_of(numbers, words),
    asked=st.lists(st.one_of(st.integers(-1, 30), st.sampled_from(["a", "b", "42", ""]))),
)
def test_rows_are_places_from_1_and_0_is_unknown(known: list[Any], asked: list[Any]) -> None:
    ids = Ids(known)
    expected = [known.index(id_) + 1 if id_ in known else 0 for id_ in asked]
    rows = ids.rows(asked)
    assert rows.tolist() == expected
    assert rows.dtype == np.int32
    assert ids.rows(np.array(asked, object)).tolist() == expected
    assert ids.known_rows(asked).tolist() == sorted(set(expected) - {0})
    assert ids.take(rows).tolist() == [id_ if id_ in known else ids.empty_id for id_ in asked]
    assert ids.take(rows[None]).shape == (1, len(asked))
    assert len(ids) == len(known)
    assert ids.values.tolist() == known
    assert ids.values.dtype == (object if isinstance(known[0], str) else np.int64)


def test_lookup_takes_lists_sets_and_arrays() -> None:
    ids = Ids(np.array([7, 8], np.int32))
    for asked in ([8], {8}, (np.int64(8),), np.array([8]), np.array([[8]], np.int16), (8, None)):
        assert ids.known_rows(asked).tolist() == [2]


@pytest.mark.parametrize(
    "ids, message",
    [
        ([1, -1], "-1 .*reserved"),
        (["a", ""], "'' .*reserved"),
        ([2, 1, 2], "1 ids occur more than once, first 2"),
        (["b", "a", "a"], "1 ids occur more than once, first 'a'"),
        ([1, "a"], "Received: int, str"),
        ([1.5], "Received: float"),
        ([True], "Received: bool"),
        ([None, "a"], "Received: NoneType, str"),
        ([], "at least one"),
    ],
)
def test_refuses_ids_that_could_be_mistaken(ids: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ids(ids)


def test_refuses_a_matrix_of_ids_and_rows_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        as_id_array(np.array([[1, 2]]))
    for row in (-1, 3):
        with pytest.raises(ValueError, match=r"\[0, 2\]"):
            Ids([5, 6]).take(np.array([row]))


@given(known=st.one_of(numbers, words), data=st.data())
def test_lists_are_looked_up_as_each_alone_without_the_unknown(known: list[Any], data: Any) -> None:
    """Also empty ones, sets, and arrays of another integer type beside lists."""
    ids = Ids(known)
    some = st.lists(st.integers(0, 40) if isinstance(known[0], int) else st.sampled_from("abxyz"))
    unsigned: Any = np.uint64 if isinstance(known[0], int) else object
    forms = st.sampled_from([list, set, np.array, lambda x: np.array(x, unsigned)])
    lists = data.draw(st.lists(st.builds(lambda values, form: form(values), some, forms)))
    found = ids.rows_by_list(lists)
    assert len(found) == len(lists)
    for rows, listed in zip(found, lists, strict=True):
        expected = ids.rows(listed if isinstance(listed, set) else [*np.asarray(listed).tolist()])
        assert rows.tolist() == expected[expected > 0].tolist()
        assert rows.dtype == np.int32


def test_looking_up_nothing_makes_no_dictionary_of_a_large_corpus() -> None:
    ids = Ids(np.arange(10))
    rows = ids.rows([])
    assert rows.dtype == np.int32
    assert not len(rows)
    assert "_row_of" not in vars(ids)  # A hundred bytes for each of a million items.
