"""What counts as a positive: the label, chosen among the outcomes that a log holds."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping

import ibis
import ibis.expr.types as ir

from tfrs_pipeline.data.schema import Stage


def relabel(
    columns: Mapping[str, ir.Value], label: Mapping[str, float]
) -> tuple[ir.StringValue, ir.FloatingValue]:
    """Makes positives of the exposed events for which any of the label's columns holds.

    A column holds where it is true, or above 0; null does not. An event stays `exposed` if none
    does, whatever it was before; events that were never exposed are left alone: a positive is
    exposed AND labelled. It weighs the sum of the weights of the columns that hold, another event
    1.
    """
    terms = []
    for name, weight in label.items():
        column = columns[name]
        holds = column if column.type().is_boolean() else column > 0
        # DuckDB takes the literal 1.0 for a decimal, and Ibis drops a cast of it to its own type.
        as_double = ibis.literal(str(float(weight))).cast("float64")
        terms.append(ibis.coalesce(holds, False).ifelse(as_double, 0.0))
    weight = functools.reduce(operator.add, terms)
    stage, is_labelled = columns["stage"], weight > 0
    was_exposed = stage.isin([Stage.EXPOSED.value, Stage.CLICKED.value])
    new_stage = is_labelled.ifelse(Stage.CLICKED.value, Stage.EXPOSED.value)
    return was_exposed.ifelse(new_stage, stage), (was_exposed & is_labelled).ifelse(weight, 1.0)
