"""Request features in service: every way in gives what the model in memory gives."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.exceptions import HTTPException

from tests.serving.conftest import NUM_QUERIES, Served, make_served
from tests.serving.running_server import address_of
from tfrs_pipeline import cli
from tfrs_pipeline.model.features import Feature
from tfrs_pipeline.serving import page, rest, retriever
from tfrs_pipeline.serving.client import ServedRetriever
from tfrs_pipeline.serving.encoder import Encoder, embed_queries
from tfrs_pipeline.serving.export import export
from tfrs_pipeline.serving.index import Exact
from tfrs_pipeline.serving.refresh import refresh_index
from tfrs_pipeline.serving.retriever import LoadedRetriever, load
from tfrs_pipeline.serving.settings import ServeSettings
from tfrs_pipeline.serving.versions import ServedVersion

HOURS = tuple(map(str, range(24)))
FEATURES = (
    # As an input it would be called like the user's feature.
    Feature.fit("Gender", "categorical", ["ios", "web"]),
    Feature("hour", "categorical", HOURS, is_from_timestamp=True),
    Feature.fit("free space", "numeric", [1.0, 4.0]),
    Feature.fit("words", "multi_categorical", [["a", "b"], ["c"]]),
    Feature.fit("place", "vector", [[1.0, 0.0], [0.0, 2.0]]),
)
TIME = datetime(2024, 5, 1, 7, 30, tzinfo=UTC)
# Whole, in part, unknown, by its time, missing.
REQUESTS: list[dict[str, Any]] = [
    {"Gender": "ios", "hour": 7, "free space": 2.0, "words": ["a", "c"], "place": [0.5, 1.0]},
    {"Gender": "web"},
    {"Gender": "fridge", "words": ["x", "b"], "hour": "late"},
    {"timestamp": TIME, "free space": -3.0},
    {},
]
K = 9


@pytest.fixture(scope="module")
def served() -> Served:
    return make_served("int", request_features=FEATURES)


@pytest.fixture(scope="module")
def folder(served: Served, tmp_path_factory: pytest.TempPathFactory, trusted_exports: None) -> Path:
    folder = tmp_path_factory.mktemp("requests") / "films"
    return export(served, folder, index=Exact(), queries=queries_of(served))


@pytest.fixture(scope="module")
def version(folder: Path) -> ServedVersion:
    return ServedVersion(folder, ServeSettings())


@pytest.fixture(scope="module")
def model(version: ServedVersion) -> LoadedRetriever:
    return version.retriever


def queries_of(served: Served) -> list[dict[str, Any]]:
    """Each request with each of two histories."""
    histories = [served.known(2), served.known(4)]
    return [{"history": history, "request": x} for x in REQUESTS for history in histories]


def scores_of(served: Served, queries: Sequence[dict[str, Any]]) -> np.ndarray:
    return served.in_memory.retrieve(queries, K)[1]


def test_requests_are_answered_as_in_memory(served: Served, model: LoadedRetriever) -> None:
    queries = queries_of(served)
    ids, scores = served.in_memory.retrieve(queries, K)
    got_ids, got = model.retrieve(queries, K)
    np.testing.assert_allclose(got, scores, atol=1e-5)
    assert got_ids.tolist() == ids.tolist()
    # Each part of a request tells; what is unknown or missing does not.
    assert len(np.unique(np.round(scores[::2], 4), axis=0)) == len(REQUESTS)
    unknown = [{**queries[0], "request": x} for x in ({}, {"Gender": "fridge"}, {"hour": None})]
    assert np.ptp(model.retrieve(unknown, K)[1], axis=0).max() == 0
    # Where the time is known, so is the hour; given, it goes model.
    timed = [{"timestamp": TIME}, {"hour": 7}, {"timestamp": TIME, "hour": 8}, {"hour": 8}]
    found = model.retrieve([{**queries[0], "request": x} for x in timed], K)[1]
    np.testing.assert_allclose(found[[0, 2]], found[[1, 3]], atol=1e-6)
    assert np.abs(found[0] - found[3]).max() > 1e-3
    products = model.embed_queries(queries) @ served.model.embed_corpus().T
    np.testing.assert_allclose(-np.sort(-products, axis=1)[:, :K], scores, atol=1e-5)


def test_users_and_given_features_go_with_requests(served: Served, model: LoadedRetriever) -> None:
    users = served.query_ids.tolist()
    request = REQUESTS[0]
    known = [served.known(row) for row in range(1, NUM_QUERIES + 1)]
    queries = [
        {"user_id": user, "history": history, "request": request}
        for user, history in zip(users, known, strict=True)
    ]
    expected_ids, expected = served.in_memory.retrieve(queries, K, known)
    ids, scores, is_known = model.retrieve_user(users, K, requests=[request] * len(users))
    assert is_known.all()
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert ids.tolist() == expected_ids.tolist()
    without = served.in_memory.retrieve([{**q, "request": {}} for q in queries], K, known)[1]
    np.testing.assert_allclose(model.retrieve_user(users, K)[1], without, atol=1e-5)
    answer = model.saved_model.signatures["serving_default"](user_id=np.array(users))
    np.testing.assert_allclose(answer["scores"][:, :K], without, atol=1e-5)
    # The user's own gender, given: what the model holds of it.
    genders = [
        {**q, "features": {"gender": g}} for q, g in zip(queries, served.genders, strict=True)
    ]
    mixed = [*genders[:3], *queries[3:]]
    np.testing.assert_allclose(
        model.retrieve(mixed, K)[1], model.retrieve(queries, K)[1], atol=1e-5
    )


def test_what_the_model_does_not_read_is_refused(model: LoadedRetriever) -> None:
    with pytest.raises(ValueError, match=r"no request feature 'houre'; did you mean 'hour'\?"):
        model.retrieve([{"history": [], "request": {"houre": 3}}], 3)
    with pytest.raises(ValueError, match=r"'free space' must hold numbers. Received: 'much'"):
        model.retrieve_user([100], 3, requests=[{"free space": "much"}])
    with pytest.raises(ValueError, match="requests"):
        model.retrieve_user([100, 101], 3, requests=[{}])


def test_rest_takes_what_is_given_and_names_what_is_wrong(version: ServedVersion) -> None:
    def parsed(**document: Any) -> dict[str, np.ndarray]:
        body = json.dumps({"signature_name": "embed_user", **document}).encode()
        return rest.parse_predict(body, version.signatures).inputs

    def problem(**document: Any) -> str:
        with pytest.raises(HTTPException) as caught:
            parsed(**document)
        assert caught.value.status_code == 400
        return str(caught.value.detail)

    columns = parsed(inputs={"user_id": [100, 101], "Gender_": ["ios", ""], "hour": ["7", "8"]})
    rows = parsed(
        instances=[
            {"user_id": 100, "Gender_": "ios", "hour": "7"},
            {"user_id": 101, "hour": "8"},
        ]
    )
    names = ["user_id", "Gender_", "hour", "free_space", "words", "place", "timestamp"]
    assert set(columns) == set(rows) == set(names)
    for name in names:
        np.testing.assert_array_equal(columns[name], rows[name], name)
    assert np.isnan(columns["place"]).all()
    assert columns["place"].shape == (2, 2)
    assert "Unknown input 'Gendr'; the signature has" in problem(
        inputs={"user_id": [100], "Gendr": ["ios"]}
    )
    assert "inputs.hour.0: " in problem(inputs={"user_id": [100], "hour": [8]})
    assert "inputs.free_space.0: " in problem(inputs={"user_id": [100], "free_space": ["much"]})
    assert "as many queries" in problem(inputs={"user_id": [100, 101], "hour": ["8"]})
    assert "Missing named input" in problem(inputs={"hour": ["8"]})


def test_the_client_the_page_and_the_command_line_send_requests(
    served: Served,
    folder: Path,
    version: ServedVersion,
    model: LoadedRetriever,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = ServedRetriever(address_of(folder.parent))
    # By the names of the inputs.
    inputs = {"Gender": "Gender_", "free space": "free_space"}
    asked = [
        {**query, "request": {inputs.get(n, n): x for n, x in query["request"].items()}}
        for query in queries_of(served)
    ]
    expected = model.retrieve(queries_of(served), K)
    for got, want in zip(client.retrieve(asked, K), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    with pytest.raises(ValueError, match="no request feature 'Gender'; did you mean 'Gender_'"):
        client.retrieve(queries_of(served)[:1], K)
    # Each form that a value may have in Python is read as there.
    forms: list[dict[str, Any]] = [
        {"words": "a", "place": np.array([0.5, 1.0])},
        {"Gender": float("nan"), "words": ["a", None, float("nan")], "free space": None},
        {"Gender": np.str_("ios"), "words": np.array(["c", "a"]), "free space": np.float32(2)},
    ]
    by_input = [{"request": {inputs.get(n, n): x for n, x in form.items()}} for form in forms]
    want = model.retrieve([{"request": form} for form in forms], K)[1]
    np.testing.assert_allclose(client.retrieve(by_input, K)[1], want, atol=1e-5)
    with pytest.raises(ValueError, match="'timestamp' must hold datetimes with a time zone"):
        client.retrieve([{"request": {"timestamp": datetime(2024, 5, 1)}}], K)
    typed = {"Gender": "ios", "timestamp": "2024-05-01T07:30Z", "free space": "2", "words": "a,c"}
    request = {"Gender": "ios", "hour": 7, "free space": 2.0, "words": ["a", "c"]}
    known = served.known(2)
    want = model.retrieve([{"history": known, "request": request}], K, [known])[0][0].tolist()
    body = json.dumps({"items": known, "k": K, "request": typed}).encode()
    answer = page.answer(version, body, ServeSettings())
    assert [item["item_id"] for item in answer["index"]["items"]] == want
    assert page.card(version)["request"] == [*(f.name for f in FEATURES), "timestamp"]
    monkeypatch.setattr(retriever, "load", lambda *arguments, **options: model)
    for flags, found in (
        (["--request", *(f"{n}={x}" for n, x in typed.items())], want),
        (["--request", "place=north"], None),
    ):
        monkeypatch.setattr(sys, "stdout", out := io.StringIO())
        monkeypatch.setattr(sys, "stderr", err := io.StringIO())
        history = ["--history", *map(str, known)]
        code = cli.main(["query", str(folder), *history, "-k", str(K), "--json", *flags])
        if found is None:
            assert code
            assert "place is vector. Received: 'north'" in err.getvalue().replace("\n", " ")
        else:
            assert [item["item_id"] for item in json.loads(out.getvalue())["items"]] == found


def test_refreshed_items_and_exports_without_users_take_requests(
    served: Served, folder: Path, model: LoadedRetriever, tmp_path: Path
) -> None:
    held_out = model.held_out_queries()
    for query, request in zip(held_out, [q["request"] for q in queries_of(served)], strict=True):
        kept = {n: x for n, x in query["request"].items() if x is not None}
        assert kept == {n: str(x) if n in ("Gender", "hour") else x for n, x in request.items()}
    embeddings = model.embed_queries(held_out)
    np.testing.assert_allclose(embeddings, model.embed_queries(queries_of(served)), atol=1e-6)
    # As an index is tuned.
    sides = {"query": served.query_features, "request": FEATURES}
    by_encoder = embed_queries(Encoder(served), queries_of(served), sides)
    np.testing.assert_allclose(embeddings, by_encoder, atol=1e-6)
    items = {"item_id": served.candidate_ids[:40].tolist(), "genres": served.genres[:40]}
    pq.write_table(pa.table(items), tmp_path / "items.parquet")
    after = load(refresh_index(folder, tmp_path / "items.parquet").folder, exact=True)
    np.testing.assert_allclose(after.embed_queries(held_out), embeddings, atol=1e-6)
    anonymous = make_served("int", use_user_id=False, request_features=FEATURES)
    nobody = load(export(anonymous, tmp_path / "nobody", index=Exact(), user_data=False))
    want = scores_of(anonymous, [{**q, "features": None} for q in queries_of(served)])
    np.testing.assert_allclose(nobody.retrieve(queries_of(served), K)[1], want, atol=1e-5)
