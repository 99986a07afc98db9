"""The report of a run: its numbers, and what a page from anyone's data must not do."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfrs_pipeline.config import RunConfig, dump_config, main_job_config, with_settings
from tfrs_pipeline.data.schema import Dropped
from tfrs_pipeline.report import page as report
from tfrs_pipeline.report.figures import thinned
from tfrs_pipeline.report.page import Popularity, RunFacts, report_page

CUTOFFS = (20, 100)
EVIL = "<script>alert(1)</script>"
VOID = {"meta", "br", "img", "link", "input"}


@dataclass
class Table:
    """A table of the page: texts of its header, and per row texts and full values of the cells."""

    header: list[str] = field(default_factory=list)
    rows: dict[str, list[tuple[str, float | None, bool]]] = field(default_factory=dict)


class Page(HTMLParser):
    """Reads a page as a browser would: elements with attributes, tables by caption, all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.headings: list[str] = []
        self.tables: dict[str, Table] = {}
        self._open: list[str] = []
        self._row: list[tuple[str, float | None, bool]] = []
        self._name = self._cell = ""
        self._value: float | None = None
        self._is_strong = False
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag in ("td", "th"):
            self._cell, self._value, self._is_strong = "", None, False
        elif tag == "tr":
            self._row = []
        elif tag == "data":
            self._value = float(dict(attrs)["value"] or "nan")
        elif tag == "strong":
            self._is_strong = True
        elif tag in ("caption", "h2"):
            self._cell = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "caption":
            self._name = self._cell
            assert self._name not in self.tables
            self.tables[self._name] = Table()
        elif tag in ("td", "th"):
            self._row.append((self._cell, self._value, self._is_strong))
        elif tag == "h2":
            self.headings.append(self._cell)
        elif tag == "tr":
            table = self.tables[self._name]
            if not table.header:
                table.header = [text for text, _, _ in self._row]
            else:
                table.rows[self._row[0][0]] = self._row[1:]

    def handle_data(self, data: str) -> None:
        self.text += data
        # What stands small below a number is no part of it.
        if "small" not in self._open:
            self._cell += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def interval(rng: np.random.Generator, centre: float | None = None) -> dict[str, float | None]:
    mean = rng.random() if centre is None else centre
    return {"mean": mean, "low": mean - 0.01 * rng.random(), "high": mean + 0.01 * rng.random()}


def summary(rng: np.random.Generator, *, is_slice: bool = False) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        f"{name}@{k}": interval(rng) for name in ("recall", "hit_rate", "ndcg", "mrr")
        for k in CUTOFFS
    }  # fmt: skip
    numbers |= {f"{name}@{k}": rng.random() for name in ("coverage", "gini") for k in CUTOFFS}
    numbers |= {f"average_popularity@{k}": 100 * rng.random() for k in CUTOFFS}
    numbers |= {"num_candidates": 4000, "num_queries": 1234, "num_relevant": 5678}
    if not is_slice:
        numbers |= {"num_skipped": 7, "num_relevant_excluded": 0, "num_relevant_unknown": 0}
        numbers["slices"] = {
            part: summary(rng, is_slice=True) for part in ("head", "torso", "tail")
        }
    return numbers


def make_metrics(rng: np.random.Generator) -> dict[str, Any]:
    names = ("two_tower", "two_tower_uncorrected", "popularity")
    history = {"loss": [5.0, 4.0, 3.5], "val_ndcg@100": [0.1, 0.3, 0.2]}
    return {
        "dataset": "films",
        "split": {
            "train": {"num_events": 9000, "num_positives": 5000, "num_users": 300},
            "test": {"num_events": 2000, "num_positives": 1000, "num_users": 299},
            "num_users_dropped": 3,
            "num_events_dropped": 11,
        },
        "models": {name: summary(rng) for name in names},
        "training": {
            "two_tower": {"best_epoch": 2, "history": history},
            "two_tower_uncorrected": {"best_epoch": 1, "history": {k: v[:2] for k, v in
                                                                   history.items()}},
        },
        "differences": {
            "two_tower_uncorrected": {"ndcg@100": {"mean": 0.02, "low": 0.01, "high": 0.03}},
            "popularity": {"ndcg@100": {"mean": 0.02, "low": -0.01, "high": 0.05}},
        },
        "examples": [
            {
                "user_id": "ann",
                "num_history": 12,
                "history": [3, 4],
                "recommended": [5, 6],
                "num_relevant": 9,
                "found": [6],
            }
        ],
        "versions": {"tensorflow": "2.20.0"},
        "index": {"kind": "scann", "index_recall@100": 0.98765, "settings": {"num_leaves": 41}},
        "notes": {"data": ["dropped nothing"], "evaluate": []},
        "seconds": {"data": 1.25, "train two_tower": 8.5},
    }  # fmt: skip


