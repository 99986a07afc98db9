"""Measures live items: recall and query times while items are replaced, and writes lost to kills.

First, a reader asks one query after the other, without writes and then while `--rate` items a
second are written and as many removed, until `--exchanged` of the corpus is new. Half of the new
items lie in other clusters than the old ones. At twelve moments the recall is measured by k and by
excluded items, against exact search over what is there at that moment. Writes are checked, put on
disk and found by the next search, as in service; only the embedding is looked up. Then a process
that writes items to a copy of `--model` is killed `--kills` times at moments drawn at random. After
each kill the model is loaded: confirmed writes must be there, and what is there must be complete.

    python benchmarks/live.py --model saved_models/movielens --json benchmarks/results/live.json

The corpus is that of `index_libraries.py`.

With `--events`, a real server of `--model` gets queries and events. Measured are the milliseconds
from a confirmed click to the changed answer; the times of `--queries` a second, alone and beside
`--rate` events a second; and, in this process, those of a query by user id and of one that brings
the same history.

    python benchmarks/live.py --events --vectors 0 --kills 0 --model saved_models/movielens
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import shutil
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from index import synthetic
from record import parser_with_json, write_json
from serving import served

from tfrs_pipeline.serving.candidates import Candidates
from tfrs_pipeline.serving.live import LiveItems
from tfrs_pipeline.serving.retriever import LoadedRetriever, load
from tfrs_pipeline.serving.store import STORE_FILE, Store
from tfrs_pipeline.serving.tune import Requests, tune_index

NUM_MOMENTS = 12
KS, EXCLUDED = (10, 100), (0, 100, 1000)
ITEMS_PER_WRITE = 10


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

    def embed(ids: Any, columns: Any) -> tuple[np.ndarray, np.ndarray]:
        return new[np.array(ids) - num - 1], np.ones(len(ids), bool)

    live = LiveItems(candidates, Store(folder), 1, (), None, tuned.num_leaves, embed)
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


def write_until_killed(model: Path, first: int, confirmed: Connection) -> None:
    """Writes three items at a time, and sends the number of each confirmed write."""
    retriever = load(model)
    for number in range(first, sys.maxsize):
        retriever.upsert(items_of(retriever, number))
        confirmed.send(number)


def items_of(retriever: LoadedRetriever, number: int) -> list[dict[str, Any]]:
    """Makes the items of a write, whose records differ in length."""
    names = [feature.name for feature in retriever.features["candidate"]]
    names += [] if retriever.item_filter is None else [retriever.item_filter["name"]]
    title = f"{number} {'x' * (37 * number % 3000)}"
    return [
        {**dict.fromkeys(names), "item_id": 10**9 + 3 * number + place, "title": title}
        for place in range(3)
    ]


def kills(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Kills a writer again and again; returns how many writes were lost, or half done."""
    rng, model = np.random.default_rng(options.seed), folder / "model"
    shutil.copytree(options.model, model)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([load.__module__])
    confirmed, num_lost, num_half = set[int](), 0, 0
    for _ in range(options.kills):
        receiver, sender = context.Pipe(duplex=False)
        first = max(confirmed, default=-1) + 2  # The write after the last is unknown.
        writer = context.Process(target=write_until_killed, args=(model, first, sender))
        writer.start()
        sender.close()
        confirmed.add(receiver.recv())
        time.sleep(float(rng.uniform(0, 0.2)))
        writer.kill()
        writer.join()
        with contextlib.suppress(EOFError):
            while True:
                confirmed.add(receiver.recv())
        retriever = load(model)
        there = set(retriever.candidate_ids())
        written = {(id_ - 10**9) // 3 for id_ in there if id_ >= 10**9}
        whole = {
            number
            for number in written
            if all(
                item["item_id"] in there and retriever.live.titles[item["item_id"]] == item["title"]
                for item in items_of(retriever, number)
            )
        }
        num_lost += len(confirmed - whole)
        num_half += len(written - whole)
    figures = {
        "kills": options.kills,
        "confirmed_writes": len(confirmed),
        "lost": num_lost,
        "half": num_half,
        "store_mb": (model / STORE_FILE).stat().st_size / 1e6,
    }
    print(figures, flush=True)
    return figures


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

    def ask(self, user: Any, k: int = 100, **headers: str) -> list[Any]:
        """Returns the items for a user."""
        inputs = {"user_id": [user], "exclude": [[]], "k": k}
        body = {"signature_name": "retrieve_user", "inputs": inputs}
        answer = self.post(f"/v1/models/{self._name}:predict", body, **headers)
        return list(answer["outputs"]["candidate_ids"][0])

    def version(self) -> int:
        """Returns the version in use."""
        statuses = self.post(f"/v1/models/{self._name}", None, "GET")["model_version_status"]
        return next(int(x["version"]) for x in statuses if x["state"] == "AVAILABLE")


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Returns the median and the 99th percentile in milliseconds, and the number of values."""
    p50, p99 = 1e3 * np.percentile(seconds, [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99), "num": len(seconds)}


def at_rate(rate: float, seconds: float, work: Any) -> list[float]:
    """Calls `work(number)` at moments of a fixed rate; returns how long each call took."""
    begin, times = time.perf_counter(), []
    for number in range(round(rate * seconds)):
        time.sleep(max(0.0, begin + number / rate - time.perf_counter()))
        start = time.perf_counter()
        work(number)
        times.append(time.perf_counter() - start)
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
    from tfrs_pipeline.serving.recommend import known_users

    model, token = Path(shutil.copytree(options.model, folder / "served")), "0123456789abcdef"
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
            start = time.perf_counter()
            client.post("/v1/events", {"user_id": user, "item_id": best, "type": "click"})
            confirmation = time.perf_counter()
            assert best not in client.ask(user)
            changed.append(time.perf_counter() - confirmation)
            confirmed.append(confirmation - start)
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
    by_user, by_history = [], []
    for user in users[:300] * 3:
        history = retriever.stored_history(user)[::-1]
        start = time.perf_counter()
        retriever.retrieve_user([user], 100)
        middle = time.perf_counter()
        retriever.retrieve([{"user_id": user, "history": history}], 100, [history])
        by_user.append(middle - start)
        by_history.append(time.perf_counter() - middle)
    figures["by_user_id"], figures["by_history"] = map(percentiles, (by_user, by_history))
    print(json.dumps(figures, indent=2), flush=True)
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
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        if options.vectors:
            figures["churn"] = churn(options, Path(name))
        if options.events:
            figures["events"] = events(options, Path(name))
        if options.model and options.kills:
            figures["kills"] = kills(options, Path(name))
    if options.json:
        write_json(options.json, figures, seed=options.seed)


if __name__ == "__main__":
    main()
