"""Random dirty inputs whose right answer is known, and what a log makes of each.

A clean log is written down in Python values; then dirt is put into its cells, lines, bytes and
names, and what each piece of dirt does to the right answer is noted beside it: which rows cannot be
kept, which features are missing, or that nothing but a refusal is right. No code of the package
takes part in that.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import random
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.parquet as pq

from tests.small_log import arguments as log_arguments
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import DataError

START = datetime(2023, 1, 2, tzinfo=UTC)
UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000}
STAGES = ("retrieved", "pre_ranked", "ranked", "exposed", "clicked")
T = TypeVar("T")
LONG = "x" * 100_000 + "\x1b[2J"


@dataclass
class Table:
    """A table as it will be written: column -> cells, None where there is nothing."""

    name: str
    cells: dict[str, list[Any]]
    names: dict[str, str] = field(default_factory=dict)  # Log's name -> its name in the file.
    lines: dict[int, Callable[[bytes], bytes]] = field(default_factory=dict)  # Row -> its change.
    text: list[Callable[[bytes], bytes]] = field(default_factory=list)
    raw: list[Callable[[bytes], bytes]] = field(default_factory=list)
    more: dict[str, list[Any]] = field(default_factory=dict)  # Columns that nobody asks for.
    repeated: str = ""

    def __len__(self) -> int:
        return len(next(iter(self.cells.values())))

    def named(self) -> list[tuple[str, list[Any]]]:
        columns = [(self.names.get(name, name), cells) for name, cells in self.cells.items()]
        columns += list(self.more.items())
        return columns + ([(self.repeated, [1] * len(self))] if self.repeated else [])


@dataclass
class Case:
    """An input, the arguments that go with it, and the right answer.

    Attributes:
        truth: Of each row: user, item, seconds, stage and weight.
        is_lost: Of each row: whether it cannot be kept.
        features: Item id -> price, category and vector.
        must_refuse: Why nothing but a refusal is right; "" where there is a right answer.
        dirt: What was done.
        columns: Names, in the files, of the columns with dirt.
    """

    rng: random.Random
    form: str
    kind: str
    time: str
    events: Table
    items: Table | None
    truth: list[dict[str, Any]]
    is_lost: list[bool]
    features: dict[str, dict[str, Any]]
    options: dict[str, Any]
    must_refuse: str = ""
    dirt: list[str] = field(default_factory=list)
    columns: set[str] = field(default_factory=set)
    file_name: str = "events"
    decoys: list[str] = field(default_factory=list)
    num_files: int = 1
    is_empty: bool = False
    folder: str = ""

    @property
    def is_text(self) -> bool:
        return self.form in ("csv", "csv.gz")

    def rows(self, column: str, most: int = 3) -> list[int]:
        """Draws sound rows for dirt in a column, whose name a refusal must then give."""
        self.columns.add(self.events.names.get(column, column))
        sound = [row for row, is_lost in enumerate(self.is_lost) if not is_lost]
        return self.rng.sample(sound, self.rng.randint(1, most))

    def put(self, column: str, *values: Any) -> None:
        """Puts values into an event's column, so that their rows are lost."""
        for row in self.rows(column):
            self.events.cells[column][row] = self.rng.choice(values)
            self.is_lost[row] = True

    # The kinds of dirt: each changes the case, or raises before it has.

    def no_id(self) -> None:
        self.put(self.rng.choice(["user_id", "item_id"]), None)

    def a_word_for_no_id(self) -> None:
        column = self.rng.choice(["user_id", "item_id"])
        needs(self.is_text or not isinstance(self.truth[0][column], int))
        self.put(column, "nan", "None", "NaN", "<NA>", "null")

    def a_reserved_id(self) -> None:
        column = self.rng.choice(["user_id", "item_id"])
        is_number = isinstance(self.truth[0][column], int)
        needs(not (is_number and any(isinstance(c, str) for c in self.events.cells[column])))
        self.put(column, -1 if is_number else "")

    def ids_as_floats(self) -> None:
        column = self.rng.choice(["user_id", "item_id"])
        cells = self.events.cells[column]
        needs(column not in self.columns and all(isinstance(cell, int | None) for cell in cells))
        some = 0.2 if self.is_text and self.rng.random() < 0.5 else 1.0
        for row, cell in enumerate(cells):
            if cell is not None and self.rng.random() < some:
                cells[row] = float(cell)

    def item_ids_as_floats(self) -> None:
        items = needs(self.items)
        needs(isinstance(items.cells["item_id"][0], int))
        items.cells["item_id"] = [float(cell) for cell in items.cells["item_id"]]

    def white_space_around_ids(self) -> None:
        needs(self.is_text)
        for column in ("user_id", "item_id"):
            for row in self.rows(column):
                cell = self.events.cells[column][row]
                self.events.cells[column][row] = None if cell is None else f" {cell}\t"

    def leading_zeros(self) -> None:
        needs(self.is_text)
        for row in self.rows("user_id"):
            self.events.cells["user_id"][row] = self.truth[row]["user_id"] = "007"

    def ids_past_int64(self) -> None:
        needs(
            self.form == "parquet" and all(isinstance(c, int) for c in self.events.cells["user_id"])
        )
        needs(-1 not in self.events.cells["user_id"])
        for row in self.rows("user_id"):
            self.events.cells["user_id"][row] = self.truth[row]["user_id"] = 2**63 + row

    def an_implausible_time(self) -> None:
        if self.time in UNITS:
            values: list[Any] = [0, -5 * UNITS[self.time], 3 * 10**10 * UNITS[self.time]]
            values += ["inf", "nan", "1e300", "-inf"] if self.is_text else []
        elif self.time == "stamp":
            values = [datetime(1970, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)]
        elif self.time:
            end = "Z" if self.time == "zoned" else ""
            days = ["1970-01-01", "0001-01-01", "9999-12-31", "12023-01-01", "2262-04-12"]
            days.append("0044-03-15 (BC)")
            values = [f"{day} 00:00:00{end}" for day in days] + ["infinity", "-infinity"]
        else:
            raise NotHere
        self.put("timestamp", *values)

    def a_time_in_another_unit(self) -> None:
        needs(self.time in UNITS and "timestamp" not in self.columns)
        other = self.rng.choice([unit for unit in UNITS if unit != self.time])
        for row in self.rows("timestamp"):
            self.events.cells["timestamp"][row] = self.truth[row]["time"] * UNITS[other]
            self.is_lost[row] = True
        self.must_refuse = "units"

    def a_wrong_unit(self) -> None:
        needs(self.time in UNITS)
        self.rows("timestamp")
        units = [unit for unit in ("s", "ms", "us", "ns") if unit != self.time]
        self.options["timestamp_unit"] = self.rng.choice(units)
        self.must_refuse = "unit"

    def an_undated_zone(self) -> None:
        needs(self.time == "naive")
        self.rows("timestamp")
        del self.options["time_zone"]
        self.must_refuse = "time zone"

    def a_missing_outcome(self) -> None:
        needs(self.kind == "label")
        for row in self.rows("liked"):
            self.events.cells["liked"][row], self.truth[row]["stage"] = None, "exposed"

    def a_bad_weight(self) -> None:
        needs("weight" in self.events.cells)
        for row in self.rows("weight"):
            bad = [None, 0.0, -1.0, INF, NAN, 1e38, *(["heavy"] if self.is_text else [])]
            self.events.cells["weight"][row] = self.rng.choice(bad)
            self.truth[row]["weight"] = 1.0
            self.is_lost[row] |= self.kind == "clicks" or is_click(self.truth[row])

    def an_open_quote(self) -> None:
        needs(self.is_text and not has_line_breaks(self))
        (row,) = self.rows("user_id", most=1)
        self.events.lines[row] = lambda line: b'"' + line
        self.columns.add("line")
        self.must_refuse = "an open quote"

    def a_cut_file(self) -> None:
        needs(self.form in ("csv.gz", "parquet"))
        self.must_refuse, share = "a cut file", self.rng.random()
        self.columns.add("cannot be read")
        self.events.raw.append(lambda raw: raw[: int(len(raw) * share)])

    def a_file_named_like_a_pattern(self) -> None:
        needs(self.form != "pandas")
        name, decoy = self.rng.choice(
            [("log[1]", "log1"), ("a*b", "axb"), ("who?", "whom"), ("[a-z]", "q"), ("{a,b}", "a")]
        )
        self.file_name, self.decoys = name, [decoy]

    def several_files(self) -> None:
        needs(self.form != "pandas")
        self.num_files = 3

    def a_repeated_column(self) -> None:
        column = self.rng.choice(["user_id", "item_id"])
        name = self.events.names.get(column, column)
        self.events.repeated = self.rng.choice([name, name.upper()])
        self.columns.add(self.events.repeated)
        self.must_refuse = "a repeated column"

    def a_folder_named_like_a_column(self) -> None:
        needs(self.form != "pandas")
        self.folder = f"{self.events.names.get('user_id', 'user_id')}=7"

    def columns_named_as_within(self) -> None:
        size = len(self.events)
        names = ("_row", "_fault", "_copy", "event_number", "num_positives")
        self.events.more |= {name: list(range(size, 0, -1)) for name in names}

    def a_missing_column(self) -> None:
        needs(not self.events.repeated)  # The other one of that name would be the column.
        column = self.rng.choice(["user_id", "item_id"])
        self.columns.add(self.events.names.get(column, column))
        self.events.names[column] = f"{column[:4]}"
        self.must_refuse = "a missing column"

    def no_rows(self) -> None:
        self.is_empty = True
        self.columns |= {"0 rows", "none of 0 rows"}
        self.must_refuse = "no rows"

    def unknown_items(self) -> None:
        items = needs(self.items)
        choice = self.options["unknown_items"] = self.rng.choice(["keep", "drop", "error"])
        as_id = (
            (lambda n: n) if isinstance(items.cells["item_id"][0], int | float) else "i{}".format
        )
        for row in self.rows("item_id"):
            known = self.events.cells["item_id"][row]
            if isinstance(known, str) and known != known.strip():
                continue
            self.events.cells["item_id"][row] = self.truth[row]["item_id"] = as_id(90 + row)
            self.is_lost[row] = choice != "keep"
            if choice == "error":
                self.must_refuse = "unknown items"

    def other_ids(self) -> None:
        items = needs(self.items)
        items.cells["item_id"] = [f"sku-{n}" for n in range(len(items))]
        self.columns.add(self.events.names.get("item_id", "item_id"))
        self.must_refuse = "no id in common"

    def repeated_events(self) -> None:
        needs(self.time and "item_id" not in self.columns and self.kind != "funnel")
        choice = self.options["duplicates"] = self.rng.choice(["keep", "drop", "error"])
        (row,) = self.rows("user_id", most=1)
        for cells in (*self.events.cells.values(), *self.events.more.values()):
            cells.append(cells[row])
        self.truth.append(dict(self.truth[row]))
        self.is_lost.append(choice == "drop")
        self.columns.add("duplicates")
        if choice == "error":
            self.must_refuse = "a repeated event"

    def items_without_id(self) -> None:
        items = needs(self.items)
        for cells in items.cells.values():
            cells.append(cells[0])
        items.cells["item_id"][-1] = None
        self.columns.add(items.names.get("item_id", "item_id"))

    def a_repeated_item(self) -> None:
        items = needs(self.items)
        for cells in items.cells.values():
            cells.append(cells[0])
        self.columns.add(items.names.get("item_id", "item_id"))
        if self.rng.random() < 0.5:
            items.cells["kind"][-1] = "another"
            self.must_refuse = "an item twice"

    def a_bad_feature(self) -> None:
        items = needs(self.items)
        name = self.rng.choice(["price", "v"])
        self.columns.add(items.names.get(name, name))
        bad: dict[str, list[Any]] = {
            "price": [None, INF, NAN, *(["cheap", LONG] if self.is_text else [])],
            "v": ["1|x", "1|nan", "1|2|3", None] if self.is_text else [None, [1.0], [1.0, NAN], []],
        }
        row = self.rng.randrange(1, len(self.features))  # The first may be repeated.
        items.cells[name][row] = self.rng.choice(bad[name])
        list(self.features.values())[row][name] = None


