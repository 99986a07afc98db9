"""Writes a new version of a model: its items, their index, its queries, its manifest.

An export brings towers and users; a refresh takes those of the version before. Neither this module
nor what it imports needs TensorFlow: whoever writes a SavedModel too says how.
"""

import contextlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tfrs_pipeline.answers import publish
from tfrs_pipeline.answers.card import CARD_FILE, model_card
from tfrs_pipeline.answers.engine import Engine
from tfrs_pipeline.answers.parts import Parts
from tfrs_pipeline.answers.proof import Answers, probes_of, prove
from tfrs_pipeline.answers.signatures import signatures_of
from tfrs_pipeline.answers.stored import write_array
from tfrs_pipeline.answers.users import Users
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.durable import write_record
from tfrs_pipeline.features.encoding import TIMESTAMP
from tfrs_pipeline.features.raw import to_text_lists
from tfrs_pipeline.retrieval import HISTORY_TIMESTAMPS, Query, history_of
from tfrs_pipeline.search.candidates import Candidates, FilterValues
from tfrs_pipeline.search.queries import QueryInputs, item_times
from tfrs_pipeline.search.settings import Auto, Scann, Search, search_of
from tfrs_pipeline.search.tune import Requests, measure_requests, tune_index

LIBRARIES = "tensorflow", "tf-keras", "tensorflow-recommenders", "scann", "ai-edge-litert", "numpy"
# Most queries to tune and measure an index on; how many the version must answer alike.
NUM_QUERIES, NUM_PROBES = 1000, 20

SaveGraphs: TypeAlias = Callable[
    [Path, Mapping[str, Any], Answers, np.ndarray | None], Mapping[str, Answers]
]
"""Writes the SavedModels of a version into its folder, given its manifest so far, the inputs of
probes, and embedded queries. Returns their answers, in memory, to the probes: see `prove`."""


@dataclass(frozen=True)
class ExportOptions:
    """The options of `export` that the next refresh reuses."""

    index: Search
    filter_by: str | None = None
    keep_versions: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.index, Search):
            raise TypeError(
                f"index must be tp.Exact(), tp.Scann() or tp.Auto(). Received: {self.index!r}."
            )

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> "ExportOptions":
        """Reads the options back from the manifest of an export."""
        options = dict(manifest["export"])
        return cls(search_of(**options.pop("index")), **options)


@dataclass(frozen=True)
class Items:
    """The items that a version retrieves.

    Attributes:
        table: A row for each item: `item_id`, optionally `title`, and columns to filter by.
        vectors: Their embeddings, [n, D] float32.
    """

    table: pa.Table
    vectors: np.ndarray


def write_version(
    path: Path,
    options: ExportOptions,
    *,
    fill: Callable[[Path], None],
    items: Items,
    queries: Sequence[Query],
    manifest: Mapping[str, Any],
    save_graphs: SaveGraphs,
) -> tuple[Path, dict[str, Any]]:
    """Writes, proves and publishes a version.

    Returns its folder and its manifest: another export may delete the file at any time.

    Args:
        path: The model's folder.
        options: What the next refresh reuses.
        fill: Writes the towers and what is stored of users into a folder.
        items: The items to retrieve.
        queries: Held-out queries: an index is tuned and measured on the first 1,000.
        manifest: What else the manifest says.
        save_graphs: Writes the SavedModels.

    Raises as `tp.export`.
    """
    shown, item_filter = _shown(items.table, options.filter_by)
    queries = queries[:NUM_QUERIES]
    with publish.new_version(path, keep=options.keep_versions) as (partial, folder):
        files = partial / publish.SERVICE_FOLDER
        files.mkdir()
        fill(files)
        write_array(files, publish.VECTORS, items.vectors)
        if item_filter is not None:
            codes = FilterValues(item_filter["values"]).encode(shown[publish.FILTER_COLUMN])
            write_array(files, publish.FILTER_CODES, codes)
        (partial / publish.ITEMS_FILE).parent.mkdir()
        pq.write_table(shown, partial / publish.ITEMS_FILE)
        parts = Parts.read(files, manifest)
        index, embedded = _write_index(partial, options.index, items, parts, queries)
        table = query_table(queries, items.table, parts.inputs)
        pq.write_table(table, partial / publish.QUERIES_FILE)
        # What is written here comes last: a refresh brings the manifest of the version before.
        full = {
            **manifest,
            "format": publish.FORMAT,
            "index": index,
            "filter": item_filter,
            "export": asdict(options),
            "name": path.name,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": dict(_versions()),
        }
        ids = items.table["item_id"].slice(0, NUM_PROBES).to_pylist()
        signatures = signatures_of(parts.inputs, has_filter=False)
        probes = probes_of(signatures, parts.inputs, queries[:NUM_PROBES], ids)
        candidates = Candidates(items.table["item_id"].to_numpy(), items.vectors)
        users = Users(parts.stored, full["exclude"], full, None)
        engine = Engine(parts, users, candidates, full)
        light = {name: engine.answer(name, inputs) for name, inputs in probes.items()}
        answers = {"": light, **save_graphs(partial, full, probes, embedded)}
        full["signatures"] = sorted(answers[""])
        # As a reader of the file gets it: tuples are lists, and dates are text.
        full = json.loads(json.dumps(full, default=str))
        (partial / CARD_FILE).write_text(model_card(full, int(folder.name)), encoding="utf-8")
        written = [path for path in partial.rglob("*") if path.is_file()]
        write_record(partial / publish.MANIFEST_FILE, full, written)
        # The last thing before the rename, so that no version is published without this proof.
        prove(partial, probes, answers)
    return folder, full


