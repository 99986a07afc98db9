"""What an evaluation asks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

import ibis
import numpy as np
import pyarrow as pa

from tfrs_pipeline.data.engines import random_key
from tfrs_pipeline.data.ids import as_id_array
from tfrs_pipeline.data.requests import at_request, whole_seconds
from tfrs_pipeline.data.schema import DataError, Exclude, Stage, count_rows
from tfrs_pipeline.data.split import is_positive, order_keys
from tfrs_pipeline.features.kinds import FeatureKind
from tfrs_pipeline.retrieval import Query

EvaluationPart: TypeAlias = Literal["validation", "test"]

# What a query may know: everything before the user's cut, so for "test" the validation part too.
_PARTS_BEFORE: dict[EvaluationPart, tuple[str, ...]] = {
    "validation": ("train", "fold_in"),
    "test": ("train", "validation", "fold_in"),
}


@dataclass(frozen=True, eq=False)
class Holdout:
    """What an evaluation asks: one query a user, aligned lists, sorted by user id.

    Args:
        user_ids: [num_queries] int64 or object (str).
        histories: Per query, the item ids of the positives before the user's cut, oldest first,
            without those of the request that brought the first to find.
        relevant: Per query, the distinct item ids of the positives to find, 1 or more.
        clicked: Per query, the distinct item ids of all positives before the user's cut.
        seen: Per query, the distinct item ids clicked or exposed before the cut.
        candidate_ids: [num_candidates] all items of the log, ascending: int64 or object (str).
        candidate_counts: [num_candidates] int64 training positives (see `Split.holdout`).
        num_sampled_from: Of a sample, how many queries it was drawn from; else None.
        requests: Per query, the raw request features by name: those of the request that brought the
            first of the positives to find, since that is the one which is asked about. None in a
            log without request features.
        history_times: Per query, the time of each item of `histories`, in whole seconds since 1970;
            None in a log without timestamps.
        times: [num_queries] int64, when each query comes: the time of the first of the positives to
            find, in seconds likewise; None likewise.

    Raises:
        ValueError: If a list has not one entry a user, or the counts not one a candidate.
    """

    user_ids: np.ndarray
    histories: list[np.ndarray]
    relevant: list[np.ndarray]
    clicked: list[np.ndarray]
    seen: list[np.ndarray]
    candidate_ids: np.ndarray
    candidate_counts: np.ndarray
    num_sampled_from: int | None = None
    requests: list[dict[str, Any]] | None = None
    history_times: list[np.ndarray] | None = None
    times: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("user_ids", "candidate_ids"):
            object.__setattr__(self, name, as_id_array(getattr(self, name)))
        for name in ("candidate_counts", "times"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, np.asarray(values))
        of_queries = ("histories", "relevant", "clicked", "seen", "requests", "history_times")
        for name in of_queries:
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, list(values))
        for name in (*of_queries, "times"):
            values = getattr(self, name)
            if values is not None and (num := len(values)) != len(self):
                raise ValueError(
                    f"{name} must hold one entry a query, for each of the {len(self)} user_ids. "
                    f"Received: {num}"
                )
        if (num := len(self.candidate_counts)) != len(self.candidate_ids):
            raise ValueError(
                "candidate_counts must hold one count a candidate, for each of the "
                f"{len(self.candidate_ids)} candidate_ids. Received: {num}"
            )

    def __len__(self) -> int:
        return len(self.user_ids)

    def __repr__(self) -> str:
        return f"Holdout({len(self):,} queries, {len(self.candidate_ids):,} candidates)"

    def fingerprint(self) -> str:
        """Tells one holdout from another by its users and what they are to find: 12 digits."""
        digest = hashlib.sha256()
        for values in (self.user_ids, *self.relevant):
            digest.update(f"{np.asarray(values).tolist()}".encode())
        return digest.hexdigest()[:12]

    def sample(self, num_queries: int, seed: int = 0) -> Holdout:
        """Draws queries at random, without replacement; all that draw tell how many there were.

        Args:
            num_queries: At most.
            seed: Of the draw.

        Returns:
            A holdout of the queries drawn, by user id as before; itself if there are no more.
        """
        if len(self) <= num_queries:
            return self
        drawn = np.random.default_rng(seed).choice(len(self), num_queries, replace=False)
        drawn.sort()
        lists: dict[str, Any] = {
            name: [of_queries[i] for i in drawn]
            for name, of_queries in vars(self).items()
            if isinstance(of_queries, list)
        }
        return replace(
            self,
            user_ids=self.user_ids[drawn],
            num_sampled_from=self.num_sampled_from or len(self),
            times=None if self.times is None else self.times[drawn],
            **lists,
        )

    def as_queries(self) -> list[Query]:
        """Returns what a `Retriever` takes: user_id, history and, if there are, times and request.

        The time of a query is the `timestamp` of its request, a `datetime`.
        """
        columns: dict[str, Any] = {"user_id": self.user_ids.tolist(), "history": self.histories}
        requests = self.requests
        if self.history_times is not None and self.times is not None:
            columns["history_timestamps"] = self.history_times
            moments = [datetime.fromtimestamp(time, UTC) for time in self.times.tolist()]
            requests = [
                {**request, "timestamp": moment}
                for request, moment in zip(requests or [{}] * len(self), moments, strict=True)
            ]
        if requests is not None:
            columns["request"] = requests
        return [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]

    def excluded(self, rule: Exclude) -> list[np.ndarray] | None:
        """Returns what an evaluation excludes from each ranking.

        Args:
            rule: What the user clicked before the cut, what the user saw before it, or nothing.

        Returns:
            Item ids of each query; None for nothing.

        Raises:
            ValueError: If there is no such rule.
        """
        if rule not in ("clicked", "seen", "none"):
            raise ValueError(f"exclude must be 'clicked', 'seen' or 'none'. Received: {rule!r}.")
        return {"clicked": self.clicked, "seen": self.seen, "none": None}[rule]


def check_holdout(holdout: object) -> None:
    """Refuses (`TypeError`) what is no holdout, such as the log that one is made of."""
    if not isinstance(holdout, Holdout):
        raise TypeError(
            "Evaluates on a Holdout, the validation or test that `Log.split` makes. Received: "
            f"{type(holdout).__name__}."
        )


def make_holdout(
    split: ibis.Table,
    part: EvaluationPart,
    items: ibis.Table,
    training: ibis.Table,
    *,
    request_features: Mapping[str, FeatureKind],
    max_queries: int | None = None,
    seed: int = 0,
) -> Holdout:
    """Makes the queries of a part, one for each user with a positive in it.

    What else was clicked in the request of the first of them was not known when that was made, and
    is in no history. But training had it, so a ranking excludes it. A `DataError` if there is no
    positive.

    Args:
        split: Events with `part`.
        part: Whose positives are to be found.
        items: The log's item table: the candidates.
        training: Events whose positives are the candidates' counts.
        request_features: What the queries' requests bring (see `Log`).
        max_queries: Where there are more, so many are drawn at random by the engine, so that no
            other's events are read. None is all.
        seed: Of the draw.
    """
    is_asked = (split["part"] == part) & is_positive(split)
    was_shown = split["stage"].isin([Stage.CLICKED.value, Stage.EXPOSED.value])
    is_read = is_asked | (split["part"].isin(_PARTS_BEFORE[part]) & was_shown)
    asking = split.filter(is_asked).select("user_id").distinct()
    num_users = None
    if max_queries is not None and (num := count_rows(asking)) > max_queries:
        num_users = num
        drawn = [random_key(asking["user_id"], seed=seed), "user_id"]
        asking = asking.order_by(drawn).limit(max_queries)
    known = {"_is_positive": is_positive(split), "_is_target": split["part"] == part}
    if "timestamp" in split.columns:
        known["_seconds"] = whole_seconds(split["timestamp"])
    if "request_id" in split.columns:
        known["_request"] = split["request_id"]
    rows = (
        split.mutate(**known)
        .filter(is_read)
        .semi_join(asking, "user_id")
        .order_by(["user_id", *order_keys(split)])
        .select("user_id", "item_id", *known)
        .to_pyarrow()
    )
    if rows.num_rows == 0:
        without = " In Python, split.train and split.test do not need it."
        raise DataError(
            f"The {part} part has no positive. Give split.{part} a larger share or an earlier "
            f"moment, or lower split.min_positives.{without if part == 'validation' else ''}"
        )
    columns = {name: rows[name].to_numpy() for name in rows.column_names if name != "_request"}
    user_ids = columns["user_id"]
    starts = np.flatnonzero(np.concatenate([[True], user_ids[1:] != user_ids[:-1]]))

    def per_user(keep: np.ndarray, name: str = "item_id") -> list[np.ndarray]:
        ends = np.cumsum(np.add.reduceat(keep.astype(np.int64), starts))
        return np.split(columns[name][keep], ends[:-1])

    is_target = columns["_is_target"]
    was_clicked = columns["_is_positive"] & ~is_target
    is_history = was_clicked.copy()
    if "_request" in rows.column_names:
        is_history &= ~_of_first_request(rows["_request"], is_target, starts)
    histories = per_user(is_history)
    times: dict[str, Any] = {}
    if "_seconds" in columns:
        first = [seconds[0] for seconds in per_user(is_target, "_seconds")]
        times = {"history_times": per_user(is_history, "_seconds"), "times": np.array(first)}
    candidate_ids, counts = _count_candidates(items, training)
    return Holdout(
        user_ids=user_ids[starts],
        histories=histories,
        relevant=[np.unique(ids) for ids in per_user(is_target)],
        clicked=[np.unique(ids) for ids in per_user(was_clicked)],
        seen=[np.unique(ids) for ids in per_user(~is_target)],
        candidate_ids=candidate_ids,
        candidate_counts=counts,
        num_sampled_from=num_users,
        requests=_first_requests(split.semi_join(asking, "user_id"), part, request_features),
        **times,
    )


def _of_first_request(
    requests: pa.ChunkedArray, is_target: np.ndarray, starts: np.ndarray
) -> np.ndarray:
    """Marks the rows, each user's from `starts` on, of the request of the user's first target."""
    codes = requests.combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy()
    targets = np.flatnonzero(is_target)
    own = codes[targets[np.searchsorted(targets, starts)]]
    return (codes == np.repeat(own, np.diff(starts, append=len(codes)))) & (codes >= 0)


def _first_requests(
    events: ibis.Table, part: EvaluationPart, features: Mapping[str, FeatureKind]
) -> list[dict[str, Any]] | None:
    """Returns the request features of each user's first positive of a part, by user id."""
    if not features:
        return None
    asked = events.mutate(**at_request(events, features))
    asked = asked.filter((asked["part"] == part) & is_positive(asked))
    in_order = ibis.window(group_by="user_id", order_by=order_keys(asked))
    first = asked.mutate(_place=ibis.row_number().over(in_order)).filter(lambda t: t["_place"] == 0)
    return first.order_by("user_id").select(*features).to_pyarrow().to_pylist()


def _count_candidates(items: ibis.Table, training: ibis.Table) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids of all items, ascending, and how many training positives each has."""
    positives = training.filter(is_positive)
    counts = positives.group_by("item_id").agg(count=positives.count())
    candidates = (
        items.select("item_id")  # A feature may be called count, too.
        .left_join(counts, "item_id")
        .select("item_id", count=lambda t: t["count"].fill_null(0))
        .order_by("item_id")
        .to_pyarrow()
    )
    return candidates["item_id"].to_numpy(), candidates["count"].to_numpy()
