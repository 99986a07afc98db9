"""TensorFlow Serving's REST form of a predict call: JSON to arrays and back.

docs/guides/serving.md describes it, and where it is stricter than TensorFlow Serving.
"""

import base64
import contextlib
import reprlib
import uuid
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, NamedTuple, NotRequired

import numpy as np
import pydantic
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    StrictInt,
    StrictStr,
    TypeAdapter,
    WrapValidator,
)
from pydantic_core import from_json, to_json
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from tfrs_pipeline.answers.signatures import (
    DEFAULT_K,
    DEFAULT_SIGNATURE,
    completed,
    missing_value,
    numpy_type,
)
from tfrs_pipeline.data.ids import MAX_ID_CHARACTERS
from tfrs_pipeline.durable import Damaged
from tfrs_pipeline.features.encoding import TIMESTAMP
from tfrs_pipeline.features.feature import Feature, Spec
from tfrs_pipeline.features.numeric import Timestamp
from tfrs_pipeline.features.raw import MAX_SECONDS
from tfrs_pipeline.messages import counted
from tfrs_pipeline.records.settings import Lately
from tfrs_pipeline.retrieval import HISTORY_TIMESTAMPS
from tfrs_pipeline.service.settings import ServeSettings

KEYS = ("signature_name", "instances", "inputs", "exclude_served")
# Inputs of ids; other texts are features and values of the filter.
_IDS = ("user_id", "item_id", "history", "exclude")
_LATELY = TypeAdapter(Lately)
# Not a union with None, because Python cannot hash the list types.
_OR_NULL = WrapValidator(lambda value, check: None if value is None else check(value))


