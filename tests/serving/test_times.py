"""Times in service: every way in gives what the model in memory gives."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.serving.conftest import NUM_QUERIES, Served, make_served
from tests.serving.running_server import address_of
from tests.serving.test_requests import FEATURES, REQUESTS
from tfrs_pipeline import cli
from tfrs_pipeline.serving import export as export_module
from tfrs_pipeline.serving import rest, retriever
from tfrs_pipeline.serving.client import ServedRetriever
from tfrs_pipeline.serving.export import export
from tfrs_pipeline.serving.index import Exact
from tfrs_pipeline.serving.refresh import refresh_index
from tfrs_pipeline.serving.retriever import LoadedRetriever, load
from tfrs_pipeline.serving.settings import ServeSettings
from tfrs_pipeline.serving.versions import ServedVersion

pytestmark = pytest.mark.usefixtures("trusted_exports")
PROVE = export_module.prove
NOW = datetime(2024, 5, 1, 7, 30, tzinfo=UTC)
K = 9


@pytest.fixture(scope="module")
def served() -> Served:
    return make_served("int", use_user_id=False, reads_times=True)


@pytest.fixture(scope="module")
def folder(served: Served, tmp_path_factory: pytest.TempPathFactory, trusted_exports: None) -> Path:
    return export(served, tmp_path_factory.mktemp("times") / "films", index=Exact())


@pytest.fixture(scope="module")
def version(folder: Path) -> ServedVersion:
    return ServedVersion(folder, ServeSettings())


@pytest.fixture(scope="module")
def model(version: ServedVersion) -> LoadedRetriever:
    return version.retriever


@pytest.mark.slow
def test_a_fresh_process_answers_requests_with_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "prove", PROVE)
    both = make_served("int", request_features=FEATURES, reads_times=True)
    queries = [
        query_of(both, row, request=request)
        for request in (*REQUESTS, {"timestamp": NOW})
        for row in (2, 5)
    ]
    assert export(both, tmp_path / "films", index=Exact(), queries=queries).is_dir()


def times_of(served: Served, row: int) -> list[datetime]:
    """When the user's items were, oldest first."""
    assert served.history_times is not None
    of_user = slice(*served.histories.offsets[row : row + 2])
    seconds = served.history_times[of_user][::-1]
    return [datetime.fromtimestamp(time, UTC) for time in seconds.tolist()]


def query_of(served: Served, row: int, **more: Any) -> dict[str, Any]:
    return {"history": served.known(row), "history_timestamps": times_of(served, row), **more}


def queries_of(served: Served) -> list[dict[str, Any]]:
    """Times that are whole, in part, of the items alone, of the request alone, and missing."""
    request, times = {"request": {"timestamp": NOW}}, times_of(served, 5)
    return [
        query_of(served, 5, **request),
        query_of(served, 5, request={"timestamp": NOW - timedelta(hours=20)}),
        {**query_of(served, 5, **request), "history_timestamps": [*times[:-3], None, *times[-2:]]},
        query_of(served, 5),
        {"history": served.known(5), **request},
        {"history": served.known(5)},
        query_of(served, 2, **request),
        {"history": [], "history_timestamps": [], **request},
    ]


def test_times_are_read_as_in_memory(served: Served, model: LoadedRetriever) -> None:
    queries = queries_of(served)
    ids, scores = served.in_memory.retrieve(queries, K)
    got_ids, got = model.retrieve(queries, K)
    np.testing.assert_allclose(got, scores, atol=1e-5)
    assert got_ids.tolist() == ids.tolist()
    # Each time tells, but that of a request without a past, or with one at no time.
    rounded = np.round(scores, 4)
    assert len(np.unique(rounded, axis=0)) == len(queries) - 1
    assert rounded[4].tolist() == rounded[5].tolist()
    # Seconds say the same as a datetime, and items that the model does not know take their times.
    strange = query_of(served, 5, request={"timestamp": NOW})
    strange["history"] = [strange["history"][0], 10**6, *strange["history"][1:]]
    seconds = [time.timestamp() for time in strange["history_timestamps"]]
    strange["history_timestamps"] = np.array([seconds[0], 5.0, *seconds[1:]])
    np.testing.assert_allclose(model.retrieve([strange], K)[1], got[:1], atol=1e-5)
    with pytest.raises(ValueError, match=r"one time an item .*Received: 1 times for 2 items"):
        model.retrieve([{"history": [3, 10], "history_timestamps": [NOW]}], K)
    with pytest.raises(ValueError, match="time zone"):
        model.retrieve([{"history": [3], "history_timestamps": [datetime(2024, 1, 1)]}], K)


