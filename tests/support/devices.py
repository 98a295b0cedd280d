"""A stand-in for devices that are not there."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NoFloat64(TorchDispatchMode):
    """Within, an operator that gives float64 fails, as on Apple's GPUs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.lift_fresh.default:  # numbers on their way to the device
            assert all(not isinstance(t, torch.Tensor) or t.dtype != torch.float64 for t in tree_leaves(out)), func
        return out


def without_float64(monkeypatch: pytest.MonkeyPatch, *modules: str) -> NoFloat64:
    """The CPU as a device without float64, for these modules of narrower."""
    for module in modules:
        monkeypatch.setattr(sys.modules[f"narrower.{module}"], "precise", torch.Tensor.float)
    return NoFloat64()