def make_facts(**changed: Any) -> RunFacts:
    rng = np.random.default_rng(3)
    counts = np.sort(rng.zipf(1.5, 400).clip(max=5000) - 1)[::-1]
    share = counts / counts.sum()
    facts = RunFacts(
        folder="runs/films-1",
        config=main_job_config(),
        metrics=make_metrics(rng),
        table_sizes={"events": 11_011, "items": 400, "users": 302},
        dropped=(Dropped("item is not in the item table", 17),),
        events_by_stage={"exposed": {"train": 4000, "test": 1000}, "clicked": {"train": 5000,
                                                                              "left out": 11}},
        items_by_part={"train": 390, "test": 311},
        samples={
            "num_samples": 5000,
            "num_candidates": 400,
            "num_known_positives": 4900,
            "num_exposed": 3900,
        },
        masked_shares={"accidental hits": 0.001, "known positives": 0.2, "exposed items": 0.05},
        mean_hard_share=0.0,
        popularity=Popularity(
            counts, share, share, {"uniform": np.full(400, 1 / 400)}, num_unreachable=0
        ),
        titles={3: "Fargo", 6: "Men in Black"},
    )  # fmt: skip
    return dataclasses.replace(facts, **changed)


FACTS = make_facts()


def page_of(**changed: Any) -> Page:
    return Page(report_page(dataclasses.replace(FACTS, **changed)))


PAGE = page_of()


# Numbers


def assert_shows(cell: tuple[str, float | None, bool], value: float, form: str) -> None:
    assert cell[:2] == (format(value, form), value)


def test_every_metric_of_every_model_is_that_of_metrics_json() -> None:
    table = PAGE.tables["Metrics"]
    models = FACTS.metrics["models"]
    assert table.header == ["metric", *models]
    in_summary = {name for name in models["two_tower"] if "@" in name}
    assert set(table.rows) == in_summary
    for name, cells in table.rows.items():
        for model, cell in zip(models.values(), cells, strict=True):
            if isinstance(model[name], Mapping):
                assert_shows(cell, model[name]["mean"], ".4f")
            else:
                assert_shows(cell, model[name], ".1f" if "popularity" in name else ".4f")


def test_intervals_stand_below_their_means() -> None:
    for model in FACTS.metrics["models"].values():
        for part in (model, *model["slices"].values()):
            bounds = part["ndcg@100"]
            assert f"{bounds['low']:.4f} to {bounds['high']:.4f}" in PAGE.text


def test_the_best_of_a_row_is_bold_and_no_other() -> None:
    models = FACTS.metrics["models"]
    for name, cells in PAGE.tables["Metrics"].rows.items():
        strong = [is_strong for _, _, is_strong in cells]
        if name.startswith(("coverage", "gini", "average")):  # More is not better.
            assert not any(strong)
        else:
            means = [model[name]["mean"] for model in models.values()]
            assert strong == [mean == max(means) for mean in means]


def test_a_difference_is_bold_where_its_interval_leaves_out_zero() -> None:
    table = PAGE.tables["Differences"]
    assert table.header[1:] == ["two_tower_uncorrected", "popularity"]
    assert table.rows["ndcg@100"] == [("+0.0200", 0.02, True), ("+0.0200", 0.02, False)]