def test_the_times_of_users_are_stored(served: Served, model: LoadedRetriever) -> None:
    users = served.query_ids.tolist()
    rows = range(1, NUM_QUERIES + 1)
    known = [served.known(row) for row in rows]
    for request in ({"timestamp": NOW}, {}):
        queries = [query_of(served, row, request=request) for row in rows]
        for query, user in zip(queries, users, strict=True):
            query["user_id"] = user
        expected = served.in_memory.retrieve(queries, K, known)[1]
        found = model.retrieve_user(users, K, requests=[request] * len(users))[1]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    answer = model.saved_model.signatures["serving_default"](user_id=np.array(users))
    np.testing.assert_allclose(answer["scores"][:, :K], expected, atol=1e-5)
    # They come with the queries that the version keeps, for the index of its next items.
    kept = model.held_out_queries()
    asked = [{key: q[key] for key in ("user_id", "history", "history_timestamps")} for q in queries]
    np.testing.assert_allclose(model.embed_queries(kept), model.embed_queries(asked), atol=1e-6)


def test_the_client_the_server_and_the_command_line_send_times(
    served: Served,
    folder: Path,
    version: ServedVersion,
    model: LoadedRetriever,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queries = queries_of(served)
    expected = model.retrieve(queries, K)
    client = ServedRetriever(address_of(folder.parent))
    for got, want in zip(client.retrieve(queries, K), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    # An id that no model can have takes its own time with it, and nobody else's.
    strangers = [
        {
            **query,
            "history": [10**30, *query["history"]],
            "history_timestamps": [NOW, *query["history_timestamps"]],
        }
        for query in queries
        if query.get("history_timestamps")
    ]
    want = model.retrieve(strangers, K)[1]
    got = client.retrieve(strangers, K)[1]
    np.testing.assert_allclose(got, want, atol=1e-5)
    inputs = {"user_id": [-1], "history": [served.known(5)], "exclude": [[]], "k": K}
    body = json.dumps({"signature_name": "retrieve", "inputs": inputs}).encode()
    left_out = rest.parse_predict(body, version.signatures).inputs
    assert left_out["history_timestamps"].shape == (1, 0)
    assert np.isnan(left_out["timestamp"]).all()
    answer = model.saved_model.signatures["retrieve"](**left_out)
    np.testing.assert_allclose(answer["scores"], expected[1][5:6], atol=1e-5)
    query = queries[0]
    monkeypatch.setattr(retriever, "load", lambda *arguments, **options: model)
    history = ["--history", *map(str, query["history"])]
    times = ["--history_timestamps", *(x.isoformat() for x in query["history_timestamps"])]
    request = ["--request", f"timestamp={NOW.isoformat()}"]
    assert not cli.main(["query", str(folder), "--json", "-k", "60", *history, *times, *request])
    items = json.loads(capsys.readouterr().out)["items"]
    every = model.retrieve([query], 60, [query["history"]])
    num = len(items)
    assert [item["item_id"] for item in items] == every[0][0][:num].tolist()
    np.testing.assert_allclose([item["score"] for item in items], every[1][0][:num], atol=1e-5)


@pytest.mark.slow
def test_refreshed_items_and_exports_without_users_take_times(
    served: Served, tmp_path: Path
) -> None:
    version = export(served, tmp_path / "films", index=Exact(), user_data=False)
    queries = queries_of(served)
    np.testing.assert_allclose(
        load(version).retrieve(queries, K)[1], served.in_memory.retrieve(queries, K)[1], atol=1e-5
    )
    pq.write_table(served.items, tmp_path / "items.parquet")
    refreshed = refresh_index(version.parent, tmp_path / "items.parquet")
    np.testing.assert_allclose(
        load(refreshed.folder).retrieve(queries, K)[1],
        load(version).retrieve(queries, K)[1],
        atol=1e-5,
    )
