"""fold: what a removed channel adds, where that is a constant, moves into the layer that reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..graph.selection import Kept
from ..graph.types import ChannelMap
from ..planning.plan import Plan, costed_plan
from ..surgery.copying import duplicate, fresh_copy, same_tensors
from ..surgery.resize import add_biases, takes_bias
from ..surgery.walk import named_tensors
from .constant_propagation import Layer, Reader, Site, Walk, absorb_constants
from .constant_values import NAN


@dataclass(frozen=True, eq=False)
class Folded:
    """`model`: a copy of the dense network, the same function in eval mode, in which the `channels` (how many of each group)
    that a plan removes may go without a trace; `plan`: that plan, for the copy, whose layers may have new biases. `left`:
    constants that could not be folded, and why, by group."""

    model: nn.Module
    plan: Plan
    channels: Mapping[str, int]
    left: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{sum(self.channels.values())} removed channels are constant and folded into what reads them"]
        return "\n".join([*lines, *(f"not folded: {g}: {why}" for g, why in self.left.items())])


def fold(model: nn.Module, plan: Plan) -> Folded:
    """Take the constants among the channels that `plan` removes into the biases (or the running means of the BatchNorms) of the
    layers that read them; a layer that has neither gets a bias. Give `narrow` and `verify` the model and plan that come back.

    A channel is constant where a filter is zero (a mask of torch.nn.utils.prune made permanent, say) or the scale of its
    BatchNorm is. Behind zero padding or a gate it cannot be folded: its contribution is lost, as that of every other removed
    channel. `model` is untouched.

    Raises PlanError if the model's tensors are not those that were traced.
    """
    graph, kept = plan.graph, Kept(plan.graph, plan.keep)
    same_tensors(model, graph)
    copy = duplicate(model, {id(t): fresh_copy(t) for t in named_tensors(model).values()})
    tensors = named_tensors(copy)
    eps = {n: float(getattr(m, "eps", 0.0)) for n, m in copy.named_modules()}

    def start(site: Site, layer: Layer | None, rows: ChannelMap) -> Tensor:
        out = NAN.repeat(graph[rows.group].size)
        out[rows.channels] = constant_rows(site, layer, tensors, eps)[rows.positions]
        return out

    found: dict[tuple[Reader, str], Tensor] = {}
    left: dict[str, str] = {}
    for activation, reader in Walk(graph, partial(takes_bias, copy), start).needs:
        for group, value in activation.values.items():
            value = torch.where(torch.as_tensor(kept.mask(group)), 0.0, value).nan_to_num()
            if not bool(value.any()) or reader == "":
                continue
            if isinstance(reader, str):
                left.setdefault(group, f"{int(value.count_nonzero())} channels: {reader}")
            else:
                found.setdefault((reader, group), value)
    missing = {reader.weight for reader, _ in found if reader.missing}
    if missing:
        graph = add_biases(copy, graph, missing)
        plan = costed_plan(graph, plan.keep, plan.request)
        tensors = named_tensors(copy)
    for (reader, group), value in found.items():
        absorb_constants(tensors, graph, reader, group, value.numpy(), {})
    counts = {g: max(int(v.count_nonzero()) for (_, of), v in found.items() if of == g) for _, g in found}
    return Folded(copy, plan, counts, left)


def constant_rows(site: Site, layer: Layer | None, tensors: Mapping[str, Tensor], eps: Mapping[str, float]) -> Tensor:
    """What each channel is behind a site in eval mode, nan where it changes. Shape `(site.size,)`, float64 on the CPU."""
    def of(name: str) -> Tensor:
        return tensors[name].detach().double().cpu()

    out = NAN.repeat(site.size)
    if layer is not None and not (layer.transposed and site.blocks > 1):
        weight = of(layer.weight)
        weight = weight.transpose(0, 1) if layer.transposed else weight
        bias = of(layer.bias) if layer.bias is not None else torch.zeros(site.size, dtype=torch.float64)
        if len(weight) == site.size:
            out = torch.where(weight.flatten(1).any(1), NAN, bias)
    if site.norm is None:
        return out
    gamma, beta = of(f"{site.norm}.weight"), of(f"{site.norm}.bias")
    if f"{site.norm}.running_mean" in tensors:
        mean, var = of(f"{site.norm}.running_mean"), of(f"{site.norm}.running_var")
        out = (out - mean) / torch.sqrt(var + eps[site.norm]) * gamma + beta
    else:
        out = NAN.repeat(site.size)
    return torch.where(gamma == 0, beta, out)
