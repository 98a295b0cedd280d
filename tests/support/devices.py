"""Stand-ins for devices that are not there."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from narrower import inputs

APPLE = torch.device("meta")


class NoFloat64(TorchDispatchMode):
    """Within, an operator that gives float64 fails, as on Apple's GPUs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.lift_fresh.default:  # numbers on their way to the device
            assert all(not isinstance(t, torch.Tensor) or t.dtype != torch.float64 for t in tree_leaves(out)), func
        return out


class Waits(TorchDispatchMode):
    """What would make the host wait for a GPU: numbers that are read, and tensors made of the host's numbers.

    `found`: the operators on the CPU, which here is played for the GPU. `there`: those between it and `APPLE`.
    """

    NAMES = ("_local_scalar_dense", "lift_fresh", "nonzero", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.there: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, devices = func._schema.name.removeprefix("aten::"), [t.device for t in args if isinstance(t, torch.Tensor)]
        moves = name == "_to_copy" and (kwargs or {}).get("device") not in (None, *devices)
        if moves or name in self.NAMES:
            (self.there if moves or APPLE in devices else self.found).append(name)
        return func(*args, **(kwargs or {}))


class OnApple(torch.Tensor):
    """A tensor that says it is on a device without float64, and cannot be float64. Its values are on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> OnApple:
        if values.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        t = torch.Tensor._make_wrapper_subclass(cls, values.shape, values.stride(), dtype=values.dtype, device=APPLE)
        t.held = values
        return t

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        there = {id(t.held): t for t in tree_leaves((args, kwargs)) if isinstance(t, OnApple)}
        device = (kwargs or {}).get("device")
        args, kwargs = tree_map(lambda t: t.held if isinstance(t, OnApple) else t, (args, kwargs or {}))
        out = func(*args, **(kwargs if device is None else kwargs | {"device": "cpu"}))
        if device is not None and device.type == "cpu":
            return out
        return tree_map(lambda t: there[id(t)] if id(t) in there else OnApple(t) if isinstance(t, torch.Tensor) else t, out)


class Apple(TorchDispatchMode):
    """Within, tensors can be made on and moved to `APPLE`. Only the device of meta tensors can be played without a driver."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (kwargs or {}).get("device") == APPLE:
            return OnApple.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def apple(monkeypatch: pytest.MonkeyPatch) -> Apple:
    """`APPLE` as a device that narrower takes for one without float64."""
    monkeypatch.setattr(inputs, "WITHOUT_FLOAT64", {APPLE.type})
    return Apple()


class Calls(TorchDispatchMode):
    """Notes the keyword arguments of each operator that is called within. With fake tensors these may lie on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.noted.append((func.overloadpacket.__name__, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def named(self, name: str) -> list[dict[str, Any]]:
        """The keyword arguments of the calls of one operator."""
        return [kwargs for operator, kwargs in self.noted if operator == name]


def without_float64(monkeypatch: pytest.MonkeyPatch, *modules: str) -> NoFloat64:
    """The CPU as a device without float64, for these modules of narrower."""
    for module in modules:
        monkeypatch.setattr(sys.modules[f"narrower.{module}"], "precise", torch.Tensor.float)
    return NoFloat64()
