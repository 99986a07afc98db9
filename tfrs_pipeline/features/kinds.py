"""The kinds of features, by name."""

from collections.abc import Mapping
from typing import Any

from tfrs_pipeline.features.categorical import Categorical, MultiCategorical, Text
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.numeric import Bucketized, Numeric, Timestamp, Vector
from tfrs_pipeline.messages import suggest_part

KINDS: dict[str, type[Feature]] = {
    cls.kind: cls
    for cls in (
        Categorical,
        MultiCategorical,
        Text,
        Numeric,
        Bucketized,
        Timestamp,
        Vector,
    )
}
"""The kinds that settings can name. Add your own before you use it, in every process."""


def features_of(manifest: Mapping[str, Any]) -> dict[str, tuple[Feature, ...]]:
    """Reads the features of query, request and candidate from a model's manifest."""
    return {
        side: tuple(map(feature_from_dict, manifest.get("features", {}).get(side, ())))
        for side in ("query", "request", "candidate")
    }


def kind_problem(kind: object) -> str:
    """Describes an unknown kind and suggests the meant one; "" if it is known."""
    is_known = isinstance(kind, str) and kind in KINDS
    return "" if is_known else f"no kind of feature; {suggest_part(str(kind), KINDS)}"


def feature_from_dict(settings: Mapping[str, Any]) -> Feature:
    """Restores the feature whose `to_dict` returned these settings, also after JSON."""
    known = KINDS.get(settings.get("kind", ""))
    if known is None:
        raise ValueError(
            f"The kind of feature {settings.get('name')!r} must be one of {', '.join(KINDS)}. "
            f"Received: {settings.get('kind')!r}. Add a kind of your own to KINDS first."
        )
    # JSON has no tuples, and the fields of a frozen dataclass are hashable.
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    del values["kind"]
    return known(**values)
