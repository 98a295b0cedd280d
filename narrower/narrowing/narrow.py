"""narrow: a plan to a smaller module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..graph.selection import Kept
from ..planning.plan import Plan
from ..preconditions import checked
from ..surgery.attributes import Place, attribute_values, set_attributes
from ..surgery.copying import duplicate, parameter_like, same_tensors
from ..surgery.resize import fit, format_of, outputs_dim, slice_tensor
from ..surgery.walk import named_tensors, outer_modes_off, pause_collector, tensor_shapes
from .optimizer import Swap, carry_optimizer, check_optimizer

RECORD = "narrower_record"  # the attribute of a narrow network that holds its NarrowRecord


@dataclass(frozen=True)
class NarrowRecord:
    """How a network was narrowed: the shapes of its tensors in the dense network and now, the numbers that its modules store,
    and the biases that its layers were given."""

    dense: Mapping[str, tuple[int, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    attributes: Mapping[Place, int] = field(default_factory=dict)
    created: tuple[str, ...] = ()


@checked
@outer_modes_off()
@pause_collector()
def narrow(model: nn.Module, plan: Plan, *, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """A copy of `model` with the channels of `plan` only: ordinary modules of the same classes; `model` is untouched.

    Kept as they are: dtype, device, memory format, `requires_grad`, train or eval mode, tied parameters, hooks. With
    `optimizer`, its parameters are replaced by those of the new module and its state is sliced along.

    Raises PlanError if the model's tensors are not those that were traced, ConfigError for an optimizer of another model, or
    for LBFGS.
    """
    graph = plan.graph
    dense = same_tensors(model, graph)
    if optimizer is not None:
        check_optimizer(optimizer, dense.values())
    shapes = graph.shapes
    kept = Kept(graph, plan.keep)
    memo: dict[int, Tensor] = {}
    swaps: list[Swap] = []
    for name, t in dense.items():
        if id(t) in memo:
            continue
        cut = kept.cuts.get(name, {})
        new = slice_tensor(t.detach(), cut).contiguous(memory_format=format_of(t)) if cut else t.detach().clone()
        memo[id(t)] = parameter_like(t, new)
        swaps.append(Swap(t, memo[id(t)], partial(slice_tensor, cut=cut)))
    small = duplicate(model, memo)
    # the new tensors are in place; fit sets the attributes that mirror their shapes
    fit(small, {name: t for name, t in named_tensors(small).items() if tuple(t.shape) != shapes[name]}, shapes)
    set_attributes(small, attribute_values(kept))
    if optimizer is not None:
        carry_optimizer(optimizer, swaps)
    record_narrowing(small, kept)
    return small


def record_biases(small: nn.Module, names: Iterable[str]) -> None:
    """Note in a narrow network that its layers were given these biases."""
    before: NarrowRecord = getattr(small, RECORD)
    new = {}
    for n in names:
        dim = outputs_dim(small.get_submodule(n.rpartition(".")[0]))
        new[n] = before.dense[f"{n.removesuffix('bias')}weight"][dim : dim + 1]
    setattr(small, RECORD, replace(before, dense={**new, **before.dense}, shapes=tensor_shapes(named_tensors(small)),
                                   created=(*before.created, *new)))


def record_narrowing(small: nn.Module, kept: Kept) -> None:
    """Note in a narrow network what `save` writes. A network that was narrowed before keeps its first dense shapes."""
    graph = kept.graph
    before = getattr(small, RECORD, NarrowRecord(graph.shapes, {}))
    created = {n: before.dense[f"{n.removesuffix('bias')}weight"][:1] for n in graph.created}
    setattr(small, RECORD, NarrowRecord(
        {**created, **before.dense}, tensor_shapes(named_tensors(small)),
        {**before.attributes, **attribute_values(kept)}, tuple(dict.fromkeys([*before.created, *graph.created]))))
