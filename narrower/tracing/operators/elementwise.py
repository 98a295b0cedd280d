"""Elementwise operators, and operators that make or copy a tensor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..labels import NOTHING, Carried
from .interface import Call, RuleContext, meet, tensors_in


def elementwise(r: RuleContext, call: Call) -> Sequence[Carried]:
    inputs = tensors_in(call.args)
    out = call.out if isinstance(call.out, Tensor) else call.out[0]
    carried = [(r.of(t), t.shape) for t in inputs]
    if len(carried) == 1:
        return [carried[0][0]._replace(view=False)]
    labels = meet(r, carried, out.ndim, call.name)
    even = even_in_all(carried, out.ndim) if any(c.even for c, _ in carried) else ()
    return [Carried(labels, all(c.uniform for c, _ in carried), even=even, pool=max((c.pool for c, _ in carried), default=-1)
                    if sum(bool(c.labels) for c, _ in carried) == 1 else -1)]


def even_in_all(operands: Sequence[tuple[Carried, Sequence[int]]], ndim: int) -> tuple[int, ...]:
    """The dimensions of an elementwise result along which every operand is equal, and some have a size."""
    out = []
    for dim in range(ndim):
        wide = [(c, d) for c, shape in operands if (d := dim - ndim + len(shape)) >= 0 and shape[d] > 1]
        if wide and all(c.uniform or d in c.even for c, d in wide):
            out.append(dim)
    return tuple(out)


def like(r: RuleContext, call: Call) -> Sequence[Carried]:
    """A new tensor of uniform or random content, as wide as the one that it is made like."""
    x = call.args[0]
    same_shape = isinstance(x, Tensor) and x.shape == call.out.shape and not call.name.startswith("new_")
    return [Carried(r.of(x).labels if same_shape else (), uniform=True)]


def same(r: RuleContext, call: Call) -> Sequence[Carried]:
    """The first input as it is, and nothing for further outputs (masks, indices)."""
    return [r.of(call.args[0])]


def copied(r: RuleContext, call: Call) -> Sequence[Carried]:
    """dst.copy_(src): the labels of both meet; a write into a part of another tensor cannot be followed."""
    target, source = call.args[:2]
    dst, src = r.of(target), r.of(source)
    if src.labels and dst.view:
        r.pin([*src.labels, *dst.labels], "position", "written in place into a part of a tensor")
        return [dst]
    if src.labels and dst.labels:
        return [dst._replace(labels=meet(r, [(dst, target.shape), (src, source.shape)], target.ndim, call.name))]
    return [src._replace(view=False, even=src.even if source.ndim == target.ndim else ())]


def fresh(r: RuleContext, call: Call) -> Sequence[Carried]:
    return [NOTHING]
