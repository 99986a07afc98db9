from typing import Any

from tfrs_pipeline.evaluation.results import format_table

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