class SignatureInputs:
    """Checks the JSON inputs of a signature against limits, and turns them into arrays.

    A request may leave out `optional` inputs. `features` has the feature of each input that
    brings one. Null is a missing value there, and times are seconds since 1970.
    """

    def __init__(
        self,
        specs: Mapping[str, Spec],
        limits: ServeSettings,
        features: Mapping[str, Feature],
        optional: Collection[str],
    ) -> None:
        self._specs = dict(specs)
        times = {TIMESTAMP, HISTORY_TIMESTAMPS}
        self._nullable = times | features.keys()
        self._times = times | {name for name, feature in features.items() if feature.is_time}
        optional = {HISTORY_TIMESTAMPS, *optional}
        self.max_results = limits.max_results
        types = {name: self._value_type(name, spec, limits) for name, spec in specs.items()}
        columns = {
            name: _list_type(types[name], limits.max_queries) if spec.shape else types[name]
            for name, spec in specs.items()
        }
        self._columns: TypeAdapter[Any] = TypeAdapter(_object_type(columns, optional))
        rows = _list_type(_object_type(types, optional), limits.max_queries, min_length=1)
        self._rows: TypeAdapter[Any] = TypeAdapter(rows)

    def read(self, content: Any, *, is_row_format: bool) -> dict[str, np.ndarray]:
        """Reads `instances` (an object for each query) or `inputs` (a column for each input).

        If the signature has one input, its value or column may stand in place of an object.
        """
        if is_row_format:
            columns = self._columns_from_rows(content)
        else:
            columns = checked(self._columns, self._named(content), "inputs")
        arrays = {name: self._array(name, column) for name, column in columns.items()}
        # An input without an axis, k, holds for all queries.
        sizes = {name: len(array) for name, array in arrays.items() if array.ndim}
        if len(set(sizes.values())) > 1:
            raise bad_request(f"All inputs must have as many queries. Received: {sizes}")
        _check_times(arrays)
        return self.completed(arrays, max(sizes.values()))

    def completed(self, arrays: Mapping[str, Any], num_queries: int) -> dict[str, np.ndarray]:
        """Adds missing values for the inputs that a request leaves out."""
        return completed(self._specs, arrays, num_queries)

    def _columns_from_rows(self, instances: Any) -> dict[str, Any]:
        if scalars := [name for name, spec in self._specs.items() if not spec.shape]:
            raise bad_request(
                f"Input {scalars[0]!r} is one value for the whole request, so it cannot be in a "
                "row: use 'inputs' instead of 'instances'."
            )
        if isinstance(instances, list):
            instances = [self._named(row) for row in instances]
        rows = checked(self._rows, instances, "instances")
        return {name: [row.get(name) for row in rows] for name in self._specs}

    def _named(self, value: Any) -> Any:
        """Gives a plain value the name of the only input; refuses unknown inputs."""
        # {"b64": ...} is a value, not an object of inputs.
        if not isinstance(value, dict) or "b64" in value:
            return value if len(self._specs) > 1 else dict.fromkeys(self._specs, value)
        if unknown := value.keys() - self._specs:
            names = ", ".join(self._specs)
            raise bad_request(f"Unknown input {_shown(min(unknown))}; the signature has {names}.")
        return value

    def _value_type(self, name: str, spec: Spec, limits: ServeSettings) -> Any:
        """Returns the type of an input's value for a query, or for the whole request."""
        value: Any
        if spec.dtype == "string":
            value = Annotated[str, BeforeValidator(_text)]
            if name in _IDS:
                value = Annotated[value, Field(max_length=MAX_ID_CHARACTERS)]
        elif spec.dtype.startswith("int"):
            range_ = np.iinfo(spec.dtype)
            low, high = (1, limits.max_k) if name == "k" else (range_.min, range_.max)
            value = Annotated[int, Field(strict=True, ge=low, le=high)]
        else:
            value = Annotated[float, Field(strict=True)]
        if name in self._times:
            value = Annotated[value, BeforeValidator(_seconds)]
        if name in self._nullable:
            value = Annotated[value, _OR_NULL]
        if len(spec.shape) < 2:
            return value
        lengths = {
            "exclude": limits.max_exclude,
            "allowed": limits.max_exclude,
            "history": limits.max_history,
            HISTORY_TIMESTAMPS: limits.max_history,
        }
        width = spec.shape[1]
        values = _list_type(value, width or lengths.get(name), min_length=width or 0)
        return Annotated[values, _OR_NULL] if name in self._nullable else values

    def _array(self, name: str, column: Any) -> np.ndarray:
        shape, dtype = self._specs[name].shape, self._specs[name].dtype
        missing, type_ = missing_value(dtype), numpy_type(dtype)

        def known(values: list[Any]) -> list[Any]:
            return [missing if value is None else value for value in values]

        if len(shape) < 2:
            array = np.array(known(column) if shape else column, type_)
        else:
            widths = {len(row) for row in column if row is not None}
            if len(widths) > 1:
                empty = {"string": '""', "int64": "-1"}.get(dtype, "null")
                raise bad_request(
                    f"Input {name!r} must have lists of one length: fill the shorter ones with "
                    f"{empty}. Received lengths: {sorted(widths)[:5]}"
                )
            width = widths.pop() if widths else shape[1] or 0
            rows = [[missing] * width if row is None else known(row) for row in column]
            with np.errstate(over="ignore"):  # What is too large for the type is refused below.
                array = np.array(rows, type_).reshape(len(column), width)
        if dtype.startswith("float") and np.isinf(array).any():
            raise bad_request(f"Input {name!r} takes finite {dtype} values, or null.")
        return array


class PredictCall(NamedTuple):
    """A signature's name and the array of each input: numbers, or `str` objects.

    Holds a call of the default signature as one of `retrieve_user`.

    `exclude_served` says which answers' items are left out; None takes the server's settings.
    """

    signature: str
    inputs: dict[str, np.ndarray]
    is_row_format: bool
    exclude_served: Lately | None = None

    @property
    def num_queries(self) -> int:
        """Number of queries, or items."""
        return max(len(array) for array in self.inputs.values() if array.ndim)

    @property
    def k(self) -> int:
        """Results of a query; 1 if it is only embedded."""
        return int(self.inputs.get("k", 1))


