"""The file of all users' items: the answers of service, in parts that survive a kill."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from tests.service.conftest import NUM_QUERIES, Served
from tfrs_pipeline.answers import recommend as module
from tfrs_pipeline.answers.recommend import recommend
from tfrs_pipeline.answers.retriever import LoadedRetriever, load
from tfrs_pipeline.durable import InUse, locked
from tfrs_pipeline.messages import Progress
from tfrs_pipeline.records.journal import Journal
from tfrs_pipeline.records.user_events import Event


def rows(path: Path) -> dict[Any, list[tuple[Any, float]]]:
    """Returns each user's items and scores, best first, in the order of the file."""
    lists: dict[Any, list[tuple[Any, float]]] = {}
    for row in pq.read_table(path).to_pylist():
        items = lists.setdefault(row["user_id"], [])
        items.append((row["item_id"], row["score"]))
        assert row["rank"] == len(items)
    return lists


def answer(ids: np.ndarray, scores: np.ndarray) -> list[tuple[Any, Any]]:
    pairs = zip(ids[0].tolist(), scores[0].tolist(), strict=True)
    return [(id_, pytest.approx(score, abs=1e-5)) for id_, score in pairs if score > -np.inf]


def by_user(model: LoadedRetriever, user: Any, k: int, **options: Any) -> list[tuple[Any, Any]]:
    return answer(*model.retrieve_user([user], k, **options)[:2])


def test_each_user_gets_the_answer_of_service(served: Served, folder: Path, tmp_path: Path) -> None:
    model, path, users = load(folder, exact=True), tmp_path / "all.parquet", served.query_ids
    about = recommend(model, path, k=57)
    got = rows(path)
    assert list(got) == users.tolist()
    assert got == {user: by_user(model, user, 57) for user in users.tolist()}
    # The known items are left out, so the longest histories leave fewer than k: no empty slot.
    assert [len(got[user]) for user in users.tolist()] == [57, 57, 56, 54, 52, 50]
    assert (about["num_users"], about["num_rows"]) == (NUM_QUERIES, 326)
    assert not list(tmp_path.glob("all.parquet?*"))


def test_a_history_in_the_file_wins(served: Served, folder: Path, tmp_path: Path) -> None:
    model, path = load(folder, exact=True), tmp_path / "all.parquet"
    first, second = served.query_ids[:2].tolist()
    new = 999 if served.ids == "int" else "new"
    history = served.candidate_ids[[4, 9]].tolist()
    texts = ["", "|".join(map(str, history)), f" {history[0]} "]
    table = pd.DataFrame({"history": texts, "user_id": [first, second, new]})
    table.to_csv(tmp_path / "users.csv", index=False)
    recommend(model, path, users=tmp_path / "users.csv", k=60, allowed=["a"])
    lists = {second: history, new: history[:1]}
    expected = {
        user: answer(
            *model.retrieve([{"user_id": user, "history": items}], 60, [items], allowed=[["a"]])
        )
        for user, items in lists.items()
    }
    expected[first] = by_user(model, first, 60, allowed=[["a"]])
    assert rows(path) == expected
    # In memory, as lists, and in any number of rows without one.
    table["history"] = [None, history, history[:1]]
    recommend(model, path, users=table, k=60, allowed=["a"])
    assert rows(path) == expected
    recommend(model, path, users=pd.DataFrame({"user_id": [second, new, second]}), k=3)
    assert rows(path) == {user: by_user(model, user, 3) for user in (second, new)}


class Killed(Progress):
    """Ends the work after a number of parts, as a kill would."""

    def __init__(self, num_parts: int) -> None:
        self.num_parts, self.notes = num_parts, list[str]()

    def task(self, name: str, done: int, total: int, note: str = "", /) -> None:
        self.notes.append(f"{done}/{total} {note}")
        if len(self.notes) == self.num_parts:
            raise KeyboardInterrupt


def test_a_killed_command_goes_on(
    int_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "USERS_PER_PART", 2)
    model, path, whole = load(int_folder), tmp_path / "all.parquet", tmp_path / "whole.parquet"
    path.write_text("yesterday's")
    with pytest.raises(KeyboardInterrupt):
        recommend(model, path, k=5, progress=Killed(2))
    (tmp_path / "all.parquet.parts" / "000002.parquet.partial").write_text("half")
    assert path.read_text() == "yesterday's"
    with pytest.raises(ValueError, match=r"k: 5, now 6\)\. Give another folder, or delete"):
        recommend(model, path, k=6)
    queried, real = [], model.retrieve_user

    def retrieve_user(users: Any, *arguments: Any, **options: Any) -> Any:
        queried.extend(users)
        return real(users, *arguments, **options)

    monkeypatch.setattr(model, "retrieve_user", retrieve_user)
    progress = Killed(0)
    recommend(model, path, k=5, progress=progress)
    assert queried == [104, 105]
    assert [note.split()[0] for note in progress.notes] == ["2/6", "4/6", "6/6"]
    assert progress.notes[0] == "2/6 "  # It was there before.
    assert progress.notes[2].endswith("users/s")
    recommend(model, whole, k=5)
    assert pq.read_table(path).equals(pq.read_table(whole))
    with locked(tmp_path / "all.parquet.lock"), pytest.raises(InUse):
        _in_another_thread(lambda: recommend(model, path, k=5))


