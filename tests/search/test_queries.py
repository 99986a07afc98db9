"""Raw queries as the inputs of a query tower: against a loop over queries, one by one."""

import dataclasses
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.features.categorical import Categorical, MultiCategorical
from tfrs_pipeline.features.numeric import Numeric
from tfrs_pipeline.features.raw import NO_TIME
from tfrs_pipeline.search import queries as queries_module
from tfrs_pipeline.search.queries import History, QueryInputs, id_array

GENDER, AGE = Categorical("gender", ("F", "M")), Numeric("age", mean=40.0, scale=10.0)
DEVICE = Categorical("device", ("app", "web"))
HOUR = Categorical("hour", tuple(map(str, range(24))), is_from_timestamp=True)
TAGS = MultiCategorical("tags", ("a", "b"), num_values=2)
USERS, ITEMS = [30, 10, 20], [7, 5, 3, 9]
NOW = 1_700_000_000  # 22:13 on a Tuesday.

INPUTS = QueryInputs(
    users=Ids(USERS),
    items=Ids(ITEMS),
    features={"query": (GENDER, AGE), "request": (DEVICE, HOUR), "candidate": ()},
    columns={
        "gender": np.array([1, 2, 0], np.int32),
        "age": np.array([-1.0, np.nan, 2.5], np.float32),
    },
    history_length=3,
    reads_times=True,
)


def encoded(inputs: QueryInputs, queries: list[Any]) -> dict[str, np.ndarray]:
    arrays = inputs.read(queries)
    return inputs.encode(arrays, inputs.histories(arrays))


def by_hand(query: Mapping[str, Any]) -> dict[str, Any]:
    """Computes the inputs of one query."""
    history, request = query.get("history") or [], query.get("request") or {}
    times = query.get("history_timestamps") or [None] * len(history)
    known = [x for x in zip(history, times, strict=True) if x[0] in ITEMS][::-1][:3]
    rows = [ITEMS.index(item) + 1 for item, _ in known]
    at = request.get("timestamp")
    moments = [None if at is None else at.timestamp(), *(time for _, time in known)]
    seconds = [None if x is None else math.floor(x) for x in moments] + [None] * (3 - len(known))
    latest = max((x for x in seconds if x is not None), default=0)
    user = query.get("user_id")
    row = USERS.index(user) + 1 if user in USERS else 0
    if (own := query.get("features")) is not None:
        age = own.get("age")
        gender = {"F": 1, "M": 2}.get(str(own.get("gender")), 0)
        age = math.nan if age is None else (age - 40) / 10
    else:
        gender, age = ([1, 2, 0][row - 1], [-1, math.nan, 2.5][row - 1]) if row else (0, math.nan)
    hour = request.get("hour", None if at is None else at.hour)
    return {
        "query_rows": row,
        "history_rows": rows + [0] * (3 - len(rows)),
        "history_times": [NO_TIME if x is None else x - latest for x in seconds],
        "feature gender": gender,
        "feature age": age,
        "feature device": {"app": 1, "web": 2}.get(str(request.get("device")), 0),
        "feature hour": 0 if hour is None else hour + 1,
    }


def moments(low: int, high: int) -> Any:
    """Draws times whose floats are exact, with a fraction of a second."""
    return st.integers(4 * low, 4 * high).map(lambda quarters: NOW + quarters / 4)


def some(**values: Any) -> Any:
    return st.fixed_dictionaries({}, optional={name: kind for name, kind in values.items()})


@st.composite
def drawn_query(draw: Any) -> dict[str, Any]:
    query: dict[str, Any] = draw(
        some(
            user_id=st.sampled_from([*USERS, 99, None]),
            history=st.lists(st.sampled_from([*ITEMS, 1, 2]), max_size=7),
            features=st.none()
            | some(gender=st.sampled_from(["F", "M", "x"]), age=st.sampled_from([None, 25.0, 60])),
            request=some(
                device=st.sampled_from(["app", "web", "fridge"]),
                hour=st.integers(0, 23),
                timestamp=moments(-9, 9).map(lambda x: datetime.fromtimestamp(x, UTC)),
            ),
        )
    )
    if "history" in query and draw(st.booleans()):
        time = st.none() | moments(-(10**6), 9)
        num = len(query["history"])
        query["history_timestamps"] = draw(st.lists(time, min_size=num, max_size=num))
    return query


@settings(max_examples=30)
@given(st.lists(drawn_query(), min_size=1, max_size=5))
def test_inputs_match_a_loop_over_queries(queries: list[dict[str, Any]]) -> None:
    inputs = encoded(INPUTS, queries)
    assert inputs.keys() == INPUTS.tower_inputs.keys()
    for name, (shape, dtype) in INPUTS.tower_inputs.items():
        assert inputs[name].shape == (len(queries), *shape)
        assert inputs[name].dtype == dtype
    for line, query in enumerate(queries):
        for name, value in by_hand(query).items():
            np.testing.assert_allclose(inputs[name][line], value, rtol=1e-6, err_msg=name)


def test_users_bring_their_features_or_have_those_of_the_model() -> None:
    queries = [{"user_id": 30}, {"user_id": 30, "features": {"gender": "M"}}, {"user_id": 99}]
    together = encoded(INPUTS, queries)
    assert together["feature gender"].tolist() == [1, 2, 0]
    # What is brought replaces all that is stored: the age is missing then.
    np.testing.assert_array_equal(
        together["feature age"], np.array([-1, np.nan, np.nan], np.float32)
    )
    for line, query in enumerate(queries):
        for name, values in encoded(INPUTS, [query]).items():
            np.testing.assert_array_equal(values[0], together[name][line])


