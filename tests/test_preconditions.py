"""What public functions take, and what they say of the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrower
from narrower.errors import ConfigError
from narrower.preconditions import check_number, checked, checked_numbers


def test_arguments_are_told_apart_by_their_annotations() -> None:
    """Subclasses, None where it is allowed, and what has another kind of annotation pass; Python says what is too much."""
    class Own(narrower.Scores):
        pass

    @checked
    def asks(model: nn.Module, scores: Mapping[str, Tensor], plan: narrower.Plan | None = None, images: int | None = None,
             *, path: str | PathLike[str] = "", batches: Iterable[Any] = (),
             loss: Callable[[Tensor], Tensor] | None = None) -> str:
        return "run"

    run: Any = asks
    args: Any
    assert run(nn.DataParallel(nn.ReLU()), Own(), None, "any", path=Path("x"), batches=3, loss=nn.ReLU()) == "run"
    assert run(scores={}, model=torch.jit.script(nn.ReLU())) == "run"
    assert list(inspect.signature(run).parameters)[:3] == ["model", "scores", "plan"] and run.__name__ == "asks"
    for args, options, message in (
        ((nn.ReLU, {}), {}, r"asks takes \(model, scores, plan, images\): model must be nn\.Module and is the class ReLU$"),
        (({}, nn.ReLU()), {"path": 3}, "model must .* a dict; scores must .* a ReLU; path must .* a int"),
        ((nn.ReLU(), {}, {}), {"loss": 3}, r"plan must be narrower\.Plan \| None and is a dict; loss must be Callable"),
    ):
        with pytest.raises(narrower.ConfigError, match=message):
            run(*args, **options)
    for args, options in (((), {}), ((nn.ReLU(), {}, None, 1, 2), {}), ((nn.ReLU(), {}), {"unknown": 1})):
        with pytest.raises(TypeError, match="asks"):
            run(*args, **options)


@pytest.mark.parametrize(("value", "options"), [
    (1, {}), (0, {}), (1.0, {}), (np.float32(0.5), {}), (np.int64(1), {"whole": True}), (0.5, {"inside": True}),
])
def test_numbers_in_range_pass_also_those_of_numpy(value: Any, options: dict[str, bool]) -> None:
    check_number("x", value, 0, 1, **options)
    assert checked_numbers("x", (value, value), 0, 1, **options) == [value, value]


@pytest.mark.parametrize(("value", "options", "message"), [
    (-1, {}, "x=-1: give a number between 0 and 1"), (float("nan"), {}, "x=nan: give"), ("1", {}, "x='1': give"),
    (None, {}, "x=None: give"), (True, {}, "x=True: give"), (0.5, {"whole": True}, "x=0.5: give a whole number between"),
    (0, {"inside": True}, "x=0: give"), (1, {"inside": True}, "x=1: give"),
])
def test_numbers_out_of_range_are_named(value: Any, options: dict[str, bool], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_number("x", value, 0, 1, **options)
    with pytest.raises(ConfigError, match=message):
        checked_numbers("x", [value], 0, 1, **options)


def test_the_bounds_are_said_in_words() -> None:
    for options, message in (({"whole": True}, "a whole number from 1$"), ({"inside": True}, "a number above 1$")):
        with pytest.raises(ConfigError, match=message):
            check_number("x", 0, 1, **options)
    for values in ((), 0.5, None):
        with pytest.raises(ConfigError, match="give a tuple of numbers"):
            checked_numbers("x", values, 0)
