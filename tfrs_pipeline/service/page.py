"""Answers the requests of the page at /: the model's card, items by title, queries."""

import itertools
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, FailFast, Field, StrictInt, StrictStr, TypeAdapter
from pydantic_core import to_json, to_jsonable_python

from tfrs_pipeline.answers.retriever import LoadedRetriever
from tfrs_pipeline.answers.signatures import FILTERED, SIMILAR
from tfrs_pipeline.features.encoding import parse_request
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.numeric import Timestamp
from tfrs_pipeline.service import rest
from tfrs_pipeline.service.versions import ServedVersion

PAGE_FILE = Path(__file__).with_name("page.html")
# What fits the page; a longer list of choices would be slow to open.
MAX_FOUND = 20
MAX_HISTORY_SHOWN = 10
MAX_CHOICES = 500
NUM_EXAMPLE_ITEMS = 3

# The page is one file that loads nothing else. It shows answers as text, never as markup.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


class PageQuery(BaseModel):
    """A query of the page: a user's stored history, items and features as typed, or one item."""

    similar_to: StrictInt | StrictStr | None = None
    user_id: StrictInt | StrictStr | None = None
    items: Annotated[list[StrictInt | StrictStr], FailFast()] = []
    features: dict[str, StrictStr] = {}
    filter: Annotated[list[StrictStr], FailFast()] = []
    request: dict[str, StrictStr] = {}
    k: StrictInt = Field(10, ge=1)


_QUERY = TypeAdapter(PageQuery)


def card(version: ServedVersion) -> dict[str, Any]:
    """Describes the model for the page, with an example query."""
    retriever = version.retriever
    manifest = retriever.manifest
    # For a query without a history: what the model takes to be popular.
    ids, _ = retriever.retrieve([{}], NUM_EXAMPLE_ITEMS)
    values = retriever.candidates.values
    examples = {feature.name: feature.example for feature in retriever.features["request"]}
    return {
        "name": retriever.folder.parent.name,
        "version": version.number,
        "index": manifest["index"],
        "num_candidates": retriever.num_candidates,
        "has_titles": any(version.titles.values()),
        "ids_are_text": retriever.stored.items.are_text,
        "has_users": manifest["user_data"],
        "example_user": manifest["example_user"],
        "example_items": _shown(version, [id_ for id_ in ids[0].tolist() if id_ not in (-1, "")]),
        "filter": {
            "name": retriever.item_filter and retriever.item_filter["name"],
            "values": [] if values is None else sorted(values.code_of)[:MAX_CHOICES],
        },
        "inputs": [
            {"name": feature.name, "example": feature.example, "values": _choices(feature)}
            for feature in retriever.features["query"]
        ],
        "request": [
            {"name": name, "example": examples.get(name, Timestamp.example), "values": []}
            for name in manifest["feature_inputs"]["request"]
        ],
    }


def _choices(feature: Feature) -> list[str]:
    has_few_choices = feature.raw_shape == () and len(feature.vocabulary) <= MAX_CHOICES
    return list(feature.vocabulary) if has_few_choices and feature.holds_categories else []


def _shown(version: ServedVersion, ids: Iterable[Any]) -> list[dict[str, Any]]:
    return [{"item_id": id_, "title": version.title_of(id_)} for id_ in ids]


def find(version: ServedVersion, words: str) -> list[dict[str, Any]]:
    """Finds the first items, in the order of the corpus, whose title or id contains `words`."""
    part, retriever = " ".join(words.casefold().split()), version.retriever
    titles = {**version.titles, **retriever.live.titles}
    ids = (
        id_ for id_, title in titles.items() if part and part in f"{title or ''} {id_}".casefold()
    )
    # A removed item keeps its title until the next version.
    listed = (id_ for id_ in ids if retriever.candidates.has([id_])[0])
    return _shown(version, itertools.islice(listed, MAX_FOUND))


