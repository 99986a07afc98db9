from typing import Any

from tfrs_pipeline.evaluation.table import format_markdown_table, format_table

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
    header, first, second = format_table(MODELS, COLUMNS).split("\n")
    assert header.split() == ["model", *COLUMNS]
    assert first.split() == ["two_tower", "0.3271", "±0.0110", "0.5000", "165.6", "938", "0.4000"]
    assert second.split() == ["ease", "-", "-", "-", "-", "-"]


def test_columns_are_aligned() -> None:
    lines = format_table(MODELS, COLUMNS).split("\n")
    assert len({len(line) for line in lines}) == 1


def test_markdown_has_the_same_cells() -> None:
    lines = format_markdown_table(MODELS, COLUMNS).split("\n")
    assert lines[1] == "|---|---:|---:|---:|---:|---:|"
    plain = format_table(MODELS, COLUMNS).split("\n")
    for line, expected in zip([lines[0], *lines[2:]], plain, strict=True):
        assert line.replace("|", "").split() == expected.split()
