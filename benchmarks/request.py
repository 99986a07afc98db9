"""Measures what features of the request are worth, on KuaiRand and on a simulated funnel.

KuaiRand: the tab of the app, and the hour. The log has the exposures in val.parquet and
test.parquet of a cut of KuaiRand-Pure (`--data-dir`; `kuairand.py` says which); clicks are
positives. 25 to 29 April 2022 train, the 30th chooses the epoch, 1 May is the test. A user has one
query a day, with the request of the day's first click. It should find all clicks of the day among
all videos but those that the user clicked earlier. Settings are the package's defaults.

    none               no request features
    hour               the hour of the request, from its timestamp
    tab                where in the app the user is
    tab, hour          both
    tab of another     each event has another event's tab: the cost of a feature that says nothing

Simulated: one funnel per seed, in which what is liked depends on the device half as much as on the
user (`device_weight` 2). Each user of the test asks once from each device. The metric is recall of
the 50 items that the user likes best on that device, whatever was shown. Differences are paired by
seed.

    none               no request features
    device             the device
    device of another  the device of another request

    python benchmarks/request.py --data-dir kuairand-pure --seeds 3 --json request.json
    python benchmarks/request.py --simulated --seeds 10 --json request_simulated.json
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
from record import paired, parser_with_json, write_json

from tfrs_pipeline.evaluation.bootstrap import bootstrap_intervals
from tfrs_pipeline.sources.simulated import DEVICES, FunnelOptions, Simulation, simulate_funnel

METRICS = ("ndcg@100", "recall@100", "recall@20")
VALIDATION, TEST = 20220430, 20220501
PLANS: dict[str, dict[str, Any]] = {
    "none": {},
    "hour": {"hour": "categorical"},
    "tab": {"tab": "categorical"},
    "tab, hour": {"tab": "categorical", "hour": "categorical"},
    "tab of another": {"other_tab": "categorical"},
}
K = 50
SIMULATED: dict[str, dict[str, Any]] = {
    "none": {},
    "device": {"device": "categorical"},
    "device of another": {"other_device": "categorical"},
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


def measure_kuairand(options: argparse.Namespace) -> dict[str, Any]:
    """Trains every plan on KuaiRand, and compares it with the one without request features."""
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
    return figures


def simulate(seed: int) -> tuple[Simulation, pd.DataFrame]:
    """Simulates a funnel; its events also have the device of another request."""
    simulation = simulate_funnel(
        num_users=1000,
        num_items=1000,
        num_requests=10_000,
        seed=seed,
        options=FunnelOptions(device_weight=2.0),
    )
    events = simulation.log.events.order_by("event_number").to_pandas()
    of_request = events.groupby("request_id")["device"].first()
    others = np.random.default_rng(seed).permutation(of_request.to_numpy())
    events["other_device"] = others[np.searchsorted(of_request.index, events["request_id"])]
    return simulation, events.drop(columns="event_number")


def recall_of_truth(model: tp.FittedTwoTower, simulation: Simulation, test: tp.Holdout) -> float:
    """Measures the recall of the 50 best items of every user and device."""
    recalls = []
    for device in DEVICES:
        request = {feature.name: device for feature in model.corpus.request_features}
        asked = [{**query, "request": request} for query in test.as_queries()]
        found, _ = model.retrieve(asked, K)
        best = simulation.best_items(test.user_ids, K, device)
        recalls += [len(np.intersect1d(a, b)) / K for a, b in zip(found, best, strict=True)]
    return float(np.mean(recalls))


def measure_simulated(options: argparse.Namespace) -> dict[str, Any]:
    """Trains every plan on a funnel per seed; compares it with the one without features."""
    recalls: dict[str, list[float]] = {plan: [] for plan in SIMULATED}
    for seed in range(options.seeds):
        simulation, events = simulate(seed)
        for plan, features in SIMULATED.items():
            log = tp.Log.from_table(events, request_features=features)
            train, validation, test = log.split("last_share")
            model = tp.TwoTower(seed=seed).fit(train, validation)
            recalls[plan].append(recall_of_truth(model, simulation, test))
            print(f"seed {seed}  {plan:18} recall@{K} of truth {recalls[plan][-1]:.4f}", flush=True)
    plans = {}
    for plan, values in recalls.items():
        to_none = np.array(values) - recalls["none"]
        difference = paired(to_none)
        error = difference["standard_error"]
        plans[plan] = {
            "recalls": values,
            "mean": float(np.mean(values)),
            "to_none": difference,
        }
        print(f"{plan:18} {plans[plan]['mean']:.4f}  to none {to_none.mean():+.4f} ± {error}")
    return {"recall_of_truth": K, "plans": plans}


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data-dir", type=Path, help="Folder of KuaiRand's cut.")
    data.add_argument("--simulated", action="store_true", help="Simulated funnels instead.")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="Seeds 0 to N - 1 (1).")
    options = parser.parse_args()
    figures = measure_simulated(options) if options.simulated else measure_kuairand(options)
    if options.json:
        write_json(options.json, figures)


if __name__ == "__main__":
    main()
