"""Measures whether metrics that correct for the log's exposure rank models by their true quality.

`even_recall@k` (tfrs_pipeline.evaluation.metrics) and the plain recall@k are computed from a log's
held-out clicks for models that rank differently, and compared with a truth by Spearman's rank
correlation and by regret: the truth of the best model minus that of the chosen one.

    funnel  the simulated funnel and plans of funnel.py, at three strengths of its favour for
            popular items. The truth is recall@50 of the 50 items that a user would most probably
            click, or of the best 50 others if the ranking excludes clicked items.
    random  ratings of items that users chose, and of items drawn at random (Coat, Schnabel et al.
            2016; Yahoo! R3, Marlin and Zemel 2009). Ratings of 4 and 5 are clicks, the others
            exposures. Models are trained on four fifths of the chosen clicks and measured on the
            last fifth; the truth is recall@k of the clicks among the random items.

Four propensities are compared: events at all logged stages, impressions, the root of the clicks (as
in a log of clicks alone), and the clicks.

    python benchmarks/exposure.py funnel --folder rankings --json exposure_funnel.json
    python benchmarks/exposure.py random --data coat user.txt random.txt --json exposure_coat.json

The folder keeps the rankings, so that a stopped study continues. The files of `random` have lines
of user, item and rating, with commas.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import funnel
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tensorflow as tf
from record import parser_with_json, write_json
from scipy.stats import spearmanr

from tfrs_pipeline.model.corpus import Corpus, TrainingSet
from tfrs_pipeline.sources.simulated import FunnelOptions, simulate_funnel

K = 50
STRENGTHS = (0.3, 1.0, 2.0)
TRAINING = tp.TrainingSettings(batch_size=512, max_epochs=10, optimizer="adam", learning_rate=0.002)
TOWER: dict[str, Any] = {"training": TRAINING, "dim": 32, "id_dropout": 0.0, "temperature": 0.15}


class Rankings:
    """A retriever of stored answers: user id -> ids, the best first."""

    def __init__(self, users: np.ndarray, found: np.ndarray) -> None:
        self.places = {user: place for place, user in enumerate(users.tolist())}
        self.found = found

    def retrieve(
        self, queries: Sequence[tp.Query], k: int, exclude: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns what is stored for the user of each query."""
        found = self.found[[self.places[query["user_id"]] for query in queries], :k]
        return found, np.broadcast_to(-np.arange(k, dtype=np.float32), found.shape)


def propensities(log: tp.Log, holdout: tp.Holdout) -> dict[str, np.ndarray | None]:
    """Returns each propensity, [num_candidates], by name; None stands for the plain metric."""
    events = log.events
    kinds = {
        "events": events,
        "impressions": events.filter(events.stage.isin(["clicked", "exposed"])),
        "clicks": events.filter(events.stage == "clicked"),
    }
    counts = {}
    for name, table in kinds.items():
        ids, num = np.unique(table.item_id.to_pyarrow().to_numpy(), return_counts=True)
        counts[name] = np.zeros(len(holdout.candidate_ids))
        counts[name][np.searchsorted(holdout.candidate_ids, ids)] = num
    return {"plain": None, **counts, "root of clicks": np.sqrt(counts["clicks"])}


