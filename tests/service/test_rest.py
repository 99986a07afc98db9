"""TensorFlow Serving's REST rules, on requests written by hand and on generated arrays."""

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from tfrs_pipeline.features.feature import Spec
from tfrs_pipeline.features.numeric import Numeric
from tfrs_pipeline.service.rest import SignatureInputs, format_outputs, parse_predict
from tfrs_pipeline.service.settings import ServeSettings

LIMITS = ServeSettings(max_k=10, max_queries=2, max_results=150, max_exclude=3, max_history=4)
TIMES = {"history_timestamps"}
NULLABLE = {"features": {"price", "vector", "city", "tags", "times"}}
PRICE = Numeric.fit("price", [1.0, 2.0])
INT, TEXT, FLOAT = (Spec((None,), x) for x in ("int64", "string", "float64"))
INTS, TEXTS, FLOATS = (Spec((None, None), x) for x in ("int64", "string", "float64"))
ONE, VECTOR = Spec((), "int32"), Spec((None, 3), "float32")
SIGNATURES = {
    name: SignatureInputs(specs, LIMITS, dict.fromkeys(NULLABLE.get(name, ()), PRICE), TIMES)
    for name, specs in {
        "serving_default": {"user_id": INT},
        "retrieve_user": {"user_id": INT, "exclude": INTS, "k": ONE},
        "timed": {"timestamp": FLOAT, "history_timestamps": FLOATS},
        "histories": {"user_id": INT, "history": INTS, "history_timestamps": FLOATS},
        "retrieve": {"user_id": TEXT, "exclude": TEXTS, "k": ONE},
        "embed": {"price": FLOAT, "vector": VECTOR, "number": ONE},
        "features": {"user_id": TEXT, "price": FLOAT, "vector": VECTOR}
        | {"city": TEXT, "tags": TEXTS, "times": FLOATS},
    }.items()
}


def parsed(body: bytes | dict[str, Any]) -> tuple[str, dict[str, np.ndarray], bool]:
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse_predict(body, SIGNATURES)[:3]


def inputs(signature: str, **columns: Any) -> dict[str, Any]:
    return {"signature_name": signature, "inputs": columns}


EMBED = json.dumps(inputs("embed", price=[7.5], vector=[[1, 2, 3]], number=1)).encode()


def test_times_are_read_as_seconds_and_as_text() -> None:
    for text in ("2024-01-31T08:00Z", "2024-01-31T09:00:00+01:00", 1_706_688_000):
        times = [text, None]
        _, arrays, _ = parsed(inputs("timed", timestamp=times, history_timestamps=[times] * 2))
        for name in ("timestamp", "history_timestamps"):
            np.testing.assert_array_equal(np.ravel(arrays[name])[:2], [1_706_688_000, np.nan])


def times_read(key: str, query: dict[str, list[Any]]) -> np.ndarray:
    rows = [dict(zip(query, row, strict=True)) for row in zip(*query.values(), strict=True)]
    given = rows if key == "instances" else query
    return parsed({"signature_name": "histories", key: given})[1]["history_timestamps"]


ALONE, PADDED = [[7, 8]], [[7, -1, -1], [7, 8, 9]]
NAN = np.nan


@pytest.mark.parametrize("key", ["inputs", "instances"])
@pytest.mark.parametrize(
    ("history", "times", "expected"),
    [
        (ALONE, [[5.0, None]], [[5, NAN]]),
        (ALONE, [[5.0]], [[5]]),
        (ALONE, [None], np.zeros((1, 0))),
        ([[7]], [[5.0, None]], [[5, NAN]]),
        (ALONE, [[5.0, None, 6.0]], "3 times for 2 items"),
        ([[]], [[5.0, None, 6.0]], "3 times for 0 items"),
        # The length of the batch's other histories does not matter.
        (PADDED, [[5, None, None], [5, 6, 7]], [[5, NAN, NAN], [5, 6, 7]]),
        (PADDED, [[5, None], [5, 6]], [[5, NAN], [5, 6]]),
        (PADDED, [[5, None, 6], [5, 6, 7]], r"one time for each item .*3 times for 1 item\."),
        (PADDED, [[5, 6], [5, 6]], "2 times for 1 item"),
        (PADDED, [[5, None, None, None], [5, 6, 7, 8]], "4 times for 3 items"),
    ],
    ids=str,
)
def test_a_time_without_an_item_is_refused(
    key: str, history: list[list[int]], times: list[Any], expected: Any
) -> None:
    query: dict[str, list[Any]] = {"user_id": [1, 2][: len(history)], "history": history}
    query["history_timestamps"] = times
    if not isinstance(expected, str):
        np.testing.assert_array_equal(times_read(key, query), expected)
        return
    with pytest.raises(HTTPException, match=expected):
        times_read(key, query)


