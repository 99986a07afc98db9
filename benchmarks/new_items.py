r"""Measures whether items that the training never saw are found, once the index is refreshed.

A tenth of MovieLens-100K's items, drawn by a seed, is taken out of the log, as if they did not
exist yet. The package's model is trained and exported without them, then refreshed with the whole
item table, where only their title words, year and genres are known. The queries are those of the
default run's test; the new items that the user likes in the test part are relevant.

    all items    new items are ranked in the whole corpus, the user's earlier likes excluded
    new items    the new items are ranked among themselves

    default      the default run's settings: ID dropout of 5%, so that the embedding of an unknown
                 id is trained
    known_ids    the same without ID dropout (model.id_dropout 0)
    features     the same without ids (model.use_candidate_id)
    popularity   likes before the test; a new item has none, so new items come last, in random
                 order
    best order   the new items by their likes before the test, which are unknown in practice: the
                 limit for one order for all users

    python benchmarks/new_items.py --seeds 3 --json benchmarks/results/new_items.json
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from pathlib import Path
from typing import Any

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import numpy as np
import pyarrow.parquet as pq
from record import parser_with_json, write_json

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.log import Split
from tfrs_pipeline.evaluation.bootstrap import bootstrap_intervals
from tfrs_pipeline.model.corpus import TrainingSet
from tfrs_pipeline.run.data import load_log
from tfrs_pipeline.run.refresh import refresh_index

NEW_SHARE = 0.1
CUTOFFS = {"all items": 100, "new items": 20}
MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    "known_ids": {"model.id_dropout": 0.0},
    "features": {"model.use_candidate_id": False},
}
LIKES = ("popularity", "best order")


def run(seed: int, folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Takes items out, trains, refreshes and measures.

    Returns:
        By model and ranking, each query's recall.
    """
    config = tp.with_settings(tp.movielens_config(), {"seed": seed})
    log = load_log(config.data)
    split = log.split(**dict(config.split), seed=seed)
    all_ids = np.array(log.items["item_id"].to_pyarrow().to_pylist())
    all_ids.sort()
    rng = np.random.default_rng(seed)
    new_ids = rng.choice(all_ids, round(NEW_SHARE * len(all_ids)), replace=False)
    pq.write_table(log.items.to_pyarrow(), folder / "items.parquet")
    queries = split.test
    is_new = set(new_ids.tolist())
    relevant = [[id_ for id_ in ids if id_ in is_new] for ids in queries.relevant]
    asked = [i for i, ids in enumerate(relevant) if ids]
    counts = dict(zip(queries.candidate_ids.tolist(), queries.candidate_counts, strict=True))

    found: dict[str, dict[str, np.ndarray]] = {}
    known = without(split, new_ids)
    for name, settings in MODELS.items():
        own = tp.with_settings(config, settings)
        tp.export(fit(own, known), folder / name, index=tp.Exact(), queries=queries.as_queries())
        refresh_index(folder / name, folder / "items.parquet")
        scores = score(folder / name, all_ids, queries, asked)
        found[name] = measure(scores, all_ids, new_ids, queries, relevant, asked)
    for name in LIKES:
        visible = [
            0 if id_ in is_new and name == "popularity" else counts[id_] for id_ in all_ids.tolist()
        ]
        # Breaks ties at random, anew for each query.
        ties = rng.random((len(asked), len(all_ids)))
        scores = np.array(visible, np.float64) + ties
        found[name] = measure(scores, all_ids, new_ids, queries, relevant, asked)
    return found


def without(split: Split, new_ids: np.ndarray) -> Split:
    """Takes items out of a split, as if they had not been there yet."""
    new = new_ids.tolist()
    log = split.log
    events, items = log.events, log.items
    old = dataclasses.replace(
        log,
        events=events.filter(~events["item_id"].isin(new)),
        items=items.filter(~items["item_id"].isin(new)),
    )
    return Split(old, split.events.filter(~split.events["item_id"].isin(new)), split.kind)


