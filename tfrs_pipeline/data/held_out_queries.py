"""The queries of an evaluation, and the items that they should find."""

import collections
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa

from tfrs_pipeline.data import schema
from tfrs_pipeline.data.engines import random_key
from tfrs_pipeline.data.histories import query_start, whole_seconds, with_num_before
from tfrs_pipeline.data.ids import as_id_array
from tfrs_pipeline.data.request_features import at_request
from tfrs_pipeline.data.schema import DataError, is_dislike, is_positive, order_keys, was_shown
from tfrs_pipeline.retrieval import Query

EvaluationPart: TypeAlias = Literal["validation", "test"]

# The queries of one user may have this many entries in their histories; each takes 32 bytes.
_MOST_OF_ONE = 200_000_000
# Parts that a query may know: those before the user's cut; for "test" also the validation part.
_PARTS_BEFORE: dict[EvaluationPart, tuple[str, ...]] = {
    "validation": ("train", "fold_in"),
    "test": ("train", "validation", "fold_in"),
}


@dataclass(frozen=True, eq=False)
class Holdout:
    """The queries of an evaluation, one per user or per request, in aligned lists by user id.

    Args:
        user_ids: [num_queries] int64 or object (str).
        histories: Per query, the item ids of the positives before it (before the user's cut, or
            before the request), oldest first, except those from the first target's own request,
            and items disliked before the query.
        relevant: Per query, the distinct item ids of the targets, 1 or more.
        clicked: Per query, the distinct item ids of all positives before it.
        seen: Per query, the distinct item ids clicked, exposed or disliked before it.
        candidate_ids: [num_candidates] int64 or object (str): all items of the log, ascending.
        candidate_counts: [num_candidates] int64 training positives (see `Split.holdout`).
        num_sampled_from: How many queries this sample was drawn from; None if it is not a sample.
        by: What has a query: a user or a request; see `Split.holdout`.
        exposure: [num_candidates] how readily the log showed each item, up to a factor; None if
            unknown. See `tfrs_pipeline.evaluation.metrics`.
        requests: Per query, the raw features, by name, of the request that brought the first
            target. None in a log without request features.
        history_times: Per query, the time of each item of `histories`, in whole seconds since 1970.
        times: [num_queries] int64, the time of each query's first target, in seconds. Both times
            are None in a log without timestamps.
        disliked: Per query, the distinct item ids that the user disliked before it: every ranking
            excludes them. None in a log without dislikes.

    Raises:
        ValueError: If a list lacks one entry per query, or the counts one per candidate.
    """

    user_ids: np.ndarray
    histories: list[np.ndarray]
    relevant: list[np.ndarray]
    clicked: list[np.ndarray]
    seen: list[np.ndarray]
    candidate_ids: np.ndarray
    candidate_counts: np.ndarray
    num_sampled_from: int | None = None
    by: schema.AskedBy = "users"
    exposure: np.ndarray | None = None
    requests: list[dict[str, Any]] | None = None
    history_times: list[np.ndarray] | None = None
    times: np.ndarray | None = None
    disliked: list[np.ndarray] | None = None

    def __post_init__(self) -> None:
        for name, values in [*vars(self).items()]:
            if values is None or name in ("num_sampled_from", "by"):
                continue
            if name.endswith("_ids"):
                values = as_id_array(values)
            else:
                is_array = name in ("candidate_counts", "exposure", "times")
                values = np.asarray(values) if is_array else [*values]
            object.__setattr__(self, name, values)
            is_by_candidate = name.startswith("candidate") or name == "exposure"
            axis = "candidate_ids" if is_by_candidate else "user_ids"
            if len(values) != len(getattr(self, axis)):
                raise ValueError(
                    f"{name} must hold one entry for each of the {len(getattr(self, axis))} "
                    f"{axis}. Received: {len(values)}"
                )

    def __len__(self) -> int:
        return len(self.user_ids)

    def __repr__(self) -> str:
        return f"Holdout({len(self):,} queries, {len(self.candidate_ids):,} candidates)"

    def fingerprint(self) -> str:
        """Identifies a holdout by its users and targets: returns a hash of 12 digits."""
        digest = hashlib.sha256()
        for values in (self.user_ids, *self.relevant):
            digest.update(f"{np.asarray(values).tolist()}".encode())
        return digest.hexdigest()[:12]

    def asks_like(self, other: "Holdout", exclude: schema.Exclude) -> bool:
        """Returns whether both have the same queries, histories and exclusions."""
        mine, others = (
            [*holdout.histories, *(holdout.excluded(exclude) or ())] for holdout in (self, other)
        )
        return self.fingerprint() == other.fingerprint() and all(map(np.array_equal, mine, others))

    def sample(self, num_queries: int, seed: int = 0) -> "Holdout":
        """Draws at most `num_queries` queries at random; returns itself if it has no more."""
        if len(self) <= num_queries:
            return self
        drawn = np.random.default_rng(seed).choice(len(self), num_queries, replace=False)
        drawn.sort()  # Keeps the order of users, by which the lists are aligned.
        chosen: dict[str, Any] = {
            name: [values[i] for i in drawn]
            for name, values in vars(self).items()
            if isinstance(values, list) or (name == "times" and values is not None)
        }
        chosen["num_sampled_from"] = self.num_sampled_from or len(self)
        return replace(self, user_ids=self.user_ids[drawn], **chosen)

    def as_queries(self) -> list[Query]:
        """Returns queries for a `Retriever`; a query's time is its request's `timestamp`."""
        columns: dict[str, Any] = {"user_id": self.user_ids.tolist(), "history": self.histories}
        requests = self.requests
        if self.history_times is not None and self.times is not None:
            columns["history_timestamps"] = self.history_times
            pairs = zip(requests or [{}] * len(self), self.times.tolist(), strict=True)
            requests = [
                {**request, "timestamp": datetime.fromtimestamp(time, UTC)}
                for request, time in pairs
            ]
        if requests is not None:
            columns["request"] = requests
        rows = zip(*columns.values(), strict=True)
        return [dict(zip(columns, values, strict=True)) for values in rows]

    def excluded(self, rule: schema.Exclude) -> list[np.ndarray] | None:
        """Returns the items that each ranking excludes: those clicked, or seen, before the query.

        Disliked ones are always among them. Returns None for "none" in a log without dislikes.
        Raises a `ValueError` for another rule.
        """
        lists = {"clicked": self.clicked, "seen": self.seen, "none": None}
        if rule not in lists:
            raise ValueError(f"exclude must be 'clicked', 'seen' or 'none'. Received: {rule!r}.")
        listed = lists[rule]
        if self.disliked is None:
            return listed
        return self.disliked if listed is None else [*map(np.union1d, listed, self.disliked)]


