"""Random dirty inputs with known right answers, and a check of what a log makes of each.

A clean log is written as Python values. Then dirt is put into its cells, lines, bytes and names.
Each piece of dirt records how it changes the right answer: which rows cannot be kept, which
features are missing, or that only a refusal is right. All this uses no code of the package.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import random
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.parquet as pq

from tests.small_log import arguments as log_arguments
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import DataError

START = datetime(2023, 1, 2, tzinfo=UTC)
UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000}
STAGES = ("retrieved", "pre_ranked", "ranked", "exposed", "clicked")
IDS = ("user_id", "item_id")
LONG = "x" * 100_000 + "\x1b[2J"
NAN, INF = float("nan"), float("inf")
# File names that look like patterns, each with a file name that the pattern would match.
MATCHES = {"log[1]": "log1", "a*b": "axb", "who?": "whom", "[a-z]": "q", "{a,b}": "a"}
NAMES = [{"file_name": name, "decoy": other} for name, other in MATCHES.items()]
WITHIN = ("_row", "_fault", "_copy", "event_number", "num_positives")
Change = Callable[[bytes], bytes]


@dataclass
class Table:
    """A table as it will be written: column -> cells; None is an empty cell."""

    name: str
    cells: dict[str, list[Any]]
    names: dict[str, str] = field(default_factory=dict)  # Name in the log -> in the file.
    lines: dict[int, Change] = field(default_factory=dict)  # Row -> its change.
    text: list[Change] = field(default_factory=list)
    raw: list[Change] = field(default_factory=list)
    more: list[tuple[str, list[Any]]] = field(default_factory=list)  # Not asked for.

    def __len__(self) -> int:
        return len(next(iter(self.cells.values())))

    def called(self, name: str) -> str:
        return self.names.get(name, name)

    def columns(self) -> list[tuple[str, list[Any]]]:
        return [*((self.called(name), cells) for name, cells in self.cells.items()), *self.more]

    def repeat(self, row: int) -> None:
        for _, cells in self.columns():
            cells.append(cells[row])


@dataclass
class Case:
    """An input, the arguments that go with it, and the right answer."""

    rng: random.Random
    form: str
    kind: str
    time: str
    events: Table
    items: Table
    has_items: bool
    truth: list[dict[str, Any]]  # For each row: user, item, seconds, stage and weight.
    is_lost: list[bool]  # For each row: whether it cannot be kept.
    features: dict[str, dict[str, Any]]  # Item id -> price, category and vector.
    options: dict[str, Any]
    must_refuse: str = ""  # Why only a refusal is right; "" where there is a right answer.
    dirt: list[str] = field(default_factory=list)  # What was done.
    columns: set[str] = field(default_factory=set)  # Columns with dirt, as named in files.
    file_name: str = "events"
    decoy: str = ""
    num_files: int = 1
    is_empty: bool = False
    folder: str = ""

    @property
    def is_text(self) -> bool:
        return self.form in ("csv", "csv.gz")

    @property
    def words(self) -> set[str]:
        """Returns what `Dirt.needs` may name: the form, the time format, and their properties."""
        is_packed = self.form in ("csv.gz", "parquet")
        held = {"text": self.is_text, "packed": is_packed, "files": self.form != "pandas"}
        held |= {"units": self.time in UNITS, "items": self.has_items}
        return {self.form, self.time, *(word for word, holds in held.items() if holds)}

    def rows(self, column: str, most: int = 3) -> list[int]:
        """Draws clean rows for dirt in a column, which a refusal must then name."""
        self.columns.add(self.events.called(column))
        sound = [row for row, is_lost in enumerate(self.is_lost) if not is_lost]
        return self.rng.sample(sound, self.rng.randint(1, most))

    def put(self, column: str, new: Callable[[int, Any], Any], does: str = "") -> list[int]:
        """Puts `new(row, cell)` into some cells, so that rows are "lost" or as the new "truth"."""
        rows, cells = self.rows(column), self.events.cells[column]
        for row in rows:
            cells[row] = new(row, cells[row])
            self.is_lost[row] |= does == "lost"
            self.truth[row] |= {column: cells[row]} if does == "truth" else {}
        return rows


# Puts dirt into a column of a case, or tells whether the dirt can be put there.
Act = Callable[[Case, str], Any]


def lose(*values: Any) -> Act:
    """Puts values into a column to lose the rows; a pair holds values for text and other forms."""

    def act(case: Case, column: str) -> None:
        of_form = [v[not case.is_text] if isinstance(v, tuple) else (v,) for v in values]
        choices = [value for several in of_form for value in several]
        case.put(column, lambda *_: case.rng.choice(choices), "lost")

    return act


def lose_lines(*changes: Change) -> Act:
    def act(case: Case, column: str) -> None:
        for row in case.rows(column):
            case.events.lines[row] = case.rng.choice(changes)
            case.is_lost[row] = True

    return act


def change_text(change: Change) -> Act:
    return lambda case, _: case.events.text.append(change)


def some_as_floats(case: Case, column: str) -> None:
    some = 0.2 if case.is_text and case.rng.random() < 0.5 else 1.0
    cells = case.events.cells[column]
    for row, cell in enumerate(cells):
        if cell is not None and case.rng.random() < some:
            cells[row] = float(cell)


def implausible(case: Case, column: str) -> None:
    if unit := UNITS.get(case.time):
        values: list[Any] = [0, -5 * unit, 3 * 10**10 * unit]
        values += ["inf", "nan", "1e300", "-inf"] if case.is_text else []
    elif case.time == "stamp":
        values = [datetime(year, 1, 1, tzinfo=UTC) for year in (1970, 2200)]
    else:
        days = ["1970-01-01", "0001-01-01", "9999-12-31", "12023-01-01", "2262-04-12"]
        end = " 00:00:00Z" if case.time == "zoned" else " 00:00:00"
        values = [day + end for day in (*days, "0044-03-15 (BC)")] + ["infinity", "-infinity"]
    lose(*values)(case, column)


def another_unit(case: Case, column: str) -> None:
    unit = UNITS[case.rng.choice([unit for unit in UNITS if unit != case.time])]
    case.put(column, lambda row, _: case.truth[row]["time"] * unit, "lost")


def wrong_unit(case: Case, column: str) -> None:
    case.rows(column)
    case.options["timestamp_unit"] = case.rng.choice([u for u in (*UNITS, "ns") if u != case.time])


def bad_weight(case: Case, column: str) -> None:
    bad = [None, 0.0, -1.0, INF, NAN, 1e38, *(["heavy"] if case.is_text else [])]
    for row in case.put(column, lambda *_: case.rng.choice(bad)):
        case.truth[row]["weight"] = 1.0
        case.is_lost[row] |= case.kind == "clicks" or is_click(case.truth[row])


def cut_file(case: Case, _: str) -> None:
    share = case.rng.random()
    case.events.raw.append(lambda raw: raw[: int(len(raw) * share)])


def repeated_column(case: Case, column: str) -> None:
    name = case.events.called(column)
    name = case.rng.choice([name, name.upper()])
    case.events.more.append((name, [1] * len(case.events)))
    case.columns.add(name)


def missing_column(case: Case, column: str) -> None:
    case.columns.add(case.events.called(column))
    case.events.names[column] = column[:4]


def unknown_items(case: Case, column: str) -> None:
    choice = case.options["unknown_items"] = case.rng.choice(["keep", "drop", "error"])
    is_text = isinstance(case.items.cells[column][0], str)
    for row in case.rows(column):
        if (known := str(case.events.cells[column][row])) == known.strip():
            id_ = f"i{90 + row}" if is_text else 90 + row
            case.events.cells[column][row] = case.truth[row][column] = id_
            case.is_lost[row] = choice != "keep"
            case.must_refuse = "unknown items" if choice == "error" else case.must_refuse


def other_ids(case: Case, column: str) -> None:
    case.items.cells[column] = [f"sku-{n}" for n in range(len(case.items))]
    case.columns.add(case.events.called(column))


def repeated_event(case: Case, _: str) -> None:
    choice = case.options["duplicates"] = case.rng.choice(["keep", "drop", "error"])
    (row,) = case.rows("user_id", most=1)
    case.events.repeat(row)
    case.truth.append(dict(case.truth[row]))
    case.is_lost.append(choice == "drop")
    case.must_refuse = "a repeated event" if choice == "error" else case.must_refuse


def repeated_item(case: Case, column: str) -> None:
    case.items.repeat(0)
    case.columns.add(case.items.called(column))
    if case.rng.random() < 0.5:
        case.items.cells["kind"][-1] = "another"
        case.must_refuse = "an item twice"


def no_item_id(case: Case, column: str) -> None:
    case.items.repeat(0)
    case.columns.add(case.items.called(column))
    case.items.cells[column][-1] = None


def bad_feature(case: Case, _: str) -> None:
    name = case.rng.choice(["price", "v"])
    case.columns.add(case.items.called(name))
    bad: list[Any] = [None, INF, NAN, *(["cheap", LONG] if case.is_text else [])]
    if name == "v":
        bad = ["1|x", "1|nan", "1|2|3", None] if case.is_text else [None, [1.0], [1.0, NAN], []]
    row = case.rng.randrange(1, len(case.features))  # Not row 0: it may be repeated.
    case.items.cells[name][row] = case.rng.choice(bad)
    list(case.features.values())[row][name] = None


def has_numbers(case: Case, column: str) -> bool:
    return isinstance(case.truth[0][column], int)


def has_no_breaks(case: Case, _: str) -> bool:
    return not any("\n" in str(cell) for cell in case.events.cells["user_id"])


def is_clean(case: Case, column: str) -> bool:
    return column not in case.columns


class Dirt(NamedTuple):
    """A kind of dirt, for cases that have what it needs."""

    name: str
    column: str  # "id" is user_id or item_id.
    needs: str  # Words that the case must have.
    act: Act
    must_refuse: str = ""  # Why only a refusal can be right.
    said: tuple[str, ...] = ()  # What a refusal may name instead of the column.
    goes: Act = lambda case, column: True


# Applied in this order, because the effect on a row may depend on earlier dirt.
DIRT = [
    Dirt("no_id", "id", "", lose(None)),
    Dirt("a_word_for_no_id", "id", "", lose("nan", "None", "NaN", "<NA>", "null"),
         goes=lambda c, x: c.is_text or not has_numbers(c, x)),
    Dirt("white_space_around_ids", "", "text",
         lambda c, _: [c.put(x, lambda _, cell: cell and f" {cell}\t") for x in IDS]),
    Dirt("leading_zeros", "user_id", "text", lambda c, x: c.put(x, lambda *_: "007", "truth")),
    Dirt("a_reserved_id", "id", "", lambda c, x: lose(-1 if has_numbers(c, x) else "")(c, x),
         goes=lambda c, x: not has_numbers(c, x) or str not in map(type, c.events.cells[x])),
    Dirt("ids_past_int64", "user_id", "parquet",
         lambda c, x: c.put(x, lambda row, _: 2**63 + row, "truth"),
         goes=lambda c, x: all(isinstance(y, int) and y != -1 for y in c.events.cells[x])),
    Dirt("ids_as_floats", "id", "", some_as_floats,
         goes=lambda c, x: is_clean(c, x) and str not in map(type, c.events.cells[x])),
    Dirt("item_ids_as_floats", "item_id", "items", goes=has_numbers,
         act=lambda c, x: c.items.cells.update({x: [*map(float, c.items.cells[x])]})),
    Dirt("a_line_break_in_an_id", "user_id", "text", lose("a\nb")),
    Dirt("no_time", "timestamp", "", lose(None)),
    Dirt("an_unreadable_time", "timestamp", "",
         lose("yesterday", "31/01/2023", "2023-13-01", "12:30", "N/A", LONG),
         goes=lambda c, _: c.is_text or c.time in ("zoned", "naive")),
    Dirt("a_bad_rating", "rating", "", lose(((None, "nan", "inf", "good", LONG), (None, NAN)))),
    # Not for pandas: there NaN is a missing value, so that the outcome does not hold.
    Dirt("a_bad_outcome", "liked", "files", lose((("nan", "inf", "maybe"), (NAN, INF)))),
    Dirt("an_unknown_stage", "stage", "", lose("liked", "Clicked"), "stage"),
    Dirt("no_stage", "stage", "", lose(None)),
    Dirt("a_bad_rank", "rank", "", lose(((1.5, "first"), (1.5,)))),
    Dirt("an_implausible_time", "timestamp", "", implausible),
    Dirt("a_time_in_another_unit", "timestamp", "units", another_unit, "units", goes=is_clean),
    Dirt("a_wrong_unit", "timestamp", "units", wrong_unit, "unit"),
    Dirt("an_undated_zone", "timestamp", "naive",
         lambda c, x: (c.rows(x), c.options.pop("time_zone")), "time zone"),
    Dirt("a_missing_outcome", "liked", "",
         lambda c, x: [c.truth[row].update(stage="exposed") for row in c.put(x, lambda *_: None)]),
    Dirt("a_bad_weight", "weight", "", bad_weight),
    Dirt("an_open_quote", "user_id", "text",
         lambda c, x: c.events.lines.update({c.rows(x, 1)[0]: lambda line: b'"' + line}),
         "an open quote", ("line",), has_no_breaks),
    Dirt("a_line_of_another_length", "user_id", "text",
         lose_lines(lambda line: line + b",x", lambda line: b"1"), said=("line",)),
    Dirt("a_line_that_is_not_utf8", "user_id", "text",
         lose_lines(lambda line: b"\xff\xfe" + line), said=("line",)),
    Dirt("windows_line_ends", "", "text",
         change_text(lambda text: text.replace(b"\n", b"\r\n")), goes=has_no_breaks),
    Dirt("a_byte_order_mark", "", "text", change_text(lambda text: b"\xef\xbb\xbf" + text)),
    Dirt("empty_lines", "", "text",
         change_text(lambda text: text + (b"\r\n" if b"\r\n" in text else b"\n") * 2)),
    Dirt("a_wrong_checksum", "", "csv.gz",
         lambda c, _: c.events.raw.append(lambda raw: raw[:-6] + bytes([raw[-6] ^ 1]) + raw[-5:]),
         "a checksum", ("cannot be read",)),
    Dirt("a_cut_file", "", "packed", cut_file, "a cut file", ("cannot be read",)),
    Dirt("a_file_named_like_a_pattern", "", "files",
         lambda c, _: vars(c).update(c.rng.choice(NAMES))),
    Dirt("several_files", "", "files", lambda c, _: vars(c).update(num_files=3)),
    Dirt("a_repeated_column", "id", "", repeated_column, "a repeated column"),
    Dirt("a_folder_named_like_a_column", "user_id", "files",
         lambda c, x: vars(c).update(folder=f"{c.events.called(x)}=7")),
    Dirt("columns_named_as_within", "", "",
         lambda c, _: c.events.more.extend((x, [*range(len(c.events), 0, -1)]) for x in WITHIN)),
    # Not with a repeated column: its other copy would be read instead.
    Dirt("a_missing_column", "id", "", missing_column, "a missing column",
         goes=lambda c, _: "a_repeated_column" not in c.dirt),
    Dirt("no_rows", "", "", lambda c, _: vars(c).update(is_empty=True), "no rows",
         ("0 rows", "none of 0 rows")),
    Dirt("unknown_items", "item_id", "items", unknown_items),
    Dirt("other_ids", "item_id", "items", other_ids, "no id in common"),
    Dirt("repeated_events", "item_id", "", repeated_event, said=("duplicates",),
         goes=lambda c, x: c.time and is_clean(c, x) and c.kind != "funnel"),
    Dirt("items_without_id", "item_id", "items", no_item_id),
    Dirt("a_repeated_item", "item_id", "items", repeated_item),
    Dirt("a_bad_feature", "", "items", bad_feature),
]  # fmt: skip


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
            # A distinct second for each event, so that no two are equal.
            "time": int(START.timestamp()) + 100 * n + rng.randint(0, 99) if time else None,
            "stage": rng.choice(STAGES[3:] if kind != "funnel" else STAGES),
            "weight": 1.0,
        }
        for n in range(rng.randint(30, 90))
    ]
    truth[0]["stage"] = "clicked"
    options: dict[str, Any] = {}
    events = clean_events(rng, kind, time, truth, options)
    has_items = rng.random() < 0.6
    items, features = (
        clean_items(as_item, is_text=is_text) if has_items else (Table("items", {}), {})
    )
    if has_items:
        options["item_features"] = {"price": "numeric", "kind": "categorical", "v": "vector"}
    for table, argument in ((events, "columns"), (items, "item_columns")):
        if table.cells and rng.random() < 0.5:
            table.names = {n: f"{n} of {table.name}" for n in table.cells if rng.random() < 0.5}
            options[argument] = dict(table.names)
    is_lost = [False] * len(truth)
    case = Case(rng, form, kind, time, events, items, has_items, truth, is_lost, features, options)
    drawn = rng.sample(DIRT, rng.choices([0, 1, 2, 3], [1, 8, 4, 2])[0])
    for dirt in sorted(drawn, key=DIRT.index):
        column = rng.choice(IDS) if dirt.column == "id" else dirt.column
        has_column = not column or column in events.cells
        if has_column and case.words.issuperset(dirt.needs.split()) and dirt.goes(case, column):
            dirt.act(case, column)
            case.must_refuse = dirt.must_refuse or case.must_refuse
            case.columns |= {*dirt.said}
            case.dirt.append(dirt.name)
    return case


def clean_events(
    rng: random.Random, kind: str, time: str, truth: list[dict[str, Any]], options: dict[str, Any]
) -> Table:
    """Writes the truth as a log of a kind, and adds the options that read it."""
    cells: dict[str, list[Any]] = {n: [row[n] for row in truth] for n in IDS}
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
        cells |= {"request_id": [n // 5 for n in range(len(truth))]}
        cells |= {"rank": [n % 5 for n in range(len(truth))]}
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


def clean_items(as_item: Callable[[int], Any], *, is_text: bool) -> tuple[Table, dict[str, Any]]:
    rows = {as_item(n): (n / 2, f"k{n % 3}", [float(n), 0.5]) for n in range(1, 16)}
    price, kind, vectors = map(list, zip(*rows.values(), strict=True))
    v = ["|".join(map(str, vector)) for vector in vectors] if is_text else vectors
    cells = {"item_id": [*rows], "price": price, "kind": kind, "v": v}
    features = {str(x): {"price": p, "kind": k, "v": v} for x, (p, k, v) in rows.items()}
    return Table("items", cells), features


def is_click(row: dict[str, Any]) -> bool:
    return bool(row["stage"] == "clicked")


def written(seconds: int, way: str) -> Any:
    moment = datetime.fromtimestamp(seconds, UTC)
    if way in UNITS:
        return seconds * UNITS[way]
    if way == "zoned":
        return moment.isoformat().replace("+00:00", "Z")
    return moment if way == "stamp" else f"{moment.astimezone(ZoneInfo('Europe/Berlin')):%F %T}"


# The outcome of a case


def write(case: Case, folder: Path) -> dict[str, Any]:
    """Writes a case's tables into a folder, and returns the arguments that name them."""
    folder = folder / case.folder
    folder.mkdir(parents=True)
    if case.decoy:
        write_table(
            case, Table("decoy", {x: [9] for x in IDS}), folder / case.decoy, case.num_files
        )
    found = {"events": write_table(case, case.events, folder / case.file_name, case.num_files)}
    return found | (
        {"items": write_table(case, case.items, folder / "items")} if case.has_items else {}
    )


