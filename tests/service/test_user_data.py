"""Exports without user data."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from starlette.exceptions import HTTPException

from tests.service.conftest import Exported, Served, make_served
from tfrs_pipeline import Scann, export, load
from tfrs_pipeline.service.rest import parse_predict
from tfrs_pipeline.service.settings import ServeSettings
from tfrs_pipeline.service.versions import ServedVersion

pytestmark = pytest.mark.usefixtures("trusted_exports")


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
    assert not any("user" in name or "default" in name for name in model.signatures)
    saved = tf.saved_model.load(str(left_out))
    assert not any("user" in name or "default" in name for name in saved.signatures)
    # The users' features are gone too.
    (by_user,) = {column.shape[0] for column in served.model.query_table.variables}
    parts = tf.train.TrackableView(saved.encoder).descendants()
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