@pytest.mark.parametrize("killed_at", ["start", "end"])
def test_what_a_kill_leaves_is_no_part_of_the_next_file(
    int_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    monkeypatch.setattr(module, "USERS_PER_PART", 2)
    model, path = load(int_folder), tmp_path / "all.parquet"

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if killed_at == "start":  # The users are written, and not yet what the parts are.
            patch.setattr(module, "hold_to", killed)
            users = module.known_users(model)[:4]
            patch.setattr(module, "known_users", lambda _: users)
        else:  # The file is complete, and its parts are being removed.
            patch.setattr(module.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            recommend(model, path, k=3)
    assert list((tmp_path / "all.parquet.parts").glob("*.parquet"))
    recommend(model, path, k=5)
    assert rows(path) == {user: by_user(model, user, 5) for user in range(100, 106)}


def test_users_known_by_events_alone_are_answered_too(
    served: Served, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "USERS_PER_PART", 4)
    copy, path = Path(shutil.copytree(folder, tmp_path / "films")), tmp_path / "all.parquet"
    model, is_int, items = (
        load(copy, exact=True),
        served.ids == "int",
        served.candidate_ids.tolist(),
    )
    known, new = served.query_ids.tolist(), [7, 4242] if is_int else ["Anna", "newcomer"]
    pairs = [(new[1], items[3]), (known[2], items[4]), (new[0], items[5]), (new[1], items[6])]
    model.record([{"user_id": u, "item_id": i, "type": "click"} for u, i in pairs])
    # Of a model that had ids of the other type.
    other = "7" if is_int else 7
    Journal(copy).write([[Event(other, 5, items[0], "clicked", None, None)]])
    with pytest.raises(KeyboardInterrupt):
        recommend(model, path, k=5, progress=Killed(1))
    # A user who comes while the command is down does not keep it from going on.
    model.record([{"user_id": 5 if is_int else "late", "item_id": items[3], "type": "click"}])
    about = recommend(model, path, k=5)
    got = rows(path)
    assert (list(got), about["num_users"]) == ([*known, *new], NUM_QUERIES + 2)
    assert got == {user: by_user(model, user, 5) for user in got}
    assert items[3] not in {item for item, _ in got[new[1]]}
    recommend(model, path, k=5)
    assert len(rows(path)) == NUM_QUERIES + 3


def test_items_of_histories_that_the_training_did_not_have_are_counted(
    int_folder: Path, tmp_path: Path, command: Any
) -> None:
    (tmp_path / "users.csv").write_text("user_id,history\n7,3|999999|10\n8,999999\n9,\n101,-5\n")
    flags = ["--users", tmp_path / "users.csv", "-k", 4]
    done = command("recommend", int_folder, "--out", tmp_path / "all.parquet", *flags)
    assert (done.code, done.err) == (0, "")
    assert "3 items of the histories left unread: the training did not have them" in done.out


def _in_another_thread(work: Any) -> Any:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result()


@pytest.mark.parametrize(
    ("users", "message"),
    [
        ({"viewer": [1]}, "no column 'user_id'. It has: viewer"),
        ({"user_id": [101, None]}, "1 rows have no user_id"),
        ({"user_id": ["x"]}, "column 'user_id' holds no ids: .*'x'"),
        ({"user_id": [101], "history": [["x"]]}, "column 'history' holds no ids: .*'x'"),
        ({"user_id": [101, 101], "history": [[3], [10]]}, "a user comes twice"),
    ],
)
def test_a_wrong_table_of_users_is_refused(
    int_folder: Path, tmp_path: Path, users: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        recommend(load(int_folder), tmp_path / "all.parquet", users=pd.DataFrame(users))
    assert not list(tmp_path.iterdir())


def test_the_command(int_folder: Path, tmp_path: Path, command: Any) -> None:
    path = tmp_path / "all.parquet"
    (tmp_path / "users.csv").write_text("user_id\n103\n101\n")
    flags = ["--users", tmp_path / "users.csv", "-k", 4, "--filter", "a", "b"]
    done = command("recommend", int_folder, "--out", path, *flags)
    assert (done.code, done.err) == (0, "")
    assert "all.parquet: 8 rows for 2 users, " in done.out
    model = load(int_folder)
    assert rows(path) == {u: by_user(model, u, 4, allowed=[["a", "b"]]) for u in (103, 101)}
    done = command("recommend", int_folder, "--out", tmp_path)
    assert (done.code, "is a folder: give a file in it" in done.err) == (2, True)


def test_ctrl_c_says_that_the_same_command_goes_on(
    int_folder: Path, tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, path = module._answers, tmp_path / "all.parquet"
    monkeypatch.setattr(module, "USERS_PER_PART", 2)

    def interrupted(*arguments: Any) -> Any:
        if list((tmp_path / "all.parquet.parts").glob("00*.parquet")):
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_answers", interrupted)
        done = command("recommend", int_folder, "--out", path, "-k", 4)
    assert (done.code, "stopped; the same command goes on" in done.out) == (130, True)
    assert command("recommend", int_folder, "--out", path, "-k", 4).code == 0
    assert pq.read_metadata(path).num_rows == 6 * 4
