"""Modules and tensors of a model by name, and context managers that restore its state."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Modules around a whole model, by the name of their class, and the attribute that holds it.
WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module", "FullyShardedDataParallel": "module",
            "OptimizedModule": "_orig_mod"}


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside. Every module gets its own mode back afterwards."""
    with keep_modes(model):
        model.eval()
        yield


@contextmanager
def outer_modes_off() -> Iterator[None]:
    """No inference mode and no autocast of the caller inside. Gradients are recorded, also within `torch.no_grad`.

    In inference mode dispatch modes see composite operators where they see convolutions otherwise, and tensors that are made
    there can never be trained. Under autocast layers read cast copies of their parameters.
    """
    with torch.inference_mode(False), torch._C._DisableAutocast():
        yield


@contextmanager
def pause_collector() -> Iterator[None]:
    """No garbage collection inside: a full collection, triggered by many small objects, can take longer than a trace."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def keep_modes(model: nn.Module) -> Iterator[None]:
    """Every module gets its own mode (train or eval) back afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module under each of its names. Like `named_modules(remove_duplicate=False)`, but several times faster."""
    out: list[tuple[str, nn.Module]] = []

    def visit(name: str, module: nn.Module) -> None:
        out.append((name, module))
        for leaf, child in module._modules.items():
            if child is not None:
                visit(f"{name}.{leaf}" if name else leaf, child)

    visit("", model)
    return out


def tensor_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors by name."""
    return {name: tuple(t.shape) for name, t in tensors.items()}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, tied ones under each of their names."""
    modules = modules_of(model)
    return {f"{name}.{leaf}" if name else leaf: t for tables in ("_parameters", "_buffers") for name, m in modules
            for leaf, t in getattr(m, tables).items() if t is not None}
