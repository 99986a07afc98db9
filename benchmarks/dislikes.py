"""Measures dislikes and skips as negatives of their own user: at a small share, or not at all.

The package never makes an item that was shown and not clicked a negative of its user. This asks
whether two kinds of shown items deserve it, since they say more than a missing click:

    ratings   MovieLens's ratings (100K, or the small set of ratings). Ratings of 4 and more are
              clicks. `disliked` are ratings of 2 and less, `indifferent` the ones between.
    kuairand  The cut of KuaiRand-Pure that kuairand.py reads, 4,000 users with a skip. Long views
              are clicks. `skipped` are videos that were left within a second, `watched` those that
              were shown on the same days, kept for a second or more, and not viewed for long.
              Trained on the lists and the days up to May 5, validated on May 6, tested on the last
              two days.
    funnel    The simulated funnel of funnel.py, whose truth is known. Of the items that were shown
              and not clicked, those with the lowest true liking plus noise (logistic, standard
              deviation 1.8 logits) are `disliked` (2%) or `skipped` (24%); `others` are the rest.

Each kind is a custom kind of hard negatives: every positive of a user draws four columns from the
user's list, which share f of the negatives' weight. At f = 0 the list is not drawn from, but its
items are no longer masked: easy columns that hold them count, as for any other item. Shares are
compared on validation, with the first two seeds; the best one of each kind is then trained with all
seeds and measured on the test, against the same model without hard negatives. The last kind of each
log is a control and takes the share of the first. Rankings exclude what the user has seen, so that
no kind gains from pushing down what is never shown again. On the funnel, `truth` is recall@50 of
the 50 unseen items that the user would most probably click.

    python benchmarks/dislikes.py ratings --data u.data --json dislikes_ml_100k.json
    python benchmarks/dislikes.py kuairand --data kuairand-pure --json dislikes_kuairand.json
    python benchmarks/dislikes.py funnel --json dislikes_funnel.json

`--rows FILE` keeps a line for each training, so that a stopped measurement goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import duckdb
import numpy as np
import pandas as pd
import tensorflow as tf
from kuairand import EVENTS
from record import paired, parser_with_json, write_json

from tfrs_pipeline.data.log import Split
from tfrs_pipeline.model.corpus import Corpus, TrainingSet
from tfrs_pipeline.run.comparison import OverSeeds
from tfrs_pipeline.sources.simulated import simulate_funnel

# At 0, the pairs are no longer masked: they are negatives of their user like any other item.
SHARES = (0.0, 0.005, 0.01, 0.02, 0.05)
CONTROLS = ("indifferent", "watched", "others")
NUM_CHOOSING = 2  # Seeds whose validation chooses the share.
REFERENCE = "none"
K, MONITOR = 50, "ndcg@100"


@dataclasses.dataclass(frozen=True)
class UserLists:
    """Hard negatives of each user: items that were shown to them, from a table of pairs of ids."""

    pairs: pd.DataFrame  # user_id, item_id
    share: float
    num: int = 4
    allow_exposed: bool = True

    def pools(self, samples: tp.Samples) -> dict[str, Any]:
        """Returns the list of each user; the name lets it hold items that were shown."""
        by_user = self.pairs.groupby("user_id")["item_id"].agg(list)
        items = [by_user.get(user, []) for user in samples.query_ids.values]
        return {"exposed": (samples.candidate_ids.rows_by_list([[], *items]), samples.query_rows)}


@dataclasses.dataclass(frozen=True)
class Task:
    """A split log, pairs of user and item by kind, controls last, and a measure of the truth."""

    split: Split
    kinds: Mapping[str, pd.DataFrame]
    truth: Callable[[tp.Retriever], float] | None = None


def shown_in(split: Split) -> pd.DataFrame:
    """Returns the pairs that training has as shown and not clicked."""
    events = split.train.events
    shown = events.filter(events.stage == "exposed").select("user_id", "item_id")
    return shown.distinct().order_by(["user_id", "item_id"]).to_pandas()


def ratings(options: argparse.Namespace, seed: int) -> Task:
    """Reads ratings: u.data of 100K, a file .inter of RecBole, or the small set's ratings.csv."""
    text = options.data.suffix == ".csv"
    names = ["user_id", "item_id", "rating", "timestamp"]
    has_names = options.data.suffix != ".data"
    table = pd.read_csv(
        options.data, sep="," if text else "\t", names=names, header=0 if has_names else None
    )
    reading = tp.Reading(rating_threshold=4)
    split = tp.Log.from_table(table, reading=reading).split("last_share", validation=0.1, test=0.2)
    rated = shown_in(split).merge(table, on=["user_id", "item_id"])
    is_low = rated["rating"] <= 2
    return Task(split, {"disliked": rated[is_low], "indifferent": rated[~is_low]})


