"""The report of a run: its numbers, and what a page made from anyone's data must not do."""

import dataclasses
import re
from importlib.resources import files
from typing import Any, TypeAlias
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfrs_pipeline import drawing
from tfrs_pipeline.config import RunConfig, dump_config, movielens_config, with_settings
from tfrs_pipeline.data.schema import Dropped
from tfrs_pipeline.drawing import INK, SERIES, SOFT, thinned
from tfrs_pipeline.evaluation.metrics import PLAIN
from tfrs_pipeline.negatives.samplers import FunnelLosers
from tfrs_pipeline.report.facts import RunFacts, report_page

CUTOFFS = (20, 100)
QUERY_METRICS = [metric.name for metric in PLAIN]
SET_METRICS = ("coverage", "average_popularity")
EVIL = "<script>alert(1)</script>"
Cell: TypeAlias = tuple[str, float | None, bool]
"""What is shown, its full value, and whether it is bold."""


class Page:
    """Reads a page, which must also be well-formed XML.

    tables: caption -> first cell of a row -> its other cells; headers: caption -> texts.
    """

    def __init__(self, text: str) -> None:
        self.tree = ElementTree.fromstring(text)
        self.text = "".join(self.tree.itertext())
        self.joined = self.text.replace("\n", "")
        self.headings = [element.text for element in self.tree.iter("h2")]
        self.tables: dict[str, dict[str, list[Cell]]] = {}
        self.headers: dict[str, list[str]] = {}
        for table in self.tree.iter("table"):
            caption = table.findtext("caption", "")
            header, *rows = [list(map(read_cell, row)) for row in table.iter("tr")]
            assert caption not in self.tables
            self.headers[caption] = [shown for shown, _, _ in header]
            self.tables[caption] = {first[0]: rest for first, *rest in rows}

    def values(self, caption: str, row: str) -> list[float | None]:
        return [value for _, value, _ in self.tables[caption][row]]

    def of(self, tag: str) -> list[dict[str, str]]:
        return [element.attrib for element in self.tree.iterfind(f".//{{*}}{tag}")]


def read_cell(cell: ElementTree.Element) -> Cell:
    data = cell.find(".//data")
    if data is None:
        return "".join(cell.itertext()).strip(), None, False
    # The small print below a number is not part of it.
    return data.text or "", float(data.attrib["value"]), cell.find("strong") is not None


def around(mean: float, half: float = 0.01) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def summary(rng: np.random.Generator) -> dict[str, Any]:
    counts = {"num_candidates": 4000, "num_queries": 1234, "num_relevant": 5678, "num_skipped": 7}
    counts |= {"num_relevant_excluded": 1372, "num_sampled_from": 98765}
    counts |= {"num_empty_histories": 12, "num_relevant_unclicked": 34}

    def numbers() -> dict[str, Any]:
        means = {f"{name}@{k}": around(rng.random()) for name in QUERY_METRICS for k in CUTOFFS}
        return means | {f"{x}@{k}": rng.random() for x in SET_METRICS for k in CUTOFFS} | counts

    return {**numbers(), "slices": {part: numbers() for part in ("head", "torso", "tail")}}


def differences(half: float) -> dict[str, Any]:
    parts = ("head/", "torso/", "tail/", "")
    return {"ndcg@100": around(0.02, half), **{f"{part}recall@100": around(0.02) for part in parts}}


def make_metrics(rng: np.random.Generator) -> dict[str, Any]:
    names = ("two_tower", "two_tower_uncorrected", "popularity")
    history = {"loss": [5.0, 4.0, 3.5], "val_ndcg@100": [0.1, 0.3, 0.2]}
    short = {"loss": [5.0, 4.0], "val_ndcg@100": [0.3, 0.2]}
    compared = {"two_tower_uncorrected": differences(0.01), "popularity": differences(0.03)}
    return {
        "dataset": "films",
        "date": "2026-11-26T06:33:15+00:00",
        "split": {
            "train": {"num_events": 9000, "num_positives": 5000, "num_users": 300},
            "test": {"num_events": 2000, "num_positives": 1000, "num_users": 299},
            "num_users_dropped": 3, "num_events_dropped": 11
        },
        "asked_by": "requests",
        "models": {name: summary(rng) for name in names},
        "other": {"asked_by": "users", "models": {name: summary(rng) for name in names},
                  "differences": compared | {"popularity": differences(0.01)}},
        "export_folder": "/srv/saved_models/films/3",
        "training": {"two_tower": {"best_epoch": 2, "history": history},
                     "two_tower_uncorrected": {"best_epoch": 1, "history": short}},
        "differences": compared,
        "examples": [{"user_id": "ann", "num_history": 12, "history": [3, 4], "found": [6],
                      "recommended": [5, 6], "num_relevant": 9}],
        "versions": {"tensorflow": "2.20.0"},
        "index": {"kind": "scann", "target_recall": 0.98, "num_leaves": 41},
        "notes": {"data": ["dropped nothing"], "evaluate": []},
        "seconds": {"data": 1.25, "train two_tower": 8.5}
    }  # fmt: skip


