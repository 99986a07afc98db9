"""The style of all figures: light and dark, safe for colour blindness, names beside the lines.

Colours are those of Okabe and Ito (2008), darkened to stand out on white. A figure is SVG with CSS
variables as colours: a page can set them; elsewhere it is a card, light or dark like the system.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# CSS variable -> its light and its dark colour.
PALETTE = {
    "paper": ("#ffffff", "#14181d"),
    "ink": ("#1c2127", "#e6eaee"),
    "soft": ("#55606b", "#a5b0bb"),
    "line": ("#d9dee3", "#39424c"),
    "series-1": ("#0072b2", "#56b4e9"),
    "series-2": ("#b84a00", "#f0a35e"),
    "series-3": ("#00795a", "#3ccfa0"),
    "series-4": ("#a8487f", "#e59ac6"),
    "series-5": ("#6b5d00", "#d9cb55"),
}
# Unique colours for matplotlib to draw with; `finish` replaces them with the variables.
_STAND_INS = {name: f"#0001{number:02x}" for number, name in enumerate(PALETTE, 1)}
INK, SOFT, GRID, PAPER = (_STAND_INS[name] for name in ("ink", "soft", "line", "paper"))
SERIES = tuple(colour for name, colour in _STAND_INS.items() if name.startswith("series"))
# Distinguishable without colour.
MARKERS = ("o", "s", "^", "D", "v")
LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (9, 3)))
_FONT_SIZE = 9.5
_LINE_HEIGHT = 1.2
_PADDING = 8
_SHORT = re.compile(r"(\d\.\d\d)\d+")  # Less than a hundredth of a point is invisible.


@dataclass(frozen=True)
class Drawing:
    """A finished figure, with a label for screen readers.

    The body is the inside of the SVG, with colours as `var(--name, light colour)`.
    """

    label: str
    view_box: str
    body: str

    def inline(self, name: str) -> str:
        """Returns an SVG element in the page's colours; `name` makes its ids unique."""
        body = re.sub(r"var\((--[\w-]+), #\w+\)", r"var(\1)", self.body)
        body = re.sub(r'\bid="', f'id="{name}-', body)
        body = re.sub(r'(?:xlink:)?(href="#|url\(#)', rf"\g<1>{name}-", body)
        return f'<svg viewBox="{self.view_box}" role="img" aria-label="{self.label}">{body}'

    def card(self) -> str:
        """Returns an SVG document with its own background, light or dark like the system."""
        style = (
            f".card {{ {variables(0)} }} "
            f"@media (prefers-color-scheme: dark) {{ .card {{ {variables(1)} }} }} "
            ".card text { font-family: system-ui, sans-serif !important; fill: var(--ink) }"
        )
        width, height = (float(size) + 2 * _PADDING for size in self.view_box.split()[2:])
        corner = f'x="-{_PADDING}" y="-{_PADDING}" width="{width:g}" height="{height:g}"'
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'class="card" viewBox="-{_PADDING} -{_PADDING} {width:g} {height:g}" '
            f'width="{width:g}pt" height="{height:g}pt" role="img" aria-label="{self.label}">'
            f'<style>{style}</style><rect {corner} rx="6" style="fill: {_variable("paper")}; '
            f'stroke: {_variable("line")}"/>{self.body}'
        )

    def _repr_mimebundle_(self, **options: Any) -> dict[str, str]:
        return {"image/svg+xml": self.card(), "text/plain": self.label}


def variables(scheme: int) -> str:
    """Returns the colours as CSS variables: 0 is light, 1 is dark."""
    return " ".join(f"--{name}: {colours[scheme]};" for name, colours in PALETTE.items())


def _variable(name: str) -> str:
    return f"var(--{name}, {PALETTE[name][0]})"


def new_figure(
    width: float, height: float, columns: int = 1, **options: Any
) -> "tuple[Figure, Sequence[Axes]]":
    """Makes a figure, in inches, with axes side by side; options are those of `Figure.subplots`."""
    from matplotlib.figure import Figure  # Not pyplot: no window, no state.

    figure = Figure(figsize=(width, height), layout="constrained")
    all_axes = figure.subplots(1, columns, squeeze=False, **options)[0]
    for axes in all_axes:
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color(GRID)
        axes.tick_params(which="both", color=GRID, labelcolor=SOFT, labelsize=_FONT_SIZE)
        for text in (axes.xaxis.label, axes.yaxis.label):
            text.set(color=INK, fontsize=_FONT_SIZE)
    return figure, all_axes


def title(axes: "Axes", text: str, align: Literal["left", "center"] = "left") -> None:
    """Writes a title above axes."""
    axes.set_title(text, loc=align, color=INK, fontsize=_FONT_SIZE)


def label_lines(
    axes: "Axes", labels: Mapping[str, tuple[float, float]], colours: Sequence[str]
) -> None:
    """Writes names to the right of points, such as line ends, without overlaps.

    Points are in data coordinates; the axes must have their final scales and limits.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # Lays it out.
    points = axes.transData.transform(list(labels.values())) * 72 / figure.dpi
    heights = spread_apart(points[:, 1], _FONT_SIZE * _LINE_HEIGHT)
    for name, point, height, (_, own_height), colour in zip(
        labels, labels.values(), heights, points, colours, strict=False
    ):
        axes.annotate(
            name,
            point,
            xytext=(6, height - own_height),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=_FONT_SIZE,
            annotation_clip=False,
        )


def spread_apart(heights: np.ndarray, least: float) -> np.ndarray:
    """Moves heights as little as possible until neighbours are `least` apart, in the same order."""
    from scipy.optimize import isotonic_regression

    order = np.argsort(heights, kind="stable")
    # Heights that are `least` apart are non-decreasing after the steps are subtracted.
    steps = least * np.arange(len(heights))
    found = np.empty(len(heights))
    found[order] = isotonic_regression(heights[order] - steps).x + steps
    return found


def finish(figure: "Figure", label: str) -> Drawing:
    """Converts a figure to SVG; the same figure gives the same text."""
    import matplotlib
    from markupsafe import escape

    file = io.StringIO()
    # Text stays text, so that it can be read aloud, found and copied.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "savefig.dpi": 150}):
        figure.savefig(file, format="svg", transparent=True)
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    # Only within tags, because numbers between them are for people.
    text = re.sub(r"<[^>]*>", lambda tag: _SHORT.sub(r"\1", tag[0]), text)
    text = re.sub(r">\s+<", "><", text)  # A notebook quotes and indents each line.
    for variable, colour in [*_STAND_INS.items(), ("ink", "#000000")]:
        text = text.replace(colour, _variable(variable))
    (box,) = re.findall(r'^<svg[^>]*viewBox="([^"]*)"', text)
    return Drawing(str(escape(label)), box, text[text.index(">") + 1 :].rstrip())
