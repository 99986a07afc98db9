"""A shop's nightly job: a log that grows, and a model published if it is better as served."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.shop_log import write_shop
from tfrs_pipeline.answers.publish import versions_of
from tfrs_pipeline.config import dump_config, load_config, with_settings
from tfrs_pipeline.durable import read_record
from tfrs_pipeline.report.verdict import compared_with_baselines, other_question

DAILY = """
[data]
path = "now/events.csv"
items_path = "now/items.csv"
columns = { user_id = "customer_id", item_id = "sku", timestamp = "event_time" }
item_columns = { item_id = "sku" }
event_weights = { purchase = 5, cart = 2, view = 1 }
item_features = { brand = "categorical", title = "text" }

[split]
kind = "time"

[export]
name = "shop"
gate = true
"""


@pytest.mark.nightly
@pytest.mark.usefixtures("trusted_exports", "few_signatures")
def test_a_nightly_job_publishes_what_is_better_as_served(
    here: Path, command: Callable[..., Any]
) -> None:
    """By user, EASE is ahead of the model every night; by request, as in service, it is behind."""
    Path("daily.toml").write_text(DAILY)
    for night in (1, 2, 3):
        shutil.rmtree("now", ignore_errors=True)
        write_shop("now", until_day=57 + night)
        start = ["--warm-start", "saved_models/shop", "--training.max_epochs", "4"]
        more = ["--preset", "quick"] if night == 1 else start
        folder = Path(f"runs/{night}")
        assert command("run", "--config", "daily.toml", "--run-dir", folder, *more).code == 0
        assert versions_of(Path("saved_models/shop")) == list(range(1, night + 1))
        metrics = read_record(folder / "metrics.json")
        found = compared_with_baselines(metrics, "ndcg@100")
        assert (found.answer, metrics["asked_by"]) == ("yes", "requests")
        assert (other_question(metrics, "ndcg@100") or "").startswith("no, by user")
    # The same night, decided by the other question, publishes nothing.
    config = with_settings(load_config("daily.toml"), {"evaluation.by": "users"}, preset="quick")
    Path("mail.toml").write_text(dump_config(config))
    assert command("run", "--config", "mail.toml", "--run-dir", "runs/mail").code == 3
    assert versions_of(Path("saved_models/shop")) == [1, 2, 3]
