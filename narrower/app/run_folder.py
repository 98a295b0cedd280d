"""The folder of a run: its settings, metrics and log. Only one process writes there.

| file                  | what                                                                         |
|-----------------------|------------------------------------------------------------------------------|
| `model.safetensors`   | the network (narrow after `prune`, dense after `train`)                      |
| `best.safetensors`    | its weights after the epoch that was best on the training images held out    |
| `narrower.json`       | what made it narrow, for `load`                                              |
| `plan.json`           | the channels that stay                                                       |
| `config.yaml`         | all settings; `--config` takes it back                                       |
| `scores.safetensors`  | the score of each channel of the dense network, by group                     |
| `sensitivity.json`    | the measured damage of each group                                            |
| `latency.json`        | the latency table (`--latency`, `--round-to auto`); `--latency-table` takes it back |
| `latency.times.json`  | its times, while they are measured                                           |
| `metrics.jsonl`       | a row per epoch and per stage                                                |
| `log.txt`             | what was printed                                                             |
| `dense.safetensors`   | the dense network, where it was trained here                                 |
| `*.checkpoint.pt`     | where training stopped, for `--resume`                                       |
| `layers.pt`           | the network after the last layer that `--schedule layer` was done with       |
| `report.html`         | what came of it, to look at                                                  |
| `report/*.svg`        | its pictures, on request                                                     |
| `previous/`           | the run that this one replaces (`--overwrite`), until this one has ended     |
"""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import narrower

from .. import storage
from ..errors import ConfigError, StorageError
from ..report import PICTURE_NAMES
from ..report.facts import RESUME, START, last_row
from ..training.agreement import is_of_another

MODEL, NARROW = storage.WEIGHTS, storage.META
CONFIG, METRICS, LOG = "config.yaml", "metrics.jsonl", "log.txt"
DENSE, PLAN, SCORES, SENSITIVITY = "dense.safetensors", "plan.json", "scores.safetensors", "sensitivity.json"
LATENCY, TIMES = "latency.json", "latency.times.json"
BEST = "best.safetensors"
REPORT, PICTURES = "report.html", "report"
DENSE_CHECKPOINT, CHECKPOINT = "dense.checkpoint.pt", "training.checkpoint.pt"
LAYERS, LAYERS_CHECKPOINT = "layers.pt", "layers.checkpoint.pt"
FILES = (CONFIG, MODEL, BEST, NARROW, PLAN, METRICS, LOG, DENSE, SCORES, SENSITIVITY, LATENCY, TIMES, DENSE_CHECKPOINT,
         CHECKPOINT, LAYERS, LAYERS_CHECKPOINT, REPORT)
"""In the order in which they are moved or removed: a folder without settings is no run that could go on."""
DRAWN = tuple(f"{PICTURES}/{name}.svg" for name in PICTURE_NAMES)
"""The pictures of the report. They go with the files; others beside them stay."""
PREVIOUS, MOVING = "previous", "previous.part"
IMAGES, WEIGHTS = "training images", "weights of the dense network"
"""In the row `start`: what a run began with, the number of the one and the fingerprint of the other."""
INPUT_SIZE = "input_size"
"""There too: channels, height and width of an image."""


