"""Exports without user data."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from starlette.exceptions import HTTPException

import tfrs_pipeline as tp
from tests.serving.conftest import Exported, Served, make_served
from tfrs_pipeline import Scann, export, load
from tfrs_pipeline.serving.rest import parse_predict
from tfrs_pipeline.serving.settings import ServeSettings
from tfrs_pipeline.serving.versions import ServedVersion

pytestmark = pytest.mark.usefixtures("trusted_exports", "loaded_once")


def bytes_of(folder: Path) -> bytes:
    """Reads every file of an export, and the values of its tables as text."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    tables = [str(pq.read_table(f).to_pydict()) for f in files if f.suffix == ".parquet"]
    return b"".join(path.read_bytes() for path in files) + "".join(tables).encode()


def test_an_export_without_user_data_names_no_users(tmp_path: Path, exported: Exported) -> None:
    served = make_served("str", use_user_id=False)
    index, folder = Scann(recall=0.9), tmp_path / "films"
    left_out = export(served.exportable(), folder, index=index, user_data=False)
    with_users, without = bytes_of(exported("str", "exact")), bytes_of(left_out)
    for user in served.query_ids:
        assert user.encode() in with_users
        assert user.encode() not in without
    model = load(left_out)
    assert not any("user" in name or "default" in name for name in model.saved_model.signatures)
    # The users' features are gone too.
    (by_user,) = {column.shape[0] for column in served.model.query_table.variables}
    parts = tf.train.TrackableView(model.saved_model.encoder).descendants()
    variables = [x for x in parts if isinstance(x, tf.Variable)]
    assert variables
    assert by_user not in [x.shape[0] for x in variables if x.shape.rank]
    rows = (2, 4, 5)
    queries: list[dict[str, Any]] = [{"history": served.known(row)} for row in rows]
    ids, scores = model.retrieve(queries, 9)
    expected_ids, expected = served.in_memory.retrieve(queries, 9)
    assert ids.tolist() == expected_ids.tolist()
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    features = {"gender": served.query_features[0].encode_column(["F"] * len(rows))}
    recent = np.array([np.pad(served.clicks[row], (0, 5))[:5] for row in rows])
    given = served.model.embed_queries(np.zeros(len(rows), np.int32), recent, features)
    expected = -np.sort(-(given.numpy() @ served.model.embed_corpus().T), axis=1)[:, :9]
    _, scores = model.retrieve([{**q, "features": {"gender": "F"}} for q in queries], 9)
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"exported without user data and knows no users\. Ask by"):
        model.retrieve_user([served.query_ids[0]], 5)
    with pytest.raises(HTTPException) as caught:
        parse_predict(b'{"inputs": ["x"]}', ServedVersion(left_out, ServeSettings()).signatures)
    assert "exported without user data: ask 'retrieve'" in caught.value.detail


def test_an_embedding_of_each_user_cannot_be_left_out(served: Served, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use_user_id=False"):
        export(served.exportable(), tmp_path / "films", user_data=False)
    assert not (tmp_path / "films").exists()


@pytest.mark.usefixtures("few_signatures")
def test_users_who_have_no_positive_are_unknown_ones_in_an_export_too(tmp_path: Path) -> None:
    """In a model with an embedding of each user, theirs is untrained."""
    events = pd.DataFrame({"user_id": np.arange(40) % 10, "item_id": np.arange(40) // 4})
    events["stage"] = np.where(events["user_id"].between(1, 7), "clicked", "exposed")
    log = tp.Log.from_table(events)
    training = tp.TrainingSettings(batch_size=8, max_epochs=2, learning_rate=0.1)
    settings: dict[str, Any] = {"dim": 4, "use_user_id": True, "negatives": ["uniform:num=8"]}
    model = tp.TwoTower(**settings, training=training).fit(log)
    loaded = load(export(model, tmp_path / "m", index=tp.Exact()))
    # Two users who clicked, one who only saw items, and a new one.
    queries: list[dict[str, Any]] = [{"user_id": user, "history": [1, 2]} for user in (7, 3, 9, 77)]
    ids, scores = loaded.retrieve(queries, 10)
    expected_ids, expected = model.retrieve(queries, 10)
    assert ids.tolist() == expected_ids.tolist()
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    np.testing.assert_allclose(scores[2], scores[3], atol=1e-6)
    assert np.abs(scores[1] - scores[0]).max() > 1e-3
    with pytest.raises(ValueError, match="use_user_id=False"):  # The first user has no positive.
        export(model, tmp_path / "left_out", user_data=False)
