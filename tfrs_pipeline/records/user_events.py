"""Events and answers: how clients write them, and how they are recorded."""

import functools
import hashlib
import string
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, NamedTuple, TypeAlias

import numpy as np
import pydantic
from pydantic import BeforeValidator, ConfigDict, FailFast, Field, TypeAdapter, create_model

from tfrs_pipeline.data.ids import MAX_ID_CHARACTERS, NO_ID
from tfrs_pipeline.data.schema import MAX_WEIGHT, MIN_WEIGHT, Stage
from tfrs_pipeline.features.numeric import Timestamp

# Short names of three stages for clients, beside the stages themselves.
WORDS: Mapping[str, str] = {
    "click": Stage.CLICKED,
    "view": Stage.EXPOSED,
    "dislike": Stage.DISLIKED,
}
# Types of events as clients write them -> a stage of a log.
TYPES: Mapping[str, str] = {**WORDS, **{stage.value: stage.value for stage in Stage}}
_DAY_MS = 86_400_000


class Event(NamedTuple):
    """What a user did with an item: a row of `events`.

    Attributes:
        user_id: Id of the user, an integer or text.
        time: Milliseconds since 1970.
        item_id: Id of the item, an integer or text.
        type: A stage of a log.
        request_id: Id of the answer that it belongs to.
        event_id: `id_hash` of the client's id.
        event: Its type in the training log; None if the stage says it all.
        session_id: Id of the visit, as text.
        weight: An amount, which multiplies the weight of its type; None is 1.
    """

    user_id: Any
    time: int
    item_id: Any
    type: str
    request_id: str | None
    event_id: int | None
    event: str | None = None
    session_id: str | None = None
    weight: float | None = None


class Answer(NamedTuple):
    """What a request was served, as an `Engine` returns it.

    Attributes:
        request_id: Id of the request; query i of several gets "ID.i".
        time: Milliseconds since 1970.
        version: Number of the version that answered.
        user_ids: [n] int64, or texts in an object array; the empty id for a query without a user.
        item_ids: [n, k] ids of the same kinds, best first; the empty id in empty slots.
    """

    request_id: str
    time: int
    version: int
    user_ids: np.ndarray
    item_ids: np.ndarray

    def by_query(self) -> Iterator[tuple[str, Any, np.ndarray]]:
        """Yields the request's id, the user's, and the items' [k], of users with an id."""
        pairs = zip(self.user_ids.tolist(), self.item_ids, strict=True)
        for number, (user_id, items) in enumerate(pairs):
            if user_id not in (-1, ""):
                is_single = len(self.user_ids) == 1
                request_id = self.request_id if is_single else f"{self.request_id}.{number}"
                yield request_id, user_id, items


def filled(items: np.ndarray) -> list[Any]:
    """Returns the ids of an answer without its empty slots."""
    return [item for item in items.tolist() if item not in (-1, "")]


