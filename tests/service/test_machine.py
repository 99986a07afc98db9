"""A machine plays with a service, and compares each answer with dictionaries and brute force.

It sends events, deletes users, writes items, publishes, refreshes and withdraws versions, restarts
the server, sets the clock, damages and restores files, and uses a second process. See `world.py`
for what it expects. CONTRIBUTING.md says how to let it run for hours.
"""

import contextlib
import copy
import dataclasses
import functools
import os
import shutil
import sqlite3
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.damage import copy_database
from tests.service.conftest import NUM_CANDIDATES, NUM_QUERIES, Served, make_served
from tests.service.running_server import PREDICT, Running, retrieve_user, send, until
from tests.service.test_broken_events import DAMAGES
from tests.service.test_user_events import event
from tests.service.world import HOUR, Event, File, Genres, Version, World, stage_of
from tests.service.world import Served as Answer
from tfrs_pipeline import Exact, LoadedRetriever, Scann, export, load, refresh_index
from tfrs_pipeline.answers.publish import MANIFEST_FILE, SAVED_MODEL_PARTS
from tfrs_pipeline.durable import read_record, write_record
from tfrs_pipeline.records.journal import JOURNAL_FILE
from tfrs_pipeline.records.live_items import STORE_FILE
from tfrs_pipeline.records.user_events import TYPES
from tfrs_pipeline.samples.store import RowLists
from tfrs_pipeline.search.history_bonus import HistoryBonus, RepeatBonus

pytestmark = pytest.mark.usefixtures("trusted_exports", "few_signatures")
ITEMS_PATH, EXPLAIN = "/v1/models/films/items", "/v1/models/films:explain"
ALL = NUM_CANDIDATES + 10  # More than there ever are.
KNOWN_USERS = range(100, 100 + NUM_QUERIES)
USERS = st.sampled_from([*KNOWN_USERS, 998, 999])
NEW_ITEMS = [90_000, 90_001, 90_002]
TRAINED = [3 + 7 * row for row in range(NUM_CANDIDATES)]
# Few, so that events, writes and exclusions meet.
ITEMS = st.sampled_from([*TRAINED[:8], *TRAINED[-4:], *NEW_ITEMS])
GENRES = st.lists(st.sampled_from(["a", "b", "c", "zydeco"]), max_size=2, unique=True)
START = 1_760_000_000_000


@functools.cache
def by_name(kind: str) -> tuple[Served, Any, Any, Version]:
    """Returns a model, its form for an export, its index, and what the world knows of it."""
    served, users = make_served("int"), np.arange(NUM_QUERIES + 1)
    rng = np.random.default_rng(1)
    if kind == "repeats":  # People click the same items again.
        clicks = [rng.choice(rows, 2 * len(rows)) if len(rows) else rows for rows in served.clicks]
        served = dataclasses.replace(served, clicks=clicks)
    known = [np.unique(rows) for rows in served.clicks]
    disliked = [np.zeros(0, np.int32)] * len(users)
    changes: dict[str, Any] = {}
    if kind == "seen":
        changes["exclude"] = "seen"
        known = [
            np.union1d(rows, rng.choice(60, 5) + 1) * (row > 0) for row, rows in enumerate(known)
        ]
        known = [rows[rows > 0].astype(np.int32) for rows in known]
    if kind != "plain":
        others = [np.setdiff1d(np.arange(1, 60), rows) for rows in known]
        disliked = [
            rows[:: 20 + row].astype(np.int32) * (row > 0) for row, rows in enumerate(others)
        ]
        disliked = [rows[rows > 0] for rows in disliked]
    if kind == "repeats":
        changes["bonus"] = HistoryBonus(RepeatBonus(2.0, 0.5, 0.0))
    changes |= {"known_positives": RowLists.from_lists(known)}
    changes |= {"disliked": RowLists.from_lists(disliked)}
    exportable = dataclasses.replace(served.exportable(), **changes)

    def ids(lists: list[np.ndarray]) -> dict[int, list[int]]:
        pairs = zip(KNOWN_USERS, lists[1:], strict=True)
        return {user: served.candidate_ids[rows - 1].tolist() for user, rows in pairs}

    version = Version(
        items={id_: tuple(genres) for id_, genres in zip(TRAINED, served.genres, strict=True)},
        histories={user: rows[::-1] for user, rows in ids(served.clicks).items()},
        known=ids(known),
        disliked=ids(disliked),
        rule={"seen": "seen", "repeats": "none"}.get(kind, "clicked"),
        is_exact=kind != "indexed",
        repeat=(2.0, 0.5) if kind == "repeats" else None,
    )
    index = Scann(recall=0.9) if kind == "indexed" else Exact()
    return served, exportable, index, version


