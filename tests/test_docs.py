"""Runs what the documentation shows, and checks its names, numbers and links."""

import ast
import importlib
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

import tfrs_pipeline as tp

# isort: split
import tensorflow as tf

from tests.scripts import script
from tfrs_pipeline.presets import PRESETS
from tfrs_pipeline.settings import setting_names

ROOT = Path(__file__).parent.parent
DOCS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))]
TITLES = [f"film {number}" for number in range(30)]


def new_code(lines: list[str]) -> str:
    return "\n".join(line[1:] for line in lines if line[:1] != "-")


def test_the_change_to_the_tfrs_tutorial_is_fifteen_lines_and_runs() -> None:
    text = (ROOT / "docs/guides/pieces.md").read_text()
    found = re.findall(r"```diff\n(.*?)```", text, re.DOTALL)
    setup, loss = (block.splitlines() for block in found)
    assert sum(line.startswith("+") for line in setup + loss) <= 15

    # What the tutorial's script has before the change: towers and pairs.
    def tower(ids: list[str]) -> tf.keras.Sequential:
        layers = tf.keras.layers.StringLookup(vocabulary=ids), tf.keras.layers.Embedding(31, 8)
        return tf.keras.Sequential(list(layers))

    rng, (users, movies) = np.random.default_rng(0), map(tower, (["1", "2", "3"], TITLES))
    pairs = {"user_id": rng.choice(["1", "2", "3"], 200)}
    pairs["movie_title"] = np.array(TITLES)[rng.geometric(0.2, 200) % 30]
    train = tf.data.Dataset.from_tensor_slices(pairs)
    script: dict[str, Any] = {"np": np, "tf": tf, "unique_movie_titles": TITLES, "train": train}
    script |= {"movie_model": movies, "user_model": users}
    exec(new_code(setup).replace("batch_size=8192", "batch_size=64"), script)  # As below.
    exec("def compute_loss(self, features):\n" + new_code(loss), script)
    model = SimpleNamespace(user_model=users, movie_model=movies, task=script["task"])
    features = next(iter(train.batch(64)))
    tf.random.set_seed(1)
    got = float(script["compute_loss"](model, features))

    # The same by hand: each row's positive against all columns with another item.
    tf.random.set_seed(1)
    lookup, embedding = movies.layers
    rows = lookup(features["movie_title"]).numpy()
    seed = tf.random.uniform([2], maxval=2**31 - 1, dtype=tf.int32)
    columns = script["mixture"].draw(tf.constant(rows, tf.int32), seed).numpy()
    share = script["counts"] / script["counts"].sum()
    queries, positives = users(features["user_id"]), embedding(rows)
    logits = (queries @ tf.transpose(embedding(columns))).numpy()
    logits -= np.log(63 * share[columns] + 512 / 30)
    own = (queries * positives).numpy().sum(axis=1)
    others = np.where(columns == rows[:, None], -np.inf, logits)
    expected = np.sum(np.logaddexp(own, np.logaddexp.reduce(others, axis=1)) - own)
    assert got == pytest.approx(expected, rel=1e-5)


NOTEBOOKS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
PAGES = ["README.md", "CONTRIBUTING.md", "saved_models/README.md", *DOCS]


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_settings_and_public_names_that_exist(page: str) -> None:
    text = re.sub("made by.*?<!-- end -->", "", (ROOT / page).read_text(), flags=re.DOTALL)
    settings = set(setting_names(tp.RunConfig))
    assert set(re.findall(r"--(?:no-)?([a-z]+\.[a-z0-9_]+)", text)) <= settings
    named = {name for name in re.findall(r"`([a-z]+\.[a-z_]+)`", text) if "py" not in name}
    tables = {name.partition(".")[0] for name in settings}
    assert {name for name in named if name.partition(".")[0] in tables} <= settings
    assert set(re.findall(r"\btp\.(\w+)", text)) <= set(tp.__all__)
    assert set(re.findall(r"--preset ([a-z]\w+)", text)) <= PRESETS.keys()