def kuairand(options: argparse.Namespace, seed: int) -> Task:
    """Reads the cut: its lists, then the days with the seconds watched."""
    rows = f"""SELECT user_id, video_id AS item_id, time_ms, play_time_ms, long_view, date
        FROM read_parquet(['{options.data}/val.parquet', '{options.data}/test.parquet'])"""
    days = duckdb.sql(rows).df()
    days["part"] = np.where(days["date"] <= 20220505, "train", "test")
    days.loc[days["date"] == 20220506, "part"] = "validation"
    trained = days[(days["part"] == "train") & (days["long_view"] == 0)]
    is_skip = trained["play_time_ms"] < 1000
    users = np.unique(trained["user_id"][is_skip])
    users = np.random.default_rng(0).choice(users, min(options.users, len(users)), replace=False)
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder) / "events.parquet"
        duckdb.sql(EVENTS.format(folder=options.data, events=events))
        lists = pd.read_parquet(events).query("part == 'train'")
    days["stage"] = np.where(days["long_view"] == 1, "clicked", "exposed")
    table = pd.concat([lists, days.sort_values("time_ms", kind="stable")], ignore_index=True)
    table = table[table["user_id"].isin(users)][["user_id", "item_id", "stage", "part"]]
    print(f"{len(table):,} events, {is_skip.sum():,} skips, {len(users):,} users")
    pairs = {
        "skipped": trained[is_skip & trained["user_id"].isin(users)],
        "watched": trained[~is_skip & trained["user_id"].isin(users)],
    }
    return Task(tp.Log.from_table(table).split("column"), pairs)


def funnel(options: argparse.Namespace, seed: int) -> Task:
    """Simulates a funnel, another one for each seed, and who dislikes or skips what."""
    simulation = simulate_funnel(num_users=1000, num_items=1000, num_requests=10_000, seed=seed)
    split = simulation.log.split("last_share", validation=0.1, test=0.2)
    shown = shown_in(split)
    probability = simulation.click_probability(simulation.user_ids)
    liking = probability[shown["user_id"] - 1, shown["item_id"] - 1]
    noisy = np.log(liking / (1 - liking)) + np.random.default_rng(seed).logistic(size=len(shown))
    rank = noisy.argsort().argsort() / len(shown)  # In [0, 1), the least liked first.
    kinds = {
        "disliked": shown[rank < 0.02],
        "skipped": shown[rank < 0.24],
        "others": shown[rank >= 0.24],
    }
    test = split.test
    unseen = probability[test.user_ids - 1].copy()
    for line, items in zip(unseen, test.seen, strict=True):
        line[items - 1] = -1
    best = simulation.item_ids[np.argsort(-unseen, axis=1)[:, :K]]

    def truth(model: tp.Retriever) -> float:
        found, _ = model.retrieve(test.as_queries(), K, exclude=test.seen)
        return float(
            np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, best, strict=True)])
        )

    return Task(split, kinds, truth)


def unmasked(data: TrainingSet, pairs: pd.DataFrame) -> TrainingSet:
    """Makes samples that no longer know that these pairs of a user and an item were shown."""
    samples, corpus = data.samples, data.corpus
    users, items = (
        corpus.query_ids.rows(pairs["user_id"]),
        corpus.candidate_ids.rows(pairs["item_id"]),
    )
    exposed = samples.exposed
    keys = np.repeat(np.arange(len(exposed)), np.diff(exposed.offsets)) << 32 | exposed.values
    is_kept = ~np.isin(keys, users.astype(np.int64) << 32 | items)
    samples = dataclasses.replace(samples, exposed=exposed.where(is_kept))
    return dataclasses.replace(data, samples=samples)


