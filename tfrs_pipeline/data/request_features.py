"""Request features: event columns that are known when the request comes."""

from collections.abc import Collection, Iterator, Mapping

import ibis
import ibis.expr.types as ir

from tfrs_pipeline.data import schema
from tfrs_pipeline.data.histories import query_start, whole_seconds
from tfrs_pipeline.data.schema import LOG_COLUMNS, DataError, Source, case_problem, require_all
from tfrs_pipeline.features.kinds import KINDS
from tfrs_pipeline.messages import in_percent, printable

# A request feature may leak if there are at least so many events that are not positives, and more
# than this share of them has one value.
_FEWEST, _CONSTANT = 20, 0.95
FROM_TIMESTAMP = ("hour", "weekday")
"""Request features that are made from the timestamp, in UTC, if the log has no such column."""


def is_from_timestamp(name: str, columns: Collection[str]) -> bool:
    """Returns whether events with these columns get a request feature from their timestamp."""
    return name in FROM_TIMESTAMP and name not in columns


def check_names(
    features: Collection[str], others: Collection[str], columns: Mapping[str, str] | None = None
) -> None:
    """Refuses (`ValueError`) request features that no request can bring, or whose name is taken.

    `others` are outcomes, or user features, which the query tower reads too. `columns` is
    `Reading.columns`: a renamed column is refused under its old and its new name.
    """
    columns = columns or {}
    meaning = {columns.get(name, name): name for name in (*LOG_COLUMNS, *others)}
    by_case: dict[str, str] = {}
    for name in features:
        meant = meaning.get(columns.get(name, name), name)
        problem = case_problem(name)
        if (other := by_case.setdefault(name.casefold(), name)) != name:
            problem = f"differs from {other} in case alone; rename the column"
        elif meant in (*LOG_COLUMNS, *others, "event_number") or meant.startswith("_"):
            problem = (
                f"is {'' if meant == name else f'read as {meant}, which is '}one of the log's own "
                "columns, an outcome or a user feature; give a separate column that is known "
                f"when the request comes (the timestamp gives {' and '.join(FROM_TIMESTAMP)})"
            )
        if problem:
            raise ValueError(f"request_features.{name}: {problem}.")


def check_request_features(events: ibis.Table, features: Mapping[str, str]) -> None:
    """Refuses (`DataError`) request features that events do not have."""
    source = Source("event table")
    for name, kind in features.items():
        if not is_from_timestamp(name, events.columns):
            remedy = "It is among request_features: remove it there."
            require_all(events.columns, {name: remedy}, source)
        elif "timestamp" not in events.columns:
            raise DataError(
                f"{source.column(name)} is among request_features but missing, and the log has "
                f"no timestamp to make it from. Set columns to say which column is {name} or "
                "timestamp, or remove it from request_features.",
                "columns",
            )
        elif not KINDS[kind].takes_whole_numbers:
            possible = ", ".join(name for name, known in KINDS.items() if known.takes_whole_numbers)
            raise DataError(
                f"{source.column(name)} is made from the timestamp, as a whole number, and cannot "
                f"be {kind}. Make it one of {possible}."
            )


def at_request(events: ibis.Table, features: Mapping[str, str]) -> dict[str, ir.Value]:
    """Returns the request features of each event, by name.

    The hour (0 to 23) and the weekday (0 is Monday) come from the request's start, in UTC.
    """
    values: dict[str, ir.Value] = {name: events[name] for name in features if name in events}
    if len(values) < len(features):
        seconds = whole_seconds(query_start(events, events["timestamp"])[0])
        # 1970 began on a Thursday. A remainder would be negative before it.
        day = seconds // 86_400
        weekday = day + 3 - 7 * ((day + 3) // 7)
        hour = (seconds - 86_400 * day) // 3600
        values = {"hour": hour, "weekday": weekday} | values
    return {name: values[name] for name in features}


def note_leaks(events: ibis.Table, features: Mapping[str, str], source: Source) -> Iterator[str]:
    """Notes request features with one value, such as 0 or null, wherever there is no click.

    A watch time is such a feature: no request knows it, and in training it gives the click away.
    """
    for name in (name for name in features if name in events.columns):
        value = events[name]
        # Null and 0 both say that there was nothing.
        plain = value.fill_null(0) if value.type().is_numeric() else value
        text, is_click = plain.cast("string").fill_null(""), schema.is_positive(events)
        counts = events.filter(~is_click).group_by(text=text).agg(num=ibis._.count())
        most = counts.order_by(ibis.desc("num"), "text").limit(1).to_pyarrow().to_pylist()
        # A feature that is known at the request varies with the request, clicked or not.
        usual, num_same = (most[0]["text"], most[0]["num"]) if most else ("", 0)
        sums = {"clicks": is_click.sum(), "others": (~is_click).sum()}
        sums["same"] = (is_click & (text == usual)).sum()
        num_clicks, num_others, num_same_clicks = schema.totals(events, **sums).values()
        is_constant = num_others >= _FEWEST and num_same > _CONSTANT * num_others
        if is_constant and 2 * num_same_clicks < num_clicks:
            yield (
                f"warning: {source.column(name)} is {printable(usual or 'missing')} in "
                f"{in_percent(num_same, num_others)} of the events that are no positives, but in "
                f"{in_percent(num_same_clicks, num_clicks)} of the positives: if it is known only "
                "after a click, as a watch time is, remove it from request_features"
            )
