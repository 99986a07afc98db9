"""A user's own layers, exported and loaded."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf

import tfrs_pipeline as tp
from tfrs_pipeline.answers.retriever import load
from tfrs_pipeline.model.corpus import Corpus
from tfrs_pipeline.samples.store import RowLists

pytestmark = pytest.mark.usefixtures("trusted_exports", "few_signatures")


class OwnModel(tf.Module):
    """A user's own Keras layers, which take no features or times."""

    def __init__(self) -> None:
        super().__init__()
        self._users = tf.keras.layers.Embedding(4, 4, embeddings_initializer="normal")
        self._videos = tf.keras.layers.Embedding(4, 4, embeddings_initializer="normal")
        self._top = tf.keras.layers.Dense(4)
        self.embed_queries(np.zeros(1, np.int32), np.zeros((1, 3), np.int32))

    def embed_queries(self, query_rows: Any, history_rows: Any) -> tf.Tensor:
        history = tf.reduce_sum(self._videos(history_rows), axis=1)
        return self._top(self._users(query_rows) + history)

    def embed_candidates(self, rows: Any) -> tf.Tensor:
        return self._videos(rows)


def exportable(model: OwnModel | None = None, **changes: Any) -> tp.Exportable:
    model = model or OwnModel()

    def rows(*lists: list[int]) -> RowLists:
        return RowLists.from_lists([np.array(x, int) for x in lists])

    given: dict[str, Any] = {
        "items": pa.table({"item_id": ["a", "b", "c"]}),
        "query_ids": np.array([7, 8, 9]),
        "history_length": 3,
        # Most recent first; 0 is an item that is newer than the training.
        "histories": rows([], [1, 2], [0, 2, 0, 1], [0]),
        "known_positives": rows([], [1, 2], [3], []),
        **changes,
    }
    return tp.Exportable(model.embed_queries, model.embed_candidates, model.variables, **given)


class LookedUp(tf.keras.layers.Layer):
    """Vectors behind lookup tables: two in Keras layers, and one of its own."""

    def __init__(self, corpus: Corpus) -> None:
        super().__init__()
        rows = tf.lookup.KeyValueTensorInitializer(tf.constant([1, 2, 3]), tf.constant([3, 1, 2]))
        self.own = {"rows": tf.lookup.StaticHashTable(rows, default_value=0)}
        self.numbers = [tf.keras.layers.IntegerLookup(vocabulary=[3, 2])]
        self.texts = tf.keras.layers.StringLookup(vocabulary=["1", "3"])
        self.embedding = tf.keras.layers.Embedding(4, 64, "normal")

    def call(self, inputs: Any, training: bool = False) -> tf.Tensor:
        rows = inputs["row"]
        text = tf.strings.as_string(rows)
        by_number = self.numbers[0](tf.cast(rows, tf.int64))
        looked_up = (self.own["rows"][rows], by_number, self.texts(text))
        return tf.add_n([self.embedding(rows) for rows in looked_up])


def test_lookup_tables_of_an_own_tower_are_exported(tmp_path: Path) -> None:
    clicks = pa.table({"user_id": [1, 1, 2, 2, 3], "item_id": [7, 8, 7, 9, 8]})
    training = tp.TrainingSettings(batch_size=4, max_epochs=1)
    plan = tp.TwoTower(candidate_tower=LookedUp, negatives=["uniform:num=3"], training=training)
    model = plan.fit(tp.Log.from_table(clicks))
    queries: list[Any] = [{"history": [7]}, {"history": [9, 8]}]
    ids, scores = model.retrieve(queries, 3)
    loaded = load(tp.export(model, tmp_path / "own", user_data=False))
    found, found_scores = loaded.retrieve(queries, 3)
    np.testing.assert_array_equal(found, ids)
    np.testing.assert_allclose(found_scores, scores, rtol=1e-5)
    embedded, _ = loaded.embed_candidates([7, 8, 9], {})
    np.testing.assert_allclose(embedded, model.network.embed_corpus(), rtol=1e-6)


def test_refuses_another_index_and_models_that_embed_nothing(tmp_path: Path) -> None:
    for index in ["exact", tp.Exact]:
        with pytest.raises(TypeError, match=r"index must be tp.Exact\(\), .*Received: .*xact"):
            tp.export(exportable(), tmp_path / "own", index=cast(Any, index))
    for no_embeddings in (tp.Ease(), OwnModel()):
        name = type(no_embeddings).__name__
        with pytest.raises(TypeError, match=rf"or a tp\.Exportable of .* Received: .*{name}"):
            tp.export(cast(Any, no_embeddings), tmp_path / "own")


