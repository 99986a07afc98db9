"""Dislikes in the samples and in batches, counted again in plain Python."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.small_batches import as_arrays
from tfrs_pipeline import HybridBatches, InBatch, Log, Reading, SinglePositives, Uniform
from tfrs_pipeline.negatives.samplers import Pool
from tfrs_pipeline.samples.build import build_samples
from tfrs_pipeline.samples.store import Samples, read_samples

NUM_USERS, NUM_ITEMS, BATCH_SIZE, NUM_UNIFORM = 40, 30, 32, 24
KINDS = {"click": 1.0, "view": "exposed", "report": "disliked"}
Event = tuple[int, int, str]  # User, item, type; in the order of time.


@dataclass(frozen=True)
class Disliked:
    """Each user's own dislikes as hard negatives, as a user of the package would write them."""

    lists: list[list[int]]  # Candidate rows, by query row.
    share: float = 0.2
    num: int = 2
    allow_exposed: bool = True

    def pools(self, samples: Samples) -> Mapping[str, Pool]:
        return {"exposed": (self.lists, samples.query_rows)}


def random_events(num: int = 1200) -> list[Event]:
    """Draws events; a user reports items never seen, seen before, clicked before or clicked later.

    Row r of a user or an item is its id, because each occurs.
    """
    rng = np.random.default_rng(5)
    users = np.append(np.arange(NUM_USERS), rng.integers(0, NUM_USERS, num)) + 1
    items = np.append(np.arange(NUM_USERS) % NUM_ITEMS, rng.integers(0, NUM_ITEMS, num)) + 1
    kinds = ["click"] * NUM_USERS + rng.choice([*KINDS], num, p=[0.5, 0.35, 0.15]).tolist()
    return [*zip(users.tolist(), items.tolist(), kinds, strict=True)]


def log_of(events: list[Event], part: list[str] | None = None) -> Log:
    frame = pd.DataFrame(events, columns=["user_id", "item_id", "event"])
    # An hour apart, so that no two are of one visit.
    frame["timestamp"] = 1_700_000_000 + 3600 * np.arange(len(frame))
    frame = frame if part is None else frame.assign(part=part)
    return Log.from_table(frame, reading=Reading(event_weights=KINDS))


def sets_of(pairs: Any) -> list[list[int]]:
    """Lists the distinct items of each user from 0, ascending."""
    return [sorted({item for user, item in pairs if user == row}) for row in range(NUM_USERS + 1)]


def test_positives_masks_and_log_q_are_those_of_a_loop(tmp_path: Path) -> None:
    events = random_events()
    log = log_of(events)
    report = build_samples(log, tmp_path, seed=0)
    samples = read_samples(tmp_path)
    gone = {(user, item) for user, item, kind in events if kind == "report"}
    clicks = [(user, item) for user, item, kind in events if kind == "click"]
    positives = [pair for pair in clicks if pair not in gone]
    shown = {(user, item) for user, item, kind in events if kind == "view"}
    known, disliked = sets_of(positives), sets_of(gone)
    exposed = sets_of((shown | gone) - {*positives})
    for lists, expected in (
        (samples.known_positives, known),
        (samples.exposed, exposed),
    ):
        assert [rows.tolist() for rows in lists] == expected
    found = zip(samples.query_rows.tolist(), samples.candidate_rows.tolist(), strict=True)
    assert sorted(found) == sorted(positives)
    # A disliked item is in no history either, however long before the dislike it was clicked.
    of_user: dict[int, list[int]] = defaultdict(list)
    for user, item in positives:
        of_user[user].append(item)
    assert [rows.tolist() for rows in samples.sequences] == [of_user[u] for u in range(41)]
    counts = Counter(item for _, item in positives)
    assert samples.counts.tolist() == [counts[item] for item in range(NUM_ITEMS + 1)]
    assert report["num_disliked"] == len(gone) > 100
    assert report["num_disliked_clicks"] == len(clicks) - len(positives) > 50
    told = f"{len(gone)} pairs of a user and an item that the user disliked: never shown to them"
    lost = f"; the positives lack {len(clicks) - len(positives)} clicks on them"
    assert f"{told}{lost}" in log.describe()
    kept = log_of([event for event in events if event[2] != "click" or event[:2] not in gone])
    assert told in kept.describe()  # No click is lost, so nothing is said of any.

    examples = SinglePositives(samples, batch_size=BATCH_SIZE, history_length=4, seed=0)
    kinds, hard = [InBatch(), Uniform(NUM_UNIFORM)], Disliked(disliked)
    batches = HybridBatches(samples, examples, kinds, hard=hard, seed=0)
    total, cases = len(positives), Counter[str]()
    for step in range(12):
        batch = as_arrays(batches.batch(step))
        rows = zip(batch.query_row.tolist(), batch.candidate_row.tolist(), strict=True)
        for i, (user, positive) in enumerate(rows):
            f = hard.share if disliked[user] else 0.0
            for j, item in enumerate(batch.shared_row.tolist()):
                never = item == positive or item in known[user] or item in exposed[user]
                assert batch.is_counted[i, j] == (not never)
                cases["disliked column"] += item in disliked[user]
                num = (BATCH_SIZE - 1) * counts[item] / total + NUM_UNIFORM / NUM_ITEMS
                assert batch.log_q[i, j] == pytest.approx(math.log(num / (1 - f)), abs=1e-5)
            drawn = batch.hard.candidate_row[i].tolist()
            assert batch.hard.is_counted[i].tolist() == [f > 0] * hard.num
            assert batch.hard.share[i] == pytest.approx(f)
            if f:
                assert {*drawn} <= {*disliked[user]}
                cases["seen before the report"] += any((user, item) in shown for item in drawn)
                log_q = math.log(hard.num / (NUM_ITEMS * f))
                assert batch.hard.log_q[i] == pytest.approx(log_q, abs=1e-5)
    assert min(cases.values()) > 100


def test_a_part_knows_no_later_dislike(tmp_path: Path) -> None:
    """A report of the test part leaves the click before it a positive of the training."""
    events = [(1, 1, "click"), (1, 2, "click"), (2, 1, "click"), (1, 3, "click"), (2, 2, "click")]
    events += [(1, 1, "report"), (1, 4, "click"), (2, 3, "click")]
    events += [(2, 3, "report"), (2, 4, "click"), (1, 1, "click"), (1, 3, "click")]
    parts = ["train"] * 3 + ["validation"] * 2 + ["test"] * 7
    split = log_of(events, parts).split("column")
    assert build_samples(split.train, tmp_path, seed=0)["num_samples"] == 3
    assert split.train.disliked is None
    assert build_samples(split.log, tmp_path, seed=0)["num_disliked"] == 2
    # The test has nothing to find of what was disliked in it, and ranks it until then.
    assert [ids.tolist() for ids in split.test.relevant] == [[3, 4], [4]]
    assert [ids.tolist() for ids in split.test.histories] == [[1, 2, 3], [1, 2]]
    assert split.test.disliked is not None
    assert [ids.tolist() for ids in split.test.disliked] == [[], []]
    by_request = split.holdout("test", by="requests")
    excluded = by_request.excluded("none")
    assert excluded is not None
    rows = zip(
        by_request.user_ids, by_request.relevant, by_request.histories, excluded, strict=True
    )
    assert [(user, *(ids.tolist() for ids in lists)) for user, *lists in rows] == [
        (1, [4], [2, 3], [1]),
        (1, [3], [2, 3, 4], [1]),
        (2, [4], [1, 2], [3]),
    ]
