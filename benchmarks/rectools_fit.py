"""Trains RecTools' SASRec for `rectools_speed.py`, in an environment that has RecTools.

    python benchmarks/rectools_fit.py FOLDER SETTINGS

reads FOLDER/train.csv and SETTINGS, a JSON object with num_epochs, max_cpu_seconds and
arguments of `SASRecModel`. After each epoch it writes a line of JSON: the CPU seconds of training
so far, and the ten items that it recommends to each user of FOLDER/users.csv.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pandas as pd
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from rectools.models.nn.transformers.ligr import LiGRLayers


def main() -> None:
    """Trains and recommends, epoch by epoch."""
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    num_epochs, max_cpu_seconds = settings.pop("num_epochs"), settings.pop("max_cpu_seconds")
    events = pd.read_csv(folder / "train.csv")
    users = pd.read_csv(folder / "users.csv")["user_id"].to_numpy()
    events["datetime"], events["weight"] = pd.to_datetime(events["event_number"], unit="s"), 1.0
    data = Dataset.construct(events)
    model = SASRecModel(transformer_layers_type=LiGRLayers, **settings)
    seconds = 0.0
    for _ in range(num_epochs):
        start = time.process_time()
        model.fit_partial(data, min_epochs=1, max_epochs=1)
        seconds += time.process_time() - start
        found = model.recommend(users, data, k=10, filter_viewed=True)
        items = found.groupby("user_id")["item_id"].apply(list).reindex(users).tolist()
        print(json.dumps({"cpu_seconds": seconds, "items": items}), flush=True)
        if seconds > max_cpu_seconds:
            break


if __name__ == "__main__":
    main()
