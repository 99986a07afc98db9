"""A whole run on a log, and on the same log in another form: the same metrics and answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import tfrs_pipeline as tp
from tests import small_log
from tests.small_log import NUM_ITEMS, NUM_USERS, event_table, item_id, item_table, user_id, write
from tfrs_pipeline.run.pipeline import run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_runs")]
USERS = [user_id(number, "int") for number in range(NUM_USERS)]
ITEMS = item_table("int").to_pandas()[["item_id", "genre"]]
NEW = item_id(NUM_ITEMS, "int")
WEEK = 7 * 86_400


def make_events() -> pd.DataFrame:
    """Events in the order of their times, which are moved so that no two are equal."""
    events = event_table("int").select(["user_id", "item_id", "timestamp", "stage"]).to_pandas()
    return events.assign(timestamp=events["timestamp"] + np.arange(len(events)))


EVENTS = make_events()


@dataclass(frozen=True)
class Done:
    """What a run measured, and the model that it exported."""

    metrics: dict[str, Any]
    model: tp.LoadedRetriever

    def numbers(self, *names: str) -> dict[str, Any]:
        """Returns the metrics that follow from the log, or those with some names."""
        names = names or ("split", "models", "differences", "other", "training", "index")
        return {name: self.metrics[name] for name in names}

    def answers(self, users: list[Any]) -> tuple[list[list[Any]], np.ndarray]:
        """Returns the ids and scores that users are answered, by their histories in the log."""
        ids, scores, is_known = self.model.retrieve_user(users, 10)
        assert is_known.all()
        return ids.tolist(), scores


def finished(
    folder: Path,
    events: pd.DataFrame = EVENTS,
    items: pd.DataFrame = ITEMS,
    suffix: str = "csv",
    **data: Any,
) -> Done:
    for name, table in {"path": events, "items_path": items}.items():
        arrow_table = pa.Table.from_pandas(table, preserve_index=False)
        data[name] = write(arrow_table, folder / f"{name}.{suffix}")
    data["item_features"] = {"genre": "categorical"}
    settings: dict[str, Any] = {"split": {"kind": "last_share", "test": 0.2, "validation": 0.1}}
    settings["evaluation"] = {"baselines": ["popularity", "itemknn"]}
    result = run(small_log.small_config(folder, data, **settings), folder / "run")
    assert result.export_folder is not None
    return Done(result.metrics, tp.load(result.export_folder))


@pytest.fixture(scope="module")
def done(module_path: Path) -> Done:
    return finished(module_path)


def test_the_form_of_the_files_changes_nothing(done: Done, tmp_path: Path) -> None:
    """Columns moved, milliseconds for seconds, Parquet for CSV."""
    moved = EVENTS[[*EVENTS.columns[::-1]]].assign(timestamp=1000 * EVENTS["timestamp"])
    other = finished(tmp_path, moved, ITEMS[["genre", "item_id"]], "parquet", timestamp_unit="ms")
    assert other.numbers() == done.numbers()
    assert other.numbers("examples") == done.numbers("examples")
    assert other.answers(USERS)[0] == done.answers(USERS)[0]
    np.testing.assert_array_equal(other.answers(USERS)[1], done.answers(USERS)[1])


def test_rows_times_and_names_that_move_in_order_change_no_number(
    done: Done, tmp_path: Path
) -> None:
    def renamed(table: pd.DataFrame) -> pd.DataFrame:
        ids = [name for name in ("user_id", "item_id") if name in table]
        return table.assign(**{name: [in_text(id_) for id_ in table[name]] for name in ids})

    events = EVENTS.assign(timestamp=EVENTS["timestamp"] - 52 * WEEK)
    events = renamed(events.sample(frac=1, random_state=1))
    other = finished(tmp_path, events, renamed(ITEMS.sample(frac=1, random_state=1)))
    assert other.numbers() == done.numbers()
    ids, scores = done.answers(USERS)
    other_ids, other_scores = other.answers([in_text(user) for user in USERS])
    assert other_ids == [[in_text(id_) for id_ in line] for line in ids]
    np.testing.assert_array_equal(other_scores, scores)


def in_text(id_: int) -> str:
    """Names an id so that names have the order of the ids."""
    return f"é {10_000 + id_}"


def test_an_item_that_nobody_clicked_is_retrieved_and_changes_no_count(
    done: Done, tmp_path: Path
) -> None:
    """A two-tower model draws other numbers for a corpus of another size, as by another seed."""
    more = pd.concat([ITEMS, pd.DataFrame({"item_id": [NEW], "genre": ["genre 1"]})])
    other = finished(tmp_path, items=more)
    assert other.numbers("split") == done.numbers("split")
    num = NUM_ITEMS + 1
    assert NEW in other.model.retrieve([{}], num)[0]
    assert NEW not in done.model.retrieve([{}], num)[0]
    for name in ("popularity", "itemknn"):
        was, now = (x.metrics["models"][name] for x in (done, other))
        assert now["num_candidates"] == was["num_candidates"] + 1 == num
        for metric, value in was.items():
            if metric.startswith("coverage@"):
                assert now[metric] == pytest.approx(value * NUM_ITEMS / num)
            elif metric not in ("num_candidates", "slices"):
                assert now[metric] == value