def make_facts() -> RunFacts:
    rng = np.random.default_rng(3)
    counts = np.sort(rng.zipf(1.5, 400).clip(max=5000) - 1)[::-1]
    return RunFacts(
        folder="runs/films-1",
        config=movielens_config(),
        metrics=make_metrics(rng),
        table_sizes={"events": 11_011, "items": 400, "users": 302},
        dropped=(Dropped("item is not in the item table", 17),),
        log_notes=("item table: column 'year' is missing in 1 of 400 rows (0.2%)",),
        events_by_stage={"exposed": 5000, "clicked": 5011},
        samples={"num_samples": 5000, "num_candidates": 400, "num_known_positives": 4900,
                 "num_exposed": 3900},
        counts=counts,
        titles={3: "Fargo", 6: "Men in Black"}
    )  # fmt: skip


FACTS = make_facts()
TEXT = report_page(FACTS)
PAGE = Page(TEXT)
MODELS, TRAINING = FACTS.metrics["models"], FACTS.metrics["training"]
LOSERS = FunnelLosers(0.05, stages=("retrieved", "exposed"), allow_exposed=True)
HARD = RunConfig(data={"path": "log.parquet"}, model={"hard": LOSERS})


def page_of(**changed: Any) -> Page:
    """Makes a page without figures: drawing them takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "finish", lambda figure, label: drawing.Drawing(label, "<svg/>"))
        return Page(report_page(dataclasses.replace(FACTS, **changed)))


def test_every_metric_of_every_model_is_that_of_metrics_json() -> None:
    table = PAGE.tables["All metrics, by request"]
    assert PAGE.headers["All metrics, by request"] == ["metric", *MODELS]
    assert set(table) == {name for name in MODELS["two_tower"] if "@" in name}
    text = " ".join(PAGE.text.split())
    assert "1,234 queries (sampled from 98,765)" in text
    assert "1,372 relevant items of the test fell under that and are not to be found" in text
    for part in ("head", "torso", "tail"):
        for metric in ("recall@100", "ndcg@100"):
            values = [model["slices"][part][metric]["mean"] for model in MODELS.values()]
            assert PAGE.values("Metrics by slice", f"{part}, {metric}") == values
    for name, cells in table.items():
        measured = [model[name] for model in MODELS.values()]
        if name.startswith(("coverage", "average")):  # More is not better: none is bold.
            form = ".1f" if "popularity" in name else ".4f"
            assert cells == [(format(value, form), value, False) for value in measured]
        else:
            means = [x["mean"] for x in measured]
            assert cells == [(format(mean, ".4f"), mean, mean == max(means)) for mean in means]
            for x in measured:
                assert f"{x['low']:.4f} to {x['high']:.4f}" in PAGE.text


def test_the_question_that_decides_comes_first_and_the_other_is_folded() -> None:
    folded = "".join("".join(element.itertext()) for element in PAGE.tree.iter("details"))
    other, few = FACTS.metrics["other"]["models"], ["ndcg@100", "recall@100", "coverage@20"]
    assert list(PAGE.tables["Metrics, by request"]) == few
    assert "Metrics, by request" not in folded
    for shown, name, of in (("All metrics", "by request", MODELS), ("Metrics", "by user", other)):
        for metric in ("mrr@20", "coverage@100"):
            expected = [
                x[metric] if "coverage" in metric else x[metric]["mean"] for x in of.values()
            ]
            assert PAGE.values(f"{shown}, {name}", metric) == expected
    # Popularity ties with the model by request, which decides, and beats it by user.
    assert [x[2] for x in PAGE.tables["Differences, by user"]["ndcg@100"]] == [True, True]
    assert "Asked by request, is it better than the baselines?A tie" in PAGE.joined
    assert "But no, by user, in ndcg@100 it is behind the best baseline, popularity" in PAGE.joined
    alone = page_of(metrics={**FACTS.metrics, "other": {"left_out": "it is the same"}})
    assert "Asked by request alone: it is the same." in alone.text
    assert not [caption for caption in alone.tables if "user" in caption]


def test_a_difference_is_bold_where_its_interval_excludes_zero() -> None:
    assert PAGE.headers["Differences, by request"][1:] == ["two_tower_uncorrected", "popularity"]
    # The model minus the others, as in the verdict.
    found = PAGE.tables["Differences, by request"]["ndcg@100"]
    assert found == [("-0.0200", -0.02, True), ("-0.0200", -0.02, False)]
    assert "-0.0300 to -0.0100" in PAGE.text


def test_training_data_and_times_are_counted_out() -> None:
    assert PAGE.values("Chosen epochs", "two_tower") == [2, 3, 0.3, 4.0]
    assert PAGE.values("Chosen epochs", "two_tower_uncorrected") == [1, 2, 0.3, 5.0]
    assert PAGE.values("Split", "train") == [9000, 5000, 300]
    assert PAGE.tables["Dropped"]["item is not in the item table"] == [("17", 17, False)]
    assert PAGE.values("Dropped", "by the split last_share: events") == [11]
    # "exposed" counts all shown events, of which "clicked" is a part.
    assert list(PAGE.tables["Events by stage"]) == ["exposed", "clicked"]
    assert PAGE.values("Events by stage", "exposed") == [10_011, None, 5000]
    assert PAGE.values("Events by stage", "clicked") == [5011, 5011 / 10_011, 5011]
    assert PAGE.tables["Times"]["train two_tower"] == [("8.5 s", 8.5, False)]
    assert PAGE.values("Times", "in all") == [9.75]
    assert dump_config(FACTS.config) in PAGE.text
    text = " ".join(PAGE.text.split())
    for line in ("before (latest 2 of 12)", "Fargo 3", "Men in Black 6 ✓ clicked", "1 of the 9"):
        assert line in text
    assert text.count("✓") == 1


def test_the_first_screen_answers_five_questions() -> None:
    answered = ["better than the baselines?", "For whom?", "What was dropped?", "in service?"]
    answered += ["index lose?"]
    assert all(map(str.endswith, map(str, PAGE.headings), answered))
    first, _, _ = PAGE.joined.partition("Recommendations")
    assert "run of 2026-11-26 06:33 UTC" in first
    assert "it ties with the best baseline, popularity" in first
    # 17 events were dropped while reading and 11 by the split, of 11,011 in the table plus 17.
    assert "What was dropped?28 of 11,028 events, 1,372 of 7,050 test items" in first
    assert "1,372 test items not asked for: the ranking excludes what its user had clicked" in first
    assert "7 of 1,241 test queries not asked" in first
    assert "column 'year' is missing in 1 of 400 rows" in first
    dropped = tuple(Dropped(f"reason {num}", num) for num in range(1, 7))
    first, _, _ = page_of(dropped=dropped).joined.partition("Recommendations")
    assert "What was dropped?32 of 11,032 events" in first  # 21 of them while reading.
    assert all(f"{each.num_rows}: {each.reason}" in first for each in dropped)
    assert "Is it in service?ExportedAs /srv/saved_models/films/3." in PAGE.joined
    # Without a lost event or item, nothing was dropped; an item that is not asked for is something.
    split = FACTS.metrics["split"] | {"num_events_dropped": 0}
    kept = {**FACTS.metrics, "split": split}
    first, _, _ = page_of(metrics=kept, dropped=()).joined.partition("Recommendations")
    assert "What was dropped?No event, 1,372 of 7,050 test items" in first
    asked = {name: {**x, "num_relevant_excluded": 0} for name, x in MODELS.items()}
    first, _, _ = page_of(metrics={**kept, "models": asked}, dropped=()).joined.partition("Recomm")
    assert "What was dropped?Nothing" in first
    refused: dict[str, Any] = {
        "export_folder": None,
        "refusal": "A baseline beats the new model. EASE is.",
    }
    refused |= {"index": {"kind": "none"}}
    page = page_of(metrics={**FACTS.metrics, **refused})
    assert "Is it in service?Not exportedA baseline beats the new model. EASE is." in page.joined
    # Without an index, there is nothing to say about one.
    assert not [x for x in page.headings if "ndex" in (x or "")]
    # Merged events are not called dropped.
    page = page_of(dropped=(Dropped("a reason", 5), Dropped("into another", 7, is_merged=True)))
    first, _, _ = page.joined.partition("Recommendations")
    assert "What was dropped?16 of 11,023 events" in first  # 11 of them by the split.
    assert "7 merged into another" in first


def test_hard_negatives_and_a_tuned_index_have_their_places() -> None:
    requests: list[Any] = [{"k": 10, "excluded": 100, "recall": 0.98765}]
    requests.append({"k": 1000, "excluded": "known", "recall": 0.99})
    level = {"depth": 128, "num_leaves_to_search": 9, "num_reordered": 256}
    tuned = {"levels": [level], "requests": requests}
    hard = {"retrieved": {"num_samples": 2500, "mean_pool": 12.25}}
    page = page_of(
        config=HARD,
        samples={**FACTS.samples, "hard_negatives": hard, "num_losers_removed": 77},
        metrics={**FACTS.metrics, "index": {**FACTS.metrics["index"], **tuned}},
    )
    assert [text for text, _, _ in page.tables["Pools"]["retrieved"]] == ["2,500", "50.0%", "12.2"]
    assert "This run allows them anyway" in page.text
    _, _, never = page.tables["Masked"]
    assert never.startswith("never a hard negative")
    assert page.values("Masked", never)[0] == 77
    assert page.values("Effort by depth", "128") == [9, 256]
    by_request = "Recall by request"
    assert page.values(by_request, "10") == [100, 0.98765]
    assert page.tables[by_request]["1,000"][0][0] == "known"
    assert "It finds at least 98.8% of the exact answer; the target is 98%." in page.text
    assert PAGE.tables["Kind and settings"]["num_leaves"] == [("41", 41, False)]
    # Without such data, none of this is shown.
    assert "No hard negatives" in PAGE.text
    assert not {"Pools", by_request} & set(PAGE.tables)


def test_a_dislike_is_not_a_stage_of_the_funnel() -> None:
    events, samples = {**FACTS.events_by_stage, "disliked": 7}, {**FACTS.samples, "num_disliked": 7}
    page = page_of(events_by_stage=events, samples=samples)
    assert page.tables["Events by stage"] == PAGE.tables["Events by stage"]
    assert page.values("Masked", "exposed to the user, not clicked, or disliked")[0] == 3900
    assert PAGE.values("Masked", "exposed to the user, not clicked")[0] == 3900
    told = "disliked by the user: never a positive, never shown"
    assert (page.values("Masked", told)[0], told in PAGE.text) == (7, False)


def test_a_race_has_the_budget_that_held() -> None:
    """Its settings no longer have it: they are the winner's, with which nothing races."""
    recipes = {"default": {"values": [0.1, 0.2], "seconds": [1.0, 2.0]}}
    race = {"metric": "ndcg@100", "recipes": recipes, "lines": ["default won"], "budget": 7200.0}
    older = {name: value for name, value in race.items() if name != "budget"}
    texts = [
        " ".join(page_of(metrics={**FACTS.metrics, **x}).text.split())
        for x in ({"race": race}, {"race": older}, {})
    ]
    assert ["with a budget of 7,200 seconds. The" in text for text in texts] == [True, False, False]
    told = "budget and members are the defaults, not what the race had"
    assert [told in text for text in texts] == [True, True, False]


