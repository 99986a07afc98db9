import numpy as np
import pytest

from tfrs_pipeline.data.ids import CandidateIds, as_id_array


def test_rows_and_ids_are_inverse_and_keep_the_type() -> None:
    for ids in ([30, 10, 20], ["30", "10", "20"]):
        corpus = CandidateIds(ids)
        assert corpus.take(corpus.rows(ids)).tolist() == ids
        assert corpus.rows([ids[2], ids[0]]).tolist() == [2, 0]
    assert CandidateIds([30, 10]).ids.dtype == np.int64
    assert CandidateIds(np.array(["a", "b"])).ids.dtype == object


def test_unknown_ids_have_no_row_and_the_empty_row_has_the_reserved_id() -> None:
    assert CandidateIds([5]).rows([5, 6]).tolist() == [0, -1]
    assert CandidateIds([5]).take(np.array([[-1, 0]])).tolist() == [[-1, 5]]
    assert CandidateIds(["a"]).take(np.array([-1, 0])).tolist() == ["", "a"]


def test_a_string_is_not_its_number() -> None:
    assert CandidateIds([42]).rows(["42"]).tolist() == [-1]


def test_known_rows_come_once() -> None:
    assert CandidateIds([7, 8, 9]).known_rows([9, 1, 7, 9]).tolist() == [0, 2]
    assert CandidateIds([7, 8, 9]).known_rows([]).tolist() == []


def test_lookup_takes_lists_sets_and_arrays() -> None:
    corpus = CandidateIds(np.array([7, 8], np.int32))
    for ids in ([8], {8}, (np.int64(8),), np.array([8]), np.array([8], np.int16)):
        assert corpus.known_rows(ids).tolist() == [1]


@pytest.mark.parametrize(
    "ids, message",
    [
        ([1, -1], "-1 .*reserved"),
        (["a", ""], "'' .*reserved"),
        ([1, 2, 1], "1 candidate ids occur more than once, first 1"),
        ([1, "a"], "Received: int, str"),
        ([1.5], "Received: float"),
        ([True], "Received: bool"),
        ([None, "a"], "Received: NoneType, str"),
        ([], "at least one"),
    ],
)
def test_refuses_ids_that_could_be_mistaken(ids: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CandidateIds(ids)


def test_refuses_a_matrix_of_ids() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        as_id_array(np.array([[1, 2]]))
