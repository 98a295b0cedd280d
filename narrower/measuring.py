"""measure: what a network costs. recalibrate: BatchNorm statistics renewed."""

from __future__ import annotations

import inspect
import operator
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .collecting import Trace
from .errors import DataError
from .labels import Axes
from .recording import run
from .staging import call, flattened, in_eval_mode, mapped, staged


def macs_of(model: nn.Module, example_inputs: Any) -> float:
    """Multiply-adds of the convolutions and linear layers for one sample (batch norm, activations and attention products
    are not counted), by the same count as `trace` and `plan`."""
    for kind in ("meta", "real"):
        stage = staged(model, example_inputs, kind)
        mode = Trace(stage.model, Axes(), {})
        try:
            run(stage.model, stage.inputs, mode)
        except Exception:
            if kind == "real":
                raise
            continue
        break
    first = flattened(example_inputs)[0]
    return sum(mode.macs.values()) / max(1, first.shape[0])


def measure(model: nn.Module, example_inputs: Any, *, seconds: float = 1.0) -> dict[str, float]:
    """{"macs", "params", "latency_ms"}: multiply-adds for one sample, parameters, and the median time of a forward on the
    example inputs as they are (in eval mode, on the device where they lie), over about `seconds`."""
    times: list[float] = []
    with in_eval_mode(model), torch.inference_mode():
        for _ in range(3):
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


def forward(model: nn.Module, inputs: Any) -> Any:
    out = call(model, inputs)
    for t in flattened(out)[:1]:
        if t.is_cuda:
            torch.cuda.synchronize(t.device)
    return out


def model_inputs(batch: Any, model: nn.Module) -> Any:
    """What the model takes of a batch, on its device: the first part of a pair (inputs, targets), or all of it; a pair is both
    where the model's forward needs two arguments."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        needed = [p for p in inspect.signature(model.forward).parameters.values()
                  if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(needed) < 2 or not isinstance(batch[0], Tensor):
            batch = batch[0]
    device = device_of(model)
    return mapped(tuple(batch) if isinstance(batch, list) else batch, lambda t: t.to(device, non_blocking=True))


def samples(batches: Iterable[Any], model: nn.Module, images: int | None = None) -> Iterator[tuple[Any, int]]:
    """What the model takes of each batch and how many samples that is, up to `images` of them in all."""
    seen = 0
    for batch in batches:
        inputs = model_inputs(batch, model)
        count = flattened(inputs)[0].shape[0]
        if images is not None and seen + count > images:
            count = images - seen
            inputs = mapped(inputs, operator.itemgetter(slice(count)))
        if count:
            yield inputs, count
        seen += count
        if images is not None and seen >= images:
            return


def device_of(model: nn.Module) -> torch.device:
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any], *, images: int | None = None) -> int:
    """Renew the running statistics of every BatchNorm as the plain average over `batches` (or the first `images` samples).

    A batch is whatever the model takes, or a pair whose first part is. Returns the number of samples used. Raises DataError
    if there are no batches.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    momenta = [m.momentum for m in norms]
    seen = 0
    with in_eval_mode(model):
        try:
            for inputs, count in samples(batches, model, images):
                if not seen:
                    for m in norms:
                        m.reset_running_stats()
                        m.momentum = None  # cumulative average
                        m.train()
                call(model, inputs)
                seen += count
        finally:
            for m, momentum in zip(norms, momenta, strict=True):
                m.momentum = momentum
    if not seen:
        raise DataError("recalibrate got no batches")
    return seen