def write_table(case: Case, table: Table, path: Path, num_files: int = 1) -> Any:
    """Writes one file, a folder of several, or none for pandas, and returns what to read."""
    num_rows = 0 if case.is_empty and table is case.events else len(table)
    columns = [(name, cells[:num_rows]) for name, cells in table.columns()]
    if case.form == "pandas":
        frame = pa.table({str(i): typed(cells) for i, (_, cells) in enumerate(columns)}).to_pandas()
        frame.columns = [name for name, _ in columns]
        return frame
    files = [path]
    if num_files > 1:
        path.mkdir()
        files = [path / f"part-{i}" for i in range(num_files)]
    for i, file in enumerate(files):
        rows = range(i * num_rows // num_files, (i + 1) * num_rows // num_files)
        files[i] = file.with_name(f"{file.name}.{case.form}")
        files[i].write_bytes(encode(case, table, columns, rows))
    return path if num_files > 1 else files[0]


def encode(case: Case, table: Table, columns: list[tuple[str, list[Any]]], rows: range) -> bytes:
    if case.form == "parquet":
        sink = io.BytesIO()
        arrays = [typed(cells).slice(rows.start, len(rows)) for _, cells in columns]
        whole = pa.Table.from_arrays(arrays, names=[name for name, _ in columns])
        pq.write_table(whole, sink, row_group_size=20)
        content = sink.getvalue()
    else:
        lines = [as_line([name for name, _ in columns])]
        for row in rows:
            lines.append(table.lines.get(row, bytes)(as_line([cells[row] for _, cells in columns])))
        content = b"".join(line + b"\n" for line in lines)
        for change in table.text:
            content = change(content)
        content = gzip.compress(content) if case.form == "csv.gz" else content
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


class Outcome(NamedTuple):
    """The outcome of a case, and details: right, refused, silent (wrong data was accepted), raw
    (another exception) or unnamed (a refusal without file and column, or not in one short line).
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
        return Outcome("refused" if is_named(case, str(error)) else "unnamed", str(error))
    except Exception:
        return Outcome("raw", traceback.format_exc(limit=-3))
    if case.must_refuse:
        return Outcome("silent", f"taken in spite of {case.must_refuse}")
    found = difference(case, log)
    return Outcome("silent" if found else "right", found)


def is_named(case: Case, message: str) -> bool:
    """Tells whether a refusal names file and column in one short line."""
    files = ("event table", "item table") if case.form == "pandas" else (case.file_name, "items.")
    has_file = any(name in message for name in files)
    has_column = not case.columns or any(name in message for name in case.columns)
    is_line = len(message) <= 1500 and not re.search(r"[\x00-\x1f\x7f-\x9f]", message)
    return has_file and has_column and is_line


def difference(case: Case, log: Log) -> str:
    """Describes how a log differs from the right answer; "" if it does not."""
    kept = [row for row, is_lost in zip(case.truth, case.is_lost, strict=True) if not is_lost]
    found = [
        {
            **{name: str(row[name]) for name in IDS},
            "time": row.get("timestamp") and int(row["timestamp"].timestamp()),
            "stage": row["stage"],
            "weight": row.get("weight", 1.0),
        }
        for row in log.events.order_by("event_number").to_pyarrow().to_pylist()
    ]
    for got, row in itertools.zip_longest(found, kept):
        if not (got and row) or got != row | {name: str(row[name]) for name in IDS}:
            return f"{got}, not {row}, of {len(found)} and {len(kept)} events"
    if sum(each.num_rows for each in log.dropped) != sum(case.is_lost):
        return f"{log.dropped} dropped, not {sum(case.is_lost)} rows"
    items = {str(row.pop("item_id")): row for row in log.items.to_pyarrow().to_pylist()}
    nothing = dict.fromkeys(("price", "kind", "v") if case.has_items else ())
    expected = {
        id_: {
            **case.features.get(id_, nothing),
            "_listed": id_ in case.features or not case.has_items,
        }
        for id_ in {str(row["item_id"]) for row in kept} | case.features.keys()
    }
    return "" if items == expected else f"items {items}, not {expected}"
