"""Settings that are one of several kinds: read from flags and files, refused with the nearest."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from pydantic import BeforeValidator, Field, PositiveInt

from tfrs_pipeline.cli.flags import CommandLine, as_typed
from tfrs_pipeline.negatives.hard import FunnelLosers
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


def test_a_kind_is_read_as_json_too_and_one_may_be_given_alone() -> None:
    found = figure_of("--figure.shapes", '{"kind": "box", "title": "a:b"}', "box:width=4")
    assert found == Figure(shapes=(Box(title="a:b"), Box(width=4)))
    shape: Any
    for shape in ("box:width=2", {"kind": "box", "width": 2}, Box(width=2)):
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


def test_a_checked_dataclass_is_refused_as_settings_are() -> None:
    wrong: Any = (
        ((1.5,), {}, "share: got 1.5; must be less than 1"),
        ((), {"shar": 0.1}, "shar: unknown setting; did you mean 'share'"),
        ((), {"stages": ("clicked",)}, "stages: got 'clicked'"),
        ((), {"stages": "exposed"}, "^stages holds 'exposed'"),
        ((0.1,), {"share": 0.2}, "share"),
    )
    for values, settings, named in wrong:
        with pytest.raises(ConfigError, match=named):
            FunnelLosers(*values, **settings)
