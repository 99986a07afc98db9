"""Measures what a service costs, of one checkout of this package or of two in turn.

Rows, each measured in a fresh process, of a trained model and of a generated one:

    make       seconds, CPU seconds and peak memory of the process that makes the model, and the
               size of its folder; only where this run makes it
    start      from the start of `tfrs-pipeline serve` until /readyz answers 200; CPU seconds
    memory     of that server after 1,000 queries, MiB: resident; pss, where a page that several
               processes share counts in part; anonymous, its own; file, pages of mapped files;
               shared, pages that another process has mapped too
    swaps      ten new versions, each a copy renamed when it is complete, while a client asks:
               memory before and after, MiB, failed requests
    library    `tp.load`, then `retrieve_user([user], 10)`, one after another: seconds and MiB of
               loading, milliseconds and CPU milliseconds of a query
    http       the same over HTTP by one client, which keeps its connection
    clients    the same by eight clients: requests a second, CPU milliseconds of the server for
               each, and the share of a core that the process of the clients uses. Near 1, the
               clients are too slow for the figure to be the server's
    command    `tfrs-pipeline query MODEL --user USER -k 3`
    recommend  `tfrs-pipeline recommend` of the 100 best items for `--recommend-users` users
    equal      10,000 answers by user and as many by history, searched exactly, against the model's
               SavedModel: ids that differ, ids that differ beyond ties, and the largest difference
               of the scores of an item. Left out if answers come from the SavedModel itself

The generated model has items in clusters, 64-d, and users with `--events` events each; a query is
the mean of its history. The trained model is `--model`, of MovieLens-100K, or else a small one that
is trained on a simulated log with as many users. A checkout makes its models by itself, in
`--folder`, and finds them there the next time.

    python benchmarks/weight.py --json weight.json

measures the package that Python imports. Two checkouts are compared in turn, each round in the
other order, so that what else the machine does affects both. Start it in a folder that is no
checkout, which Python would import on both sides:

    python benchmarks/weight.py --against ../before --json benchmarks/results/weight.json

The ratio is the median over the rounds of what this checkout costs by what the other costs. A row
without `against` in the file was measured of this checkout alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from record import commit, parser_with_json, spent, write_json
from serving import Clusters, resident_mib, run_clients, served, status_mib

KINDS = ("trained", "generated")
K, NUM_QUERIES, NUM_CLIENTS, NUM_SWAPS = 10, 1000, 8, 10
NUM_USERS = {"trained": 943}  # Of MovieLens-100K, and of the log that is simulated.
NUM_COMPARED, COMPARED_K, TIE = 10_000, 100, 1e-5

Figures = dict[str, float]


@dataclass(frozen=True)
class Model:
    """A model's folder, and how many users it has: 0, 1, ..."""

    folder: Path
    num_users: int

    @property
    def newest(self) -> Path:
        """The folder of the newest version."""
        versions = (path for path in self.folder.iterdir() if path.name.isdigit())
        return max(versions, key=lambda path: int(path.name))

    def ask(
        self, port: int, num_clients: int, seconds: float = 600, most: int | None = None
    ) -> tuple[list[float], int, float]:
        """Asks a server; see `run_clients`."""
        ask = partial(run_clients, name=self.folder.name, num_users=self.num_users, k=K)
        return ask(port, num_clients, seconds, most=most)


def make(kind: str, folder: Path, options: argparse.Namespace) -> None:
    """Trains or generates a model, and exports it."""
    import tfrs_pipeline as tp

    if kind == "generated":
        users = {"num_users": options.users, "history_length": options.events}
        model: Any = Clusters(options.items, 0, **users)
    else:
        from tfrs_pipeline.sources.simulated import FunnelOptions, simulate_funnel

        sizes = {"num_users": NUM_USERS["trained"], "num_items": 1682, "num_requests": 20_000}
        simulation = simulate_funnel(**sizes, seed=0, options=FunnelOptions(device_weight=1))
        training = tp.TrainingSettings(max_epochs=2)
        model = tp.TwoTower(training=training).fit(simulation.log)
    tp.export(model, folder)


def percentiles(latencies_ms: list[float]) -> Figures:
    """Returns the median and the 99th percentile."""
    p50, p99 = np.percentile(latencies_ms, [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99)}