def train(task: Task, data: TrainingSet, hard: Any, seed: int, options: Any) -> dict[str, float]:
    """Trains one model; returns its validation metric and those of the test."""
    training = tp.TrainingSettings(max_epochs=options.epochs)
    plan = tp.TwoTower(dim=32, hard=hard, training=training, seed=seed)
    model = plan.fit_samples(data, task.split.validation, exclude="seen", cutoffs=(100,))
    history = model.result.history[f"val_{MONITOR}"]
    measured = tp.evaluate(model, task.split.test, exclude="seen", cutoffs=(100,), num_bootstrap=0)
    means = measured.first.overall.intervals
    metrics = {name: means[name].mean for name in (MONITOR, "recall@100")}
    metrics["tail recall@100"] = measured.first.slices["tail"].intervals["recall@100"].mean
    if task.truth is not None:
        metrics["truth"] = task.truth(model)
    return {"validation": history[model.result.best_epoch - 1], **metrics}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Chooses the share of each kind on validation, and measures it on the test."""
    rows: dict[str, dict[str, float]] = {}
    if options.rows and options.rows.exists():
        for line in options.rows.read_text().splitlines():
            rows |= json.loads(line)

    @functools.cache
    def prepare(seed: int) -> tuple[Task, TrainingSet]:
        task = TASKS[options.task](options, seed)
        data = TrainingSet.build(task.split.train, Path(folder) / f"{seed}", seed=0)
        # Models have ids alone.
        ids = Corpus(data.corpus.candidate_ids, data.corpus.query_ids)
        return task, dataclasses.replace(data, corpus=ids)

    def run(kind: str, share: float, seed: int) -> dict[str, float]:
        name = f"{kind} {share} {seed}"
        if name not in rows:
            start = time.monotonic()
            task, data = prepare(seed if options.task == "funnel" else 0)
            hard = UserLists(task.kinds[kind], share) if share else None
            if kind != REFERENCE and not share:
                data = unmasked(data, task.kinds[kind])
            rows[name] = train(task, data, hard, seed, options)
            print(f"{name}  {rows[name]}  {time.monotonic() - start:.0f} s", flush=True)
            tf.keras.backend.clear_session()
            if options.rows:
                with options.rows.open("a") as file:
                    file.write(json.dumps({name: rows[name]}) + "\n")
        return rows[name]

    def gains(kind: str, share: float, seeds: range) -> dict[str, np.ndarray]:
        pairs = [(run(kind, share, seed), run(REFERENCE, 0, seed)) for seed in seeds]
        return {name: np.array([a[name] - b[name] for a, b in pairs]) for name in pairs[0][0]}

    with tempfile.TemporaryDirectory() as folder:
        seeds, choosing = range(options.seeds), range(min(NUM_CHOOSING, options.seeds))
        result: dict[str, Any] = {REFERENCE: averages([run(REFERENCE, 0, x) for x in seeds])}
        kinds = prepare(0)[0].kinds
        first = next(iter(kinds))
        for kind, pairs in kinds.items():
            # A control has the share of the first kind, since it says what that share does alone.
            shares = (result[first]["share"],) if kind in CONTROLS else SHARES
            by_share = {x: gains(kind, x, choosing)["validation"].mean() for x in shares}
            best = max(by_share, key=by_share.__getitem__)
            result[kind] = {
                "num_pairs": len(pairs.drop_duplicates(["user_id", "item_id"])),
                "num_users": pairs["user_id"].nunique(),
                "validation_gain_by_share": {
                    share: float(gain) for share, gain in by_share.items()
                },
                "share": best,
                **averages([run(kind, best, seed) for seed in seeds]),
                "gain": {
                    name: paired(gain) | interval(gain)
                    for name, gain in gains(kind, best, seeds).items()
                },
            }
    return result


def averages(rows: list[dict[str, float]]) -> dict[str, float]:
    """Returns the mean of each metric over the seeds."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def interval(differences: np.ndarray) -> dict[str, Any]:
    """Returns the 95% interval of the mean of paired differences, by Student's t."""
    over = OverSeeds.of(dict(enumerate(differences.tolist())))
    return {"low": over.low, "high": over.high, "by_seed": differences.tolist()}


TASKS: dict[str, Callable[[argparse.Namespace, int], Task]] = {
    "ratings": ratings,
    "kuairand": kuairand,
    "funnel": funnel,
}


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, help="File of ratings, or folder of the cut.")
    parser.add_argument("--rows", type=Path, help="Keeps a line for each training, to go on.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--users", type=int, default=4000, help="Of KuaiRand, drawn at random.")
    options = parser.parse_args()
    tf.get_logger().setLevel("ERROR")  # Hides warnings of retracing: each plan has its own model.
    start = time.monotonic()
    result = measure(options)
    print(json.dumps(result, indent=1))
    if options.json:
        seconds = time.monotonic() - start
        write_json(
            options.json, {"task": options.task, "kinds": result, "seconds": seconds}, seed=0
        )


if __name__ == "__main__":
    main()