def test_slices_show_every_model() -> None:
    rows = PAGE.tables["Metrics by slice"].rows
    for part in ("head", "torso", "tail"):
        for metric in ("recall@100", "ndcg@100"):
            cells = rows[f"{part}, {metric}"]
            for model, cell in zip(FACTS.metrics["models"].values(), cells, strict=True):
                assert_shows(cell, model["slices"][part][metric]["mean"], ".4f")


def test_the_chosen_epoch_is_shown_with_its_own_numbers() -> None:
    rows = PAGE.tables["Chosen epochs"].rows
    assert [value for _, value, _ in rows["two_tower"]] == [2, 3, 0.3, 4.0]
    assert [value for _, value, _ in rows["two_tower_uncorrected"]] == [1, 2, 0.3, 5.0]


def test_data_funnel_and_times_are_counted_out() -> None:
    assert [v for _, v, _ in PAGE.tables["Split"].rows["train"]] == [9000, 5000, 300, 390]
    dropped = PAGE.tables["Dropped"].rows
    assert dropped["item is not in the item table"] == [("17", 17, False)]
    assert dropped["left out by the split last_share: events"][0][1] == 11
    stages = PAGE.tables["Events by stage"]
    assert stages.header == ["stage", "events", "train", "test", "left out"]
    assert list(stages.rows) == ["exposed", "clicked"]
    assert [v for _, v, _ in stages.rows["clicked"]] == [5011, 5000, 0, 11]
    assert PAGE.tables["Left out of the shared columns"].rows["known positives"][0][0] == "20.00%"
    times = PAGE.tables["Times"].rows
    assert times["train two_tower"] == [("8.5 s", 8.5, False)]
    assert times["in all"][0][1] == 9.75


def test_shares_by_slice_are_what_a_loop_adds_up() -> None:
    counts, uniform = FACTS.popularity.counts, FACTS.popularity.samplers["uniform"]
    sums = {"head": [0, 0.0, 0.0], "torso": [0, 0.0, 0.0], "tail": [0, 0.0, 0.0]}
    held = 0
    for count, probability in zip(counts, uniform, strict=True):  # By falling count already.
        share = held / counts.sum()
        part = sums["head" if share < 0.5 else "torso" if share < 0.8 else "tail"]
        part[0] += 1
        part[1] += count / counts.sum()
        part[2] += probability
        held += count
    for name, cells in PAGE.tables["Shares by slice"].rows.items():
        assert [value for _, value, _ in cells] == pytest.approx(sums[name])


def test_positives_as_trained_on_are_shown_where_they_differ() -> None:
    flat = np.full(400, 1 / 400)
    changed = page_of(popularity=dataclasses.replace(FACTS.popularity, after=flat))
    header = changed.tables["Shares by slice"].header
    assert header[2:4] == ["positives, as logged", "positives, as trained on"]
    assert "positives, as trained on" not in PAGE.tables["Shares by slice"].header
    assert len(changed.of("svg")) == len(PAGE.of("svg")) + 1


def test_hard_negatives_are_shown_with_what_was_refused() -> None:
    hard = {
        "hard_negatives": {"retrieved": {"num_samples": 2500, "mean_pool": 12.25}},
        "hard_negatives_removed": {"exposed to the user": 77},
    }
    config = RunConfig(
        data={"source": "events", "path": "log.parquet"}, samples={"hard_share": 0.05}
    )
    page = page_of(samples={**FACTS.samples, **hard}, config=config, mean_hard_share=0.0251)
    cells = page.tables["Pools"].rows["retrieved"]
    assert [text for text, _, _ in cells] == ["2,500", "50.0%", "12.2"]
    assert page.tables["Masked"].rows["never a hard negative: exposed to the user"][0][1] == 77
    assert "0.0251" in page.text
    assert "mined" not in page.text.partition("Settings")[0]
    mined = page_of(config=config, mean_hard_share=None)
    assert "mined from the model" in mined.text
    assert "Pools" not in mined.tables
    assert "No hard negatives" in PAGE.text
    assert "Pools" not in PAGE.tables


