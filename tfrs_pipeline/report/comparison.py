"""The report of a comparison: reads its folder and renders one self-contained HTML page."""

import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tfrs_pipeline import drawing
from tfrs_pipeline.data.schema import ASKED
from tfrs_pipeline.messages import counted, printable
from tfrs_pipeline.run.folder import COMPARISON_FILE

# More lines in one figure could not be told apart.
_PLANS_PER_FIGURE = 5


def pages() -> jinja2.Environment:
    """Returns the templates of this package."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tfrs_pipeline", "report"),
        autoescape=True,
        finalize=_visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    return environment


def comparison_page(folder: Path) -> str:
    """Renders the page of a comparison from its files; the same files give the same text."""
    found, templates = json.loads((folder / COMPARISON_FILE).read_text()), pages()
    run = templates.get_template("template.html")
    style = "".join(run.blocks["style"](run.new_context()))
    what, first = f"val_{found['monitor']}", str(found["seeds"][0])
    results = {name: of_seed[first] for name, of_seed in found["trainings"].items()}
    validated = [name for name, x in results.items() if what in x["history"]]
    figures = []
    for start in range(0, len(validated), _PLANS_PER_FIGURE):
        names = validated[start : start + _PLANS_PER_FIGURE]
        curves = {name: results[name]["history"][what] for name in names}
        chosen = {name: results[name]["best_epoch"] for name in names}
        drawn = drawing.plot_curves(curves, chosen, f"validation {found['monitor']}")
        figures.append(Markup(drawn.svg))
    return templates.get_template("comparison.html").render(
        folder=str(folder),
        found=found,
        style=Markup(style),
        counted=counted,
        asked=ASKED,
        figure=Markup((folder / "comparison.svg").read_text()),
        curves=figures,
    )


def _visible(value: Any) -> Any:
    """Escapes the control characters of a text, such as an id's, except for line ends and tabs."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "".join(x if x.isprintable() or x in "\n\t" else printable(x) for x in value)