def estimates(
    retriever: tp.Retriever,
    holdout: tp.Holdout,
    shown: Mapping[str, np.ndarray | None],
    k: int,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Estimates recall@k with each propensity: mean, interval and effective number of items."""
    found = {}
    for name, exposure in shown.items():
        asked = dataclasses.replace(holdout, exposure=exposure)
        result = tp.evaluate(retriever, asked, cutoffs=(k,), **options).first
        metric = f"recall@{k}" if exposure is None else f"even_recall@{k}"
        interval = result.overall.intervals[metric].as_dict()
        found[name] = {**interval, "num_items": result.overall.num_relevant}
        found[name]["num_even"] = result.num_even
    return found


def score(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Compares each estimate with the truth over the models of a log."""
    truth = np.array([row["truth"] for row in rows])
    scores = {}
    for name in rows[0]["estimates"]:
        values = np.array([row["estimates"][name]["mean"] for row in rows])
        chosen = int(values.argmax())
        scores[name] = {
            "spearman": float(spearmanr(values, truth)[0]),
            "regret": float(truth.max() - truth[chosen]),
            "chooses": rows[chosen]["model"],
            "effective_share": rows[0]["estimates"][name]["num_even"],
        }
        if scores[name]["effective_share"] is not None:
            scores[name]["effective_share"] /= rows[0]["estimates"][name]["num_items"]
    return scores


def rank_funnel(split: Any, seed: int, start: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Ranks with and without clicked items; trains plans that lack a file named by `start`."""
    queries, data = split.test, None
    asked, found = queries.as_queries(), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (_, settings) in funnel.PLANS.items():
            path = Path(f"{start}_{name.replace(' ', '_')}.npz")
            if not path.exists():
                if data is None:
                    every = tp.FunnelLosers(stages=funnel.EVERY_STAGE, allow_exposed=True)
                    data = TrainingSet.build(split.train, Path(folder), seed=seed, hard=every)
                    ids = Corpus(data.corpus.candidate_ids, data.corpus.query_ids)
                    data = dataclasses.replace(data, corpus=ids)
                plan = tp.TwoTower(seed=seed, recency_decay=0.98, **TOWER, **settings)
                model = plan.fit_samples(data)
                free, excl = (
                    model.retrieve(asked, K, exclude=x)[0].astype(np.int64)
                    for x in (None, queries.clicked)
                )
                np.savez(path, free=free, excl=excl)
                print(path.stem, flush=True)
            stored = np.load(path)
            found[name] = stored["free"], stored["excl"]
    return found


def run_funnel(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the study of the simulated funnel."""
    options.folder.mkdir(parents=True, exist_ok=True)
    logs = []
    for seed in range(options.seeds):
        for strength in STRENGTHS:
            simulation = simulate_funnel(
                num_users=1000,
                num_items=1000,
                num_requests=10_000,
                seed=seed,
                options=FunnelOptions(popularity_weight=strength),
            )
            split = simulation.log.split("last_share", validation=0, test=0.2)
            queries = split.test
            shown = propensities(simulation.log, queries)
            rankings = rank_funnel(split, seed, f"{options.folder}/{strength}_{seed}")
            by_liking = simulation.best_items(queries.user_ids, len(simulation.item_ids))
            for place, exclude in enumerate(("none", "clicked")):
                nothing = [np.empty(0, np.int64)] * len(queries)
                out = queries.clicked if exclude == "clicked" else nothing
                best = [x[~np.isin(x, gone)][:K] for x, gone in zip(by_liking, out, strict=True)]
                rows: list[dict[str, Any]] = []
                for name, found in rankings.items():
                    pairs = zip(found[place], best, strict=True)
                    retriever = Rankings(queries.user_ids, found[place])
                    rows.append(
                        {
                            "model": name,
                            "truth": float(np.mean([np.isin(b, f).mean() for f, b in pairs])),
                            "estimates": estimates(retriever, queries, shown, K, exclude=exclude),
                        }
                    )
                scores = score(rows)
                for row in rows:  # The intervals would be most of the file.
                    row["estimates"] = {x: of["mean"] for x, of in row["estimates"].items()}
                log = {"popularity_weight": strength, "seed": seed, "exclude": exclude}
                logs.append({**log, "scores": scores, "models": rows})
    return {"scores": summarise(logs, "popularity_weight", "exclude"), "logs": logs}


def summarise(logs: Sequence[Mapping[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """Averages the scores over the seeds, and prints them."""
    table = []
    for group in dict.fromkeys(tuple(log[key] for key in keys) for log in logs):
        own = [log for log in logs if tuple(log[key] for key in keys) == group]
        for name in own[0]["scores"]:
            scores = [log["scores"][name] for log in own]
            row = {
                **dict(zip(keys, group, strict=True)),
                "estimate": name,
                "num_seeds": len(own),
                "spearman": float(np.mean([x["spearman"] for x in scores])),
                "lowest_spearman": min(x["spearman"] for x in scores),
                "regret": float(np.mean([x["regret"] for x in scores])),
                "largest_regret": max(x["regret"] for x in scores),
                "chooses": sorted({x["chooses"] for x in scores}),
            }
            table.append(row)
            print(*(f"{v:.3f}" if isinstance(v, float) else v for v in row.values()), sep="  ")
    return table


# The two-tower models of `random`: name -> how they differ from the defaults.
TOWERS: dict[str, dict[str, Any]] = {
    "mixed": {},
    "mixed, uncorrected": funnel.UNCORRECTED,
    "in-batch": funnel.IN_BATCH,
    "in-batch, uncorrected": {**funnel.IN_BATCH, **funnel.UNCORRECTED},
    **{f"mixed, positives^-{x}": {"resampling_exponent": x} for x in (0.3, 0.6, 1.0)},
}


def read_ratings(path: Path, seed: int = 0) -> pa.Table:
    """Reads user, item and rating as an event table, in random order: files are sorted by item."""
    lines = np.loadtxt(path, delimiter=",", dtype=np.int64)
    users, items, ratings = np.random.default_rng(seed).permutation(lines).T
    stage = np.where(ratings >= 4, "clicked", "exposed")
    return pa.table({"user_id": users, "item_id": items, "stage": stage})


def random_truth(test: tp.Holdout, ratings: pa.Table) -> tp.Holdout:
    """Asks the test's users for their clicks among the items drawn at random."""
    clicked = ratings.filter(pc.equal(ratings["stage"], "clicked"))
    users, items = (clicked[name].to_numpy() for name in ("user_id", "item_id"))
    known = np.isin(items, test.candidate_ids)
    relevant = [items[(users == user) & known] for user in test.user_ids]
    return dataclasses.replace(test, relevant=relevant, exposure=None)


def run_random(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the study of random exposure."""
    logs = []
    name, chosen, drawn = options.data
    for seed in range(options.seeds):
        log = tp.Log.from_table(read_ratings(Path(chosen), seed))
        split = log.split("last_share", validation=0, test=0.2)
        truth = random_truth(split.test, read_ratings(Path(drawn)))
        shown = propensities(log, split.test)
        models: dict[str, Any] = {
            "popularity": tp.MostPopular(),
            "ease": tp.Ease(),
            "ials": tp.Ials(),
            **{
                tower: tp.TwoTower(seed=seed, **TOWER, **settings)
                for tower, settings in TOWERS.items()
            },
        }
        rows = []
        for model, plan in models.items():
            fitted = plan.fit(split.train)
            found = tp.evaluate(fitted, truth, cutoffs=(options.k,)).first
            of_truth = found.overall.intervals[f"recall@{options.k}"]
            rows.append(
                {
                    "model": model,
                    "truth": of_truth.mean,
                    "truth_interval": of_truth.as_dict(),
                    "num_true_items": found.overall.num_relevant,
                    "estimates": estimates(fitted, split.test, shown, options.k),
                }
            )
            print(seed, model, f"{of_truth.mean:.4f}", flush=True)
        logs.append({"data": name, "seed": seed, "scores": score(rows), "models": rows})
    return {"k": options.k, "scores": summarise(logs, "data"), "logs": logs}


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("study", choices=("funnel", "random"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="Of the rankings of `funnel`.")
    parser.add_argument("--data", nargs=3, metavar=("NAME", "CHOSEN", "RANDOM"))
    parser.add_argument("--k", type=int, default=50, help="The cutoff of `random`.")
    options = parser.parse_args()
    tf.get_logger().setLevel("ERROR")
    figures = {"funnel": run_funnel, "random": run_random}[options.study](options)
    if options.json:
        write_json(options.json, figures)


if __name__ == "__main__":
    main()
