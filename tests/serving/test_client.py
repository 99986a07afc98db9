"""The client beside the model in memory; what a server refuses."""

import socket
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from tests.serving.conftest import Exported, Served
from tests.serving.running_server import address_of
from tfrs_pipeline.serving.client import LIMITS, ServedRetriever


@pytest.fixture(scope="module")
def url(served: Served, exported: Exported) -> str:
    return address_of(exported(served.ids, "exact"))


def test_answers_as_the_model_in_memory_beyond_a_block(served: Served, url: str) -> None:
    rng = np.random.default_rng(0)
    users = [*served.query_ids.tolist(), None, 10**30 if served.ids == "int" else "stranger"]
    queries = [
        {
            "user_id": users[i % len(users)],
            "history": rng.choice(served.candidate_ids, i % 6).tolist(),
        }
        for i in range(LIMITS.max_queries + 7)
    ]
    exclude = [rng.choice(served.candidate_ids, i % 9) for i in range(len(queries))]
    ids, scores = ServedRetriever(url).retrieve(queries, 11, exclude)
    known = [q if q["user_id"] in served.query_ids else {"history": q["history"]} for q in queries]
    expected_ids, expected_scores = served.in_memory.retrieve(known, 11, exclude)
    assert ids.dtype == expected_ids.dtype
    assert ids.tolist() == expected_ids.tolist()
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-4)


def test_a_filter_goes_with_each_query(served: Served, url: str) -> None:
    retriever = ServedRetriever(url)
    num_queries = LIMITS.max_queries + 3
    allowed = [[["b"], ["a", "c"], [], ["unheard"]][i % 4] for i in range(num_queries)]
    queries = [{"history": served.known(1 + i % 5)} for i in range(num_queries)]
    k = len(served.candidate_ids)
    everything, _ = retriever.retrieve(queries, k)
    ids, scores = retriever.retrieve(queries, k, allowed=allowed)
    genres = dict(zip(served.candidate_ids.tolist(), served.genres, strict=True))
    for i, values in enumerate(allowed):
        chosen = [
            id_ for id_ in everything[i].tolist() if not values or set(values) & set(genres[id_])
        ]
        assert ids[i, : len(chosen)].tolist() == chosen
        assert np.isneginf(scores[i, len(chosen) :]).all()
    with pytest.raises(ValueError, match=r"allowed .*'b'; did you mean \['b'\]"):
        retriever.retrieve([{}], 3, allowed=["b"])
    wrong: list[Any] = [1999, None, ""]
    for value in wrong:  # Sent as no value, it would allow every item.
        with pytest.raises(ValueError, match="are texts, and not empty"):
            retriever.retrieve([{}, {}], 3, allowed=[["b"], [value]])


def test_long_queries_are_sent_within_the_limits_of_a_request(
    served: Served, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    ask = ServedRetriever._ask

    def counting(retriever: ServedRetriever, path: str, body: bytes | None = None) -> Any:
        lengths.append(len(body or b""))
        return ask(retriever, path, body)

    monkeypatch.setattr(ServedRetriever, "_ask", counting)
    rng = np.random.default_rng(0)
    nobody = list(range(10**9, 10**9 + 900)) if served.ids == "int" else ["an unknown item"] * 900
    queries, exclude = [], []
    for i in range(50):
        history = rng.choice(served.candidate_ids, 3 * LIMITS.max_history if i == 7 else 5)
        queries.append({"history": history.tolist()})
        exclude.append([*nobody, *rng.choice(served.candidate_ids, i % 9)])
    allowed = [[["b"], []][i % 2] for i in range(50)]
    retriever = ServedRetriever(url)
    ids, scores = retriever.retrieve(queries, 11, exclude, allowed=allowed)
    assert len(lengths) > 3
    assert max(lengths) <= LIMITS.max_body_bytes
    expected_ids, expected_scores = served.in_memory.retrieve(queries, 11, exclude)
    is_any = np.array([not values for values in allowed])
    assert ids[is_any].tolist() == expected_ids[is_any].tolist()
    np.testing.assert_allclose(scores[is_any], expected_scores[is_any], rtol=1e-4)
    for i in np.flatnonzero(~is_any)[:3].tolist():
        (alone,), _ = retriever.retrieve(
            queries[i : i + 1], 11, exclude[i : i + 1], allowed=[["b"]]
        )
        assert ids[i].tolist() == alone.tolist()
    with pytest.raises(ValueError, match=r"400 .*exclude.0: .* at most 2000 items"):
        retriever.retrieve([{}], 3, [[*nobody, *nobody, *nobody]])
    long = [10**18 + i for i in range(20_000)] if served.ids == "int" else ["an item" * 30_000]
    with pytest.raises(ValueError, match=r"413 .*--max-body-bytes"):
        retriever.retrieve([{}], 3, [long])


def test_times_that_the_model_does_not_read_change_nothing(served: Served, url: str) -> None:
    query = {"history": served.known(3)}
    now = datetime(2024, 5, 1, tzinfo=UTC)
    timed = {**query, "history_timestamps": [now] * 4, "request": {"timestamp": now}}
    scores = ServedRetriever(url).retrieve([timed, query], 5)[1]
    np.testing.assert_array_equal(scores[0], scores[1])


def test_a_refusal_is_the_servers_own_words(served: Served, url: str) -> None:
    retriever = ServedRetriever(url + "/")
    with pytest.raises(ValueError, match=r"400 .*inputs.k: .* equal to 2000. Received: 5000"):
        retriever.retrieve([{}], 5000)
    with pytest.raises(ValueError, match=r"404 .*This server serves 'films'"):
        ServedRetriever(url.replace("films", "songs"))


def test_a_server_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(OSError, match="refused"):
        ServedRetriever(f"http://127.0.0.1:{port}/v1/models/films")
