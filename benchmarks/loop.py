"""Closes the loop: a server answers, users click, and each night the package's commands retrain.

The world is the simulated funnel: users whose taste is known, and a ranker behind the retrieval
that knows it up to noise and shows ten of the fifty items of an answer. On each of thirty days, 300
requests go to the real server over HTTP; what the ranker kept, showed, and saw clicked goes back to
`/v1/events`. At night `tfrs-pipeline log` writes what was served and done, and `tfrs-pipeline run`
trains on it beside the ten days before the first, starts warm from the version in service, passes
the gate and publishes. The server then loads the new version.

    as it is                    leaves out what was clicked, and what the user's last answer had
    served items may come again leaves out what was clicked alone
    without the correction      as it is, trained without log_q
    popularity alone            the most clicked items of the log, with the same items left out

The true click rate of a day is the mean, over all items shown, of the probability of a click. The
arms see the same users in the same order, and the same noise. Nobody tires of an item in this
world, so what leaving out costs shows, and what it is for does not.

    python benchmarks/loop.py --json benchmarks/results/loop.json
    python benchmarks/loop.py --arms "as it is" "popularity alone" --days 3
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import tfrs_pipeline  # noqa: F401 Before TensorFlow, since it selects Keras 2.

# isort: split
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from live import Client
from record import parser_with_json, write_json
from scipy.special import expit
from serving import served

from tfrs_pipeline.cli import commands
from tfrs_pipeline.service.publish import versions_of
from tfrs_pipeline.sources.simulated import FunnelOptions, Preferences, simulate_funnel

OPTIONS = FunnelOptions(num_retrieved=50, num_pre_ranked=30, num_ranked=20, num_exposed=10)
NUM_USERS, NUM_ITEMS, NUM_REQUESTS, NUM_FIRST_DAYS = 300, 1000, 300, 10
TOKEN = "0123456789abcdef"
EXCLUDING = ("--exclude-served-answers", "1")
# Arm -> more flags of `serve`, and of the first `run`, whose settings the later ones keep.
ARMS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "as it is": (EXCLUDING, ()),
    "served items may come again": ((), ()),
    "without the correction": (EXCLUDING, ("--model.correction", "none")),
}
POPULARITY = "popularity alone"


class Package:
    """The package's server, and its commands at night."""

    def __init__(self, folder: Path, first: pa.Table, serve: Sequence[str], run: Sequence[str]):
        self.folder, self.model = folder, folder / "models" / "loop"
        (folder / "logs").mkdir(parents=True)
        (folder / "token").write_text(TOKEN)
        pq.write_table(first, folder / "logs" / "first.parquet")
        # Once, on all but the newest tenth: training again on all would take half of a night.
        once = ("--no-training.refit", "--preset", "quick", "--evaluation.baselines", "none")
        self._run(0, *once, *run)
        self._stack, token = contextlib.ExitStack(), str(folder / "token")
        flags = ("--poll-seconds", "0.3", "--no-page", "--record-share", "1", "--token-file", token)
        self._port, _ = self._stack.enter_context(served(self.model, *flags, *serve))
        self.close = self._stack.close

    def _run(self, day: int, *flags: str) -> int:
        settings = ["--data.path", self.folder / "logs", "--run-dir", self.folder / f"run {day}"]
        settings += ["--export.directory", self.model.parent, "--export.name", self.model.name]
        settings += ["--split.validation", 0.05, "--split.test", 0.05, "--export.keep_versions", 2]
        return self._do("run", *map(str, settings), *flags)

    def _do(self, *arguments: str) -> int:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            code = commands.main(arguments)
        assert code in (0, commands.NOT_PUBLISHED), arguments
        return code

    def _client(self) -> Client:
        # A new one each time: the server closes connections that are idle during a night.
        return Client(self._port, self.model.name, TOKEN)

    def answer(self, user: int, request_id: str) -> list[int]:
        """Returns the best items for a user."""
        items = self._client().ask(user, OPTIONS.num_retrieved, **{"X-Request-ID": request_id})
        return [item for item in items if item != -1]

    def tell(self, events: list[dict[str, Any]]) -> None:
        """Takes what became of an answer."""
        self._client().post("/v1/events", {"events": events})

    def night(self, day: int) -> bool:
        """Learns from all days until now; returns whether that changes the answers."""
        time.sleep(1.5)  # Until the last answers are on disk.
        self._do("log", str(self.model), "--out", str(self.folder / "logs" / "live.parquet"))
        code = self._run(day, "--warm-start", str(self.model), "--export.gate")
        while self._client().version() != versions_of(self.model)[-1]:
            time.sleep(0.2)
        return code == 0