def make_case(seed: int) -> Case:
    """Makes a clean log of a random kind, form and way of writing, and then makes it dirty."""
    rng = random.Random(seed)
    form = rng.choice(["csv", "csv", "csv", "csv.gz", "parquet", "parquet", "pandas"])
    kind = rng.choice(["clicks", "ratings", "funnel", "label"])
    is_text = form.startswith("csv")
    time = rng.choice(["", "s", "ms", "us", "zoned", "naive", *([] if is_text else ["stamp"])])
    as_user: Callable[[int], Any] = int if rng.random() < 0.5 else "u{}".format
    as_item: Callable[[int], Any] = int if rng.random() < 0.5 else "i{}".format
    truth = [
        {
            "user_id": as_user(rng.randint(1, 9)),
            "item_id": as_item(rng.randint(1, 14)),
            # Each its own second, so that no two events are equal.
            "time": int(START.timestamp()) + 100 * n + rng.randint(0, 99) if time else None,
            "stage": rng.choice(STAGES[3:] if kind != "funnel" else STAGES),
            "weight": 1.0,
        }
        for n in range(rng.randint(30, 90))
    ]
    truth[0]["stage"] = "clicked"
    options: dict[str, Any] = {}
    events = clean_events(rng, kind, time, truth, options)
    items: Table | None = None
    features: dict[str, dict[str, Any]] = {}
    if rng.random() < 0.6:
        items, features = clean_items(as_item, is_text=is_text)
        options["item_features"] = {"price": "numeric", "kind": "categorical", "v": "vector"}
    is_lost = [False] * len(truth)
    case = Case(rng, form, kind, time, events, items, truth, is_lost, features, options)
    for table, argument in ((events, "columns"), (items, "item_columns")):
        if table is not None and rng.random() < 0.5:
            table.names = {n: f"{n} of {table.name}" for n in table.cells if rng.random() < 0.5}
            options[argument] = dict(table.names)
    drawn = rng.sample(DIRT, rng.choices([0, 1, 2, 3], [1, 8, 4, 2])[0])
    for dirty in sorted(drawn, key=DIRT.index):
        with contextlib.suppress(NotHere):
            dirty(case)
            case.dirt.append(dirty.__name__)
    return case


