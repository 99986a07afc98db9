"""A user's own kinds of negative and towers: how they are recognized and described."""

import contextlib
import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from tfrs_pipeline.model.corpus import Corpus
from tfrs_pipeline.model.settings import EASY_KINDS


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


def own_layer(name: str, own: Any, corpus: Corpus) -> tf.keras.layers.Layer:
    """Returns an own tower, or what its function makes from the corpus.

    A layer that a training has marked is refused. Layers within it are not marked: not to share
    those between models is up to the user.
    """
    # A layer of another Keras is callable too, but it has a `call`.
    is_made = not isinstance(own, type) and hasattr(own, "call")
    layer = own if is_made else own(corpus)
    if not isinstance(layer, tf.keras.layers.Layer):
        raise TypeError(
            f"{name} must be a layer of tf.keras, which is Keras 2 here, or a function of the "
            f"corpus that returns one. Received: {layer!r}{'' if is_made else f', from {own!r}'}."
        )
    if getattr(layer, "was_in_training", False) and layer.trainable_variables:
        raise ValueError(
            f"{name} {layer!r} was given to a training before: this one would continue it and "
            "change that model. Give a new model a new layer, or a function of the corpus that "
            "makes one; a frozen layer (trainable=False) may be shared."
        )
    return layer


def tables_in(*towers: tf.keras.layers.Layer) -> list[Any]:
    """Lists the lookup tables in towers, such as those of StringLookup layers."""
    kind = tf.saved_model.experimental.TrackableResource
    # Also looks in lists and dicts, because Keras's own tracking skips tables.
    return [
        table
        for tower in towers
        for part in (tower, *tower.submodules)
        for table in part._flatten(False, lambda value: isinstance(value, kind))
    ]


def describe_own(part: Any) -> str | None:
    """Describes an own part by its name and its plain settings; None is none.

    The settings are a layer's `get_config`, or another object's attributes. Code and the contents
    of arrays are not compared: who changes them must not resume the trainings of before.

    Example:
        >>> describe_own(functools.partial(max, 3)), describe_own(Corpus.read)
        ('["partial", ["max", [3], {}]]', 'Corpus.read')
    """
    if part is None or hasattr(part, "__qualname__"):  # A function, a method or a class.
        return part and str(part.__qualname__)
    settings: Any = None
    if isinstance(part, functools.partial):
        settings = describe_own(part.func), part.args, part.keywords
    elif not hasattr(part, "get_config"):
        settings = getattr(part, "__dict__", None)
    else:
        with contextlib.suppress(NotImplementedError):  # Keras's, for some layers without one.
            settings = part.get_config()
    content = [type(part).__qualname__, settings]
    text = json.dumps(content, skipkeys=True, default=lambda x: type(x).__name__)
    return re.sub(r'"name": "[^"]*"', "", text)  # Keras numbers the names of layers.
