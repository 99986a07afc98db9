"""The style of figures: names in their colours, text that stays text, what they take."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pytest

import tfrs_pipeline.drawing as style
from tfrs_pipeline import Log, MostPopular, Repeats, evaluate
from tfrs_pipeline.model.checkpoints import TrainingResult

CLICKS = {"user_id": [1] * 4 + [2] * 4 + [3] * 3, "item_id": [*"abcd", *"bacd", *"cab"]}
TRAIN, _, TEST = Log.from_table(pa.table(CLICKS)).split("last_n", min_positives=3)


def draw() -> style.Drawing:
    figure, (axes,) = style.new_figure(4, 3)
    axes.plot([1, 2], [1, 2], color=style.SERIES[0], label="a < b")
    axes.plot([1, 2], [2, 2.001], color=style.SERIES[1], label="c")
    axes.set_yticks([1.85, 1.875, 1.9])
    style.name_lines(figure)
    axes.set_title("two", color=style.INK)
    return style.finish(figure, 'Lines "a" & "b"')


def test_a_figure_is_text_with_a_label_that_any_page_can_hold() -> None:
    drawing = draw()
    assert draw() == drawing  # Drawing is deterministic.
    assert drawing._repr_svg_() == drawing.svg
    root = ElementTree.fromstring(drawing.svg)
    assert (root.attrib["role"], root.attrib["aria-label"]) == ("img", 'Lines "a" & "b"')
    # Names have the colours of their lines.
    texts = {x.text: x.attrib["style"] for x in root.iterfind(".//{*}text")}
    for name, colour in zip(("a < b", "c"), style.SERIES, strict=False):
        assert f"fill: {colour}" in texts[name]
    # The numbers of an axis keep their digits.
    assert all(f">{number}</text>" in drawing.svg for number in ("1.850", "1.875", "1.900"))
    # An id depends on what it names, so that figures of one page cannot mix theirs up.
    ids, used = (set(re.findall(x, drawing.svg)) for x in (r'\bid="(.*?)"', r"(?<=#)\w{11}\b"))
    assert ids == used
    assert ids
    other = style.finish(style.new_figure(4, 3)[0], "Other")
    assert not ids & set(re.findall(r'\bid="(.*?)"', other.svg))


def test_a_figure_is_saved_as_svg(tmp_path: Path) -> None:
    drawing = draw()
    drawing.save(tmp_path / "two.svg")
    assert (tmp_path / "two.svg").read_text(encoding="utf-8") == drawing.svg
    with pytest.raises(ValueError, match=r"give a path NAME.svg. Received: .*two.png"):
        drawing.save(tmp_path / "two.png")
    assert not (tmp_path / "two.png").exists()


def test_figures_take_results_as_they_are() -> None:
    """They draw what is drawn from the numbers, taken out by hand."""
    found = evaluate(
        {"a": MostPopular().fit(TRAIN), "b": Repeats().fit(TRAIN)}, TEST, cutoffs=[1, 2]
    )
    for metric, part in (("ndcg@2", None), ("recall@1", None), ("tail/recall@2", "tail")):
        means: dict[str, Any] = {}
        for name, result in found.results.items():
            of_part = result.overall if part is None else result.slices[part]
            means[name] = of_part.intervals[metric.rpartition("/")[2]].as_dict()
        drawn = style.plot_intervals({metric: means}, metric)
        assert style.plot_intervals(found, metric) == drawn
        assert style.plot_intervals(found.results, metric) == drawn
        assert style.plot_intervals({"a": found.first}, metric) != drawn
    assert style.plot_intervals(found) == style.plot_intervals(found, "ndcg@2")
    both = style.plot_intervals(found, ["ndcg@2", "recall@1"])
    assert "ndcg@2, recall@1 of each model" in both.label


def test_curves_take_fitted_models() -> None:
    values = {"a": [0.1, 0.3, 0.2], "b": [0.2, 0.1, 0.4]}
    chosen = {"a": 2, "b": 3}
    models = {
        name: SimpleNamespace(
            result=TrainingResult({"loss": [3, 2, 1], "val_ndcg@2": curve}, chosen[name], 1.0)
        )
        for name, curve in values.items()
    }
    assert style.plot_curves(models) == style.plot_curves(values, chosen, "val_ndcg@2")
    loss = {name: [3, 2, 1] for name in values}
    assert style.plot_curves(models, what="loss") == style.plot_curves(loss, chosen, "loss")
    alone = style.plot_curves({"model": values["a"]}, {"model": 2}, "val_ndcg@2")
    assert style.plot_curves(models["a"]) == alone


@pytest.mark.parametrize(
    ("draw", "arguments", "message"),
    [
        (style.plot_intervals, [3, "ndcg@2"], "takes what evaluate returns.*'ndcg@2' of int"),
        (style.plot_intervals, [{}, "ndcg@2"], "Received: 'ndcg@2' of dict"),
        (style.plot_intervals, [{"a": 3}, "ndcg@2"], "Received: 'ndcg@2' of dict"),
        (style.plot_intervals, [{"p": {"a": {"mean": 1}}}], "and a name. Received: None of dict"),
        (style.plot_curves, [{"a": [1, 2]}], "takes fitted models.*dict of a, None"),
        (style.plot_curves, [3], "takes fitted models"),
        (style.plot_curves, [{}], "takes fitted models"),
    ],
)
def test_a_figure_says_what_it_draws(draw: Any, arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        draw(*arguments)


def test_a_figure_names_metrics_if_it_does_not_know_one() -> None:
    found = evaluate(MostPopular().fit(TRAIN), TEST, cutoffs=[1, 2])
    for unknown in ("ndcg@3", "middle/recall@2", "coverage@1"):
        with pytest.raises(TypeError, match=rf"such as 'ndcg@100' .*Received: '{unknown}' of Eval"):
            style.plot_intervals(found, unknown)
