"""The exported graph against a loop, in memory and reloaded; the act of publishing."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serving.conftest import NUM_CANDIDATES, NUM_QUERIES, Served
from tfrs_pipeline.serving import export
from tfrs_pipeline.serving.export import ExportError, RetrievalModule, versions_of, write_export
from tfrs_pipeline.serving.retriever import load_retriever

KINDS = ("exact", "scann")


@pytest.fixture(scope="module")
def modules(served: Served) -> dict[str, RetrievalModule]:
    # One leaf of eight searched: results run short, as they must never show.
    return {
        "exact": served.module("exact"),
        "scann": served.module("scann"),
        "scann, one leaf": served.module("scann", num_leaves_to_search=1),
    }


def empty_of(served: Served) -> Any:
    return -1 if served.candidate_ids.dtype == np.int64 else ""


def as_ids(served: Served, lists: list[list[Any]]) -> tf.Tensor:
    dtype = tf.int64 if served.candidate_ids.dtype == np.int64 else tf.string
    width = max(map(len, lists))
    rows = [[*ids, *[empty_of(served)] * (width - len(ids))] for ids in lists]
    return tf.reshape(tf.constant(rows, dtype), [len(lists), width])


def as_users(served: Served, ids: list[Any]) -> tf.Tensor:
    return tf.constant(ids, tf.int64 if served.query_ids.dtype == np.int64 else tf.string)


def decoded(ids: tf.Tensor) -> list[list[Any]]:
    return [[i.decode() if isinstance(i, bytes) else i for i in row] for row in ids.numpy()]


def test_retrieve_user_is_the_model_without_what_the_user_knows(
    served: Served, modules: dict[str, RetrievalModule]
) -> None:
    queries = [
        {"user_id": user, "history": served.known(row)}
        for row, user in enumerate(served.query_ids.tolist(), 1)
    ]
    known = [served.known(row) for row in range(1, NUM_QUERIES + 1)]
    expected_ids, expected_scores = served.in_memory.retrieve(queries, 12, exclude=known)
    for name in ("exact", "scann"):
        answer = modules[name].retrieve_user(
            as_users(served, served.query_ids.tolist()), as_ids(served, [[]] * NUM_QUERIES), 12
        )
        assert decoded(answer["candidate_ids"]) == expected_ids.tolist()
        np.testing.assert_allclose(answer["scores"], expected_scores, rtol=1e-4)
        assert answer["is_known_user"].numpy().all()


def test_an_unknown_user_gets_the_answer_for_an_empty_history(
    served: Served, modules: dict[str, RetrievalModule]
) -> None:
    stranger = 999 if served.query_ids.dtype == np.int64 else "stranger"
    expected, _ = served.in_memory.retrieve([{"history": []}], 5)
    answer = modules["exact"].retrieve_user(as_users(served, [stranger]), as_ids(served, [[]]), 5)
    assert decoded(answer["candidate_ids"]) == expected.tolist()
    assert not answer["is_known_user"].numpy()[0]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_exclusions_padding_and_k_match_a_loop(
    served: Served, modules: dict[str, RetrievalModule], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(modules)))
    k = data.draw(st.integers(1, NUM_CANDIDATES + 5))
    unknown = 2 if served.candidate_ids.dtype == np.int64 else "unknown"
    some_ids = st.lists(st.sampled_from([*served.candidate_ids.tolist(), unknown]), max_size=70)
    excluded = data.draw(st.lists(some_ids, min_size=1, max_size=3))
    histories = [data.draw(some_ids) for _ in excluded]
    users = served.query_ids[: len(excluded)].tolist()
    answer = modules[name].retrieve(
        as_users(served, users), as_ids(served, histories), as_ids(served, excluded), k
    )
    for i, (user, history, left_out) in enumerate(zip(users, histories, excluded, strict=True)):
        ids, scores = served.in_memory.retrieve(
            [{"user_id": user, "history": history}], NUM_CANDIDATES
        )
        best = [
            (id_, score)
            for id_, score in zip(ids[0].tolist(), scores[0], strict=True)
            if id_ not in left_out
        ][:k]
        got_ids, got_scores = decoded(answer["candidate_ids"])[i], answer["scores"][i].numpy()
        assert len(got_ids) == k
        if name != "scann, one leaf":
            assert got_ids[: len(best)] == [id_ for id_, _ in best]
            np.testing.assert_allclose(got_scores[: len(best)], [s for _, s in best], rtol=1e-4)
        # However few leaves are searched: full lists, nothing excluded, no phantom.
        assert len(set(got_ids[: len(best)])) == len(best)
        assert not set(got_ids[: len(best)]) & {*left_out, empty_of(served)}
        assert got_ids[len(best) :] == [empty_of(served)] * (k - len(best))
        assert np.isneginf(got_scores[len(best) :]).all()


def test_refuses_a_k_below_one(served: Served, modules: dict[str, RetrievalModule]) -> None:
    user = as_users(served, served.query_ids[:1].tolist())
    with pytest.raises(tf.errors.InvalidArgumentError, match="k must be 1 or more"):
        modules["exact"].retrieve_user(user, as_ids(served, [[]]), 0)


def publish(served: Served, directory: Path, kind: str) -> Path:
    titles = [f"title of {id_}" for id_ in served.candidate_ids.tolist()]
    return write_export(
        directory,
        "films",
        module=served.module(kind),
        twin=served.module("exact") if kind == "scann" else None,
        manifest={"index": {"kind": kind}, "counts": {"num_samples": 3}},
        items=pa.table({"item_id": served.candidate_ids.tolist(), "title": titles}),
        probe_users=served.query_ids.tolist(),
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_published_model_answers_as_the_one_in_memory(
    served: Served, tmp_path: Path, kind: str
) -> None:
    folder = publish(served, tmp_path, kind)
    assert folder == tmp_path / "films" / "1"
    assert {path.name for path in (tmp_path / "films").iterdir()} == {"1"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counts"] == {"num_samples": 3}
    assert manifest["versions"]["tensorflow"] == tf.__version__
    queries = [
        {"user_id": served.query_ids[2], "history": served.known(3)},
        {"history": served.known(5)},
        {"user_id": served.query_ids[0]},
        {},
    ]
    exclude = [served.candidate_ids[:20].tolist(), [], served.known(4), []]
    expected_ids, expected_scores = served.in_memory.retrieve(queries, 15, exclude)
    for exact in (False, True):
        loaded = load_retriever(tmp_path / "films", exact=exact)
        ids, scores = loaded.retrieve(queries, 15, exclude)
        assert ids.tolist() == expected_ids.tolist()
        np.testing.assert_allclose(scores, expected_scores, rtol=1e-4)
    assert loaded.titles()[served.candidate_ids[1]] == f"title of {served.candidate_ids[1]}"
    assert publish(served, tmp_path, "exact").name == "2"
    assert load_retriever(tmp_path / "films").folder.name == "2"


@pytest.mark.slow
def test_an_export_that_answers_otherwise_is_not_published(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_another_model(module: RetrievalModule, *args: Any, **kwargs: Any) -> None:
        bias = next(v for v in module._query_variables if "bias" in v.name)
        before = bias.numpy()
        bias.assign_add(np.linspace(-3, 3, len(before)).astype(np.float32))
        saved(module, *args, **kwargs)
        bias.assign(before)

    saved = tf.saved_model.save
    monkeypatch.setattr(export.tf.saved_model, "save", save_another_model)
    with pytest.raises(ExportError, match="differ"):
        publish(served, tmp_path, "exact")
    assert list((tmp_path / "films").iterdir()) == []


def make_partial(parent: Path, payload: str) -> Path:
    partial = parent / f".partial-{payload}"
    partial.mkdir(parents=True)
    (partial / "manifest.json").write_text(payload)
    return partial


def test_versions_count_up_and_ignore_what_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "notes").mkdir()
    assert versions_of(tmp_path) == []
    assert versions_of(tmp_path / "nowhere") == []
    put = [export._put_in_place(make_partial(tmp_path, name), tmp_path) for name in "abc"]
    assert [path.name for path in put] == ["1", "2", "3"]
    shutil.rmtree(tmp_path / "1")
    assert versions_of(tmp_path) == [2, 3]


def test_exports_at_once_do_not_mix(tmp_path: Path) -> None:
    partials = [make_partial(tmp_path, f"payload-{i}") for i in range(20)]
    start = threading.Barrier(len(partials))

    def put(partial: Path) -> None:
        start.wait()
        export._put_in_place(partial, tmp_path)

    threads = [threading.Thread(target=put, args=[partial]) for partial in partials]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert versions_of(tmp_path) == list(range(1, 21))
    payloads = {(tmp_path / str(v) / "manifest.json").read_text() for v in versions_of(tmp_path)}
    assert payloads == {f"payload-{i}" for i in range(20)}


def test_a_missing_model_is_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No exported model at .*manifest.json"):
        load_retriever(tmp_path)
