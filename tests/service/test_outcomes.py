"""Clicks on each version's answers: counts against a loop, intervals against a bootstrap."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.service.running_server import PREDICT, Running, retrieve_user, send, until
from tests.service.test_user_events import event
from tfrs_pipeline.answers.outcomes import outcomes
from tfrs_pipeline.records.journal import Journal
from tfrs_pipeline.records.user_events import Answer, Event


def traffic(num_users: int = 300) -> tuple[list[Answer], list[Event]]:
    """Makes answers of two versions, ids that come again, and clicks; 30 users see both."""
    rng = np.random.default_rng(7)
    answers, events = list[Answer](), list[Event]()
    for user in range(num_users):
        likes = rng.beta(2, 20)
        for visit in range(int(rng.integers(1, 9))):
            version = 7 if (user % 2 or user < 60) and (user >= 60 or visit % 2) else 6
            id_ = f"{user}-{visit // 2 if user % 5 == 0 else visit}"  # Some come again.
            items = rng.choice(100, 12, replace=False) + 1
            time = 1_000 * visit
            answers.append(Answer(id_, time, version, np.array([user]), items[None]))
            for n, item in enumerate(items.tolist()):
                kinds = [("clicked", likes / (1 + n / 5)), ("exposed", 0.2)]
                for kind, share in kinds:
                    for _ in range(int(rng.random() < share) * int(rng.integers(1, 3))):
                        moment = int(rng.integers(10**9))
                        events.append(Event(user, moment, item, kind, id_, None))
            events.append(Event(user, visit, 5, "clicked", None, None))
            events.append(Event(user, visit, 200, "clicked", id_, None))  # In no answer.
    return answers, events


def by_hand(answers: list[Answer], events: list[Event]) -> dict[int, Counter[Any]]:
    """Counts clicks by version, user and rank; the last answer of an id that has an item counts."""
    last: dict[Any, tuple[int, int]] = {}
    for answer in answers:
        (user,) = answer.user_ids.tolist()
        for rank, item in enumerate(answer.item_ids[0].tolist(), 1):
            last[user, answer.request_id, item] = answer.version, rank
    keys = {(e.user_id, e.request_id, e.item_id) for e in events if e.type == "clicked"}
    counts: dict[int, Counter[Any]] = {6: Counter(), 7: Counter()}
    for key in keys & last.keys():
        version, rank = last[key]
        counts[version][key[0], rank] += 1
    return counts


def test_counts_are_those_of_a_loop_and_intervals_those_of_a_bootstrap(films: Path) -> None:
    answers, events = traffic()
    Journal(films).write([events], answers)
    old, new = outcomes(films)
    counts, rates, users = by_hand(answers, events), [], list[Any]()
    for outcome in (old, new):
        expected, shown = Counter[int](), counts[outcome.version]
        for (_, rank), num in shown.items():
            expected[rank] += num
        assert outcome.ranks == expected
        version_answers = [answer for answer in answers if answer.version == outcome.version]
        assert outcome.num_answers == len(version_answers)
        assert outcome.num_users == len({answer.user_ids[0] for answer in version_answers})
        assert outcome.num_clicks == shown.total() > 100
        assert outcome.clicks.mean == pytest.approx(shown.total() / len(version_answers))
        num_answers = Counter(int(answer.user_ids[0]) for answer in version_answers)
        num_clicks = Counter[int]()
        for (user, _), num in shown.items():
            num_clicks[user] += num
        users.append((num_answers, num_clicks))
    assert old.gain is None
    assert new.gain is not None
    assert new.gain.mean == pytest.approx(new.clicks.mean - old.clicks.mean)
    # Users drawn with replacement, with all that they were served.
    rng, everyone = np.random.default_rng(0), sorted({*users[0][0], *users[1][0]})
    table = np.array([[[n[user] for user in everyone] for n in pair] for pair in users])
    draws = table[:, :, rng.integers(0, len(everyone), (2_000, len(everyone)))].sum(axis=-1)
    rates = draws[:, 1] / draws[:, 0]
    for interval, drawn in (
        (old.clicks, rates[0]),
        (new.clicks, rates[1]),
        (new.gain, rates[1] - rates[0]),
    ):
        # Of 2,000 draws, a standard deviation has a relative error of about 1.6%.
        assert (interval.high - interval.low) / (2 * 1.96) == pytest.approx(drawn.std(), rel=0.08)


def test_what_is_too_little_has_no_interval(films: Path) -> None:
    assert outcomes(films) == []
    Journal(films).write([], [Answer("a", 1, 3, np.array([1]), np.array([[5, 6]]))])
    (outcome,) = outcomes(films)
    assert (outcome.num_answers, outcome.num_clicks, outcome.clicks.mean) == (1, 0, 0)
    assert np.isnan(outcome.clicks.low)
    assert "0.0000 an answer" in str(outcome)


def test_a_line_says_how_many_clicks_are_at_which_ranks(films: Path) -> None:
    """Two users with an answer each, of which one clicks 5 of 20 items."""
    items = np.arange(1, 21)[None]
    answers = [Answer("a", 1, 3, np.array([user]), items) for user in (1, 2)]
    ranks = (1, 3, 4, 10, 11)
    clicks = [Event(1, 10 + rank, rank, "clicked", "a", None) for rank in ranks]
    Journal(films).write([clicks], answers)
    (outcome,) = outcomes(films)
    # Each user moves the mean by 1.25: half of the interval is 1.96 * sqrt(2 * 1.25**2 * 2 / 1).
    assert str(outcome) == (
        "version 3: 2 answers to 2 users, 5 clicks, 2.5000 [-2.4000, 7.4000] an answer; by rank "
        "1 at 1, 1 at 2 to 3, 2 at 4 to 10, 1 further"
    )


def test_the_command_prints_the_outcomes(films: Path, command: Any) -> None:
    shown = command("log", str(films)).out
    assert shown == "No answer is recorded yet: serve the model with --record-share.\n"
    answers, events = traffic()
    Journal(films).write([events], answers)
    printed = " ".join(command("log", str(films)).out.split())
    old, new = outcomes(films)
    assert printed == f"{old} {new}"
    assert re.search(
        r"; [+-]\d\.\d{4} \[[+-]\d\.\d{4}, [+-]\d\.\d{4}\] against the version before", printed
    )


def test_metrics_count_answers_and_clicks_by_version_and_rank(films: Path) -> None:
    def counts(running: Running) -> Counter[str]:
        text = running.get("/metrics").text
        pattern = (
            r'^(tfrs_(?:recorded_answers_total|click_rank_\w+)\{[^}]*version="1"[^}]*\}) (\S+)$'
        )
        return Counter({key: float(n) for key, n in re.findall(pattern, text, re.MULTILINE)})

    with Running(films, takes_writes=True, record_share=1) as running:
        before = counts(running)
        body = retrieve_user([102, -1], [[], []], 6)
        response = running.post(PREDICT, json=body, headers={"X-Request-ID": "mine"})
        items = response.json()["outputs"]["candidate_ids"][0]
        clicks = [
            event(102, items[1], request_id="mine.0", time=1_700_000_000),
            event(102, items[4], request_id="mine.0"),
            event(102, items[5], "view", request_id="mine.0"),
            event(102, items[0], request_id="another"),
            event(103, items[0], request_id="mine.0"),
            event(102, items[0], time=1_700_000_001),
        ]
        for _ in range(2):  # A repeat is none.
            assert send(running, {"events": clicks[:1]}).status_code == 200
        assert send(running, {"events": clicks[1:]}).json()["num_new"] == 5
        until(lambda: bool(counts(running) - before))
        change = counts(running) - before
    assert change['tfrs_recorded_answers_total{version="1"}'] == 1
    assert change['tfrs_click_rank_count{version="1"}'] == 2
    assert change['tfrs_click_rank_sum{version="1"}'] == 2 + 5
    assert change['tfrs_click_rank_bucket{le="3.0",version="1"}'] == 1
