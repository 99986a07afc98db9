"""Logs of several kinds, for benchmarks of settings that should suit all of them.

    ratings          MovieLens-100K, the last share of each user's likes held out
    ratings, time    the same, split by time
    200 users        the first log, with 200 of its users, without features
    funnel           a simulated funnel of 3,000 users and 2,000 items
    kuairand         KuaiRand's clicks (`request.py` says which), --data-dir
    kuairand, tab    the same with the tab of the app and the hour as request features
    sparse ml-1m     10,000 ordered stretches of MovieLens-1M's sequences in SASRec's version, of 9
                     events on average, without times, --data-dir
    sparse kuairand-pure   the last long views of 10,000 users of a cut of KuaiRand-Pure with 5 or
                     more, 19 on average, without times, --data-dir

Also the logs of `unseen_logs.py` whose folders are in --data-dir.
Logs with times are split by time; in others, the last two events of each user are held out:

    cosmetics, last  cosmetics, with the last two events of each user held out
    sessions         the same, because a session that is split by time has no history

Logs without an order, of ids alone, with a random share of each user's clicks held out:

    ratings, funnel, sparse ...   the clicks of the same logs
    ml-1m            2,000 users of MovieLens-1M, --data-dir
    gowalla          6,000 users of Gowalla's training items in LightGCN's split, --data-dir

--data-dir holds the folders ml-1m, kuairand-pure and gowalla. Without it only the logs that need no
folder are made. For `regret.py`,

    python benchmarks/log_kinds.py --data-dir DIR --to LOGS

writes LOGS/NAME.parquet for each of them, and "NAME, no order" for each without an order. The
events have their part of the split; features are left out.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from leaderboard_data import convert_gowalla, convert_ml_1m
from request import PLANS, read_events
from unseen_logs import UNSEEN

from tfrs_pipeline.data.log import Split
from tfrs_pipeline.data.schema import Exclude
from tfrs_pipeline.run.data import load_log
from tfrs_pipeline.sources.simulated import simulate_funnel

# Where users return to the same items, nothing is excluded from a ranking.
EXCLUDE: dict[str, Exclude] = dict.fromkeys(
    ("sessions", "views", "plays", "baskets", "tafeng", "tagged"), "none"
)
LAST_TWO: dict[str, Any] = {"kind": "last_n", "validation": 1, "test": 1, "min_positives": 3}
# Of the sparse logs.
NUM_USERS, MIN_EVENTS, MEAN_EVENTS = 10_000, 5, 9
BY_TIME = ("cosmetics", "sports", "reviews", "baskets", "grocery", "tagged")


def ratings(kind: str, num_users: int | None = None) -> Split:
    """Splits MovieLens-100K, of all users or of some."""
    log = load_log(tp.movielens_config().data)
    if num_users is not None:
        users = log.users["user_id"].to_pyarrow().to_numpy()
        kept = np.random.default_rng(0).choice(np.sort(users), num_users, replace=False).tolist()
        events = log.events.filter(log.events["user_id"].isin(kept))
        log = tp.Log.from_ibis(events)
    return log.split(kind)


def kuairand(data_dir: Path, features: dict[str, Any]) -> Split:
    """Splits KuaiRand's clicks by their day."""
    return tp.Log.from_table(
        read_events(data_dir / "kuairand-pure"), request_features=features
    ).split("column")


