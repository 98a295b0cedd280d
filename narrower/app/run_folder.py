"""The folder of a run: its settings, metrics and log. Only one process writes there.

| file                  | what                                                                         |
|-----------------------|------------------------------------------------------------------------------|
| `model.safetensors`   | the network (narrow after `prune`, dense after `train`)                      |
| `narrower.json`       | what made it narrow, for `load`                                              |
| `plan.json`           | the channels that stay                                                       |
| `config.yaml`         | all settings; `--config` takes it back                                       |
| `sensitivity.json`    | the measured damage of each group                                            |
| `metrics.jsonl`       | a row per epoch and per stage                                                |
| `log.txt`             | what was printed                                                             |
| `dense.safetensors`   | the dense network, where it was trained here                                 |
| `*.checkpoint.pt`     | where training stopped, for `--resume`                                       |
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError

MODEL, NARROW, CONFIG, METRICS, LOG = "model.safetensors", "narrower.json", "config.yaml", "metrics.jsonl", "log.txt"
DENSE, PLAN, SENSITIVITY = "dense.safetensors", "plan.json", "sensitivity.json"
DENSE_CHECKPOINT, CHECKPOINT = "dense.checkpoint.pt", "training.checkpoint.pt"
FILES = (MODEL, NARROW, PLAN, CONFIG, METRICS, LOG, DENSE, SENSITIVITY, DENSE_CHECKPOINT, CHECKPOINT)


class Run:
    """A run folder. Rows and log lines are kept in memory until `claim`, and written from then on."""

    def __init__(self, folder: Path, *, resume: bool = False, overwrite: bool = False, writes: bool = True) -> None:
        """
        Args:
            folder: its path. `claim` creates it.
            resume: continue the run in this folder.
            overwrite: let `claim` replace the run in this folder. Other files there stay.
            writes: True in the first process, False in the others.

        Raises:
            ConfigError: the folder already holds a run, or has no run to resume, or is a file.
        """
        self.folder = folder
        self.resume = resume
        self.writes = writes
        self._waiting: list[tuple[str, str]] = []
        self.claimed = False
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--output {folder} is a file")
        if resume:
            if not (folder / CONFIG).is_file():
                raise ConfigError(f"there is no run to go on with in {folder} (no {CONFIG})")
            self.claimed = True
        elif writes and not overwrite and (found := self._found()):
            raise ConfigError(
                f"{folder} already holds a run ({', '.join(found)}): choose another --output, replace it with "
                "--overwrite, or go on with it with --resume"
            )
        self._epochs = {(row["stage"], row["epoch"]) for row in self.rows() if "epoch" in row} if resume else set()

    def _found(self) -> list[str]:
        return [name for name in FILES if (self.folder / name).exists()]

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Create the folder, remove an old run from it, and write the settings and the rows and lines kept so far.

        Raises:
            ConfigError: the folder cannot be written.
        """
        if self.claimed or not self.writes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in self._found():
                (self.folder / name).unlink()
            (self.folder / CONFIG).write_text(to_yaml(settings), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write the run to {self.folder}: {error}") from error
        self.claimed = True
        for name, text in self._waiting:
            self._append(name, text)

    def log(self, row: Mapping[str, Any]) -> None:
        """Add a row to the metrics, except for an epoch that has a row already (it was evaluated again)."""
        if "epoch" in row:
            if (row["stage"], row["epoch"]) in self._epochs:
                return
            self._epochs.add((row["stage"], row["epoch"]))
        self._append(METRICS, json.dumps({**row, "time": round(time.time(), 3)}) + "\n")

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
        return next((row for row in reversed(self.rows()) if row.get("stage") == stage and "epoch" not in row), {})

    def _append(self, name: str, text: str) -> None:
        if not self.writes:
            return
        if not self.claimed:
            self._waiting.append((name, text))
            return
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(text)


def default_folder(*parts: str) -> Path:
    """`runs/<time>-<part>-<part>` in the current folder. A number is added if this folder exists already."""
    safe = ["".join(c if c.isalnum() or c in "._" else "_" for c in part) for part in parts]
    base = Path("runs") / "-".join([time.strftime("%Y%m%d-%H%M%S"), *safe])
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def to_yaml(settings: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run in `folder`.

    Raises:
        ConfigError: there is no run, or its settings cannot be read.
    """
    import yaml

    file = folder / CONFIG
    if not file.is_file():
        raise ConfigError(f"{folder} is no run folder (no {CONFIG})")
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{file} holds no settings")
    return settings
