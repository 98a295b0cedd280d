"""The headline of the README is what its script makes of results/."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("headline", ROOT / "benchmarks" / "headline.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_has_what_the_script_makes(script: ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    assert script.with_headline(text, script.headline(ROOT / "results")) == text, "run benchmarks/headline.py"


def test_several_seeds_have_mean_and_spread(script: ModuleType) -> None:
    assert script.percent([80.0]) == "80.00 %" and script.percent([80.0, 82.0]) == "81.00 % ± 1.41"