def check_holdout(holdout: object) -> None:
    """Refuses (`TypeError`) anything but a holdout, such as the log that one is made from."""
    if not isinstance(holdout, Holdout):
        raise TypeError(
            "Evaluation needs a Holdout, the validation or test that `Log.split` makes. Received: "
            f"{type(holdout).__name__}."
        )


def make_holdout(
    log: Any,
    split: ibis.Table,
    part: EvaluationPart,
    trained_on: Any,
    by: schema.AskedBy,
    max_queries: int | None,
    seed: int,
) -> Holdout:
    """Makes the queries of a part of a log; see `Split.holdout`. `split` holds events with `part`.

    When a request is made, its own clicks are unknown, so histories leave them out. By "users", the
    ranking still excludes such clicks from before the cut, because training had them.
    """
    is_target = (split["part"] == part) & is_positive(split)
    if log.disliked is not None:
        by_then = split.filter(split["part"].isin([*_PARTS_BEFORE[part], part]))
        targets = schema.without_disliked(split.filter(is_target), schema.disliked_pairs(by_then))
        is_target = split["event_number"].isin(targets["event_number"])
    split = split.mutate(_is_target=is_target)
    users, num_queries = _draw_users(split.filter("_is_target"), by, max_queries, seed)
    rows = _read_events(split.semi_join(users, "user_id"), part, by, log)
    if rows.num_rows == 0:
        without = " In Python, split.train and split.test do not need it."
        raise DataError(
            f"The {part} part has no positive. Give split.{part} a larger share or an earlier "
            f"moment, or lower split.min_positives.{without if part == 'validation' else ''}"
        )
    if by != "users":
        _refuse_endless(rows, part)
    # Lists of different lengths are cut in NumPy: DuckDB would hold them in memory.
    names = ("item_id", "_is_positive", "_is_dislike")
    ids, was_clicked, was_disliked = (rows[name].to_numpy() for name in names)
    seconds = rows["_seconds"].to_numpy() if "timestamp" in split.columns else None
    request_numbers = numbered(rows["_request"])
    first = []
    lists = collections.defaultdict[str, Any](list)  # By the fields of `Holdout`.
    for targets, before in _by_user(rows) if by == "users" else _by_request(rows):
        first.append(targets[0])
        clicked = before[was_clicked[before]]
        # The clicks of the request itself are not known yet when it is made.
        request = request_numbers[targets[0]]
        history = clicked if request < 0 else clicked[request_numbers[clicked] != request]
        disliked = np.unique(ids[before[was_disliked[before]]])
        if len(disliked):
            history = history[~np.isin(ids[history], disliked)]
        lists["histories"].append(ids[history])
        lists["relevant"].append(np.unique(ids[targets]))
        lists["clicked"].append(np.unique(ids[clicked]))
        lists["seen"].append(np.unique(ids[before]))
        if log.disliked is not None:
            lists["disliked"].append(disliked)
        if seconds is not None:
            lists["history_times"].append(seconds[history])
    if log.request_features:
        lists["requests"] = rows.select([*log.request_features]).take(first).to_pylist()
    # Popularity as the model could know it: the future is not counted.
    positives = trained_on.positives()
    candidate_ids, counts = _count_candidates(log.items, positives, count=positives.count())
    shown = split.filter(split["part"].isin([*_PARTS_BEFORE[part], part]))
    shown_counts = {"events": shown.count(), "positives": is_positive(shown).sum()}
    _, num_events, num_clicks = _count_candidates(log.items, shown, **shown_counts)
    # How readily the log showed each item, up to a factor; see `evaluation/metrics`.
    exposure = num_events.astype(float) if np.any(num_events > num_clicks) else np.sqrt(num_clicks)
    return Holdout(
        user_ids=rows["user_id"].to_numpy()[first],
        candidate_ids=candidate_ids,
        candidate_counts=counts,
        num_sampled_from=num_queries,
        by=by,
        exposure=exposure,
        times=None if seconds is None else seconds[first],
        **lists,
    ).sample(max_queries or len(first), seed)


