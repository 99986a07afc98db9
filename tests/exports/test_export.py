"""The exported graph against a loop; publishing a version."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.service.conftest import KIND_OF, NUM_CANDIDATES, Exported, Served, make_served
from tfrs_pipeline.answers.proof import ExportError
from tfrs_pipeline.answers.retriever import LoadedRetriever, load
from tfrs_pipeline.durable import StorageError
from tfrs_pipeline.exports import export as export_module
from tfrs_pipeline.exports.export import export
from tfrs_pipeline.exports.saved_model import RetrievalModule
from tfrs_pipeline.search.queries import padded_ids
from tfrs_pipeline.search.settings import Exact, Scann


@pytest.fixture(scope="module")
def module(served: Served) -> RetrievalModule:
    return served.module(KIND_OF[served.ids])


@pytest.fixture(scope="module")
def short() -> RetrievalModule:
    """Returns a module that searches one leaf of eight; its short results must never show."""
    return make_served("int").module("scann", num_leaves_to_search=1)


def empty_of(served: Served) -> Any:
    return -1 if served.ids == "int" else ""


def as_ids(served: Served, lists: list[list[Any]]) -> tf.Tensor:
    dtype = tf.int64 if served.ids == "int" else tf.string
    width = max(map(len, lists))
    rows = [[*ids, *[empty_of(served)] * (width - len(ids))] for ids in lists]
    return tf.reshape(tf.constant(rows, dtype), [len(lists), width])


def as_users(served: Served, ids: list[Any]) -> tf.Tensor:
    return tf.constant(ids, tf.int64 if served.ids == "int" else tf.string)


def decoded(ids: tf.Tensor) -> list[list[Any]]:
    return [[i.decode() if isinstance(i, bytes) else i for i in row] for row in ids.numpy()]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_exclusions_padding_and_k_match_a_loop(
    served: Served, module: RetrievalModule, short: RetrievalModule, data: st.DataObject
) -> None:
    is_short = served.ids == "int" and data.draw(st.booleans())
    k = data.draw(st.integers(1, NUM_CANDIDATES + 5))
    unknown = 2 if served.ids == "int" else "unknown"
    some_ids = st.lists(st.sampled_from([*served.candidate_ids.tolist(), unknown]), max_size=70)
    excluded = data.draw(st.lists(some_ids, min_size=1, max_size=3))
    histories = [data.draw(some_ids) for _ in excluded]
    users = served.query_ids[: len(excluded)].tolist()
    asked = as_users(served, users), as_ids(served, histories), as_ids(served, excluded)
    answer = (short if is_short else module).retrieve(*asked, k)
    pairs = zip(users, histories, strict=True)
    queries = [{"user_id": user, "history": history} for user, history in pairs]
    ids, scores = served.in_memory.retrieve(queries, NUM_CANDIDATES)
    for i, left_out in enumerate(excluded):
        pairs = zip(ids[i].tolist(), scores[i], strict=True)
        best = [(id_, score) for id_, score in pairs if id_ not in left_out][:k]
        got_ids, got_scores = decoded(answer["candidate_ids"])[i], answer["scores"][i].numpy()
        assert len(got_ids) == k
        if not is_short:
            assert got_ids[: len(best)] == [id_ for id_, _ in best]
            # Products of vectors of length 1 and 8 entries: 8 roundings of 2^-24, and as many in
            # each vector.
            scores_of = [score for _, score in best]
            np.testing.assert_allclose(got_scores[: len(best)], scores_of, 0, 24 * 2**-24)
        # However few leaves are searched: full lists, nothing excluded, nothing invented.
        assert len(set(got_ids[: len(best)])) == len(best)
        assert not set(got_ids[: len(best)]) & {*left_out, empty_of(served)}
        assert got_ids[len(best) :] == [empty_of(served)] * (k - len(best))
        assert np.isneginf(got_scores[len(best) :]).all()


def test_refuses_a_k_below_one(served: Served, module: RetrievalModule) -> None:
    user = as_users(served, served.query_ids[:1].tolist())
    with pytest.raises(tf.errors.InvalidArgumentError, match="k must be 1 or more"):
        module.retrieve_user(user, as_ids(served, [[]]), 0)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_filters_match_a_loop(served: Served, loaded: LoadedRetriever, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, NUM_CANDIDATES + 5))
    ids = served.candidate_ids.tolist()
    some_ids = st.lists(st.sampled_from(ids), max_size=70)
    some_genres = st.lists(st.sampled_from([*"abc", "unheard", ""]), max_size=4)
    allowed = data.draw(st.lists(some_genres, min_size=1, max_size=3))
    excluded = [data.draw(some_ids) for _ in allowed]
    users = served.query_ids[: len(allowed)].tolist()
    width = max(map(len, allowed))
    inputs: dict[str, Any] = {
        "user_id": served.query_ids[: len(users)],
        "history": padded_ids([[]] * len(users), served.ids == "str"),
        "exclude": padded_ids(excluded, served.ids == "str"),
        "allowed": np.array(
            [[*of_query, *[""] * width][:width] for of_query in allowed], object
        ).reshape(len(allowed), width),
        "gender": np.array(served.genders[: len(users)], object),
        "k": np.int32(k),
    }
    # Giving the stored features is the same as giving none.
    for name in ("retrieve_filtered", "retrieve_user_filtered", "retrieve_with_features_filtered"):
        answer = loaded.engine.answer(name, inputs)
        by_user = name == "retrieve_user_filtered"
        histories = [served.known(i + 1) if by_user else [] for i in range(len(users))]
        pairs = zip(users, histories, strict=True)
        queries = [{"user_id": user, "history": history} for user, history in pairs]
        ranked, _ = served.in_memory.retrieve(queries, NUM_CANDIDATES)
        for i, history in enumerate(histories):
            left_out = {*excluded[i], *history}
            chosen = set(allowed[i]) - {""}
            left = [id_ for id_ in ranked[i].tolist() if id_ not in left_out]
            if chosen:
                left = [id_ for id_ in left if chosen & set(served.genres[ids.index(id_)])]
            best = left[:k]
            found = answer["candidate_ids"][i].tolist()
            assert found == best + [empty_of(served)] * (k - len(best))
            assert np.isneginf(answer["scores"][i][len(best) :]).all()


@pytest.mark.usefixtures("trusted_exports", "few_signatures")
def test_filters_take_booleans_however_written(tmp_path: Path) -> None:
    served = make_served("int")
    is_even = [id_ % 2 == 0 for id_ in served.candidate_ids.tolist()]
    told = dataclasses.replace(served, genres=[[str(x)] for x in is_even])
    loaded = load(export(told.exportable(), tmp_path / "films", index=Exact(), filter_by="genres"))
    assert loaded.item_filter == {"name": "genres", "values": ["false", "true"]}
    even = {id_ for id_ in served.candidate_ids.tolist() if id_ % 2 == 0}
    for value in (True, "True", "TRUE", "true"):  # Also as text, as clients send it.
        ids, _ = loaded.retrieve([{}], len(even), allowed=[[value]])  # type: ignore[list-item]
        assert set(ids[0].tolist()) == even


@pytest.mark.usefixtures("few_signatures")
@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("/films/.partial-1/saved_model.pb.tmp2; No space left on device", "No space left on dev"),
        ("OOM when allocating tensor", "OOM when allocating"),  # Of memory.
    ],
)
def test_a_full_disk_is_told_by_the_folder_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str, told: str
) -> None:
    """TensorFlow names a temporary file."""

    def fill_the_disk(*_: Any) -> None:
        raise tf.errors.ResourceExhaustedError(None, None, message)

    monkeypatch.setattr(export_module.tf.saved_model, "save", fill_the_disk)
    with pytest.raises(StorageError, match=f"^{tmp_path}/films: {told}"):
        export(make_served("int").exportable(), tmp_path / "films", index=Exact())
    assert not [*(tmp_path / "films").glob(".partial*")]


@pytest.mark.usefixtures("trusted_exports", "few_signatures")
def test_an_export_logs_nothing_in_a_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Python is interactive, TensorFlow would log each SavedModel's folder."""
    logger, logged = logging.getLogger("tensorflow"), list[str]()
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: logged.append(record.getMessage()))
    monkeypatch.setattr(logger, "handlers", [handler])
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        export(make_served("int").exportable(), tmp_path / "films", index=Exact())
        logger.info("something else")
    finally:
        logger.setLevel(level)
    assert logged == ["something else"]


