"""Tables of settings: frozen, checked when made, unknown keys refused with the nearest one."""

import contextlib
import dataclasses
import functools
import json
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeAlias, TypeVar, cast

import pydantic
import pydantic.dataclasses
from pydantic import AfterValidator, BeforeValidator
from pydantic_core import ErrorDetails

from tfrs_pipeline.messages import suggest


class ConfigError(ValueError):
    """Settings that cannot be used.

    Attributes:
        problems: (setting, message) pairs; the setting is a dotted name, `"training.batch_size"`,
            or empty if the problem is not in a single setting.
    """

    def __init__(self, problems: Sequence[tuple[str, str]], source: str = "") -> None:
        self.problems = tuple(problems)
        lines = [f"{setting}: {message}" if setting else message for setting, message in problems]
        super().__init__("\n  ".join([f"{source}:", *lines]) if source else "\n".join(lines))


class Config(pydantic.BaseModel):
    """A table of settings: frozen, checked when made, unknown keys refused.

    Raises a `ConfigError` with all values that are out of range and all unknown keys; if there are
    none, with the values that contradict each other.
    """

    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Unwraps the lines of the fields' docstrings, for the command line's help."""
        super().__pydantic_init_subclass__(**kwargs)
        for field in cls.model_fields.values():
            field.description = " ".join((field.description or "").split())

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        refuse(self._problems())
        return self

    def _problems(self) -> Iterable[tuple[str, str]]:
        """Yields (setting, message) for settings that contradict each other."""
        return ()

    if not TYPE_CHECKING:  # To an editor the fields are the arguments.

        def __init__(self, **settings: Any) -> None:
            with _translating(type(self)):
                super().__init__(**settings)


T = TypeVar("T")


@typing.dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def checked(table: type[T]) -> type[T]:
    """Makes a frozen dataclass whose arguments are checked as the fields of a `Config` are.

    Raises a ConfigError that names the argument.
    """
    config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)
    dataclass: Any = pydantic.dataclasses.dataclass(frozen=True, config=config)(table)
    check = dataclass.__init__

    @functools.wraps(check)
    def init(self: Any, *values: Any, **settings: Any) -> None:
        with _translating(table):
            check(self, *values, **settings)

    dataclass.__init__ = init
    return dataclass


@contextlib.contextmanager
def _translating(table: type) -> Iterator[None]:
    """Raises the errors of pydantic within as a ConfigError about a table or a dataclass."""
    try:
        yield
    except pydantic.ValidationError as error:
        errors = error.errors(include_url=False)
        raise ConfigError([x for details in errors for x in _problems(details, table)]) from None


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(values)) < len(values):
        raise ValueError("a value twice")
    return values


def _some(values: tuple[T, ...]) -> tuple[T, ...]:
    if not values:
        raise ValueError("must list at least one value")
    return values


def _alone(values: Any) -> Any:
    # Where numbers are listed, true is a mistake, though Python takes it for 1.
    is_one = isinstance(values, str | int | float | Mapping) and not isinstance(values, bool)
    is_one |= dataclasses.is_dataclass(values)
    return (values,) if is_one else values


# Types of settings that list values; a single value may be given alone. `Distinct` values differ,
# and `Several` needs at least one.
if TYPE_CHECKING:  # A list is accepted too, and becomes a tuple.
    Listed: TypeAlias = Sequence[T]
    Distinct: TypeAlias = Sequence[T]
    Several: TypeAlias = Sequence[T]
else:
    Listed: TypeAlias = Annotated[tuple[T, ...], BeforeValidator(_alone)]
    Distinct: TypeAlias = Annotated[Listed[T], AfterValidator(_distinct)]
    Several: TypeAlias = Annotated[Distinct[T], AfterValidator(_some)]


def refuse(problems: Iterable[tuple[str, str]]) -> None:
    """Raises a ConfigError if there is any problem."""
    if problems := list(problems):
        raise ConfigError(problems)


def _problems(details: ErrorDetails, table: type) -> Iterator[tuple[str, str]]:
    """Translates one of pydantic's errors in a table or dataclass into (setting, message) pairs."""
    path, cause = details["loc"], details.get("ctx", {}).get("error")
    if path and isinstance(path[0], int):  # An argument of a dataclass that is given by position.
        path = (dataclasses.fields(cast(Any, table))[path[0]].name, *path[1:])
    # The message shows the wrong value of a list, which says more than its position.
    if path and isinstance(path[-1], int) and not isinstance(cause, ConfigError):
        path = path[:-1]
    setting = ".".join(map(str, path))
    if isinstance(cause, ConfigError):  # From a table within this one, or from a check of it.
        for name, message in cause.problems:
            if "." not in name:  # Of that table itself, and so is the suggestion.
                near = "unknown setting; did you mean '"
                message = message.replace(near, f"{near}{setting}.")
            yield ".".join(part for part in (setting, name) if part), message
    elif details["type"] == "extra_forbidden":
        yield setting, f"unknown setting; {suggest(setting, setting_names(table))}"
    elif details["type"] == "unexpected_keyword_argument":
        name = str(details["loc"][-1])
        field = getattr(table, "model_fields", {}).get(str(details["loc"][0]))
        kinds = _dataclasses_in(table if field is None else field.annotation)
        known = {x.name for kind in kinds for x in dataclasses.fields(kind)}
        yield setting, f"unknown setting; {suggest(name, known)}"
    elif details["type"] == "union_tag_invalid":
        tag, tags = details["ctx"]["tag"], re.findall(r"\w+", details["ctx"]["expected_tags"])
        yield setting, f"unknown kind {tag!r}; {suggest(tag, tags)}"
    elif details["type"] in ("union_tag_not_found", "dataclass_type"):
        message = "must name a kind of the package: settings hold no other. Give one of your own to"
        why = f"{message} tp.TwoTower({setting}=...), for its fit or tp.compare"
        yield setting, f"got {details['input']!r}; {why}"
    elif details["type"] in ("model_type", "model_attributes_type"):
        yield setting, f"got {details['input']!r}; must be a table of settings"
    else:
        message = details["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
        # What follows would describe the library's parser.
        message = message[0].lower() + message[1:].partition(", unable to")[0]
        yield setting, f"got {details['input']!r}; {message}" if setting else message


def _dataclasses_in(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _dataclasses_in(inner)


def tables_in(table: type[Config]) -> dict[str, type[Config]]:
    """Returns the tables within a table, by name."""
    return {
        name: field.annotation
        for name, field in table.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config)
    }


def setting_names(table: type[Config]) -> list[str]:
    """Returns the dotted names of a table's settings, including those of nested tables."""
    names = list(table.model_fields)
    for name, inner in tables_in(table).items():
        names += [f"{name}.{setting}" for setting in setting_names(inner)]
    return names


def from_text(value: Any) -> Any:
    """Reads a table from JSON or a short form, as typed after a flag; keeps other values.

    Example:
        >>> from_text("popularity:num=256:alpha=0.75")
        {'kind': 'popularity', 'num': '256', 'alpha': '0.75'}

    Use it as `Annotated[Uniform | Popularity, BeforeValidator(from_text)]`.
    """
    if not isinstance(value, str):
        return value
    if value.startswith("{"):
        return json.loads(value)
    parts = [part.partition("=") for part in value.split(":")]
    if sum(not equals for _, equals, _ in parts) > 1:
        raise ValueError("must be a kind and its settings by name, such as uniform:num=256")
    names = [name for name, equals, _ in parts if equals]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"sets {', '.join(repeated)} twice")
    return {name if equals else "kind": text if equals else name for name, equals, text in parts}
