"""What is a user's own in a model, kinds of negative and towers, and how it is told from other."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from tfrs_pipeline.negatives.in_batch import InBatch
from tfrs_pipeline.negatives.popularity import Popularity
from tfrs_pipeline.negatives.protocol import Negatives, SamplingFrame
from tfrs_pipeline.negatives.uniform import Uniform

BUILT_IN = (InBatch, Uniform, Popularity)


def is_own(kind: object) -> bool:
    """Whether this is a kind of negative that no setting can say."""
    return hasattr(kind, "draw") and not isinstance(kind, BUILT_IN)


def describe_own(
    negatives: Sequence[Negatives], towers: Mapping[str, object], frame: SamplingFrame
) -> dict[str, Any]:
    """Describes the own parts of a model, JSON-able: other code or other numbers, other text.

    Of code its own lines alone, not what they call.
    """
    own = [kind for kind in negatives if is_own(kind)]
    counts = [_hash(kind.expected_count(frame).tobytes()) for kind in own]
    return {
        "own_negatives": [
            f"{_code(kind)} {count}" for kind, count in zip(own, counts, strict=True)
        ],
        **{name: tower and f"{_code(tower)}{_numbers(tower)}" for name, tower in towers.items()},
    }


def _code(thing: Any) -> str:
    of = thing if inspect.isfunction(thing) else type(thing)
    try:
        source = inspect.getsource(of)
    except (OSError, TypeError):  # Typed at a prompt, or compiled.
        source = ""
    return f"{of.__qualname__} {_hash(source.encode())}"


def _numbers(tower: Any) -> str:
    """Lists the numbers that a layer was made with, as far as it says them."""
    try:
        config = tower.get_config()
    except (AttributeError, NotImplementedError):  # A function, or a layer that does not say.
        return ""
    told = {name: x for name, x in config.items() if isinstance(x, int | float | tuple | list)}
    return f" {told}"


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
