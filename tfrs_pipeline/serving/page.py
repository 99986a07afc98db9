"""What the page at / asks: the model's card, items by title, and answers with titles."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tfrs_pipeline.serving.batching import Batcher, SignatureModel
from tfrs_pipeline.serving.publish import ITEMS_FILE
from tfrs_pipeline.serving.rest import RequestError
from tfrs_pipeline.serving.versions import ServedVersion

PAGE_FILE = Path(__file__).with_name("page.html")
MAX_FOUND = 20
QUERY_KEYS = {"user_id", "items", "k"}

# One file without any request to elsewhere; its answers are shown as text, never as markup.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@cache
def page_html() -> str:
    """Reads the page."""
    return PAGE_FILE.read_text("utf-8")


class ItemSearch:
    """Finds items by a part of their title or id.

    Args:
        folder: Of a version, with the items' table in it.
    """

    def __init__(self, folder: Path) -> None:
        items = pq.read_table(folder / ITEMS_FILE)
        self._ids = items["item_id"].to_pylist()
        titles = items["title"].to_pylist() if "title" in items.column_names else None
        self.has_titles = titles is not None
        self._titles = titles or [None] * len(self._ids)
        self._row_of = {id_: row for row, id_ in enumerate(self._ids)}
        lines = [
            " ".join(f"{title or ''} {id_}".casefold().split())
            for id_, title in zip(self._ids, self._titles, strict=True)
        ]
        # One text, searched by `find`: a million titles take milliseconds.
        self._text = "\n".join(lines) + "\n"
        self._ends = np.cumsum([len(line) + 1 for line in lines])

    def title(self, id_: Any) -> str | None:
        """Looks up an item's title; None if there is none."""
        row = self._row_of.get(id_)
        return None if row is None else self._titles[row]

    def find(self, words: str, limit: int = MAX_FOUND) -> list[dict[str, Any]]:
        """Finds the first items, in the order of the corpus, whose title or id holds `words`."""
        part = " ".join(words.casefold().split())
        found: list[dict[str, Any]] = []
        place = self._text.find(part) if part else -1
        while place >= 0 and len(found) < limit:
            row = int(np.searchsorted(self._ends, place, side="right"))
            found.append({"item_id": self._ids[row], "title": self._titles[row]})
            place = self._text.find(part, int(self._ends[row]))
        return found


def card(version: ServedVersion, name: str, items: ItemSearch) -> dict[str, Any]:
    """Describes the model for the page."""
    manifest = version.manifest
    return {
        "name": name,
        "version": version.number,
        "index": manifest["index"],
        "num_candidates": version.index.retriever.num_candidates,
        "has_titles": items.has_titles,
        "example_user": manifest.get("example_user"),
        "can_compare": version.exact is not None and version.exact is not version.index,
    }


async def answer(
    document: dict[str, Any],
    version: ServedVersion,
    items: ItemSearch,
    batcher: Batcher,
    *,
    max_k: int,
    max_history: int,
) -> dict[str, Any]:
    """Answers a query of the page by the index and, where there is one beside it, exactly.

    Args:
        document: `{"user_id": text, "k": 10}`, by the stored history, or `{"items": [ids], "k":
            10}`, by these as the history, which are left out of the answer.
        version: To ask.
        items: Its items.
        batcher: Calls it.
        max_k: Largest k.
        max_history: Most items.

    Raises:
        RequestError: If the query is not of that form.
    """
    signature, inputs = _inputs(document, version, max_k=max_k, max_history=max_history)
    exact = version.exact if version.exact is not version.index else None
    found = await _asked(version.index, signature, inputs, items, batcher)
    reference = await _asked(exact, signature, inputs, items, batcher) if exact else None
    result: dict[str, Any] = {"version": version.number, "index": found, "exact": reference}
    if reference is not None:
        ids = [{item["item_id"] for item in side["items"]} for side in (found, reference)]
        result["num_common"] = len(ids[0] & ids[1])
    return result


def _inputs(
    document: dict[str, Any], version: ServedVersion, *, max_k: int, max_history: int
) -> tuple[str, dict[str, np.ndarray]]:
    if unknown := set(document) - QUERY_KEYS:
        raise RequestError(400, f"Unknown keys {sorted(unknown)}; a query has {QUERY_KEYS}.")
    if ("user_id" in document) == ("items" in document):
        raise RequestError(400, "A query has either 'user_id' or 'items'.")
    k = document.get("k", 10)
    if type(k) is not int or not 1 <= k <= max_k:
        raise RequestError(400, f"k must be a whole number from 1 to {max_k}. Got: {k!r:.40}")
    k_array = np.array(k, np.int32)
    specs = version.signatures["retrieve"]
    if "user_id" in document:
        users = _ids([document["user_id"]], specs["user_id"].dtype, "user")
        nothing = _ids([], specs["history"].dtype, "item").reshape(1, 0)
        return "retrieve_user", {"user_id": users, "exclude": nothing, "k": k_array}
    items = document["items"]
    if not isinstance(items, list) or not 1 <= len(items) <= max_history:
        raise RequestError(400, f"items must be a list of 1 to {max_history} item ids.")
    history = _ids(items, specs["history"].dtype, "item").reshape(1, -1)
    nobody = _ids(["-1" if specs["user_id"].dtype == "int64" else ""], specs["user_id"].dtype, "")
    return "retrieve", {"user_id": nobody, "history": history, "exclude": history, "k": k_array}


def _ids(values: list[Any], dtype: str, what: str) -> np.ndarray:
    """Turns ids, typed as text or as they are, into the model's type."""
    array = np.empty(len(values), object)
    for i, value in enumerate(values):
        if type(value) not in (int, str):
            raise RequestError(400, f"A {what} id is text or a whole number. Got: {value!r:.40}")
        try:
            array[i] = str(value).encode() if dtype == "string" else int(value)
        except ValueError:
            kind = "text in UTF-8" if dtype == "string" else "integers"
            raise RequestError(
                400, f"This model's {what} ids are {kind}. Got: {value!a:.40}"
            ) from None
    if dtype == "string":
        return array
    try:
        return array.astype(dtype)
    except OverflowError:
        raise RequestError(400, f"A {what} id must be an {dtype}.") from None


async def _asked(
    model: SignatureModel,
    signature: str,
    inputs: dict[str, np.ndarray],
    items: ItemSearch,
    batcher: Batcher,
) -> dict[str, Any]:
    start = time.perf_counter()
    outputs = await batcher.call(model, signature, inputs)
    milliseconds = 1000 * (time.perf_counter() - start)
    ids = outputs["candidate_ids"][0].tolist()
    ids = [id_.decode() if isinstance(id_, bytes) else id_ for id_ in ids]
    return {
        "is_known_user": bool(outputs["is_known_user"][0]),
        "latency_ms": round(milliseconds, 3),
        "items": [
            {"item_id": id_, "title": items.title(id_), "score": float(f"{score:.6g}")}
            for id_, score in zip(ids, outputs["scores"][0].tolist(), strict=True)
            if score > -np.inf
        ],
    }