def test_what_is_not_masked_is_not_said_to_be() -> None:
    changed = {"samples.mask_exposed": False, "samples.allow_exposed_as_negatives": True}
    page = page_of(config=with_settings(FACTS.config, changed))
    assert "This run allows them all the same" in page.text
    names = list(page.tables["Masked"].rows)
    assert names == [
        "known positive of the user",
        "exposed to the user, not clicked (not masked: samples.mask_exposed is off)",
    ]


def test_the_index_and_its_frontier() -> None:
    rows = PAGE.tables["Kind and settings"].rows
    assert rows["kind"][0][0] == "scann"
    assert rows["index_recall@100, against exact search"] == [("0.9877", 0.98765, False)]
    assert "Frontier" not in PAGE.tables
    points = [{"num_leaves_to_search": n, "index_recall@100": 1 - 1 / n, "latency_ms": 0.1 * n}
              for n in (4, 8)]  # fmt: skip
    index = {**FACTS.metrics["index"], "frontier": points}
    page = page_of(metrics={**FACTS.metrics, "index": index})
    assert page.tables["Frontier"].rows["8"][0][1] == 0.875
    assert len(page.of("svg")) == len(PAGE.of("svg")) + 1


def test_recommendations_stand_with_titles_and_what_was_clicked() -> None:
    text = " ".join(PAGE.text.split())
    assert "User ann" in text
    assert "Clicked before (latest 2 of 12)" in text
    assert "Fargo 3" in text
    assert "Men in Black 6 ✓ clicked" in text
    assert text.count("✓") == 1
    assert "Among these: 1 of the 9 " in text


def test_settings_come_out_whole() -> None:
    assert dump_config(FACTS.config) in PAGE.text


# What is missing


def test_sections_without_content_are_left_out_of_the_contents_too() -> None:
    metrics = {name: value for name, value in FACTS.metrics.items()
               if name not in ("differences", "examples", "versions")}  # fmt: skip
    page = page_of(metrics=metrics)
    assert set(PAGE.headings) - set(page.headings) == {"Recommendations", "Versions"}
    assert "Differences" not in page.tables


def test_what_was_not_measured_is_a_dash() -> None:
    nothing = {"mean": None, "low": None, "high": None}
    models = {name: {**model, "slices": dict(model["slices"])}
              for name, model in FACTS.metrics["models"].items()}  # fmt: skip
    for model in models.values():
        model["slices"]["tail"] = {**model["slices"]["tail"], "recall@100": nothing}
    models["popularity"]["average_popularity@20"] = None
    models["popularity"]["ndcg@100"] = {"mean": 0.5, "low": None, "high": None}
    page = page_of(metrics={**FACTS.metrics, "models": models})
    assert page.tables["Metrics by slice"].rows["tail, recall@100"] == [("-", None, False)] * 3
    assert page.tables["Metrics"].rows["average_popularity@20"][2][0] == "-"
    assert page.tables["Metrics"].rows["ndcg@100"][2][:2] == ("0.5000", 0.5)


# A page that anyone's data may fill


def evil_facts() -> RunFacts:
    example = {**FACTS.metrics["examples"][0], "user_id": f'"{EVIL}', "recommended": [EVIL, 6]}
    metrics = {
        **FACTS.metrics,
        "examples": [example],
        "notes": {"data": [EVIL]},
        "versions": {EVIL: EVIL},
    }
    config = with_settings(
        RunConfig(data={"source": "clicks", "path": f"/a/{EVIL}.csv"}),
        {"data.columns": {"user_id": EVIL}, "export.name": "films"},
    )
    return make_facts(
        metrics=metrics,
        folder=f'runs/"{EVIL}',
        dropped=(Dropped(EVIL, 1),),
        titles={3: f"{EVIL} &amp; {{title}}", 6: '"><img src=x onerror=alert(1)>'},
        config=config,
    )