def _draw_users(
    targets: ibis.Table, by: schema.AskedBy, max_queries: int | None, seed: int
) -> tuple[ibis.Table, int | None]:
    """Draws users until they have `max_queries` queries or more; takes all users if too few.

    Returns the users, and how many queries there were to draw from; None if all are taken.
    """
    num: ir.Scalar = targets.count() if by == "requests" else ibis.literal(1)
    if by == "requests" and "request_id" in targets.columns:
        num = targets["request_id"].nunique() + targets["request_id"].isnull().sum()
    users = targets.group_by("user_id").agg(_num=num)
    num_queries = 0 if max_queries is None else users["_num"].sum().to_pyarrow().as_py() or 0
    if max_queries is None or num_queries <= max_queries:
        return users.select("user_id"), None
    # Whole users, because a query needs all events of its user.
    drawn = [random_key(users["user_id"], seed=seed), users["user_id"]]
    so_far = users["_num"].sum().over(ibis.cumulative_window(order_by=drawn))
    users = users.mutate(_before=so_far - users["_num"])
    return users.filter(users["_before"] < max_queries).select("user_id"), num_queries


def _read_events(split: ibis.Table, part: EvaluationPart, by: schema.AskedBy, log: Any) -> pa.Table:
    """Reads the targets, and the events that a query may know, by user and in order."""
    before = (*_PARTS_BEFORE[part], *([] if by == "users" else [part]))
    has_requests = "request_id" in split.columns
    known = {
        "_is_positive": is_positive(split),
        "_is_dislike": is_dislike(split),
        "_is_target": split["_is_target"],
        "_request": split["request_id"] if has_requests else ibis.null("int64"),
        **at_request(split, log.request_features),
    }
    if "timestamp" in split.columns:
        known["_seconds"] = whole_seconds(split["timestamp"])
    time = split[order_keys(split)[0]]
    start, first = query_start(split, time)
    rows = split.mutate(**known, _time=time, _start=start, _first=first)
    rows = rows.filter(rows["_is_target"] | (rows["part"].isin(before) & was_shown(rows)))
    rows = rows.select("user_id", "item_id", "event_number", "_time", "_start", "_first", *known)
    if by != "users":
        names = {"query_time": "_start", "query_number": "_first"}
        queries = rows.filter("_is_target").select("user_id", "event_number", **names)
        events = rows.rename(time="_time")
        counts = with_num_before(queries, events, "user_id", log.ties, "_num_before")
        rows = rows.left_join(counts.select("event_number", "_num_before"), "event_number")
    return rows.order_by(["user_id", "_time", "event_number"]).to_pyarrow()


