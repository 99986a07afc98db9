"""A user's own kinds of negative and towers: how they are recognized and described."""

import functools
import hashlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from tfrs_pipeline.model.corpus import Corpus
from tfrs_pipeline.model.settings import EASY_KINDS
from tfrs_pipeline.negatives.kinds import Negatives, SamplingFrame
from tfrs_pipeline.negatives.mixture import checked_count

# Layers that were trained: their initial weights are lost.
_TRAINED: weakref.WeakSet[tf.Module] = weakref.WeakSet()


def is_own(kind: object) -> bool:
    """Returns whether this is a kind of negative that settings cannot hold, such as a subclass."""
    return hasattr(kind, "draw") and type(kind) not in EASY_KINDS


def own_or_setting(kind: Any, read: Callable[[Any], Any]) -> Any:
    """Keeps an own kind of negative, and reads a setting; refuses (`ValueError`) anything else."""
    if isinstance(kind, str | Mapping) or type(kind) in EASY_KINDS:
        return read(kind)
    has_both = all(callable(getattr(kind, x, None)) for x in ("draw", "expected_count"))
    if isinstance(kind, type) or not has_both:
        problem = "a class: give an object of it" if isinstance(kind, type) else "not a kind"
        raise ValueError(
            f"is {problem}. Own negatives have the methods draw and expected_count (tp.Negatives); "
            "losers of the funnel are given as hard"
        )
    return kind


def mark_trained(*towers: tf.keras.layers.Layer) -> None:
    """Remembers that towers, with all layers within them, are trained."""
    _TRAINED.update(_parts(*towers))


def own_layer(name: str, own: Any, corpus: Corpus) -> tf.keras.layers.Layer:
    """Returns an own tower, or what its function makes from the corpus."""
    # A layer of another Keras is callable too, but it has a `call`.
    is_made = not isinstance(own, type) and hasattr(own, "call")
    layer = own if is_made else own(corpus)
    if not isinstance(layer, tf.keras.layers.Layer):
        raise TypeError(
            f"{name} must be a layer of tf.keras, which is Keras 2 here, or a function of the "
            f"corpus that returns one. Received: {layer!r}{'' if is_made else f', from {own!r}'}."
        )
    # A part that is frozen or has no weights to train does not change, so it may be reused.
    trained = (part for part in _parts(layer) if part in _TRAINED)
    part = next((part for part in trained if getattr(part, "trainable_variables", ())), None)
    if part is not None:
        inner = "" if part is layer else f", or rather its {part!r},"
        raise ValueError(
            f"{name} {layer!r}{inner} was given to a training before: this one would continue it "
            "and change that model. Give a new model new layers, or a function of the corpus that "
            "makes them; a frozen layer (trainable=False) may be shared."
        )
    return layer


def tables_in(*towers: tf.keras.layers.Layer) -> list[Any]:
    """Lists the lookup tables in towers, such as those of StringLookup layers."""
    kind = tf.saved_model.experimental.TrackableResource
    # Also looks in lists and dicts, because Keras's own tracking skips tables.
    return [
        table
        for part in _parts(*towers)
        for table in part._flatten(False, lambda value: isinstance(value, kind))
    ]


def _parts(*towers: tf.keras.layers.Layer) -> Iterator[tf.Module]:
    for tower in towers:
        yield from (tower, *tower.submodules)


def describe_own(
    negatives: Sequence[Negatives], towers: Mapping[str, object], frame: SamplingFrame
) -> dict[str, Any]:
    """Describes the own parts of a model, as JSON that changes with their code and numbers."""
    # The source of each part itself, not of the functions that it calls.
    about: dict[str, Any] = {
        name: None if tower is None else f"{_code(tower)} {_config(tower)}"
        for name, tower in towers.items()
    }
    own = (kind for kind in negatives if is_own(kind))
    counts = [f"{_code(kind)} {_hash(checked_count(kind, frame).tobytes())}" for kind in own]
    return {"own_negatives": counts, **about}


def _code(thing: Any) -> str:
    if isinstance(thing, functools.partial):
        return f"{_code(thing.func)} {_plain([thing.args, thing.keywords])}"
    if inspect.ismethod(thing):
        thing = thing.__func__
    of = thing if inspect.isfunction(thing) or inspect.isclass(thing) else type(thing)
    try:
        source = inspect.getsource(of)
    except (OSError, TypeError):  # Typed at a prompt, or compiled code.
        source = ""
    return f"{of.__qualname__} {_hash(source.encode())}"


def _config(tower: Any) -> Any:
    """Returns the settings of a layer, as far as it has a `get_config`."""
    try:
        return _plain(tower.get_config())
    except (AttributeError, NotImplementedError, TypeError):  # Not a layer, or without a config.
        return ""


def _plain(value: Any) -> Any:
    """Leaves out what differs between objects of the same settings: names and addresses."""
    if isinstance(value, Mapping):
        return {key: _plain(x) for key, x in value.items() if key != "name"}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return value if isinstance(value, str | int | float | None) else type(value).__name__


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
