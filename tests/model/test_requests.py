"""Request features from raw values to the query tower: in training, evaluation and retrieval."""

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.conftest import tiny
from tfrs_pipeline import Batch, FittedTwoTower, Log, Split, TrainingSet, TwoTower
from tfrs_pipeline.features.categorical import Categorical
from tfrs_pipeline.features.encoding import encode_requests, raw_requests, request_signature
from tfrs_pipeline.features.numeric import Numeric
from tfrs_pipeline.features.raw import to_seconds
from tfrs_pipeline.search.queries import item_times

HOUR = Categorical("hour", tuple(map(str, range(24))), is_from_timestamp=True)
WEEKDAY = Numeric("weekday", is_from_timestamp=True)


def encoded(*requests: dict[str, Any]) -> dict[str, np.ndarray]:
    return encode_requests((HOUR, WEEKDAY), raw_requests((HOUR, WEEKDAY), requests))


@settings(max_examples=40)
@given(st.datetimes(datetime(1901, 1, 1), datetime(2100, 1, 1)), st.integers(-12, 14))
def test_a_timestamp_gives_hour_and_weekday_of_the_calendar(moment: datetime, offset: int) -> None:
    time = moment.replace(tzinfo=UTC)
    abroad = time.astimezone(timezone(timedelta(hours=offset)))
    found = encoded({"timestamp": time}, {"timestamp": abroad})
    assert found["hour"].tolist() == [HOUR.vocabulary.index(str(time.hour)) + 1] * 2
    assert found["weekday"].tolist() == [time.weekday()] * 2


EVENTS = {"user_id": [1, 1, 2, 2], "item_id": [7, 8, 7, 8]}


def of_log(log: Log, folder: Path) -> tuple[Any, np.ndarray]:
    """Returns the one request feature of a log, and its codes of the samples."""
    data = TrainingSet.build(log, folder, seed=0)
    (feature,) = data.corpus.request_features
    return feature, data.samples.request_columns[feature.name]


@pytest.mark.parametrize("kind", ["categorical", "multi_categorical"])
def test_a_boolean_is_one_value_however_a_table_writes_it(kind: Any, tmp_path: Path) -> None:
    """pandas writes True in CSV, others write TRUE, Parquet and JSON have true."""
    words, values = ["True", "False", "", "True"], [True, False, None, True]
    (tmp_path / "log.csv").write_text("user_id,item_id,is_app\n1,7,True\n1,8,False\n2,7,\n2,8,True")
    log = Log.from_files(tmp_path / "log.csv", request_features={"is_app": kind})
    feature, of_samples = of_log(log, tmp_path / "samples")
    assert feature.vocabulary == ("false", "true")
    assert len(np.unique(of_samples)) == 3
    upper, lower = ([change(x) for x in words] for change in (str.upper, str.lower))
    if kind != "multi_categorical":  # A table holds it as lists or text.
        events = pa.table({**EVENTS, "is_app": values})
        _, codes = of_log(Log.from_table(events, request_features={"is_app": kind}), tmp_path / "t")
        np.testing.assert_array_equal(codes, of_samples)
    typed: list[Any] = [pa.array(words), pa.array(values), np.array(values, object)]
    for column in (words, upper, lower, values, *typed):
        np.testing.assert_array_equal(feature.encode_column(column), of_samples)
    # The same as text, as a client sends it.
    for texts in (words, upper, lower):
        raw = np.reshape(texts, [4, *(1 for _ in feature.raw_spec.shape[1:])])
        np.testing.assert_array_equal(feature.encode(raw), of_samples)


def test_a_whole_float_of_a_request_is_the_integer_of_the_log(tmp_path: Path) -> None:
    """pandas turns integers into floats if one is missing, in the log and in serving."""
    values = [3.0, 4.0, np.nan, 3.0]
    events = pd.DataFrame({**EVENTS, "shelf": values})
    log = Log.from_table(events, request_features={"shelf": "categorical"})
    feature, of_samples = of_log(log, tmp_path)
    for column in (values, [3, 4, None, 3], ["3", "4", "", "3"], np.array(values)):
        np.testing.assert_array_equal(feature.encode_column(column), of_samples)
    assert len(set(of_samples.tolist())) == 3
    # A text is the category as the log has it, and no number.
    assert feature.encode(np.array(["3.0", "4.0", "", "3"])).tolist() == [0, 0, 0, of_samples[0]]
    # Not if some values are fractions: then 3.0 is a value like the others.
    prices = Categorical.fit("price", [3.0, 3.5])
    assert prices.encode_column([3.0, 3.5]).all()