def _refuse_endless(rows: pa.Table, part: EvaluationPart) -> None:
    """Refuses a user whose queries' histories would fill the memory: it grows with their square."""
    users, is_target = numbered(rows["user_id"]), rows["_is_target"].to_numpy()
    num_before = np.where(is_target, rows["_num_before"].to_numpy(), 0)
    user = int(np.bincount(users, num_before).argmax())
    if (num := int(num_before[users == user].sum())) > _MOST_OF_ONE:
        name = rows["user_id"][int(np.argmax(users == user))].as_py()
        raise DataError(
            f"User {name!r:.80} has {int((is_target & (users == user)).sum()):,} positives in the "
            f"{part} part, with {num:,} events before them in all, which may not fit in memory. If "
            "that id stands for many people, such as guests, leave its rows out, or give each "
            "visit an id of its own; else set evaluation.by to users."
        )


def numbered(values: pa.ChunkedArray) -> np.ndarray:
    """Numbers the distinct values in the order in which they come; -1 for null."""
    # Encoded before the chunks are combined: a chunk of text holds 2 GB at most.
    return values.dictionary_encode().combine_chunks().indices.fill_null(-1).to_numpy()


def _by_user(rows: pa.Table) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the rows of each user's query: all targets, and what was shown before the cut."""
    users, is_target = numbered(rows["user_id"]), rows["_is_target"].to_numpy()
    ends = np.flatnonzero(np.diff(users, append=-1)) + 1
    for positions in np.split(np.arange(ends[-1]), ends[:-1]):
        yield positions[is_target[positions]], positions[~is_target[positions]]


def _by_request(rows: pa.Table) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the rows of each request's query: its targets, and what was shown before it."""
    all_users, all_requests = numbered(rows["user_id"]), numbered(rows["_request"])
    targets = np.flatnonzero(rows["_is_target"].to_numpy())
    users, num_before = all_users[targets], rows["_num_before"].take(targets).to_numpy()
    # A target without a request is a separate query.
    requests = np.where(all_requests[targets] < 0, -1 - targets, all_requests[targets])
    keys = np.stack([users, num_before, requests])
    order = np.lexsort([targets, *keys[::-1]])
    is_next = np.any(np.diff(keys[:, order], axis=1), axis=0)
    for positions in np.split(order, np.flatnonzero(is_next) + 1):
        start = np.searchsorted(all_users, users[positions[0]])
        before = np.arange(start, start + num_before[positions[0]])
        yield targets[positions], before


def _count_candidates(
    items: ibis.Table, table: ibis.Table, **numbers: ir.Scalar
) -> Iterator[np.ndarray]:
    """Yields the ids of all items, ascending, and each aggregate of their rows in `table`."""
    # Every item is a candidate, clicked or not, as in service.
    counts = table.group_by("item_id").agg(**numbers)
    candidates = (
        items.select("item_id")  # An item feature may be called count too.
        .left_join(counts, "item_id")
        .select("item_id", *numbers)
        .fill_null(dict.fromkeys(numbers, 0))
        .order_by("item_id")
        .to_pyarrow()
    )
    return (candidates[name].to_numpy() for name in candidates.column_names)
