"""From the arguments of a command to its settings: a flag for each field of the dataclasses of `config`."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from jsonargparse import ActionYesNo, ArgumentParser, Namespace

import narrower

from ..training.config import TrainConfig
from .config import DataConfig, ModelConfig, PruneConfig, RunConfig
from .job import Settings
from .run_folder import read_settings

Group = TypeVar("Group")


@dataclass(frozen=True)
class Command:
    """A command: what it does, its groups of settings, and how its help reads.

    Attributes:
        run: called with the settings, the terminal, and all parsed options.
        summary, example: for the help.
        groups: dataclasses of `config`, each with the fields that are flags of this command; none: all.
        titles: of groups in the help, where it is not their docstring.
        defaults: {field: value} where it is not that of the dataclass.
        takes_run: its first argument may be a run folder. Others take `--config`.
    """

    run: Callable[..., None]
    summary: str
    example: str
    groups: Sequence[tuple[type, tuple[str, ...]]]
    titles: Mapping[type, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    takes_run: bool = False


def make_parser(commands: Mapping[str, Command], read: Mapping[str, Any] | None = None) -> ArgumentParser:
    """The parser of all commands. `read`: {field: value} of a run folder, which take the place of defaults."""
    parser = ArgumentParser(prog="narrower", description="Take a trained CNN, give back a narrower one.")
    parser.add_argument("--version", action="version", version=f"narrower {narrower.__version__}")
    subcommands = parser.add_subcommands(required=True)
    for name, command in commands.items():
        usage = f"narrower {name} {'[run] ' if command.takes_run else ''}[options]"
        sub = ArgumentParser(usage=usage, description=f"{command.summary}. Example: {command.example}")
        if command.takes_run:
            sub.add_argument("run", nargs="?", help="run folder of `narrower prune` or `narrower train`")
        else:
            sub.add_argument("--config", action="config", help="YAML with any of these settings, such as a run's config.yaml")
        for group, only in command.groups:
            add_options(sub, group, only, command.titles.get(group, group.__doc__ or ""))
        known = {action.dest for action in sub._actions}
        defaults = {**command.defaults, **(read or {})}
        sub.set_defaults({key: value for key, value in defaults.items() if key in known})
        subcommands.add_subcommand(name, sub, help=command.summary)
    return parser


def add_options(parser: ArgumentParser, group: type, only: Sequence[str], title: str) -> None:
    """Add a flag for each field of a dataclass of `config`. `only`: these fields; empty for all."""
    section = parser.add_argument_group(title)
    hints = get_type_hints(group, include_extras=True)
    for item in fields(group):
        if only and item.name not in only:
            continue
        hint, text, *short = get_args(hints[item.name])
        flags = [*short, "--" + item.name.replace("_", "-")]
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        options: dict[str, Any] = {"type": hint}
        if hint is bool:
            options = {"action": ActionYesNo(yes_prefix="", no_prefix="no-")}
        elif element := _element(hint):
            options = {"type": element, "nargs": "+"}
        section.add_argument(*flags, default=default, help=text, **options)


def _element(hint: Any) -> Any:
    """The element type of `list[...]` or `list[...] | None`. None for other types."""
    for part in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        if get_origin(part) is list:
            return get_args(part)[0]
    return None


def parse(commands: Mapping[str, Command], arguments: Sequence[str]) -> tuple[str, Settings, Namespace]:
    """The command, its settings, and all parsed options. If a run folder is named, its settings are the defaults."""
    given = make_parser(commands).parse_args(list(arguments))
    name: str = given.subcommand
    folder = given[name].get("resume") or given[name].get("run")
    if folder is not None:
        given = make_parser(commands, read_settings(Path(folder))).parse_args(list(arguments))
    chosen = given[name]

    def part(group: type[Group]) -> Group:
        return group(**{item.name: chosen[item.name] for item in fields(group) if item.name in chosen})  # type: ignore[arg-type]

    groups = part(ModelConfig), part(DataConfig), part(TrainConfig), part(RunConfig), part(PruneConfig)
    return name, Settings(*groups), chosen
