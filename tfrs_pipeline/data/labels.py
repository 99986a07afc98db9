"""What counts as a positive: the label, chosen among the outcomes that a log holds."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping

import ibis

from tfrs_pipeline.data.schema import (
    DataError,
    Refusal,
    Source,
    Stage,
    refuse_rows,
    require_column,
)


def relabel(events: ibis.Table, label: Mapping[str, float], source: Source) -> ibis.Table:
    """Makes positives of the exposed events for which any of the label's columns holds.

    An event stays `exposed` if none does, whatever it was before; events that were never exposed
    are left alone: a positive is exposed AND labelled. The weight of a positive is the sum of the
    weights of the columns that hold, times its own weight if the table has one.

    Args:
        events: Event table with the columns, boolean or numeric (true, or above 0, holds; null does
            not).
        label: Column -> weight, above 0, such as {"is_click": 1.0, "long_view": 2.0}.
        source: The table's name in messages.

    Returns:
        `events` with `stage` and `weight` replaced.

    Raises:
        DataError: If a column is missing, neither boolean nor numeric, or NaN in any row.
        ValueError: If a weight is not above 0.
    """
    if min(label.values()) <= 0:
        raise ValueError(f"A label needs columns with weights above 0. Received: {dict(label)}")
    terms, refusals = [], []
    for name, weight in label.items():
        require_column(events.columns, name, source, "Name an outcome of the log in label.")
        column = events[name]
        if not (column.type().is_boolean() or column.type().is_numeric()):
            raise DataError(
                f"{source.column(name)} is {column.type()} and cannot be a label: it must be "
                "boolean, or a number above 0 where the outcome holds."
            )
        if column.type().is_floating():
            remedy = "Leave it null where the outcome does not hold."
            refusals.append(Refusal(name, column.isnan(), "is NaN and in the label", remedy))
        holds = column if column.type().is_boolean() else column > 0
        terms.append(ibis.coalesce(holds, False).ifelse(float(weight), 0.0))
    refuse_rows(events, source, *refusals)
    weight = functools.reduce(operator.add, terms)
    was_exposed = events["stage"].isin([Stage.EXPOSED.value, Stage.CLICKED.value])
    stage = (weight > 0).ifelse(Stage.CLICKED.value, Stage.EXPOSED.value)
    own_weight = events["weight"] if "weight" in events.columns else ibis.literal(1.0)
    return events.mutate(
        stage=was_exposed.ifelse(stage, events["stage"]),
        weight=(was_exposed & (weight > 0)).ifelse(weight * own_weight, own_weight),
    )