def test_two_functions_and_the_items_are_enough(tmp_path: Path) -> None:
    model = OwnModel()
    items = pa.table({"item_id": [30, 10, 20], "genre": ["a", "b", "a"]})
    least = tp.Exportable(model.embed_queries, model.embed_candidates, model.variables, items)
    loaded = load(tp.export(least, tmp_path / "own", filter_by="genre"))
    nobody = model.embed_queries(np.zeros(1, np.int32), np.zeros((1, 0), np.int32))
    scores = (nobody.numpy() @ model.embed_candidates(np.array([1, 2, 3])).numpy().T)[0]
    found, found_scores = loaded.retrieve([{"history": [10]}], 3)
    np.testing.assert_array_equal(found[0], np.array([30, 10, 20])[np.argsort(-scores)])
    np.testing.assert_allclose(found_scores[0], np.sort(scores)[::-1], rtol=1e-5)
    assert set(loaded.retrieve([{}], 2, allowed=[["a"]])[0][0]) == {20, 30}
    # The model knows no users.
    assert loaded.held_out_queries() == []
    ids, _, is_known = loaded.retrieve_user([7], 3)
    assert (ids.tolist(), is_known.tolist()) == (found.tolist(), [False])


def test_own_layers_are_exported_and_loaded(tmp_path: Path) -> None:
    model = OwnModel()
    folder = tp.export(exportable(model), tmp_path / "own")
    rows, history = np.array([1], np.int32), np.array([[1, 2, 0]], np.int32)
    corpus = model.embed_candidates(np.array([1, 2, 3]))
    expected = tf.matmul(model.embed_queries(rows, history), corpus, transpose_b=True).numpy()
    retriever = load(folder)
    # Items that the model does not know are left out of a stored query.
    assert retriever.held_out_queries() == [
        {"user_id": 7, "history": ["b", "a"]},
        {"user_id": 8, "history": ["a", "b"]},
        {"user_id": 9, "history": []},
    ]
    ids, scores, _ = retriever.retrieve_user([7], k=3)
    assert ids.tolist() == [["c", "", ""]]
    np.testing.assert_allclose(scores[0, 0], expected[0, 2], rtol=1e-5)
    ids, scores = retriever.retrieve([{"user_id": 7, "history": ["b", "a"]}], 3)
    assert ids[0].tolist() == ["abc"[i] for i in np.argsort(-expected[0])]


def test_some_of_the_items_are_retrieved_and_all_are_read(tmp_path: Path) -> None:
    own = OwnModel()
    model = exportable(own)
    is_listed = pa.array([False, True, True])
    model = exportable(own, items=model.items.append_column("_listed", is_listed))
    retriever = load(tp.export(model, tmp_path / "own"))
    assert retriever.candidate_ids() == ["b", "c"]
    query = own.embed_queries(np.array([1], np.int32), np.array([[2, 1, 0]], np.int32)).numpy()
    scores = own.embed_candidates(np.array([2, 3])).numpy() @ query[0]
    found, found_scores = retriever.retrieve([{"user_id": 7, "history": ["a", "b"]}], 3)
    assert found[0].tolist() == [*("bc"[i] for i in np.argsort(-scores)), ""]
    np.testing.assert_allclose(found_scores[0, :2], -np.sort(-scores), rtol=1e-5)
    assert retriever.retrieve_user([7], 3)[0].tolist() == [["c", "", ""]]


def test_a_title_is_text_and_how_items_were_read_is_kept(tmp_path: Path) -> None:
    items = pa.table({"item_id": ["a", "b", "c"], "title": [7, None, 9]})
    reading = tp.Reading(item_columns={"item_id": "sku"}, max_bad_share=0.5)
    model = exportable(items=items, reading=reading)
    assert load(tp.export(model, tmp_path / "own")).titles() == {"a": "7", "b": None, "c": "9"}
    (tmp_path / "today.csv").write_text("sku,name\nb,x\n,y\n")
    assert tp.refresh_index(tmp_path / "own", tmp_path / "today.csv").num_items == 1


def test_repeated_ids_lists_of_others_and_unknown_filters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Received: 'genre'; known: item_id"):
        tp.export(exportable(), tmp_path / "own", filter_by="genre")
    assert not (tmp_path / "own").exists()
    with pytest.raises(ValueError, match="1 ids occur more than once, first 'b'"):
        exportable(items=pa.table({"item_id": ["b", "b", "a"]}))
    # Without a list for row 0, each user would have a neighbour's.
    three, users = RowLists.from_lists([np.array([1])] * 3), np.array([7, 8, 7])
    wrong: list[tuple[str, Any, str]] = [
        ("histories", three, "must be 4 lists:.*Received: 3"),
        ("known_positives", three, "must be 4 lists:.*Received: 3"),
        ("history_times", np.zeros(3), "must be 7, one .*Received: 3"),
        ("query_ids", users, "occur more than once, first 7"),
        *((n, None, "must be a list .*out if") for n in ("query_ids", "histories")),
    ]
    for name, value, message in wrong:
        with pytest.raises(ValueError, match=message):
            exportable(**{name: value})
    for items, received in ((pa.table({"sku": ["a"]}), "'sku'"), ({"item_id": ["a"]}, "dict")):
        with pytest.raises(ValueError, match=f"Arrow table, .* column item_id.*{received}"):
            exportable(items=items)
