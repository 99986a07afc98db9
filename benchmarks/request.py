"""Measures what features of the request are worth on KuaiRand: the tab of the app, and the hour.

The exposures of val.parquet and test.parquet of a cut of KuaiRand-Pure (`--data-dir`;
`kuairand.py` says which), a click a positive: five days to train on, 25 to 29 April 2022, the 30th
to choose the epoch, the first of May to test. A user's query of a day asks with the request of the
first click of that day; all clicks of the day are to be found, among all videos, the user's earlier
clicks excluded. Settings are the package's defaults.

    none               no request features
    hour               the hour of the request, from its timestamp
    tab                where in the app the user is
    tab, hour          both
    tab of another     tab, each event with that of another one: what a feature costs that says
                       nothing

    python benchmarks/request.py --data-dir kuairand-pure --seeds 3 --json request.json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import numpy as np
import pandas as pd
from record import write_json

from tfrs_pipeline.evaluation.bootstrap import bootstrap_intervals

METRICS = ("ndcg@100", "recall@100", "recall@20")
VALIDATION, TEST = 20220430, 20220501
PLANS: dict[str, dict[str, Any]] = {
    "none": {},
    "hour": {"hour": "categorical"},
    "tab": {"tab": "categorical"},
    "tab, hour": {"tab": "categorical", "hour": "categorical"},
    "tab of another": {"other_tab": "categorical"},
}


def read_events(data_dir: Path) -> pd.DataFrame:
    """Reads the exposures of both files, and the part of each by its day."""
    names = ["user_id", "video_id", "date", "time_ms", "is_click", "tab"]
    files = (data_dir / f"{name}.parquet" for name in ("val", "test"))
    events = pd.concat([pd.read_parquet(file, columns=names) for file in files])
    events = events[events["date"] <= TEST].sort_values("time_ms", kind="stable")
    tab = events["tab"].astype(str).to_numpy()
    days = events["date"].to_numpy()
    return pd.DataFrame(
        {
            "user_id": events["user_id"].to_numpy(),
            "item_id": events["video_id"].to_numpy(),
            "timestamp": pd.to_datetime(events["time_ms"].to_numpy(), unit="ms", utc=True),
            "stage": np.where(events["is_click"] == 1, "clicked", "exposed"),
            "part": np.select([days < VALIDATION, days < TEST], ["train", "validation"], "test"),
            "tab": tab,
            "other_tab": np.random.default_rng(0).permutation(tab),
        }
    )


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="Folder of KuaiRand's cut.")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="Seeds 0 to N - 1 (1).")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where to write the figures.")
    options = parser.parse_args()
    events = read_events(options.data_dir)
    values: dict[str, list[np.ndarray]] = {plan: [] for plan in PLANS}
    fits: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for plan, features in PLANS.items():
            log = tp.Log.from_table(events, request_features=features)
            train, validation, test = log.split("column")
            start = time.process_time()
            model = tp.TwoTower(seed=seed).fit(train, validation)
            result = tp.evaluate(model, test, num_bootstrap=0).first
            values[plan].append(np.stack([result.per_query[m] for m in METRICS], axis=1))
            fit = {
                "plan": plan,
                "seed": seed,
                "best_epoch": model.result.best_epoch,
                "validation_ndcg@100": max(model.result.history["val_ndcg@100"]),
                "cpu_seconds": time.process_time() - start,
                **dict(zip(METRICS, values[plan][-1].mean(axis=0).tolist(), strict=True)),
            }
            fits.append(fit)
            print(fit, flush=True)
    by_plan = {plan: np.mean(of_seeds, axis=0) for plan, of_seeds in values.items()}
    figures: dict[str, Any] = {"num_users": len(by_plan["none"]), "fits": fits, "plans": {}}
    for plan, means in by_plan.items():
        intervals = bootstrap_intervals(means - by_plan["none"], seed=0)
        figures["plans"][plan] = {
            metric: {"mean": float(means[:, i].mean()), "to_none": intervals[i].as_dict()}
            for i, metric in enumerate(METRICS)
        }
        line = "  ".join(
            f"{metric} {means[:, i].mean():.4f} ({intervals[i].mean:+.4f} "
            f"[{intervals[i].low:+.4f}, {intervals[i].high:+.4f}])"
            for i, metric in enumerate(METRICS)
        )
        print(f"{plan:16} {line}")
    if options.json:
        write_json(options.json, figures)


if __name__ == "__main__":
    main()