KINDS = "plain", "seen", "repeats", "indexed"


@pytest.fixture(scope="module")
def exports(module_path: Path, trusted_exports: None, few_signatures: None) -> dict[str, Path]:
    """A version of each kind, without SavedModels; all have the same towers."""
    folders = {}
    for kind in KINDS:
        _, exportable, index, _ = by_name(kind)
        folder = export(exportable, module_path / kind / "films", index=index, filter_by="genres")
        for part in SAVED_MODEL_PARTS:
            shutil.rmtree(folder / part, ignore_errors=True)
        folders[kind] = folder
    return folders


class Vectors:
    """Products of histories' vectors and items' vectors, of a model that never changes."""

    def __init__(self, retriever: LoadedRetriever) -> None:
        self._retriever = retriever
        self.of_item = functools.cache(self._of_item)
        self.of_query = functools.cache(self._of_query)

    def _of_item(self, id_: int, genres: Genres) -> np.ndarray:
        return self._retriever.embed_candidates([id_], {"genres": [list(genres)]})[0][0]

    def _of_query(self, user: int, history: tuple[int, ...]) -> np.ndarray:
        return self._retriever.embed_queries([{"user_id": user, "history": [*history]}])[0]


class Machine(RuleBasedStateMachine):
    """A server in this process and a second process, as `World` says that they are."""

    exports: dict[str, Path]
    vectors: Vectors

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="machine-"))
        self.model = self.folder / "films"
        self.world = World(START)
        self.running: Running | None = None
        self.other: LoadedRetriever | None = None
        self.whole = b""  # The file of events before it was damaged.
        self.hidden = File()  # What it holds.
        self.backup: File | None = None
        self.items_backup: dict[int, Any] | None = None
        self.num_steps = 0
        self.tie = START - HOUR  # Events of one time arrive in one process, by one clock.
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(time, "time", lambda: self.world.now / 1000)
        self.patch.setattr(time, "time_ns", lambda: self.world.now * 1_000_000)
        clock = SimpleNamespace(
            now=lambda zone: datetime.fromtimestamp(self.world.now / 1000, zone)
        )
        self.patch.setattr("tfrs_pipeline.run.refresh.datetime", clock)

    # The server and its versions.

    @initialize(kind=st.sampled_from(KINDS), waits=st.booleans())
    def start(self, kind: str, waits: bool) -> None:
        # Answers are written at once, or only with the next events.
        seconds = 1e9 if waits else 0.0
        self.patch.setattr("tfrs_pipeline.records.recorder._ANSWER_SECONDS", seconds)
        self.waits = waits
        self._publish(kind, 0)
        self._serve()

    def _serve(self) -> None:
        settings: dict[str, Any] = {"poll_seconds": 1e6, "record_share": 1.0, "page": False}
        self.running = Running(self.model, takes_writes=True, **settings)
        self.running.__enter__()
        self.world.load()

    def teardown(self) -> None:
        if self.running is not None:
            self.running.__exit__()
        self.patch.undo()
        shutil.rmtree(self.folder)

    @property
    def server(self) -> Running:
        assert self.running is not None
        return self.running

    def _look(self) -> None:
        """Lets the server look for versions and items, as it does every two seconds."""
        for _ in range(2):  # A restored file of items is loaded at the second look.
            self.server.server.versions.refresh()
        self.world.load()
        assert self.server.get("/readyz").text.startswith(
            f"ok: films version {max(self.world.versions)}"
        )
        self.other = None

    def _publish(self, kind: str, hours: int) -> None:
        """Copies a version, as if its items were read now, and its log had ended before."""
        number, version = max(self.world.versions, default=0) + 1, by_name(kind)[3]
        read, end = self.world.now, self.world.now - hours * HOUR
        folder = Path(shutil.copytree(self.exports[kind], self.folder / "new"))
        path = folder / MANIFEST_FILE
        record = read_record(path, leave_out=SAVED_MODEL_PARTS)
        record |= {"items_read": in_iso(read), "histories_until": in_iso(end)}
        files = [file for file in folder.rglob("*") if file.is_file() and file != path]
        write_record(path, record, files)
        self.model.mkdir(exist_ok=True)
        folder.rename(self.model / str(number))
        self.world.versions[number] = dataclasses.replace(version, read=read, until=end)

    @rule(kind=st.sampled_from(KINDS), hours=st.sampled_from([0, 1]))
    def publish(self, kind: str, hours: int) -> None:
        self._publish(kind, hours)
        self._look()

    @precondition(lambda self: self.num_steps % 5 == 0)  # It takes 0.3 s.
    @rule(items=st.dictionaries(ITEMS, GENRES, min_size=1, max_size=6), first=st.integers(0, 50))
    def refresh(self, items: dict[int, list[str]], first: int) -> None:
        """Makes a version of the newest one's towers and users, with other items."""
        version = self.world.version
        table = {
            id_: list(genres) for id_, genres in version.items.items() if id_ in TRAINED[first:]
        }
        table |= {TRAINED[20]: ["a"]} | items
        genres = pa.array(table.values(), pa.list_(pa.string()))
        pq.write_table(pa.table({"item_id": [*table], "genres": genres}), self.folder / "i.parquet")
        number = max(self.world.versions) + 1
        done = refresh_index(self.model, self.folder / "i.parquet", index=Exact())
        assert (done.folder.name, done.num_items) == (str(number), len(table))
        new = {id_: tuple(genres) for id_, genres in table.items()}
        changes: dict[str, Any] = {"items": new, "read": self.world.now, "is_exact": True}
        self.world.versions[number] = dataclasses.replace(version, **changes)
        self._look()

    @precondition(lambda self: len(self.world.versions) > 1)
    @rule()
    def roll_back(self) -> None:
        number = max(self.world.versions)
        shutil.rmtree(self.model / str(number))
        del self.world.versions[number]
        self._look()

    @precondition(lambda self: self.world.file is not None)
    @rule()
    def restart(self) -> None:
        self.server.__exit__()
        self.world.flush()
        self._serve()
        self.tie += 1000

    @rule(hours=st.sampled_from([-2, -1, 0, 1, 5]))
    def set_clock(self, hours: int) -> None:
        self.world.now += hours * HOUR

    # Writes.

    @rule(
        rows=st.lists(
            st.tuples(
                USERS,
                ITEMS,
                st.sampled_from([*TYPES, "click", "click", "dislike", "view"]),
                st.sampled_from([None, None, "tie", -90, 1, 23]),
                st.sampled_from([None, None, "a", "b", "c"]),
            ),
            min_size=1,
            max_size=4,
        ),
        by_other=st.booleans(),
    )
    def send_events(self, rows: list[tuple[Any, ...]], by_other: bool) -> None:
        bodies, events = [], []
        for user, item, type_, when, id_ in rows:
            times = {None: self.world.now, "tie": self.tie}
            moment = times[when] if when in times else self.world.now + when * HOUR
            more = {} if when is None else {"time": moment / 1000}
            more |= {} if id_ is None else {"event_id": id_}
            bodies.append(event(user, item, type_, **more))
            events.append(Event(user, stage_of(type_), moment, item, id_))
        if by_other and self.world.file is not None:
            num_new = self._other().record(bodies)
            # Another process has another order of arrival.
            self.tie += 1000
            assert num_new == self.world.file.record(events)
            return
        answer = send(self.server, {"events": bodies})
        self.world.flush()
        if self.world.file is None:
            assert (answer.status_code, "is damaged" in answer.text) == (503, True)
            return
        num_unknown = sum(row.item not in self.world.candidates() for row in events)
        counts = {"num_new": self.world.file.record(events), "num_unknown_items": num_unknown}
        assert (answer.status_code, answer.json()) == (200, counts)

    @rule(user=USERS, item=ITEMS)
    def send_a_time_too_late(self, user: int, item: int) -> None:
        late = event(user, item, time=self.world.now / 1000 + 90_000)
        answer = send(self.server, {"events": [event(user, item), late]})
        assert (answer.status_code, "Event 1: time" in answer.text) == (400, True)

    @rule(user=USERS, by_other=st.booleans())
    def delete_user(self, user: int, by_other: bool) -> None:
        if by_other and self.world.file is not None:
            assert self._other().forget(user) == self.world.file.forget(user)
            return
        answer = send(self.server, b"", f"/v1/users/{user}", "DELETE")
        self.world.flush()
        if self.world.file is None:
            assert (answer.status_code, "delete the user again" in answer.text) == (503, True)
        else:
            counts = {"num_deleted": self.world.file.forget(user)}
            assert (answer.status_code, answer.json()) == (200, counts)

    @rule(items=st.dictionaries(ITEMS, GENRES, min_size=1, max_size=3), by_other=st.booleans())
    def put_items(self, items: dict[int, list[str]], by_other: bool) -> None:
        bodies = [{"item_id": id_, "genres": genres} for id_, genres in items.items()]
        num_new, _ = self.world.write({id_: tuple(genres) for id_, genres in items.items()})
        if by_other:
            assert self._other().upsert(bodies) == num_new
            self.server.server.versions.refresh()
        else:
            answer = send(self.server, {"items": bodies}, ITEMS_PATH, "PUT").json()
            answer.pop("notes", None)
            assert answer == {"num_new": num_new, "num_items": len(self.world.candidates())}

    @rule(ids=st.lists(ITEMS, min_size=1, max_size=4, unique=True), by_other=st.booleans())
    def remove_items(self, ids: list[int], by_other: bool) -> None:
        _, num_removed = self.world.write(dict.fromkeys(ids))
        if by_other:
            assert self._other().remove(ids) == num_removed
            self.server.server.versions.refresh()
        else:
            answer = send(self.server, {"item_ids": ids}, ITEMS_PATH, "DELETE").json()
            num_items = len(self.world.candidates())
            assert answer == {"num_removed": num_removed, "num_items": num_items}

    # The files.

    @property
    def path(self) -> Path:
        return self.model / JOURNAL_FILE

    @precondition(lambda self: self.world.file is not None and self.path.exists())
    @rule(how=st.sampled_from([*DAMAGES]))
    def damage_events(self, how: str) -> None:
        checkpoint(self.path)
        self.whole = self.path.read_bytes()
        assert self.world.file is not None
        self.hidden, self.world.file = self.world.file, None
        DAMAGES[how](self.path, self.whole)

    @precondition(lambda self: self.world.file is None)
    @rule()
    def repair_events(self) -> None:
        self.path.write_bytes(self.whole)
        self.world.file = self.hidden

    @precondition(lambda self: self.path.exists())
    @rule()
    def delete_events(self) -> None:
        for file in self.model.glob(f"{JOURNAL_FILE}*"):
            file.unlink()
        self.world.file = File()

    @precondition(lambda self: self.world.file is not None and self.path.exists())
    @rule()
    def back_up_events(self) -> None:
        (self.folder / "backup").unlink(missing_ok=True)
        copy_database(self.path, self.folder / "backup")
        self.backup = copy.deepcopy(self.world.file)

    @precondition(lambda self: self.backup is not None and self.path.exists())
    @rule(in_place=st.booleans())
    def restore_events(self, in_place: bool) -> None:
        if in_place and self.world.file is not None:
            copy_database(self.folder / "backup", self.path)
        else:  # As the guide says.
            for file in self.model.glob(f"{JOURNAL_FILE}*"):
                file.unlink()
            shutil.copyfile(self.folder / "backup", self.path)
        self.world.file = copy.deepcopy(self.backup)

    @precondition(lambda self: (self.model / STORE_FILE).exists())
    @rule()
    def delete_items_file(self) -> None:
        for file in self.model.glob(f"{STORE_FILE}*"):
            file.unlink()
        self.world.live = {}
        self._look()

    @precondition(lambda self: (self.model / STORE_FILE).exists())
    @rule()
    def back_up_items(self) -> None:
        (self.folder / "items").unlink(missing_ok=True)
        copy_database(self.model / STORE_FILE, self.folder / "items")
        self.items_backup = copy.deepcopy(self.world.live)

    @precondition(lambda self: self.items_backup is not None)
    @rule()
    def restore_items(self) -> None:
        copy_database(self.folder / "items", self.model / STORE_FILE)
        assert self.items_backup is not None
        self.world.live = copy.deepcopy(self.items_backup)
        self._look()

    # Questions.

    @rule(
        users=st.lists(USERS, min_size=1, max_size=3),
        k=st.integers(1, ALL),
        exclude=st.lists(ITEMS, max_size=3),
        allowed=st.sampled_from([None, [], ["a"], ["b", "zydeco"], ["no genre"]]),
        lately=st.sampled_from([None, None, (1, 0.0), (2, 0.0), (0, 1.5), (1, 4.0)]),
    )
    def ask(
        self,
        users: list[int],
        k: int,
        exclude: list[int],
        allowed: list[str] | None,
        lately: tuple[int, float] | None,
    ) -> None:
        if self.world.file is None:
            lately = None  # Those that wait may be left out, or not.
        body = retrieve_user(users, [exclude] * len(users), k)
        if allowed is not None:
            body["signature_name"] = "retrieve_user_filtered"
            body["inputs"]["allowed"] = [allowed] * len(users)
        gone = [{*exclude} for _ in users]
        if lately is not None:
            answers, hours = lately
            body["exclude_served"] = {"answers": answers, "hours": hours}
            gone = [
                ids | self.world.served_lately(u, *lately)
                for ids, u in zip(gone, users, strict=True)
            ]
        outputs = self._predict(body)
        for line, user in enumerate(users):
            now = self.world.user(user)
            assert outputs["is_known_user"][line] == now.is_known
            answer = outputs["candidate_ids"][line], outputs["scores"][line]
            self._check(user, now.history, *answer, k, now.left_out | gone[line], allowed or [])
        self._serve_to(users, outputs["candidate_ids"])

    @rule(
        user=st.sampled_from([100, 104, 999, -1]),
        history=st.lists(ITEMS, max_size=4),
        k=st.integers(1, ALL),
    )
    def ask_by_history(self, user: int, history: list[int], k: int) -> None:
        """Nothing is left out, whoever asks."""
        inputs = {"user_id": [user], "history": [history], "exclude": [[]], "k": k}
        outputs = self._predict({"signature_name": "retrieve", "inputs": inputs})
        self._check(user, history, outputs["candidate_ids"][0], outputs["scores"][0], k, set(), [])
        self._serve_to([user], outputs["candidate_ids"])

    @rule(user=USERS, item=ITEMS, k=st.integers(1, 30), exclude=st.lists(ITEMS, max_size=2))
    def ask_why(self, user: int, item: int, k: int, exclude: list[int]) -> None:
        body = {"user_id": user, "item_id": item, "k": k, "exclude": exclude}
        why = self.server.post(EXPLAIN, json=body).json()
        now, version = self.world.user(user), self.world.version
        clicked = now.left_out & {*now.history}
        rules = {"exclude": exclude, "disliked": now.disliked, "clicked": clicked}
        rules[version.rule] = now.left_out
        broken = next((name for name, ids in rules.items() if item in ids), "")
        removed = {id_ for id_, write in self.world.wanted() if write.genres is None}
        if item not in self.world.candidates():
            absent = "unlisted" if item in TRAINED else "unknown"
            assert why["verdict"] == ("removed" if item in removed else absent)
        elif broken:
            assert (why["verdict"], why["rule"]) == ("excluded", broken)
        else:
            outputs = self._predict(retrieve_user([user], [exclude], k))
            self._serve_to([user], outputs["candidate_ids"])
            assert (why["verdict"] == "found") == (item in outputs["candidate_ids"][0])
            scores = self._scores(user, now.history)
            assert why["score"] == pytest.approx(scores[item], rel=1e-4, abs=1e-4)

    @precondition(lambda self: self.world.file is not None)
    @rule(user=USERS)
    def ask_the_other(self, user: int) -> None:
        now = self.world.user(user)
        ids, scores, is_known = self._other().retrieve_user([user], ALL)
        assert is_known.tolist() == [now.is_known]
        self._check(user, now.history, ids[0].tolist(), scores[0].tolist(), ALL, now.left_out, [])
        assert self._other().users.history(user) == now.history[::-1]

    @invariant()
    def a_user_is_answered(self) -> None:
        """Asks for all items of one user after the other; time passes."""
        if self.running is None:
            return
        self.num_steps += 1
        self.world.now += 7
        user = [*KNOWN_USERS, 998, 999][self.num_steps % 8]
        outputs, now = self._predict(retrieve_user([user], [[]], ALL)), self.world.user(user)
        answer = outputs["candidate_ids"][0], outputs["scores"][0]
        self._check(user, now.history, *answer, ALL, now.left_out, [])
        self._serve_to([user], outputs["candidate_ids"])
        ready = self.server.get("/readyz")
        is_told = "events are unavailable" in ready.text
        assert (ready.status_code, is_told) == (200, self.world.file is None)
        self.world.now += 7

    def _other(self) -> LoadedRetriever:
        """Returns the second process, after its look at the items."""
        if self.other is None:
            self.other = load(self.model)
        self.other.catch_up()
        return self.other

    def _predict(self, body: dict[str, Any]) -> dict[str, Any]:
        response = self.server.post(PREDICT, json=body)
        assert response.status_code == 200, response.text
        told = response.headers.get("x-events")
        assert told == ("unavailable" if self.world.file is None else None)
        outputs: dict[str, Any] = response.json()["outputs"]
        return outputs

    def _serve_to(self, users: list[int], ids: list[list[int]]) -> None:
        """Notes what users were served, and waits until it is written."""
        for user, items in zip(users, ids, strict=True):
            if user != -1:
                filled = [id_ for id_ in items if id_ != -1]
                self.world.waiting.append(Answer(user, self.world.now, filled))
        if not self.waits:
            until(lambda: not self.server.server.recorder._waiting)
            self.world.flush()

    def _scores(self, user: int, history: list[int]) -> dict[int, float]:
        vector = self.vectors.of_query(user, tuple(history))

        def product(id_: int, genres: Genres) -> float:
            return float(vector @ self.vectors.of_item(id_, genres))

        return self.world.scores(product, history, {*TRAINED})

    def _check(
        self,
        user: int,
        history: list[int],
        ids: list[int],
        scores: list[float],
        k: int,
        gone: set[int],
        allowed: list[str],
    ) -> None:
        """Compares an answer with the scores of all candidates that it may hold."""
        items = self.world.candidates()
        scored = {
            id_: score
            for id_, score in self._scores(user, history).items()
            if id_ not in gone and (not allowed or {*items[id_]} & {*allowed})
        }
        num = min(k, len(scored))
        filled = ids[:num]
        assert ids[num:] == [-1] * (k - num)
        assert len({*filled}) == num
        assert {*filled} <= scored.keys(), (user, {*filled} - scored.keys())
        best = np.array([scored[id_] for id_ in filled])
        np.testing.assert_allclose(np.array(scores[:num], float), best, rtol=1e-4, atol=1e-4)
        if self.world.version.is_exact:
            best = np.sort([*scored.values()])[::-1][:num]
            np.testing.assert_allclose(np.array(scores[:num], float), best, rtol=1e-4, atol=1e-4)


def in_iso(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat()


def checkpoint(path: Path) -> None:
    """Copies SQLite's log of writes into the file."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def test_a_service_is_what_dictionaries_say(exports: dict[str, Path]) -> None:
    Machine.exports = exports
    Machine.vectors = Vectors(load(exports["plain"], live=False))
    examples = os.environ.get("MACHINE_EXAMPLES")
    settings = hypothesis.settings(
        max_examples=int(examples or 40),
        stateful_step_count=40,
        deadline=None,
        derandomize=examples is None,
        suppress_health_check=[*hypothesis.HealthCheck],
    )
    run_state_machine_as_test(Machine, settings=settings)
