"""Flags from typed settings: a command is a table of settings, and each setting is a flag.

A setting within a table is spelled as in a config file, `--training.batch_size`; a flag without a
dot has hyphens, `--run-dir`. Both spellings are accepted for both.
"""

import argparse
import functools
import json
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_args

import pydantic
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSettingsSource,
    CliSubCommand,
    CliToggleFlag,
)

from tfrs_pipeline.messages import suggest
from tfrs_pipeline.settings import Config, tables_in

_NONE = "\0"  # The library reads this as None, since "none" may be a setting's value.
_WORDS = {"str": "TEXT", "Path": "PATH", "int": "N", "float": "X", "datetime": "TIME"}


class UsageError(ValueError):
    """Flags that cannot be read."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage, which may be long."""
        raise UsageError(message.replace("ignored explicit argument", "takes no value; got"))


class _Values(argparse.Action):
    """Collects the values after a flag as JSON for pydantic: a list, or an object of NAME=VALUE."""

    def __call__(self, parser: Any, namespace: Any, values: Any, flag: Any = None) -> None:
        # Flags that are not settings of a config file may be repeated, and "none" is a value.
        if "." not in self.dest.partition(".")[2]:
            given = json.loads(getattr(namespace, self.dest, None) or "[]")
            if isinstance(given, dict):
                given = [f"{name}={value}" for name, value in given.items()]
            values = [*given, *values]
        elif values == ["none"]:
            values = []
        if str(self.metavar).startswith("NAME="):
            if wrong := [value for value in values if "=" not in value]:
                raise UsageError(f"{flag}: got {wrong[0]!r}; write {self.metavar}")
            values = dict(value.split("=", 1) for value in values)
        setattr(namespace, self.dest, json.dumps(values))


class Command(Config):
    """Flags that every command has."""

    verbose: CliToggleFlag[bool] = False
    """Log details of each stage."""


class OfModel(Command):
    """Flags of commands that read an exported model."""

    model: CliPositionalArg[Path]
    """Folder saved_models/NAME[/VERSION]."""


