"""Custom kinds of negatives and towers, a user's own: recognizes, checks and names them."""

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf
from pydantic import WrapValidator

from tfrs_pipeline.model.corpus import Corpus
from tfrs_pipeline.negatives.samplers import SETTING_KINDS


def is_custom(kind: object) -> bool:
    """Returns whether this is a kind of negatives that settings cannot hold, such as a subclass."""
    return kind is not None and type(kind) not in SETTING_KINDS


def custom_or_setting(*attributes: str) -> WrapValidator:
    """Makes a validator that keeps a user's own kind with these attributes, and reads settings.

    It refuses (`ValueError`) anything else.
    """

    def validate(kind: Any, read: Callable[[Any], Any]) -> Any:
        if isinstance(kind, str | Mapping) or not is_custom(kind):
            return read(kind)
        if isinstance(kind, type):
            raise ValueError("is a class: give an object of it")
        if missing := [name for name in attributes if not hasattr(kind, name)]:
            raise ValueError(
                f"is not a kind: it has no {missing[0]}. A kind here has {', '.join(attributes)}; "
                "easy ones (tp.Negatives) are given as negatives, hard ones (tp.HardNegatives) as "
                "hard"
            )
        return kind

    return WrapValidator(validate)


def name_of(part: Any) -> str | None:
    """Names a custom part, or its class: a folder's trainings are compared by this name.

    Example:
        >>> name_of(tf.keras.layers.Dense(3)), name_of(Corpus.read), name_of(None)
        ('Dense', 'Corpus.read', None)
    """
    return None if part is None else getattr(part, "__qualname__", type(part).__qualname__)


def own_layer(name: str, tower: Any, corpus: Corpus) -> tf.keras.layers.Layer:
    """Returns a custom tower, or the layer that its function makes from the corpus.

    A layer that a training has marked is refused. Layers within it are not marked: not to share
    those between models is up to the user.
    """
    # A layer of another Keras is callable too, but it has a `call`.
    is_layer = not isinstance(tower, type) and hasattr(tower, "call")
    layer = tower if is_layer else tower(corpus)
    if not isinstance(layer, tf.keras.layers.Layer):
        raise TypeError(
            f"{name} must be a layer of tf.keras, which is Keras 2 here, or a function of the "
            f"corpus that returns one. Received: {layer!r}"
            f"{'' if is_layer else f', from {tower!r}'}."
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
