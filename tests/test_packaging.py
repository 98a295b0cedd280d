"""What is packaged: the files, the extras that messages name and code imports, versions that agree in every place."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_layout import OPTIONAL_PACKAGES

import narrower
from narrower.extras import EXTRAS

tomllib: Any = pytest.importorskip("tomllib")  # since Python 3.11
ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OPTIONAL: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
# Where the module of a package is called otherwise. Torch itself comes with typing.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml", "pytorch_lightning": "lightning"}


def packages(extra: str) -> set[str]:
    """What an extra installs, and the extras of narrower that it names."""
    found: set[str] = set()
    for requirement in OPTIONAL[extra]:
        name, options = re.match(r"([\w.-]+)(?:\[([\w,]+)\])?", requirement).groups()  # type: ignore[union-attr]
        found |= {one for other in options.split(",") for one in packages(other)} if name == "narrower" else {normal(name)}
    return found


def normal(name: str) -> str:
    """The name of a distribution, in the spelling of an index."""
    return re.sub(r"[-_.]+", "-", name).lower()


def texts() -> dict[str, str]:
    """All files that may tell someone to install an extra."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *(file for folder in ("narrower", "examples", "benchmarks")
                                                                for file in (ROOT / folder).rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


def test_each_extra_that_is_named_anywhere_exists() -> None:
    named = {(extra, where) for where, text in texts().items()
             for found in re.findall(r"(?:narrower|['\"]\.)\[([a-z][a-z, ]*)\]", text) for extra in re.split(r", ?", found)}
    assert {"cli", "hub", "report"} <= {extra for extra, _ in named}
    assert not {(extra, where) for extra, where in named if extra not in OPTIONAL}


def test_the_extra_that_a_message_names_brings_the_package() -> None:
    names = {module: normal(DISTRIBUTIONS.get(module, module)) for module in EXTRAS}
    assert not {module: extra for module, extra in EXTRAS.items() if names[module] not in packages(extra)}


def test_each_optional_package_comes_with_an_extra() -> None:
    brought = {package for extra in OPTIONAL for package in packages(extra)}
    assert not {name for name in OPTIONAL_PACKAGES if normal(DISTRIBUTIONS.get(name, name)) not in brought}


def test_each_file_of_the_package_is_packaged() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["narrower"]
    others = [file.relative_to(ROOT / "narrower").as_posix() for file in (ROOT / "narrower").rglob("*")
              if file.is_file() and file.suffix != ".py" and "__pycache__" not in file.parts]
    assert "py.typed" in others and not [name for name in others if not any(fnmatch(name, one) for one in patterns)]
    folders = {file.parent for file in (ROOT / "narrower").rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_versions_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["project"]["version"] == narrower.__version__ == str(citation["version"])
    assert citation["license"] == PROJECT["project"]["license"]


def test_the_oldest_releases_that_are_promised_are_those_that_are_tried() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    tried = re.search(r"^ELSEWHERE \?= (.+)$", makefile, re.M)[1].split()  # type: ignore[index]
    python, torch = tried[0].split("=", 1)
    oldest, = (found[1] for one in PROJECT["project"]["dependencies"] if (found := re.fullmatch(r"torch>=([\d.]+)", one)))
    assert PROJECT["project"]["requires-python"] == f">={python.removeprefix('python')}"
    assert re.fullmatch(rf"torch=={re.escape(oldest)}(\.\d+)?", torch)
    declared = {text.rsplit(" ", 1)[1] for text in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", text)}
    assert declared == {one.split("=")[0].removeprefix("python") for one in tried}
