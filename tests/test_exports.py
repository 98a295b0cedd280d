"""What `import narrower` offers: exactly `__all__`, each name documented and annotated."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import narrower

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "api.md"
PUBLIC = sorted(narrower.__all__)
FUNCTIONS = [name for name in PUBLIC if inspect.isfunction(getattr(narrower, name, None))]
CLASSES = [name for name in PUBLIC if inspect.isclass(getattr(narrower, name, None))]


def unannotated(function: Callable[..., Any]) -> list[str]:
    """The parameters of a function, and its result, that carry no annotation."""
    signature = inspect.signature(function)
    missing = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.annotation is inspect.Parameter.empty and name not in ("self", "cls")
    ]
    if signature.return_annotation is inspect.Signature.empty:
        missing.append("return")
    return missing


def own_methods(cls: type) -> dict[str, Callable[..., Any]]:
    """The public methods and properties that a class defines itself."""
    found: dict[str, Callable[..., Any]] = {}
    for name, value in vars(cls).items():
        if isinstance(value, property):
            value = value.fget
        elif isinstance(value, staticmethod | classmethod):
            value = value.__func__
        if not name.startswith("_") and inspect.isfunction(value):
            found[name] = value
    return found


def test_all_is_the_public_face() -> None:
    assert len(narrower.__all__) == len(set(narrower.__all__)), "a name is listed twice"
    assert [name for name in PUBLIC if not hasattr(narrower, name)] == []
    leaked = {
        name
        for name, value in vars(narrower).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name not in PUBLIC
    }
    leaked -= {"annotations"}  # from __future__
    assert not leaked, f"public names that are not in __all__: {sorted(leaked)}"


def test_submodules_are_the_only_modules_in_sight() -> None:
    """`narrower.torch` and the like would become part of the interface."""
    foreign = {
        name
        for name, value in vars(narrower).items()
        if isinstance(value, ModuleType) and not name.startswith("_") and not value.__name__.startswith("narrower.")
    }
    assert not foreign


def test_every_error_is_exported() -> None:
    errors = {name for name, value in vars(narrower.errors).items() if getattr(value, "__module__", "") == "narrower.errors"
              and inspect.isclass(value)}
    assert errors <= set(PUBLIC)
    assert all(issubclass(getattr(narrower, name), narrower.NarrowerError) for name in errors)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name: str) -> None:
    value = getattr(narrower, name)
    if not (inspect.isfunction(value) or inspect.isclass(value)):
        assert name == "__version__" or name == "Scores", f"{name} is neither a function nor a class"
        return
    text = inspect.getdoc(value) if inspect.isfunction(value) else value.__dict__.get("__doc__")
    assert text and text.strip() and not text.startswith(f"{name}("), f"narrower.{name} has no docstring of its own"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_annotated(name: str) -> None:
    assert unannotated(getattr(narrower, name)) == []


@pytest.mark.parametrize("name", CLASSES)
def test_methods_are_documented_and_annotated(name: str) -> None:
    for method_name, method in own_methods(getattr(narrower, name)).items():
        assert inspect.getdoc(method), f"narrower.{name}.{method_name} has no docstring"
        assert unannotated(method) == [], f"narrower.{name}.{method_name}"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    assert re.search(rf"(?<![A-Za-z_]){re.escape(name)}(?![A-Za-z_])", REFERENCE.read_text(encoding="utf-8"))