def test_what_pandas_has_for_missing_is_missing() -> None:
    nothing = [None, np.nan, "", pd.NA, pd.NaT]
    assert Categorical("device", ("phone",)).encode_column(nothing).tolist() == [0] * 5
    assert np.isnan(to_seconds("at", [None, pd.NA, pd.NaT])).all()


def test_times_of_a_history_are_seconds_and_milliseconds_are_refused() -> None:
    times = [1_700_000_000.0, np.nan]
    (seconds,) = item_times([{"history": [1, 2], "history_timestamps": times}])
    np.testing.assert_array_equal(seconds, times)
    # As JSON has it, an unknown time is null.
    (with_none,) = item_times([{"history": [1, 2], "history_timestamps": [1_700_000_000, None]}])
    np.testing.assert_array_equal(with_none, times)
    with pytest.raises(ValueError, match=r"must be seconds since 1970; divide .*1700000000000"):
        item_times([{"history": [1, 2], "history_timestamps": [1_700_000_000_000, np.nan]}])


def test_what_is_given_goes_before_the_timestamp() -> None:
    night = datetime(2024, 1, 7, 23, tzinfo=UTC)  # A Sunday.
    both: dict[str, Any] = {"hour": 3, "timestamp": night}
    found = encoded({**both, "weekday": 1}, both, {"weekday": 2.0}, {})
    code = HOUR.vocabulary.index
    assert found["hour"].tolist() == [code("3") + 1, code("3") + 1, 0, 0]
    np.testing.assert_array_equal(found["weekday"], [1, 6, 2, np.nan])
    assert list(request_signature((HOUR, WEEKDAY))) == ["hour", "weekday", "timestamp"]
    assert list(request_signature((Numeric("hour"),))) == ["hour"]
    with pytest.raises(ValueError, match="timestamp"):
        encoded({"timestamp": datetime(2024, 1, 1)})


@pytest.fixture(scope="module")
def model(requested: TrainingSet, requested_split: Split) -> FittedTwoTower:
    """Returns a validated model; `test_times.py` tests that validation asks as evaluation does."""
    plan = tiny(dim=16, training={"max_epochs": 12, "patience": 12})
    return plan.fit_samples(requested, requested_split.validation)


def test_the_device_decides_what_is_retrieved(model: FittedTwoTower, requested_split: Any) -> None:
    """Within a user's taste, odd-numbered items are clicked only on the app."""
    histories = [{"history": ids} for ids in requested_split.validation.histories]
    shares = {}
    for device in ("app", "web", "fridge", None):
        queries = [{**query, "request": {"device": device}} for query in histories]
        ids, _ = model.retrieve(queries, k=4)
        shares[device] = float(np.mean(ids // 10 % 2))
    assert shares["app"] > 0.8
    assert shares["web"] < 0.2
    # Unknown and missing devices share one trained code, whose share lies between the two.
    assert shares["fridge"] == shares[None]
    assert 0.25 < shares[None] < 0.75


def test_training_drops_some_of_the_request_features(requested: TrainingSet) -> None:
    seen: list[tf.Tensor] = []

    class Spy(tf.keras.layers.Layer):
        def call(self, inputs: dict[str, Any], training: bool = False) -> tf.Tensor:
            seen.append(inputs["features"])
            return tf.zeros([tf.shape(inputs["row"])[0], 8])

    network, num = TwoTower(dim=8, query_tower=Spy()).build(requested.corpus), 1000
    columns = {"device": tf.ones([num], tf.int32), "hour": tf.ones([num])}
    rows = {"query_row": tf.range(1, num + 1), "history_rows": tf.zeros([num, 50], tf.int32)}
    batch = Batch(**rows, dropout_seed=tf.constant([1, 2]), requests=columns)
    for training in (True, False):
        network._queries(batch, training=training)
    dropped, kept = seen[-2:]
    is_missing = [dropped["device"].numpy() == 0, np.isnan(dropped["hour"])]
    for name, column in columns.items():
        np.testing.assert_array_equal(kept[name], column)
    # Within five standard deviations of 5%, and each feature is dropped by itself.
    shares = np.mean(is_missing, axis=1)
    np.testing.assert_allclose(shares, 0.05, atol=5 * np.sqrt(0.05 * 0.95 / num))
    assert np.mean(is_missing[0] & is_missing[1]) < 0.02