def cut_ml_1m(data_dir: Path, folder: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns users and their sequences of MovieLens-1M."""
    rng = np.random.default_rng(0)
    convert_ml_1m(data_dir, folder)
    events = pq.read_table(folder / "events.parquet")
    users = events["user_id"].to_numpy()
    order = np.argsort(users, kind="stable")
    items = events["item_id"].to_numpy()[order]
    begins = np.flatnonzero(np.diff(users[order], prepend=-1))
    stretches = []
    for begin, end in zip(begins, [*begins[1:], len(items)], strict=True):
        while end - begin >= MIN_EVENTS:
            length = min(MIN_EVENTS + rng.geometric(1 / (MEAN_EVENTS - MIN_EVENTS)), end - begin)
            stretches.append((begin, begin + length))
            begin += length
    kept = [stretches[i] for i in rng.choice(len(stretches), NUM_USERS, replace=False)]
    return np.arange(NUM_USERS), [items[begin:end] for begin, end in kept]


def cut_kuairand(data_dir: Path, _: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns users and their sequences of KuaiRand."""
    rng = np.random.default_rng(0)
    sequences = pq.read_table(data_dir / "user_sequences.parquet").sort_by("user_id").to_pandas()
    long_enough = sequences[sequences["long_watch_seq"].map(len) >= MIN_EVENTS]
    kept = long_enough.iloc[np.sort(rng.choice(len(long_enough), NUM_USERS, replace=False))]
    return kept["user_id"].to_numpy(), list(kept["long_watch_seq"])


CUTS = {"ml-1m": cut_ml_1m, "kuairand-pure": cut_kuairand}


def sparse(data: str, data_dir: Path, folder: Path) -> Split:
    """Splits a sparse log; holds out the last two events of each user."""
    users, sequences = CUTS[data](data_dir / data, folder)
    user_ids = np.repeat(users, [len(sequence) for sequence in sequences])
    events = pa.table({"user_id": user_ids, "item_id": np.concatenate(sequences)})
    # The order of the rows is that of the events.
    return tp.Log.from_table(events).split(**LAST_TWO)


def unseen(name: str, data_dir: Path) -> Split:
    """Splits a log of `unseen_logs.py`."""
    of, _, is_last = name.partition(", ")
    log = tp.Log.from_table(UNSEEN[of](data_dir / of))
    return log.split(**LAST_TWO) if is_last or of not in BY_TIME else log.split("time")


def logs(data_dir: Path | None, folder: Path) -> dict[str, Callable[[], Split]]:
    """Returns a function that makes each log, by name."""
    made: dict[str, Callable[[], Split]] = {
        "ratings": lambda: ratings("last_share"),
        "ratings, time": lambda: ratings("time"),
        "200 users": lambda: ratings("last_share", 200),
        "funnel": lambda: simulate_funnel(
            num_users=3000, num_items=2000, num_requests=20_000, seed=1
        ).log.split("time"),
    }
    if data_dir is None:
        return made
    unseen_names = (*UNSEEN, "cosmetics, last")
    names = [name for name in unseen_names if (data_dir / name.partition(",")[0]).is_dir()]
    return {
        **made,
        **{name: (lambda of=name: unseen(of, data_dir)) for name in names},
        "kuairand": lambda: kuairand(data_dir, {}),
        "kuairand, tab": lambda: kuairand(data_dir, PLANS["tab, hour"]),
        **{f"sparse {name}": (lambda of=name: sparse(of, data_dir, folder)) for name in CUTS},
    }


def without_order(clicks: pa.Table, num_users: int | None = None) -> Split:
    """Splits pairs of a user and an item at random, of all users or of `num_users` of them."""
    rng = np.random.default_rng(0)
    clicks = clicks.select(["user_id", "item_id"]).sort_by(
        [("user_id", "ascending"), ("item_id", "ascending")]
    )
    if num_users is not None:
        users = clicks["user_id"].to_numpy()
        kept = rng.choice(np.unique(users), num_users, replace=False)
        clicks = clicks.filter(pa.array(np.isin(users, kept)))
    clicks = clicks.take(pa.array(rng.permutation(len(clicks))))
    log = tp.Log.from_table(clicks, reading=tp.Reading(is_ordered=False))
    return log.split("last_share", validation=0.1, test=0.2)


def unordered_logs(data_dir: Path | None, folder: Path) -> dict[str, Callable[[], Split]]:
    """Returns a function that makes each log without an order, by name."""

    def clicks_of(name: str) -> pa.Table:
        events = logs(data_dir, folder)[name]().log.events
        return events.filter(events["stage"] == "clicked").to_pyarrow()

    def converted(convert: Callable[[Path, Path], None], name: str) -> pa.Table:
        assert data_dir is not None
        convert(data_dir / name, folder)
        events = pq.read_table(folder / "events.parquet")
        if "part" in events.column_names:
            events = events.filter(pc.equal(events["part"], "train"))
        return events

    made = {
        name: (lambda of=name: without_order(clicks_of(of)))
        for name in ("ratings", "funnel", *(f"sparse {of}" for of in CUTS if data_dir))
    }
    if data_dir is None:
        return made
    return {
        **made,
        "ml-1m": lambda: without_order(converted(convert_ml_1m, "ml-1m"), 2000),
        "gowalla": lambda: without_order(converted(convert_gowalla, "gowalla"), 6000),
    }


def main() -> None:
    """Writes the logs as event files; those that are there are not made again."""
    parser = argparse.ArgumentParser(description="Writes logs as event files, with their splits.")
    parser.add_argument("--data-dir", type=Path, help="Folder of the data sets.")
    parser.add_argument("--to", type=Path, required=True, help="Where to write the files.")
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        makers = logs(options.data_dir, Path(folder))
        unordered = unordered_logs(options.data_dir, Path(folder))
        makers |= {f"{name}, no order": make for name, make in unordered.items()}
        for name, make in makers.items():
            if (path := options.to / f"{name}.parquet").exists():
                continue
            events = make().events.order_by("event_number")
            columns = ("user_id", "item_id", "timestamp", "stage", "request_id", "part")
            present = [column for column in columns if column in events.columns]
            events.select(*present).to_parquet(path)


if __name__ == "__main__":
    main()
