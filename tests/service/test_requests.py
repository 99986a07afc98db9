"""Request features and times in service, against the model in memory."""

import itertools
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.exceptions import HTTPException

from tests.exports.saved import ask_saved_model
from tests.service.conftest import NUM_QUERIES, Served, make_served
from tfrs_pipeline import Exact, LoadedRetriever, export, load
from tfrs_pipeline.answers import version as version_module
from tfrs_pipeline.exports import export as export_module
from tfrs_pipeline.features.categorical import Categorical, MultiCategorical
from tfrs_pipeline.features.numeric import Numeric, Timestamp, Vector
from tfrs_pipeline.model.tf_tables import tower_of
from tfrs_pipeline.run.refresh import refresh_index
from tfrs_pipeline.service import page, rest
from tfrs_pipeline.service.server import explained
from tfrs_pipeline.service.settings import ServeSettings
from tfrs_pipeline.service.versions import ServedVersion

pytestmark = pytest.mark.usefixtures("trusted_exports")
PROVE = version_module.prove
FEATURES = (
    # Its input would have the same name as that of the user feature "gender".
    Categorical.fit("Gender", ["ios", "web"]),
    Categorical("hour", tuple(map(str, range(24))), is_from_timestamp=True),
    Numeric.fit("free space", [1.0, 4.0]),
    MultiCategorical.fit("words", [["a", "b"], ["c"]]),
    Vector.fit("place", [[1.0, 0.0], [0.0, 2.0]]),
)
TIME = datetime(2024, 5, 1, 7, 30, tzinfo=UTC)
# Complete, partial, with unknown values, by its time, missing.
REQUESTS: list[dict[str, Any]] = [
    {"Gender": "ios", "hour": 7, "free space": 2.0, "words": ["a", "c"], "place": [0.5, 1.0]},
    {"Gender": "web"},
    {"Gender": "fridge", "words": ["x", "b"], "hour": "late"},
    {"timestamp": TIME, "free space": -3.0},
    {},
]
# A request as typed, and as read.
TYPED = {"Gender": "ios", "timestamp": "2024-05-01T07:30Z", "free space": "2", "words": "a,c"}
READ = {"Gender": "ios", "timestamp": TIME, "free space": 2.0, "words": ["a", "c"]}
K = 9


@pytest.fixture(scope="module")
def served() -> Served:
    return make_served("int", use_user_id=False, request_features=FEATURES, reads_times=True)


@pytest.fixture(scope="module")
def folder(served: Served, module_path: Path, trusted_exports: None) -> Path:
    folder = module_path / "films"
    return export(served.exportable(), folder, index=Exact(), queries=stored_queries(served))


@pytest.fixture(scope="module")
def version(folder: Path) -> ServedVersion:
    return ServedVersion(folder, ServeSettings())


@pytest.fixture(scope="module")
def model(version: ServedVersion) -> LoadedRetriever:
    return version.retriever


def times_of(served: Served, row: int) -> list[datetime]:
    """Returns the times of a user's items, oldest first."""
    assert served.history_times is not None
    of_user = slice(*served.exportable().histories.offsets[row : row + 2])
    seconds = served.history_times[of_user][::-1]
    return [datetime.fromtimestamp(time, UTC) for time in seconds.tolist()]


def query_of(served: Served, row: int, **more: Any) -> dict[str, Any]:
    return {"history": served.known(row), "history_timestamps": times_of(served, row), **more}


