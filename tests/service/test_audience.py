"""The users who would want an item most: those in whose exact answers it scores highest."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from tests.service.conftest import NUM_CANDIDATES, Served
from tests.service.test_history_bonus import (  # noqa: F401
    bonus,
    loaded,
    model_folder,
    repeating,
)
from tests.service.test_user_events import event
from tfrs_pipeline import DataError, LoadedRetriever, audience, load
from tfrs_pipeline.messages import Progress
from tfrs_pipeline.search.candidates import UnknownItem

pytestmark = pytest.mark.usefixtures("trusted_exports", "few_signatures")


def read(path: Path) -> dict[Any, list[tuple[Any, float]]]:
    """Returns the users and scores of each item, in the order of the file."""
    lists: dict[Any, list[tuple[Any, float]]] = {}
    for row in pq.read_table(path).to_pylist():
        users = lists.setdefault(row["item_id"], [])
        users.append((row["user_id"], row["score"]))
        assert row["rank"] == len(users)
    return lists


def by_hand(model: LoadedRetriever, users: list[Any], item: Any) -> list[tuple[Any, Any]]:
    """Asks for each user's whole answer, and sorts those who have the item in it by its score."""
    ids, scores, _ = model.retrieve_user(users, NUM_CANDIDATES)
    found = [
        (user, float(of_user[place[0]]))
        for user, line, of_user in zip(users, ids.tolist(), scores, strict=True)
        if (place := [p for p, id_ in enumerate(line) if id_ == item])
    ]
    ordered = sorted(found, key=lambda entry: -entry[1])
    return [(user, pytest.approx(score, abs=1e-5)) for user, score in ordered]


def test_the_best_users_of_each_item(
    served: Served,
    loaded: LoadedRetriever,  # noqa: F811
    tmp_path: Path,
) -> None:
    items, users = served.candidate_ids[[3, 0, 17, 40]].tolist(), served.query_ids.tolist()
    about = audience(loaded, items, tmp_path / "all.parquet")
    got = read(tmp_path / "all.parquet")
    expected = {item: by_hand(loaded, users, item) for item in items}
    assert list(got) == items
    assert got == expected
    assert about == {
        "num_items": 4,
        "num_users": len(users),
        "num_rows": sum(map(len, expected.values())),
    }
    # Fewer users are the first of these; the file has the same items as the list.
    pd.DataFrame({"item_id": [*items, items[0]], "note": "x"}).to_csv(
        tmp_path / "items.csv", index=False
    )
    audience(loaded, tmp_path / "items.csv", tmp_path / "two.parquet", k=2)
    assert read(tmp_path / "two.parquet") == {item: expected[item][:2] for item in items}


def test_blocks_of_users_give_the_same(
    served: Served, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, items = load(folder, live=False), served.candidate_ids[:9].tolist()
    audience(model, items, tmp_path / "whole.parquet", k=3)
    monkeypatch.setattr("tfrs_pipeline.answers.audience.USERS_PER_PART", 4)
    monkeypatch.setattr("tfrs_pipeline.answers.audience.QUERIES_PER_CALL", 3)
    seen: list[tuple[int, int]] = []

    class Shown(Progress):
        def task(self, name: str, done: int, total: int, note: str = "") -> None:
            seen.append((done, total))

    audience(model, items, tmp_path / "parts.parquet", k=3, progress=Shown())
    assert seen == [(4, 6), (6, 6)]
    whole, parts = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("whole", "parts"))
    assert whole.drop("score").equals(parts.drop("score"))
    np.testing.assert_allclose(whole["score"].to_numpy(), parts["score"].to_numpy(), atol=1e-6)


def test_what_users_did_since_counts(served: Served, model: Path, tmp_path: Path) -> None:
    item = served.candidate_ids[30:31].tolist()[0]
    audience(load(model), [item], tmp_path / "before.parquet")
    (before,) = read(tmp_path / "before.parquet").values()
    first, second = (user for user, _ in before[:2])
    new = 999 if served.ids == "int" else "new"
    other = served.candidate_ids[31:32].tolist()[0]
    events = [event(first, item), event(second, item, "dislike"), event(new, other)]
    load(model).record(events)
    audience(load(model), [item], tmp_path / "after.parquet")
    (after,) = read(tmp_path / "after.parquet").values()
    assert {user for user, _ in after} == {user for user, _ in before} - {first, second} | {new}


@pytest.mark.parametrize("served", ["int"], indirect=True)
def test_refused(served: Served, folder: Path, tmp_path: Path, command: Any) -> None:
    model = load(folder, live=False)
    with pytest.raises(UnknownItem, match="12345"):
        audience(model, [12345], tmp_path / "out.parquet")
    with pytest.raises(ValueError, match="k must be"):
        audience(model, [3], tmp_path / "out.parquet", k=0)
    for text, words in (
        ("id\n3", "item_id"),
        ("item_id\nx\n3", "no ids"),
        ("item_id,a\n,1\n3,1", "no"),
    ):
        (tmp_path / "items.csv").write_text(text)
        with pytest.raises(DataError, match=words):
            audience(model, tmp_path / "items.csv", tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
    (tmp_path / "items.csv").write_text("item_id\n3\n10\n")
    done = command(
        "audience", folder, "--items", tmp_path / "items.csv", "--out", tmp_path / "a.parquet"
    )
    assert "for 2 items, of 6 users" in done.out
