"""The style of figures: labels that do not overlap, colours that follow the page."""

import re
from xml.etree import ElementTree

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import tfrs_pipeline.drawing as style


def draw() -> style.Drawing:
    figure, (axes,) = style.new_figure(4, 3)
    axes.plot([1, 2], [1, 2], color=style.SERIES[0])
    axes.plot([1, 2], [2, 2.001], color=style.SERIES[1])
    axes.set_yticks([1.85, 1.875, 1.9])
    style.label_lines(axes, {"a < b": (2, 2), "c": (2, 2.001)}, style.SERIES)
    axes.set_title("two", color=style.INK)
    return style.finish(figure, 'Lines "a" & "b"')


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8), st.floats(0.1, 20))
def test_moved_heights_are_apart_in_order_and_nearest(heights: list[float], least: float) -> None:
    given_heights = np.array(heights)
    found = style.spread_apart(given_heights, least)
    order = np.argsort(given_heights, kind="stable")
    assert np.all(np.diff(found[order]) >= least - 1e-9)
    # No other valid heights are nearer: neither these moved up or down, nor an even stack.
    cost = np.sum((found - given_heights) ** 2)
    stack = np.empty(len(heights))
    stack[order] = np.mean(heights) + least * (np.arange(len(heights)) - (len(heights) - 1) / 2)
    for other in (found + 0.01, found - 0.01, stack):
        assert cost <= np.sum((other - given_heights) ** 2) + 1e-6
    if np.all(np.diff(np.sort(given_heights)) >= least):
        np.testing.assert_allclose(found, given_heights, atol=1e-9)


def test_a_figure_follows_its_page_or_is_a_card_of_both_schemes() -> None:
    drawing = draw()
    assert draw() == drawing  # Drawing is deterministic.
    # The numbers of an axis keep their digits.
    assert all(f">{number}</text>" in drawing.body for number in ("1.850", "1.875", "1.900"))
    inline, card = drawing.inline("first"), drawing.card()
    for text in (inline, card):
        root = ElementTree.fromstring(text)
        assert root.attrib["aria-label"] == 'Lines "a" & "b"'
        assert "a < b" in "".join(root.itertext())
    assert not re.search(r"#[0-9a-f]{6}", inline)
    assert set(re.findall(r'\bid="(\w+)-', inline)) == {"first"}
    for light, dark in style.PALETTE.values():
        assert light in card
        assert dark in card
    painted = set(re.findall(r"(?:fill|stroke): ([^;\"}]+)", card))
    assert all(paint == "none" or paint.startswith("var(--") for paint in painted)
    assert drawing._repr_mimebundle_()["image/svg+xml"] == card
