"""Settings that are one of several kinds: read from flags and files, refused with the nearest."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from pydantic import BeforeValidator, Field, PositiveInt

from tfrs_pipeline.cli.flags import CommandLine, as_typed
from tfrs_pipeline.messages import counted, in_percent, printable
from tfrs_pipeline.negatives.funnel import FunnelLosers
from tfrs_pipeline.settings import Config, ConfigError, Listed, from_text


@dataclass(frozen=True)
class Circle:
    kind: Literal["circle"] = "circle"


@dataclass(frozen=True)
class Box:
    width: PositiveInt = 3
    title: str = ""
    kind: Literal["box"] = "box"


Shape = Annotated[Circle | Box, Field(discriminator="kind"), BeforeValidator(from_text)]


class Figure(Config):
    """Draw."""

    shapes: Listed[Shape] = (Circle(), Box())
    """All of them."""
    frame: Shape | None = None
    """Around them."""


class Page(Config):
    """Print a page."""

    figure: Figure = Figure()
    """What to draw."""


def figure_of(*arguments: str) -> Figure:
    _, given = CommandLine("p", "1", "Prints.", {"page": Page}, {}).read(["page", *arguments])
    return Figure(**{name.removeprefix("figure."): value for name, value in given.items()})


@pytest.mark.parametrize(
    "figure",
    [
        Figure(),
        Figure(shapes=(), frame=Box(width=2)),
        Figure(shapes=(Box(title="a, b={c}"), Circle(), Box(width=9)), frame=Circle()),
    ],
)
def test_kinds_survive_flags_and_dumps(figure: Figure) -> None:
    shapes = [as_typed(shape) for shape in figure.shapes] or ["none"]
    assert figure_of("--figure.shapes", *shapes, "--figure.frame", as_typed(figure.frame)) == figure
    assert Figure(**figure.model_dump()) == Figure(**figure.model_dump(mode="json")) == figure


def test_a_kind_is_read_as_json_too() -> None:
    assert figure_of("--figure.shapes", '{"kind": "box", "title": "a:b"}', "box:width=4") == Figure(
        shapes=(Box(title="a:b"), Box(width=4))
    )


@pytest.mark.parametrize("shape", ["box:width=2", {"kind": "box", "width": 2}, Box(width=2)])
def test_one_kind_may_be_given_alone(shape: Any) -> None:
    assert Figure(shapes=shape) == Figure(shapes=(Box(width=2),))


@pytest.mark.parametrize(
    ("shapes", "problem"),
    [
        (["circel"], ("shapes", "unknown kind 'circel'; did you mean 'circle'?")),
        (["box:widht=4"], ("shapes.0.box.widht", "unknown setting; did you mean 'width'?")),
        (["circle", "box:width=0"], ("shapes.1.box.width", "got '0'; must be greater than 0")),
        ([3], ("shapes", "got 3; must be a table of settings")),
    ],
)
def test_what_is_no_kind_is_refused(shapes: list[Any], problem: tuple[str, str]) -> None:
    with pytest.raises(ConfigError) as raised:
        Figure(shapes=shapes)
    assert raised.value.problems == (problem,)


def test_counts_shares_and_text_from_outside_are_written_in_a_short_line() -> None:
    assert [counted(1, "epoch"), counted(1000, "query")] == ["1 epoch", "1,000 queries"]
    shares = [in_percent(part, 143_609) for part in (0, 67, 71_805)]
    assert shares == ["0.0%", "<0.1%", "50.0%"]
    assert printable("a film\x1b[2J and more", max_chars=11) == r"a film\x1b[2J ..."


@pytest.mark.parametrize(
    ("values", "settings", "named"),
    [
        ((), {"share": 1.5}, "share: got 1.5; must be less than 1"),
        ((1.5,), {}, "share: got 1.5"),
        ((), {"shar": 0.1}, "shar: unknown setting; did you mean 'share'"),
        ((), {"stages": ("clicked",)}, "stages: got 'clicked'"),
        ((), {"stages": "exposed"}, "^stages holds 'exposed'"),
        ((0.1,), {"share": 0.2}, "share"),
    ],
)
def test_a_checked_dataclass_is_refused_as_settings_are(
    values: tuple[Any, ...], settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        FunnelLosers(*values, **settings)
