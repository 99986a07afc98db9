"""A generated log of users with a taste, and settings that run the pipeline on it in seconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.data.engines import connect
from tfrs_pipeline.data.settings import Reading
from tfrs_pipeline.messages import Progress, StepReport

NUM_USERS, NUM_ITEMS, NUM_TASTES = 150, 80, 4
EVENTS_PER_USER = 24
Ids = Literal["int", "str"]
SMALL_TRAINING = {"batch_size": 256, "max_epochs": 2, "learning_rate": 0.02, "monitor": "ndcg@20"}


CONNECTION = connect()


def arguments(**options: Any) -> dict[str, Any]:
    """Returns arguments for `Log.from_files`; options of a `Reading` are combined into one.

    The logs share a connection, which saves a quarter of the time that a small one takes.
    """
    reading = {name: options.pop(name) for name in Reading.model_fields if name in options}
    return {"connection": CONNECTION, **options, "reading": Reading(**reading)}


def in_ibis(columns: dict[str, Any] | pa.Table) -> ibis.Table:
    """Creates a table in the default connection."""
    return ibis.get_backend().create_table(ibis.util.gen_name("test"), pa.table(columns))


def column(table: ibis.Table, name: str, order: str = "event_number") -> list[Any]:
    values: list[Any] = table.order_by(order)[name].to_pyarrow().to_pylist()
    return values


def user_id(number: int, ids: Ids) -> Any:
    return number + 1 if ids == "int" else f"user {number}"


def item_id(number: int, ids: Ids) -> Any:
    return number * 10 if ids == "int" else f"film-é-{number}"


def event_table(ids: Ids, *, seed: int = 0) -> pa.Table:
    """Makes a log in order of time; users see and click items of their own taste more often.

    Columns user_id, item_id, timestamp (seconds; some events of a user share one), stage,
    rating (3 or more is a click).
    """
    rng = np.random.default_rng(seed)
    appeal = (1 + np.arange(NUM_ITEMS)) ** -0.4
    rows = []
    for user in range(NUM_USERS):
        is_own = np.arange(NUM_ITEMS) % NUM_TASTES == user % NUM_TASTES
        shares = appeal * np.where(is_own, 12, 1)
        shown = rng.choice(
            NUM_ITEMS, size=EVENTS_PER_USER, replace=False, p=shares / shares.sum()
        ).tolist()
        times = np.sort(rng.integers(0, 40, EVENTS_PER_USER)) * 3600 + 1_700_000_000
        for item, time in zip(shown, times.tolist(), strict=True):
            is_click = rng.random() < (0.9 if is_own[item] else 0.3)
            rating = int(rng.integers(3, 6) if is_click else rng.integers(1, 3))
            stage = "clicked" if is_click else "exposed"
            rows.append((user_id(user, ids), item_id(item, ids), time, stage, rating))
    columns = zip(*sorted(rows, key=lambda row: row[2]), strict=True)
    names = ["user_id", "item_id", "timestamp", "stage", "rating"]
    return pa.table(dict(zip(names, columns, strict=True)))


def item_table(ids: Ids) -> pa.Table:
    numbers = range(NUM_ITEMS)
    columns = {"item_id": [item_id(item, ids) for item in numbers]}
    columns["title"] = [f"Film {item} [b]of[/b] :star: {item % 7}" for item in numbers]
    return pa.table(columns | {"genre": [f"genre {item % NUM_TASTES}" for item in numbers]})


def user_table(ids: Ids) -> pa.Table:
    users = [user_id(user, ids) for user in range(NUM_USERS)]
    return pa.table({"user_id": users, "age": 20.0 + np.arange(NUM_USERS) % 50})


def write(table: pa.Table, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    return path


def small_config(folder: Path, data: dict[str, Any], **settings: dict[str, Any]) -> RunConfig:
    """Makes settings of a tiny run; `settings` replaces some of them, by table."""
    small: dict[str, dict[str, Any]] = {
        "model": {"dim": 16, "history_length": 10, "negatives": ["in_batch", "uniform:num=32"]},
        "training": SMALL_TRAINING,
        "evaluation": {"cutoffs": [5, 20], "baselines": ["popularity"]},
        # Tiny models may lose to a baseline.
        "export": {"name": "films", "directory": folder / "saved_models", "if_beaten": True},
    }
    tables = {name: {**small.get(name, {}), **settings.get(name, {})} for name in small | settings}
    return RunConfig(data=data, **tables)


class Stopped(Exception):
    pass


class Watched(Progress):
    """Records the step reports and tasks of a run, and can stop the run.

    `stop` is a step's name, after which the run stops, or a (task name, number done) pair.
    `on_step` is called with each report.
    """

    def __init__(
        self,
        stop: str | tuple[str, int] = "",
        on_step: Callable[[StepReport], object] = lambda report: None,
    ) -> None:
        self.reports: dict[str, StepReport] = {}
        self.tasks: list[tuple[str, int]] = []
        self._stop, self._on_step = stop, on_step

    def step(self, report: StepReport) -> None:
        self.reports[report.name] = report
        self._on_step(report)
        if report.name == self._stop:
            raise Stopped

    def task(self, name: str, done: int, total: int, note: str = "", /) -> None:
        self.tasks.append((name, done))
        if (name, done) == self._stop:
            raise Stopped
