"""MovieLens-100K: all routes give equal tables, and only known files are taken. No network."""

import errno
import hashlib
import logging
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import DataError
from tfrs_pipeline.sources.movielens import FetchError, load_movielens_100k, unpack_wheel

RATINGS = ["8\t267\t4\t881250949", "7\t2\t3\t891717742"]
RATINGS += ["7\t1412\t5\t881250949", "7\t3\t1\t881250948"]
GENRES = (
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy "
    "Film-Noir Horror Musical Mystery Romance Sci-Fi Thriller War Western"
)
# id, title as GroupLens writes it, recbole's title and year, genres
FILMS = [
    (267, "unknown", "unkonwn\tunkonwn", ["unknown"]),
    (2, "Cérémonie, La (1995)", "Cérémonie, La\t1995", ["Crime", "Drama"]),
    (1412, "Land III: The Giving (1995) (V)", "Land III: The Giving (1995)\tV", ["Animation"]),
    (3, "Shadow  and Light (1996) ", "Shadow and Light\t1996", ["Film-Noir"]),
]
USERS = ["8|17|M|student|10003", "7|56|F|none|T8H1N", "9||F|none|T8H1N"]


def write_grouplens(folder: Path) -> None:
    (folder / "u.data").write_text("\n".join(RATINGS) + "\n")
    lines = []
    for number, title, _, genres in FILMS:
        flags = ["1" if name in genres else "0" for name in GENRES.split()]
        lines.append("|".join([str(number), title, "01-Jan-1995", "", "http://x", *flags]))
    (folder / "u.item").write_text("\n".join(lines) + "\n", encoding="latin-1")
    (folder / "u.user").write_text("\n".join(USERS) + "\n")


def write_recbole(folder: Path) -> None:
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (folder / "ml-100k.inter").write_text("\n".join([header, *RATINGS]) + "\n")
    lines = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    lines += [f"{number}\t{title}\t{' '.join(genres)}" for number, _, title, genres in FILMS]
    (folder / "ml-100k.item").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = ["user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"]
    lines += [user.replace("|", "\t") for user in USERS]
    (folder / "ml-100k.user").write_text("\n".join(lines) + "\n")


def rows(tables: Log) -> list[list[dict[str, object]]]:
    events, items = tables.events.order_by("event_number"), tables.items.order_by("item_id")
    ordered = events, items.drop("_listed"), tables.users.order_by("user_id")
    return [table.to_pyarrow().to_pylist() for table in ordered]


def test_tables_of_the_original_files(tmp_path: Path) -> None:
    write_grouplens(tmp_path)
    events, items, users = rows(load_movielens_100k(tmp_path))
    assert [event["stage"] for event in events] == ["clicked", "exposed", "clicked", "exposed"]
    moment = datetime(1997, 12, 4, 15, 55, 49, tzinfo=UTC)
    assert [*events[0].values()] == [8, 267, moment, 0, "clicked"]
    assert items == [
        {"item_id": 2, "title": "Cérémonie, La", "year": "1995", "genres": ["Crime", "Drama"]},
        {"item_id": 3, "title": "Shadow and Light", "year": "1996", "genres": ["Film-Noir"]},
        {"item_id": 267, "title": "unknown", "year": None, "genres": []},
        {"item_id": 1412, "title": "Land III: The Giving", "year": "1995", "genres": ["Animation"]},
    ]
    assert users == [
        {"user_id": 7, "age_group": "56 and over", "gender": "F", "occupation": "none"},
        {"user_id": 8, "age_group": "under 18", "gender": "M", "occupation": "student"},
        {"user_id": 9, "age_group": None, "gender": "F", "occupation": "none"},
    ]


def test_all_routes_give_equal_tables(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    write_grouplens(tmp_path / "own")
    own = load_movielens_100k(tmp_path / "own")
    archive = load_movielens_100k(cache_dir=tmp_path / "a", fetchers={"archive": write_grouplens})
    wheel = load_movielens_100k(cache_dir=tmp_path / "b", fetchers={"wheel": write_recbole})
    assert rows(own) == rows(archive) == rows(wheel)
    assert own.events.schema() == wheel.events.schema()
    assert own.items.schema() == wheel.items.schema()
    assert own.item_features == wheel.item_features


def closed(folder: Path) -> None:
    (folder / "half").write_text("a broken download")
    raise FetchError("the host is not known")


def test_routes_are_tried_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tfrs_pipeline"):
        load_movielens_100k(cache_dir=tmp_path, fetchers={"A": closed, "B b": write_recbole})
    assert "A: the host is not known" in caplog.text
    assert "research use" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["movielens-100k-b-b"]

    def never(folder: Path) -> None:
        raise AssertionError("what is cached is not fetched")

    again = load_movielens_100k(cache_dir=tmp_path, fetchers={"A": never, "B b": never})
    assert again.events.count().to_pyarrow().as_py() == len(RATINGS)


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        load_movielens_100k(cache_dir=tmp_path, fetchers={"A": write_recbole})


def test_when_all_routes_are_closed_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"A: the host.*; B: the host .*Download ml-100k\.zip"):
        load_movielens_100k(cache_dir=tmp_path, fetchers={"A": closed, "B": closed})
    assert not list(tmp_path.iterdir())


def test_the_wheel_is_opened_only_for_known_files(tmp_path: Path) -> None:
    wheel, files = tmp_path / "recbole-1.whl", tmp_path / "files"
    files.mkdir()
    with zipfile.ZipFile(wheel, "w") as opened:
        opened.writestr("recbole/dataset_example/ml-100k/ml-100k.inter", "some ratings")
        opened.writestr("recbole/__init__.py", "raise SystemExit")
    unpack_wheel(wheel, files, {"ml-100k.inter": hashlib.sha256(b"some ratings").hexdigest()})
    assert [path.name for path in files.iterdir()] == ["ml-100k.inter"]
    assert (files / "ml-100k.inter").read_text() == "some ratings"
    with pytest.raises(FetchError, match="not the known file"):
        unpack_wheel(wheel, files, {"ml-100k.inter": "0" * 64})
    with pytest.raises(FetchError, match=r"holds no .*ml-100k\.item"):
        unpack_wheel(wheel, files, {"ml-100k.item": "0" * 64})


def test_a_folder_without_the_files_or_with_broken_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"u\.data does not exist"):
        load_movielens_100k(tmp_path)
    write_grouplens(tmp_path)
    (tmp_path / "u.data").write_text("1\t2\t3\t4\n1 2 3\n")
    with pytest.raises(DataError, match=r"u\.data: .*Expected 4 columns, got 1"):
        load_movielens_100k(tmp_path)
