"""The data sets of the leaderboard: where to get them, their protocols, the published numbers.

Each data set becomes Parquet files such as a user of the package might have: a click log with
tables of items and users. The package's own pipeline does the rest.
"""

from __future__ import annotations

import gzip
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before TensorFlow, since it selects Keras 2.
from tfrs_pipeline import RunConfig, movielens_config, with_settings

# isort: split
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

VALIDATION_SHARE = 0.1
VALIDATION_SEED = 0

KLENITSKIY = "Klenitskiy and Vasilev 2023, Turning Dross Into Gold Loss"
BARS = "BARS candidate matching benchmark, Zhu et al. 2022"
BSL = "Wu et al. 2024, BSL: Understanding and Improving Softmax Loss for Recommendation"


@dataclass(frozen=True)
class Published:
    """Numbers of others on the same files and protocol.

    Args:
        model: Its name.
        values: One for each metric of the protocol.
        source: Where they are from.
    """

    model: str
    values: tuple[float, ...]
    source: str


@dataclass(frozen=True)
class Protocol:
    """How a data set is split and measured.

    Args:
        description: For people.
        metrics: What is reported, as the package names it; the last one ranks the table.
        settings: What replaces the package's defaults, by dotted name, for every model.
        convert: Writes the package's files from the folder given; None where the package has a
            source of its own.
        features: Kinds of the columns that the files hold beside the ids: "data.item_features" and
            "data.user_features".
        published: Numbers of others.
    """

    description: str
    metrics: tuple[str, ...]
    settings: dict[str, Any]
    convert: Callable[[Path, Path], None] | None = None
    features: dict[str, dict[str, str]] = field(default_factory=dict)
    published: tuple[Published, ...] = ()

    def config(self, data_dir: Path | None, folder: Path) -> RunConfig:
        """Makes the run's settings before any model's own; converts the files if need be.

        Args:
            data_dir: Folder with the data set as published.
            folder: Where the package's files are, or will be written.

        Raises:
            ValueError: If the folder is needed and not given.
        """
        if self.convert is None:
            path = {} if data_dir is None else {"data.path": data_dir}
            return with_settings(movielens_config(), {**path, **self.settings})
        # Written last.
        if not (folder / "events.parquet").exists():
            if data_dir is None:
                raise ValueError("This data set is not fetched: say where it lies with --data-dir.")
            folder.mkdir(parents=True, exist_ok=True)
            self.convert(data_dir, folder)
        paths = {
            f"data.{name}_path": folder / f"{name}.parquet"
            for name in ("items", "users")
            if (folder / f"{name}.parquet").exists()
        }
        files = {"data.source": "files", "data.path": folder / "events.parquet", **paths}
        # All at once, because one of them without the others would be refused.
        return with_settings(RunConfig(), {**files, **self.features, **self.settings})


def convert_ml_1m(data_dir: Path, folder: Path) -> None:
    """Writes MovieLens-1M in SASRec's version: order alone, MovieLens's ids, features.

    `sequences.txt.gz` holds the lines of `ml-1m.txt` in SASRec's repository (kang205/SASRec):
    user, item, each user's items in time order. `item_ids.txt` and `user_ids.txt` map its numbers
    to MovieLens's; `movies.dat` and `users.dat` are GroupLens's (grouplens.org, ml-1m.zip).
    """
    pairs = np.array([line.split() for line in _lines(data_dir / "sequences.txt.gz")], np.int64)
    item_of, user_of = (_id_map(data_dir / f"{name}_ids.txt") for name in ("item", "user"))
    movies = dict(_movies(data_dir / "movies.dat"))
    item_ids = [item_of[item] for item in np.unique(pairs[:, 1]).tolist()]
    items = [{"item_id": id_, **movies[id_]} for id_ in item_ids]
    pq.write_table(pa.Table.from_pylist(items), folder / "items.parquet")
    users = [line.split("::") for line in _lines(data_dir / "users.dat")]
    pq.write_table(
        pa.table(
            {
                "user_id": [int(user[0]) for user in users],
                "gender": [user[1] for user in users],
                "age_group": [user[2] for user in users],
                "occupation": [user[3] for user in users],
            }
        ),
        folder / "users.parquet",
    )
    events = {
        "user_id": [user_of[user] for user in pairs[:, 0].tolist()],
        "item_id": [item_of[item] for item in pairs[:, 1].tolist()],
    }
    _write_events(pa.table(events), folder)


