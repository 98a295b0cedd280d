"""`narrower push`: the network of a run, with a card and hashes, to a repository on a hub."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open

import narrower

from ..errors import ConfigError, StorageError
from ..models import origin
from ..report import CARD, Facts, check_fields, model_card
from ..report.facts import MEASURE, START
from ..sharing import SUMS, checksums, open_hub, reach, upload
from ..sharing.hub import is_repository
from ..storage import META, WEIGHTS, differences, read_meta, write_whole
from ..training.config import TrainConfig, flag
from . import run_folder
from .arguments import default_of
from .config import FINE_TUNING, DataConfig, ExportConfig, ModelConfig, PruneConfig, PushConfig, RunConfig, part
from .deploying import SUFFIXES, export_network
from .job import Reporter, Settings
from .reporting import ended_run

FOLDER = "hub"
CONTENTS = {WEIGHTS: "the tensors of the narrow network", META: "the shapes that `narrower.load` cuts to",
            run_folder.CONFIG: "all settings", run_folder.METRICS: "figures of each stage and epoch",
            run_folder.PLAN: "the channels that stay"}
ABOUT_THE_MACHINE = ("output", "overwrite", "resume", "dry_run", "cache_dir", "device", "workers", "log_with", "report")


def push_run(folder: Path, repository: str, given: PushConfig, report: Reporter | None = None) -> str:
    """Share the network of a run. Returns the address of the commit, or the folder that `--dry-run` wrote.

    Raises:
        ConfigError: the folder is no run that has ended with a narrow network; a field that a card does not have.
        StorageError: its files are damaged.
        HubError: the hub cannot be reached or refuses. Then nothing was uploaded.
        MissingExtraError: the extra `hub` is not installed.
    """
    report = report or Reporter()
    if not is_repository(repository):
        raise ConfigError(f"{repository} is no name of a repository: give user/name")
    open_hub(writes=not given.dry_run)
    check_fields(given.card)
    facts = facts_of(folder)
    target = Path(given.output) if given.output else folder / FOLDER
    if given.dry_run and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists already: remove it, or give another --output")
    if not given.dry_run:
        reach()
    contents = contents_of(folder, repository, facts, given, report)
    if given.dry_run:
        write_whole({target / name: content for name, content in contents.items()})
        return str(target)
    message = given.message or f"{facts.settings['model']}, made narrower by narrower {narrower.__version__}"
    with report.busy(f"uploading to {repository}"):
        return upload(contents, repository, message=message, private=given.private, revision=given.revision)


def facts_of(folder: Path) -> Facts:
    """What the card says of a run. Of paths, only the last part; nothing of what was typed. Raises as `push_run`."""
    settings, run = ended_run(folder)
    if not (folder / META).is_file() or not run.last(MEASURE):
        raise ConfigError(f"the network of {folder} was not narrowed: there is nothing that narrower.load could read")
    check_network(folder)
    agreement = not run.last(START).get("labelled", True)
    rows = [{key: value for key, value in row.items() if key != "typed"} for row in run.rows()]
    return Facts(folder.absolute().name, without_paths(settings), without_paths(rows), agreement=agreement)


def check_network(folder: Path) -> None:
    """Raise StorageError unless the files of a network are whole and belong together. The network itself is not needed."""
    record, tied = read_meta(folder)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{folder / WEIGHTS} cannot be read ({error})") from error
    expected = {name: shape for name, shape in record.shapes.items() if name not in tied}
    if found != expected:
        raise StorageError(f"{WEIGHTS} and {META} in {folder} are of different networks: {differences(expected, found)}")


def contents_of(folder: Path, repository: str, facts: Facts, given: PushConfig, report: Reporter) -> dict[str, bytes]:
    """The files of the repository: {name: content}."""
    contents = {name: (folder / name).read_bytes() for name in (WEIGHTS, META)}
    contents[run_folder.CONFIG] = run_folder.to_yaml(facts.settings).encode()
    contents[run_folder.METRICS] = "".join(json.dumps(row) + "\n" for row in facts.rows).encode()
    if (folder / run_folder.PLAN).is_file():
        contents[run_folder.PLAN] = (folder / run_folder.PLAN).read_bytes()
    exported, about = exported_files(folder, given.exports, report)
    contents |= exported
    known = origin(facts.settings["model"]) if facts.settings.get("pretrained") else {}
    licence = {"license": given.license} if given.license else {}
    card = model_card(facts, repository, command_line(facts),
                      {name: {**CONTENTS, **about}[name] for name in contents} | {SUMS: "the hashes of these files"},
                      {**known, **licence, **given.card})
    return {CARD: card.encode(), **contents, SUMS: checksums(contents).encode()}


def exported_files(folder: Path, formats: Sequence[str], report: Reporter) -> tuple[dict[str, bytes], dict[str, str]]:
    """The network in other formats, and what is said of each file."""
    run = run_folder.read_settings(folder)
    model = replace(part(ModelConfig, run), checkpoint=str(folder), pretrained=False)
    settings = Settings(model=model, data=part(DataConfig, run))
    contents: dict[str, bytes] = {}
    about: dict[str, str] = {}
    for name in formats:
        with TemporaryDirectory() as place:
            path = Path(place) / f"model{SUFFIXES[name]}"
            made = export_network(settings, folder, ExportConfig(name, output=str(path)), report)
            contents |= {file.name: file.read_bytes() for file in sorted(Path(place).iterdir())}
            about |= {file.name: f"belongs to `{path.name}`" for file in Path(place).iterdir()}
            about[path.name] = f"the same for {made.runtime}, to {made.difference:.1e} of the output; batch size: {made.batch}"
    return contents, about


def without_paths(value: Any) -> Any:
    """`value` with the last part in the place of each absolute path."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def command_line(facts: Facts) -> str:
    """The command of a run, with the settings that are not the default."""
    command = str(facts.start.get("command", "prune"))
    words, defaults = ["narrower", command], FINE_TUNING if command == "prune" else {}
    for group in (ModelConfig, DataConfig, PruneConfig, TrainConfig, RunConfig):
        for item in fields(group):
            default = defaults.get(item.name, default_of(item))
            value = facts.settings.get(item.name, default)
            if value == default or value is None or item.name in ABOUT_THE_MACHINE:
                continue
            typed = flag(item.name, value)
            if isinstance(value, bool):
                words.append(typed)
            else:
                words += [typed, *([json.dumps(value)] if isinstance(value, dict) else
                                   map(str, value) if isinstance(value, list) else [str(value)])]
    return shlex.join(words)
