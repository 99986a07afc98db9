"""TensorFlow Serving's REST rules, on requests written by hand and on generated arrays."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfrs_pipeline.serving import rest
from tfrs_pipeline.serving.rest import InputSpec, RequestError

SPECS = {
    "serving_default": {"user_id": InputSpec("int64", 1)},
    "retrieve": {
        "user_id": InputSpec("string", 1),
        "exclude": InputSpec("string", 2),
        "k": InputSpec("int32", 0),
    },
}


def parsed(**document: Any) -> rest.PredictRequest:
    return rest.parse_predict(document, SPECS)


def refused(**document: Any) -> str:
    with pytest.raises(RequestError) as caught:
        parsed(**document)
    assert caught.value.status == 400
    return caught.value.message


def retrieve(**inputs: Any) -> dict[str, Any]:
    return {"signature_name": "retrieve", "inputs": inputs}


def test_a_plain_list_is_the_only_input_by_columns_and_by_rows() -> None:
    for key in ("inputs", "instances"):
        request = parsed(**{key: [3, 5]})
        assert request.signature == "serving_default"
        assert request.inputs["user_id"].tolist() == [3, 5]
        assert request.is_row_format == (key == "instances")


def test_rows_and_columns_of_named_inputs_are_the_same() -> None:
    specs = {"s": {"user_id": InputSpec("int64", 1), "history": InputSpec("int64", 2)}}
    rows = [{"user_id": 1, "history": [7, 8]}, {"history": [9, -1], "user_id": 2}]
    columns = {"user_id": [1, 2], "history": [[7, 8], [9, -1]]}
    by_rows = rest.parse_predict({"signature_name": "s", "instances": rows}, specs)
    by_columns = rest.parse_predict({"signature_name": "s", "inputs": columns}, specs)
    for name in specs["s"]:
        np.testing.assert_array_equal(by_rows.inputs[name], by_columns.inputs[name])


def test_strings_come_as_utf_8_or_base64() -> None:
    request = parsed(**retrieve(user_id=["Zoë"], exclude=[[{"b64": "Wm/Dqw=="}]], k=2))
    assert request.inputs["user_id"].tolist() == ["Zoë".encode()]
    assert request.inputs["exclude"].tolist() == [["Zoë".encode()]]
    assert request.inputs["k"].shape == ()


NUMBERS = {
    "embed": {
        "price": InputSpec("float64", 1),
        "vector": InputSpec("float32", 2, width=3),
        "k": InputSpec("int32", 0),
    }
}


def test_numbers_with_a_fraction_may_be_whole_or_missing() -> None:
    body = b'{"signature_name": "embed", "inputs": {"price": [1, 2.5, NaN], "k": 1, "vector": '
    body += b"[[1, 2, 3], [0.1, -2e3, 0], [NaN, NaN, NaN]]}}"
    inputs = rest.parse_predict(rest.parse_json(body, 8), NUMBERS).inputs
    assert inputs["price"].dtype == np.float64
    np.testing.assert_array_equal(inputs["price"], [1.0, 2.5, np.nan])
    assert inputs["vector"].dtype == np.float32
    np.testing.assert_array_equal(
        inputs["vector"],
        np.array([[1, 2, 3], [0.1, -2000, 0], [np.nan] * 3], np.float32),
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"price": ["1"]}, "'price' takes float64 values. Got: '1'"),
        ({"price": [True]}, "'price' takes float64 values. Got: True"),
        ({"price": [None]}, "'price' takes float64 values. Got: None"),
        ({"price": [10**400]}, "'price' has a number that is no float64"),
        ({"price": [[1.0]]}, "Got: nested 2 deep"),
        ({"vector": [[1.0, 2.0]]}, "'vector' must have 3 numbers for each query. Got: 2"),
        ({"vector": [[1.0, 2.0], [1.0]]}, "fill the shorter ones with NaN"),
        ({"k": 1.0}, "takes int32 values. Got: 1.0"),
    ],
)
def test_a_refused_number_is_explained(changed: dict[str, Any], message: str) -> None:
    inputs = {"price": [1.0], "vector": [[1.0, 2.0, 3.0]], "k": 1, **changed}
    with pytest.raises(RequestError) as caught:
        rest.parse_predict({"signature_name": "embed", "inputs": inputs}, NUMBERS)
    assert message in caught.value.message


def test_nothing_to_exclude_is_a_list_of_empty_lists() -> None:
    request = parsed(**retrieve(user_id=["a", "b"], exclude=[[], []], k=2))
    assert request.inputs["exclude"].shape == (2, 0)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "either 'inputs' or 'instances'"),
        ({"inputs": [1], "instances": [1]}, "either 'inputs' or 'instances'"),
        ({"input": [1]}, "Unknown key 'input'"),
        ({"instances": []}, "an entry per query"),
        ({"instances": 7}, "an entry per query"),
        ({"instances": {"user_id": [1]}}, "an entry per query"),
        ({"inputs": [1], "signature_name": "nope"}, "'nope' not found in signature def"),
        ({"inputs": [1], "signature_name": 7}, "must be a string"),
        ({"inputs": [1.0]}, "takes int64 values. Got: 1.0"),
        ({"inputs": [True]}, "takes int64 values. Got: True"),
        ({"inputs": [None]}, "takes int64 values. Got: None"),
        ({"inputs": ["1"]}, "takes int64 values. Got: '1'"),
        ({"inputs": [math.nan]}, "takes int64 values. Got: nan"),
        ({"inputs": [1, 2**63]}, "takes int64 values. Got: 9223372036854775808"),
        ({"inputs": [{"b64": "AA=="}]}, "takes int64 values"),
        ({"inputs": 5}, "nested 1 deep (a list with a value per query). Got: nested 0 deep"),
        ({"inputs": [[5]]}, "Got: nested 2 deep"),
        ({"inputs": [1, [2]]}, "takes int64 values. Got: [2]"),
        ({"inputs": [[1], 2]}, "lists of one length"),
        (retrieve(user_id=["a"], exclude=[[]]), "Missing named input: 'k'"),
        (retrieve(user_id=["a"], exclude=[[]], k=1, n=2), "unknown input 'n'"),
        ({"signature_name": "retrieve", "inputs": ["a"]}, "must be an object"),
        ({"signature_name": "retrieve", "instances": ["a"]}, "must be an object"),
        (retrieve(user_id=["a"], exclude=[[]], k=2**31), "takes int32 values"),
        (retrieve(user_id=["a"], exclude=[[]], k="2"), "takes int32 values"),
        (retrieve(user_id=["a"], exclude=[[]], k=[2]), "nested 0 deep"),
        (retrieve(user_id=["a"], exclude=[], k=2), "nested 2 deep"),
        (
            retrieve(user_id=["a"], exclude=[["b"], ["c", "d"]], k=2),
            'fill the shorter ones with ""',
        ),
        (retrieve(user_id=["a"], exclude=[["b"], ["c"]], k=2), "as many queries each"),
        (retrieve(user_id=[7], exclude=[[]], k=2), "takes string values. Got: 7"),
        (retrieve(user_id=["\ud800"], exclude=[[]], k=2), "surrogate"),
        (retrieve(user_id=[{"b64": "?"}], exclude=[[]], k=2), "wrong base64"),
        (
            {
                "signature_name": "retrieve",
                "instances": [{"user_id": "a", "exclude": [], "k": 2}],
            },
            "use 'inputs' instead of 'instances'",
        ),
    ],
)
def test_a_refusal_says_what_is_wrong(document: dict[str, Any], message: str) -> None:
    assert message in refused(**document)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"inputs": [1]} x', "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        ('{"inputs": [1]}'.encode("utf-16"), "not JSON"),
        (b'{"inputs": [' + b"9" * 5000 + b"]}", "not JSON"),
        (b'{"inputs": ' + b"[" * 8 + b"]" * 8 + b"}", "nested 9 deep; at most 8"),
        (b"[" * 1_000_000, "nested 1000000 deep"),
        (b'{"a":' * 100_000, "nested 100000 deep"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        rest.parse_json(body, max_depth=8)
    assert caught.value.status == 400
    assert message in caught.value.message


def test_brackets_in_strings_are_not_nesting() -> None:
    text = '[[[[[[[[[[{"' * 3 + "\\"
    assert rest.parse_json(json.dumps({"inputs": [text]}).encode(), 2) == {"inputs": [text]}


@given(
    st.recursive(
        st.none() | st.text() | st.integers(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    )
)
def test_depth_is_that_of_a_walk(value: Any) -> None:
    def depth(part: Any) -> int:
        if isinstance(part, dict):
            part = list(part.values())
        return 1 + max(map(depth, part), default=0) if isinstance(part, list) else 0

    document = {"inputs": value}
    body = json.dumps(document).encode()
    assert rest.parse_json(body, max_depth=depth(document)) == document
    with pytest.raises(RequestError, match="nested"):
        rest.parse_json(body, max_depth=depth(document) - 1)


def limits(**inputs: Any) -> str:
    arrays = {"user_id": np.zeros(1), **{k: np.asarray(v) for k, v in inputs.items()}}
    try:
        rest.check_limits(arrays, max_queries=2, max_k=10, max_exclude=3, max_history=4)
    except RequestError as error:
        return f"{error.status} {error.message}"
    return ""


def test_limits_hold_at_their_edge() -> None:
    assert limits(k=10, user_id=[1, 2], exclude=np.zeros((1, 3)), history=np.zeros((1, 4))) == ""
    assert limits() == ""
    assert limits(k=11) == "400 k must be from 1 to 10. Got: 11"
    assert limits(k=0) == "400 k must be from 1 to 10. Got: 0"
    assert "may hold 2 queries. Got: 3" in limits(user_id=[1, 2, 3])
    assert "'exclude' may hold 3 entries for each query. Got: 4" in limits(exclude=np.zeros((1, 4)))
    assert "'history' may hold 4 entries" in limits(history=np.zeros((1, 5)))


FLOATS = st.floats(width=32)


@given(st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=1, max_size=4))
def test_scores_come_back_to_the_last_bit(rows: list[list[float]]) -> None:
    scores = np.array(rows, np.float32)
    text = rest.format_outputs({"scores": scores}, is_row_format=False)
    # Python reads the bare words NaN and Infinity.
    values = json.loads(text)["outputs"]
    assert all(isinstance(value, float) for row in values for value in row)
    np.testing.assert_array_equal(np.array(values, np.float32), scores)


def test_rows_and_columns_of_an_answer() -> None:
    ids = np.empty((2, 2), object)
    ids[:] = [["Zoë".encode(), b'a"b'], [b"", b"\n"]]
    outputs = {
        "candidate_ids": ids,
        "scores": np.array([[1.0, 0.1], [-np.inf, np.nan]], np.float32),
        "is_known_user": np.array([True, False]),
    }
    columns = rest.format_outputs(outputs, is_row_format=False).decode()
    rows = rest.format_outputs(outputs, is_row_format=True).decode()
    assert '"scores": [[1.0,0.100000001],[-Infinity,NaN]]' in columns
    expected = {
        "candidate_ids": [["Zoë", 'a"b'], ["", "\n"]],
        "is_known_user": [True, False],
    }
    read = json.loads(columns)["outputs"]
    for name, values in expected.items():
        assert read[name] == values
        assert [row[name] for row in json.loads(rows)["predictions"]] == values


def test_a_single_output_stands_without_its_name() -> None:
    outputs = {"ids": np.array([[1, 2], [3, 4]])}
    assert json.loads(rest.format_outputs(outputs, is_row_format=False)) == {
        "outputs": [[1, 2], [3, 4]]
    }
    assert json.loads(rest.format_outputs(outputs, is_row_format=True)) == {
        "predictions": [[1, 2], [3, 4]]
    }


def test_an_answer_to_no_query_is_empty() -> None:
    outputs = {"ids": np.zeros((0, 3), np.int64), "known": np.zeros(0, bool)}
    text = rest.format_outputs(outputs, is_row_format=False)
    assert json.loads(text) == {"outputs": {"ids": [], "known": []}}