def convert_gowalla(data_dir: Path, folder: Path) -> None:
    """Writes LightGCN's split of Gowalla, a tenth of each user's training items as validation.

    `train.txt.gz` and `test.txt.gz` are `train.txt` and `test.txt` of `Data/gowalla` in LightGCN's
    repository (kuandeng/LightGCN): a line has a user, then the user's items, in no order. Of n
    training items of a user, ceil(n / 10) are drawn for validation, with a fixed seed, so the split
    is the same for every seed of a model.
    """
    rng = np.random.default_rng(VALIDATION_SEED)
    columns: dict[str, list[Any]] = {"user_id": [], "item_id": [], "part": []}

    def add(user: int, items: list[int], part: str) -> None:
        columns["user_id"] += [user] * len(items)
        columns["item_id"] += items
        columns["part"] += [part] * len(items)

    for user, items in _user_lines(data_dir / "train.txt.gz"):
        shuffled = rng.permutation(items).tolist()
        num_validation = math.ceil(VALIDATION_SHARE * len(items))
        add(user, shuffled[:num_validation], "validation")
        add(user, shuffled[num_validation:], "train")
    for user, items in _user_lines(data_dir / "test.txt.gz"):
        add(user, items, "test")
    _write_events(pa.table(columns), folder)


def _write_events(events: pa.Table, folder: Path) -> None:
    """Writes the events, and gives the file its name once it is complete."""
    partial = folder / "events.partial"
    pq.write_table(events, partial)
    partial.rename(folder / "events.parquet")


def _lines(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding=encoding) as lines:
        for line in lines:
            if line.strip():
                yield line.rstrip("\n")


def _id_map(path: Path) -> dict[int, int]:
    pairs = (line.split() for line in _lines(path))
    return {int(own): int(original) for own, original in pairs}


def _user_lines(path: Path) -> Iterator[tuple[int, list[int]]]:
    for line in _lines(path):
        user, *items = map(int, line.split())
        yield user, items


def _movies(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line in _lines(path, "iso-8859-1"):
        id_, title, genres = line.split("::")
        parts = re.fullmatch(r"(.*?)\s*\((\d{4})\)", title)
        if parts is None:
            raise ValueError(f"{path}: a title without its year: {title!r}.")
        yield int(id_), {"title": parts[1], "year": parts[2], "genres": genres.split("|")}


PROTOCOLS = {
    "ml-100k": Protocol(
        description=(
            "MovieLens-100K; ratings of 4 and 5 are likes, the last fifth of each user's likes is "
            "the test, the user's earlier likes are excluded from the ranking."
        ),
        metrics=("recall@20", "recall@100", "ndcg@100"),
        settings={},
    ),
    "ml-1m": Protocol(
        description=(
            "MovieLens-1M in SASRec's version; each user's last item is the test, the one before "
            "it the validation; all items ranked, the user's earlier ones excluded."
        ),
        metrics=("hit_rate@10", "ndcg@10"),
        settings={
            "split.kind": "last_n",
            "split.min_positives": 3,
            "evaluation.cutoffs": (10,),
            "training.monitor": "ndcg@10",
        },
        convert=convert_ml_1m,
        features={
            "data.item_features": {
                "title": "text",
                "year": "categorical",
                "genres": "multi_categorical",
            },
            "data.user_features": {
                "age_group": "categorical",
                "gender": "categorical",
                "occupation": "categorical",
            },
        },
        published=(
            Published("SASRec (one negative, BCE)", (0.2500, 0.1341), KLENITSKIY),
            Published("BERT4Rec", (0.2843, 0.1537), KLENITSKIY),
            Published(
                "gSASRec (256 negatives)",
                (0.3003, 0.1726),
                "the model: Petrov and Macdonald 2023, gSASRec",
            ),
            Published("SASRec, full cross-entropy", (0.3152, 0.1821), KLENITSKIY),
            Published("SASRec, sampled softmax, 3000 negatives", (0.3159, 0.1857), KLENITSKIY),
        ),
    ),
    "gowalla": Protocol(
        description=(
            "Gowalla, LightGCN's split, ids alone and no order; all items ranked, the user's "
            "training items excluded; recall divided by the number of test items. A tenth of each "
            "user's training items, drawn by a seed, is the validation; the published models were "
            "tuned on the test."
        ),
        metrics=("recall@20", "ndcg@20"),
        settings={
            "data.is_ordered": False,
            "split.kind": "column",
            "evaluation.cutoffs": (20,),
            "training.monitor": "ndcg@20",
        },
        convert=convert_gowalla,
        published=(
            Published("MF-BPR", (0.1627, 0.1378), BARS),
            Published("YoutubeDNN", (0.1754, 0.1473), BARS),
            Published("EASE", (0.1765, 0.1467), BARS),
            Published("LightGCN", (0.1830, 0.1554), "He et al. 2020, LightGCN"),
            Published(
                "GF-CF",
                (0.1849, 0.1518),
                "Shen et al. 2021, How Powerful is Graph Convolution for Recommendation?",
            ),
            Published("SimpleX", (0.1872, 0.1557), "Mao et al. 2021, SimpleX"),
            Published("MF, sampled softmax, 800 negatives", (0.1759, 0.1395), BSL),
            Published("MF, bilateral softmax (BSL)", (0.1882, 0.1584), BSL),
        ),
    ),
}
