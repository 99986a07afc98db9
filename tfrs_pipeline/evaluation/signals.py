"""What a log rewards, counted in seconds before any training."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ibis
import numpy as np

from tfrs_pipeline.data.log import Log, check_log
from tfrs_pipeline.data.schema import Exclude, count_rows, is_positive
from tfrs_pipeline.evaluation.results import format_cells

# Above this share of repeats, a ranking that leaves them out measures something else.
_MANY_REPEATS = 0.2


@dataclass(frozen=True)
class Signal:
    """A number, the number to compare it with (`beside`), if any, and what both mean."""

    name: str
    value: float
    beside: float | None
    meaning: str


@dataclass(frozen=True, repr=False)
class Signals:
    """What a log rewards: signals by name. Prints as a table, and shows as one in a notebook."""

    signals: tuple[Signal, ...]

    def __iter__(self) -> Iterator[Signal]:
        return iter(self.signals)

    def __getitem__(self, name: str) -> Signal:
        return {signal.name: signal for signal in self}[name]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Returns value, beside and meaning of each signal by its name."""
        return {row.pop("name"): row for row in map(dataclasses.asdict, self)}

    def excluded_repeats(self, exclude: Exclude) -> Iterator[str]:
        """Notes the share of repeats, if it is large and rankings leave a user's own items out."""
        share = next((signal.value for signal in self if signal.name == "repeats"), 0.0)
        if share > _MANY_REPEATS and exclude != "none":
            yield (
                f"{share:.0%} repeats, which rankings leave out (evaluation.exclude {exclude}): "
                "if a user's own items may come again, set it to none (docs/guides/seen.md)"
            )

    def __repr__(self) -> str:
        rows = [(signal.name, _written(signal.value), _written(signal.beside)) for signal in self]
        table = format_cells([("signal", "value", "beside"), *rows]).splitlines()
        meanings = ["meaning", *(signal.meaning for signal in self)]
        return "\n".join(f"{row}  {meaning}" for row, meaning in zip(table, meanings, strict=True))


def signals(train: Log) -> Signals:
    """Counts what a log rewards, from the positives of its training part alone.

    Example:
        >>> import pyarrow as pa
        >>> clicks = {"user_id": [1, 1, 2, 2, 2], "item_id": ["a", "b", "a", "b", "a"]}
        >>> repeats = signals(Log.from_table(pa.table(clicks)))["repeats"]
        >>> repeats.value, repeats.meaning
        (0.2, 'share of positives on an item that the user had before')
    """
    check_log(train)
    positives = train.events.filter(is_positive)
    if not (num := count_rows(positives)):
        return Signals(())
    num_items = count_rows(train.items)
    has_trend = "timestamp" in positives.columns and num >= 10
    by_user = positives.group_by("user_id").agg(
        num=positives.count(), different=positives["item_id"].nunique()
    )
    by_item = positives.group_by("item_id").agg(num=positives.count())
    users, items = by_user.to_pyarrow(), by_item.to_pyarrow()
    num_again = num - int(users["different"].to_numpy().sum())
    counts = np.sort(items["num"].to_numpy())[::-1]
    median, long = map(float, np.quantile(users["num"].to_numpy(), (0.5, 0.9), method="lower"))
    histories = "positives of the median user; beside: of the 90th percentile"
    repeats = "share of positives on an item that the user had before"
    return Signals(
        (
            *([_trend(positives, num, num_items)] if has_trend else []),
            Signal("repeats", num_again / num, None, repeats),
            *(
                Signal(
                    f"top {percent}%",
                    float(counts[: _share_of(num_items, percent)].sum() / num),
                    percent / 100,
                    f"share of positives on the {percent}% most popular items; beside: if all were "
                    "equal",
                )
                for percent in (1, 10)
            ),
            Signal("history", median, long, histories),
        )
    )


def _share_of(num: int, percent: int) -> int:
    return -(-num * percent // 100)  # Rounded up, so that it is one item or more.


def _trend(positives: ibis.Table, num: int, num_items: int) -> Signal:
    """Compares recent popularity with that of all time, by what each finds of the latest tenth."""
    in_order = ibis.row_number().over(order_by=["timestamp", "event_number"])
    rows, start = positives.mutate(number=in_order), num - num // 10
    number = rows["number"]
    by_item = rows.group_by("item_id").agg(
        ever=(number < start).sum(),
        just_before=((number < start) & (number >= start - num // 10)).sum(),
        latest=(number >= start).sum(),
    )
    # Ordered by id, so that equally popular items always come in the same order.
    table = by_item.order_by("item_id").to_pyarrow()
    ever, just_before, latest = (table[name].to_numpy() for name in table.column_names[1:])
    orders = np.lexsort((-ever, -just_before)), np.argsort(-ever, kind="stable")
    now, always = (
        float(latest[order[: _share_of(num_items, 1)]].sum() / (num // 10)) for order in orders
    )
    meaning = "share of the latest 10% on the 1% most popular just before; beside: ever before"
    return Signal("trend", now, always, meaning)


def _written(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value == int(value) else f"{value:.3f}"
