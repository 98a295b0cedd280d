"""trace: a model and example inputs to a Graph.

The model's own forward runs on meta tensors, with channel ids beside them (`interpreter`, `operators`). The constraints between
ids give groups (`grouping`). A probe then narrows all groups and runs the forward again (`trials`), until nothing disagrees
(`search`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import TraceError, first_line
from ..graph.types import Graph
from ..inputs import advice, shapes_of
from ..preconditions import checked
from ..surgery.copying import restore_after, stage
from ..surgery.walk import WRAPPERS, modules_of, named_tensors, outer_modes_off, pause_collector
from .dense import DenseForwardError
from .interpreter import run_forward
from .operators.data_dependent import Answer, AnswerListener
from .search import Progress, TraceSearch, unrepeatable


@checked
@outer_modes_off()
@pause_collector()
def trace(model: nn.Module, example_inputs: Any, *, allow_inexact: bool = True,
          progress: Callable[[str], None] | None = None) -> Graph:
    """Find the channel groups of `model` by running its forward on `example_inputs`.

    `example_inputs` is a tensor, a tuple of positional or a dict of keyword arguments, as the model takes them (only
    their shapes and dtypes matter, unless the forward branches on data). The model is not touched: a copy with meta
    tensors runs, in eval mode, and in train mode as well where that uses other layers. `allow_inexact=False` pins the groups
    that a layer normalises or pools across (their removal changes that layer by definition). From two seconds on, `progress`
    gets lines that tell how far it is; without it they are logged, by the logger "narrower" at level INFO.

    Raises TraceError if the forward fails, if there is nothing to narrow, or for a wrapped (DDP, compiled) model;
    ConfigError for what is no model.
    """
    check(model)
    told = Progress(progress or logging.getLogger("narrower").info)
    try:
        return TraceSearch(stage(model, example_inputs, "meta"), told).graph(allow_inexact)
    except DenseForwardError as e:
        first = e.__cause__
    try:
        found = answers_of(model, example_inputs)
    except Exception as e:
        raise TraceError(
            f"the model's forward fails on the example inputs ({shapes_of(example_inputs)}): {first_line(e)}"
            f"{advice(example_inputs)}. Check that model(example_inputs) runs."
        ) from first
    for answers in (found, None):  # where zeros will not do (an inverse), with all values
        try:
            return TraceSearch(stage(model, example_inputs, "real"), told, answers).graph(allow_inexact)
        except DenseForwardError as e:
            last = e
    raise unrepeatable(last.__cause__) from last


def answers_of(model: nn.Module, example_inputs: Any) -> Sequence[Answer]:
    """What the forward reads from its data."""
    real = stage(model, example_inputs, "real")
    with restore_after(list(real.model.modules())):
        run_forward(real.model, real.inputs, listening := AnswerListener())
    return listening.answers


def check(model: nn.Module) -> None:
    """Raise TraceError for a model that cannot be traced as it is."""
    kind = type(model).__name__
    if kind in WRAPPERS:
        raise TraceError(f"the model is wrapped in {kind}: trace model.{WRAPPERS[kind]} instead")
    for name, m in modules_of(model):
        if WRAPPERS.get(type(m).__name__) == "module":  # what torch.compile returns runs as it is as a part of a model
            raise TraceError(f"{name} is wrapped in {type(m).__name__}: put {name}.module in its place first")
        if isinstance(m, torch.jit.ScriptModule):
            raise TraceError(f"{name or 'the model'} is compiled by torch.jit (scripted or traced): "
                             f"{'put' if name else 'trace'} the Python module it was made from{' in its place' * bool(name)}")
    parameters = {n: t for n, t in named_tensors(model).items() if isinstance(t, nn.Parameter)}
    if not parameters:
        raise TraceError("the model has no parameters: there is nothing to narrow")
    lazy = [n for n, p in parameters.items() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise TraceError(f"{lazy[0]} is not initialised: run the model once before tracing it")
