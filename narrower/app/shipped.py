"""The settings of the papers that are shipped with the package: found by name, listed by `narrower configs`.

They are the YAML files in `narrower/configs`, each with a section `published` of what the authors report. How they count is in
`README.md` beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, similar
from .run_folder import read_yaml

FOLDER = Path(__file__).resolve().parent.parent / "configs"
PUBLISHED = "published"


@dataclass(frozen=True)
class Published:
    """What the authors report of a network, before and after. None: not in the sources that the file names.

    Attributes:
        source: paper, and where the settings are from.
        data: data set.
        top1: percent.
        macs, params: millions, as the authors count.
    """

    source: str
    data: str
    top1: list[float | None]
    macs: list[float | None]
    params: list[float | None]


def names() -> list[str]:
    """The names of all shipped settings."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def config_file(name: str) -> Path:
    """The file that `--config` names: a path, or shipped settings. A file that exists goes first.

    Raises:
        ConfigError: there is neither. The message has the nearest name.
    """
    path = Path(name)
    if path.exists() or path.suffix or len(path.parts) != 1:
        return path
    if name in (known := names()):
        return FOLDER / f"{name}.yaml"
    raise ConfigError(f"--config {name}: there is no such file, and no settings of this name are shipped"
                      f"{similar(name, known)} (`narrower configs` lists them)")


def read_config(file: Path) -> dict[str, Any]:
    """The settings in a file, without the section `published`. Raises ConfigError if it cannot be read."""
    return {key: value for key, value in read_yaml(file).items() if key != PUBLISHED}


def published(name: str) -> Published:
    """What the authors report of the network of these shipped settings."""
    return Published(**read_yaml(config_file(name))[PUBLISHED])