def private_imports(source: str) -> list[str]:
    """Lists what a text imports of the package that is not public."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [x.name for x in node.names if x.name.startswith("tfrs_pipeline.")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tfrs_pipeline"):
            module = str(node.module)
            known = module == "tfrs_pipeline" and {x.name for x in node.names} <= set(tp.__all__)
            if not known and module.partition(".")[2] not in tp.PUBLIC_MODULES:
                found.append(module)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "tp":
            found += [f"tp.{node.attr}"] if node.attr not in tp.__all__ else []
    return found


# The reference shows signatures, which are no code to run.
@pytest.mark.parametrize("path", sorted({*PAGES, *NOTEBOOKS} - {"docs/reference/api.md"}))
def test_what_users_copy_needs_public_names_alone(path: str) -> None:
    if path in NOTEBOOKS:
        cells = nbformat.read(ROOT / path, as_version=4).cells
        snippets = [cell.source for cell in cells if cell.cell_type == "code"]
        assert snippets
    else:
        snippets = re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)
    assert [name for text in snippets for name in private_imports(text)] == []


def test_public_modules_exist_and_private_ones_are_told() -> None:
    for module in tp.PUBLIC_MODULES:
        importlib.import_module(f"tfrs_pipeline.{module}")
    assert private_imports("from tfrs_pipeline.sources.simulated import simulate_funnel") == []
    assert private_imports("import tfrs_pipeline as tp\ntp.compare") == []
    for source, name in (
        ("from tfrs_pipeline.run.compare import sampling_plans", "tfrs_pipeline.run.compare"),
        ("import tfrs_pipeline.drawing", "tfrs_pipeline.drawing"),
        ("from tfrs_pipeline import drawing", "tfrs_pipeline"),
        ("tp.drawing.finish(figure)", "tp.drawing"),
    ):
        assert private_imports(source) == [name]


def test_the_reference_is_that_of_the_code() -> None:
    generate = script(ROOT / "docs" / "generate.py")
    texts = {name: (ROOT / "docs" / name).read_text() for name in generate.PARTS}
    stale = [name for name, text in texts.items() if text != generate.page(name)]
    assert not stale, f"Run `{generate.COMMAND}` and commit what it writes."
    text = (ROOT / "docs" / "reference" / "api.md").read_text()
    assert sorted(["__version__", *re.findall(r"^### (\w+)$", text, re.M)]) == sorted(tp.__all__)
    assert "#### Log.from_files" in text


@pytest.mark.usefixtures("trusted_exports", "here")
def test_the_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """It runs as shown, but for fewer epochs and on a smaller log."""
    readme = (ROOT / "README.md").read_text()
    example = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    sizes = {"num_users=1000": "num_users=120", "500": "200", "5000": "2000", "[42]": "[7]"}
    sizes["negatives=negatives"] = "negatives=negatives, training=tp.TrainingSettings(max_epochs=3)"
    for size, smaller in sizes.items():
        example, num = re.subn(rf"(?<!\w){re.escape(size)}(?!\w)", smaller, example)
        assert num
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    exec(example, {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["model", "two_tower", "ease"]
    assert re.fullmatch(r"\[\[\d+( +\d+){4}\]\]", lines[-1])


def test_the_readme_is_for_fifteen_minutes() -> None:
    """Two and a half screens of 1,280 pixels by 900: these bounds keep it there."""
    readme = (ROOT / "README.md").read_text()
    assert len(readme.split()) <= 800
    assert len(readme.splitlines()) <= 105


def test_a_number_of_the_readme_is_in_the_file_that_it_links_to() -> None:
    text = (ROOT / "README.md").read_text()
    files = dict(re.findall(r"^\[(\w+)\]: (\S+\.json)$", text, re.MULTILINE))
    linked = re.findall(r"\[(\.\d+)[^\]]*\]\[(\w+)\]", text)
    assert len(linked) >= 15
    for number, name in linked:
        measured = re.findall(r"[:\[,]\s*(-?\d[\d.e+-]*)\b", (ROOT / files[name]).read_text())
        assert f"0{number}" in {f"{float(value):.3f}" for value in measured}, (number, name)


@pytest.fixture(scope="module")
def site(module_path: Path) -> Path:
    """Returns the built site."""
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(module_path), strict=True))
    return module_path


def test_the_site_asks_no_other_server_and_searches_from_the_disk(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link|iframe)\b[^>]*>", page.read_text())
        assert not [tag for tag in loaded if re.search(r'(?:src|href)="?(?:https?:)?//', tag)], page
    script = (site / "search" / "search_index.js").read_text()
    index = json.loads((site / "search" / "search_index.json").read_text())
    assert json.loads(script.removeprefix("var __index = ")) == index


# What people look for -> words in the heading of the page, or of the part, that answers it.
ITS_OWN = "diversity, business rules, boost, onnx, triton, cite, upgrade, gdpr, hyperparameters"
ITS_OWN += ", languages, kubernetes, rollback, a/b test, drift, alerts"
LOOKED_FOR = {word: word for word in ITS_OWN.split(", ")} | {
    "delete a user": "deleting a user",
    "nightly batch": "nightly",
    "explain": "explaining",
    "sweep, budget": "budget",
    "several markets": "markets",
    "filter by price or stock": "price, stock",
    "history between trainings": "between trainings",
    "gorse, managed services": "something else",
}


@pytest.mark.parametrize("heading", LOOKED_FOR.values(), ids=LOOKED_FOR)
def test_what_people_look_for_is_in_a_heading(site: Path, heading: str) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())
    titles = [entry["title"].lower() for entry in index["docs"] if "/api" not in entry["location"]]
    assert [title for title in titles if heading in title]


def test_the_version_is_the_same_everywhere() -> None:
    """The newest release of the changelog, its date, and how to cite it."""
    log = (ROOT / "CHANGELOG.md").read_text()
    released = re.search(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", log, re.MULTILINE)
    assert released is not None
    version, date = released.groups()
    assert version == tp.__version__
    cited = (ROOT / "CITATION.cff").read_text()
    assert f"version: {version}\ndate-released: {date}\n" in cited
    page = (ROOT / "docs/start/install.md").read_text()
    assert {f"@v{version}'", f"version = {{{version}}}", f"date    = {{{date}}}"} <= set(
        re.findall(r"@v[\d.]+'|(?:version|date) +=\s\{[\d.-]+\}", page)
    )


def test_the_figures_are_those_of_the_result_files() -> None:
    figure = script(ROOT / "benchmarks" / "figure.py")
    for name, drawing in figure.drawings().items():
        assert (figure.FIGURES / f"{name}.svg").read_text() == drawing.svg + "\n"


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_within_the_repository_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\((?!\w+:|#)([^)#]+)", text)
    links += re.findall(r"^\[\w+\]: (?!\w+:)(\S+)", text, re.MULTILINE)
    made = {"docs/reference/exported_models.md", "docs/explanation/contributing.md"}
    links += re.findall(r'<img [^>]*src="([^"]+)"', text)
    for link in links:
        target = os.path.normpath(ROOT / Path(page).parent / link)
        assert Path(target).exists() or str(Path(target).relative_to(ROOT)) in made, link
