"""Measures how much of a ranking's quality comes from the order within a day.

The times of these logs are days. Each user's last click is the target, the one before it validates.
Many targets share their day with the click before, so the source's order decides what the history
holds. The rules of `tp.Reading(ties=...)` are compared: the order of the source, a random one, and
none. All rules have the same targets, except where the random order changes the last click.

    python benchmarks/ties.py --data-dir data --json benchmarks/results/ties.json

--data-dir holds the folders `cosmetics` and `sports` of `unseen_logs.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

import numpy as np

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
from log_kinds import LAST_TWO
from record import write_json
from unseen_logs import UNSEEN

from tfrs_pipeline.data.schema import TieRule
from tfrs_pipeline.presets import PRESETS

LOGS = ("cosmetics", "sports")
METRICS = ("ndcg@10", "hit_rate@10")


def measure(log: str, rule: TieRule, data_dir: Path, seed: int) -> dict[str, Any]:
    """Measures models of a log with a rule for ties, on all, tied and untied targets."""
    table = UNSEEN[log](data_dir / log)
    split = tp.Log.from_table(table, reading=tp.Reading(ties=rule)).split(**LAST_TWO)
    config = tp.with_settings(tp.RunConfig(), dict(PRESETS["quick"].settings))
    plan = tp.TwoTower(**dict(config.model), training=config.training, seed=seed)
    models: dict[str, tp.Retriever] = {
        "transitions": tp.Transitions().fit(split.train),
        "ease": tp.Ease().fit(split.train),
        "quick": plan.fit(split.train, split.validation),
    }
    test = split.test  # Each of its queries has one item to find.
    results = tp.evaluate(models, test, cutoffs=(10,), num_bootstrap=0).results
    num_tied = dict(zip(test.user_ids.tolist(), test.num_tied or (), strict=True))
    found = {}
    for name, result in results.items():
        is_tied = np.array([num_tied[user] > 0 for user in result.user_ids.tolist()])
        parts = {"all": is_tied >= 0, "tied": is_tied, "untied": ~is_tied}
        found[name] = {
            part: {"items": int(is_in.sum())}
            | {x: float(result.per_query[x][is_in].mean()) for x in METRICS}
            for part, is_in in parts.items()
        }
    return found


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="Folder of the data sets.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where to write the figures.")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for log in LOGS:
        for rule in get_args(TieRule):
            of_rule = measure(log, rule, options.data_dir, options.seed)
            found.setdefault(log, {})[rule] = of_rule
            for name, parts in of_rule.items():
                shown = (f"{part} {x['ndcg@10']:.4f} ({x['items']:,})" for part, x in parts.items())
                print(f"{log:10} {rule:7} {name:12} {'   '.join(shown)}", flush=True)
    if options.json:
        write_json(options.json, {"logs": found}, seed=options.seed)


if __name__ == "__main__":
    main()