def answer(version: ServedVersion, body: bytes) -> dict[str, Any]:
    """Answers a `PageQuery` with the index and, if it is approximate, with exact search too."""
    query = rest.checked(_QUERY, rest.read_json(body))
    # Items and features go together, and are absent if both are empty.
    subjects = query.user_id, query.similar_to, query.items or query.features or None
    if sum(subject is not None for subject in subjects) != 1:
        raise rest.bad_request("A query has 'user_id', or 'similar_to', or 'items' or 'features'.")
    with rest.refusing():
        request = to_json(request_of(version.retriever, query), inf_nan_mode="null")
        # The page shows this request as a curl command, so it is read as one, within the limits.
        call = rest.parse_predict(request, version.signatures)
    retriever = version.retriever
    answered = _timed(version, call)
    path = f"/v1/models/{retriever.folder.parent.name}"
    result: dict[str, Any] = {"version": version.number, "index": answered, "exact": None}
    result["request"] = {"path": f"{path}:predict", "body": request.decode()}
    if query.similar_to is None and not query.features:
        # Without the item: the page adds it, and asks why it is in this answer.
        asked = to_json(explain_call(retriever, query)).decode()
        result["explain"] = {"path": f"{path}:explain", "body": asked}
    if query.user_id is not None:
        user_id = retriever.stored.parse_id(str(query.user_id), "user")
        history = retriever.users.history(user_id)
        shown = _shown(version, history[:MAX_HISTORY_SHOWN])
        result["history"] = {"items": shown, "length": len(history)}
    if retriever.manifest["index"]["kind"] == "scann":
        result["exact"] = reference = _timed(version, call, exact=True)
        ids = [{item["item_id"] for item in side["items"]} for side in (answered, reference)]
        result["num_common"] = len(ids[0] & ids[1])
    return result


def request_of(retriever: LoadedRetriever, query: PageQuery) -> dict[str, Any]:
    """Makes the predict call for a query."""
    parse_id = retriever.stored.parse_id
    history = [parse_id(str(item)) for item in query.items]
    if query.similar_to is not None:
        name, inputs = SIMILAR, {"item_id": [parse_id(str(query.similar_to))]}
    elif query.user_id is not None:
        if not retriever.manifest["user_data"]:
            raise ValueError("This model was exported without user data: pick items instead.")
        name, inputs = "retrieve_user", {"user_id": [parse_id(str(query.user_id), "user")]}
    else:
        name = "retrieve_with_features" if query.features else "retrieve"
        inputs = {"user_id": ["" if retriever.stored.users.are_text else -1], "history": [history]}
    inputs["exclude"] = [history]
    if name != SIMILAR:
        known = {feature.name: feature for feature in retriever.features["query"]}
        features = {
            name: known[name].parse(text) if name in known else text
            for name, text in query.features.items()
        }
        request = parse_request(retriever.features["request"], query.request)
        read = retriever.inputs.read([{"features": features or None, "request": request}])
        brought = [*retriever.inputs.user_signature.values()] if features else []
        brought += retriever.inputs.request_signature.values() if request else []
        inputs |= {spec.name: read[spec.name].tolist() for spec in brought}
    if query.filter:
        inputs["allowed"] = [query.filter]
        name += FILTERED
    return {"signature_name": name, "inputs": {**inputs, "k": query.k}}


def explain_call(retriever: LoadedRetriever, query: PageQuery) -> dict[str, Any]:
    """Makes the explain call for an answer to a user or to items, but for its `item_id`."""
    parse_id = retriever.stored.parse_id
    history = [parse_id(str(item)) for item in query.items]
    whom = {"history": history} if query.user_id is None else {}
    if query.user_id is not None:
        whom = {"user_id": parse_id(str(query.user_id), "user")}
    common = {"exclude": history, "allowed": query.filter, "k": query.k}
    return {**whom, **common, "request": query.request}


def _timed(
    version: ServedVersion, call: rest.PredictCall, *, exact: bool = False
) -> dict[str, Any]:
    # The first call is a warm-up; the second is timed.
    for _ in range(2):
        start = time.perf_counter()
        outputs = version.call(call.signature, call.inputs, exact=exact)
        milliseconds = 1000 * (time.perf_counter() - start)
    ids = to_jsonable_python(outputs["candidate_ids"][0].tolist())
    return {
        "is_known_user": bool(outputs.get("is_known_user", [False])[0]),
        "latency_ms": round(milliseconds, 3),
        "items": [
            {"item_id": id_, "title": version.title_of(id_), "score": float(f"{score:.6g}")}
            for id_, score in zip(ids, outputs["scores"][0].tolist(), strict=True)
            if score > -np.inf
        ],
    }
