"""The model card beside each version, and at the server's page."""

from pathlib import Path
from typing import Any

import pytest

from tests.service.running_server import Running
from tfrs_pipeline.answers.card import CARD_FILE, model_card
from tfrs_pipeline.answers.retriever import load

MEAN = {"mean": 0.25, "low": 0.125, "high": 0.375}
NONE = {"mean": None, "low": None, "high": None}
MANIFEST: dict[str, Any] = {
    "name": "shop",
    "date": "2026-01-02T03:04:05+00:00",
    "log": "clicks.csv",
    "run": "runs/shop",
    "history_length": 50,
    "histories_until": "2026-01-01T00:00:00+00:00",
    "reading": {"event_weights": {"view": 1.0, "purchase": 5.0, "seen": "exposed"}},
    "feature_inputs": {"query": {"age": "age"}, "candidate": {}, "request": {"device": "device"}},
    "counts": {"num_samples": 1000, "num_queries": 1, "num_candidates": 40},
    "metrics": {
        "recall@20": MEAN,
        "mrr@20": MEAN,
        "ndcg@20": NONE,
        "coverage@20": 0.5,
        "num_queries": 30,
        "slices": {"tail": {"recall@20": MEAN, "num_candidates": 9}, "head": {"recall@20": MEAN}},
    },
}


def test_a_card_says_what_the_manifest_says() -> None:
    card = model_card(MANIFEST, 7)
    lines = card.split("\n")
    assert lines[0] == "# shop, version 7"
    for line in (
        "- The log clicks.csv, by the run runs/shop.",
        "- 1,000 positives, 1 user, 40 items.",
        "- Weights of events: view 1, purchase 5, seen exposed.",
        "- Of the query: age.",
        "- Of the request: device.",
        "On 30 queries of held-out clicks:",
        "| recall@20 | 0.2500 | 0.1250 to 0.3750 |",
        "| recall@20, rare items | 0.2500 | 0.1250 to 0.3750 |",
    ):
        assert line in lines
    # Metrics without an interval, and others than recall and ndcg, are left out.
    assert sum(line.startswith("| ") for line in lines) == 3
    assert "What it is not for" in card


def test_it_lies_beside_each_version_and_is_served(films: Path) -> None:
    """The model of this test was exported without a run."""
    written = (films / "1" / CARD_FILE).read_text()
    assert written == model_card(load(films).manifest, 1)
    assert written.count("Unknown: it was exported without a run.") == 2
    with Running(films) as running:
        response = running.get("/page/card")
    assert response.text == written
    assert response.headers["content-type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize("page", [True, False])
def test_without_the_page_it_is_not_served(films: Path, page: bool) -> None:
    with Running(films, page=page) as running:
        assert running.get("/page/card").status_code == (200 if page else 404)