def test_what_is_missing_is_a_dash_or_no_section() -> None:
    nothing = {"mean": None, "low": None, "high": None}
    models = {name: {**model, "slices": {**model["slices"]}} for name, model in MODELS.items()}
    for model in models.values():
        model["slices"]["tail"] = {**model["slices"]["tail"], "recall@100": nothing}
    models["popularity"]["average_popularity@20"] = None
    models["popularity"]["ndcg@100"] = {"mean": 0.5, "low": None, "high": None}
    changed = {"models": models, "examples": [], "differences": {}}
    page = page_of(metrics={**FACTS.metrics, **changed}, config=HARD)
    assert page.tables["Metrics by slice"]["tail, recall@100"] == [("-", None, False)] * 3
    assert page.tables["All metrics, by request"]["average_popularity@20"][2] == ("-", None, False)
    assert page.tables["Metrics, by request"]["ndcg@100"][2][:2] == ("0.5000", 0.5)
    assert set(PAGE.headings) - set(page.headings) == {"Recommendations"}
    assert "is it better than the baselines?Not compared" in page.joined
    assert "Differences, by request" not in page.tables


def test_what_users_write_stays_text() -> None:
    example = {**FACTS.metrics["examples"][0], "user_id": f'"{EVIL}\x1b[31m\u202eb'}
    example["recommended"] = [EVIL, 6]
    changed = {"examples": [example], "notes": {"data": [EVIL]}, "versions": {EVIL: EVIL}}
    settings = {"data.columns": {"user_id": EVIL}, "export.name": "films"}
    facts = dataclasses.replace(
        FACTS,
        metrics={**FACTS.metrics, **changed},
        folder=f'runs/"{EVIL}',
        dropped=(Dropped(EVIL, 1),),
        titles={3: f"{EVIL} &amp; {{title}}", 6: '"><img src=x onerror=alert(1)>'},
        config=with_settings(RunConfig(data={"path": f"/a/{EVIL}.csv"}), settings),
    )
    page = Page(report_page(facts))
    assert not page.of("script") + page.of("img")
    assert not [x for x in page.text if not (x.isprintable() or x in "\n\t\xa0")]
    evil = [f'User "{EVIL}\\x1b[31m\\u202eb', f'in runs/"{EVIL}', f"{EVIL} &amp; {{title}}"]
    evil += ['"><img src=x onerror=alert(1)>', f"from /a/{EVIL}.csv", f'user_id = "{EVIL}"']
    assert [shown for shown in evil if shown not in page.text] == []
    assert EVIL in page.tables["Dropped"]
    # No element has an event handler.
    assert not [name for x in page.tree.iter() for name in x.attrib if name.startswith("on")]