def sizes_mib(pid: int) -> Figures:
    """Reads the memory of a process."""
    names = ("status", "smaps_rollup")
    text = "".join(Path(f"/proc/{pid}/{name}").read_text() for name in names)
    mib = {name: int(kb) / 1024 for name, kb in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)}
    return {
        "resident_mib": mib["VmRSS"],
        "pss_mib": mib["Pss"],
        "anonymous_mib": mib["RssAnon"],
        "file_mib": mib["RssFile"],
        "shared_mib": mib["Shared_Clean"] + mib["Shared_Dirty"],
    }


def cpu_seconds(pid: int) -> float:
    """Reads the CPU time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(model: Model, options: argparse.Namespace) -> Figures:
    """Starts a server."""
    begin = time.perf_counter()
    # The server writes its address just before it answers, and `urlopen` waits for the answer.
    with served(model.folder) as (port, pid):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=60) as answer:
            assert answer.status == 200
        return {"seconds": time.perf_counter() - begin, "cpu_seconds": cpu_seconds(pid)}


def memory(model: Model, options: argparse.Namespace) -> Figures:
    """Reads the memory of a server that has answered."""
    with served(model.folder) as (port, pid):
        _, num_failed, _ = model.ask(port, 1, most=NUM_QUERIES)
        return {**sizes_mib(pid), "num_failed": num_failed}


def swaps(model: Model, options: argparse.Namespace) -> Figures:
    """Puts new versions in place while a client asks, each a copy of the model's."""
    name, num_failed, latencies = model.folder.name, 0, list[float]()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary) / name
        shutil.copytree(model.newest, folder / "1")
        with served(folder, "--poll-seconds", "0.2") as (port, pid):
            model.ask(port, 1, most=NUM_QUERIES)
            before = resident_mib(pid)
            for version in range(2, 2 + NUM_SWAPS):
                shutil.copytree(model.newest, folder / ".partial")
                (folder / ".partial").rename(folder / str(version))
                begin = time.monotonic()
                while _version(port, name) != version:
                    if time.monotonic() > begin + 300:
                        raise RuntimeError(f"version {version} was not loaded in five minutes")
                    more, failed, _ = model.ask(port, 1, seconds=1)
                    latencies, num_failed = latencies + more, num_failed + failed
                shutil.rmtree(folder / str(version - 1))
            model.ask(port, 1, most=NUM_QUERIES)
            sizes = {"before_mib": before, "after_mib": resident_mib(pid)}
            sizes["peak_mib"] = status_mib(pid, "VmHWM")
    return {**sizes, **percentiles(latencies), "num_failed": num_failed}


def _version(port: int, name: str) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models/{name}") as answer:
        statuses = json.load(answer)["model_version_status"]
    return next(int(s["version"]) for s in statuses if s["state"] == "AVAILABLE")


def library(model: Model, options: argparse.Namespace) -> Figures:
    """Loads the model here, and asks it."""
    begin = time.perf_counter()
    import tfrs_pipeline as tp

    retriever = tp.load(model.folder)
    seconds = time.perf_counter() - begin
    users = np.random.default_rng(0).integers(model.num_users, size=options.queries).tolist()
    for user in users[:50]:
        retriever.retrieve_user([user], K)
    latencies, cpu = [], time.process_time()
    for user in users:
        begin = time.perf_counter()
        retriever.retrieve_user([user], K)
        latencies.append(1000 * (time.perf_counter() - begin))
    cpu_ms = 1000 * (time.process_time() - cpu) / len(users)
    size = {"load_seconds": seconds, "resident_mib": resident_mib(os.getpid())}
    return {**size, **percentiles(latencies), "cpu_ms": cpu_ms}


def http(model: Model, options: argparse.Namespace, num_clients: int = 1) -> Figures:
    """Asks a server."""
    with served(model.folder) as (port, pid):
        model.ask(port, num_clients, most=100)
        server, clients = cpu_seconds(pid), time.process_time()
        latencies, num_failed, seconds = model.ask(port, num_clients, most=options.queries)
        num = num_clients * options.queries
        return {
            **percentiles(latencies),
            "requests_per_second": len(latencies) / seconds,
            "server_cpu_ms": 1000 * (cpu_seconds(pid) - server) / num,
            "client_cores": (time.process_time() - clients) / seconds,
            "num_failed": num_failed,
        }


