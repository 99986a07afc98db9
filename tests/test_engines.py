"""Runs the guide to other engines: each finds what exact search finds, with the same scores."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

import tfrs_pipeline as tp

# isort: split
import tensorflow as tf

from tests.test_guides import blocks_of, is_shown, run_block
from tfrs_pipeline.samples.store import RowLists

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "engines.md"
SECTIONS = dict(part.split("\n", 1) for part in GUIDE.read_text().split("\n## ")[1:])
ENGINES = {"FAISS": "faiss", "hnswlib": "hnswlib", "Qdrant": "qdrant_client"}
POSTGRES = "PostgreSQL with pgvector"
NOT_RUN = "Vespa, OpenSearch, Milvus"
PYTHON = "A Python service of your own"
OTHERS = "Other servers and formats: TensorFlow Serving, Triton, ONNX"
NUM_ITEMS, NUM_USERS, DIM = 300, 50, 32


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, trusted_exports: None) -> Iterator[None]:
    """Exports a model like the first page's, with vectors of many lengths: a wrong metric shows."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(size=(NUM_ITEMS + 1, 1)))
    candidates = tf.Variable((lengths * rng.normal(size=(NUM_ITEMS + 1, DIM))).astype(np.float32))
    category = rng.choice(["cooking", "football", "music", "travel"], NUM_ITEMS)
    category[[7, 31]] = "music"  # The guide's history, which it excludes.
    items = pa.table({"item_id": [f"v{n}" for n in range(NUM_ITEMS)], "category": category})
    clicks = [rng.integers(1, NUM_ITEMS + 1, 5 if user else 0) for user in range(NUM_USERS + 1)]
    histories = RowLists.from_lists([rows.astype(np.int32) for rows in clicks])

    def embed_queries(rows: tf.Tensor, histories: tf.Tensor) -> tf.Tensor:
        is_item = tf.cast(histories > 0, tf.float32)[:, :, tf.newaxis]
        return tf.reduce_sum(is_item * tf.gather(candidates, histories), axis=1)

    def embed_candidates(rows: tf.Tensor) -> tf.Tensor:
        return tf.gather(candidates, rows)

    users = {"query_ids": np.arange(NUM_USERS), "histories": histories, "history_length": 5}
    towers = embed_queries, embed_candidates, [candidates]
    model = tp.Exportable(*towers, items=items, known_positives=histories, **users)
    folder = tmp_path_factory.mktemp("engines")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pa.csv.write_csv(items.rename_columns(["sku", "category"]), "videos.csv")
        tp.export(model, "saved_models/videos", index=tp.Exact(), filter_by="category")
        yield


@pytest.fixture(scope="module")
def asked(videos: None) -> dict[str, Any]:
    """Returns the guide's variables before its first engine: items, their vectors, a query's."""
    namespace: dict[str, Any] = {}
    printed = ""
    for title in list(SECTIONS)[:2]:
        for kind, text in blocks_of(SECTIONS[title]):
            if kind in ("text", "json"):
                assert is_shown(text, printed), f"{title} shows\n{text}\nand got\n{printed}"
            else:
                printed = run_block(kind, text, namespace) or printed
    # The server embeds as Python does; asked by user, it reads the stored history.
    by_user, by_query = (json.loads(line)["outputs"] for line in printed.splitlines())
    np.testing.assert_array_equal(np.float32(by_query["embeddings"][0]), namespace["query"])
    model = namespace["model"]
    stored = {"user_id": 42, "history": model.users.history(42)[::-1]}
    np.testing.assert_array_equal(np.float32(by_user["embeddings"]), model.embed_queries([stored]))
    assert set(by_user["known_items"][0]) == set(stored["history"])
    return namespace


def check_found(asked: dict[str, Any], title: str) -> None:
    """Runs the section of an engine and compares its answer with exact search's."""
    namespace = dict(asked)
    for kind, text in blocks_of(SECTIONS[title]):
        run_block(kind, text, namespace)
    query, exact = {"user_id": 42, "history": asked["seen"]}, asked["model"].retrieve
    ids, scores = exact([query], 10, [asked["seen"]], allowed=[["music"]])
    assert len(set(scores[0].tolist())) == 10  # No ties, which engines may break differently.
    # An engine that ignored the exclusions or the category would answer differently.
    assert set(asked["seen"]) <= set(exact([query], 10, allowed=[["music"]])[0][0])
    assert set(ids[0]) != set(exact([query], 10, [asked["seen"]])[0][0])
    assert list(namespace["found"]) == ids[0].tolist()
    np.testing.assert_allclose(namespace["scores"], scores[0], rtol=1e-5)


@pytest.mark.parametrize("title", ENGINES)
def test_an_engine_finds_what_exact_search_finds(asked: dict[str, Any], title: str) -> None:
    pytest.importorskip(ENGINES[title])
    check_found(asked, title)


def test_postgresql_finds_what_exact_search_finds(
    asked: dict[str, Any], database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in database.items():
        monkeypatch.setenv(name, value)
    check_found(asked, POSTGRES)
    import psycopg

    with psycopg.connect("dbname=shop") as shop:
        nearest = "SELECT item_id FROM videos_1 ORDER BY embedding <#> %s::vector LIMIT 10"
        plan = shop.execute(f"EXPLAIN {nearest}", [str(asked["query"].tolist())]).fetchall()
    assert "Index Scan using videos_1_embedding_idx" in str(plan)


@pytest.mark.usefixtures("videos")
def test_a_python_service_answers_as_shown() -> None:
    (_, service), (_, shown) = blocks_of(SECTIONS[PYTHON])
    assert is_shown(shown, run_block("python", service, {}))


def test_each_section_of_the_guide_is_run_or_says_that_it_is_not() -> None:
    assert list(SECTIONS)[2:] == [*ENGINES, POSTGRES, NOT_RUN, PYTHON, OTHERS]
    assert SECTIONS[NOT_RUN].strip().startswith("**Not run**")
    assert not blocks_of(SECTIONS[NOT_RUN] + SECTIONS[OTHERS])


@pytest.fixture(scope="module")
def database() -> Iterator[dict[str, str]]:
    """Starts a PostgreSQL server on a socket in a temporary folder; yields how to reach it."""
    # Earlier versions have no hnsw.iterative_scan.
    installed = Path("/usr/share/postgresql").glob("*/extension/vector.control")
    late = re.compile(r"default_version = '(0\.([89]|\d\d)|[1-9])")
    found = [path.parts[-3] for path in installed if late.search(path.read_text())]
    if not found:
        pytest.skip("needs pgvector 0.8 or later, Debian's package postgresql-17-pgvector")
    programs = Path("/usr/lib/postgresql") / max(found, key=int) / "bin"
    as_user: dict[str, Any] = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}

    def call(program: str, *words: str) -> None:
        command: list[Any] = [programs / program, *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/", **as_user)

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp"))  # A short path.
        if as_user:
            shutil.chown(folder, **as_user)
        call("initdb", "-D", f"{folder}/data", "-U", "shop", "--auth=trust", "--no-sync")
        options = f"-k {folder} -c listen_addresses= -c fsync=off"
        call("pg_ctl", "-D", f"{folder}/data", "-l", f"{folder}/log", "-o", options, "-w", "start")
        stack.callback(call, "pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
        call("createdb", "-h", folder, "-U", "shop", "shop")
        # With so few rows, PostgreSQL would scan the table instead of using the index.
        yield {"PGHOST": folder, "PGUSER": "shop", "PGOPTIONS": "-c enable_seqscan=off"}