def user_queries(served: Served, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    pairs = zip(served.query_ids.tolist(), itertools.cycle(requests))
    return [query_of(served, i, user_id=u, request=r) for i, (u, r) in enumerate(pairs, 1)]


def stored_queries(served: Served) -> list[dict[str, Any]]:
    """Makes a query from what is stored about each user, with a request."""
    pairs = zip(export_module.stored_queries(served.exportable()), itertools.cycle(REQUESTS))
    return [{**query, "request": request} for query, request in pairs]


def requests_of(served: Served) -> list[dict[str, Any]]:
    """Combines each request with two histories."""
    return [{"history": served.known(row), "request": x} for x in REQUESTS for row in (2, 4)]


def timed_queries(served: Served) -> list[dict[str, Any]]:
    """Makes queries with all times, some, the items' alone, the request's alone, and none."""
    times, known = times_of(served, 5), served.known(5)
    now, unknown = {"request": {"timestamp": TIME, "hour": 7}}, {"request": {"hour": 7}}
    return [
        query_of(served, 5, **now),
        query_of(served, 5, request={"timestamp": TIME - timedelta(hours=20), "hour": 7}),
        {**query_of(served, 5, **now), "history_timestamps": [*times[:-3], None, *times[-2:]]},
        query_of(served, 5, **unknown),
        {"history": known, **now},
        {"history": known, **unknown},
        query_of(served, 2, **now),
        {"history": [], "history_timestamps": [], **now},
    ]


@pytest.mark.nightly
def test_a_fresh_process(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version_module, "prove", PROVE)
    queries = stored_queries(served)
    assert export(served.exportable(), tmp_path / "films", index=Exact(), queries=queries).is_dir()


def test_requests_are_answered_as_in_memory(served: Served, model: LoadedRetriever) -> None:
    asked, timed = requests_of(served), timed_queries(served)
    queries = [*asked, *timed]
    ids, scores = served.in_memory.retrieve(queries, K)
    got_ids, got = model.retrieve(queries, K)
    np.testing.assert_allclose(got, scores, atol=1e-5)
    assert got_ids.tolist() == ids.tolist()
    products = model.embed_queries(queries) @ served.model.embed_corpus().T
    np.testing.assert_allclose(-np.sort(-products, axis=1)[:, :K], scores, atol=1e-5)
    # Each part of a request changes the answer, unless it is unknown or missing.
    rounded = np.round(scores, 4)
    assert len(np.unique(rounded[: len(asked) : 2], axis=0)) == len(REQUESTS)
    unknown: list[dict[str, Any]] = [{}, {"Gender": "fridge"}, {"hour": None}]
    alone = [model.retrieve([{**asked[0], "request": x}], K)[1] for x in unknown]
    assert np.ptp(alone, axis=0).max() == 0
    # The time implies the hour, unless that is given.
    hours = [{"timestamp": TIME}, {"hour": 7}, {"timestamp": TIME, "hour": 8}, {"hour": 8}]
    found = model.retrieve([{"history": [], "request": x} for x in hours], K)[1]
    np.testing.assert_allclose(found[[0, 2]], found[[1, 3]], atol=1e-6)
    assert np.abs(found[0] - found[3]).max() > 1e-3
    # Each time changes the answer, unless the history is empty or has no times.
    rounded = rounded[len(asked) :]
    assert len(np.unique(rounded, axis=0)) == len(timed) - 1
    assert rounded[4].tolist() == rounded[5].tolist()
    # Seconds mean the same as a datetime, and unknown items take their times along.
    strange = dict(timed[0])
    strange["history"] = [strange["history"][0], 10**6, *strange["history"][1:]]
    seconds = [time.timestamp() for time in strange["history_timestamps"]]
    strange["history_timestamps"] = np.array([seconds[0], 5.0, *seconds[1:]])
    expected = got[len(asked) : len(asked) + 1]
    np.testing.assert_allclose(model.retrieve([strange], K)[1], expected, atol=1e-5)


def test_users_and_given_features_go_with_requests(served: Served, model: LoadedRetriever) -> None:
    users, num_users = served.query_ids.tolist(), len(served.query_ids)
    known = [served.known(row) for row in range(1, NUM_QUERIES + 1)]
    for request in (REQUESTS[0], {"timestamp": TIME}, {}):
        queries = user_queries(served, [request])
        expected_ids, expected = served.in_memory.retrieve(queries, K, known)
        ids, scores, is_known = model.retrieve_user(users, K, requests=[request] * num_users)
        assert is_known.all()
        np.testing.assert_allclose(scores, expected, atol=1e-5)
        assert ids.tolist() == expected_ids.tolist()
    np.testing.assert_allclose(model.retrieve_user(users, K)[1], expected, atol=1e-5)
    answer = ask_saved_model(model.folder, "serving_default", {"user_id": users}, len(users))
    np.testing.assert_allclose(answer["scores"][:, :K], expected, atol=1e-5)
    # Giving the user's own gender is the same as the stored one.
    queries = user_queries(served, REQUESTS[:1])
    given = zip(queries[:3], served.genders, strict=False)
    mixed = [*({**q, "features": {"gender": g}} for q, g in given), *queries[3:]]
    found, expected = (model.retrieve(x, K)[1] for x in (mixed, queries))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_request_features_not_read_are_ignored(served: Served, model: LoadedRetriever) -> None:
    """A holdout passes all request features of its log."""
    for asked in (served.in_memory, model):
        expected, _ = asked.retrieve([{"request": {"Gender": "ios"}}], K)
        found, _ = asked.retrieve([{"request": {"Gender": "ios", "battery": 3}}], K)
        assert found.tolist() == expected.tolist()
        with pytest.raises(ValueError, match=r"feature 'Gendr'; did you mean 'Gender'\?"):
            asked.retrieve([{"request": {"Gendr": "ios", "battery": 3}}], K)


def test_wrong_requests_and_times_are_refused(model: LoadedRetriever) -> None:
    for query, message in (
        ({"request": {"houre": 3}}, r"no request feature 'houre'; did you mean 'hour'\?"),
        ({"history": [3, 10], "history_timestamps": [TIME]}, "1 times for 2 items"),
        ({"history": [3], "history_timestamps": [datetime(2024, 1, 1)]}, "time zone"),
    ):
        with pytest.raises(ValueError, match=message):
            model.retrieve([query], 3)
    with pytest.raises(ValueError, match=r"'free space' must hold numbers: .*'much'"):
        model.retrieve_user([100], 3, requests=[{"free space": "much"}])
    with pytest.raises(ValueError, match="requests"):
        model.retrieve_user([100, 101], 3, requests=[{}])


def test_rest_reads_inputs(served: Served, version: ServedVersion, model: LoadedRetriever) -> None:
    def parsed(name: str = "embed_user", **document: Any) -> dict[str, np.ndarray]:
        body = json.dumps({"signature_name": name, **document}).encode()
        return rest.parse_predict(body, version.signatures).inputs

    columns = parsed(inputs={"user_id": [100, 101], "Gender_": ["ios", ""], "hour": ["7", "8"]})
    first, second = {"user_id": 100, "Gender_": "ios", "hour": "7"}, {"user_id": 101, "hour": "8"}
    rows = parsed(instances=[first, second])
    names = ["user_id", "Gender_", "hour", "free_space", "words", "place", "timestamp"]
    assert set(columns) == set(rows) == set(names)
    for name in names:
        np.testing.assert_array_equal(columns[name], rows[name], name)
    assert np.isnan(columns["place"]).all()
    assert columns["place"].shape == (2, 2)
    nothing = parsed(inputs={"user_id": [100]})
    nulls = parsed(inputs={"user_id": [100], "Gender_": [None], "free_space": [None]})
    for name in names:
        np.testing.assert_array_equal(nulls[name], nothing[name], name)
    known = served.known(5)
    inputs = {"user_id": [-1], "history": [known], "exclude": [[]], "k": K}
    left_out = parsed("retrieve", inputs=inputs)
    assert left_out["history_timestamps"].shape == (1, 0)
    assert np.isnan(left_out["timestamp"]).all()
    answer = ask_saved_model(model.folder, "retrieve", left_out, 1)
    expected = model.retrieve([{"history": known}], K)[1]
    np.testing.assert_allclose(answer["scores"], expected, atol=1e-5)


@pytest.mark.usefixtures("few_signatures")
def test_rest_tells_times_and_sides_apart_whatever_their_names(tmp_path: Path) -> None:
    since = Timestamp.fit("app since", [TIME])
    likes = Numeric.fit("genres", [1.0, 4.0])  # The items' genres are lists.
    served = make_served("int", use_user_id=False, request_features=(since, likes))
    folder = export(served.exportable(), tmp_path / "films", index=Exact())
    version = ServedVersion(folder, ServeSettings())

    def answer(name: str, **inputs: Any) -> dict[str, np.ndarray]:
        body = json.dumps({"signature_name": name, "inputs": inputs}).encode()
        call = rest.parse_predict(body, version.signatures)
        return version.call(call.signature, call.inputs)

    seconds = TIME.timestamp()
    with pytest.raises(HTTPException, match=r"app_since\.0: takes seconds since 1970; divide"):
        answer("embed_user", user_id=[100], app_since=[1000 * seconds])
    assert len(answer("embed_user", user_id=[100], app_since=[seconds], genres=[4.0])) == 4
    asked = [{"history": served.known(4), "request": {"genres": x}} for x in (1.0, 4.0)]
    expected, _ = served.in_memory.retrieve(asked, K)
    assert version.retriever.retrieve(asked, K)[0].tolist() == expected.tolist()
    with pytest.raises(HTTPException, match="genres: Missing named input"):
        answer("embed_candidate", item_id=[3])
    assert answer("embed_candidate", item_id=[3], genres=[["a", "b"]])["is_known_item"].all()


def test_the_page_asks(served: Served, version: ServedVersion, model: LoadedRetriever) -> None:
    query = query_of(served, 3, request=READ)
    history = query["history"]

    def best(query: dict[str, Any]) -> list[int]:
        return list(model.retrieve([query], K, [history])[0][0].tolist())

    body = json.dumps({"items": history, "k": K, "request": TYPED}).encode()
    answer = page.answer(version, body)
    shown = [item["item_id"] for item in answer["index"]["items"]]
    assert shown == best({"history": history, "request": READ}) != best(query)
    # The reasons are those of this request, times and lists included.
    call = json.dumps(json.loads(answer["explain"]["body"]) | {"item_id": shown[2]}).encode()
    why = explained(version, call, ServeSettings())
    assert (why["verdict"], why["rank"]) == ("found", 3)
    fields = page.card(version)["request"]
    assert [x["name"] for x in fields] == [*(f.name for f in FEATURES), "timestamp"]
    assert [x["example"] for x in fields[:-1]] == [f.example for f in FEATURES]


@pytest.mark.nightly
def test_refreshed_items_and_exports_without_users_take_requests(
    served: Served, folder: Path, model: LoadedRetriever, tmp_path: Path
) -> None:
    asked = user_queries(served, REQUESTS)
    held_out = model.held_out_queries()
    for query, want in zip(held_out, asked, strict=True):
        assert (query["user_id"], query["history"]) == (want["user_id"], want["history"])
        kept = {n: x for n, x in query["request"].items() if x is not None}
        given = want["request"].items()
        assert kept == {n: str(x) if n in ("Gender", "hour") else x for n, x in given}
    embeddings = model.embed_queries(held_out)
    np.testing.assert_allclose(embeddings, model.embed_queries(asked), atol=1e-6)
    # The tuning of an index embeds queries in this way.
    exportable = served.exportable()
    tower = tower_of(exportable.embed_queries, exportable.inputs.tower_inputs)
    in_memory = exportable.inputs.embed(tower, asked)
    np.testing.assert_allclose(embeddings, in_memory, atol=1e-6)
    items = {"item_id": served.candidate_ids[:40].tolist(), "genres": served.genres[:40]}
    pq.write_table(pa.table(items), tmp_path / "items.parquet")
    after = load(refresh_index(folder, tmp_path / "items.parquet").folder, exact=True)
    np.testing.assert_allclose(after.embed_queries(held_out), embeddings, atol=1e-6)
    nobody = load(export(served.exportable(), tmp_path / "nobody", index=Exact(), user_data=False))
    queries = [*requests_of(served), *timed_queries(served)]
    expected = served.in_memory.retrieve(queries, K)[1]
    np.testing.assert_allclose(nobody.retrieve(queries, K)[1], expected, atol=1e-5)
