"""measure: multiply-adds, parameters and latency of a model."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from .inputs import call_model, flatten_tensors, running_on, sample_count, synchronize
from .preconditions import checked
from .surgery.copying import stage
from .surgery.walk import in_eval_mode, outer_modes_off
from .tracing.constraints import ConstraintCollector
from .tracing.interpreter import run_forward
from .tracing.labels import Axes


@outer_modes_off()
def macs_of(model: nn.Module, example_inputs: Any) -> float:
    """Multiply-adds of convolutions and linear layers for one sample, counted as in `trace` and `plan`.

    BatchNorm, activations and attention products are not counted.
    """
    for kind in ("meta", "real"):
        staged = stage(model, example_inputs, kind)
        mode = ConstraintCollector(staged.model, Axes(), {})
        try:
            run_forward(staged.model, staged.inputs, mode)
            break
        except Exception:
            if kind == "real":
                raise
    return sum(mode.macs.values()) / max(1, sample_count(example_inputs))


@checked
def measure(model: nn.Module, example_inputs: Any, *, seconds: float = 1.0) -> dict[str, float]:
    """Returns {"macs", "params", "latency_ms"}: multiply-adds for one sample, number of parameters, milliseconds per forward.

    Latency is the median over about `seconds` of forwards in eval mode, on the example inputs with their batch size and device.
    Raises DataError if the model does not run on them.
    """
    times: list[float] = []
    with in_eval_mode(model), torch.inference_mode():
        for _ in range(3):
            with running_on("measure", example_inputs):
                forward(model, example_inputs)
        end = time.perf_counter() + seconds
        while len(times) < 5 or (time.perf_counter() < end and len(times) < 1000):
            start = time.perf_counter()
            forward(model, example_inputs)
            times.append(time.perf_counter() - start)
    return {
        "macs": macs_of(model, example_inputs),
        "params": float(sum(p.numel() for p in model.parameters())),
        "latency_ms": 1e3 * sorted(times)[len(times) // 2],
    }


def check_runs(what: str, model: nn.Module, inputs: Any) -> None:
    """Raise DataError, in the name of `what`, if the model does not run on these inputs."""
    with in_eval_mode(model), torch.no_grad(), running_on(what, inputs):
        call_model(model, inputs)


def forward(model: nn.Module, inputs: Any) -> Any:
    """The outputs, once they are there."""
    out = call_model(model, inputs)
    for t in flatten_tensors(out)[:1]:
        synchronize(t.device)
    return out
