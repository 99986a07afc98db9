"""What the page at / asks: the model's card, items by title, and answers with titles."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, FailFast, Field, StrictInt, StrictStr, ValidationError
from starlette.exceptions import HTTPException

from tfrs_pipeline.serving.rest import refusal
from tfrs_pipeline.serving.retriever import LoadedRetriever
from tfrs_pipeline.serving.settings import ServeSettings
from tfrs_pipeline.serving.versions import ServedVersion

PAGE_FILE = Path(__file__).with_name("page.html")
MAX_FOUND = 20

# One file without any request to elsewhere; its answers are shown as text, never as markup.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class PageQuery(BaseModel):
    """A query of the page: by a user's stored history, or by items as the history.

    The items are excluded from the answer.
    """

    user_id: StrictInt | StrictStr | None = None
    items: Annotated[list[StrictInt | StrictStr], FailFast()] = []
    k: StrictInt = Field(10, ge=1)


def card(version: ServedVersion) -> dict[str, Any]:
    """Describes the model for the page."""
    manifest = version.retriever.manifest
    return {
        "name": version.retriever.folder.parent.name,
        "version": version.number,
        "index": manifest["index"],
        "num_candidates": len(version.titles),
        "has_titles": any(version.titles.values()),
        "example_user": manifest.get("example_user"),
        "can_compare": version.exact not in (None, version.retriever),
    }


def find(version: ServedVersion, words: str) -> list[dict[str, Any]]:
    """Finds the first items, in the order of the corpus, whose title or id holds `words`."""
    part = " ".join(words.casefold().split())
    ids = (id_ for id_, line in version.search_lines.items() if part and part in line)
    found = itertools.islice(ids, MAX_FOUND)
    return [{"item_id": id_, "title": version.titles[id_]} for id_ in found]


def answer(version: ServedVersion, body: bytes, limits: ServeSettings) -> dict[str, Any]:
    """Answers a `PageQuery` by the index and, where there is one beside it, exactly.

    Raises:
        HTTPException: 400, if it is no such query, beyond a limit, or has an id that is no integer
            where the model's are.
    """
    try:
        query = PageQuery.model_validate_json(body)
    except ValidationError as error:
        raise refusal(error) from None
    if (query.user_id is None) == (not query.items):
        raise HTTPException(400, "A query has either 'user_id' or 'items'.")
    if query.k > limits.max_k or len(query.items) > limits.max_history:
        raise HTTPException(
            400,
            f"At most k {limits.max_k} and {limits.max_history} items. Received: k {query.k}, "
            f"{len(query.items)} items",
        )
    found = _asked(version.retriever, query, version.titles)
    result: dict[str, Any] = {"version": version.number, "index": found, "exact": None}
    if version.exact not in (None, version.retriever):
        result["exact"] = reference = _asked(version.exact, query, version.titles)
        ids = [{item["item_id"] for item in side["items"]} for side in (found, reference)]
        result["num_common"] = len(ids[0] & ids[1])
    return result


def _asked(
    retriever: LoadedRetriever, query: PageQuery, titles: Mapping[Any, str | None]
) -> dict[str, Any]:
    try:
        if query.user_id is not None and not retriever.manifest.get("user_data", True):
            raise ValueError("This model was exported without user data: pick items instead.")
        user = None if query.user_id is None else retriever.parse_user_id(str(query.user_id))
        history = [retriever.parse_item_id(str(item)) for item in query.items]
    except ValueError as error:
        raise HTTPException(400, str(error)) from None
    # The first call of its kind pays for what later ones find ready: the second is timed.
    for _ in range(2):
        start = time.perf_counter()
        if user is not None:
            ids, scores, is_known = retriever.retrieve_user([user], query.k)
        else:
            ids, scores = retriever.retrieve([{"history": history}], query.k, [history])
        milliseconds = 1000 * (time.perf_counter() - start)
    return {
        "is_known_user": user is None or bool(is_known[0]),
        "latency_ms": round(milliseconds, 3),
        "items": [
            {"item_id": id_, "title": titles[id_], "score": float(f"{score:.6g}")}
            for id_, score in zip(ids[0].tolist(), scores[0].tolist(), strict=True)
            if score > -np.inf
        ],
    }
