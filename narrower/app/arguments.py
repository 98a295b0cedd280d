"""From the arguments of a command to its settings: a flag for each field of the dataclasses of `config`."""

from __future__ import annotations

import argparse
import difflib
import json
import types
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import narrower

from ..errors import ConfigError
from ..training.config import TrainConfig
from .config import DataConfig, ModelConfig, PruneConfig, RunConfig
from .job import Settings
from .run_folder import read_settings, read_yaml

Group = TypeVar("Group")
GROUPS = (ModelConfig, DataConfig, TrainConfig, RunConfig, PruneConfig)
WANTED = {int: "a whole number", float: "a number, or a percentage such as 50%", str: "text", bool: "true or false",
          dict: "JSON such as '{\"name\": 0.5}'", list: "a list"}


@dataclass(frozen=True)
class Command:
    """A command: what it does, its groups of settings, and how its help reads.

    Attributes:
        run: called with the settings, the terminal, and the values of all flags.
        summary, example: for the help.
        groups: dataclasses like those of `config`, each with the fields that are flags of this command; none: all.
        titles: of groups in the help, where it is not their docstring.
        defaults: {field: value} where it is not that of the dataclass.
        takes_run: its first argument may be a run folder. Others take `--config`.
        takes_networks: its arguments are run folders and names of networks.
    """

    run: Callable[..., None]
    summary: str
    example: str
    groups: Sequence[tuple[type, tuple[str, ...]]]
    titles: Mapping[type, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    takes_run: bool = False
    takes_networks: bool = False

    def settings(self) -> dict[str, tuple[Any, Any]]:
        """{field: (its type, its default)} of all flags."""
        return {item.name: (hint_of(group, item.name)[0], self.defaults.get(item.name, default_of(item)))
                for group, only in self.groups for item in fields(group) if not only or item.name in only}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are narrower's."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (all options: {self.prog} --help)")


def parse(commands: Mapping[str, Command], arguments: Sequence[str]) -> tuple[str, Settings, Namespace]:
    """The command, its settings, and the values of all flags. Those in a run folder or `--config` take the place of defaults.

    Raises:
        ConfigError: a flag, a setting or a value is not known, or a file cannot be read.
    """
    parser = make_parser(commands)
    found, unknown = parser.parse_known_args(list(arguments))
    given = vars(found)
    name, networks = given.pop("command"), given.pop("networks", [])
    known = commands[name].settings()
    if unknown:
        near = similar(unknown[0].split("=")[0].removeprefix("--"), [key.replace("_", "-") for key in known], "--")
        raise ConfigError(f"there is no option {unknown[0]}{near} (all options: narrower {name} --help)")
    values = {key: default for key, (_, default) in known.items()}
    if folder := given.get("resume") or given.get("run"):
        values |= read(read_settings(Path(folder)), known, lambda key: f"{folder}: {key}")
    if file := given.pop("config", None):
        values |= read(checked(read_yaml(Path(file)), known, file), known, lambda key: f"{file}: {key}")
    values |= read(given, known, lambda key: "--" + key.replace("_", "-"))

    def part(group: type[Group]) -> Group:
        return group(**{item.name: values[item.name] for item in fields(group) if item.name in values})  # type: ignore[arg-type]

    settings = Settings(part(ModelConfig), part(DataConfig), part(TrainConfig), part(RunConfig), part(PruneConfig))
    return name, settings, Namespace(**{"run": given.get("run"), "networks": networks, **values})


def make_parser(commands: Mapping[str, Command]) -> Parser:
    """The parser of all commands. It gives the texts of the flags that are given; `read` makes values of them."""
    parser = Parser(prog="narrower", description="Take a trained CNN, give back a narrower one.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"narrower {narrower.__version__}")
    subcommands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in commands.items():
        first = "[run] " if command.takes_run else "network [network ...] " if command.takes_networks else ""
        usage = f"narrower {name} {first}[options]"
        sub = subcommands.add_parser(
            name, usage=usage, help=command.summary, description=f"{command.summary}. Example: {command.example}",
            allow_abbrev=False, argument_default=argparse.SUPPRESS,
        )  # fmt: skip
        if command.takes_run:
            sub.add_argument("run", nargs="?", help="run folder of `narrower prune` or `narrower train`")
        elif command.takes_networks:
            sub.add_argument("networks", nargs="+", help="run folders, and names of networks as for --model of other commands")
        else:
            sub.add_argument("--config", help="YAML with any of these settings, such as a run's config.yaml")
        for group, only in command.groups:
            add_options(sub, command, group, only)
    return parser


def add_options(parser: argparse.ArgumentParser, command: Command, group: type, only: Sequence[str]) -> None:
    """Add a flag for each field of a dataclass. `only`: these fields; empty for all."""
    section = parser.add_argument_group(command.titles.get(group, group.__doc__ or ""))
    known = command.settings()
    for item in fields(group):
        if only and item.name not in only:
            continue
        hint, text, *short = hint_of(group, item.name)
        default = known[item.name][1]
        shown = "" if default in (None, "", [], {}, False) else f" (default: {default})"
        options: dict[str, Any] = {"help": (text + shown).replace("%", "%%")}
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = item.name.upper()
            options["nargs"] = "+" if any(get_origin(kind) is list for kind in kinds(hint)) else None
        section.add_argument(*short, "--" + item.name.replace("_", "-"), **options)


def hint_of(group: type, name: str) -> tuple[Any, ...]:
    """What a field is annotated with: its type, the help text, and a short flag for some."""
    return get_args(hints_of(group)[name])


@cache
def hints_of(group: type) -> dict[str, Any]:
    return get_type_hints(group, include_extras=True)


def default_of(item: Field[Any]) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def checked(settings: Mapping[str, Any], known: Mapping[str, Any], file: str) -> Mapping[str, Any]:
    """The settings of a file, if there are such. Those of another command are allowed: a run's config.yaml has all."""
    names = {*known, *(item.name for group in GROUPS for item in fields(group))}
    for key in settings:
        if key not in names:
            raise ConfigError(f"{file}: there is no setting {key}{similar(str(key), names)}")
    return settings


def similar(name: str, names: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, sorted(names), n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def read(texts: Mapping[str, Any], known: Mapping[str, tuple[Any, Any]], place: Callable[[str], str]) -> dict[str, Any]:
    """Values of the known settings among `texts`, which come from flags or from YAML.

    Raises:
        ConfigError: a text is not of the type of its setting. The message names the `place` of the setting.
    """
    values = {}
    for key, text in texts.items():
        if key in known:
            hint = known[key][0]
            try:
                values[key] = value_of(hint, text)
            except ValueError:
                wanted = " or ".join(WANTED[get_origin(kind) or kind] for kind in kinds(hint) if kind is not types.NoneType)
                raise ConfigError(f"{place(key)} {text}: give {wanted}") from None
    return values


def kinds(hint: Any) -> tuple[Any, ...]:
    """The members of a union; of another type, itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def value_of(hint: Any, text: Any) -> Any:
    """`text` as the type `hint`. The text null is None where that is allowed. Raises ValueError."""
    if types.NoneType in kinds(hint) and text in (None, "null"):
        return None
    for kind in kinds(hint):
        try:
            return as_kind(kind, text)
        except (ValueError, TypeError):
            continue
    raise ValueError(text)


def as_kind(kind: Any, text: Any) -> Any:
    """`text` as one type. Raises ValueError or TypeError."""
    base, parts = get_origin(kind) or kind, get_args(kind)
    if kind is Any:
        return text
    if base is dict:
        values = json.loads(text) if isinstance(text, str) else text
        return {key: as_kind(parts[1], value) for key, value in dict(values).items()}
    if base is list:
        return [as_kind(parts[0], part) for part in ([text] if isinstance(text, str) else text)]
    if base is float and not isinstance(text, bool):
        return float(text[:-1]) / 100 if isinstance(text, str) and text.endswith("%") else float(text)
    if base is int and isinstance(text, str):
        return int(text)
    if base is str and isinstance(text, (int, float)) and not isinstance(text, bool):
        return str(text)
    if type(text) is base:
        return text
    raise TypeError(text)
