"""Checks of the arguments of public functions: their kinds, and the ranges of numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache, wraps
from math import inf
from numbers import Integral, Real
from os import PathLike
from types import UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from .errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator of public functions, which take several things that are easily swapped: raise ConfigError for an argument of
    another class than its annotation says. `KINDS` are told apart, numbers and batches are not."""
    name, signature = function.__qualname__.removesuffix(".__init__"), inspect.signature(function)
    order = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind_partial(*args, **kwargs).arguments
        except TypeError:  # too many, or unknown ones: Python's own error below
            given = {}
        wrong = [f"{n} must be {signature.parameters[n].annotation} and is {described(given[n])}"
                 for n, kinds in kinds_of(function).items() if n in given and not isinstance(given[n], kinds)]
        if wrong:
            raise ConfigError(f"{name} takes ({', '.join(order)}): {'; '.join(wrong)}")
        return function(*args, **kwargs)

    return call


# What `checked` tells apart: these, and the classes of narrower.
KINDS = (nn.Module, torch.optim.Optimizer, Mapping, Callable, str, PathLike, type(None))


@cache
def kinds_of(function: Callable[..., Any]) -> dict[str, tuple[type, ...]]:
    """The classes that arguments may be of, by name, where all of them are told apart."""
    found = {}
    for name, hint in get_type_hints(function).items():
        options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        classes = [get_origin(option) or option for option in options]
        if all(c in KINDS or str(getattr(c, "__module__", "")).startswith("narrower.") for c in classes):
            found[name] = tuple(classes)
    return found


def described(x: Any) -> str:
    return f"the class {x.__name__}" if isinstance(x, type) else f"a {type(x).__name__}"


def check_number(name: str, value: Any, low: float, high: float = inf, *, whole: bool = False, inside: bool = False) -> None:
    """Raise ConfigError for what is no number from `low` to `high`. `whole`: nor a whole one. `inside`: nor between them."""
    known = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if not known or not (low < value < high if inside else low <= value <= high):
        bounds = f"between {low:g} and {high:g}" if high < inf else f"{'above' if inside else 'from'} {low:g}"
        raise ConfigError(f"{name}={value!r}: give a {'whole ' if whole else ''}number {bounds}")


def checked_numbers(name: str, values: Any, low: float, high: float = inf, *, whole: bool = False,
                    inside: bool = False) -> list[Any]:
    """Several numbers, one at least. Raises ConfigError for anything else, and for one that `check_number` does not take."""
    given = [*values] if isinstance(values, Iterable) else []
    if not given:
        raise ConfigError(f"{name}={values!r}: give a tuple of numbers, one at least")
    for value in given:
        check_number(name, value, low, high, whole=whole, inside=inside)
    return given