def test_the_default_signature_is_retrieve_user_with_100_results() -> None:
    """For the server, from here on: limits, logs and answers know one signature less."""
    name, arrays, _ = parsed({"inputs": [7]})
    assert (name, int(arrays["k"]), arrays["k"].dtype.name) == ("retrieve_user", 100, "int32")
    assert (arrays["user_id"].tolist(), arrays["exclude"].shape) == ([7], (1, 0))
    with pytest.raises(HTTPException, match=r"may ask for 150 results.*Received: 2 x 100"):
        parsed({"inputs": [7, 8]})


def test_strings_come_as_utf_8_or_base64() -> None:
    _, arrays, _ = parsed(inputs("retrieve", user_id=["Zoë"], exclude=[[{"b64": "w6k="}]], k=2))
    assert arrays["user_id"].tolist() == ["Zoë"]
    assert arrays["exclude"].tolist() == [["é"]]
    assert (arrays["k"].shape, arrays["k"].dtype.name) == ((), "int32")
    for no_text in ({"b64": "/w=="}, "\ud800"):  # Ids of a log are text, in UTF-8.
        with pytest.raises(HTTPException, match="400"):
            parsed(json.dumps(inputs("retrieve", user_id=[no_text], exclude=[[]], k=2)).encode())


def test_numbers_with_a_fraction_may_be_whole() -> None:
    body = b'{"signature_name": "embed", "inputs": {"price": [1, 2.5], "number": 1, "vector": '
    body += b"[[1, 2, 3], [0.1, -2e3, 4]]}}"
    _, arrays, _ = parsed(body)
    np.testing.assert_array_equal(arrays["price"], [1.0, 2.5])
    expected = np.array([[1, 2, 3], [0.1, -2000, 4]], np.float32)
    np.testing.assert_array_equal(arrays["vector"], expected)
    assert arrays["price"].dtype == np.float64
    assert arrays["vector"].dtype == np.float32


def test_null_is_a_missing_feature_but_no_id() -> None:
    given: dict[str, list[Any]] = {
        "user_id": ["a", "b"],
        "price": [None, 2.5],
        "vector": [None, [1, 2, None]],
        "city": ["Rome", None],
        "tags": [["x", None], None],
        "times": [None, [7, None]],
    }
    expected = {
        "user_id": ["a", "b"],
        "price": [NAN, 2.5],
        "vector": [[NAN] * 3, [1, 2, NAN]],
        "city": ["Rome", ""],
        "tags": [["x", ""], ["", ""]],
        "times": [[NAN, NAN], [7, NAN]],
    }
    rows = [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]
    rows[1] = dict(reversed(rows[1].items()))  # The order of names does not matter.
    for body in (inputs("features", **given), {"signature_name": "features", "instances": rows}):
        _, arrays, _ = parsed(body)
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, np.array(expected[name], array.dtype))
        body = json.loads(json.dumps(body).replace('"a"', "null"))
        with pytest.raises(HTTPException, match=r"user_id.*: takes a string, .*Received: None"):
            parsed(body)


def test_empty_lists_and_the_edge_of_limits_are_accepted() -> None:
    _, arrays, _ = parsed(inputs("retrieve", user_id=["a", "b"], exclude=[[], []], k=10))
    assert arrays["exclude"].shape == (2, 0)
    _, arrays, _ = parsed(inputs("retrieve", user_id=["a"], exclude=[["b"] * 3], k=1))
    assert arrays["exclude"].shape == (1, 3)
    _, arrays, _ = parsed(inputs("embed", price=[], vector=[], number=1))
    assert arrays["vector"].shape == (0, 3)