def fit(config: tp.RunConfig, split: Split) -> tp.FittedTwoTower:
    """Trains the package's model, the number of epochs chosen on validation."""
    plan = tp.TwoTower(**dict(config.model), training=config.training, seed=config.seed)
    num_epochs = plan.fit(split.train, split.validation).result.best_epoch
    print(f"  trained {num_epochs} epochs", flush=True)
    # What users did in the test is unknown when the queries are asked.
    before_test = dataclasses.replace(split.before_test, part_of=None)
    with tempfile.TemporaryDirectory() as folder:
        data = TrainingSet.build(before_test, Path(folder), seed=config.seed)
        return plan.fit_samples(data, max_epochs=num_epochs)


def score(model: Path, all_ids: np.ndarray, queries: tp.Holdout, asked: list[int]) -> np.ndarray:
    """Scores all items for the queries that are asked: [num_asked, num_items] float32."""
    retriever = tp.load(model)
    every = queries.as_queries()
    ids, scores = retriever.retrieve([every[i] for i in asked], len(all_ids))
    by_item = np.zeros(ids.shape, np.float32)
    np.put_along_axis(by_item, np.searchsorted(all_ids, ids), scores, axis=1)
    return by_item


def measure(
    scores: np.ndarray,
    all_ids: np.ndarray,
    new_ids: np.ndarray,
    queries: tp.Holdout,
    relevant: list[list[Any]],
    asked: list[int],
) -> dict[str, np.ndarray]:
    """Measures the recall of each query's relevant new items, in both rankings."""
    items = Ids(all_ids)
    known, is_relevant = np.zeros(scores.shape, bool), np.zeros(scores.shape, bool)
    for place, i in enumerate(asked):
        is_relevant[place, items.rows(relevant[i]) - 1] = True
        known[place, items.known_rows(queries.histories[i]) - 1] = True
    is_new = np.isin(all_ids, new_ids)
    excluded = {"all items": known, "new items": known | ~is_new}
    recalls = {}
    for name, k in CUTOFFS.items():
        ranked = np.argsort(np.where(excluded[name], np.inf, -scores), axis=1, kind="stable")
        is_hit = np.take_along_axis(is_relevant, ranked[:, :k], axis=1)
        recalls[name] = is_hit.sum(axis=1) / is_relevant.sum(axis=1)
    return recalls


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="Seeds 0 to N - 1 (1).")
    options = parser.parse_args()
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # Hides warnings of retracing.
    by_seed = []
    for seed in range(options.seeds):
        print(f"seed {seed}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            by_seed.append(run(seed, Path(folder)))
    figures: dict[str, Any] = {"cutoffs": CUTOFFS, "new_share": NEW_SHARE, "models": {}}
    print(f"{'':14}" + "".join(f"  recall@{k} among {name:12}" for name, k in CUTOFFS.items()))
    for name in (*MODELS, *LIKES):
        # New items and asked users differ from seed to seed.
        joined = {
            ranking: np.concatenate([s[name][ranking] for s in by_seed]) for ranking in CUTOFFS
        }
        intervals = bootstrap_intervals(
            np.stack(list(joined.values()), axis=1), num_bootstrap=1000, seed=0
        )
        figures["models"][name] = {
            ranking: {
                **interval.as_dict(),
                "by_seed": [float(np.nanmean(s[name][ranking])) for s in by_seed],
                "num_queries": len(joined[ranking]),
            }
            for ranking, interval in zip(CUTOFFS, intervals, strict=True)
        }
        cells = (figures["models"][name][ranking] for ranking in CUTOFFS)
        print(
            f"{name:14}"
            + "".join(f"  {c['mean']:.4f} [{c['low']:.4f}, {c['high']:.4f}]      " for c in cells)
        )
    if options.json:
        write_json(options.json, figures, seed=0)


if __name__ == "__main__":
    main()
