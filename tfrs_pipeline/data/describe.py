"""Describes a log, in lines for a person."""

import statistics
from collections.abc import Iterator, Mapping
from datetime import date, timedelta
from typing import Any

import ibis

from tfrs_pipeline.data.schema import is_positive
from tfrs_pipeline.messages import counted

# A hundredth of this many positives or more is told if it holds more than this share of the weight.
_MANY, _MUCH_WEIGHT = 200, 0.5


def describe(log: Any) -> Iterator[str]:
    """Yields what a `Log` holds and what was dropped, in lines."""
    counts = log.counts()
    yield listed(counts)
    if log.order == "timestamp":
        yield from _describe_times(log.events)
    elif log.order == "event_number":
        yield "no timestamps: the row order is taken as the event order"
    if "weight" in log.events.columns:
        yield from _describe_weights(log.events)
    if log.part_of is not None:
        yield "a part of a log: the whole log's description says what was dropped"
        return
    num_dropped = sum(each.num_rows for each in log.dropped if not each.is_merged)
    num_read = counts["events"] + sum(each.num_rows for each in log.dropped)
    dropped = f"{num_dropped:,} of {counted(num_read, 'row')}" if num_dropped else "nothing"
    yield f"dropped {dropped}"
    for each in log.dropped:
        rows = counted(each.num_rows, "row")
        yield f"merged {rows} {each.reason}" if each.is_merged else f"dropped {rows}: {each.reason}"
    yield from log.notes


def listed(counts: Mapping[str, int]) -> str:
    """Lists counts with their nouns; `counts` has the nouns in the plural."""
    return ", ".join(counted(count, name[:-1]) for name, count in counts.items())


def _describe_times(events: ibis.Table) -> Iterator[str]:
    times = events["timestamp"]
    days = events.group_by(day=(times.epoch_seconds() / 86_400).floor().cast("int64"))
    of_days = days.agg(num=is_positive(events).sum(), first=times.min(), last=times.max())
    found = of_days.order_by("day").to_pyarrow()
    first, last = found["first"][0].as_py(), found["last"][-1].as_py()
    # A wrong unit shows here.
    yield f"from {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC"
    of_day = dict(zip(found["day"].to_pylist(), found["num"].to_pylist(), strict=True))
    counts = [of_day.get(day, 0) for day in range(min(of_day), max(of_day) + 1)]
    if len(counts) >= 3:  # A broken day shows here.
        lowest = min(counts)
        when = date(1970, 1, 1) + timedelta(min(of_day) + counts.index(lowest))
        yield (
            f"positives a day: median {statistics.median_low(counts):,}, lowest {lowest:,} on "
            f"{when}, {counts[-1]:,} on the last day"
        )


def _describe_weights(events: ibis.Table) -> Iterator[str]:
    weight = events.filter(is_positive)["weight"]
    summary = (weight.min(), weight.max(), weight.quantile(0.99), weight.count())
    least, most, high, num = (x.to_pyarrow().as_py() for x in summary)
    if least == most:
        return
    yield (
        f"weights of positives from {least:g} to {most:g}: they weigh the loss; metrics and "
        "baselines count every positive once"
    )
    share = (weight.sum(where=weight > high) / weight.sum()).to_pyarrow().as_py()
    if num >= _MANY and share is not None and share > _MUCH_WEIGHT:
        yield (
            f"a hundredth of the positives, those above {high:g}, holds {share:.0%} of the weight: "
            "max_weight limits each"
        )