class Run:
    """A run folder. Rows and log lines are kept in memory until `claim`, and written from then on."""

    def __init__(
        self, folder: Path, *, command: str = "", typed: str = "", resume: bool = False, overwrite: bool = False,
        writes: bool = True,
    ) -> None:  # fmt: skip
        """
        Args:
            folder: its path. `claim` creates it.
            command: that of the command line which makes the run.
            typed: the whole line, as it was typed.
            resume: continue the run in this folder.
            overwrite: replace the run in this folder (`replacing`). Other files there stay.
            writes: True in the first process, False in the others.

        Raises:
            ConfigError: the folder already holds a run, or has none of this command to resume, or is a file.
        """
        self.folder = folder
        self.command, self.typed = command, typed
        self.resume = resume
        self.writes = writes
        self._waiting: list[tuple[str, str]] = []
        self.claimed = False
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--output {folder} is a file")
        if resume:
            if (folder / MOVING).exists():
                raise ConfigError(f"the run in {folder} was being replaced when a process was killed; its files are there and "
                                  f"in {folder / MOVING}: start the new run again with --overwrite, or move them back")
            if not (folder / CONFIG).is_file():
                raise ConfigError(f"there is no run to go on with in {folder} (no {CONFIG})")
            began = self.last(START).get("command", command)
            if command not in ("", began):
                raise ConfigError(f"{folder} is a run of `narrower {began}`: go on by narrower {began} --resume "
                                  f"{quoted(folder)}")
        self.overwrite = overwrite
        self._check_free()
        self._replaces = False
        self._epochs = {(row["stage"], row["epoch"]) for row in self.rows() if "epoch" in row} if resume else set()

    @property
    def started(self) -> bool:
        """Whether the folder has something to go on with."""
        return self.claimed or self.resume

    def _found(self) -> list[str]:
        return [name for name in (*FILES, PREVIOUS, MOVING) if (self.folder / name).exists()]

    def _check_free(self) -> None:
        """Raise ConfigError where a run is there already that this one neither goes on with nor replaces."""
        if self.writes and not self.resume and not self.overwrite and (found := self._found()):
            raise ConfigError(
                f"{self.folder} already holds a run ({', '.join(found)}): choose another --output, replace it with "
                "--overwrite, or go on with it with --resume"
            )

    def has(self, path: Path) -> bool:
        """Whether `path` is this folder, or one of the files in it that a run replaces."""
        path, folder = path.resolve(), self.folder.resolve()
        own = {folder / name for name in (*FILES, *DRAWN, PREVIOUS, MOVING)}
        return path == folder or not own.isdisjoint([path, *path.parents])

    def claim(self, settings: Mapping[str, Any], facts: Mapping[str, Any], changed: Mapping[str, Any] | None = None) -> None:
        """Start to write: the settings, a row, and the rows and lines kept so far. A run in the folder is set aside.

        Args:
            settings: all of them.
            facts: what the run starts from, for its first row.
            changed: of a run that goes on: the settings that differ from before.

        Raises:
            ConfigError: the folder cannot be written, or another process has begun a run there.
        """
        if self.claimed or not self.writes:
            self.claimed = True
            return
        self._check_free()  # another process may have begun a run there since
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.resume:
                self._set_aside()
            if not self.resume or changed:
                storage.write_whole({self.folder / CONFIG: to_yaml(settings).encode()})
        except (OSError, StorageError) as error:
            if not self.resume:
                self._restore()
            raise ConfigError(f"cannot write the run to {self.folder}: {error}") from error
        self.claimed = True
        for name in (METRICS, LOG) if self.resume else ():
            self._end_line(name)
        if not self.resume or not self.last(START):
            self.log({"stage": START, "command": self.command, "typed": self.typed, "narrower": narrower.__version__, **facts})
        if self.resume and changed:
            self.log({"stage": RESUME, "typed": self.typed, "changed": changed})
        for name, text in self._waiting:
            self._append(name, text)

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """The run is made within. If an error ends it, the run that it replaces comes back; after Ctrl-C, and where another
        process was killed, both are there."""
        try:
            yield
        except Exception as error:
            if self._replaces and not is_of_another(error):
                self._restore()
            raise
        if self.writes:
            shutil.rmtree(self.folder / PREVIOUS, ignore_errors=True)

    def _set_aside(self) -> None:
        """Move an old run into `previous`. One that is there already was whole; what came after it was not, and goes."""
        old, aside, moving = self._found(), self.folder / PREVIOUS, self.folder / MOVING
        if aside.exists():
            self._remove()
        elif old:
            moving.mkdir(exist_ok=True)  # a move that was cut short goes on
            move_files([self.folder / name for name in (*FILES, *DRAWN)], self.folder, moving)
            moving.replace(aside)
        with suppress(OSError):  # it is not there, or has files of others
            (self.folder / PICTURES).rmdir()
        self._replaces = bool(old)

    def _restore(self) -> None:
        """Put the old run back, in the place of what there is of the new one. Nothing is written from then on."""
        aside, moving = self.folder / PREVIOUS, self.folder / MOVING
        if aside.exists():
            self._remove()
            aside.replace(moving)
        if moving.exists():
            move_files([path for path in moving.rglob("*") if path.is_file()], moving, self.folder)
            shutil.rmtree(moving)
        self.claimed = self._replaces = False

    def _remove(self) -> None:
        """Remove all files of the run."""
        for name in (*FILES, *DRAWN):
            (self.folder / name).unlink(missing_ok=True)

    def log(self, row: Mapping[str, Any]) -> None:
        """Add a row to the metrics, except for an epoch that has a row already (it was evaluated again)."""
        if "epoch" in row:
            if (row["stage"], row["epoch"]) in self._epochs:
                return
            self._epochs.add((row["stage"], row["epoch"]))
        self._append(METRICS, json.dumps({**row, "time": round(time.time(), 3)}) + "\n")

    def write(self, name: str, content: bytes) -> None:
        """Replace a file, in the process that writes."""
        if self.writes:
            storage.write_whole({self.folder / name: content})

    def print(self, text: str) -> None:
        """Add printed text to the log."""
        self._append(LOG, text)

    def rows(self) -> list[dict[str, Any]]:
        """The metrics so far. A line that a crash cut off is skipped."""
        try:
            lines = (self.folder / METRICS).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def last(self, stage: str) -> dict[str, Any]:
        """The last row of a stage, or an empty one."""
        return dict(last_row(self.rows(), stage))

    def _append(self, name: str, text: str) -> None:
        if not self.writes:
            return
        if not self.claimed:
            self._waiting.append((name, text))
            return
        try:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise StorageError(f"cannot write {self.folder / name}: {error.strerror}; when it can be, go on with --resume "
                               f"{quoted(self.folder)}") from error

    def _end_line(self, name: str) -> None:
        """End the last line of a file where a process was killed while it wrote there."""
        file = self.folder / name
        if file.exists() and not file.read_bytes().endswith(b"\n"):
            self._append(name, "\n")