def test_the_page_asks_nothing_of_the_network() -> None:
    assert "//" not in re.sub(r' xmlns(:xlink)?="http://www.w3.org/[^"]*"', "", TEXT)
    for element in PAGE.tree.iter():
        assert element.tag not in ("script", "link", "img", "iframe", "object", "embed", "base")
        for name, value in element.attrib.items():
            if name.rpartition("}")[2] in ("src", "href", "action", "srcset"):
                assert value.startswith("#")
    assert "@import" not in TEXT
    assert set(re.findall(r"url\((.)", TEXT)) <= {"#"}
    (policy,) = (m["content"] for m in PAGE.of("meta") if "http-equiv" in m)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_page_can_be_read_aloud_and_moved_through() -> None:
    assert PAGE.tree.attrib["lang"] == "en"
    assert len(PAGE.of("h1")) == len(PAGE.of("main")) == len(PAGE.of("title")) == 1
    sections = [f"#{attributes['id']}" for attributes in PAGE.of("section")]
    assert [attributes["href"] for attributes in PAGE.of("a")] == sections
    assert len(PAGE.headings) == 5 + len(sections)
    assert all(figure["role"] == "img" and figure["aria-label"] for figure in PAGE.of("svg"))
    boxes = [a for a in PAGE.of("div") if a.get("class") == "scroll"]
    assert len(boxes) == len(PAGE.tables)
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)
    ids = [element.attrib["id"] for element in PAGE.tree.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]*)"', TEXT) + re.findall(r"url\(#([^)]*)\)", TEXT)
    assert set(targets) <= set(ids)


def test_the_same_facts_give_the_same_page() -> None:
    assert report_page(make_facts()) == TEXT


def contrast(*colours: str) -> float:
    """Returns the contrast ratio of two colours by WCAG 2."""
    channels = np.array([[int(x[i : i + 2], 16) / 255 for i in (1, 3, 5)] for x in colours])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    light = linear @ [0.2126, 0.7152, 0.0722] + 0.05
    return float(light.max() / light.min())


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_and_lines_stand_out_in_light_and_dark(scheme: int) -> None:
    style = (files("tfrs_pipeline.report") / "template.html").read_text()
    found = re.findall(r"--(paper|ink|soft|wash|bar|link|good|bad): (#[0-9a-f]{6})", style)
    assert len(found) == 16
    colours = dict(found[8 * scheme : 8 * scheme + 8])
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for ground in ("paper", "wash"):
        for name in ("ink", "soft", "link", "good", "bad"):
            assert contrast(colours[name], colours[ground]) >= 4.5
        assert contrast(colours["bar"], colours[ground]) >= 3
    assert all(contrast(colour, "#ffffff") >= 4.5 for colour in (*SERIES, INK, SOFT))


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=3000))
def test_thinning_a_curve_keeps_its_sum_and_the_first_ranks(values: list[int]) -> None:
    ranks, means = thinned(np.array(values))
    assert len(ranks) <= 150
    assert np.all(np.diff(ranks) > 0)
    assert (ranks[0], means[0]) == (1, values[0])
    # A group's width follows from its start and its geometric middle.
    start, total = 1, 0.0
    for rank, mean in zip(ranks, means, strict=True):
        stop = round(rank**2 / start)
        total += mean * (stop - start + 1)
        start = stop + 1
    assert start == len(values) + 1
    assert total == pytest.approx(sum(values))
