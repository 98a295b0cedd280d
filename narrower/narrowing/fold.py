"""Fold constant channels into the layers that read them, so that they can be removed without a trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..graph.selection import Kept
from ..graph.types import Graph
from ..inputs import precise
from ..planning.plan import Plan, costed_plan
from ..preconditions import checked
from ..surgery.copying import independent_copy, same_tensors
from ..surgery.resize import add_biases, takes_bias
from ..surgery.walk import named_tensors, outer_modes_off
from .constant_propagation import Propagation, propagate
from .constant_values import NAN, ZERO
from .layers import Obstacle, Producer, Reader


@dataclass(frozen=True, eq=False)
class Folded:
    """What `fold` returns.

    `model`: a copy of the dense network that computes the same in eval mode, and does not need the folded channels. `plan`: the
    plan for this copy, whose layers may have new biases. `channels`: how many channels of each group were folded. `left`: why
    other constants could not be folded, by group.
    """

    model: nn.Module
    plan: Plan
    channels: Mapping[str, int]
    left: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{sum(self.channels.values())} removed channels are constant and folded into what reads them"]
        return "\n".join([*lines, *(f"not folded: {g}: {why}" for g, why in self.left.items())])


@checked
@outer_modes_off()
def fold(model: nn.Module, plan: Plan) -> Folded:
    """Fold those channels that `plan` removes and that are constant.

    A channel is constant if its filter is zero (for example by a permanent mask of torch.nn.utils.prune), or the scale of its
    BatchNorm. Its contribution moves into the bias of each layer that reads it, or into the running mean of a BatchNorm behind
    that layer. A layer that has neither gets a bias. A constant that is read with zero padding or behind a gate cannot be
    folded: its contribution is lost, as that of every other removed channel.

    `model` is not changed. Give the returned model and plan to `narrow` and `verify`.

    Raises PlanError if the model's tensors are not those that were traced.
    """
    graph = plan.graph
    same_tensors(model, graph)
    copy = independent_copy(model)
    tensors = named_tensors(copy)
    eps = {n: float(getattr(m, "eps", None) or 0.0) for n, m in copy.named_modules()}  # RMSNorm may have None
    found = propagate(graph, partial(takes_bias, copy), partial(constant_rows, tensors=tensors, eps=eps))
    taken, left = removed_constants(found, Kept(graph, plan.keep))
    missing = {reader.weight for reader, _ in taken if reader.kind == "new bias"}
    if missing:
        graph = add_biases(copy, graph, missing)
        plan = costed_plan(graph, plan.keep, plan.request)
        tensors = named_tensors(copy)
    for (reader, group), values in taken.items():
        absorb_constants(tensors, graph, reader, group, values, {})
        silence(tensors[reader.weight], reader, inputs_of(graph, reader, group, values) != 0)
    counts = {g: max(int(np.count_nonzero(v)) for (_, of), v in taken.items() if of == g) for _, g in taken}
    return Folded(copy, plan, counts, left)


def removed_constants(found: Propagation, kept: Kept) -> tuple[dict[tuple[Reader, str], np.ndarray], dict[str, str]]:
    """The constants that readers take, by reader and group: shape `(size,)`, zero for channels that stay or are not constant.
    Second, by group, why constants cannot be folded."""
    taken: dict[tuple[Reader, str], np.ndarray] = {}
    left: dict[str, str] = {}
    for activation, layer in found.consumers:
        for group, values in activation.values.items():
            removed = np.nan_to_num(np.where(kept.mask(group), 0.0, values.numpy()))
            if isinstance(layer, Reader) and removed.any():
                taken.setdefault((layer, group), removed)
            elif isinstance(layer, Obstacle) and removed.any():
                left.setdefault(group, f"{np.count_nonzero(removed)} channels: {layer.text}")
    return taken, left


def constant_rows(producer: Producer, tensors: Mapping[str, Tensor], eps: Mapping[str, float]) -> Tensor:
    """The constant of each channel that a producer makes in eval mode, nan for a channel that changes.

    Constant are filters of zeros and scales of zero. Shape `(channels,)`, or `()` if none is constant; float64 on the CPU.
    """
    def of(name: str) -> Tensor:
        return tensors[name].detach().cpu().double()

    rows, layer, norm = NAN, producer.layer, producer.norm
    if layer is not None and not (layer.transposed and layer.blocks > 1):
        weight = of(layer.weight).transpose(0, int(layer.transposed))
        rows = torch.where(weight.flatten(1).any(1), NAN, ZERO if layer.bias is None else of(layer.bias))
    if norm is None:
        return rows
    gamma, beta = of(f"{norm}.weight"), of(f"{norm}.bias")
    if f"{norm}.running_mean" in tensors:
        mean, var = of(f"{norm}.running_mean"), of(f"{norm}.running_var")
        rows = (rows - mean) / torch.sqrt(var + eps[norm]) * gamma + beta
    else:
        rows = NAN
    return torch.where(gamma == 0, beta, rows)


@torch.no_grad()
def absorb_constants(tensors: Mapping[str, Tensor], graph: Graph, reader: Reader, group: str, values: np.ndarray,
                     left: Mapping[tuple[str, int], np.ndarray]) -> None:
    """Add the contribution of constant channels to the tensor that takes it, in place.

    `values` `(size,)`: the constant of each channel of the group, zero for those that are not folded. `left`: where dimensions
    of the tensors have been narrowed already, the dense positions `(blocks, n)` that they still have.
    """
    weight, into, dim = tensors[reader.weight].detach(), tensors[reader.into], int(not reader.transposed)
    inputs = inputs_of(graph, reader, group, values)
    if (reader.weight, dim) in left:
        inputs = np.take_along_axis(inputs, left[reader.weight, dim], axis=1)
    rows = weight.transpose(0, 1) if reader.transposed else weight
    kernels = by_input(precise(rows), inputs).sum(3)
    added = (kernels * kernels.new_tensor(inputs)[:, None]).sum(2).reshape(-1)
    into.copy_(precise(into) - added if reader.kind == "running mean" else precise(into) + added)


@torch.no_grad()
def silence(weight: Tensor, reader: Reader, inputs: np.ndarray) -> None:
    """Let a layer no longer read these inputs, bool `(blocks, n)`, in place: what they gave it stands elsewhere now."""
    rows = weight.detach().transpose(0, 1) if reader.transposed else weight.detach()
    gone = torch.as_tensor(inputs, device=weight.device)[:, None, :, None]
    rows.copy_(by_input(rows, inputs).masked_fill(gone, 0).reshape(rows.shape))


def inputs_of(graph: Graph, reader: Reader, group: str, values: np.ndarray) -> np.ndarray:
    """The values of a group's channels, `(size,)`, at the dense inputs of a layer: `(blocks, n)`, zero at others."""
    inputs = np.zeros((reader.blocks, graph.shapes[reader.weight][int(not reader.transposed)]))
    for s in graph[group].slices:
        if s.tensor == reader.weight and s.reads:
            inputs.reshape(-1)[s.positions] = values[s.channels]
    return inputs


def by_input(rows: Tensor, inputs: np.ndarray) -> Tensor:
    """A weight `(outputs, n, ...)` as `(blocks, outputs of each, n, kernel)`."""
    return rows.reshape(len(inputs), -1, inputs.shape[1], rows[0, 0].numel())
