"""Scores from weights alone, or from weights and gradients. All raise PlanError if the model is not the one that was traced."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, PlanError
from ..graph.types import ChannelGroup, Graph, Scores, Slice
from ..inputs import call_model, on_device, paired_inputs, real_rows, running_on, shapes_of
from ..preconditions import check_number, checked
from ..surgery.copying import same_tensors
from ..surgery.walk import in_eval_mode, outer_modes_off


def filters(group: ChannelGroup, tensors: dict[str, Tensor]) -> list[tuple[Slice, Tensor]]:
    """The layers that produce a group's channels: each slice with its weights as rows, shape (positions, rest)."""
    out = []
    for s in group.slices:
        if s.makes:
            w = tensors[s.tensor].detach()
            w = w.to(torch.complex64 if w.is_complex() else torch.float32)
            if s.blocks > 1:  # transposed grouped convolution: (in, out / groups, ...), blocks split dimension 0
                w = w.unflatten(0, (s.blocks, -1)).transpose(1, s.dim + 1).flatten(0, 1)
                rows = w.flatten(1)
            else:
                rows = w.movedim(s.dim, 0).flatten(1)
            out.append((s, rows[torch.as_tensor(s.positions, device=rows.device)]))
    return out


def per_channel(values: Tensor, s: Slice, size: int) -> Tensor:
    """For each channel the sum of the values at its positions in a slice. Shape (size,)."""
    index = torch.as_tensor(s.channels, device=values.device)
    return torch.zeros(size, device=values.device, dtype=values.dtype).index_add(0, index, values)


def averaged(model: nn.Module, graph: Graph, score: Callable[[Tensor], Tensor], root: float = 1) -> Scores:
    """For every free group the mean of its layers' scores. Each layer is first scaled to a mean of one.

    `score`: from filters, shape (filters, rest), to one number each. Those of a channel are summed, then the `root` is taken.
    """
    out, tensors = Scores(), same_tensors(model, graph)
    for g in graph.free:
        layers = filters(g, tensors)
        out[g.name] = torch.zeros(g.size)
        for s, rows in layers:
            found = per_channel(score(rows), s, g.size).pow(1 / root).cpu()
            out[g.name] += found / found.mean().clamp_min(1e-20) / len(layers)
    return out


@checked
def magnitude(model: nn.Module, graph: Graph, p: float = 2) -> Scores:
    """The L_p norm of each filter (Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, with p=1).

    Averaged over the layers that produce the channel. Each layer is first scaled to a mean of one. Raises ConfigError unless p
    is a number above 0.
    """
    check_number("p", p, 0, inside=True)
    return averaged(model, graph, lambda rows: rows.abs().pow(p).sum(1), p)


@checked
def fpgm(model: nn.Module, graph: Graph) -> Scores:
    """The sum of distances from a filter to the others of its layer (He et al., "Filter Pruning via Geometric Median",
    CVPR 2019, eq. 4). A filter near the geometric median can be replaced by others. Averaged over layers as in `magnitude`."""
    return averaged(model, graph, lambda rows: torch.cdist(real_rows(rows)[None], real_rows(rows)[None])[0].sum(1))


@checked
def bn_scale(model: nn.Module, graph: Graph) -> Scores:
    """|gamma| of a channel's BatchNorms (Liu et al., "Network Slimming", ICCV 2017), averaged over them without scaling.

    Raises PlanError for a free group without a BatchNorm.
    """
    tensors = same_tensors(model, graph)
    norms = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    out = Scores()
    for g in graph.free:
        parts = [per_channel(tensors[s.tensor].detach().abs().float().cpu()[torch.as_tensor(s.positions)], s, g.size)
                 for s in g.slices if s.tensor in norms]
        if not parts:
            raise PlanError(f"group {g.name!r} has no BatchNorm, so bn_scale cannot rank it: exclude it or use another score")
        out[g.name] = torch.stack(parts).mean(0)
    return out


@checked
@outer_modes_off()
def taylor(model: nn.Module, graph: Graph, batches: Iterable[Any], loss: Callable[[Any, Any], Tensor]) -> Scores:
    """The squared first-order change of the loss if a filter is removed: (sum over the filter of gradient * weight)^2, summed
    over batches and layers (Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, eq. 8).

    `batches`: pairs (inputs, targets). `loss(output, targets)`: a scalar. Gradients of the model are not touched. Raises
    DataError if there are no batches, one is no pair, or the model does not run on its inputs.
    """
    tensors = same_tensors(model, graph)
    params = {s.tensor: tensors[s.tensor] for g in graph.free for s in g.slices if s.makes}
    before = {n: t.requires_grad for n, t in params.items()}
    total = {g.name: torch.zeros(g.size) for g in graph.free}
    seen = 0
    with in_eval_mode(model):
        try:
            for t in params.values():
                t.requires_grad_(True)
            for batch in batches:
                if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                    raise DataError("taylor needs labels: each batch must be a pair (inputs, targets), and this one is "
                                    f"{type(batch).__name__} ({shapes_of(batch)}); obs, hrank and magnitude need none")
                inputs = paired_inputs(batch, model)
                with running_on("taylor", inputs):
                    output = call_model(model, inputs)
                value = loss(output, on_device(batch[1], model))
                found = torch.autograd.grad(value, list(params.values()), allow_unused=True) if params else ()
                grads = dict(zip(params, found, strict=True))
                seen += 1
                products = {n: torch.zeros_like(t) if grads[n] is None else (grads[n].conj() * t).real
                            for n, t in params.items()}
                for g in graph.free:
                    for s, rows in filters(g, products):
                        total[g.name] += per_channel(rows.sum(1), s, g.size).square().cpu()
        finally:
            for n, t in params.items():
                t.requires_grad_(before[n])
    if not seen:
        raise DataError("taylor got no batches")
    return Scores(total)


@checked
def random(graph: Graph, seed: int = 0) -> Scores:
    """Uniform random scores: a baseline. Raises ConfigError for a seed that is no whole number from 0."""
    check_number("seed", seed, 0, whole=True)
    generator = torch.Generator().manual_seed(seed)
    return Scores({g.name: torch.rand(g.size, generator=generator) for g in graph.free})
