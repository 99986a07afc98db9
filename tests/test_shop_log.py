"""The generated shop is the shop that its users rely on."""

import csv
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
