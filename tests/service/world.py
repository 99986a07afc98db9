"""What a service should answer, in dictionaries and loops: the second route of `test_machine`.

It knows the rules of the guides and nothing of how the package stores or searches.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

from tfrs_pipeline.records.user_events import TYPES

HOUR = 3_600_000  # Times are in milliseconds.
KNOWN = {"none": (), "clicked": ("clicked",), "seen": ("clicked", "exposed", "disliked")}
SEEN_BY_USERS = "clicked", "exposed", "disliked"
Genres = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Version:
    """A version: its items when they were read, and the users of its training, oldest first."""

    items: Mapping[int, Genres]
    histories: Mapping[int, list[int]]
    known: Mapping[int, list[int]]
    disliked: Mapping[int, list[int]]
    rule: str
    is_exact: bool
    repeat: tuple[float, float] | None = None  # Weight and power.
    read: int = 0
    until: int = 0


class Event(NamedTuple):
    user: int
    stage: str
    time: int
    item: int
    id: str | None


class Served(NamedTuple):
    user: int
    time: int
    items: list[int]


@dataclasses.dataclass
class Write:
    """The last live write of an item; its genres are None if it was removed."""

    time: int
    genres: Genres | None
    was_listed: bool


@dataclasses.dataclass
class File:
    """What the file of events holds, in the order of arrival."""

    events: list[Event] = dataclasses.field(default_factory=list)
    served: list[Served] = dataclasses.field(default_factory=list)

    def record(self, events: list[Event]) -> int:
        before = len(self.events)
        for event in events:
            is_there = any(event[:4] == other[:4] for other in self.events)
            if not is_there and event.id not in {other.id for other in self.events} - {None}:
                self.events.append(event)
        return len(self.events) - before

    def forget(self, user: int) -> int:
        events = [event for event in self.events if event.user != user]
        served = [answer for answer in self.served if answer.user != user]
        num = len(self.events) + len(self.served) - len(events) - len(served)
        self.events, self.served = events, served
        return num


class User(NamedTuple):
    """A user until now: clicks oldest first, and what an answer leaves out, by rule."""

    history: list[int]
    disliked: set[int]
    left_out: set[int]
    is_known: bool


class World:
    """The versions on disk, the live writes, the file of events, and the clock.

    `file` is None while the file of events is damaged; `whole` then holds what it will be again.
    """

    def __init__(self, now: int) -> None:
        self.now = now
        self.versions: dict[int, Version] = {}
        self.live: dict[int, Write] = {}
        self.file: File | None = File()
        self.waiting: list[Served] = []  # Not yet in the file.

    @property
    def version(self) -> Version:
        return self.versions[max(self.versions)]

    def load(self) -> None:
        """Notes that a process has loaded the newest version, and all live writes."""
        for id_, write in self.live.items():
            write.was_listed |= id_ in self.version.items

    def wanted(self) -> Iterator[tuple[int, Write]]:
        """Yields the live writes that count: later ones, and those of items no version had."""
        for id_, write in self.live.items():
            if write.time >= self.version.read or not write.was_listed:
                yield id_, write

    def candidates(self) -> dict[int, Genres]:
        items = dict(self.version.items)
        for id_, write in self.wanted():
            items.pop(id_, None)
            if write.genres is not None:
                items[id_] = write.genres
        return items

    def write(self, items: Mapping[int, Genres | None]) -> tuple[int, int]:
        """Writes live items, and removes those without genres; returns how many change."""
        before = self.candidates()
        for id_, genres in items.items():
            time = max(self.now, self.version.read)
            self.live[id_] = Write(time, genres, id_ in self.version.items)
        num_new = sum(genres is not None and id_ not in before for id_, genres in items.items())
        return num_new, sum(genres is None and id_ in before for id_, genres in items.items())

    def flush(self) -> None:
        """Writes the answers that wait; they are lost if the file is damaged."""
        if self.file is not None:
            self.file.served += self.waiting
        self.waiting = []

    def user(self, id_: int) -> User:
        version, events = self.version, [] if self.file is None else self.file.events
        mine = [event for event in events if event.user == id_ and event.stage in SEEN_BY_USERS]
        disliked = {*version.disliked.get(id_, ())}
        disliked |= {event.item for event in mine if event.stage == "disliked"}
        clicks = [event for event in mine if event.stage == "clicked"]
        later = [event for event in clicks if event.time > version.until]
        later.sort(key=lambda event: event.time)  # Stable: by arrival at one time.
        history = [*version.histories.get(id_, ()), *(event.item for event in later)]
        known = {*version.known.get(id_, ())} if version.rule != "none" else set[int]()
        known |= {event.item for event in mine if event.stage in KNOWN[version.rule]}
        kept = [item for item in history if item not in disliked]
        return User(kept, disliked, known | disliked, id_ in version.histories or bool(mine))

    def served_lately(self, user: int, answers: int, hours: float) -> set[int]:
        """Returns what a user was served lately: three quarters of the candidates at most."""
        written = [] if self.file is None else self.file.served
        ids: list[int] = []
        mine = [answer for answer in [*written, *self.waiting] if answer.user == user]
        since = self.now - hours * HOUR if hours else float("inf")
        for num, answer in enumerate(reversed(mine)):
            if num >= answers and answer.time <= since:
                break
            ids += answer.items[:100]
        return {*[*dict.fromkeys(ids)][: len(self.candidates()) * 3 // 4]}

    def scores(
        self, product: Callable[[int, Genres], float], history: list[int], trained: Collection[int]
    ) -> dict[int, float]:
        """Scores all candidates for a history, given their products with its vector."""
        scores = {id_: product(id_, genres) for id_, genres in self.candidates().items()}
        if self.version.repeat is not None:
            weight, power = self.version.repeat
            for id_, count in Counter(filter(trained.__contains__, history)).items():
                if id_ in scores:
                    scores[id_] += weight * count**power
        return scores


def stage_of(type_: str) -> str:
    return str(TYPES[type_])
