"""The signatures of a model: names, raw inputs, and missing values, without TensorFlow.

saved_models/README.md describes them. A SavedModel has those without a filter.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tfrs_pipeline.features.encoding import raw_signature
from tfrs_pipeline.features.feature import Spec
from tfrs_pipeline.search.queries import CANDIDATE_FEATURES, QueryInputs

# Signatures that retrieve, and those that embed their queries. These two embed by themselves:
# `similar` asks by the vectors of items, `also_taken` by the item graph, which no SavedModel does.
BY_ITEM = SIMILAR, ALSO_TAKEN = "similar", "also_taken"
RETRIEVALS = {
    "retrieve_user": "embed_user",
    "retrieve": "embed_query",
    "retrieve_with_features": "embed_query_with_features",
    SIMILAR: SIMILAR,
    ALSO_TAKEN: ALSO_TAKEN,
}
# The server also answers these names with a filter, for models that have one.
FILTERED = "_filtered"
# `retrieve_user` for a user id alone, with this k.
DEFAULT_SIGNATURE, DEFAULT_K = "serving_default", 100
# What a signature that retrieves takes besides the query, and which of these hold ids.
SEARCH_INPUTS = "exclude", "allowed", "k"


def signatures_of(inputs: QueryInputs, *, has_filter: bool) -> dict[str, dict[str, Spec]]:
    """Returns the raw inputs of all signatures of a model that holds users, by name."""
    id_dtype = inputs.signatures["embed_query"]["history"].dtype
    item_id = Spec((None,), id_dtype, "item_id")
    exclude, k = Spec((None, None), id_dtype, "exclude"), Spec((), "int32", "k")
    candidate = raw_signature(inputs.features[CANDIDATE_FEATURES]).values()
    embeds = {
        **inputs.signatures,
        "embed_candidate": {spec.name: spec for spec in (item_id, *candidate)},
    }
    signatures = dict(embeds)
    for name, embed in RETRIEVALS.items():
        if embed in BY_ITEM or embed in embeds:
            query = {"item_id": item_id} if embed in BY_ITEM else embeds[embed]
            signatures[name] = {**query, "exclude": exclude, "k": k}
            if has_filter:
                allowed = Spec((None, None), "string", "allowed")
                signatures[f"{name}{FILTERED}"] = signatures[name] | {"allowed": allowed}
    return signatures


def missing_value(dtype: str) -> Any:
    """Returns the missing value of a type: NaN, an empty text, or the empty id."""
    if dtype.startswith("float"):
        return np.nan
    return "" if dtype == "string" else -1


def numpy_type(dtype: str) -> Any:
    """Returns the type in which NumPy holds the values of an input."""
    return object if dtype == "string" else np.dtype(dtype)


def completed(
    specs: Mapping[str, Spec], known: Mapping[str, Any], num_rows: int
) -> dict[str, np.ndarray]:
    """Returns all inputs of a signature, in its order; absent ones are missing values, k is 1."""
    inputs = {}
    for name, spec in specs.items():
        if name in known:
            inputs[name] = np.asarray(known[name])
        elif not spec.shape:
            inputs[name] = np.array(1, spec.dtype)
        else:
            shape = [num_rows, *(size or 0 for size in spec.shape[1:])]
            inputs[name] = np.full(shape, missing_value(spec.dtype), numpy_type(spec.dtype))
    return inputs


def id_lists(ids: np.ndarray) -> list[list[Any]]:
    """Returns the ids in each row of [n, any] padded ids."""
    empty = -1 if ids.dtype.kind == "i" else ""
    return [[id_ for id_ in row if id_ != empty] for row in ids.tolist()]