def test_features_without_stored_values_are_missing() -> None:
    """An exported model of somebody else may hold none."""
    inputs = dataclasses.replace(INPUTS, columns={})
    found = encoded(inputs, [{"user_id": 30}, {"features": {"age": 50, "gender": "F"}}])
    assert found["feature gender"].tolist() == [0, 1]
    np.testing.assert_array_equal(found["feature age"], np.array([np.nan, 1], np.float32))


def test_lists_of_a_feature_are_gathered_by_row() -> None:
    columns = {"tags": np.array([[1, 2], [2, 0], [0, 0]], np.int32)}
    features = {"query": (TAGS,), "request": (), "candidate": ()}
    inputs = dataclasses.replace(INPUTS, features=features, columns=columns, reads_times=False)
    found = encoded(inputs, [{"user_id": 10}, {"user_id": 99}, {"user_id": 30}])
    assert found["feature tags"].tolist() == [[2, 0], [0, 0], [1, 2]]


def test_an_empty_batch_and_an_empty_history_have_the_shape_of_others() -> None:
    for num, queries in ((0, []), (1, [{}]), (2, [{"history": []}, {"history": None}])):
        inputs = encoded(INPUTS, queries)
        for name, (shape, dtype) in INPUTS.tower_inputs.items():
            assert inputs[name].shape == (num, *shape)
            assert inputs[name].dtype == dtype
        assert not inputs["history_rows"].any()
        assert (inputs["history_times"] == NO_TIME).all()


def test_histories_are_the_known_items_most_recent_first() -> None:
    queries = [{"history": [7, 1, 5, 3, 7], "history_timestamps": [1, 2, None, 4, 5]}, {}]
    first, none = INPUTS.histories(INPUTS.read(queries))
    assert first.rows.tolist() == [1, 3, 2, 1]  # All of them: the tower reads three.
    np.testing.assert_array_equal(first.times, [5, 4, np.nan, 1])
    assert len(none.rows) == 0
    without = dataclasses.replace(INPUTS, reads_times=False)
    first, none = without.histories(without.read(queries))
    assert first.rows.tolist() == [1, 3, 2, 1]
    assert first.times is None
    # Over HTTP, a row of times may be shorter or longer than the history.
    arrays = INPUTS.read(queries)
    for times, expected in (
        ([[1.0, 2]], [np.nan] * 3 + [1]),
        ([[1.0, 2, 3, 4, 5, 6]], [5, 4, 3, 1]),
    ):
        arrays["history_timestamps"] = np.array(times * 2)
        np.testing.assert_array_equal(INPUTS.histories(arrays)[0].times, expected)


def test_a_history_without_times_among_others_has_unknown_ones() -> None:
    arrays = INPUTS.read([{}, {}])
    rows, times = np.array([2, 1], np.int32), np.array([8.0, 5.5])
    inputs = INPUTS.encode(arrays, [History(rows), History(rows, times)])
    assert inputs["history_rows"].tolist() == [[2, 1, 0]] * 2
    assert inputs["history_times"].tolist() == [[NO_TIME] * 4, [NO_TIME, 0, -3, NO_TIME]]


def test_queries_are_embedded_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries_module, "QUERIES_PER_CALL", 2)
    sizes = []

    def tower(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        sizes.append(len(inputs["query_rows"]))
        return np.stack([inputs["query_rows"], inputs["history_rows"][:, 0]], axis=1)

    queries: list[Any] = [{"user_id": user, "history": [item]} for user in USERS for item in ITEMS]
    embedded = INPUTS.embed(tower, queries[:5])
    assert embedded.tolist() == [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1]]
    assert sizes == [2, 2, 1]
    assert INPUTS.embed(tower, []).shape == (0, 2)


def test_what_no_model_can_read_is_refused() -> None:
    for query, message in (
        ({"features": {"gendre": "F"}}, "no user feature 'gendre'; known: gender, age"),
        ({"user_id": "30"}, "ids are integers. Received: '30'"),
        ({"history": ["7"]}, "ids are integers. Received: '7'"),
        ({"history": [7], "history_timestamps": []}, "0 times for 1 items"),
        ({"request": {"timestamp": "yesterday"}}, "datetimes with a time zone"),
    ):
        with pytest.raises(ValueError, match=message):
            INPUTS.read([{}, query])
    plain = dataclasses.replace(INPUTS, features=dict.fromkeys(INPUTS.features, ()))
    with pytest.raises(ValueError, match="reads no user features: remove `features`"):
        plain.read([{"features": {"gender": "F"}}])


def test_ids_that_no_column_can_hold_are_nobody() -> None:
    assert id_array([30, None, 2**70, -(2**63)], are_text=False).tolist() == [30, -1, -1, -(2**63)]
    assert id_array([], are_text=False).dtype == np.int64
    assert id_array(["é", None], are_text=True).tolist() == ["é", ""]
    assert id_array(np.array([1, 2], np.int32), are_text=False).tolist() == [1, 2]


def test_signatures_name_what_a_request_may_bring() -> None:
    signatures = INPUTS.signatures
    assert [*signatures["embed_user"]] == ["user_id", "device", "hour", "timestamp"]
    histories = ["user_id", "history", "history_timestamps"]
    assert [*signatures["embed_query"]] == [*histories, "device", "hour", "timestamp"]
    with_features = [*histories, "gender", "age", "device", "hour", "timestamp"]
    assert [*signatures["embed_query_with_features"]] == with_features
    plain = dataclasses.replace(
        INPUTS,
        users=Ids(["u"]),
        features=dict.fromkeys(INPUTS.features, ()),
        reads_times=False,
    )
    assert [*plain.signatures] == ["embed_user", "embed_query"]
    query = plain.signatures["embed_query"]
    assert [(name, spec.dtype) for name, spec in query.items()] == [
        ("user_id", "string"),
        ("history", "int64"),
    ]
