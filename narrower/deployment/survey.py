"""survey: which layers a network has, and what to measure of them, so that the time of any widths follows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.types import Graph
from ..inputs import call_model
from ..planning.latency import LatencyTable, Layer, LayerKind, Point, Steps, Whole
from ..surgery.walk import in_eval_mode, named_tensors
from .layer_times import key_of

SHARES = ((1.0, 1.0), (1.0, 0.5), (0.5, 1.0), (0.5, 0.5), (0.25, 0.25))  # of the dense sizes in dimensions 0 and 1
WIDE, LEAST_WIDE, MIDDLE = 64, 16, 400  # widths and positions where the multiples of a runtime are looked for

Neighbours = tuple[int, int, tuple[int, ...], int]
"""A kind, the dimension of its weight along which the widths that follow are measured, and the size in the other."""

OPERATORS: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv", nn.Conv2d: "conv", nn.Conv3d: "conv", nn.ConvTranspose1d: "conv_transpose",
    nn.ConvTranspose2d: "conv_transpose", nn.ConvTranspose3d: "conv_transpose", nn.Linear: "linear",
}  # fmt: skip


@dataclass(frozen=True)
class Survey:
    """What is to be measured of a network.

    `kinds`, `layers`: of the network. `points`, `steps`: (kind, sizes) and (kind, dim, widths, the other size) of layers.
    """

    kinds: tuple[LayerKind, ...]
    layers: tuple[Layer, ...]
    points: tuple[tuple[int, tuple[int, int]], ...]
    steps: tuple[Neighbours, ...] = ()

    def jobs(self) -> Iterator[dict[str, Any]]:
        """The layers to time, as `layer_times` takes them. Each once, in an order that shows something early."""
        for kind, sizes in self.points:
            yield job(self.kinds[kind], sizes)
        for kind, dim, widths, other in self.steps:
            for width in widths:
                yield job(self.kinds[kind], (width, other) if dim == 0 else (other, width))

    def table(self, place: Mapping[str, Any], times: Mapping[str, float], networks: Sequence[Whole]) -> LatencyTable:
        """The table, from the times of all jobs."""
        points = tuple(Point(kind, sizes, times[key_of(job(self.kinds[kind], sizes))]) for kind, sizes in self.points)
        steps = tuple(
            Steps(kind, dim, widths, tuple(times[key_of(job(self.kinds[kind], (w, other) if dim == 0 else (other, w)))]
                                           for w in widths)) for kind, dim, widths, other in self.steps)
        return LatencyTable(place, self.kinds, self.layers, points, steps, tuple(networks))


def job(kind: LayerKind, sizes: tuple[int, int]) -> dict[str, Any]:
    return {**{k: list(v) if isinstance(v, tuple) else v for k, v in kind._asdict().items()}, "sizes": list(sizes)}


def survey(model: nn.Module, graph: Graph, example_inputs: Any) -> Survey:
    """Run the forward once, and list its layers and what to measure of them."""
    kinds: dict[LayerKind, int] = {}
    found: dict[tuple[str, int], int] = {}
    positions: dict[tuple[str, int], int] = {}
    names: dict[int, str] = {}
    for name, t in named_tensors(model).items():
        names.setdefault(id(t), name)  # the first name of a shared weight, as in the graph

    def note(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        name = names.get(id(getattr(module, "weight", None)))
        if name is None or not args or not isinstance(args[0], Tensor) or not isinstance(out, Tensor):
            return
        kind = kind_of(module, args[0], graph.shapes[name])
        key = name, kinds.setdefault(kind, len(kinds))
        found[key] = found.get(key, 0) + 1
        channels = out.shape[-1] if kind.operator == "linear" else out.shape[1]
        positions[key] = out.numel() // channels

    hooks = [m.register_forward_hook(note) for m in model.modules() if operator_of(m)]
    try:
        with in_eval_mode(model), torch.no_grad():
            call_model(model, example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    layers = tuple(Layer(name, sizes_of(graph, name), kind, calls, positions[name, kind])
                   for (name, kind), calls in found.items())
    every = tuple(kinds)
    points = dict.fromkeys((layer.kind, sizes) for layer in layers
                           for sizes in sizes_for(graph, layer.tensor, every[layer.kind]))
    return Survey(every, layers, tuple(points), tuple(steps_for(graph, every, layers)))


def operator_of(module: nn.Module) -> str | None:
    return next((name for kind, name in OPERATORS.items() if isinstance(module, kind)), None)


def kind_of(module: Any, x: Tensor, shape: Sequence[int]) -> LayerKind:
    """The kind of a layer that reads `x`. `shape`: of its weight."""
    operator = operator_of(module) or "linear"
    if operator == "linear":
        return LayerKind("linear", size=tuple(x.shape[1:-1]))
    padding = module.padding
    if isinstance(padding, str):
        padding = tuple(0 if padding == "valid" else d * (k - 1) // 2
                        for k, d in zip(module.kernel_size, module.dilation, strict=True))
    depthwise = module.groups == shape[0] and module.groups > 1
    return LayerKind(operator, tuple(module.kernel_size), tuple(module.stride), tuple(padding), tuple(module.dilation),
                     0 if depthwise else module.groups, tuple(x.shape[2:]))


def sizes_of(graph: Graph, tensor: str) -> tuple[int, int]:
    """Dimensions 0 and 1 of a weight."""
    return graph.shapes[tensor][0], graph.shapes[tensor][1]


def free_dims(graph: Graph, tensor: str) -> tuple[bool, bool]:
    """Whether dimensions 0 and 1 of a weight can shrink."""
    first, second = (any(graph[s.group].free for s in graph.by_axis.get((tensor, dim), ())) for dim in (0, 1))
    return first, second


def sizes_for(graph: Graph, tensor: str, kind: LayerKind) -> list[tuple[int, int]]:
    """The sizes of a weight to measure: the dense ones, and shares of those that can shrink, rounded."""
    dense, free = sizes_of(graph, tensor), free_dims(graph, tensor)
    out = []
    for shares in SHARES:
        n0, n1 = (share_of(n, share, kind.groups if dim == 0 else 1) if can and share < 1 else n
                  for dim, (n, share, can) in enumerate(zip(dense, shares, free, strict=True)))
        out.append((n0, n1))
    return out


def share_of(size: int, share: float, groups: int) -> int:
    """A share of a size as a multiple of 16, of 8 or of less where it is small, and of the groups of a convolution."""
    step = next((n for n in (16, 8, 4, 2) if size * share >= n), 1)
    step = max(step, groups)
    return min(size, max(step, round(size * share / step) * step))


def steps_for(graph: Graph, kinds: Sequence[LayerKind], layers: Sequence[Layer]) -> Iterator[Neighbours]:
    """For each family of kinds and each dimension that can shrink: the layer and the widths that show the multiples."""
    best: dict[tuple[Any, ...], tuple[int, float, int, int]] = {}
    for layer in layers:
        kind, shape = kinds[layer.kind], layer.sizes
        for dim, free in enumerate(free_dims(graph, layer.tensor)):
            if not free or kind.groups > 1 or shape[dim] < LEAST_WIDE:
                continue
            other = shape[1 - dim] if shape[1 - dim] < 2 * WIDE else 2 * WIDE
            top = WIDE if shape[dim] >= WIDE else shape[dim] // LEAST_WIDE * LEAST_WIDE
            # Of several layers a wide one that takes neither long nor next to no time.
            found = -top, abs(math.log(layer.positions / MIDDLE)), layer.kind, other
            best[kind.family, dim] = min(best.get((kind.family, dim), found), found)
    for (_, dim), (minus_top, _, index, other) in best.items():
        top = -minus_top
        yield index, dim, (*(top - k for k in (0, 1, 2, 4, 8, 16) if k < top // 2), top // 2), other


def sizes_in(module: nn.Module, found: Survey) -> dict[str, tuple[int, int]]:
    """The sizes of the weights of all layers in a network, in dimensions 0 and 1."""
    tensors = named_tensors(module)
    return {layer.tensor: (tensors[layer.tensor].shape[0], tensors[layer.tensor].shape[1]) for layer in found.layers}
