"""What a version holds of users and items, as it was given, from mapped files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tfrs_pipeline.answers.stored import MappedIds, Stored, read_array, write_array
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.samples.store import RowLists
from tfrs_pipeline.search.item_graph import ItemGraph

INTEGERS = st.integers(-(2**63), 2**63 - 1).filter(lambda id_: id_ != -1)
# Without surrogates, which no table can hold.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)


def lists(*rows_by_user: list[int]) -> RowLists:
    return RowLists.from_lists([np.array(rows, np.int32) for rows in ([], *rows_by_user)])


def written(
    folder: Path,
    *,
    user_ids: Sequence[Any] = (30, 10),
    histories: RowLists | None = None,
    known: RowLists | None = None,
    disliked: RowLists | None = None,
    times: Sequence[float] | None = (9.0, 7.0, np.nan),
) -> Stored:
    """Writes and reads what a version holds of users 30 and 10, and of items a, b and c."""
    users = np.array(user_ids, np.int64 if isinstance(user_ids[0], int) else object)
    Stored.write(
        folder,
        user_ids=users,
        item_ids=np.array(["a", "b", "c"], object),
        lists={
            "histories": histories or lists([2, 1], [3]),  # Most recent first.
            "known": known or lists([1, 2], [3]),
            "disliked": disliked or lists([3], []),
        },
        times=None if times is None else np.array(times),
        columns={"age (years)": np.array([1.5, np.nan], np.float32), "tags": np.eye(2, 3)},
        graph=ItemGraph.build(histories or lists([2, 1], [3]), 3, "what came next"),
    )
    manifest = {
        "users_are_text": users.dtype == object,
        "items_are_text": True,
        "reads_times": times is not None,
        "user_features": ["age (years)", "tags"],
        "graph": "what came next",
    }
    return Stored(folder, {"stored": manifest})


def test_lists_are_those_of_each_user(tmp_path: Path) -> None:
    stored = written(tmp_path)
    assert stored.users.values() == [30, 10]
    assert stored.user_rows([10, 99, None, 30]) == [2, 0, 0, 1]
    ids, times = stored.history(1)
    assert (ids, times.tolist()) == (["a", "b"], [7, 9])
    ids, times = stored.history(2)
    assert ids == ["c"]
    assert np.isnan(times).tolist() == [True]
    assert [stored.known(row) for row in range(3)] == [[], ["a", "b"], ["c"]]
    assert [stored.disliked(row) for row in range(3)] == [[], ["c"], []]
    assert stored.history(0)[0] == []
    assert stored.has_items(["b", "z", None]).tolist() == [True, False, False]
    np.testing.assert_array_equal(
        stored.columns["age (years)"], np.array([1.5, np.nan], np.float32)
    )
    np.testing.assert_array_equal(stored.columns["tags"], np.eye(2, 3))
    with pytest.raises(ValueError, match="ids are integers"):
        stored.user_rows(["10"])
    with pytest.raises(ValueError, match="ids are strings"):
        stored.has_items([7])


def test_users_whose_ids_are_text(tmp_path: Path) -> None:
    stored = written(tmp_path, user_ids=["Zoë", "?"], times=None)
    assert stored.user_rows(["?", "Zoë", "Zo", "Zoë ", None, ""]) == [2, 1, 0, 0, 0, 0]
    # Text that UTF-8 cannot write is nobody's id, also where a placeholder would be one.
    assert stored.user_rows(["\ud800"]) == [0]
    assert stored.users.values() == ["Zoë", "?"]
    assert stored.parse_id("7", "user") == "7"
    assert stored.parse_id("7") == "7"  # Items.


def test_without_times_histories_have_none(tmp_path: Path) -> None:
    stored = written(tmp_path, times=None)
    assert not stored.reads_times
    ids, seconds = stored.history(1)
    assert ids == ["a", "b"]
    assert np.isnan(seconds).all()


def test_dislikes_are_known_to_be_there(tmp_path: Path) -> None:
    assert written(tmp_path).has_dislikes
    assert not written(tmp_path, disliked=RowLists.empty(3)).has_dislikes


def test_a_version_without_users_knows_nobody(tmp_path: Path) -> None:
    nothing = RowLists.empty(1)
    for ids in (np.zeros(0, np.int64), np.zeros(0, object)):
        named = dict.fromkeys(("histories", "known", "disliked"), nothing)
        items, times = np.array([7]), np.zeros(0)
        graph = ItemGraph.build(nothing, 1, "what came next")
        Stored.write(
            tmp_path,
            user_ids=ids,
            item_ids=items,
            lists=named,
            times=times,
            columns={},
            graph=graph,
        )
        are_text = ids.dtype == object
        manifest: dict[str, Any] = {"users_are_text": are_text, "items_are_text": False}
        manifest |= {"reads_times": True, "user_features": [], "graph": graph.kind}
        stored = Stored(tmp_path, {"stored": manifest})
        assert stored.users.values() == []
        assert stored.user_rows(["x"] if are_text else [30]) == [0]
        assert (stored.history(0)[0], stored.known(0), stored.disliked(0)) == ([], [], [])
        assert stored.has_items([7, 8]).tolist() == [True, False]


@pytest.mark.parametrize("are_text", [False, True])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_mapped_ids_are_those_in_memory(
    tmp_path: Path, data: st.DataObject, are_text: bool
) -> None:
    kind = TEXTS if are_text else INTEGERS
    values = data.draw(st.lists(kind, min_size=1, max_size=12, unique=True))
    others = data.draw(st.lists(kind, max_size=5))
    ids = Ids(values)
    MappedIds.write(tmp_path, "users", ids.values)
    mapped = MappedIds(tmp_path, "users", are_text)
    assert len(mapped) == len(ids)
    assert mapped.values() == values
    asked = [*others, *values[::-1]]
    assert mapped.rows(asked).tolist() == ids.rows(asked).tolist()
    array = np.array(asked, object if are_text else np.int64)
    assert mapped.rows(array).tolist() == ids.rows(array).tolist()
    # Ids of nobody: integers beyond int64, an absent one.
    nobody = [None, ""] if are_text else [None, 2**63, -(2**63) - 1, -1]
    assert not mapped.rows(nobody).any()
    assert mapped.rows(nobody).dtype == np.int32


def test_an_array_is_mapped_and_not_read(tmp_path: Path) -> None:
    """Processes share the pages of a mapped file, and nobody can write to them."""
    values = np.arange(12, dtype=np.int32).reshape(4, 3)[:, ::2]  # Not contiguous.
    write_array(tmp_path, "numbers", values)
    array = read_array(tmp_path, "numbers")
    np.testing.assert_array_equal(array, values)
    assert isinstance(array.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    write_array(tmp_path, "nothing", np.zeros((0, 3), np.float32))
    assert read_array(tmp_path, "nothing").shape == (0, 3)
