"""What the documentation shows, run."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tfrs_pipeline as tp

# isort: split
import tensorflow as tf

from tfrs_pipeline.presets import PRESETS
from tfrs_pipeline.settings import setting_names

ROOT = Path(__file__).parent.parent
DOCS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))]
TITLES = [f"film {number}" for number in range(30)]


def diffs(page: str) -> list[list[str]]:
    text = (ROOT / "docs" / page).read_text()
    return [block.splitlines() for block in re.findall(r"```diff\n(.*?)```", text, re.DOTALL)]


def new_code(lines: list[str]) -> str:
    return "\n".join(line[1:] for line in lines if line[:1] != "-")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    """What stands in the tutorial's script before the change: towers and pairs."""
    towers = {
        name: tf.keras.Sequential(
            [
                tf.keras.layers.StringLookup(vocabulary=vocabulary, mask_token=None),
                tf.keras.layers.Embedding(len(vocabulary) + 1, 8),
            ]
        )
        for name, vocabulary in (("user", ["1", "2", "3"]), ("movie", TITLES))
    }
    rng = np.random.default_rng(0)
    pairs = {
        "user_id": rng.choice(["1", "2", "3"], 200),
        "movie_title": np.array(TITLES)[rng.geometric(0.2, 200) % 30],
    }
    return {
        "np": np,
        "tf": tf,
        "movie_model": towers["movie"],
        "user_model": towers["user"],
        "unique_movie_titles": TITLES,
        "train": tf.data.Dataset.from_tensor_slices(pairs),
    }


def test_the_change_to_the_tfrs_tutorial_is_fifteen_lines_and_runs(script: dict[str, Any]) -> None:
    setup, loss = diffs("guides/from_the_tfrs_tutorial.md")
    assert sum(line.startswith("+") for line in setup + loss) <= 15
    exec(new_code(setup), script)
    exec("def compute_loss(self, features):\n" + new_code(loss), script)
    model = SimpleNamespace(
        user_model=script["user_model"], movie_model=script["movie_model"], task=script["task"]
    )
    features = next(iter(script["train"].batch(64)))
    tf.random.set_seed(1)
    got = float(script["compute_loss"](model, features))

    # The same by hand: each row's own positive against all columns that are not it.
    tf.random.set_seed(1)
    lookup, embedding = script["movie_model"].layers
    rows = lookup(features["movie_title"]).numpy()
    seed = tf.random.uniform([2], maxval=2**31 - 1, dtype=tf.int32)
    columns = script["mixture"].draw(tf.constant(rows, tf.int32), seed).numpy()
    share = script["counts"] / script["counts"].sum()
    logits = script["user_model"](features["user_id"]) @ tf.transpose(embedding(columns))
    logits = logits.numpy() - np.log(8191 * share[columns] + 512 / 30)
    queries, positives = script["user_model"](features["user_id"]), embedding(rows)
    own = (queries * positives).numpy().sum(axis=1)
    others = np.where(columns == rows[:, None], -np.inf, logits)
    expected = np.sum(np.logaddexp(own, np.logaddexp.reduce(others, axis=1)) - own)
    assert got == pytest.approx(expected, rel=1e-5)


PAGES = ["README.md", "CONTRIBUTING.md", "saved_models/README.md", *DOCS]


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_settings_and_public_names_that_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    settings = set(setting_names(tp.RunConfig))
    flags = set(re.findall(r"--(?:no-)?([a-z]+\.[a-z_]+)", text))
    assert flags <= settings
    named = {name for name in re.findall(r"`([a-z]+\.[a-z_]+)`", text) if "py" not in name}
    tables = {name.partition(".")[0] for name in settings}
    assert {name for name in named if name.partition(".")[0] in tables} <= settings
    names = set(re.findall(r"\btp\.(\w+)", text))
    assert names <= set(tp.__all__)
    presets = set(re.findall(r"--preset ([a-z]\w+)", text))
    assert presets <= PRESETS.keys()


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def test_the_examples_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand, on files of the names that they read."""
    from tfrs_pipeline.sources.simulated import FunnelOptions, simulate_funnel

    monkeypatch.chdir(tmp_path)
    simulation = simulate_funnel(
        num_users=60,
        num_items=100,
        num_requests=900,
        seed=1,
        options=FunnelOptions(
            num_retrieved=30, num_pre_ranked=15, num_ranked=8, num_exposed=5, click_bias=-2.0
        ),
    )
    simulation.log.events.to_parquet("events.parquet")
    ids = simulation.log.items.select("item_id").to_pandas()
    ids["title"] = "video number " + ids["item_id"].astype(str)
    ids.to_csv("videos.csv", index=False)
    example, *pieces = python_blocks("README.md")
    assert len([line for line in example.splitlines() if line.strip()]) <= 16
    user = int(simulation.log.users["user_id"].min().to_pyarrow().as_py())
    namespace: dict[str, Any] = {}
    exec(example.replace("[42]", f"[{user}]"), namespace)
    assert "two_tower" in capsys.readouterr().out
    assert isinstance(namespace["model"], tp.TwoTower)
    assert list((tmp_path / "saved_models" / "videos").iterdir())
    for piece in pieces:
        exec(piece, namespace)
    assert isinstance(namespace["model"].network.candidate_tower, namespace["Videos"])
    assert next(iter(namespace["dataset"]))["log_q"].shape == (1, 7)