def clean_events(
    rng: random.Random, kind: str, time: str, truth: list[dict[str, Any]], options: dict[str, Any]
) -> Table:
    """Writes down the truth as a log of a kind, with the options that read it."""
    cells: dict[str, list[Any]] = {n: [row[n] for row in truth] for n in ("user_id", "item_id")}
    if kind == "clicks":
        for row in truth:
            row["stage"] = "clicked"
    elif kind == "ratings":
        cells["rating"] = [rng.randint(*((4, 5) if is_click(row) else (1, 3))) for row in truth]
        options["rating_threshold"] = 4
    elif kind == "label":
        cells["liked"] = [float(is_click(row)) for row in truth]
        options["label"] = {"liked": 1.0}
    else:
        cells["stage"] = [row["stage"] for row in truth]
        cells["request_id"] = [n // 5 for n in range(len(truth))]
        cells["rank"] = [n % 5 for n in range(len(truth))]
    if time:
        cells["timestamp"] = [written(row["time"], time) for row in truth]
        if time in UNITS and (time != "s" or rng.random() < 0.3):
            options["timestamp_unit"] = time
        if time == "naive":
            options["time_zone"] = "Europe/Berlin"
    if rng.random() < 0.4:
        cells["weight"] = [rng.choice([0.5, 1.0, 2.0]) for _ in truth]
        for row, weight in zip(truth, cells["weight"], strict=True):
            row["weight"] = weight
    return Table("events", cells)


def clean_items(
    as_item: Callable[[int], Any], *, is_text: bool
) -> tuple[Table, dict[str, dict[str, Any]]]:
    numbers = range(1, 16)
    features = {
        str(as_item(n)): {"price": n / 2, "kind": f"k{n % 3}", "v": [float(n), 0.5]}
        for n in numbers
    }
    columns: dict[str, list[Any]] = {"item_id": [as_item(n) for n in numbers]}
    columns |= {name: [f[name] for f in features.values()] for name in ("price", "kind", "v")}
    if is_text:
        columns["v"] = ["|".join(map(str, v)) for v in columns["v"]]
    return Table("items", columns), features


def is_click(row: dict[str, Any]) -> bool:
    return bool(row["stage"] == "clicked")


def written(seconds: int, way: str) -> Any:
    moment = datetime.fromtimestamp(seconds, UTC)
    if way in UNITS:
        return seconds * UNITS[way]
    if way == "zoned":
        return moment.isoformat().replace("+00:00", "Z")
    return moment if way == "stamp" else f"{moment.astimezone(ZoneInfo('Europe/Berlin')):%F %T}"


class NotHere(Exception):
    pass


def needs(what: T | None) -> T:
    """Gives back what a kind of dirt needs, if there is such a thing."""
    if not what:
        raise NotHere
    return what


Dirt = Callable[[Case], None]


def has_line_breaks(case: Case) -> bool:
    return any("\n" in str(cell) for cell in case.events.cells["user_id"])


def putting(
    name: str, column: str, goes: Callable[[Case], Any], *values: Any, must_refuse: str = ""
) -> Dirt:
    """Makes dirt that puts values into a column; a tuple holds those of text, then all others."""

    def dirty(case: Case) -> None:
        needs(goes(case))
        of_form = [v[not case.is_text] if isinstance(v, tuple) else (v,) for v in values]
        case.put(column, *(value for several in of_form for value in several))
        case.must_refuse = case.must_refuse or must_refuse

    dirty.__name__ = name
    return dirty


def changing(
    name: str, goes: Callable[[Case], Any], change: Callable[[bytes], bytes], must_refuse: str = ""
) -> Dirt:
    """Makes dirt that changes the bytes of the text, or of a file that must then be refused."""

    def dirty(case: Case) -> None:
        needs(goes(case))
        (case.events.raw if must_refuse else case.events.text).append(change)
        if must_refuse:
            case.must_refuse = must_refuse
            case.columns.add("cannot be read")

    dirty.__name__ = name
    return dirty


def replacing(name: str, *changes: Callable[[bytes], bytes]) -> Dirt:
    """Makes dirt that changes single lines, which cannot be kept."""

    def dirty(case: Case) -> None:
        needs(case.is_text)
        for row in case.rows("user_id"):
            case.events.lines[row] = case.rng.choice(changes)
            case.is_lost[row] = True
        case.columns.add("line")

    dirty.__name__ = name
    return dirty


def is_text(case: Case) -> bool:
    return case.is_text


def is_kind(kind: str) -> Callable[[Case], bool]:
    return lambda case: case.kind == kind


NAN, INF = float("nan"), float("inf")
PUT = [
    putting("a_line_break_in_an_id", "user_id", is_text, "a\nb"),
    putting("no_time", "timestamp", lambda case: case.time, None),
    putting("an_unreadable_time", "timestamp",
            lambda case: case.time and (case.is_text or case.time in ("zoned", "naive")),
            "yesterday", "31/01/2023", "2023-13-01", "12:30", "N/A", LONG),
    putting("a_bad_rating", "rating", is_kind("ratings"),
            ((None, "nan", "inf", "good", LONG), (None, NAN))),
    # To pandas, NaN is a missing value: the outcome does not hold.
    putting("a_bad_outcome", "liked", lambda case: case.kind == "label" and case.form != "pandas",
            (("nan", "inf", "maybe"), (NAN, INF))),
    putting("an_unknown_stage", "stage", is_kind("funnel"), "liked", "Clicked",
            must_refuse="stage"),
    putting("no_stage", "stage", is_kind("funnel"), None),
    putting("a_bad_rank", "rank", is_kind("funnel"), ((1.5, "first"), (1.5,))),
]  # fmt: skip
CHANGED = [
    replacing("a_line_of_another_length", lambda line: line + b",x", lambda line: b"1"),
    replacing("a_line_that_is_not_utf8", lambda line: b"\xff\xfe" + line),
    changing("windows_line_ends", lambda case: case.is_text and not has_line_breaks(case),
             lambda text: text.replace(b"\n", b"\r\n")),
    changing("a_byte_order_mark", is_text, lambda text: b"\xef\xbb\xbf" + text),
    changing("empty_lines", is_text,
             lambda text: text + (b"\r\n" if b"\r\n" in text else b"\n") * 2),
    changing("a_wrong_checksum", lambda case: case.form == "csv.gz",
             lambda raw: raw[:-6] + bytes([raw[-6] ^ 1]) + raw[-5:], "a checksum"),
]  # fmt: skip

# In this order: what holds of a row may depend on what came before.
ORDER = (
    "no_id a_word_for_no_id white_space_around_ids leading_zeros a_reserved_id ids_past_int64"
    " ids_as_floats item_ids_as_floats PUT an_implausible_time a_time_in_another_unit"
    " a_wrong_unit an_undated_zone a_missing_outcome a_bad_weight an_open_quote CHANGED"
    " a_cut_file a_file_named_like_a_pattern several_files a_repeated_column"
    " a_folder_named_like_a_column columns_named_as_within a_missing_column no_rows"
    " unknown_items other_ids repeated_events items_without_id a_repeated_item a_bad_feature"
)
OF_SEVERAL = {"PUT": PUT, "CHANGED": CHANGED}
DIRT: list[Dirt] = []
for name in ORDER.split():
    DIRT += OF_SEVERAL.get(name) or [getattr(Case, name)]


# What comes of a case.


def write(case: Case, folder: Path) -> dict[str, Any]:
    """Writes a case's tables into a folder, and returns the arguments that name them."""
    folder = folder / case.folder
    folder.mkdir(parents=True)
    for decoy in case.decoys:
        other = Table("decoy", {"user_id": [999], "item_id": [999]})
        write_table(case, other, folder / decoy, case.num_files)
    arguments: dict[str, Any] = {"events": write_table(case, case.events, folder / case.file_name)}
    if case.items is not None:
        arguments["items"] = write_table(case, case.items, folder / "items", 1)
    return arguments


def write_table(case: Case, table: Table, path: Path, num_files: int | None = None) -> Any:
    """Writes a table: one file, a folder of them, or none for pandas, and returns what to read."""
    columns = table.named()
    num_rows = 0 if case.is_empty and table is case.events else len(table)
    if case.form == "pandas":
        arrays = [typed(cells[:num_rows]) for _, cells in columns]
        frame = pa.table({str(i): array for i, array in enumerate(arrays)}).to_pandas()
        frame.columns = [name for name, _ in columns]
        return frame
    num_files = num_files or case.num_files
    suffix = "parquet" if case.form == "parquet" else case.form
    targets = [path.with_name(f"{path.name}.{suffix}")]
    if num_files > 1:
        path.mkdir()
        targets = [path / f"part-{i}.{suffix}" for i in range(num_files)]
    for i, target in enumerate(targets):
        rows = range(i * num_rows // num_files, (i + 1) * num_rows // num_files)
        target.write_bytes(encode(case, table, columns, rows))
    return path if num_files > 1 else targets[0]


def encode(case: Case, table: Table, columns: list[tuple[str, list[Any]]], rows: range) -> bytes:
    sink = io.BytesIO()
    if case.form == "parquet":
        arrays = [typed(cells).slice(rows.start, len(rows)) for _, cells in columns]
        whole = pa.Table.from_arrays(arrays, names=[name for name, _ in columns])
        pq.write_table(whole, sink, row_group_size=20)
    else:
        lines = [as_line([name for name, _ in columns])]
        for row in rows:
            line = as_line([cells[row] for _, cells in columns])
            lines.append(table.lines.get(row, bytes)(line))
        text = b"".join(line + b"\n" for line in lines)
        for change in table.text:
            text = change(text)
        sink.write(gzip.compress(text) if case.form == "csv.gz" else text)
    content = sink.getvalue()
    for change in table.raw:
        content = change(content)
    return content


def typed(cells: list[Any]) -> pa.Array:
    is_large = any(isinstance(cell, int) and cell >= 2**63 for cell in cells)
    return pa.array(cells, pa.uint64() if is_large else None)


def as_line(cells: list[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(["" if cell is None else cell for cell in cells])
    return text.getvalue()[:-1].encode()


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Args:
        word: right, refused, silent (wrong data was taken), raw (another exception than a refusal)
            or unnamed (a refusal without file and column, or with more of the data than a line).
        detail: The message, or what differs.
    """

    word: str
    detail: str = ""


def judge(case: Case, folder: Path) -> Outcome:
    arguments = write(case, folder)
    try:
        load = Log.from_table if case.form == "pandas" else Log.from_files
        log = load(arguments.pop("events"), **arguments, **log_arguments(**case.options))
        log.describe()
    except DataError as error:
        return judge_refusal(case, str(error))
    except Exception:
        return Outcome("raw", traceback.format_exc(limit=-3))
    if case.must_refuse:
        return Outcome("silent", f"taken in spite of {case.must_refuse}")
    if found := difference(case, log):
        return Outcome("silent", found)
    return Outcome("right")


def judge_refusal(case: Case, message: str) -> Outcome:
    files = ("event table", "item table") if case.form == "pandas" else (case.file_name, "items.")
    is_named = any(name in message for name in files)
    if case.columns and not any(name in message for name in case.columns):
        is_named = False
    if len(message) > 1500 or re.search(r"[\x00-\x1f\x7f-\x9f]", message):
        is_named = False
    return Outcome("refused" if is_named else "unnamed", message)


def difference(case: Case, log: Log) -> str:
    """Says in what a log differs from the right answer; "" if in nothing."""
    kept = [row for row, is_lost in zip(case.truth, case.is_lost, strict=True) if not is_lost]
    rows = log.events.order_by("event_number").to_pyarrow().to_pylist()
    if len(rows) != len(kept):
        return f"{len(rows)} events, not {len(kept)}"
    for found, wanted in zip(rows, kept, strict=True):
        time = found.get("timestamp")
        got = {
            **{name: str(found[name]) for name in ("user_id", "item_id")},
            "time": None if time is None else int(time.timestamp()),
            "stage": found["stage"],
            "weight": found.get("weight", 1.0),
        }
        want = {**wanted, **{name: str(wanted[name]) for name in ("user_id", "item_id")}}
        if got != want:
            return f"{got}, not {want}"
    if sum(each.num_rows for each in log.dropped) != sum(case.is_lost):
        return f"{log.dropped} dropped, not {sum(case.is_lost)} rows"
    of_events = {str(row["item_id"]): {"_listed": True} for row in kept}
    nothing = dict.fromkeys(("price", "kind", "v"))
    items = {str(row.pop("item_id")): row for row in log.items.to_pyarrow().to_pylist()}
    if case.items is None:
        return "" if items == of_events else f"items {items}"
    expected = {
        id_: {**case.features.get(id_, nothing), "_listed": id_ in case.features}
        for id_ in of_events | case.features
    }
    return "" if items == expected else f"items {items}, not {expected}"
