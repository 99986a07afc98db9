"""TensorFlow Serving's REST form of a predict call: JSON to arrays and back.

The rules are those of its `json_tensor.cc`; what differs is said in docs/serving.md. A request
names a signature and gives every input of it, either by columns (`inputs`) or by rows
(`instances`); the answer has the same form, under `outputs` or `predictions`.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

DEFAULT_SIGNATURE = "serving_default"
KEYS = ("signature_name", "instances", "inputs")

_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"')


class RequestError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: HTTP status, 4xx or 503.
        message: What was wrong, what was got, what to do.
        headers: To be sent with the answer.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = dict(headers or {})


@dataclass(frozen=True)
class InputSpec:
    """Type and shape of a signature's input.

    Args:
        dtype: Of its values.
        rank: 0 for one value for the whole request; else the first dimension is the queries'.
        width: Of the second dimension, where it is fixed.
    """

    dtype: Literal["int32", "int64", "float32", "float64", "string"]
    rank: int
    width: int | None = None

    @property
    def is_float(self) -> bool:
        """Whether values may have a fraction, and be missing (NaN)."""
        return self.dtype in ("float32", "float64")


@dataclass(frozen=True)
class PredictRequest:
    """A predict call.

    Args:
        signature: Its name.
        inputs: Array of each input: of numbers as its spec says, or object with `bytes`.
        is_row_format: Whether it came as `instances` and is answered with `predictions`.
    """

    signature: str
    inputs: dict[str, np.ndarray]
    is_row_format: bool


def parse_json(body: bytes, max_depth: int) -> dict[str, Any]:
    """Parses a request's body, a JSON object. NaN and Infinity are read as numbers.

    Raises:
        RequestError: If it is something else, or nested deeper than `max_depth`.

    Example:
        >>> parse_json(b'{"inputs": [42]}', max_depth=8)
        {'inputs': [42]}
    """
    _check_depth(body, max_depth)
    try:
        document = json.loads(body.decode("utf-8"))
    except ValueError as error:  # Of JSON, of UTF-8, or a number of thousands of digits.
        raise RequestError(400, f"The body is not JSON in UTF-8: {_short(str(error))}") from None
    if not isinstance(document, dict):
        raise RequestError(
            400, f"The body must be a JSON object, such as {{'inputs': [42]}}. Got: {_shown(body)}"
        )
    return document


def _check_depth(body: bytes, max_depth: int) -> None:
    # Few brackets cannot be nested deep: most bodies need no closer look.
    if body.count(b"[") + body.count(b"{") <= max_depth:
        return
    # Brackets within strings do not count.
    characters = np.frombuffer(_STRINGS.sub(b"", body), np.uint8)
    steps = np.isin(characters, [91, 123]).astype(np.int32) - np.isin(characters, [93, 125])
    depth = int(np.cumsum(steps).max(initial=0))
    if depth > max_depth:
        raise RequestError(
            400, f"The JSON is nested {depth} deep; at most {max_depth} are accepted."
        )


def parse_predict(
    document: Mapping[str, Any], signatures: Mapping[str, Mapping[str, InputSpec]]
) -> PredictRequest:
    """Reads a predict call.

    Args:
        document: `{"signature_name": name, "inputs": {...}}`, or `instances` instead of `inputs`.
        signatures: The inputs of each signature of the model.

    Raises:
        RequestError: If the signature is unknown, an input is missing, unknown, or not of the
            signature's type and rank, or the inputs differ in their number of queries.

    Example:
        >>> document = {"signature_name": "retrieve_user", "inputs": {"user_id": [7], "k": 3}}
        >>> specs = {
        ...     "retrieve_user": {"user_id": InputSpec("int64", 1), "k": InputSpec("int32", 0)}
        ... }
        >>> parse_predict(document, specs).inputs
        {'user_id': array([7]), 'k': array(3, dtype=int32)}
    """
    for key in document:
        if key not in KEYS:
            raise RequestError(400, f"Unknown key {_shown(key)}; a request has {_listed(KEYS)}.")
    signature = document.get("signature_name", DEFAULT_SIGNATURE) or DEFAULT_SIGNATURE
    if not isinstance(signature, str):
        raise RequestError(400, f"signature_name must be a string. Got: {_shown(signature)}")
    if signature not in signatures:
        raise RequestError(
            400,
            f"Serving signature name: {_shown(signature)} not found in signature def. "
            f"The model has {_listed(sorted(signatures))}.",
        )
    specs = signatures[signature]
    is_row_format = "instances" in document
    if is_row_format == ("inputs" in document):
        raise RequestError(400, "A request has either 'inputs' or 'instances'.")
    columns: Mapping[str, Any]
    if is_row_format:
        columns = _columns_of_rows(document["instances"], specs)
    else:
        columns = _named(document["inputs"], specs, "'inputs'")
    inputs = {
        name: _tensor(columns[name], spec, name, is_row_format) for name, spec in specs.items()
    }
    sizes = {name: len(array) for name, array in inputs.items() if array.ndim}
    if len(set(sizes.values())) > 1:
        raise RequestError(400, f"The inputs must be of as many queries each. Got: {sizes}")
    return PredictRequest(signature, inputs, is_row_format)


def _columns_of_rows(rows: Any, specs: Mapping[str, InputSpec]) -> dict[str, list[Any]]:
    if not isinstance(rows, list) or not rows:
        raise RequestError(
            400, f"'instances' must be a list with an entry per query. Got: {_shown(rows)}"
        )
    named = [_named(row, specs, f"'instances' entry {i}") for i, row in enumerate(rows)]
    return {name: [row[name] for row in named] for name in specs}


def _named(value: Any, specs: Mapping[str, InputSpec], where: str) -> Mapping[str, Any]:
    """Returns an object with each input; a plain value stands for the only one."""
    if not isinstance(value, dict) or _is_base64(value):
        if len(specs) > 1:
            raise RequestError(
                400,
                f"{where} must be an object with {_listed(specs)}, as the signature has several "
                f"inputs. Got: {_shown(value)}",
            )
        return {name: value for name in specs}
    if missing := [name for name in specs if name not in value]:
        raise RequestError(400, f"Missing named input: {_listed(missing)} in {where}.")
    if unknown := [name for name in value if name not in specs]:
        raise RequestError(
            400,
            f"{where} has the unknown input {_shown(unknown[0])}; the signature has "
            f"{_listed(specs)}.",
        )
    return value


def _tensor(value: Any, spec: InputSpec, name: str, is_row_format: bool) -> np.ndarray:
    shape: list[int] = []
    flat = [value]
    while flat and isinstance(flat[0], list):
        size = len(flat[0])
        if any(not isinstance(inner, list) or len(inner) != size for inner in flat):
            empty = '""' if spec.dtype == "string" else "NaN" if spec.is_float else "-1"
            raise RequestError(
                400,
                f"Input {name!r} must have lists of one length at each level; fill the shorter "
                f"ones with {empty}.",
            )
        shape.append(size)
        flat = [leaf for inner in flat for leaf in inner]
    if len(shape) != spec.rank:
        raise _rank_error(name, spec, len(shape), is_row_format)
    if spec.width is not None and shape[1] != spec.width:
        raise RequestError(
            400, f"Input {name!r} must have {spec.width} numbers for each query. Got: {shape[1]}"
        )
    if spec.dtype == "string":
        return _strings(flat, name).reshape(shape)
    numbers = _floats_of if spec.is_float else _integers
    return numbers(flat, spec.dtype, name).reshape(shape)


def _rank_error(name: str, spec: InputSpec, rank: int, is_row_format: bool) -> RequestError:
    if is_row_format and spec.rank == 0:
        return RequestError(
            400,
            f"Input {name!r} is one value for the whole request, which rows cannot give: use "
            "'inputs' instead of 'instances'.",
        )
    forms = {0: "one value", 1: "a list with a value per query", 2: "a list with a list per query"}
    expected, got = spec.rank - is_row_format, rank - is_row_format
    within = " of an instance" if is_row_format else ""
    return RequestError(
        400,
        f"Input {name!r}{within} must be nested {expected} deep ({forms[spec.rank]}). "
        f"Got: nested {got} deep.",
    )


def _integers(values: list[Any], dtype: str, name: str) -> np.ndarray:
    # A bool is an int to Python, so isinstance will not do.
    if set(map(type, values)) <= {int}:
        try:
            return np.array(values, dtype)
        except OverflowError:
            limits = np.iinfo(dtype)
            wrong = next(v for v in values if not limits.min <= v <= limits.max)
    else:
        wrong = next(v for v in values if type(v) is not int)
    raise RequestError(400, f"Input {name!r} takes {dtype} values. Got: {_shown(wrong)}")


def _floats_of(values: list[Any], dtype: str, name: str) -> np.ndarray:
    if wrong := [v for v in values if type(v) not in (int, float)]:
        raise RequestError(400, f"Input {name!r} takes {dtype} values. Got: {_shown(wrong[0])}")
    try:
        return np.array(values, np.float64).astype(dtype)
    except OverflowError:  # An integer of more digits than any float has.
        raise RequestError(400, f"Input {name!r} has a number that is no {dtype}.") from None


def _strings(values: list[Any], name: str) -> np.ndarray:
    array = np.empty(len(values), object)
    for i, value in enumerate(values):
        if _is_base64(value):
            value = _decoded_base64(value["b64"], name)
        elif isinstance(value, str):
            try:
                value = value.encode()
            except UnicodeEncodeError:
                raise RequestError(
                    400, f"Input {name!r} has half of a surrogate pair: {_shown(value)}"
                ) from None
        else:
            raise RequestError(400, f"Input {name!r} takes string values. Got: {_shown(value)}")
        array[i] = value
    return array


def _is_base64(value: Any) -> bool:
    return isinstance(value, dict) and list(value) == ["b64"] and isinstance(value["b64"], str)


def _decoded_base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(400, f"Input {name!r} has wrong base64: {_shown(text)}") from None


def check_limits(
    inputs: Mapping[str, np.ndarray],
    *,
    max_queries: int,
    max_k: int,
    max_exclude: int,
    max_history: int,
) -> None:
    """Refuses a call that would cost too much.

    Raises:
        RequestError: If a limit is passed, or k is below 1.
    """
    k = int(inputs.get("k", np.array(1)))
    if not 1 <= k <= max_k:
        raise RequestError(400, f"k must be from 1 to {max_k}. Got: {k}")
    num_queries = next(len(array) for array in inputs.values() if array.ndim)
    if num_queries > max_queries:
        raise RequestError(
            400, f"A request may hold {max_queries} queries. Got: {num_queries}; send several."
        )
    limits = {"exclude": max_exclude, "allowed": max_exclude, "history": max_history}
    for name, limit in limits.items():
        if name in inputs and inputs[name].shape[1] > limit:
            raise RequestError(
                400,
                f"Input {name!r} may hold {limit} entries for each query. "
                f"Got: {inputs[name].shape[1]}",
            )


def format_outputs(outputs: Mapping[str, np.ndarray], *, is_row_format: bool) -> bytes:
    """Writes a model's answer.

    Numbers that are not finite are written as TensorFlow Serving does, as the bare words NaN,
    Infinity and -Infinity: Python reads them, JavaScript and strict parsers do not.

    Args:
        outputs: Arrays [num_queries, ...] of float32, integers, bools, or objects with `bytes`.
        is_row_format: Whether to write `predictions`, a value per query, or `outputs`.

    Example:
        >>> outputs = {"ids": np.array([[7, 3]]), "scores": np.array([[0.5, -np.inf]], np.float32)}
        >>> format_outputs(outputs, is_row_format=False)
        b'{"outputs": {"ids": [[7,3]], "scores": [[0.5,-Infinity]]}}'
        >>> format_outputs(outputs, is_row_format=True)
        b'{"predictions": [{"ids": [7,3], "scores": [0.5,-Infinity]}]}'
    """
    rows = {json.dumps(name): _row_texts(array) for name, array in outputs.items()}
    if is_row_format:
        texts = [
            _object(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True)
        ]
        return f'{{"predictions": [{", ".join(texts)}]}}'.encode()
    columns = {name: f"[{','.join(texts)}]" for name, texts in rows.items()}
    return f'{{"outputs": {_object(columns)}}}'.encode()


def _object(values: Mapping[str, str]) -> str:
    """Joins values by name; a single one stands without its name."""
    if len(values) == 1:
        return next(iter(values.values()))
    return "{" + ", ".join(f"{name}: {text}" for name, text in values.items()) + "}"


def _row_texts(array: np.ndarray) -> list[str]:
    if array.ndim == 1:
        # The rows of a column [n, 1], out of their brackets.
        return [text[1:-1] for text in _row_texts(array[:, None])]
    write: Callable[[Sequence[Any]], str]
    if array.dtype.kind == "f":
        write = _plain_floats if _are_plain(array) else _floats
    elif array.dtype == object:
        write = _texts
    else:
        write = _numbers
    return [write(row) for row in array.tolist()]


def _are_plain(array: np.ndarray) -> bool:
    """Tells whether no value is whole or not finite, which need a closer look."""
    return bool(np.isfinite(array).all() and (array != np.trunc(array)).all())


def _plain_floats(row: Sequence[float]) -> str:
    # Nine digits give every float32 back; one format for all is twice as fast as JSON's own.
    return "[" + ("%.9g," * len(row) % tuple(row))[:-1] + "]"


def _floats(row: Sequence[float]) -> str:
    return "[" + ",".join(map(_float, row)) + "]"


def _float(value: float) -> str:
    if not np.isfinite(value):
        return "NaN" if np.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    text = f"{value:.9g}"
    # A list must not mix whole and decimal numbers: readers guess types from the text.
    return text if "." in text or "e" in text else text + ".0"


def _texts(row: Sequence[bytes]) -> str:
    return json.dumps([text.decode() for text in row], ensure_ascii=False, separators=(",", ":"))


def _numbers(row: Sequence[int]) -> str:
    return json.dumps(row, separators=(",", ":"))


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names))


def _shown(value: Any) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else repr(value)
    return _short(text)


def _short(text: str, limit: int = 80) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= limit else text[: limit - 3] + "..."
