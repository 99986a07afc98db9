"""The generated shop is the shop that its users rely on."""

import csv
import itertools
from collections import Counter, defaultdict
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.shop_log import write_shop

FILES = ("events.csv", "items.csv", "customers.csv")


@pytest.fixture(scope="module")
def shop(module_path: Path) -> Path:
    write_shop(module_path)
    return module_path


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def moment(row: dict[str, str]) -> datetime:
    return datetime.fromisoformat(row["event_time"])


def test_a_seed_gives_the_same_bytes(tmp_path: Path, shop: Path) -> None:
    write_shop(tmp_path / "again")
    write_shop(tmp_path / "other", seed=1)
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (shop / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (shop / name).read_bytes()


def test_a_log_up_to_a_day_is_the_start_of_the_whole(tmp_path: Path, shop: Path) -> None:
    whole, sizes = (shop / "events.csv").read_bytes(), []
    for day in (58, 59, 60):
        write_shop(tmp_path, until_day=day)
        start = (tmp_path / "events.csv").read_bytes()
        assert whole.startswith(start)
        assert max(map(moment, rows(tmp_path / "events.csv"))).date().isoformat() == (
            datetime(2024, 3, 1) + timedelta(days=day - 1)
        ).strftime("%Y-%m-%d")
        sizes.append(len(start))
    assert sizes[0] < sizes[1] < sizes[2] == len(whole)


def test_the_sizes_are_those_asked_for(shop: Path) -> None:
    events = rows(shop / "events.csv")
    assert 39_900 <= len(events) <= 40_000  # A visit that outlasts the last day is cut.
    assert len({row["customer_id"] for row in events}) == len(rows(shop / "customers.csv")) == 2_332
    assert len(rows(shop / "items.csv")) == 1_500
    assert {row["sku"] for row in events} <= {row["sku"] for row in rows(shop / "items.csv")}
    assert all(row["sku"].startswith("0") for row in rows(shop / "items.csv"))


def test_visits_are_short_numbered_once_and_repeat_their_items(shop: Path) -> None:
    visits = defaultdict(list)
    for row in rows(shop / "events.csv"):
        visits[row["session_id"]].append(row)
    pairs = Counter[tuple[str, str]]()
    for visit in visits.values():
        assert len({row["customer_id"] for row in visit}) == 1
        times = [moment(row) for row in visit]
        assert times == sorted(times)
        gaps = [after - before for before, after in itertools.pairwise(times)]
        assert max(gaps, default=timedelta()) < timedelta(hours=1)
        pairs.update((row["session_id"], row["sku"]) for row in visit)
        for row in visit:
            if row["event_type"] in ("purchase", "remove_from_cart"):  # Only what is in the cart.
                earlier = [
                    each["event_type"]
                    for each in visit
                    if each["sku"] == row["sku"] and moment(each) < moment(row)
                ]
                assert {"view", "cart"} <= {*earlier}
    repeats = sum(num - 1 for num in pairs.values()) / pairs.total()
    assert 0.35 < repeats < 0.45
    assert [int(visit) for visit in visits] == sorted(int(visit) for visit in visits)
