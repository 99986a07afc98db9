"""What is written into a new version beside its towers: the index, the held-out queries."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tfrs_pipeline.answers import version
from tfrs_pipeline.answers.version import ExportOptions, Items, query_table
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.features.categorical import Categorical
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.search.queries import QueryInputs
from tfrs_pipeline.search.settings import Auto, Exact, Scann
from tfrs_pipeline.search.tune import Requests


def inputs_of(requests: tuple[Feature, ...], *, reads_times: bool = False) -> QueryInputs:
    features = {"query": (), "request": requests, "candidate": ()}
    return QueryInputs(Ids([30, 10]), Ids([1, 2, 3]), features, {}, 5, reads_times)


def test_requests_are_stored_as_the_model_reads_them() -> None:
    features = (Categorical("fresh", ("true",)), Categorical("shelf", ("7",)))
    given = [{"fresh": True, "shelf": np.nan}, {"fresh": None, "shelf": 7}, {}]
    items = pa.table({"item_id": [1]})
    queries: list[Any] = [{"request": request} for request in given]
    table = query_table(queries, items, inputs_of(features))
    assert table["request"].to_pylist() == [
        {"fresh": fresh, "shelf": shelf, "timestamp": None}
        for fresh, shelf in (("true", None), (None, "7"), (None, None))
    ]


def test_times_are_stored_if_the_model_reads_them() -> None:
    items = pa.table({"item_id": [1]})
    queries: list[Any] = [{"user_id": 30, "history": [1, 2], "history_timestamps": [5, None]}, {}]
    plain = query_table(queries, items, inputs_of(()))
    assert plain.to_pylist() == [
        {"user_id": 30, "history": [1, 2]},
        {"user_id": None, "history": []},
    ]
    timed = query_table(queries, items, inputs_of((), reads_times=True))
    first, second = timed["history_timestamps"].to_pylist()
    np.testing.assert_array_equal(first, [5, np.nan])
    assert second == []
    assert timed["request"].to_pylist() == [{"timestamp": None}] * 2


def test_an_index_is_tuned_without_what_each_user_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known items have their rows among those of the index, which may lack some."""
    tuned_on: list[Requests] = []

    def tune(vectors: np.ndarray, requests: Requests, **_: Any) -> Any:
        tuned_on.append(requests)
        raise InterruptedError

    monkeypatch.setattr(version, "tune_index", tune)
    known = {30: ["a", "b"], 10: ["c"]}
    users = [30, 10]
    stored = SimpleNamespace(
        known=lambda row: [] if row == 0 else known[users[row - 1]],
        user_rows=lambda ids: [users.index(x) + 1 if x in users else 0 for x in ids],
    )
    embed = SimpleNamespace(embed=lambda tower, queries: np.eye(3, 2, dtype=np.float32))
    parts: Any = SimpleNamespace(stored=stored, inputs=embed, query_tower=None)
    items = Items(pa.table({"item_id": ["c", "b"]}), np.eye(2, dtype=np.float32))
    queries: list[Any] = [{"user_id": 10}, {}, {"user_id": 30}]
    with pytest.raises(InterruptedError):
        version._write_index(tmp_path, Scann(), items, parts, queries)
    (requests,) = tuned_on
    assert [rows.tolist() for rows in requests.known] == [[1], [], [2]]
    # Exact search writes nothing, and embeds nothing.
    for index in (Exact(), Auto()):
        assert version._write_index(tmp_path, index, items, parts, []) == ({"kind": "exact"}, None)
    assert not [*tmp_path.iterdir()]


def test_the_options_of_an_export_come_back_from_its_manifest() -> None:
    options = ExportOptions(Scann(recall=0.8), "genres", keep_versions=3)
    stored = {"index": {"kind": "scann", "recall": 0.8}, "filter_by": "genres", "keep_versions": 3}
    assert ExportOptions.of({"export": stored}) == options
    with pytest.raises(TypeError, match=r"index must be tp\.Exact\(\)"):
        ExportOptions("exact")  # type: ignore[arg-type]
