"""The queries of an evaluation, and what they are to find."""

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
from tfrs_pipeline.retrieval import Query

EvaluationPart: TypeAlias = Literal["validation", "test"]

# Parts that a query may know: those before the user's cut; for "test" also the validation part.
_PARTS_BEFORE: dict[EvaluationPart, tuple[str, ...]] = {
    "validation": ("train", "fold_in"),
    "test": ("train", "validation", "fold_in"),
}


@dataclass(frozen=True, eq=False)
class Holdout:
    """The queries of an evaluation: one for each user, in aligned lists, sorted by user id.

    Args:
        user_ids: [num_queries] int64 or object (str).
        histories: Per query, the item ids of the positives before the user's cut, oldest first,
            except those from the request that brought the first target.
        relevant: Per query, the distinct item ids of the targets, 1 or more.
        clicked: Per query, the distinct item ids of all positives before the user's cut.
        seen: Per query, the distinct item ids clicked or exposed before the cut.
        candidate_ids: [num_candidates] int64 or object (str): all items of the log, ascending.
        candidate_counts: [num_candidates] int64 training positives (see `Split.holdout`).
        num_sampled_from: How many queries this sample was drawn from; None if it is not a sample.
        requests: Per query, the raw features, by name, of the request that brought the first
            target. None in a log without request features.
        history_times: Per query, the time of each item of `histories`, in whole seconds since 1970.
            None in a log without timestamps.
        times: [num_queries] int64, when each query comes, in seconds: the time of the first target.
            None in a log without timestamps.

    Raises:
        ValueError: If a list lacks one entry per user, or the counts one per candidate.
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
        for name, values in [*vars(self).items()]:
            if values is None or name == "num_sampled_from":
                continue
            if name.endswith("_ids"):
                values = as_id_array(values)
            else:
                values = np.asarray(values) if name in ("candidate_counts", "times") else [*values]
            object.__setattr__(self, name, values)
            of = "candidate_ids" if name.startswith("candidate") else "user_ids"
            if len(values) != len(getattr(self, of)):
                raise ValueError(
                    f"{name} must hold one entry for each of the {len(getattr(self, of))} {of}. "
                    f"Received: {len(values)}"
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

    def sample(self, num_queries: int, seed: int = 0) -> Holdout:
        """Draws at most `num_queries` queries at random, without replacement.

        Returns a holdout of these, sorted by user id, or itself if it has no more.
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
        """Returns queries for a `Retriever`: user_id, history and, if known, times and request.

        A query's time is the `timestamp` of its request, a `datetime`.
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
        """Returns the items that each ranking excludes: those clicked, or seen, before the cut.

        Returns None for "none". Raises a `ValueError` for an unknown rule.
        """
        if rule not in ("clicked", "seen", "none"):
            raise ValueError(f"exclude must be 'clicked', 'seen' or 'none'. Received: {rule!r}.")
        return {"clicked": self.clicked, "seen": self.seen, "none": None}[rule]


def check_holdout(holdout: object) -> None:
    """Refuses (`TypeError`) anything but a holdout, such as the log that one is made from."""
    if not isinstance(holdout, Holdout):
        raise TypeError(
            "Evaluation needs a Holdout, the validation or test that `Log.split` makes. Received: "
            f"{type(holdout).__name__}."
        )


def make_holdout(
    split: ibis.Table,
    part: EvaluationPart,
    items: ibis.Table,
    training: ibis.Table,
    *,
    request_features: Mapping[str, str],
    max_queries: int | None = None,
    seed: int = 0,
) -> Holdout:
    """Makes the queries of a part, one for each user with a positive in it.

    When a request is made, its own clicks are unknown. So histories leave out clicks from the
    request of a user's first target, but rankings exclude them: training had them.

    `split` holds events with `part`; `items` are the candidates; `training` holds the events whose
    positives are counted. The engine draws `max_queries` users by `seed` and reads no others.
    Raises a `DataError` if there is no positive.
    """
    asked = split.filter((split["part"] == part) & is_positive(split))
    users, num_users = _draw_users(asked, max_queries, seed)
    rows = _read_events(split, part, users)
    if rows.num_rows == 0:
        without = " In Python, split.train and split.test do not need it."
        raise DataError(
            f"The {part} part has no positive. Give split.{part} a larger share or an earlier "
            f"moment, or lower split.min_positives.{without if part == 'validation' else ''}"
        )
    columns = {name: rows[name].to_numpy() for name in rows.column_names if name != "_request"}
    user_ids, is_target = np.unique(columns["user_id"]), columns["_is_target"]

    def per_user(keep: np.ndarray, name: str = "item_id") -> list[np.ndarray]:
        users, values = columns["user_id"][keep], columns[name][keep]
        starts = np.searchsorted(users, user_ids, side="left")
        ends = np.searchsorted(users, user_ids, side="right")
        return [values[start:end] for start, end in zip(starts, ends, strict=True)]

    was_clicked = columns["_is_positive"] & ~is_target
    is_history = was_clicked & ~_is_of_first_request(rows, user_ids)
    times: dict[str, Any] = {}
    if "_seconds" in columns:
        first = [seconds[0] for seconds in per_user(is_target, "_seconds")]
        times = {"history_times": per_user(is_history, "_seconds"), "times": np.array(first)}
    candidate_ids, counts = _count_candidates(items, training)
    return Holdout(
        user_ids=user_ids,
        histories=per_user(is_history),
        relevant=[np.unique(ids) for ids in per_user(is_target)],
        clicked=[np.unique(ids) for ids in per_user(was_clicked)],
        seen=[np.unique(ids) for ids in per_user(~is_target)],
        candidate_ids=candidate_ids,
        candidate_counts=counts,
        num_sampled_from=num_users,
        requests=_first_requests(split.semi_join(users, "user_id"), part, request_features),
        **times,
    )


def _draw_users(
    asked: ibis.Table, max_queries: int | None, seed: int
) -> tuple[ibis.Table, int | None]:
    """Returns at most `max_queries` users, and the number that they were drawn from, if drawn."""
    users = asked.select("user_id").distinct()
    if max_queries is None or (num_users := count_rows(users)) <= max_queries:
        return users, None
    drawn = [random_key(users["user_id"], seed=seed), "user_id"]
    return users.order_by(drawn).limit(max_queries), num_users


def _read_events(split: ibis.Table, part: EvaluationPart, users: ibis.Table) -> pa.Table:
    """Reads the users' targets, and what they were shown before, in order."""
    is_target = split["part"] == part
    was_shown = split["stage"].isin([Stage.CLICKED.value, Stage.EXPOSED.value])
    is_read = is_target & is_positive(split)
    is_read |= split["part"].isin(_PARTS_BEFORE[part]) & was_shown
    known = {"_is_positive": is_positive(split), "_is_target": is_target}
    if "timestamp" in split.columns:
        known["_seconds"] = whole_seconds(split["timestamp"])
    if "request_id" in split.columns:
        known["_request"] = split["request_id"]
    return (
        split.mutate(**known)
        .filter(is_read)
        .semi_join(users, "user_id")
        .order_by(["user_id", *order_keys(split)])
        .select("user_id", "item_id", *known)
        .to_pyarrow()
    )


def _is_of_first_request(rows: pa.Table, user_ids: np.ndarray) -> np.ndarray:
    """Marks rows from the request of their user's first target, if requests are logged."""
    if "_request" not in rows.column_names:
        return np.zeros(len(rows), bool)
    requests = rows["_request"].combine_chunks().dictionary_encode()
    codes = requests.indices.fill_null(-1).to_numpy()
    users, targets = rows["user_id"].to_numpy(), np.flatnonzero(rows["_is_target"].to_numpy())
    first_targets = targets[np.searchsorted(users[targets], user_ids)]
    own = codes[first_targets[np.searchsorted(user_ids, users)]]
    return (codes == own) & (codes >= 0)


def _first_requests(
    events: ibis.Table, part: EvaluationPart, features: Mapping[str, str]
) -> list[dict[str, Any]] | None:
    """Returns the request features of each user's first positive in a part, by user id."""
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
        items.select("item_id")  # An item feature may be called count too.
        .left_join(counts, "item_id")
        .select("item_id", count=lambda t: t["count"].fill_null(0))
        .order_by("item_id")
        .to_pyarrow()
    )
    return candidates["item_id"].to_numpy(), candidates["count"].to_numpy()
