"""Flags from typed settings: a command is a table of settings, and each setting is a flag.

A setting within a table is spelled as in a config file, `--training.batch_size`; a flag without a
dot has hyphens, `--run-dir`. argparse reads the flags as text, which the tables then convert and
check, as they do with a config file.
"""

import argparse
import dataclasses
import pkgutil
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeAlias, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from tfrs_pipeline.messages import suggest
from tfrs_pipeline.settings import Config, tables_in

_POSITIONAL = "positional"
PositionalPath: TypeAlias = Annotated[Path, _POSITIONAL]
"""A path that is given without a flag."""
_WORDS = {"str": "TEXT", "Path": "PATH", "int": "N", "float": "X", "datetime": "TIME"}


class UsageError(ValueError):
    """Flags that cannot be read."""


class Command(Config):
    """Flags that every command has."""

    verbose: bool = False
    """Log details of each stage."""


class OfModel(Command):
    """Flags of commands that read an exported model."""

    model: PositionalPath
    """Folder saved_models/NAME[/VERSION]."""


class _Parser(argparse.ArgumentParser):
    """The parser of a command.

    Attributes:
        flags: All spellings of its flags, such as `--no-export.gate`.
        fields: Its settings by dotted name.
    """

    def __init__(self, **options: Any) -> None:
        # A mistyped flag is refused with the nearest one, not taken for an abbreviation.
        super().__init__(allow_abbrev=False, **options)
        self.flags: list[str] = []
        self.fields: dict[str, FieldInfo] = {}

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage, which may be long."""
        raise UsageError(message.replace("ignored explicit argument", "takes no value; got"))

    def add_table(
        self, table: type[Config], brief: Collection[str] | None, prefix: str = ""
    ) -> None:
        """Adds a flag for each setting; the help shows those that `brief` names, None for all."""
        about = table.__doc__ if brief is None else None
        group = self.add_argument_group(f"{prefix[:-1]} options", about) if prefix else self
        for name, field in table.model_fields.items():
            setting = f"{prefix}{field.alias or name}"
            if inner := tables_in(table).get(name):
                self.add_table(inner, brief, f"{setting}.")
                continue
            is_shown = brief is None or not prefix or setting in brief
            # argparse fills in %(default)s and the like.
            about = explained(field).replace("%", "%%") if is_shown else argparse.SUPPRESS
            flag, options = _flag(setting, field)
            self.flags += group.add_argument(flag, help=about, **options).option_strings
            self.fields[setting] = field

    def value(self, setting: str, value: Any) -> Any:
        """Converts what was parsed to what a table takes: text, or a list or mapping of it."""
        annotation = self.fields[setting].annotation
        # Only a setting of a config file has no other word for an empty list, or for None.
        if "." in setting and value in ("none", ["none"]):
            value = [] if isinstance(value, list) else None if _is_optional(annotation) else value
        if get_origin(_members(annotation)[0]) is not dict:
            return value
        if wrong := [text for text in value if "=" not in text]:
            raise UsageError(f"--{setting}: got {wrong[0]!r}; write NAME=VALUE")
        return dict(text.split("=", 1) for text in value)


@dataclass(frozen=True)
class CommandLine:
    """A program's commands, named as "package.module:Table"; the docstring of each is its help.

    `brief` names a command's settings within tables that `--help` shows; `--help-all` shows all.
    """

    program: str
    version: str
    description: str
    commands: Mapping[str, str]
    brief: Mapping[str, Collection[str]]

    def table(self, command: str) -> type[Config]:
        """Imports the settings of a command."""
        table: type[Config] = pkgutil.resolve_name(self.commands[command])
        return table

    def read(self, arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
        """Reads a command and its settings by dotted name; values are not checked yet."""
        command = next((text for text in arguments if not text.startswith("-")), None)
        if command is not None and command not in self.commands:
            raise UsageError(f"unknown command {command!r}; {suggest(command, self.commands)}")
        named = self.commands if command is None else [command]
        parser, parsers = self._parsers(named, shows_all="--help-all" in arguments)
        # What argparse does not know is collected, to name the flag that is nearest to it.
        options, unknown = parser.parse_known_args(
            ["--help" if text == "--help-all" else text for text in arguments]
        )
        if command is None:
            raise UsageError(
                f"no command; known: {', '.join(self.commands)} (see {self.program} --help)"
            )
        if unknown and not unknown[0].startswith("-"):
            position = arguments.index(unknown[0])
            flag, value = arguments[max(position - 2, 0)], arguments[position - 1]
            takes = f": {flag} takes one value" if flag.startswith("--") else ""
            help_ = f"see {self.program} {command} --help"
            raise UsageError(f"unexpected {unknown[0]!r} after {value!r}{takes}; {help_}")
        if unknown:
            flag = unknown[0].partition("=")[0]
            if flag in parsers[command].flags:
                raise UsageError(f"{flag} stands before the command: write it after {command!r}")
            every = self._parsers(self.commands, shows_all=False)[1]
            others = " and ".join(name for name, other in every.items() if flag in other.flags)
            hint = f"a flag of {others}" if others else suggest(flag, parsers[command].flags)
            raise UsageError(f"unknown flag {flag}; {hint}")
        return command, {x: parsers[command].value(x, y) for x, y in vars(options).items()}

    def parsers(self) -> Mapping[str, argparse.ArgumentParser]:
        """Returns the parser of each command, by name."""
        return self._parsers(self.commands, shows_all=False)[1]

    def _parsers(
        self, names: Iterable[str], *, shows_all: bool
    ) -> tuple[_Parser, dict[str, _Parser]]:
        parser = _Parser(prog=self.program, description=self.description)
        parser.add_argument("--version", action="version", version=self.version)
        subparsers = parser.add_subparsers(title="subcommands")
        parsers = {}
        for name in names:
            table = self.table(name)
            doc = str(table.__doc__)
            options: dict[str, Any] = {"help": doc.split("\n\n")[0], "description": doc}
            # Only what is given is parsed: a default would replace a preset or a file.
            options["argument_default"] = argparse.SUPPRESS
            if name in self.brief:
                options["usage"] = f"{self.program} {name} [--FLAG VALUE ...]"
                options["epilog"] = f"{self.program} {name} --help-all shows every setting."
            parsers[name] = subparsers.add_parser(name, **options)
            parsers[name].add_table(table, None if shows_all else self.brief.get(name))
        return parser, parsers


def _flag(setting: str, field: FieldInfo) -> tuple[str, dict[str, Any]]:
    """Returns a setting's flag, and what argparse has to know of its values."""
    if _POSITIONAL in field.metadata:
        return setting, {"metavar": setting.upper()}
    # A single letter, such as k, gets a single hyphen.
    flag = f"-{setting}" if len(setting) == 1 else f"--{setting}"
    if "." not in setting:
        flag = flag.replace("_", "-")
    options: dict[str, Any] = {"dest": setting}
    # A flag of a bool takes no value: --NAME says yes, --no-NAME no.
    if field.annotation is bool:
        # A setting of a config file needs --no-NAME too, to replace the file's.
        is_switch = "." not in setting and field.default is False
        options["action"] = "store_true" if is_switch else argparse.BooleanOptionalAction
        return flag, options
    options |= {"metavar": _metavar(field.annotation), "required": field.is_required()}
    if get_origin(_members(field.annotation)[0]) in (tuple, dict):
        # A flag that is no setting of a config file may be repeated; of others, the last counts.
        options |= {"nargs": "*", "action": "store" if "." in setting else "extend"}
    return flag, options


