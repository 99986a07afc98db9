"""What is a user's own in a model, kinds of negative and towers, and how it is told from other."""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from tfrs_pipeline.model.corpus import Corpus
from tfrs_pipeline.model.settings import EASY_KINDS
from tfrs_pipeline.negatives.mixture import checked_count
from tfrs_pipeline.negatives.protocol import Negatives, SamplingFrame

# Layers that a training has had: there is no way back to what they were before.
_TRAINED: weakref.WeakSet[tf.Module] = weakref.WeakSet()


def is_own(kind: object) -> bool:
    """Whether this is a kind of negative that no setting can say, such as a subclass of one."""
    return hasattr(kind, "draw") and type(kind) not in EASY_KINDS


def mark_trained(*towers: tf.keras.layers.Layer) -> None:
    """Remembers that a training has towers, with all layers within them."""
    _TRAINED.update(_parts(*towers))


def own_layer(name: str, own: Any, corpus: Corpus) -> tf.keras.layers.Layer:
    """Returns an own tower, or what a function makes of the corpus; a `TypeError` if no layer."""
    # A layer of another Keras is callable, but no function of the corpus: it has a `call`.
    is_made = not isinstance(own, type) and hasattr(own, "call")
    layer = own if is_made else own(corpus)
    if not isinstance(layer, tf.keras.layers.Layer):
        raise TypeError(
            f"{name} must be a layer of tf.keras, which is Keras 2 here, or a function of the "
            f"corpus that returns one. Received: {layer!r}{'' if is_made else f', from {own!r}'}."
        )
    part = _trained_part(layer)
    if part is not None:
        inner = "" if part is layer else f", or rather its {part!r},"
        raise ValueError(
            f"{name} {layer!r}{inner} was given to a training before, which would go on here "
            "instead of beginning, and change that model. Give new layers to a new model, or a "
            "function of the corpus that makes them; a frozen layer (trainable=False) may be "
            "shared."
        )
    return layer


def _trained_part(tower: tf.keras.layers.Layer) -> tf.Module | None:
    """Returns the tower, or a layer in it, if a training has had it and another would change it.

    What has no weights to train, or is frozen, neither changes nor goes on.
    """
    parts = (part for part in _parts(tower) if part in _TRAINED)
    return next((part for part in parts if getattr(part, "trainable_variables", ())), None)


def tables_in(*towers: tf.keras.layers.Layer) -> list[Any]:
    """Lists the lookup tables in towers, as a layer StringLookup has."""
    kind = tf.saved_model.experimental.TrackableResource
    # Of all that a module holds, in lists and dicts too; Keras' own lists of it pass over tables.
    found = (
        part._flatten(False, lambda value: isinstance(value, kind)) for part in _parts(*towers)
    )
    return list(itertools.chain.from_iterable(found))


def _parts(*towers: tf.keras.layers.Layer) -> Iterator[tf.Module]:
    """Yields towers and all layers within them."""
    for tower in towers:
        yield from (tower, *tower.submodules)


def describe_own(
    negatives: Sequence[Negatives], towers: Mapping[str, object], frame: SamplingFrame
) -> dict[str, Any]:
    """Describes the own parts of a model, JSON-able: other code or other numbers, other text.

    Of code its own lines alone, not what they call.
    """
    own = [kind for kind in negatives if is_own(kind)]
    return {
        "own_negatives": [
            f"{_code(kind)} {_hash(checked_count(kind, frame).tobytes())}" for kind in own
        ],
        **{
            name: None if tower is None else f"{_code(tower)} {_config(tower)}"
            for name, tower in towers.items()
        },
    }


def _code(thing: Any) -> str:
    if isinstance(thing, functools.partial):
        return f"{_code(thing.func)} {_plain([thing.args, thing.keywords])}"
    if inspect.ismethod(thing):
        thing = thing.__func__
    of = thing if inspect.isfunction(thing) or inspect.isclass(thing) else type(thing)
    try:
        source = inspect.getsource(of)
    except (OSError, TypeError):  # Typed at a prompt, or compiled.
        source = ""
    return f"{of.__qualname__} {_hash(source.encode())}"


def _config(tower: Any) -> Any:
    """Returns what a layer was made with, as far as it says."""
    if inspect.isclass(tower):  # Called with the corpus, as a function is.
        return ""
    try:
        return _plain(tower.get_config())
    except (AttributeError, NotImplementedError):  # A function, or a layer that does not say.
        return ""


def _plain(value: Any) -> Any:
    """Leaves out what another object of the same settings has otherwise: names and addresses."""
    if isinstance(value, Mapping):
        return {key: _plain(x) for key, x in value.items() if key != "name"}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return value if isinstance(value, str | int | float | None) else type(value).__name__


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
