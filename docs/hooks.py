"""Pages of the site that stand outside its folder.

A file outside the folder keeps its place: a link to one is written as it works in the repository.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Files that pages link to.
LINKED = [
    *ROOT.glob("benchmarks/results/*.json"),
    *ROOT.glob("notebooks/*.ipynb"),
    ROOT / "CITATION.cff",
]
# Page of the site -> the file of the repository that it shows.
SHOWN = {
    "index.md": "README.md",
    "start/changelog.md": "CHANGELOG.md",
    "reference/exported_models.md": "saved_models/README.md",
    "explanation/contributing.md": "CONTRIBUTING.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files outside the folder that are pages, or that pages link to."""
    shown = {name: ROOT / source for name, source in SHOWN.items()}
    for name, path in {**shown, **{str(p.relative_to(ROOT)): p for p in sorted(LINKED)}}.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Rewrites links that leave the folder; hides the navigation around the first page."""
    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation", "footer"]
    name = page.file.src_uri
    source = Path(SHOWN.get(name, f"docs/{name}"))
    page_of = {shown: name for name, shown in SHOWN.items()}

    def on_site(found: re.Match[str]) -> str:
        target = os.path.normpath(source.parent / found[2])
        place = page_of.get(target, target.removeprefix("docs/"))
        return found[1] + os.path.relpath(place, Path(name).parent)

    # Links in line, definitions of links at the end of the page, and pictures beside a text.
    return re.sub(
        r"(\]\(|^\[\w+\]: |<img [^>]*src=\")(?!\w+:)([\w./-]+)",
        on_site,
        markdown,
        flags=re.MULTILINE,
    )


def on_page_content(html: str, **_: Any) -> str:
    """Keeps each word of code on one line, such as a flag, unless it is long."""

    def whole(found: re.Match[str]) -> str:
        return re.sub(r"(?<!\S)\S{2,40}(?!\S)", r'<span class="whole">\g<0></span>', found[0])

    return re.sub(r"(?<=<code>)[^<]*[-_.][^<]*(?=</code>)", whole, html)
