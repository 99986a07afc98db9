"""Pages of the site that are made of the code and of the benchmarks' results.

What the package says of itself (docstrings, settings, flags) is said there once. Files outside this
folder keep their place: a link to one is written as it works in the repository.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import tfrs_pipeline
from tfrs_pipeline.cli import COMMAND_LINE
from tfrs_pipeline.cli.flags import as_typed
from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.presets import PRESETS
from tfrs_pipeline.settings import Config, tables_in

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
# What stands in place of such a list where the page is read as it is.
UNBUILT = "*Listed on the built site: `make docs`.*"
# Page of the site -> the file of the repository that it shows.
SHOWN = {
    "index.md": "README.md",
    "reference/exported_models.md": "saved_models/README.md",
    "explanation/contributing.md": "CONTRIBUTING.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files outside the folder that are pages, or that pages link to."""
    shown = {name: ROOT / source for name, source in SHOWN.items()}
    for name, path in {**shown, **{str(p.relative_to(ROOT)): p for p in RESULTS}}.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Fills in what is made of the code, and makes links right that leave the folder."""
    for marker, lines in MADE.items():
        if marker in markdown:
            markdown = markdown.replace(f"{UNBUILT}\n{marker}", "\n".join(lines()))
    name = page.file.src_uri
    source = Path(SHOWN.get(name, f"docs/{name}"))
    page_of = {shown: name for name, shown in SHOWN.items()}

    def on_site(found: re.Match[str]) -> str:
        target = os.path.normpath(source.parent / found[2])
        place = page_of.get(target, target.removeprefix("docs/"))
        return found[1] + os.path.relpath(place, Path(name).parent)

    # Of a link in line, and of one that is named at the end of the page.
    return re.sub(r"(\]\(|^\[\w+\]: )(?!\w+:)([\w./-]+)", on_site, markdown, flags=re.MULTILINE)


def api_lines() -> Iterator[str]:
    """Yields the public names, by room, for mkdocstrings."""
    names = defaultdict(list)
    for name, module in sorted(tfrs_pipeline.PUBLIC.items()):
        names[module.partition(".")[0]].append(f"tfrs_pipeline.{module}.{name}")
    for room, paths in sorted(names.items()):
        yield from (f"## {room.capitalize()}", "", *(f"::: {path}" for path in paths), "")


def configuration_lines() -> Iterator[str]:
    """Yields the settings of a run, table by table."""
    yield from _table_lines(RunConfig, "")


def preset_lines() -> Iterator[str]:
    """Yields the presets and what each sets."""
    for name, (good_for, settings) in PRESETS.items():
        yield from (f"### `{name}`", "", f"For {good_for}.", "")
        yield from (f"- `{setting}`: `{as_typed(value)}`" for setting, value in settings.items())
        yield ""


def _table_lines(table: type[Config], prefix: str) -> Iterator[str]:
    tables = tables_in(table)
    yield from ("| setting | default | |", "|---|---|---|")
    for name, field in table.model_fields.items():
        if name not in tables:
            default = "" if field.default is None else f"`{as_typed(field.default)}`"
            about = str(field.description).replace("|", "\\|")
            yield f"| `{prefix}{name}` | {default.replace('|', chr(92) + '|')} | {about} |"
    yield ""
    for name, inner in tables.items():
        yield from (f"## `{prefix}{name}`", "", str(table.model_fields[name].description), "")
        yield from _table_lines(inner, f"{prefix}{name}.")


def command_line_lines() -> Iterator[str]:
    """Yields the help of each command, as the terminal shows it."""
    for name in COMMAND_LINE.commands:
        yield from (f"## `{COMMAND_LINE.program} {name}`", "", "```text", _help(name), "```", "")


def _help(command: str) -> str:
    os.environ["COLUMNS"] = "90"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        COMMAND_LINE.read([command, "--help"])
    return printed.getvalue().rstrip()


def result_lines() -> Iterator[str]:
    """Yields a table of the result files: what made each, of which commit and when."""
    yield from ("| file | as of | command | cores, load |", "|---|---|---|---|")
    for path in RESULTS:
        record = json.loads(path.read_text())
        as_of = f"{record['commit']}, {record['date']}" if "commit" in record else record["date"]
        machine = record["machine"]
        load = f"{machine['num_cores']}, {machine['load_average_5_min']}"
        link = f"[{path.name}](../../benchmarks/results/{path.name})"
        yield f"| {link} | {as_of} | `{record['command']}` | {load} |"


MADE = {
    "<!-- public names -->": api_lines,
    "<!-- settings -->": configuration_lines,
    "<!-- presets -->": preset_lines,
    "<!-- commands -->": command_line_lines,
    "<!-- result files -->": result_lines,
}