def parse_predict(body: bytes, signatures: Mapping[str, SignatureInputs]) -> PredictCall:
    """Reads the body of a predict call, in time proportional to its length, or refuses it (400)."""
    document = read_json(body)
    if not isinstance(document, dict):
        wanted = "The body must be an object, such as {'inputs': [42]}."
        raise bad_request(f"{wanted} Received: {_shown(document)}")
    if unknown := [key for key in document if key not in KEYS]:
        raise bad_request(f"Unknown key {_shown(unknown[0])}; a request has {', '.join(KEYS)}.")
    name = document.get("signature_name") or DEFAULT_SIGNATURE
    if not isinstance(name, str) or name not in signatures:
        why = ""
        if "retrieve_user" not in signatures:
            why = " It was exported without user data: ask 'retrieve', with the user's history."
        raise bad_request(
            f"Serving signature name: {_shown(name)} not found in signature def. "
            f"The model has {', '.join(sorted(signatures))}.{why}"
        )
    is_row_format = "instances" in document
    # Equal if both are there, or neither.
    if is_row_format == ("inputs" in document):
        raise bad_request("A request has either 'inputs' or 'instances'.")
    content = document["instances" if is_row_format else "inputs"]
    inputs = signatures[name].read(content, is_row_format=is_row_format)
    if name == DEFAULT_SIGNATURE:
        name, users = "retrieve_user", inputs["user_id"]
        known = {"user_id": users, "k": np.int32(DEFAULT_K)}
        inputs = signatures[name].completed(known, len(users))
    served = document.get("exclude_served")
    lately = None if served is None else checked(_LATELY, served, "exclude_served")
    call, most = PredictCall(name, inputs, is_row_format, lately), signatures[name].max_results
    if call.num_queries * call.k > most:
        raise bad_request(
            f"A request may ask for {most} results, its queries times k (--max-results). "
            f"Received: {call.num_queries} x {call.k}"
        )
    return call


def parse_items(body: bytes, key: str) -> list[Any]:
    """Reads the body of a write: {key: [...]}, or one entry alone; else refuses it (400)."""
    document = read_json(body)
    if key != "item_ids" and isinstance(document, dict) and "item_id" in document:
        return [document]
    values = document.get(key) if isinstance(document, dict) and len(document) == 1 else None
    if not isinstance(values, list) or not values:
        wanted = f"The body must be {{{key!r}: [...]}}, with one or more."
        raise bad_request(f"{wanted} Received: {_shown(document)}")
    return values


class ExplainCall(BaseModel):
    """The body of an explain call: an item, and the query whose answer it is in or not."""

    model_config = ConfigDict(extra="forbid")

    item_id: StrictInt | StrictStr
    user_id: StrictInt | StrictStr | None = None
    history: Annotated[list[StrictInt | StrictStr], FailFast()] = []
    request: dict[str, Any] = {}
    exclude: Annotated[list[StrictInt | StrictStr], FailFast()] = []
    allowed: Annotated[list[StrictStr], FailFast()] = []
    k: StrictInt = Field(10, ge=1)


_EXPLAIN = TypeAdapter(ExplainCall)


def parse_explain(body: bytes, limits: ServeSettings) -> ExplainCall:
    """Reads the body of an explain call, within the limits of a predict call; else a 400."""
    call = checked(_EXPLAIN, read_json(body))
    if (call.user_id is None) == ("history" not in call.model_fields_set):
        raise bad_request("An explain call has 'user_id' or 'history', and not both.")
    sizes = {"k": (call.k, limits.max_k), "history": (len(call.history), limits.max_history)}
    sizes |= {
        name: (len(getattr(call, name)), limits.max_exclude) for name in ("exclude", "allowed")
    }
    for name, (size, most) in sizes.items():
        if size > most:
            raise bad_request(f"{name}: at most {most}. Received: {size}")
    return call


def request_id(header: str | None) -> str:
    """Returns the id of a request, a new one if it brings none; else refuses it (400)."""
    if header is not None and not 0 < len(header) <= 200:
        raise bad_request(f"X-Request-ID takes 1 to 200 characters. Received: {_shown(header)}")
    return header or uuid.uuid4().hex


def read_json(body: bytes) -> Any:
    """Reads JSON, or refuses it (400); the words NaN and Infinity are not JSON."""
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        problem = str(error)
        with contextlib.suppress(ValueError):
            from_json(body)  # Passes if these words are all that is wrong.
            problem = "it has NaN, Infinity or -Infinity; give null where a value is missing"
        raise bad_request(f"The body is not JSON in UTF-8: {problem}") from None


