"""The kinds of features, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tfrs_pipeline.features.bucketized import Bucketized
from tfrs_pipeline.features.categorical import Categorical
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.hashed import Hashed
from tfrs_pipeline.features.multi_categorical import MultiCategorical
from tfrs_pipeline.features.numeric import Numeric
from tfrs_pipeline.features.text import Text
from tfrs_pipeline.features.timestamp import Timestamp
from tfrs_pipeline.features.vector import Vector
from tfrs_pipeline.messages import suggest

KINDS: dict[str, type[Feature]] = {
    cls.kind: cls
    for cls in (
        *(Categorical, Hashed, MultiCategorical, Text),
        *(Numeric, Bucketized, Timestamp, Vector),
    )
}
"""The kinds that settings can name. Add your own before you use it, in every process."""


def kind_problem(kind: object) -> str:
    """Says what is meant by what is not a kind of feature; "" if it is one."""
    if isinstance(kind, str) and kind in KINDS:
        return ""
    name = str(kind).lower()
    meant = [known for known, cls in KINDS.items() if name in cls.names_elsewhere]
    hint = f"did you mean {meant[0]!r}?" if meant else suggest(str(kind), KINDS)
    return f"no kind of feature; {hint}"


def feature_from_dict(settings: Mapping[str, Any]) -> Feature:
    """Restores the feature whose `to_dict` returned these settings, also after JSON.

    A `ValueError` if the kind is unknown, or a key is missing or unknown.
    """
    known = KINDS.get(settings.get("kind", ""))
    if known is None:
        raise ValueError(
            f"The kind of feature {settings.get('name')!r} must be one of {', '.join(KINDS)}. "
            f"Received: {settings.get('kind')!r}. Add a kind of your own to KINDS first."
        )
    names = {"kind", *(field.name for field in dataclasses.fields(known))}
    if not {"name"} <= set(settings) <= names:
        raise ValueError(
            f"A {known.kind} feature has a name, and may have others of {', '.join(sorted(names))}."
            f" Received: {', '.join(settings)}."
        )
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()
    }
    del values["kind"]
    return known(**values)
