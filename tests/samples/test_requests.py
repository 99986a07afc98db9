"""Request features of samples: raw values as in the events, and encoded."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.test_request_features import FEATURES, expected, made, rows
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.model.corpus import TrainingSet
from tfrs_pipeline.samples.build import build_samples
from tfrs_pipeline.samples.store import read_raw, read_samples


def test_samples_have_the_request_features_of_their_events(tmp_path: Path) -> None:
    build_samples(made(rows(), FEATURES), tmp_path, seed=0)
    # Users are numbered in the order of their ids; a user's samples are in order of time.
    table = sorted(enumerate(rows()), key=lambda x: (x[1]["user_id"], x[1]["timestamp"], x[0]))
    samples = pq.read_table(tmp_path / "samples.parquet")
    for name in FEATURES:
        found = [expected(number)[name] for number, _ in table]
        assert samples[f"request_{name}"].to_pylist() == found
        raw = read_raw(tmp_path, name)
        assert raw.to_pylist() == found
        assert pa.types.is_dictionary(raw.type) == (name == "device")


def test_request_features_may_be_called_as_columns_of_samples(tmp_path: Path) -> None:
    names = ("time", "query_time", "id", "candidate_row", "query_row", "weight_", "num_earlier")
    features = {name: [number + i / 8 for i in range(3)] for number, name in enumerate(names)}
    seconds = pa.array([1_700_000_000, 1_700_000_005, 1_700_000_009], pa.timestamp("s", "UTC"))
    clicks = {"user_id": [7, 7, 8], "item_id": [3, 2, 3], "timestamp": seconds}
    clicks["request_id"] = ["a", "a", "b"]
    kinds = dict.fromkeys(names, "numeric")
    log = Log.from_table(pa.table(clicks | features), request_features=kinds)
    build_samples(log, tmp_path, seed=0)
    samples = read_samples(tmp_path)
    assert samples.query_rows.tolist() == [1, 1, 2]
    assert samples.candidate_rows.tolist() == [2, 1, 2]
    assert samples.num_earlier is not None
    assert samples.num_earlier.tolist() == [0, 0, 0]
    for name in names:
        assert read_raw(tmp_path, name).to_pylist() == features[name]


def test_a_training_set_holds_the_encoded_request_features(tmp_path: Path) -> None:
    log = made(rows(), {"device": "categorical", "speed": "numeric"})
    data = TrainingSet.build(log, tmp_path, seed=0)
    raw = [read_raw(tmp_path, name) for name in ("device", "speed")]
    for feature, column in zip(data.corpus.request_features, raw, strict=True):
        encoded = data.samples.request_columns[feature.name]
        np.testing.assert_array_equal(encoded, feature.encode_column(column))
        assert len(encoded) == len(data.samples)