@dataclass(frozen=True)
class CommandLine:
    """A program's commands; the docstring of each is its help.

    `brief` names a command's settings within tables that `--help` shows; `--help-all` shows all.
    """

    program: str
    version: str
    description: str
    commands: Mapping[str, type[Config]]
    brief: Mapping[str, Collection[str]]
    _flags: dict[str, list[str]] = field(default_factory=dict)

    def read(self, arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
        """Reads a command and its settings by dotted name; values are not checked yet."""
        command = next((text for text in arguments if not text.startswith("-")), None)
        if command is not None and command not in self.commands:
            raise UsageError(f"unknown command {command!r}; {suggest(command, self.commands)}")
        parser = _Parser(prog=self.program, description=self.description)
        parser.add_argument("--version", action="version", version=self.version)
        source = self._source(parser, "--help-all" in arguments)
        options, unknown = parser.parse_known_args(
            [_spelled("--help" if text == "--help-all" else text) for text in arguments]
        )
        command = vars(options)[":subcommand"]
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
            if flag in self._flags[command]:
                raise UsageError(f"{flag} stands before the command: write it after {command!r}")
            others = " and ".join(name for name, flags in self._flags.items() if flag in flags)
            hint = f"a flag of {others}" if others else suggest(flag, self._flags[command])
            raise UsageError(f"unknown flag {flag}; {hint}")
        paths = [name.split(".") for name in vars(options) if name.startswith(f"{command}.")]
        given = source(parsed_args=options)()
        return command, {
            ".".join(path[1:]): functools.reduce(operator.getitem, path, given) for path in paths
        }

    def parsers(self) -> Mapping[str, argparse.ArgumentParser]:
        """Returns the parser of each command, by name."""
        parser = _Parser(prog=self.program)
        self._source(parser, shows_all=False)
        (found,) = (action.choices for action in parser._actions if action.dest == ":subcommand")
        return dict(found or {})

    def _source(self, parser: _Parser, shows_all: bool) -> CliSettingsSource[_Parser]:
        sub_command: Any = CliSubCommand
        fields: dict[str, Any] = {
            name.replace("-", "_"): (
                sub_command[table],
                pydantic.Field(alias=name, description=str(table.__doc__).split("\n\n")[0]),
            )
            for name, table in self.commands.items()
        }

        groups: dict[str, Any] = {}

        def add_group(parser: Any, title: str, description: str) -> Any:
            if table := title.rpartition(".")[0]:  # A dataclass is the value of one flag.
                return groups[f"{table} options"]
            groups[title] = parser.add_argument_group(title, description if shows_all else None)
            return groups[title]

        def add_parser(parsers: Any, name: str, **options: Any) -> _Parser:
            if name in self.brief:
                options["usage"] = f"{self.program} {name} [--FLAG VALUE ...]"
                options["epilog"] = f"{self.program} {name} --help-all shows every setting."
            self._flags[name] = []
            return parsers.add_parser(name, **options)

        return CliSettingsSource(
            pydantic.create_model("Commands", __base__=BaseSettings, **fields),
            root_parser=parser,
            cli_implicit_flags=True,
            cli_avoid_json=True,
            cli_enforce_required=True,
            cli_hide_none_type=True,
            cli_parse_none_str=_NONE,
            add_argument_method=functools.partial(self._add_argument, shows_all),
            add_argument_group_method=add_group,
            add_parser_method=add_parser,
            formatter_class=argparse.HelpFormatter,
        )

    def _add_argument(self, shows_all: bool, parser: Any, *names: str, **options: Any) -> None:
        command, _, setting = str(options.get("dest", names[0])).partition(".")
        field = _field(self.commands[command], setting)
        # No flag for a table, whose settings are flags, or for a field of a dataclass.
        if field is None or setting in tables_in(self.commands[command]):
            return
        if options.pop("const", None):
            del options["nargs"]
        is_hidden = options["help"] == argparse.SUPPRESS or "." in setting
        options["help"] = explained(field).replace("%", "%%")
        if is_hidden and not shows_all and setting not in self.brief.get(command, ()):
            options["help"] = argparse.SUPPRESS
        if options.get("action") == "append":
            options |= {"action": _Values, "nargs": "*"}
        elif "." in setting and type(None) in get_args(field.annotation):
            options["type"] = lambda text: _NONE if text == "none" else text
        if names[0].startswith("-"):
            names = tuple(_spelled(name) for name in names)
            self._flags[command] += names
            if "metavar" in options:
                has_kinds = setting.endswith("_features")
                options["metavar"] = "NAME=KIND" if has_kinds else _metavar(options["metavar"])
        parser.add_argument(*names, **options)


def _spelled(argument: str) -> str:
    """Spells a flag with underscores if it has a dot, else with hyphens."""
    found = re.fullmatch(r"(--(?:no-)?)([^=]+)(.*)", argument, re.DOTALL)
    if found is None:
        return argument
    dashes, name, value = found.groups()
    return dashes + (name.replace("-", "_") if "." in name else name.replace("_", "-")) + value


def _metavar(annotation: str) -> str:
    """Shortens the library's names of types, such as dict[str,float] and tuple[int,...]."""
    inner = re.sub(r"^tuple\[(.*),\.\.\.\]$", r"\1", annotation)
    inner = re.sub(r"^dict\[str,(.*)\]$", r"NAME=\1", inner)
    inner = re.sub(r"^NAME=\{float,.*\}$", "NAME=X", inner)
    inner = re.sub(r"^NAME=\{.*\}$", "NAME=KIND", inner)
    inner = re.sub(r"\b(str|Path|int|float|datetime)\b", lambda match: _WORDS[match[0]], inner)
    return "[KIND:]NAME=VALUE:..." if re.search(r"JSON|[A-Z][a-z]", inner) else inner


def _field(table: Any, setting: str) -> FieldInfo | None:
    *tables, name = setting.split(".")
    for inner in tables:
        if inner not in tables_in(table):
            return None
        table = tables_in(table)[inner]
    return next((f for key, f in table.model_fields.items() if name in (key, f.alias)), None)


def explained(field: FieldInfo) -> str:
    """Returns a setting's description, with the default if the description does not say it."""
    says_itself = "not given" in str(field.description) and field.default is None
    default = "" if field.is_required() or says_itself else as_typed(field.default)
    return f"{field.description} (default: {default})" if default else str(field.description)


def as_typed(value: Any) -> str:
    """Formats a value as a user types it after its flag."""
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