def _shown(table: pa.Table, filter_by: str | None) -> tuple[pa.Table, dict[str, Any] | None]:
    """Makes the table of items as it is read with answers, and describes the filter."""
    shown = {"item_id": table["item_id"]}
    if "title" in table.column_names:  # With titles, people can read the answers.
        shown["title"] = table["title"].cast(pa.string())
    if filter_by is None:
        return pa.table(shown), None
    if filter_by not in table.column_names:
        known = ", ".join(table.column_names)
        raise ValueError(
            f"filter_by must name a column of the items. Received: {filter_by!r}; known: {known}"
        )
    shown[publish.FILTER_COLUMN] = table[filter_by]
    values = to_text_lists(table[filter_by])[0].unique().to_pylist()
    return pa.table(shown), {"name": filter_by, "values": sorted(values)}


def _write_index(
    folder: Path, index: Search, items: Items, parts: Parts, queries: Sequence[Query]
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Tunes and saves an index; returns its description, and queries to compare answers by.

    There are none, and no file is written, if search is exact.
    """
    if isinstance(index, Auto):
        index = index.choose(len(items.vectors))
    description: dict[str, Any] = {"kind": index.kind}
    if not isinstance(index, Scann):
        return description, None
    embedded = parts.inputs.embed(parts.query_tower, queries)
    ids = Ids(items.table["item_id"].to_numpy())
    users = parts.stored.user_rows([query.get("user_id") for query in queries])
    known = [ids.known_rows(parts.stored.known(row)) for row in users]
    tuning, measured = Requests(embedded, known).for_tuning_and_measuring()
    tuned = tune_index(items.vectors, tuning, target_recall=index.recall)
    tuned.searcher.save(folder / publish.INDEX_FOLDER)
    description |= {
        "target_recall": index.recall,
        "num_leaves": tuned.num_leaves,
        "levels": [asdict(level) for level in tuned.levels],
        "requests": measure_requests(tuned.candidates(items.vectors), measured),
    }
    return description, embedded[:NUM_PROBES]


def _versions() -> Iterator[tuple[str, str]]:
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield library, importlib.metadata.version(library)


def describe_index(description: Mapping[str, Any], num_candidates: int) -> str:
    """Describes the "index" of a manifest in a sentence."""
    if description["kind"] == "exact":
        return f"exact search over {num_candidates:,} candidates"
    recalls = [request["recall"] for request in description["requests"]]
    lowest = min(recalls, default=description["target_recall"])
    return f"ScaNN finds at least {lowest:.4f} of the exact answer on average"


def query_table(queries: Sequence[Query], items: pa.Table, inputs: QueryInputs) -> pa.Table:
    """Makes a table of queries, with the columns that the query tower's inputs need."""
    read, request = inputs.signatures["embed_query"], inputs.features["request"]
    ids = pa.list_(items.schema.field("item_id").type)
    columns = {
        "user_id": pa.array([query.get("user_id") for query in queries]),
        "history": pa.array([list(history_of(query)) for query in queries], ids),
    }
    if HISTORY_TIMESTAMPS in read:
        columns[HISTORY_TIMESTAMPS] = pa.array(item_times(queries), pa.list_(pa.float64()))
    if request or TIMESTAMP in read:
        requests = [query.get("request") or {} for query in queries]
        names = [*(feature.name for feature in request), TIMESTAMP]
        values = {name: [request_.get(name) for request_ in requests] for name in names}
        for feature in request:  # Categories of several types become one; "" is a missing one.
            if feature.raw_dtype == "string":
                values[feature.name] = [
                    (list(filter(None, row)) if isinstance(row, list) else row) or None
                    for row in feature.to_raw(values[feature.name]).tolist()
                ]
        rows = zip(*values.values(), strict=True)
        columns["request"] = pa.array([dict(zip(values, row, strict=True)) for row in rows])
    return pa.table(columns)
