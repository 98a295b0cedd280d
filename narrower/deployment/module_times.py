"""How long each layer of a network takes within its forward, in PyTorch as it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..inputs import device_of, synchronize
from ..measuring import forward
from ..surgery.walk import in_eval_mode
from .layer_times import clock_for, clock_named

WARMUP, LEAST, MOST = 3, 7, 100
"""Rounds."""

Marks = list[tuple[str, Any, Any]]
"""(layer, before, after) of each call: seconds, or CUDA events."""


def time_modules(networks: Sequence[nn.Module], example_inputs: Any, *, seconds: float = 1.0) -> list[dict[str, float]]:
    """Milliseconds of each convolution and linear layer in a forward of each network: `[{name of its weight: ms}]`.

    Of several rounds in turn, for about so many `seconds` in all, the shortest. Layers are timed by hooks, in eval mode, on the
    device of the first network: on CUDA by events, on the CPU with one thread in processor time, which other programs disturb
    little, on Apple's GPUs by waiting before and after each. What lies between the layers is left out: BatchNorm, activations,
    additions.
    """
    now = clock_of(device_of(networks[0]))
    found: list[dict[str, float]] = [{} for _ in networks]
    with ExitStack() as stack, torch.inference_mode():
        marks: list[Marks] = [[] for _ in networks]
        for model, own in zip(networks, marks, strict=True):
            stack.enter_context(in_eval_mode(model))
            stack.enter_context(hooked(model, own, now))
        end, done = time.perf_counter() + seconds, -WARMUP
        while done < LEAST or (done < MOST and time.perf_counter() < end):
            for model, own, times in zip(networks, marks, found, strict=True):
                own.clear()
                forward(model, example_inputs)
                for name, ms in added_up(own).items() if done >= 0 else ():
                    times[name] = min(ms, times.get(name, ms))
            done += 1
    return found


def clock_of(device: torch.device) -> Callable[[], Any]:
    """What gives the time at which the device has done what it was given so far. On CUDA an event, which is not waited for."""
    seconds = clock_named(clock_for(device.type, torch.get_num_threads()))

    def event() -> torch.cuda.Event:
        found = torch.cuda.Event(enable_timing=True)
        found.record(torch.cuda.current_stream(device))
        return found

    def wait() -> float:
        synchronize(device)
        return seconds()

    return event if device.type == "cuda" else wait


@contextmanager
def hooked(model: nn.Module, marks: Marks, now: Callable[[], Any]) -> Iterator[None]:
    """Within, each call of a layer adds to `marks`, with what `now` gives before and after."""
    def hooks(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        begun: list[Any] = []
        return (lambda *_: begun.append(now())), (lambda *_: marks.append((name, begun.pop(), now())))

    handles = []
    for name, module in model.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and weight.ndim > 1:
            before, after = hooks(f"{name}.weight" if name else "weight")
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def added_up(marks: Marks) -> dict[str, float]:
    """Milliseconds of each layer over its calls in one forward, which has ended."""
    found: dict[str, float] = {}
    for name, begin, end in marks:
        ms = 1e3 * (end - begin) if isinstance(begin, float) else begin.elapsed_time(end)
        found[name] = found.get(name, 0.0) + ms
    return found