def event_types(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Returns the stage by type of event, as the log that a version was trained on has them."""
    types: Mapping[str, Any] = manifest.get("reading", {}).get("event_weights", {})
    clicked = Stage.CLICKED.value
    return {
        name: meaning if isinstance(meaning, str) else clicked for name, meaning in types.items()
    }


def check_events(
    events: Sequence[Mapping[str, Any]],
    *,
    users_are_text: bool,
    items_are_text: bool,
    types: Mapping[str, str] | None = None,
) -> list[Event]:
    """Reads events as clients write them, in their order.

    Args:
        events: Mappings of `user_id`, `item_id` and `type`, a key of `TYPES` or `types`. Optional
            are `time` (a datetime with a zone, ISO 8601, or seconds since 1970; default: now),
            `request_id`, `event_id`, `session_id` (text or an integer) and `weight`.
        users_are_text: Whether user ids are `str`; otherwise they are 64-bit integers.
        items_are_text: The same for item ids.
        types: Types of the training log -> a stage; they come before `TYPES`.

    Returns:
        The events in their order, with times in milliseconds, and plain ids.

    Raises:
        ValueError: If an event is wrong; names the first one, and what is wrong.
    """
    if isinstance(events, Mapping):
        raise ValueError(f"Events come in a list, also a single one: [{dict(events)!r:.200}]")
    log_types = types or {}
    reader = _reader(users_are_text, items_are_text, (*log_types,))
    try:
        checked = reader.validate_python(list(events))
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
        number, *path = problem["loc"]
        if not path:
            message = f"Event {number} must be an object, with user_id, item_id and type"
        elif problem["type"] == "extra_forbidden":
            keys = ", ".join(name for name in Event._fields if name != "event")
            message = f"Event {number}: unknown {path[0]!r}; the keys are {keys}"
        else:
            message = f"Event {number}: {path[0]}: {problem['msg'].removeprefix('Value error, ')}"
        raise ValueError(f"{message}. Received: {problem['input']!r:.200}") from None
    now = time.time_ns() // 1_000_000
    stages = {**TYPES, **log_types}
    # A short name of a stage is not kept, so that an event is the same by either name.
    kept_types = {name: name for name, stage in log_types.items() if WORDS.get(name) != stage}
    return [
        Event(
            **{
                **vars(event),
                "time": now if event.time is None else event.time,
                "type": stages[event.type],
                "event": kept_types.get(event.type),
            }
        )
        for event in checked
    ]


def plain(value: Any) -> Any:
    """Returns a NumPy scalar as Python's, since SQLite takes no other; other values as they are."""
    return value.item() if isinstance(value, np.generic) else value


def stripped(id_: Any) -> Any:
    """Returns an id as it is recorded: without spaces around it."""
    id_ = plain(id_)
    # As the log's reader does: other spaces, such as the no-break space, are part of an id.
    return id_.strip(string.whitespace) if isinstance(id_, str) else id_


def id_hash(event_id: str) -> int:
    """Returns a hash of a client's event id, 64 bits with a sign: BLAKE2b.

    The probability that two of n ids share a hash is about n^2 / 2^65: 7e-5 for 50 million. The
    event of the later id would then count as a repeat.
    """
    digest = hashlib.blake2b(event_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)


def _milliseconds(value: Any) -> int:
    value = plain(value)
    if isinstance(value, str):
        value = Timestamp.from_text(value)
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError("needs a time zone; a column of times has to be stored with one")
        value = value.timestamp()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e14:
        raise ValueError("takes seconds since 1970, or ISO 8601 with a time zone")
    if (milliseconds := round(1000 * value)) > time.time_ns() // 1_000_000 + _DAY_MS:
        raise ValueError("is more than a day from now; give seconds since 1970, not milliseconds")
    return milliseconds


def _session(value: Any) -> Any:
    value = plain(value)
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if is_number else value


def _id(value: Any) -> Any:
    value = stripped(value)
    if value in ("", -1, *NO_ID):
        raise ValueError("is not an id")
    return value


_Text: TypeAlias = Annotated[str, Field(strict=True, min_length=1, max_length=200)]
_Weight: TypeAlias = Annotated[
    float, BeforeValidator(plain), Field(strict=True, ge=MIN_WEIGHT, le=MAX_WEIGHT)
]
_TextId: TypeAlias = Annotated[
    str, Field(strict=True, max_length=MAX_ID_CHARACTERS), BeforeValidator(_id)
]
_IntegerId: TypeAlias = Annotated[
    int, Field(strict=True, ge=-(2**63), lt=2**63), BeforeValidator(_id)
]


@functools.cache
def _reader(users_are_text: bool, items_are_text: bool, types: tuple[str, ...]) -> TypeAdapter[Any]:
    all_types = dict.fromkeys((*types, *TYPES))

    def type_(value: Any) -> str:
        if not isinstance(value, str) or value not in all_types:
            raise ValueError(f"must be one of {', '.join(all_types)}")
        return value

    event: Any = create_model(
        "event",
        __config__=ConfigDict(extra="forbid"),
        user_id=_TextId if users_are_text else _IntegerId,
        item_id=_TextId if items_are_text else _IntegerId,
        type=Annotated[str, BeforeValidator(type_)],
        time=(Annotated[int, BeforeValidator(_milliseconds)] | None, None),
        request_id=(_Text | None, None),
        event_id=(Annotated[_Text, pydantic.AfterValidator(id_hash)] | None, None),
        session_id=(Annotated[_Text, BeforeValidator(_session)] | None, None),
        weight=(_Weight | None, None),
    )
    # Stops at the first error: a hostile list would otherwise make an error for each event.
    return TypeAdapter(Annotated[list[event], FailFast()])