class Popularity:
    """The most clicked items, without those that the user clicked or was served last."""

    def __init__(self, first: pa.Table) -> None:
        self._clicks, self._last = Counter[int](), dict[int, list[int]]()
        self._clicked: dict[int, set[int]] = defaultdict(set)
        rows = first.filter(pc.equal(first["stage"], "clicked")).to_pylist()
        self.tell([row | {"type": "click"} for row in rows])
        self.night(0)

    def answer(self, user: int, request_id: str) -> list[int]:
        """Returns the best items for a user."""
        left_out = {*self._clicked[user], *self._last.get(user, ())}
        best = (item for item in self._best if item not in left_out)
        self._last[user] = [*itertools.islice(best, OPTIONS.num_retrieved)]
        return self._last[user]

    def tell(self, events: list[dict[str, Any]]) -> None:
        """Takes what became of an answer."""
        for event in events:
            if event["type"] == "click":
                self._clicks[event["item_id"]] += 1
                self._clicked[event["user_id"]].add(event["item_id"])

    def night(self, day: int) -> bool:
        """Counts all clicks until now."""
        self._best = [item for item, _ in self._clicks.most_common()]
        return True

    def close(self) -> None:
        """Has started nothing."""


def show(
    preferences: Preferences, user: int, items: Sequence[int], rng: np.random.Generator
) -> tuple[dict[int, str], np.ndarray]:
    """Ranks an answer as the simulated funnel does, shows its best and lets the user click.

    Returns the type of event of each item that pre-rank kept, and [num_exposed] probabilities of a
    click.
    """
    taste = preferences.tastes(np.array([user - 1]), np.zeros(1, int))
    noise = rng.standard_normal((2, OPTIONS.num_retrieved))[:, : len(items)]
    truth = preferences.logits(taste, np.array([items]) - 1)[0]
    kept = np.argsort(-(truth + OPTIONS.pre_rank_noise * noise[0]))[: OPTIONS.num_pre_ranked]
    order = kept[np.argsort(-(truth + OPTIONS.rank_noise * noise[1])[kept])]
    shown = order[: OPTIONS.num_exposed]
    rates = expit(truth[shown]) * (1.0 + np.arange(len(shown))) ** -OPTIONS.position_bias
    is_clicked = rng.random(OPTIONS.num_exposed)[: len(shown)] < rates
    types = ["click" if clicked else "view" for clicked in is_clicked]
    types += ["ranked"] * (OPTIONS.num_ranked - len(types)) + ["pre_ranked"] * len(order)
    return dict(zip(np.array(items)[order].tolist(), types, strict=False)), rates


def live(name: str, options: Any, folder: Path) -> Iterator[dict[str, Any]]:
    """Lets an arm live through the days; yields a row for each."""
    sizes = {"num_users": NUM_USERS, "num_items": NUM_ITEMS}
    simulation = simulate_funnel(
        **sizes, num_requests=NUM_FIRST_DAYS * NUM_REQUESTS, seed=options.seed, options=OPTIONS
    )
    names = ("user_id", "item_id", "stage", "timestamp", "request_id", "rank")
    first = simulation.log.events.order_by("event_number").select(*names).to_pyarrow()
    # The first days end a minute ago.
    past = datetime.now(UTC) - timedelta(minutes=1) - pc.max(first["timestamp"]).as_py()
    first = first.set_column(3, "timestamp", pc.add(first["timestamp"], past))
    first = first.set_column(4, "request_id", first["request_id"].cast(pa.string()))
    first = first.set_column(5, "rank", first["rank"].cast(pa.int32()))
    service = Popularity(first) if name == POPULARITY else Package(folder, first, *ARMS[name])
    with contextlib.closing(service):
        for day in range(1, options.days + 1):
            rng, rates, num_clicks = np.random.default_rng([options.seed, day]), [], 0
            for number, user in enumerate(rng.integers(1, NUM_USERS + 1, NUM_REQUESTS).tolist()):
                about = {"user_id": user, "request_id": f"{day}-{number}"}
                types, shown = show(
                    simulation.preferences, user, service.answer(user, about["request_id"]), rng
                )
                service.tell([{**about, "item_id": id_, "type": x} for id_, x in types.items()])
                num_clicks += Counter(types.values())["click"]
                rates.append(float(shown.mean()))
            row = {"arm": name, "day": day, "click_rate": float(np.mean(rates))}
            row |= {"num_clicks": num_clicks, "is_published": service.night(day)}
            print(*row.values(), f"{time.process_time():.0f} s", flush=True)
            yield row


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("--arms", nargs="+", default=[*ARMS, POPULARITY], metavar="ARM")
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options, days = parser.parse_args(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        arms = [live(name, options, Path(folder) / name) for name in options.arms]
        for rows in zip(*arms, strict=True):
            days += rows
            if options.json:  # Each day, since all of them take an hour.
                write_json(options.json, {"days": days}, seed=options.seed)


if __name__ == "__main__":
    main()
