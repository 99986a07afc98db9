"""Tables of settings: frozen, checked when made, unknown keys refused with the nearest one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

import pydantic
from pydantic_core import ErrorDetails


class ConfigError(ValueError):
    """Settings that cannot be used.

    Attributes:
        problems: (setting, message) pairs; the setting is a dotted name, `"training.batch_size"`,
            or empty where the problem lies in no single setting.
    """

    def __init__(self, problems: Sequence[tuple[str, str]], source: str = "") -> None:
        self.problems = tuple(problems)
        lines = [f"{setting}: {message}" if setting else message for setting, message in problems]
        super().__init__("\n  ".join([f"{source}:", *lines]) if source else "\n".join(lines))


class Config(pydantic.BaseModel):
    """A table of settings: frozen, checked when made, unknown keys refused.

    Raises:
        ConfigError: If a value is out of range or a key unknown; all such problems at once, and
            what does not fit together once the values by themselves are right.
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
        """Unwraps the lines of the fields' sentences, for the command line's help."""
        super().__pydantic_init_subclass__(**kwargs)
        for field in cls.model_fields.values():
            field.description = " ".join((field.description or "").split())

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except pydantic.ValidationError as error:
            problems = [
                problem
                for details in error.errors(include_url=False)
                for problem in _problems(details, type(self))
            ]
            raise ConfigError(problems) from None


def refuse(problems: Iterator[tuple[str, str]] | Sequence[tuple[str, str]]) -> None:
    """Raises a ConfigError if there is any problem."""
    if found := list(problems):
        raise ConfigError(found)


def _problems(details: ErrorDetails, table: type[Config]) -> Iterator[tuple[str, str]]:
    """Translates one of pydantic's errors in a table into (setting, message) pairs."""
    setting = ".".join(str(key) for key in details["loc"])
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):  # From a table within this one, or from a check of it.
        for name, message in cause.problems:
            yield ".".join(part for part in (setting, name) if part), message
    elif details["type"] == "extra_forbidden":
        yield setting, f"unknown setting; {suggest(setting, setting_names(table))}"
    elif details["type"] in ("model_type", "model_attributes_type"):
        yield setting, f"got {details['input']!r}; must be a table of settings"
    else:
        message = details["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
        message = message[0].lower() + message[1:]
        yield setting, f"got {details['input']!r}; {message}"


def setting_names(table: type[Config]) -> list[str]:
    """Returns the dotted names of a table's settings, those of tables within it included."""
    names = []
    for name, field in table.model_fields.items():
        names.append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            names += [f"{name}.{inner}" for inner in setting_names(field.annotation)]
    return names


def suggest(name: str, known: Sequence[str] | set[str]) -> str:
    """Says which known name is nearest, by the whole name or its last part, or lists them."""
    by_last_part = {other.rpartition(".")[2]: other for other in known}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:
        last_parts = difflib.get_close_matches(
            name.rpartition(".")[2], by_last_part, n=1, cutoff=0.8
        )
        near = [by_last_part[part] for part in last_parts]
    if near:
        return f"did you mean {near[0]!r}?"
    if len(known) > 30:
        return "no known one is near"
    return "known: " + ", ".join(sorted(known))
