"""Runs the commands and snippets of the guides and the README in order, and checks the output.

Commands run within this process, so that TensorFlow is loaded once; a server answers in a thread.
"""

import argparse
import contextlib
import io
import json
import re
import shlex
import urllib.request
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.service.running_server import TOKEN, address_of
from tfrs_pipeline import cli, load_config
from tfrs_pipeline.evaluation.baselines import BASELINES
from tfrs_pipeline.evaluation.metrics import METRICS

pytestmark = pytest.mark.usefixtures("trusted_exports")

ROOT = Path(__file__).parents[1]
START = "docs/start/ten_minutes.md"
# The guides that read the files and the model of the first page; those that look up its items come
# before the guide that adds one. Those of the second group train for long.
QUICK = "rules logq similar daily personal_data new_items events_in_service"
LONG = "pieces recipes negatives events report tuning features"
GUIDES = {START: [pytest.mark.slow, pytest.mark.nightly]}
GUIDES |= {f"docs/guides/{name}.md": [pytest.mark.slow] for name in QUICK.split()}
GUIDES |= {f"docs/guides/{name}.md": [pytest.mark.nightly] for name in LONG.split()}
# The requests of the first are sent below, to the README's model. tests/test_engines.py runs the
# second. The last takes versions out of a folder and pins them, as
# tests/service/test_versions.py and test_server.py do.
RUN_ELSEWHERE = tuple(f"docs/guides/{name}.md" for name in ("serving", "engines", "watching"))
SHELL = ("python3", "openssl", "pip", ".venv/bin/pip", "docker", "mkdir", "cp", "mv")
# Flags that make a command short; if a flag is given twice, the last one counts.
TWO = ["--training.max_epochs", "2", "--no-training.refit"]
ONE = ["--evaluation.baselines", "popularity"]
SHORT = {"run": [*TWO, "--export.if_beaten"], "compare": [*TWO, "--training.max_epochs", "1"]}
# The first page shows a race and a row for each baseline.
RACING = {"run": ["--recipes", "default", "quick"]}
SHORTER = {"run": [*ONE, "--recipes", "none"], "compare": ONE}
SCI_FI = 15  # Its place among GroupLens's genres.
# Scripts, for cron and for a cluster, are not run.
BLOCK = re.compile(r"^```(python|sh|text|json)\n(?!#!)(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: str) -> list[tuple[str, str]]:
    return blocks_of((ROOT / page).read_text())


def blocks_of(text: str) -> list[tuple[str, str]]:
    return BLOCK.findall(text)


def run_command(words: list[str], more: Mapping[str, list[str]]) -> None:
    """Runs a command of a page; skips those in SHELL, such as installations."""
    program, *arguments = words
    if Path(program).name == "tfrs-pipeline" and arguments[0] == "serve":
        address_of(Path(arguments[1]).absolute())
    elif Path(program).name == "tfrs-pipeline":
        command = arguments[0]
        short = [*SHORT.get(command, []), *more.get(command, [])]
        assert cli.main([*arguments, *short]) == 0
    elif program == "curl":
        curl = argparse.ArgumentParser()
        curl.add_argument("url")
        for flag, default in (("--json", None), ("-X", "POST"), ("-H", "X-None: 0")):
            curl.add_argument(flag, default=default)
        asked = curl.parse_args(arguments)
        print(ask(asked.url, asked.json, asked.X, asked.H.replace("$(cat token)", TOKEN)))
    else:
        assert program in SHELL, f"a command that no test runs: {program}"


def ask(url: str, body: str | None, method: str = "POST", header: str = "X-None: 0") -> str:
    """Sends a page's request to the server in the thread, instead of the default port."""
    name = re.search(r"/v1/models/([\w-]+)((?:/versions/\d+)?:predict|/items)", url)
    if name is not None:
        address = f"{address_of(Path('saved_models', name[1]).absolute())}{name[2]}"
    else:  # What belongs to no version is sent to the first page's model.
        (path,) = re.findall(r"/v1/(?:events|users)\b.*", url)
        address = address_of(Path("saved_models", "videos").absolute()).partition("/v1")[0] + path
    headers = {"Content-Type": "application/json", **dict([header.split(": ")])}
    request = urllib.request.Request(address, (body or "").encode(), headers, method=method)
    with urllib.request.urlopen(request) as answer:
        return json.dumps(json.load(answer), sort_keys=True, separators=(",", ":"))


def run_block(kind: str, text: str, namespace: Any = None, more: Any = None) -> str:
    """Runs a block, Python in `namespace`, and returns what it printed.

    `more` holds flags by command, in addition to those that make every training short.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        if kind == "python":
            exec(text, namespace)
        else:
            for command in re.split(r"\n(?=\S)", text.strip()):
                if words := shlex.split(command.replace("\\\n", " "), comments=True):
                    run_command(words, more or {})
    return printed.getvalue()


def is_shown(expected: str, printed: str) -> bool:
    """Tells whether the lines of a page were printed in order, whatever the numbers are.

    "..." stands for any text, and on a line of its own for any lines.
    """
    lines = iter(plain(line) for line in printed.splitlines())
    shown = [plain(line) for line in expected.splitlines() if line != "..."]
    patterns = [re.escape(line).replace(r"\.\.\.", ".*") for line in shown]
    return all(any(re.fullmatch(pattern, line) for line in lines) for pattern in patterns)


def plain(line: str) -> str:
    """Replaces every number by 0, and white space and table rules by one space."""
    numbers = re.sub(r"((?<!\w)[-+])?\d[\d,]*(\.\d+)?", "0", line)
    return " ".join(re.sub(r"[┏┓┡┩╇┳━]+", " ", numbers).split())


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """Forgets the metrics and baselines that a page adds, which its readers add to one program."""
    registries: list[MutableMapping[str, Any]] = [METRICS, BASELINES]
    before = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.mark.parametrize("page", [pytest.param(page, marks=GUIDES[page]) for page in GUIDES])
def test_a_guide_runs_as_is(module_path: Path, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    """All guides run in one folder, one after another."""
    monkeypatch.chdir(module_path)
    monkeypatch.setenv("COLUMNS", "200")
    namespace: dict[str, Any] = {}
    printed = ""
    for kind, text in blocks(page):
        if kind in ("text", "json"):
            # Which recipe wins depends on the number of epochs.
            text = re.sub(r"(?m)^    \w+ won: .+", "    ... won: ...", text)
            assert is_shown(text, printed), f"{page} shows\n{text}\nand got\n{printed}"
        else:
            more = RACING if page == START else SHORTER
            printed = run_block(kind, text, namespace, more)


def test_every_guide_with_a_command_is_run() -> None:
    pages = [str(path.relative_to(ROOT)) for path in (ROOT / "docs" / "guides").glob("*.md")]
    shown = {page for page in pages if any(kind in ("python", "sh") for kind, _ in blocks(page))}
    assert shown <= {*GUIDES, *RUN_ELSEWHERE}


def test_the_settings_of_a_day_are_those_of_a_run(tmp_path: Path) -> None:
    page = (ROOT / "docs/guides/daily.md").read_text()
    (settings,) = re.findall(r"^```toml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "daily.toml").write_text(settings)
    assert load_config(tmp_path / "daily.toml").data.source == "files"


def write_movielens(folder: Path) -> None:
    """Writes made-up ratings in GroupLens's form, with the users and films that pages name."""
    rng = np.random.default_rng(0)
    genres = np.eye(19, dtype=int)[np.r_[SCI_FI, rng.integers(1, 19, 199)]].astype(str)
    dated = "(1995)|01-Jan-1995||http://x"
    films = [f"{n}|Film {n} {dated}|{'|'.join(flags)}" for n, flags in enumerate(genres, 1)]
    users = [f"{n}|{20 + n % 40}|{'MF'[n % 2]}|writer|10003" for n in range(1, 61)]
    rated = [(user, film) for user in range(1, 61) for film in rng.permutation(200)[:100] + 1]
    ratings = [f"{u}\t{f}\t{rng.integers(1, 6)}\t{881250949 + n}" for n, (u, f) in enumerate(rated)]
    for name, lines in (("u.data", ratings), ("u.item", films), ("u.user", users)):
        (folder / name).write_text("\n".join(lines) + "\n", encoding="latin-1")


@pytest.mark.slow
def test_the_readme_runs(here: Path) -> None:
    """Runs the main job on made-up ratings, then every request of README and serving guide."""
    write_movielens(here)
    rows = "".join(f"{i % 40},v{i * i % 31},{1_700_000_000 + i}\n" for i in range(800))
    Path("clicks.csv").write_text(f"viewer,video,ts\n{rows}")
    readme = (ROOT / "README.md").read_text()
    commands = blocks_of(readme)[0][1].splitlines()
    assert commands[1] == ".venv/bin/tfrs-pipeline run"
    (flags,) = re.findall(r"`(--data\.path clicks\.csv [^`]+)`", readme)
    assert "800 events, " in run_block(
        "sh", f"tfrs-pipeline run --check {flags}".replace("\n", " ")
    )
    where = ["--data.source", "movielens-100k", "--data.path", str(here)]
    printed = run_block("sh", shlex.join(["tfrs-pipeline", "run", *where]))
    shown = next(text for kind, text in blocks("README.md") if kind == "text")
    # Which model is ahead depends on the ratings.
    shown = re.sub(r"(?m)^(better\?|served\?|for whom) .+", r"\1 ...", shown)
    assert is_shown(shown, printed), printed
    assert run_block("sh", "\n".join(commands[2:])).count("rank") == 1
    calls = [x for kind, x in blocks("docs/guides/serving.md") if kind == "sh" and "curl" in x]
    told = [line for text in calls for line in run_block("sh", text).splitlines()]
    answers = [json.loads(answer.replace("-Infinity", "null")) for answer in told]
    assert len(answers) == 9
    # None of this test's few films is from that year.
    assert "year '1972' of item 9001 is unknown to the model" in answers[5].pop("notes")[0]
    assert answers[5:7] == [{"num_items": 201, "num_new": 1}, {"num_items": 200, "num_removed": 1}]
    # Answer 7 is to a request with its time, which the default model accepts but does not use.
    timed, untimed = (answers[i]["outputs"]["candidate_ids"] for i in (7, 0))
    assert timed == untimed
    filtered = answers[3]["outputs"]["candidate_ids"][0]
    films = [line.split("|") for line in Path("u.item").read_text("latin-1").splitlines()]
    is_sci_fi = {int(film[0]): film[5 + SCI_FI] == "1" for film in films}
    assert all(is_sci_fi[item] for item in filtered if item != -1)
