"""Towers in LiteRT's files embed as the models that wrote them; others are run by TensorFlow."""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf

from tests.service.conftest import NUM_CANDIDATES, NUM_QUERIES, Served, make_served
from tests.service.test_requests import FEATURES
from tfrs_pipeline import Exact, Exportable, export, load
from tfrs_pipeline.answers.towers import (
    CANDIDATE_TOWER,
    QUERY_TOWER,
    LiteRtTower,
    TensorFlowTower,
    load_tower,
    needs_tensorflow,
)
from tfrs_pipeline.exports.towers import write_towers
from tfrs_pipeline.features.raw import NO_TIME
from tfrs_pipeline.libraries import quiet_natives
from tfrs_pipeline.model.tf_tables import tower_of
from tfrs_pipeline.samples.store import RowLists
from tfrs_pipeline.search.queries import Tower, candidate_inputs

Inputs = dict[str, np.ndarray]


class Pair:
    """A tower as a version has it, the same in memory, and inputs for both."""

    def __init__(self, name: str, served: Served, folder: Path) -> None:
        model = served.exportable()
        self.is_query = name == QUERY_TOWER
        self.inputs: Mapping[str, Any] = (
            model.inputs.tower_inputs
            if self.is_query
            else candidate_inputs(served.candidate_features)
        )
        embed = model.embed_queries if self.is_query else model.embed_candidates
        self.in_memory: Tower = tower_of(embed, self.inputs)
        self.load: Callable[[], Tower] = lambda: load_tower(folder, name, [*self.inputs])
        self.saved = self.load()

    def batch(self, num: int, seed: int = 0) -> Inputs:
        rng, batch = np.random.default_rng(seed), {}
        highest = {"query_rows": NUM_QUERIES, "history_rows": NUM_CANDIDATES}
        highest |= {"candidate_rows": NUM_CANDIDATES}
        for name, (shape, dtype) in self.inputs.items():
            values: np.ndarray = rng.normal(size=(num, *shape))
            if dtype == "int32":
                values = rng.integers(0, highest.get(name, 2) + 1, (num, *shape))
            if name == "history_times":
                values = np.where(rng.random((num, *shape)) < 0.3, NO_TIME, -(10**values % 10**8))
                values[:, 0] = 0
            elif dtype == "float32":
                values[rng.random(num) < 0.3] = np.nan
            batch[name] = values.astype(dtype)
        return batch


@pytest.fixture(scope="module", params=["default", "self-attention over times and requests"])
def written(request: pytest.FixtureRequest, module_path: Path) -> tuple[Served, Path]:
    served = make_served("int")
    if request.param != "default":
        served = make_served("int", use_user_id=False, request_features=FEATURES, reads_times=True)
    folder = module_path / request.param
    folder.mkdir()
    write_towers(served.exportable(), folder)
    return served, folder


@pytest.fixture(params=[QUERY_TOWER, CANDIDATE_TOWER])
def pair(request: pytest.FixtureRequest, written: tuple[Served, Path]) -> Pair:
    return Pair(request.param, *written)


def test_a_litert_tower_embeds_as_its_model(pair: Pair) -> None:
    assert isinstance(pair.saved, LiteRtTower)
    # Sizes change between calls, as they do in service; an empty batch changes nothing.
    for seed, num in enumerate([1, 5, 0, 5, 1, 256]):
        batch = pair.batch(num, seed)
        embedded, expected = pair.saved(batch), pair.in_memory(batch)
        assert embedded.shape == (num, 8)
        assert embedded.dtype == np.float32
        np.testing.assert_allclose(embedded, expected, atol=1e-5)
        assert num < 2 or np.ptp(embedded, axis=0).min() > 1e-3  # Rows differ.


def test_the_rows_of_a_batch_are_those_of_single_calls(pair: Pair) -> None:
    batch = pair.batch(6)
    together = pair.saved(batch)
    for line in range(6):
        alone = pair.saved({name: values[line : line + 1] for name, values in batch.items()})
        np.testing.assert_allclose(alone[0], together[line], atol=1e-6)


def test_an_answer_is_kept_when_the_next_one_comes(pair: Pair) -> None:
    first = pair.saved(pair.batch(3, 1))
    kept = first.copy()
    pair.saved(pair.batch(3, 2))
    np.testing.assert_array_equal(first, kept)


def test_the_order_of_inputs_and_of_memory_does_not_matter(pair: Pair) -> None:
    batch = pair.batch(4)
    strange = {name: np.asfortranarray(batch[name]) for name in reversed(batch)}
    strange["unread"] = np.zeros(9)
    np.testing.assert_array_equal(pair.saved(strange), pair.saved(batch))