@pytest.mark.slow
def test_what_a_fresh_process_answers_is_published(exported: Exported, tmp_path: Path) -> None:
    served = make_served("str")
    shutil.copytree(exported("str", "exact"), tmp_path / "films")
    folder = export(
        served.exportable(),
        tmp_path / "films",
        index=Scann(recall=0.9),
        filter_by="genres",
        queries=served.queries(),
        keep_versions=1,
    )
    assert folder == tmp_path / "films" / "2"
    assert {path.name for path in (tmp_path / "films").iterdir()} == {"2"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["versions"]["tensorflow"] == tf.__version__
    expected_ids, _ = served.in_memory.retrieve(served.queries(), 15)
    assert load(tmp_path / "films").folder.name == "2"
    found, _ = load(folder, exact=True).retrieve(served.queries(), 15)
    assert found.tolist() == expected_ids.tolist()
    # The index in ScaNN's own files is that of ScaNN's operation, and of the server.
    assert sorted(path.name for path in (folder / "scann").iterdir()) == ["1"]
    assert (folder / "index" / "scann_config.pb").is_file()


@pytest.mark.slow
def test_a_wrong_export_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_another_model(module: RetrievalModule, *args: Any, **kwargs: Any) -> None:
        bias = next(v for v in module.encoder.variables if "bias" in v.name)
        before = bias.numpy()
        bias.assign_add(np.linspace(-3, 3, len(before)).astype(np.float32))
        saved(module, *args, **kwargs)
        bias.assign(before)

    saved = tf.saved_model.save
    monkeypatch.setattr(export_module.tf.saved_model, "save", save_another_model)
    with pytest.raises(ExportError, match="differ"):
        export(make_served("int").exportable(), tmp_path / "films", index=Exact())
    assert list((tmp_path / "films").iterdir()) == []