def format_outputs(outputs: Mapping[str, np.ndarray], is_row_format: bool) -> bytes:
    """Writes an answer as JSON: arrays [num_queries, ...] of numbers, bools or `str`."""
    columns = {name: array.tolist() for name, array in outputs.items()}
    # A single output stands without its name.
    answer: Any = columns if len(columns) > 1 else next(iter(columns.values()))
    if is_row_format and len(columns) > 1:
        rows = zip(*columns.values(), strict=True)
        answer = [dict(zip(columns, row, strict=True)) for row in rows]
    document = {"predictions" if is_row_format else "outputs": answer}
    # An empty slot scores minus infinity, which JSON lacks: strict parsers refuse the bare word.
    return to_json(document, inf_nan_mode="null")


def bad_request(message: str) -> HTTPException:
    """Makes a 400."""
    return HTTPException(400, message)


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Makes a 400 of a `ValueError` in the block."""
    try:
        yield
    except Damaged:  # A file of the server's own is wrong, not the request.
        raise
    except ValueError as error:
        raise bad_request(str(error)) from None


def checked(adapter: TypeAdapter[Any], value: Any, where: str = "") -> Any:
    """Checks and converts a part of a request, or refuses it (400) for its first problem."""
    try:
        return adapter.validate_python(value)
    except pydantic.ValidationError as error:
        details = error.errors(include_url=False)[0]
    path = ".".join(map(str, [*filter(None, [where]), *details["loc"]]))
    # Pydantic's prefix, before our message, which may quote a value of any length.
    message = f"{details['msg'].removeprefix('Value error, '):.200}"
    problem = "Missing named input" if details["type"] == "missing" else message
    raise bad_request(f"{path}: {problem}. Received: {_shown(details['input'])}")


def _list_type(type_: Any, max_length: int | None, min_length: int = 0) -> Any:
    lengths = Field(strict=True, min_length=min_length, max_length=max_length)
    # A hostile list of 100,000 wrong values would otherwise become as many errors.
    return Annotated[list[type_], FailFast(), lengths]


def _object_type(types: dict[str, Any], optional: Collection[str]) -> Any:
    fields = {n: NotRequired[type_] if n in optional else type_ for n, type_ in types.items()}
    return TypedDict("Inputs", fields)  # type: ignore[operator]


def _text(value: Any) -> str:
    """Reads a string as TensorFlow Serving does: plain, or {"b64": its bytes in UTF-8}."""
    if isinstance(value, str):
        value.encode()  # A lone surrogate is no text: a `ValueError`.
        return value
    if isinstance(value, dict) and list(value) == ["b64"] and isinstance(value["b64"], str):
        return base64.b64decode(value["b64"], validate=True).decode()
    raise ValueError('takes a string, or {"b64": "..."}')


def _seconds(value: Any) -> Any:
    """Converts text, a time in ISO 8601, to seconds since 1970; keeps other values."""
    if isinstance(value, str):
        return Timestamp.from_text(value).timestamp()
    if isinstance(value, int | float) and value > MAX_SECONDS:  # After the year 5000.
        raise ValueError("takes seconds since 1970; divide milliseconds by 1,000")
    return value


def _check_times(arrays: Mapping[str, np.ndarray]) -> None:
    """Refuses a time without an item; a query may have fewer times than items."""
    if not {"history", HISTORY_TIMESTAMPS} <= arrays.keys():
        return
    history, times = arrays["history"], arrays[HISTORY_TIMESTAMPS]
    empty = -1 if history.dtype.kind == "i" else ""
    is_item, is_time = history != empty, ~np.isnan(times)
    width = times.shape[1]
    is_alone = is_time & ~np.pad(is_item, [[0, 0], [0, width]])[:, :width]
    if is_alone.any():
        row = is_alone.any(axis=1).argmax()
        num_times, num_items = int(np.flatnonzero(is_time[row])[-1]) + 1, int(is_item[row].sum())
        raise bad_request(
            f"Input {HISTORY_TIMESTAMPS!r} takes one time for each item of the history, null where "
            f"unknown. Received: {counted(num_times, 'time')} for {counted(num_items, 'item')}."
        )


def _shown(value: Any) -> str:
    # Shortened, because an error must not send a long request back.
    return reprlib.repr(value)[:80]
