"""Features in a signature and in a saved model."""

import json
import keyword
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.features.columns import NUM_NEW, fit, fitted_features, new_columns, new_tensors
from tfrs_pipeline.features.categorical import Categorical, MultiCategorical
from tfrs_pipeline.features.encoding import raw_columns, raw_signature
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.graph import encode_raw, tensor_specs
from tfrs_pipeline.features.numeric import Numeric


class Served(tf.Module):
    """What an export would hold: the features, behind a traced function."""

    def __init__(self, features: Sequence[Feature]) -> None:
        super().__init__()
        self.tables = [feature.graph_resource for feature in features]
        self.encode = tf.function(
            lambda raw: encode_raw(features, raw),
            input_signature=[tensor_specs(raw_signature(features))],
        )

    def save(self, folder: Path) -> None:
        tf.saved_model.save(self, str(folder), signatures={"encode": self.encode})


def test_a_loaded_model_encodes_as_the_training_did(tmp_path: Path) -> None:
    Served(fitted_features()).save(tmp_path)
    loaded = tf.saved_model.load(str(tmp_path))
    raw = new_tensors()
    for feature in fitted_features():
        expected = feature.encode_column(new_columns()[feature.name])
        assert expected.any()
        for encoded in (loaded.encode(raw), loaded.signatures["encode"](**raw)):
            np.testing.assert_array_equal(encoded[feature.name], expected)
    # A graph rounds in the same way as single operations.
    rng = np.random.default_rng(0)
    features = [f for f in fitted_features() if f.kind in ("numeric", "timestamp", "vector")]
    columns: dict[str, Any] = {"a_numeric": rng.normal(size=500) * 1e4}
    columns["a_vector"] = rng.normal(size=(500, 3))
    columns["a_timestamp"] = [datetime.fromtimestamp(s, UTC) for s in rng.uniform(-1e9, 2e9, 500)]
    raw = {name: tf.repeat(column[:1], 500, 0) for name, column in new_tensors().items()}
    encoded = loaded.encode(raw | raw_columns(features, columns, 500))
    for feature in features:
        expected = feature.encode_column(columns[feature.name])
        np.testing.assert_array_equal(encoded[feature.name], expected)


def test_lists_of_a_request_are_cut_and_padded() -> None:
    feature = MultiCategorical("genres", ("a", "b", "c"), num_values=3)
    raw = np.array([["x", "c", "", "a"], ["b", "b", "", ""], ["", "", "", "a"]], object)
    for width, expected in (
        (4, [[3, 1, 0], [2, 2, 0], [1, 0, 0]]),
        (1, [[0] * 3, [2, 0, 0], [0] * 3]),
        (0, [[0] * 3] * 3),
    ):
        assert feature.encode(raw[:, :width]).tolist() == expected
        tensor = tf.constant(raw[:, :width], tf.string)
        assert feature.encode_in_graph(tensor).numpy().tolist() == expected


def test_names_that_no_signature_can_have_are_replaced(tmp_path: Path) -> None:
    names = ["x", "release date", "release_date", "Übersicht", "a", "A", "2nd", "_x", "a/b", "日"]
    names += ["月", "class", "self", "k", "user_id", "history_timestamps"]
    features = [Categorical(name, ("a", "x")) for name in names]
    Served(features).save(tmp_path)
    inputs = [spec.name for spec in raw_signature(features).values()]
    # Functions that take the features by keyword can be called with these names.
    assert all(name.isidentifier() and not keyword.iskeyword(name) for name in inputs)
    assert not {"self", "k", "user_id", "history_timestamps"} & set(inputs)
    assert [inputs[0], *inputs[4:6]] == ["x", "a", "A_"]
    signature = tf.saved_model.load(str(tmp_path)).signatures["encode"]
    encoded = signature(**{name: tf.constant([name]) for name in inputs})
    for feature, name in zip(features, inputs, strict=True):
        assert encoded[feature.name].numpy() == feature.encode_column([name])


PROGRAM = r"""
import json, sys
import numpy as np
import tensorflow as tf
from tfrs_pipeline.features.encoding import raw_columns
from tfrs_pipeline.features.kinds import feature_from_dict
features = [feature_from_dict(settings) for settings in json.loads(sys.argv[2])]
columns = {feature.name: ["İIi", None] for feature in features}
raw = raw_columns(features, columns, 2)
assert not {"ibis", "duckdb", "tensorflow_recommenders", "pydantic"} & set(sys.modules)
model = tf.saved_model.load(sys.argv[1])
print(json.dumps(model.encode(raw)["t"].numpy().tolist()))
assert tf.strings.lower(["I"], encoding="utf-8").numpy()[0].decode() == "\u0131"
"""


@pytest.mark.nightly
def test_a_small_process_of_another_locale_encodes_the_same(tmp_path: Path) -> None:
    feature = fit("text", ["İIi near"], "t", max_values=2)
    Served([feature]).save(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), json.dumps([feature.to_dict()])],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "tr_TR.UTF-8"},
    )
    expected = feature.encode_column(["İIi", None]).tolist()
    assert json.loads(done.stdout) == expected == [[1, 0], [0, 0]]


def test_what_is_missing_or_twice_is_named() -> None:
    features, columns = fitted_features(), new_columns()
    del columns["a_text"]
    with pytest.raises(ValueError, match=r"\['a_text'\] are missing. Received: \['a_bucketized', "):
        raw_columns(features, columns, NUM_NEW)
    with pytest.raises(ValueError, match=r"'a_categorical' must have 2 rows\. Received: 7"):
        raw_columns(features[:1], columns, 2)
    with pytest.raises(ValueError, match="Received twice: x"):
        raw_signature([Numeric("x"), Categorical("x")])
