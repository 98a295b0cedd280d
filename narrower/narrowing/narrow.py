"""narrow: a plan to a smaller module."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..graph.selection import Kept
from ..planning.plan import Plan
from ..surgery.attributes import attribute_values, set_attributes
from ..surgery.copying import duplicate, same_tensors
from ..surgery.resize import fit, format_of, slice_tensor
from ..surgery.walk import named_tensors, pause_collector
from .optimizer import Swap, carry_optimizer

RECORD = "narrower_record"


@pause_collector()
def narrow(model: nn.Module, plan: Plan, *, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """A copy of `model` with the channels of `plan` only: ordinary modules of the same classes; `model` is untouched.

    Kept as they are: dtype, device, memory format, `requires_grad`, train or eval mode, tied parameters, hooks. With
    `optimizer`, its parameters are replaced by those of the new module and its state is sliced along.

    Raises PlanError if the model's tensors are not those that were traced.
    """
    graph = plan.graph
    dense = same_tensors(model, graph)
    shapes = graph.shapes
    kept = Kept(graph, plan.keep)
    memo: dict[int, Tensor] = {}
    swaps: list[Swap] = []
    for name, t in dense.items():
        if id(t) in memo:
            continue
        cut = kept.cuts.get(name, {})
        new = slice_tensor(t.detach(), cut) if cut else t.detach().clone()
        new = new.contiguous(memory_format=format_of(t)) if cut else new
        if isinstance(t, nn.Parameter):
            new = nn.Parameter(new, requires_grad=t.requires_grad)
        memo[id(t)] = new
        swaps.append(Swap(t, new, partial(slice_tensor, cut=cut)))
    small = duplicate(model, memo)
    # the new tensors are in place; fit sets the attributes that mirror their shapes
    fit(small, {name: t for name, t in named_tensors(small).items() if tuple(t.shape) != shapes[name]}, shapes)
    set_attributes(small, attribute_values(kept))
    if optimizer is not None:
        carry_optimizer(optimizer, swaps)
    record(small, kept)
    return small


def record(small: nn.Module, kept: Kept) -> None:
    """Note in the narrow network what `save` writes: shapes, kept channels, and the numbers that its modules store."""
    graph = kept.graph
    before = getattr(small, RECORD, {"dense": {n: list(s) for n, s in graph.shapes.items()}, "plans": [], "numbers": [],
                                     "created": []})
    dense = {**{n: before["dense"][f"{n.removesuffix('bias')}weight"][:1] for n in graph.created}, **before["dense"]}
    stored = {tuple(place): value for *place, value in before["numbers"]} | attribute_values(kept)
    setattr(small, RECORD, {
        "shapes": {n: list(t.shape) for n, t in named_tensors(small).items()},
        "dense": dense,
        "created": [*before["created"], *(n for n in graph.created if n not in before["created"])],
        "plans": [*before["plans"], {n: [int(c) for c in stay] for n, stay in kept.keep.items()}],
        "numbers": [[*place, value] for place, value in stored.items()],
    })
