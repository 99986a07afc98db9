"""Measures live items and events: recall and times while they are written, what is lost to kills.

First, a reader asks one query after the other, without writes and then while `--rate` items a
second are written and as many removed, until `--exchanged` of the corpus is new. Half of the new
items lie in other clusters than the old ones. At twelve moments the recall is measured by k and by
excluded items, against exact search over what is there at that moment. Writes are checked, put on
disk and found by the next search, as in service; only the embedding is looked up. Then a server of
a copy of `--model`, to which three clients send events and one items, is killed `--kills` times at
moments drawn at random, and started again. After each kill, confirmed writes must be on disk, once,
and what is there must be complete; clients then repeat their last writes.

    python benchmarks/live.py --model saved_models/movielens --json benchmarks/results/live.json

The corpus is that of `index_libraries.py`.

With `--events`, a real server of `--model` gets queries and events. Measured are the milliseconds
from a confirmed click to the changed answer, and the times of `--queries` a second, alone and
beside `--rate` events a second.

    python benchmarks/live.py --events --vectors 0 --kills 0 --model saved_models/movielens

With `--users`, the store is filled with fifty events of each. A query by user id and one that
brings the same history, which must have the same answers, take turns. Measured are the file, the
server's memory before and after, its CPU time for a query of each kind, and the deletion of five
users at once while one client posts events and two ask.

    python benchmarks/live.py --users 1000000 --vectors 0 --kills 0 --model saved_models/movielens
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import multiprocessing
import os
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from index import synthetic
from record import parser_with_json, write_json
from serving import resident_mib, served

from tfrs_pipeline.retrieval import HISTORY_TIMESTAMPS
from tfrs_pipeline.search.candidates import Candidates
from tfrs_pipeline.search.tune import Requests, tune_index
from tfrs_pipeline.service.live_items import STORE_FILE, LiveItems, Store
from tfrs_pipeline.service.retriever import load
from tfrs_pipeline.service.settings import ServeSettings
from tfrs_pipeline.service.user_events import JOURNAL_FILE, Journal, id_hash

NUM_MOMENTS = 12
KS, EXCLUDED = (10, 100), (0, 100, 1000)
ITEMS_PER_WRITE = 10
EVENTS_PER_USER, FIRST_USER = 50, 10**6  # Of a filled store; the model knows none of its users.
TOKEN = "0123456789abcdef"


class Reader:
    """Asks one query after the other in a thread, until it is stopped."""

    def __init__(self, candidates: Candidates, queries: np.ndarray, k: int) -> None:
        self._candidates, self._queries, self._k = candidates, queries, k
        self._is_stopped = threading.Event()
        self.seconds: list[float] = []
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        number = 0
        while not self._is_stopped.is_set():
            query = self._queries[number % len(self._queries)][np.newaxis]
            start = time.perf_counter()
            self._candidates.search(query, self._k)
            self.seconds.append(time.perf_counter() - start)
            number += 1

    def stop(self) -> dict[str, float]:
        """Stops, and returns the percentiles of the times in microseconds."""
        self._is_stopped.set()
        self._thread.join()
        places = {"p50": 50, "p99": 99, "p99.9": 99.9, "most": 100}
        times = {n: 1e6 * float(np.percentile(self.seconds, p)) for n, p in places.items()}
        return {**times, "num_queries": len(self.seconds)}


def recalls(candidates: Candidates, queries: np.ndarray) -> dict[str, float]:
    """Measures recall by k and by how many of the nearest items are excluded."""
    nearest = candidates.search(queries, max(EXCLUDED), exact=True)[0]
    found = {}
    for k in KS:
        for num in EXCLUDED:
            excluded = [line[:num] for line in nearest]
            here, exact = (
                candidates.search(queries, k, excluded, exact=is_exact)[0]
                for is_exact in (False, True)
            )
            shares = [len(np.intersect1d(a, b)) / k for a, b in zip(here, exact, strict=True)]
            found[f"k {k}, {num} excluded"] = float(np.mean(shares))
    return found


def churn(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Replaces items while a reader asks."""
    num, dim = options.vectors, options.dim
    num_new = round(options.exchanged * num)
    vectors, queries = synthetic(num, dim, 1500, options.seed)
    # Half of the new items are like the old ones, and half elsewhere; so are their queries.
    like, _ = synthetic(num_new // 2, dim, 1, options.seed + 1)
    elsewhere, other_queries = synthetic(num_new - len(like), dim, 100, options.seed + 2)
    rng = np.random.default_rng(options.seed)
    new = rng.permutation(np.concatenate([like, elsewhere]))
    start = time.perf_counter()
    requests = Requests(queries[500:], [np.zeros(0, np.int32)] * 1000)
    tuned = tune_index(vectors, requests, target_recall=options.target_recall)
    print(f"built and tuned in {time.perf_counter() - start:.0f} s", flush=True)
    candidates = Candidates(np.arange(1, num + 1), vectors, tuned.searcher, tuned.levels)

    def embed_items(ids: Any, *_: Any) -> tuple[np.ndarray, np.ndarray]:
        return new[np.array(ids) - num - 1], np.ones(len(ids), bool)

    manifest = {"items_read": "2000-01-01T00:00:00+00:00", "filter": None}
    encoder: Any = SimpleNamespace(embed_items=embed_items)
    live = LiveItems(folder, manifest, candidates, encoder, tuned.num_leaves)
    asked = np.concatenate([queries[:100], other_queries])
    moments = [{"exchanged": 0.0, **recalls(candidates, asked)}]
    reader = Reader(candidates, queries[:500], 100)
    time.sleep(options.quiet_seconds)
    alone = reader.stop()
    print("without writes", alone, flush=True)
    gone, write_seconds = rng.permutation(num)[:num_new] + 1, []
    times: list[dict[str, float]] = []
    for moment in np.array_split(np.arange(num_new), NUM_MOMENTS):
        reader = Reader(candidates, queries[:500], 100)
        begin = time.perf_counter()
        for start in range(0, len(moment), ITEMS_PER_WRITE):
            some = moment[start : start + ITEMS_PER_WRITE]
            before = time.perf_counter()
            live.write(live.prepare([{"item_id": int(num + 1 + i)} for i in some]))
            live.write(live.prepare(removed=gone[some].tolist()))
            write_seconds.append(time.perf_counter() - before)
            wait = begin + (start + len(some)) / options.rate - time.perf_counter()
            time.sleep(max(0.0, wait))
        times.append({"rate": len(moment) / (time.perf_counter() - begin), **reader.stop()})
        found = candidates.search(new[moment[-5:]], 1)[0][:, 0]
        assert found.tolist() == [num + 1 + i for i in moment[-5:]], found
        share = (moment[-1] + 1) / num
        moments.append({"exchanged": share, **recalls(candidates, asked)})
        print(times[-1], moments[-1], flush=True)
    return {
        "readers_alone": alone,
        "readers_beside_writes": times,
        "ratio_of_p99": float(np.median([x["p99"] for x in times])) / alone["p99"],
        "write_milliseconds": 1e3 * float(np.median(write_seconds)),
        "items_per_write": ITEMS_PER_WRITE,
        "moments": moments,
        "least_recall": min(v for x in moments for n, v in x.items() if n != "exchanged"),
        "store_mb": (folder / STORE_FILE).stat().st_size / 1e6,
    }


class Client:
    """A connection to a server of one model, for queries and events."""

    def __init__(self, port: int, name: str, token: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        self._name, self._token = name, token

    def post(self, path: str, body: Any, method: str = "POST", **headers: str) -> Any:
        """Posts JSON; returns the JSON of the answer."""
        headers |= {"Content-Type": "application/json", "Authorization": f"Bearer {self._token}"}
        self._connection.request(method, path, json.dumps(body), headers)
        response = self._connection.getresponse()
        content = json.loads(response.read())
        assert response.status == 200, content
        return content

    def ask(self, user: Any, k: int = 100, history: Any = None, **headers: str) -> list[Any]:
        """Returns the items for a user, or for the inputs `history` of a query that brings one."""
        inputs = {"user_id": [user], "exclude": [[]], "k": k, **(history or {})}
        name = "retrieve_user" if history is None else "retrieve"
        body = {"signature_name": name, "inputs": inputs}
        answer = self.post(f"/v1/models/{self._name}:predict", body, **headers)
        return list(answer["outputs"]["candidate_ids"][0])

    def version(self) -> int:
        """Returns the version in use."""
        statuses = self.post(f"/v1/models/{self._name}", None, "GET")["model_version_status"]
        return next(int(x["version"]) for x in statuses if x["state"] == "AVAILABLE")


class Writer:
    """A client that writes three events, or items, at a time, until the server is killed.

    It first repeats the last confirmed write, and then the next one, of which nothing is known.

    Attributes:
        about: What all its events, or items, have in common.
        key: What tells one from another: "event_id", or the "title" of an item.
        num_confirmed: Number of confirmed writes; they are 0, 1, ...
    """

    def __init__(self, about: dict[str, Any], key: str) -> None:
        self.about, self.key, self.num_confirmed = about, key, 0

    def keys(self, number: int) -> list[str]:
        """Returns the keys of a write, which differ in length."""
        who, more = self.about.get("user_id"), "x" * (37 * number % 150)
        return [f"{who}.{number}.{place}{more}" for place in range(3)]

    def run(self, port: int, name: str) -> None:
        """Writes until the connection breaks."""
        client, num_known = Client(port, name, TOKEN), self.num_confirmed
        what, path, method = "events", "/v1/events", "POST"
        if self.key == "title":
            what, path, method = "items", f"/v1/models/{name}/items", "PUT"
        with contextlib.suppress(OSError, http.client.HTTPException):
            for number in itertools.count(max(0, num_known - 1)):
                rows = [
                    {**self.about, "item_id": 10**9 + 3 * number + place, self.key: key}
                    for place, key in enumerate(self.keys(number))
                ]
                num_new = client.post(path, {what: rows}, method)["num_new"]
                # What was confirmed is not new; what was under way may be.
                assert num_new == 3 * (number >= num_known) or (num_new, number) == (0, num_known)
                self.num_confirmed = max(self.num_confirmed, number + 1)


def serve_model(model: Path, token: Path, address: Connection) -> None:
    """Serves a model, and sends the server's address."""
    from tfrs_pipeline.service.server import serve

    serve(model, ServeSettings(port=0, token_file=token, page=False), address.send)


def kills(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Kills a server again and again; returns how many writes were lost, half done or doubled."""
    rng, model = np.random.default_rng(options.seed), folder / "killed" / options.model.name
    shutil.copytree(options.model, model)
    (folder / "token").write_text(TOKEN)
    retriever = load(model)
    names = [feature.name for feature in retriever.features["candidate"]]
    names += [] if retriever.item_filter is None else [retriever.item_filter["name"]]
    click = {"type": "click", "time": 1_760_000_000}
    writers = [Writer({"user_id": FIRST_USER + n, **click}, "event_id") for n in range(3)]
    writers.append(Writer(dict.fromkeys(names), "title"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tfrs_pipeline.service.server"])
    num_lost = num_half = num_twice = 0
    for _ in range(options.kills):
        receiver, sender = context.Pipe(duplex=False)
        server = context.Process(target=serve_model, args=(model, folder / "token", sender))
        server.start()
        port = int(receiver.recv().rsplit(":", 1)[1])
        threads = [threading.Thread(target=x.run, args=(port, model.name)) for x in writers]
        for thread in threads:
            thread.start()
        time.sleep(float(rng.uniform(0.2, 3)))
        server.kill()
        server.join()
        for thread in threads:
            thread.join()
        stored = [id_hash(row.item["title"]) for row in Store(model).items_after(0) if row.item]
        with Journal(model).writing() as sql:
            stored += [key for (key,) in sql.execute("SELECT event_id FROM events")]
        there = {*stored}
        num_twice += len(stored) - len(there)
        for writer in writers:
            for number in range(writer.num_confirmed + 1):
                num_there = len(there.intersection(map(id_hash, writer.keys(number))))
                num_lost += number < writer.num_confirmed and num_there < 3
                num_half += num_there in (1, 2)
    confirmed = [writer.num_confirmed for writer in writers]
    figures = {"kills": options.kills, "lost": num_lost, "half": num_half, "twice": num_twice}
    return figures | {
        "confirmed_events": 3 * sum(confirmed[:3]),
        "confirmed_items": 3 * confirmed[3],
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Returns the median and the 99th percentile in milliseconds, and the number of values."""
    p50, p99 = 1e3 * np.percentile(seconds, [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99), "num": len(seconds)}


def timed(work: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[float, Any]:
    """Calls a function; returns the seconds that it took, and its result."""
    start = time.perf_counter()
    result = work(*arguments, **options)
    return time.perf_counter() - start, result


def at_rate(rate: float, seconds: float, work: Any) -> list[float]:
    """Calls `work(number)` at moments of a fixed rate; returns how long each call took."""
    begin, times = time.perf_counter(), []
    for number in range(round(rate * seconds)):
        time.sleep(max(0.0, begin + number / rate - time.perf_counter()))
        times.append(timed(work, number)[0])
    return times


def send_events(port: int, name: str, token: str, users: list[Any], items: list[Any], rate: float,
                seconds: float, sent: Any) -> None:  # fmt: skip
    """Posts events, ten at a time, on four connections; runs in a process of its own."""

    def send(number: int) -> None:
        client, rng = Client(port, name, token), np.random.default_rng(number)

        def post(_: int) -> None:
            pairs = zip(rng.choice(users, 10).tolist(), rng.choice(items, 10).tolist(), strict=True)
            events = [{"user_id": u, "item_id": i, "type": "view"} for u, i in pairs]
            client.post("/v1/events", {"events": events})

        begin = time.perf_counter()
        num = len(at_rate(rate / 40, seconds, post))
        sent.put(10 * num / (time.perf_counter() - begin))

    threads = [threading.Thread(target=send, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def events(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measures a server that gets events."""
    from tfrs_pipeline.service.recommend import known_users

    model, token = Path(shutil.copytree(options.model, folder / "served")), TOKEN
    (folder / "token").write_text(token)
    retriever = load(model)
    users, items = known_users(retriever).to_pylist()[:1000], retriever.candidate_ids()
    flags = ("--token-file", str(folder / "token"), "--no-page", "--record-share", "1")
    figures: dict[str, Any] = {}
    with served(model, *flags) as (port, _):
        client, changed, confirmed = Client(port, model.name, token), [], []
        for number in range(300):
            user = users[number % len(users)]
            best = client.ask(user)[0]
            click = {"user_id": user, "item_id": best, "type": "click"}
            confirmed.append(timed(client.post, "/v1/events", click)[0])
            seconds, then = timed(client.ask, user)
            assert best not in then
            changed.append(seconds)
        figures["click_to_confirmation"] = percentiles(confirmed)
        figures["confirmation_to_changed_answer"] = percentiles(changed)

        def ask(number: int) -> None:
            client.ask(users[number % len(users)])

        alone = at_rate(options.queries, options.quiet_seconds, ask)
        figures["queries_alone"] = percentiles(alone)
        context, seconds = multiprocessing.get_context("spawn"), options.quiet_seconds
        sent = context.Queue()
        arguments = (port, model.name, token, users, items, options.rate, seconds + 4, sent)
        sender = context.Process(target=send_events, args=arguments)
        sender.start()
        time.sleep(4)  # Until it has started.
        figures["queries_beside_events"] = percentiles(at_rate(options.queries, seconds, ask))
        figures["events_per_second"] = sum(sent.get() for _ in range(4))
        sender.join()
    return figures


def fill(folder: Path, num_users: int, items: list[Any]) -> None:
    """Fills an event store with fifty clicks of each user, in the order of time.

    At each time the users come in random order, so rows go all over the file, as in service.
    """
    Journal(folder).write([[]])  # Makes the file.
    rng, insert = np.random.default_rng(0), f"INSERT INTO events VALUES (?{', ?' * 6})"
    with contextlib.closing(sqlite3.connect(folder / JOURNAL_FILE, isolation_level=None)) as sql:
        # In one transaction, without its guarantees, and with pages in memory: faster.
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -4000000"):
            sql.execute(f"PRAGMA {pragma}")
        sql.execute("BEGIN")
        for number in range(EVENTS_PER_USER):
            users = (FIRST_USER + rng.permutation(num_users)).tolist()
            pairs = zip(users, rng.choice(items, num_users).tolist(), strict=True)
            moments = itertools.count(1_760_000_000_000 + 86_400_000 * number)
            rows = (
                (user, moment, item, "clicked", None, None, 1000 * moment)
                for moment, (user, item) in zip(moments, pairs, strict=False)
            )
            sql.executemany(insert, rows)
        sql.execute("COMMIT")
        sql.execute("PRAGMA journal_mode = WAL")


def cpu_seconds_of(pid: int) -> float:
    """Reads the CPU time that a process has taken, which other jobs on the machine change less."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def million(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measures a server whose store has the events of many users."""
    model = Path(shutil.copytree(options.model, folder / "many" / options.model.name))
    (folder / "token").write_text(TOKEN)
    retriever = load(model)
    items = retriever.candidate_ids()
    fill(model, options.users, items)
    figures: dict[str, Any] = {"store_mb": (model / JOURNAL_FILE).stat().st_size / 1e6}
    rng = np.random.default_rng(options.seed)
    users = (FIRST_USER + rng.choice(options.users, 1200, replace=False)).tolist()
    histories = []
    for events in Journal(model).of_users(users).values():
        clicked = [[event.item_id for event in events]]
        histories.append({"history": clicked, "exclude": clicked})
        if HISTORY_TIMESTAMPS in retriever.signatures["retrieve"]:
            histories[-1][HISTORY_TIMESTAMPS] = [[event.time // 1000 for event in events]]
    by_user, by_history = [], []
    flags = ("--token-file", str(folder / "token"), "--no-page", "--record-share", "1")
    with served(model, *flags) as (port, pid):
        client = Client(port, model.name, TOKEN)
        for user, history in zip(users[:200], histories, strict=False):
            client.ask(user, history=history)
        figures["resident_mib"] = resident_mib(pid)
        cpu_seconds = [cpu_seconds_of(pid)]
        for block in np.array_split(np.arange(200, len(users)), 10):
            answers = [timed(client.ask, users[i]) for i in block]
            cpu_seconds.append(cpu_seconds_of(pid))
            same = [timed(client.ask, users[i], history=histories[i]) for i in block]
            cpu_seconds.append(cpu_seconds_of(pid))
            assert [ids for _, ids in answers] == [ids for _, ids in same]
            by_user += [seconds for seconds, _ in answers]
            by_history += [seconds for seconds, _ in same]
        views = [{"user_id": user, "item_id": items[0], "type": "view"} for user in users]
        confirmed = [timed(client.post, "/v1/events", view)[0] for view in views]
        figures["resident_mib_after"] = resident_mib(pid)
        figures["by_user_id"], figures["by_history"] = map(percentiles, (by_user, by_history))
        spent = 1e3 * np.diff(cpu_seconds).reshape(-1, 2).sum(axis=0) / len(by_user)
        figures["server_cpu_ms"] = dict(zip(("by_user_id", "by_history"), spent, strict=True))
        figures["event_to_confirmation"] = percentiles(confirmed)
        figures["beside_deletions"] = deletions(port, model.name, users, views[-1])
    return figures


def deletions(port: int, name: str, users: list[Any], view: dict[str, Any]) -> dict[str, Any]:
    """Deletes five users at once; meanwhile one client posts events, and two ask for items.

    One of the two leaves out what was served in the last three answers.
    """
    gone, path = users[:5], f"/v1/models/{name}:predict"
    inputs = {"user_id": [users[-1]], "exclude": [[]], "k": 100}
    query: dict[str, Any] = {"signature_name": "retrieve_user", "inputs": inputs}
    calls = {
        "event": ("/v1/events", view),
        "query": (path, query),
        "query_with_exclude_served": (path, query | {"exclude_served": {"answers": 3}}),
    }
    with ThreadPoolExecutor(len(gone) + len(calls)) as threads:
        deleted = [
            threads.submit(
                timed, Client(port, name, TOKEN).post, f"/v1/users/{id_}", None, "DELETE"
            )
            for id_ in gone
        ]

        def repeat(call: tuple[Any, ...]) -> list[float]:
            client, seconds = Client(port, name, TOKEN), []
            while not (seconds and all(done.done() for done in deleted)):
                seconds.append(timed(client.post, *call)[0])
                time.sleep(0.005)
            return seconds

        times = {key: threads.submit(repeat, call) for key, call in calls.items()}
    figures: dict[str, Any] = {"seconds_to_delete": [done.result()[0] for done in deleted]}
    for key, seconds in times.items():
        figures[key] = percentiles(seconds.result()) | {"most_ms": 1e3 * max(seconds.result())}
    return figures


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("--vectors", type=int, default=1_000_000, help="0 leaves this part out.")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1000, help="Items a second.")
    parser.add_argument("--exchanged", type=float, default=0.2, help="A share of the corpus.")
    parser.add_argument("--quiet-seconds", type=float, default=20)
    parser.add_argument("--target-recall", type=float, default=0.98)
    parser.add_argument("--model", type=Path, help="An export with integer ids; is not changed.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--events", action="store_true", help="Measure events in service.")
    parser.add_argument("--queries", type=float, default=200, help="Beside events, a second.")
    parser.add_argument("--users", type=int, default=0, help="Of a store that is filled.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        if options.vectors:
            figures["churn"] = churn(options, Path(name))
        if options.events:
            figures["events"] = events(options, Path(name))
        if options.users:
            figures["store"] = million(options, Path(name))
        if options.model and options.kills:
            figures["kills"] = kills(options, Path(name))
    print(json.dumps(figures, indent=2))
    if options.json:
        write_json(options.json, figures, seed=options.seed)


if __name__ == "__main__":
    main()
