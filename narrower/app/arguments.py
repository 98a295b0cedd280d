"""From the arguments of a command to its settings: jsonargparse has a flag for each field of the dataclasses of `config`."""

from __future__ import annotations

import json
import re
import types
from argparse import ArgumentError, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from jsonargparse import ActionYesNo, ArgumentParser

import narrower

from ..errors import ConfigError, similar
from ..training.config import TrainConfig, flag
from .config import DataConfig, ModelConfig, PruneConfig, RunConfig
from .job import Settings
from .run_folder import read_settings
from .shipped import config_file, read_config

Group = TypeVar("Group")
GROUPS = (ModelConfig, DataConfig, TrainConfig, RunConfig, PruneConfig)
INHERITED = {*(item.name for group in (ModelConfig, DataConfig) for item in fields(group)),
             "batch_size", "amp", "amp_dtype", "channels_last", "workers", "device"}
"""Settings of a run that go with its network: how to make it, its images, and where and how to compute."""
WANTED = {int: "a whole number", float: "a number, or a percentage such as 50%", str: "text", bool: "true or false",
          dict: "JSON such as '{\"name\": 0.5}'"}


@dataclass(frozen=True)
class Command:
    """A command: what it does, its groups of settings, and how its help reads.

    Attributes:
        run: called with the settings, the terminal, and the values of all flags.
        summary, example: for the help.
        groups: dataclasses like those of `config`, each with the fields that are flags of this command; none: all.
        titles: of groups in the help, where it is not their docstring.
        defaults: {field: value} where it is not that of the dataclass.
        takes_run: its first argument may be a run folder: its network, and the `INHERITED` settings.
        takes_config: it has `--config`.
        takes_networks: its arguments are run folders and names of networks.
        takes_runs: its arguments are run folders.
        takes_repository: its arguments are a run folder and the name of a repository.
    """

    run: Callable[..., None]
    summary: str
    example: str
    groups: Sequence[tuple[type, tuple[str, ...]]]
    titles: Mapping[type, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    takes_run: bool = False
    takes_config: bool = False
    takes_networks: bool = False
    takes_runs: bool = False
    takes_repository: bool = False

    def flags(self) -> dict[str, tuple[type, Field[Any]]]:
        """{name: (its dataclass, its field)} of all flags."""
        return {item.name: (group, item) for group, only in self.groups for item in fields(group)
                if not only or item.name in only}


class Parser(ArgumentParser):
    """The parser of one command. Its errors are narrower's, of one line.

    Attributes:
        hints: {field: its type}.
    """

    hints: Mapping[str, Any] = {}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises ConfigError in place of an error of jsonargparse, whose texts name its own parts."""
        key, value = re.search(r'Parser key "([\w.]+)"', message), re.search(r"(?:[Vv]alue|boolean): (.*)$", message)
        name = key[1].rpartition(".")[2] if key else ""
        if value and name in self.hints:
            raise ConfigError(f"{flag(name)} {value[1]}: give {wanted(self.hints[name])}") from None
        if message.startswith("unrecognized arguments: "):
            option = message.split()[2]
            flags = [key.replace("_", "-") for key in self.hints]
            near = similar(option.split("=")[0].removeprefix("--"), flags, prefix="--")
            message = (f"there is no option {option}{near}" if option.startswith("-") else
                       f"unexpected argument {option!r} (quote a path with spaces)")
        message = re.sub(r"required: \w+\.", "required: ", message)
        raise ConfigError(f"{' '.join(message.split())} (all options: {self.prog.replace(' [options]', '')} --help)") from None


def parse(commands: Mapping[str, Command], arguments: Sequence[str]) -> tuple[str, Settings, Namespace]:
    """The command, its settings, and the values of all flags. Those in a run folder or `--config` take the place of defaults.

    Raises:
        ConfigError: a flag, a setting or a value is not known, or a file cannot be read.
    """
    parsers = {name: make_parser(name, command) for name, command in commands.items()}
    parser = Parser(prog="narrower", description="Take a trained CNN, give back a narrower one.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"narrower {narrower.__version__}")
    subcommands = parser.add_subcommands(required=True, metavar="command")
    for name, sub in parsers.items():
        subcommands.add_subcommand(name, sub, help=commands[name].summary)
    name = next((text for text in arguments if text in commands), "")
    if not name and not {"-h", "--help", "--version"}.intersection(arguments):
        typed = next((text for text in arguments if not text.startswith("-")), "")
        missing = f"there is no command {typed!r}{similar(typed, commands) or '.'}" if typed else "no command is given."
        raise ConfigError(f"{missing} Take one of {', '.join(commands)} (all options: narrower --help)")
    parser.hints = parsers[name].hints if name else {}
    texts = with_fractions(arguments, parser.hints)
    given = parser.parse_args(texts)[name]
    if (run := given.get("run")) and given.get("resume"):
        raise ConfigError(f"{run} --resume {given.resume}: a run goes on with its own network, give one or the other")
    if folder := given.get("resume"):
        set_defaults(parsers[name], read_settings(Path(folder)), folder)
    elif run:
        inherited = {key: value for key, value in read_settings(Path(run)).items() if key in INHERITED}
        set_defaults(parsers[name], inherited | {"checkpoint": run, "pretrained": False}, run)
    if file := given.get("config"):
        set_defaults(parsers[name], checked(read_config(config_file(file)), parser.hints, file), file)
    values = vars(parser.parse_args(texts)[name])

    def part(group: type[Group]) -> Group:
        own = {key: values[key] for key, (of, _) in commands[name].flags().items() if of is group}
        return group(**own)

    settings = Settings(part(ModelConfig), part(DataConfig), part(TrainConfig), part(RunConfig), part(PruneConfig))
    return name, settings, Namespace(**{"run": None, "networks": [], "runs": [], **values})


def make_parser(name: str, command: Command) -> Parser:
    """The parser of one command."""
    first = "[RUN] " if command.takes_run else "network [network ...] " if command.takes_networks else ""
    first = "RUN [RUN ...] " if command.takes_runs else "RUN USER/NAME " if command.takes_repository else first
    parser = Parser(
        prog=f"narrower {name}", usage=f"narrower {name} {first}[options]", allow_abbrev=False,
        description=f"{command.summary}. Example: {command.example}",
    )  # fmt: skip
    parser.hints = {key: hint_of(group, key)[0] for key, (group, _) in command.flags().items()}
    if command.takes_run:
        parser.add_argument("run", nargs="?", metavar="RUN", help="folder of a run: its network and images are taken")
    if command.takes_networks:
        parser.add_argument("networks", nargs="+", help="run folders, and names of networks as for --model of other commands")
    if command.takes_runs:
        parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs that have ended")
    if command.takes_repository:
        parser.add_argument("run", metavar="RUN", help="folder of a run that has narrowed a network")
        parser.add_argument("repository", metavar="USER/NAME", help="repository on the hub, made where it is missing")
    if command.takes_config:
        parser.add_argument("--config", help="YAML with any of these settings, such as a run's config.yaml; "
                            "or a name that `narrower configs` lists")
    sections = {group: parser.add_argument_group(command.titles.get(group, group.__doc__ or "")) for group, _ in command.groups}
    for key, (group, item) in command.flags().items():
        hint, text, *short = hint_of(group, key)
        default = command.defaults.get(key, default_of(item))
        options: dict[str, Any] = {"type": hint, "metavar": key.upper()}
        if hint is bool:
            options = {"action": ActionYesNo(yes_prefix="", no_prefix="no-")}
        elif lists := [kind for kind in kinds(hint) if get_origin(kind) is list]:
            options |= {"type": get_args(lists[0])[0], "nargs": "+"}
        sections[group].add_argument(*short, flag(key), default=default, help=text, **options)
    return parser


def set_defaults(parser: Parser, settings: Mapping[str, Any], place: str) -> None:
    """Make the settings of a file, those that are flags of this command, the defaults.

    Raises:
        ConfigError: a value is not of the type of its setting. The message names the file and the setting.
    """
    for key, value in settings.items():
        if key not in parser.hints:
            continue
        hint = parser.hints[key]
        try:
            parsed = parser.parse_object({key: fraction(value) if float in parts(hint) else value}, defaults=False)
        except (ConfigError, ArgumentError):
            raise ConfigError(f"{place}: {key} {value}: give {wanted(hint)}") from None
        parser.set_defaults({key: parsed[key]})


def with_fractions(arguments: Sequence[str], hints: Mapping[str, Any]) -> list[str]:
    """The arguments, with fractions for the percentages that are given to flags of numbers."""
    flags = {flag(key) for key, hint in hints.items() if float in parts(hint)}
    found, last = [], ""
    for text in arguments:
        if text.startswith("-") and not text[1:2].isdigit():
            last = text.split("=")[0]
        found.append(fraction(text) if last in flags else text)
    return found


def fraction(value: Any) -> Any:
    """`value` with fractions for percentages: 50%, --macs=50%, {"fc": "50%"}."""
    if not isinstance(value, str):
        return json.loads(fraction(json.dumps(value))) if isinstance(value, (list, dict)) else value
    return re.sub(r'(^|[=:] *)"?(\d+\.?\d*)%"?(?=$|[,}\]])', lambda found: f"{found[1]}{float(found[2]) / 100}", value)


def hint_of(group: type, name: str) -> tuple[Any, ...]:
    """What a field is annotated with: its type, the help text, and a short flag for some."""
    return get_args(hints_of(group)[name])


@cache
def hints_of(group: type) -> dict[str, Any]:
    return get_type_hints(group, include_extras=True)


def default_of(item: Field[Any]) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def kinds(hint: Any) -> tuple[Any, ...]:
    """The members of a union; of another type, itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def parts(hint: Any) -> set[Any]:
    """The members of a union, and what its lists and dicts hold."""
    return {part for kind in kinds(hint) for part in (kind, *get_args(kind))}


def wanted(hint: Any) -> str:
    """What may be given for a setting of this type."""
    members = [kind for kind in kinds(hint) if kind is not types.NoneType]
    return " or ".join(" or ".join(get_args(kind)) if get_origin(kind) is Literal else
                       WANTED[get_args(kind)[0] if get_origin(kind) is list else get_origin(kind) or kind] for kind in members)


def checked(settings: Mapping[str, Any], known: Iterable[str], file: str) -> Mapping[str, Any]:
    """The settings of a file, if there are such. Those of another command are allowed: a run's config.yaml has all."""
    names = {*known, *(item.name for group in GROUPS for item in fields(group))}
    for key in settings:
        if key not in names:
            raise ConfigError(f"{file}: there is no setting {key}{similar(str(key), names)}")
    return settings