def move_files(files: Iterable[Path], source: Path, target: Path) -> None:
    """Move those of the files under `source` that exist to the same places under `target`."""
    for file in files:
        if file.exists():
            (target / file.relative_to(source)).parent.mkdir(exist_ok=True)
            file.replace(target / file.relative_to(source))


def default_folder(*parts: str) -> Path:
    """Make `runs/<time>-<part>-<part>` in the current folder. A number is added if this folder exists already.

    It is made at once, so that runs which start together have a folder each; `give_back` removes it where it stays empty.
    """
    safe = ["".join(c if c.isalnum() or c in "._" else "_" for c in part) for part in parts]
    base = Path("runs") / "-".join([time.strftime("%Y%m%d-%H%M%S"), *safe])
    for number in itertools.count(1):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:  # where it must be written, `claim` says so
            pass
        break
    return folder


def give_back(folder: Path) -> None:
    """Remove a folder that nothing was written to, and `runs` if it is empty then."""
    with suppress(OSError):
        folder.rmdir()
        folder.parent.rmdir()


def quoted(path: Path) -> str:
    """A path as a word of a command that is shown: it may have spaces."""
    return shlex.quote(str(path))


def to_yaml(settings: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run in `folder`.

    Raises:
        ConfigError: there is no run, or its settings cannot be read.
    """
    if not (folder / CONFIG).is_file():
        weights = "; the weights in a file are given by --checkpoint, the network by --model" if folder.is_file() else ""
        raise ConfigError(f"{folder} is no run folder (no {CONFIG}){weights}")
    return read_yaml(folder / CONFIG)


def read_yaml(file: Path) -> dict[str, Any]:
    """The settings in a file. Raises ConfigError if they cannot be read."""
    import yaml

    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"cannot read {file}: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{file} holds no settings")
    return settings
