"""The label: which exposed events are positives, and what they weigh."""

from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pytest

from tfrs_pipeline.config import DataConfig
from tfrs_pipeline.data.labels import relabel
from tfrs_pipeline.data.schema import DataError
from tfrs_pipeline.run import load_data

STAGES = ["retrieved", "exposed", "exposed", "clicked", "clicked", "exposed"]
COLUMNS: dict[str, list[Any]] = {
    "stage": STAGES,
    "is_like": [True, True, False, False, None, True],
    "seconds": [90.0, 0.0, 0.0, 12.0, 0.0, 3.5],
    "event_number": [0, 1, 2, 3, 4, 5],
    "note": ["a"] * 6,
}


def table(**more: list[Any]) -> ibis.Table:
    connection = ibis.duckdb.connect()
    return connection.create_table("events", pa.table({**COLUMNS, **more}))


def result(events: ibis.Table) -> list[tuple[str, float]]:
    rows = events.order_by("event_number").select("stage", "weight").to_pyarrow().to_pylist()
    return [(row["stage"], row["weight"]) for row in rows]


def test_one_column() -> None:
    assert result(relabel(table(), {"is_like": 1.0})) == [
        ("retrieved", 1.0),
        ("clicked", 1.0),
        ("exposed", 1.0),
        ("exposed", 1.0),
        ("exposed", 1.0),
        ("clicked", 1.0),
    ]


def test_a_weighted_union_adds_what_holds_and_keeps_the_event_weight() -> None:
    labelled = relabel(
        table(weight=[1.0, 1.0, 1.0, 2.0, 1.0, 3.0]), {"is_like": 1.0, "seconds": 0.5}
    )
    assert result(labelled) == [
        ("retrieved", 1.0),
        ("clicked", 1.0),
        ("exposed", 1.0),
        ("clicked", 1.0),
        ("exposed", 1.0),
        ("clicked", 4.5),
    ]


def test_refusals() -> None:
    with pytest.raises(DataError, match=r"'is_lik'.*is_like"):
        relabel(table(), {"is_lik": 1.0})
    with pytest.raises(DataError, match="'note' is string"):
        relabel(table(), {"note": 1.0})
    with pytest.raises(DataError, match="none of 6 rows is a positive"):
        relabel(table(nothing=[0] * 6), {"nothing": 1.0})
    with pytest.raises(ValueError, match="weights above 0"):
        relabel(table(), {"is_like": 0.0})


def test_a_log_of_exposures_alone_gets_its_positives_from_the_label(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(
        "user_id,item_id,stage,rating,liked\n1,5,exposed,2,0\n1,6,exposed,5,1\n2,5,retrieved,,1\n"
    )
    label = {"liked": 1.0}
    tables = load_data(DataConfig(source="events", path=path, label=label))
    rows = (
        tables.events.order_by("event_number").select("item_id", "stage").to_pyarrow().to_pylist()
    )
    assert [row["stage"] for row in rows] == ["exposed", "clicked", "retrieved"]
    by_rating = load_data(DataConfig(source="events", path=path, label={"rating": 1.0}))
    assert by_rating.events.filter(by_rating.events["stage"] == "clicked").count().execute() == 2
    with pytest.raises(DataError, match="none of 3 rows is a positive"):
        load_data(DataConfig(source="events", path=path))


@pytest.mark.parametrize("cell", ["", "-1", "nan", "inf"])
def test_a_weight_that_cannot_be_used_is_refused(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "clicks.csv"
    path.write_text(f"user_id,item_id,weight\n1,5,1.5\n1,6,{cell}\n")
    with pytest.raises(DataError, match=r"clicks.csv: column 'weight'.* 1 of 2 rows"):
        load_data(DataConfig(source="clicks", path=path))