A = {"user_id": ["a"], "exclude": [[]], "k": 2}
E = {"price": [1.0], "vector": [[1.0, 2.0, 3.0]], "number": 1}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b'{"inputs": [1]} x', "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        ('{"inputs": [1]}'.encode("utf-16"), "not JSON"),
        (b'{"inputs": [' + b"9" * 5000 + b"]}", "not JSON"),
        (b'{"inputs": ["\\ud800"]}', "not JSON"),
        (b"[" * 1_000_000, "not JSON in UTF-8: recursion limit"),
        (b"[1]", "must be an object"),
        ({}, "either 'inputs' or 'instances'"),
        ({"inputs": [1], "instances": [1]}, "either 'inputs' or 'instances'"),
        ({"input": [1]}, "Unknown key 'input'"),
        ({"inputs": [1], "signature_name": "nope"}, "'nope' not found in signature def"),
        ({"inputs": [1], "signature_name": 7}, "7 not found in signature def"),
        ({"instances": []}, "instances: List should have at least 1 item"),
        ({"instances": 7}, "instances: Input should be a valid list"),
        ({"instances": [1] * 3}, "instances: List should have at most 2 items"),
        (
            {"inputs": [1] * 2},
            "150 results, its queries times k (--max-results). Received: 2 x 100",
        ),
        ({"inputs": [1] * 3}, "inputs.user_id: List should have at most 2 items"),
        ({"inputs": [1.0]}, "inputs.user_id.0: Input should be a valid integer. Received: 1.0"),
        ({"inputs": [True]}, "valid integer. Received: True"),
        ({"inputs": ["1"]}, "valid integer. Received: '1'"),
        ({"inputs": [1, 2**63]}, "inputs.user_id.1: Input should be less than or equal to"),
        ({"inputs": 5}, "inputs.user_id: Input should be a valid list. Received: 5"),
        (inputs("retrieve", user_id=["a"], exclude=[[]]), "inputs.k: Missing named input"),
        (inputs("retrieve", **A, n=2), "Unknown input 'n'; the signature has user_id, exclude, k"),
        ({"signature_name": "retrieve", "inputs": ["a"]}, "valid dictionary. Received: ['a']"),
        ({"signature_name": "retrieve", "instances": [A]}, "use 'inputs' instead of 'instances'"),
        (inputs("retrieve", **{**A, "k": 11}), "inputs.k: Input should be less than"),
        (inputs("retrieve", **{**A, "k": 0}), "greater than or equal to 1. Received: 0"),
        (inputs("retrieve", **{**A, "exclude": [["b"] * 4]}), "exclude.0: List should have at"),
        (inputs("retrieve", **{**A, "exclude": [["b"], []]}), "lists of one length"),
        (inputs("retrieve", **{**A, "exclude": [["b"], ["c"]]}), "as many queries"),
        (inputs("retrieve", **{**A, "user_id": [7]}), "inputs.user_id.0: takes a string"),
        (inputs("retrieve", **{**A, "user_id": [{"b64": "?"}]}), "inputs.user_id.0"),
        (inputs("histories", user_id=[1], history=[[1] * 5]), "history.0: List should have at m"),
        (inputs("embed", **{**E, "price": ["1"]}), "inputs.price.0: Input should be a valid"),
        (inputs("embed", **{**E, "price": [True]}), "valid number. Received: True"),
        (inputs("timed", timestamp=[1.7e12], history_timestamps=[[1.0]]), "milliseconds by 1,000"),
        (
            inputs("timed", timestamp=[1.0], history_timestamps=[[1.7e12]]),
            "history_timestamps.0.0: takes sec",
        ),
        (inputs("embed", **{**E, "price": [None]}), "valid number. Received: None"),
        (inputs("embed", **{**E, "price": [10**400]}), "valid number"),
        (EMBED.replace(b"7.5", b"1e999"), "takes finite float64 values, or null"),
        (inputs("embed", **{**E, "vector": [[1e300, 0, 0]]}), "takes finite float32 values"),
        (inputs("embed", **{**E, "vector": [[1.0]]}), "vector.0: List should have at least 3"),
        (inputs("embed", **{**E, "number": 2**31}), "less than or equal to 2147483647"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_refusal_says_what_is_wrong(body: Any, message: str) -> None:
    with pytest.raises(HTTPException) as caught:
        parsed(body)
    assert caught.value.status_code == 400
    assert message in caught.value.detail
    assert len(caught.value.detail) < 500


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize(
    "body",
    [
        EMBED.replace(b"7.5", b"?"),
        EMBED.replace(b"7.5", b"[[?]]"),
        EMBED.replace(b'"embed"', b"?"),
        b'{"inputs": [?]}',
        b'{"instances": [{"user_id": ?}]}',
        b'{"inputs": [1], "unknown": {"deep": [1, ?]}}',
        b" ? ",
    ],
)
def test_words_that_are_not_json_are_refused_wherever_they_stand(body: bytes, word: str) -> None:
    with pytest.raises(HTTPException, match="has NaN, Infinity or -Infinity; give null") as caught:
        parsed(body.replace(b"?", word.encode()))
    assert caught.value.status_code == 400
    # As text they are text, and other mistakes are told as what they are.
    with pytest.raises(HTTPException) as other:
        parsed(body.replace(b"?", b'"NaN" nan'))
    assert "give null" not in other.value.detail


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "body",
    [
        inputs("timed", timestamp=[LONG], history_timestamps=[[]]),
        inputs("timed", timestamp=[1.0], history_timestamps=[[f"2024-01-01T00:00:00+{LONG}"]]),
        inputs("timed", timestamp=[f"{LONG}Z"], history_timestamps=[[1.0]]),
        inputs("serving_default", user_id=[LONG]),
        inputs(LONG, user_id=[1]),
        inputs("serving_default", **{LONG: [1]}),
        {LONG: 1},
        {"inputs": LONG},
        {"instances": [{"user_id": {LONG: LONG}}]},
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_a_refusal_quotes_is_cut(body: Any) -> None:
    with pytest.raises(HTTPException) as caught:
        parsed(body)
    assert len(caught.value.detail) < 500


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    ),
    st.sampled_from(sorted(SIGNATURES)),
    st.sampled_from(["inputs", "instances"]),
)
def test_any_json_is_read_or_refused(value: Any, signature: str, key: str) -> None:
    # Only refusals are raised.
    with contextlib.suppress(HTTPException):
        parsed({"signature_name": signature, key: value})


