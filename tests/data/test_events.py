"""The label: which exposed events are positives, and what they weigh."""

from typing import Any

import pyarrow as pa
import pytest

from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.reading import Reading
from tfrs_pipeline.data.schema import DataError

COLUMNS: dict[str, list[Any]] = {
    "user_id": [1] * 6,
    "item_id": [1, 2, 3, 4, 5, 6],
    "stage": ["retrieved", "exposed", "exposed", "clicked", "clicked", "exposed"],
    "is_like": [True, True, False, False, None, True],
    "seconds": [90.0, 0.0, 0.0, 12.0, None, 3.5],
    "note": ["a"] * 6,
}


def labelled(label: dict[str, float], **more: list[Any] | None) -> list[tuple[str, float]]:
    columns = {name: values for name, values in (COLUMNS | more).items() if values is not None}
    log = Log.from_table(pa.table(columns), reading=Reading(label=label))
    table = log.events.order_by("event_number").select("stage", "weight").to_pyarrow()
    assert table["weight"].type == pa.float64()
    rows = table.to_pylist()
    return [(row["stage"], row["weight"]) for row in rows]


def test_a_positive_is_exposed_and_labelled() -> None:
    exposed, clicked = ("exposed", 1.0), ("clicked", 1.0)
    retrieved = ("retrieved", 1.0)
    expected = [retrieved, clicked, exposed, exposed, exposed, clicked]
    assert labelled({"is_like": 1.0}) == expected
    # Without stages all rows are exposures.
    assert labelled({"is_like": 1.0}, stage=None) == [clicked, *expected[1:]]


def test_a_weighted_union_adds_what_holds_and_keeps_the_event_weight() -> None:
    found = labelled({"is_like": 1.0, "seconds": 0.5}, weight=[1.0, 1.0, 1.0, 2.0, 1.0, 3.0])
    stages = ["retrieved", "clicked", "exposed", "clicked", "exposed", "clicked"]
    assert found == list(zip(stages, [1.0, 1.0, 1.0, 1.0, 1.0, 4.5], strict=True))


@pytest.mark.parametrize(
    ("label", "more", "message"),
    [
        ({"is_lik": 1.0}, {}, r"'is_lik'.*is_like"),
        ({"note": 1.0}, {}, "'note' must be boolean, or a number .* it is string"),
        ({"nothing": 1.0}, {"nothing": [0] * 6}, "none of 6 rows is a positive"),
        ({"seconds": 1.0}, {"seconds": [1.0, float("nan")] * 3},
         "'seconds' is in the label and no number in 3 of 6 rows, such as nan"),
        ({"is_like": 0.0}, {}, "label.is_like: got 0.0; must be greater"),
        ({"is_like": float("nan")}, {}, "label.is_like: got nan; must be"),
        ({"is_like": "much"}, {}, "label.is_like: got 'much'; must be a number"),
        ({0: 1.0}, {}, "label.0.*must be a valid string"),
        ("is_like", {}, "label: got 'is_like'; must be a valid dictionary"),
        ({"stage": 1.0}, {}, "made of outcomes, which stage is not"),
    ],
)  # fmt: skip
def test_what_is_refused(label: Any, more: Any, message: str) -> None:
    with pytest.raises((DataError, ValueError), match=message):
        labelled(label, **more)
