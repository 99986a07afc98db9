import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa

from tfrs_pipeline import Log, MostPopular, Repeats, evaluate
from tfrs_pipeline.evaluation.results import explained, format_table, joined

MODELS: dict[str, dict[str, Any]] = {
    "two_tower": {
        "ndcg@100": {"mean": 0.32714, "low": 0.316, "high": 0.338},
        "coverage@20": 0.5,
        "average_popularity@20": 165.64,
        "num_queries": 938,
        "slices": {"head": {"recall@20": {"mean": 0.4, "low": None, "high": None}}},
    },
    "ease": {"ndcg@100": {"mean": None, "low": None, "high": None}},
}
COLUMNS = ["ndcg@100", "coverage@20", "average_popularity@20", "num_queries", "head/recall@20"]


def test_cells_hold_the_numbers_and_a_dash_where_there_is_none() -> None:
    lines = format_table(MODELS, COLUMNS).split("\n")
    header, first, second = lines
    assert header.split() == ["model", *COLUMNS]
    assert first.split() == ["two_tower", "0.3271", "±0.0110", "0.5000", "165.6", "938", "0.4000"]
    assert second.split() == ["ease", "-", "-", "-", "-", "-"]
    assert len({len(line) for line in lines}) == 1


def test_the_difference_from_the_first_stands_beside_the_first_column() -> None:
    differences = {"ease": {"ndcg@100": {"mean": -0.03, "low": -0.04, "high": -0.02}}}
    header, first, second = format_table(MODELS, COLUMNS[:2], differences).split("\n")
    assert header.split() == ["model", "ndcg@100", "from", "two_tower", "coverage@20"]
    assert first.split() == ["two_tower", "0.3271", "±0.0110", "0.5000"]
    assert second.split() == ["ease", "-", "-0.0300", "[-0.0400,", "-0.0200]", "-"]


def test_the_popularity_of_what_is_found_stands_beside_that_of_what_is_to_find() -> None:
    """The item of most clicks is always retrieved, and the one without any is to be found."""
    users = {1: "ab", 2: "ab", 3: "ac", 4: "ad"}
    clicks = [(user, item) for user, items in users.items() for item in items]
    table = pa.table(dict(zip(("user_id", "item_id"), zip(*clicks, strict=True), strict=True)))
    train, _, test = Log.from_table(table).split("last_n", min_positives=2)
    counts = dict(zip(test.candidate_ids.tolist(), test.candidate_counts.tolist(), strict=True))
    to_find = [counts[item] for items in test.relevant for item in items.tolist()]
    found = evaluate(MostPopular().fit(train), test, cutoffs=(1,), exclude="none")
    header, first, about = repr(found).splitlines()[:3]
    assert header.split()[-1] == "average_popularity@1"
    assert float(first.split()[-1]) == max(counts.values())
    assert about.endswith(f"those of the items to find are {np.mean(to_find):.1f}")
    assert about in explained(repr(found), found.summary())
    assert list(explained("ndcg@1", found.summary())) == []


def test_a_difference_is_written_so_that_its_sign_is_seen() -> None:
    differences = {"ease": {"ndcg@100": {"mean": 0.0028, "low": 0.00002, "high": 0.0053}}}
    assert "+0.00280 [+0.00002, +0.00530]" in format_table(MODELS, COLUMNS[:1], differences)


def test_joined_evaluations_are_one_of_all() -> None:
    clicks = {"user_id": [1] * 4 + [2] * 4, "item_id": [*"abcd", *"bacd"]}
    train, _, test = Log.from_table(pa.table(clicks)).split("last_n", min_positives=3)
    models = {"a": MostPopular().fit(train), "b": Repeats().fit(train)}
    together, *apart = (
        dataclasses.replace(found, other=found)
        for found in (evaluate(x, test) for x in (models, *({k: v} for k, v in models.items())))
    )
    assert joined(apart).summary() == together.summary()
