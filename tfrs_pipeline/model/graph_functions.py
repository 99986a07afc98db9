"""Functions of named inputs in a graph, as they are before and after they are saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf


def traced(function: Callable[..., Any], specs: Sequence[tf.TensorSpec]) -> tf.function:
    """Makes a graph of a function of named inputs, for `call`.

    The specs name the inputs: a feature's name may be no Python argument.
    """
    names = [spec.name for spec in specs]
    return tf.function(
        lambda *values: function(**dict(zip(names, values, strict=True))), input_signature=specs
    )


def signature_inputs(function: Any) -> dict[str, tf.TensorSpec]:
    """Returns the inputs of a `traced` function or a signature by name, in order."""
    if hasattr(function, "get_concrete_function"):
        function = function.get_concrete_function()
    positional, named = function.structured_input_signature
    return {spec.name: spec for spec in positional} | dict(named)


def call(function: Any, inputs: Mapping[str, tf.Tensor]) -> Any:
    """Calls a `traced` function, also a loaded one, with those of the inputs that it takes."""
    return function(*(inputs[name] for name in signature_inputs(function)))