def command(model: Model, options: argparse.Namespace) -> Figures:
    """Asks on the command line."""
    line = ["query", str(model.folder), "--user", str(model.num_users // 2), "-k", "3"]
    return spent([sys.executable, "-m", "tfrs_pipeline.cli", *line])


def recommend(model: Model, options: argparse.Namespace) -> Figures:
    """Writes the best items of users, who are spread evenly."""
    num = min(options.recommend_users, model.num_users)
    users = np.arange(num) * (model.num_users // num)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        path = Path(temporary) / "users.csv"
        path.write_text("\n".join(["user_id", *map(str, users.tolist())]) + "\n")
        files = ["--users", str(path), "--out", str(Path(temporary) / "best.parquet")]
        line = ["recommend", str(model.folder), *files, "-k", "100"]
        figures = spent([sys.executable, "-m", "tfrs_pipeline.cli", *line])
    return {**figures, "users_per_second": num / figures["seconds"]}


def equal(model: Model, options: argparse.Namespace) -> Figures:
    """Compares answers with those of the SavedModel, by the same inputs."""
    import tfrs_pipeline as tp

    retriever = tp.load(model.folder, exact=True, live=False)
    retriever.retrieve_user([0], K)
    if "tensorflow" in sys.modules:
        return {}
    import tensorflow as tf

    rng, items = np.random.default_rng(0), np.array(retriever.candidate_ids())
    saved = tf.saved_model.load(str(model.newest))
    compared: Figures = {"num_answers": 0, "num_ids_differ": 0, "num_beyond_ties": 0}
    compared["largest_score_difference"] = 0.0
    for _ in range(NUM_COMPARED // 100):
        users = rng.integers(model.num_users, size=100)
        by_history = {"user_id": users, "history": rng.choice(items, (100, 20))}
        for name, known in (("retrieve_user", {"user_id": users}), ("retrieve", by_history)):
            inputs = _inputs(saved.signatures[name], {**known, "k": np.array(COMPARED_K)})
            answer = retriever.engine.answer(name, inputs)
            expected = saved.signatures[name](**{n: tf.constant(x) for n, x in inputs.items()})
            names = ("candidate_ids", "scores")
            _compare(compared, *(answer[x] for x in names), *(expected[x].numpy() for x in names))
    return compared


def _inputs(signature: Any, known: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Completes the inputs of a signature for 100 queries: what is not known is missing."""
    missing, inputs = {"f": np.nan, "O": b"", "i": -1}, {}
    for name, spec in signature.structured_input_signature[1].items():
        dtype = np.dtype(spec.dtype.as_numpy_dtype)
        shape = [100, *(size or 0 for size in spec.shape[1:])]
        if name == "history_timestamps":
            shape = list(known["history"].shape)
        absent = np.full(shape, missing[dtype.kind], dtype)
        inputs[name] = np.asarray(known[name], dtype) if name in known else absent
    return inputs


def _compare(
    compared: Figures, ids: np.ndarray, scores: np.ndarray, saved_ids: Any, saved_scores: Any
) -> None:
    """Adds what differs between answers, [n, k] each, to the figures."""
    compared["num_answers"] += len(ids)
    compared["num_ids_differ"] += int((ids != saved_ids).sum())
    for line in zip(ids.tolist(), scores, saved_ids.tolist(), saved_scores, strict=True):
        found = {x: float(score) for x, score in zip(*line[:2], strict=True) if score > -np.inf}
        expected = {x: float(score) for x, score in zip(*line[2:], strict=True) if score > -np.inf}
        differences = [abs(found[x] - expected[x]) for x in found.keys() & expected.keys()]
        largest = max([compared["largest_score_difference"], *differences])
        compared["largest_score_difference"] = largest
        # An item in one list alone must score as the last one does.
        last = min([*expected.values(), np.inf])
        alone = [{**found, **expected}[x] for x in found.keys() ^ expected.keys()]
        compared["num_beyond_ties"] += sum(abs(score - last) > TIE for score in alone)


ROWS: dict[str, Callable[[Model, argparse.Namespace], Figures]] = {
    "start": start,
    "memory": memory,
    "swaps": swaps,
    "library": library,
    "http": http,
    "clients": partial(http, num_clients=NUM_CLIENTS),
    "command": command,
    "recommend": recommend,
    "equal": equal,
}
REPEATED = ("start", "memory", "library", "http", "clients", "command")


@dataclass(frozen=True)
class Side:
    """A checkout, and the folders of the models that it has made, by kind."""

    checkout: Path
    folders: Mapping[str, Path]

    def do(self, row: str, kind: str, options: argparse.Namespace) -> Figures:
        """Does a task, `make` or a row, in a fresh process that imports this checkout."""
        figures = Path(options.folder) / "figures.json"
        line = [sys.executable, __file__, *sys.argv[1:], "--folder", str(options.folder), "--task"]
        env = {**os.environ, "PYTHONPATH": str(self.checkout)}
        used = spent([*line, row, kind, str(self.folders[kind]), str(figures)], env)
        return used if row == "make" else json.loads(figures.read_text())


def do_task(row: str, kind: str, folder: Path, options: argparse.Namespace) -> Figures:
    """Does a task in this process."""
    if row == "make":
        make(kind, folder, options)
        return {}
    return ROWS[row](Model(folder, {**NUM_USERS, "generated": options.users}[kind]), options)


def measure(sides: Mapping[str, Side], options: argparse.Namespace) -> dict[str, Any]:
    """Measures all rows of all models, the sides in turn: the figures by kind and row."""
    rows: dict[str, Any] = {kind: {} for kind in options.kinds}
    for kind in options.kinds:
        made = {}
        for name, side in sides.items():
            if not (folder := side.folders[kind]).exists():
                figures = side.do("make", kind, options)
                sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
                made[name] = [{**figures, "folder_mib": sum(sizes) / 2**20}]
        tasks = [(row, options.rounds if row in REPEATED else 1) for row in options.rows]
        for row, num_rounds in tasks:
            rounds: dict[str, list[Figures]] = {name: [] for name in sides}
            for number in range(num_rounds):
                for name in list(sides)[:: -1 if number % 2 else 1]:
                    rounds[name].append(sides[name].do(row, kind, options))
            rows[kind][row] = summary(rounds)
            show(kind, row, rows[kind][row])
        if made:
            rows[kind]["make"] = summary(made)
            show(kind, "make", rows[kind]["make"])
    return rows


def summary(rounds: Mapping[str, list[Figures]]) -> dict[str, dict[str, Any]]:
    """Returns each figure's median and rounds by side, and the median ratio of the two sides."""
    figures: dict[str, dict[str, Any]] = {}
    for side, of_side in rounds.items():
        for name in of_side[0]:
            values = [figures_of_round[name] for figures_of_round in of_side]
            figures.setdefault(name, {})[side] = float(np.median(values))
            figures[name].setdefault("rounds", {})[side] = values
    for figure in figures.values():
        pair = [figure["rounds"].get(side) for side in ("this", "against")]
        if None not in pair and all(pair[1]):
            figure["ratio"] = float(np.median(np.divide(*pair)))
    return figures


def show(kind: str, row: str, figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints the medians of a row, and their ratios."""
    for name, figure in figures.items():
        medians = "  ".join(f"{x} {figure[x]:<12.5g}" for x in figure if x != "rounds")
        print(f"{kind:10} {row:10} {name:26} {medians}", flush=True)


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="The other checkout.")
    parser.add_argument("--model", type=Path, help="A trained model of MovieLens-100K.")
    parser.add_argument("--against-model", type=Path, help="That of the other checkout.")
    parser.add_argument("--folder", type=Path, help="Where models are kept; else they go again.")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=5, help=f"Of {', '.join(REPEATED)} (5).")
    parser.add_argument("--users", type=int, default=1_000_000, help="Generated (1,000,000).")
    parser.add_argument("--events", type=int, default=50, help="Of each of them (50).")
    parser.add_argument("--items", type=int, default=100_000, help="Generated (100,000).")
    parser.add_argument("--queries", type=int, default=2000, help="Of each client (2,000).")
    parser.add_argument("--recommend-users", type=int, default=200_000, help="(200,000)")
    parser.add_argument("--task", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        row, kind, folder, path = options.task
        Path(path).write_text(json.dumps(do_task(row, kind, Path(folder), options)))
        return
    spec = importlib.util.find_spec("tfrs_pipeline")  # Without importing it.
    assert spec is not None
    assert spec.origin is not None
    checkouts = {"this": Path(spec.origin).parents[1], "against": options.against}
    trained = {"this": options.model, "against": options.against_model}
    size = f"generated-{options.users}-{options.events}-{options.items}"
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = (options.folder or Path(temporary)).resolve()
        options.folder.mkdir(parents=True, exist_ok=True)
        sides = {}
        for name, checkout in checkouts.items():
            if checkout is not None:
                folder = options.folder / name
                folders = {"trained": trained[name] or folder / "trained"}
                folders["generated"] = folder / size
                sides[name] = Side(checkout.resolve(), folders)
        rows = measure(sides, options)
    if options.json:
        commits = {name: commit(side.checkout) for name, side in sides.items()}
        about = {name: getattr(options, name) for name in ("users", "events", "items", "queries")}
        write_json(options.json, {"commits": commits, "generated": about, "rows": rows}, seed=0)


if __name__ == "__main__":
    main()
