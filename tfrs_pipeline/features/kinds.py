"""The kinds of features."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from tfrs_pipeline.messages import suggest

FeatureKind: TypeAlias = Literal[
    "categorical",
    "hashed",
    "multi_categorical",
    "text",
    "numeric",
    "bucketized",
    "timestamp",
    "vector",
]
# What others call them.
_KINDS_ELSEWHERE: dict[str, FeatureKind] = {
    **dict.fromkeys(("number", "float", "double", "integer", "int", "real"), "numeric"),
    **dict.fromkeys(
        ("category", "string", "str", "object", "enum", "id", "boolean", "bool"), "categorical"
    ),
    **dict.fromkeys(("list", "array", "set", "tags", "categories"), "multi_categorical"),
    **dict.fromkeys(("time", "date", "datetime"), "timestamp"),
    **dict.fromkeys(("embedding", "floats"), "vector"),
}


def kind_problem(kind: object) -> str:
    """Says what is meant by what is no kind of feature; "" if it is one."""
    known = get_args(FeatureKind)
    if kind in known:
        return ""
    meant = _KINDS_ELSEWHERE.get(str(kind).lower())
    hint = f"did you mean {meant!r}?" if meant else suggest(str(kind), known)
    return f"no kind of feature; {hint}"