def test_what_users_write_stays_text() -> None:
    page = Page(report_page(evil_facts()))
    assert [tag for tag, _ in page.elements if tag in ("script", "img")] == []
    for shown in (
        f'User "{EVIL}',
        f'in runs/"{EVIL}',
        f"{EVIL} &amp; {{title}}",
        '"><img src=x onerror=alert(1)>',
        f"from /a/{EVIL}.csv",
        f'user_id = "{EVIL}"',
    ):
        assert shown in page.text
    assert EVIL in page.tables["Dropped"].rows
    # Text as well as elements: nothing that an event handler could hang on.
    assert not [name for _, found in page.elements for name in found if name.startswith("on")]


def test_the_page_asks_nothing_of_the_network() -> None:
    text = report_page(FACTS)
    assert "//" not in re.sub(r"data:[^\"')]*", "", text)
    for tag, attributes in PAGE.elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action", "srcset"):
                assert (value or "").startswith("#")
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    (policy,) = (m["content"] for m in PAGE.of("meta") if "http-equiv" in m)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_ids_are_unique_and_what_points_at_one_finds_it() -> None:
    ids = [attributes["id"] for _, attributes in PAGE.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    text = report_page(FACTS)
    targets = re.findall(r'href="#([^"]*)"', text) + re.findall(r"url\(#([^)]*)\)", text)
    assert targets
    assert set(targets) <= set(ids)


def test_the_page_can_be_read_aloud_and_moved_through() -> None:
    assert PAGE.of("html")[0]["lang"] == "en"
    assert len(PAGE.of("h1")) == len(PAGE.of("main")) == len(PAGE.of("title")) == 1
    assert PAGE.headings == list(report._SECTIONS)
    links = [attributes["href"] for attributes in PAGE.of("a")]
    assert links == [f"#{attributes['id']}" for attributes in PAGE.of("section")]
    figures = PAGE.of("svg")
    assert len(figures) == 7
    assert all(figure["role"] == "img" and figure["aria-label"] for figure in figures)
    boxes = [a for a in PAGE.of("div") if a.get("class") == "scroll"]
    assert len(boxes) == len(PAGE.tables)
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)


def test_the_same_facts_give_the_same_page() -> None:
    assert report_page(FACTS) == report_page(make_facts())


# Colours


def test_figures_have_no_colour_of_their_own() -> None:
    figures = re.findall(r"<svg.*?</svg>", report_page(FACTS), flags=re.DOTALL)
    for figure in figures:
        assert not re.search(r"#[0-9a-f]{6}\b", figure)
        painted = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", figure))
        assert all(paint == "none" or paint.startswith("var(--") for paint in painted), painted
        # An element without a fill is black.
        assert len(re.findall(r"<text", figure)) == len(re.findall(r"<text[^>]*fill: var", figure))


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """The contrast ratio of WCAG 2."""
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_in_light_and_dark(scheme: str) -> None:
    light, dark = re.findall(r":root \{(.*?)\}", report._STYLE, flags=re.DOTALL)
    found = re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light if scheme == "light" else dark)
    colours = dict(found)
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for name in ("ink", "soft", "link", "good"):
        assert contrast(colours[name], colours["paper"]) >= 4.5
    for name in ("ink", "soft"):
        assert contrast(colours[name], colours["wash"]) >= 4.5
    for number in range(1, 6):
        assert contrast(colours[f"series-{number}"], colours["paper"]) >= 3


# Curves


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=3000))
def test_thinning_a_curve_keeps_its_sum_and_the_first_ranks(values: list[int]) -> None:
    ranks, means = thinned(np.array(values))
    assert len(ranks) <= 150
    assert np.all(np.diff(ranks) > 0)
    assert ranks[0] == 1
    assert ranks[-1] <= len(values)
    assert means[0] == values[0]
    # The width of a group, from its geometric middle and where it starts.
    start, total = 1, 0.0
    for rank, mean in zip(ranks, means, strict=True):
        stop = round(rank**2 / start)
        total += mean * (stop - start + 1)
        start = stop + 1
    assert start == len(values) + 1
    assert total == pytest.approx(sum(values))
