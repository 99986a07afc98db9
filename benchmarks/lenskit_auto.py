"""Searches a model with LensKit-Auto and ranks items for queries, for `regret.py`.

It runs in an environment of its own, because `lenskit-auto` (0.3.0 was tried) needs Python 3.12 or
later and other libraries than this package:

    PYTHON benchmarks/lenskit_auto.py FOLDER SECONDS

FOLDER holds train.parquet (user_id, item_id) and queries.parquet (user_id, history). LensKit-Auto
searches for SECONDS, on a part that it holds out itself. The model that it chooses is trained on
all of train.parquet. Writes ranked.parquet: `ranked`, the ids of a thousand items for each query,
best first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# With several processes, LensKit 2025.8.1 sometimes waits forever.
os.environ |= {f"LK_NUM_{what}": "1" for what in ("PROCS", "THREADS", "BATCH_JOBS")}

# isort: split
import numpy as np
import pandas as pd
from lenskit.data import ItemList, RecQuery, from_interactions_df
from lkauto.lkauto import get_best_recommender_model

NUM_RANKED = 1000


def main(folder: Path, seconds: int) -> None:
    """Searches and ranks."""
    os.chdir(folder)  # LensKit-Auto writes what it tried to the working directory.
    train = pd.read_parquet(folder / "train.parquet").drop_duplicates()
    # Its preparation, and some of its models, need these columns.
    train = train.assign(rating=1.0, timestamp=0)
    columns = {f"{name}_col": f"{name}_id" for name in ("user", "item")}
    dataset = from_interactions_df(train, **columns, rating_col="rating", timestamp_col="timestamp")
    model, settings = get_best_recommender_model(
        dataset,
        time_limit_in_sec=seconds,
        num_recommendations=100,
        save=False,
        visualization=False,
    )
    print(settings)
    model.train(dataset)
    known = dataset.items.ids()
    items = ItemList(item_ids=known)
    ranked = []
    for query in pd.read_parquet(folder / "queries.parquet").itertuples():
        # An item of the history that training lacks would end the program.
        history = np.intersect1d(query.history, known)
        user_items = ItemList(item_ids=history, rating=np.ones(len(history)))
        request = RecQuery(user_id=query.user_id, user_items=user_items)
        scores = model.run("scorer", query=request, items=items).scores()
        scores = np.nan_to_num(scores, nan=-np.inf)
        ranked.append(known[np.argsort(-scores, kind="stable")[:NUM_RANKED]])
    pd.DataFrame({"ranked": ranked}).to_parquet(folder / "ranked.parquet")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]))