@given(st.lists(st.lists(st.floats(width=32), min_size=3, max_size=3), min_size=1, max_size=4))
def test_scores_come_back_to_the_last_bit(rows: list[list[float]]) -> None:
    scores = np.array(rows, np.float32)
    text = format_outputs({"scores": scores}, is_row_format=False)
    values = json.loads(text, parse_constant=pytest.fail)["outputs"]  # The bare words are not JSON.
    assert all(isinstance(value, float | None) for row in values for value in row)
    finite = np.where(np.isfinite(scores), scores, np.nan)  # None becomes NaN.
    np.testing.assert_array_equal(np.array(values, np.float32), finite)


def test_rows_and_columns_of_an_answer() -> None:
    ids = np.empty((2, 2), object)
    ids[:] = [["Zoë", 'a"b'], ["", "\n"]]
    outputs = {
        "candidate_ids": ids,
        "scores": np.array([[1.0, 0.1], [-np.inf, np.nan]], np.float32),
        "is_known_user": np.array([True, False]),
    }
    columns = format_outputs(outputs, is_row_format=False).decode()
    rows = format_outputs(outputs, is_row_format=True).decode()
    assert '"scores":[[1.0,0.10000000149011612],[null,null]]' in columns
    expected = {"candidate_ids": [["Zoë", 'a"b'], ["", "\n"]], "is_known_user": [True, False]}
    read = json.loads(columns)["outputs"]
    for name, values in expected.items():
        assert read[name] == values
        assert [row[name] for row in json.loads(rows)["predictions"]] == values


def test_a_single_output_stands_without_its_name() -> None:
    outputs = {"ids": np.array([[1, 2], [3, 4]])}
    for is_row_format, name in ((False, "outputs"), (True, "predictions")):
        text = format_outputs(outputs, is_row_format=is_row_format)
        assert json.loads(text) == {name: [[1, 2], [3, 4]]}