def _members(annotation: Any) -> list[Any]:
    """Returns the types of a union, or the only one, without their checks."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [type_ for inner in get_args(annotation) for type_ in _members(inner)]
    return [annotation]


def _is_optional(annotation: Any) -> bool:
    return type(None) in _members(annotation)


def _metavar(annotation: Any) -> str:
    """Describes the values of a type, such as N, {auto,exact} and NAME=VALUE."""
    members = [type_ for type_ in _members(annotation) if type_ is not type(None)]
    origin, inner = get_origin(members[0]), get_args(members[0])
    if origin is tuple:
        return _metavar(inner[0])
    if origin is dict:
        return "NAME=VALUE"
    if dataclasses.is_dataclass(members[0]):
        return "[KIND:]NAME=VALUE:..."
    words = inner if origin is Literal else [_WORDS[type_.__name__] for type_ in members]
    return f"{{{','.join(words)}}}" if len(words) > 1 else words[0]


def explained(field: FieldInfo) -> str:
    """Returns a setting's description, with the default if the description does not say it."""
    says_itself = "not given" in str(field.description) and field.default is None
    default = "" if field.is_required() or says_itself else as_typed(field.default)
    return f"{field.description} (default: {default})" if default else str(field.description)


def as_typed(value: Any) -> str:
    """Formats a value as a user types it after its flag.

    Example:
        >>> as_typed((20, 100)), as_typed(None), as_typed({"purchase": 5.0})
        ('20 100', 'none', 'purchase=5.0')
    """
    if isinstance(value, tuple | list):
        return " ".join(map(as_typed, value)) or "none"
    plain = to_jsonable_python(value)
    if isinstance(plain, dict):
        kind = [plain.pop("kind")] if "kind" in plain else []
        pairs = [
            f"{name}={','.join(inner) if isinstance(inner, list) else inner}"
            for name, inner in plain.items()
            if inner is not None
        ]
        pairs = [*kind, *pairs]
        return (" " if isinstance(value, Mapping) else ":").join(pairs) or "none"
    if isinstance(plain, bool):
        return "yes" if plain else "no"
    return "none" if plain is None else str(plain)