def test_several_threads_share_a_tower(pair: Pair) -> None:
    """In many towers: where their memory lies decided whether XNNPACK's answers were right."""
    batches = [pair.batch(1 + seed % 3, seed) for seed in range(6)]
    expected = [pair.in_memory(batch) for batch in batches]
    failures = list[int]()

    def ask(tower: Tower, together: threading.Barrier, number: int) -> None:
        together.wait()
        for _ in range(10):
            if not np.allclose(tower(batches[number]), expected[number], atol=1e-5):
                failures.append(number)

    for _ in range(60):
        tower, together = pair.load(), threading.Barrier(len(batches))
        targets = [(tower, together, number) for number in range(len(batches))]
        threads = [threading.Thread(target=ask, args=target) for target in targets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_bad_file_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "query.tflite").write_bytes(b"nothing of a tower")
    with pytest.raises(ValueError, match="not a valid Flatbuffer"):
        load_tower(tmp_path, QUERY_TOWER, ["query_rows"])


def test_a_process_that_loads_a_tower_writes_nothing(written: tuple[Served, Path]) -> None:
    """LiteRT writes a line when a process makes its first interpreter."""
    names = [*written[0].exportable().inputs.tower_inputs]
    program = "import os, sys, pathlib\nfrom tfrs_pipeline.answers.towers import load_tower\n"
    program += "load_tower(pathlib.Path(sys.argv[1]), 'query', sys.argv[2:])\nos.write(2, b'after')"
    command = [sys.executable, "-c", program, str(written[1]), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "after")


def test_the_standard_error_comes_back_after_several_threads(
    capfd: pytest.CaptureFixture[str],
) -> None:
    inside, second = threading.Event(), threading.Event()

    def first_thread() -> None:
        with quiet_natives():
            inside.set()
            second.wait(0.2)  # The other thread has to wait.
            os.write(2, b"unseen")

    def second_thread() -> None:
        inside.wait()
        with quiet_natives():
            second.set()

    threads = [threading.Thread(target=target) for target in (first_thread, second_thread)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.write(2, b"seen")
    assert capfd.readouterr().err == "seen"


def strange_model() -> Exportable:
    """Makes a model whose query tower has an operation that LiteRT lacks."""
    vectors = tf.Variable(np.random.default_rng(0).uniform(1, 3, (4, 3)).astype(np.float32))

    def embed_queries(query_rows: Any, history_rows: Any) -> tf.Tensor:
        return tf.math.bessel_i0e(
            tf.gather(vectors, query_rows) + tf.gather(vectors, history_rows[:, 0])
        )

    return Exportable(
        embed_queries=embed_queries,
        embed_candidates=lambda rows: tf.gather(vectors, rows),
        variables=[vectors],
        items=pa.table({"item_id": ["a", "b", "c"]}),
        query_ids=np.array([30, 10]),
        history_length=2,
        histories=RowLists.from_lists([np.array(rows, np.int32) for rows in ([], [2, 1], [3])]),
    )


@pytest.mark.slow
def test_a_tower_that_litert_cannot_run_is_run_by_tensorflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = strange_model()
    with caplog.at_level(logging.WARNING):
        folder = export(model, tmp_path / "films", index=Exact())  # Proved in fresh processes.
    (message,) = [x.getMessage() for x in caplog.records if x.name.startswith("tfrs_pipeline")]
    assert message.startswith("LiteRT cannot run the query tower, so whoever serves this model")
    assert message.endswith("'tf.BesselI0e' op is neither a custom op nor a flex op")
    assert needs_tensorflow(folder)
    loaded = load(folder)
    queries: list[Any] = [{"user_id": 30, "history": ["b"]}, {"history": ["c", "a"]}, {}]
    rows, histories = np.array([1, 0, 0], np.int32), np.array([[2, 0], [1, 3], [0, 0]], np.int32)
    expected = model.embed_queries(rows, histories).numpy()
    np.testing.assert_allclose(loaded.embed_queries(queries), expected, rtol=1e-6)
    assert loaded.embed_queries([]).shape == (0, 3)
    scores = expected @ model.embed_candidates(np.array([1, 2, 3], np.int32)).numpy().T
    _, found = loaded.retrieve(queries, 3)
    np.testing.assert_allclose(found, -np.sort(-scores, axis=1), rtol=1e-5)
    # The candidate tower is LiteRT's all the same.
    assert isinstance(
        load_tower(folder / "service", CANDIDATE_TOWER, ["candidate_rows"]), LiteRtTower
    )
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(
        ImportError, match=r"query is a tower that LiteRT cannot run.* extra 'train'"
    ):
        load(folder)


def test_towers_in_both_formats_take_the_same_inputs(tmp_path: Path) -> None:
    """A tower for TensorFlow too takes its inputs by name, whatever their order."""
    model = strange_model()
    write_towers(model, tmp_path)
    tower = load_tower(tmp_path, QUERY_TOWER, [*model.inputs.tower_inputs])
    assert isinstance(tower, TensorFlowTower)
    rows, histories = np.array([1, 2], np.int32), np.array([[2, 0], [3, 1]], np.int32)
    expected = model.embed_queries(rows, histories).numpy()
    embedded = tower({"history_rows": histories, "query_rows": rows})
    np.testing.assert_allclose(embedded, expected, rtol=1e-6)
    # XNNPACK, which is faster, may run a tower in which no shape depends on values.
    candidate_tower = load_tower(tmp_path, CANDIDATE_TOWER, ["candidate_rows"])
    assert isinstance(candidate_tower, LiteRtTower)
    assert candidate_tower._takes_xnnpack
