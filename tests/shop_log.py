"""A generated shop: events and items as two CSV files, the same bytes for a seed.

Each customer likes a few categories, for years. A visit is about one of them, sometimes two, and
within a category about one style. So the last items of a history tell what this visit is about, and
all of them together tell what the next visits may be about: a model that reads the history as of
each request has more to go by than one that ranks once for all that a customer will still do.
"""

import csv
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

START = datetime(2024, 3, 1, tzinfo=UTC)
EVENT_COLUMNS = ("customer_id", "sku", "event_type", "session_id", "event_time", "price")
_AREAS = ("Sport", "Garden", "Kitchen", "Home", "Toys", "Office")
_KINDS = ("Yoga", "Tools", "Storage", "Lamps", "Books", "Textiles", "Gifts", "Outdoor")
_BRANDS = ("Arven", "Bolt", "Cimo", "Dorn", "Elva", "Fjord", "Gale", "Hano", "Ilmo", "Juna")
_NUM_STYLES = 5  # Styles of a category, such as the sizes and materials that go together.
_CARTED, _BOUGHT, _REMOVED = 0.35, 0.5, 0.15  # Shares of what was viewed, carted and carted.
_VIEWED_AGAIN = 0.12


def write_shop(
    folder: Path | str,
    *,
    num_events: int = 40_000,
    num_users: int = 2_332,
    num_items: int = 1_500,
    num_days: int = 60,
    seed: int = 0,
    until_day: int | None = None,
) -> None:
    """Writes events.csv (ordered by time) and items.csv into a folder.

    `until_day` leaves out the events from that day on (the first day is 0), as a log that is not
    there yet: the files for 58, 59 and 60 are those of three nights, each the start of the next.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    items = _Items(rng, num_items)
    events = _events(rng, items, num_events, num_users, num_days)
    end = START + timedelta(days=num_days if until_day is None else until_day)
    written = [row for row in events if row["event_time"] < end]
    for row in written:
        row["event_time"] = row["event_time"].isoformat().replace("+00:00", "Z")
    _write(folder / "events.csv", written)
    _write(folder / "items.csv", items.rows)


class _Items:
    """The items: their rows, and of each category and style its items with their appeal."""

    def __init__(self, rng: np.random.Generator, num_items: int) -> None:
        categories = [f"{area}|{kind}" for area in _AREAS for kind in _KINDS]
        # A catalogue has more of some categories than of others.
        shares = rng.dirichlet(np.full(len(categories), 4.0))
        self.category = rng.choice(len(categories), num_items, p=shares)
        self.style = rng.integers(0, _NUM_STYLES, num_items)
        self.appeal = rng.permutation((1 + np.arange(num_items)) ** -0.6)
        price = np.exp(rng.normal(3, 0.8, num_items)).round(2)
        brand = (self.category + 3 * self.style + rng.integers(0, 2, num_items)) % len(_BRANDS)
        numbers = rng.choice(np.arange(1, 99_999), num_items, replace=False)
        self.rows: list[dict[str, Any]] = [
            {
                "sku": f"{numbers[item]:07d}",
                "title": f"{_BRANDS[brand[item]]} {categories[self.category[item]]} {item}",
                "brand": _BRANDS[brand[item]],
                "category_path": categories[self.category[item]],
                "price": f"{price[item]:.2f}",
            }
            for item in range(num_items)
        ]
        self.num_categories = len(categories)
        self.members = [np.flatnonzero(self.category == c) for c in range(self.num_categories)]

    def draw(self, rng: np.random.Generator, category: int, style: int, num: int) -> list[int]:
        """Draws different items of a category, most of them of one style."""
        members = self.members[category]
        shares = self.appeal[members] * np.where(self.style[members] == style, 12, 1)
        num = min(num, len(members))
        drawn: list[int] = rng.choice(members, num, replace=False, p=shares / shares.sum()).tolist()
        return drawn


def _events(
    rng: np.random.Generator, items: _Items, num_events: int, num_users: int, num_days: int
) -> list[dict[str, Any]]:
    """Returns the first `num_events` events of enough visits, in order of time."""
    activity = rng.lognormal(0, 0.9, num_users)
    liked = [
        rng.choice(items.num_categories, size=int(rng.integers(3, 7)), replace=False)
        for _ in range(num_users)
    ]
    styles = rng.integers(0, _NUM_STYLES, (num_users, items.num_categories))
    events: list[dict[str, Any]] = []
    once = rng.permutation(num_users).tolist()  # Every customer comes at least once.
    while len(events) < num_events:
        user = once.pop() if once else int(rng.choice(num_users, p=activity / activity.sum()))
        # Evenings are busy.
        seconds = int(rng.integers(0, num_days)) * 86_400 + int(rng.beta(5, 3) * 86_399)
        events += _visit(rng, items, user, liked[user], styles[user], seconds)
    events = events[:num_events]
    # Only now, so that numbers of visits rise with time and never restart.
    events.sort(key=lambda row: (row["event_time"], row["customer_id"], row["sku"]))
    numbers: dict[int, int] = {}
    for row in events:
        row["session_id"] = numbers.setdefault(row["session_id"], 100_000 + len(numbers))
    last = START + timedelta(days=num_days)
    return [row for row in events if row["event_time"] < last]


def _visit(
    rng: np.random.Generator,
    items: _Items,
    user: int,
    liked: np.ndarray,
    styles: np.ndarray,
    seconds: int,
) -> list[dict[str, Any]]:
    """Returns the events of one visit: views, some followed by a cart and a purchase."""
    num_views = int(rng.geometric(0.3))
    topics = rng.choice(liked, size=2 if rng.random() < 0.2 else 1, replace=False).tolist()
    rows = []
    time, session = float(seconds), int(rng.integers(1 << 60))

    def add(item: int, kind: str, at: float) -> None:
        row = items.rows[item]
        rows.append(
            {
                "customer_id": f"C{user + 1:05d}",
                "sku": row["sku"],
                "event_type": kind,
                "session_id": session,
                "event_time": START + timedelta(seconds=int(at)),
                "price": row["price"],
            }
        )

    viewed = [
        item
        for topic in topics
        for item in items.draw(rng, topic, int(styles[topic]), max(1, num_views // len(topics)))
    ]
    for item in viewed:
        time += 20 + rng.exponential(60)
        add(item, "view", time)
        if rng.random() < _VIEWED_AGAIN:
            add(item, "view", time + 10 + rng.exponential(120))
        if rng.random() < _CARTED:
            in_cart = time + 10 + rng.exponential(40)
            add(item, "cart", in_cart)
            draw = rng.random()
            if draw < _BOUGHT:
                add(item, "purchase", in_cart + 60 + rng.exponential(200))
            elif draw < _BOUGHT + _REMOVED:
                add(item, "remove_from_cart", in_cart + 30 + rng.exponential(100))
    return rows


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
