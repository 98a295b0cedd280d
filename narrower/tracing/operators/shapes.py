"""Output shapes of the commonest operators, worked out directly.

On meta tensors PyTorch computes many of them in Python, at up to a millisecond a call; a trace needs nothing but the shape.
Each rule takes the arguments of a call and whether it is in place. It returns the output, or None for a form that it does not
cover: PyTorch computes that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .interface import Call


def infer_output(call: Call, in_place: bool, hollow: bool) -> Any:
    """The output of a call on meta tensors, or, if `hollow`, zeros of its shape on others; None where there is no rule."""
    rule, args = call.operator.shape_rule, call.args
    if rule is None or call.kwargs or not isinstance(args[0], Tensor):
        return None
    x = args[0]
    return rule(args, in_place) if (hollow or x.is_meta) and x.is_floating_point() else None


def blank(like: Tensor, shape: Sequence[int]) -> Tensor:
    make = torch.empty if like.is_meta else torch.zeros
    return make(shape, dtype=like.dtype, device=like.device)


def unary(args: Sequence[Any], in_place: bool) -> Tensor:
    x: Tensor = args[0]
    return x if in_place else blank(x, x.shape)


def binary(args: Sequence[Any], in_place: bool) -> Tensor | None:
    a, b = args[:2]
    shape = a.shape
    if isinstance(b, Tensor):
        if a.dtype != b.dtype or b.device != a.device:
            return None
        shape = a.shape if a.shape == b.shape else torch.broadcast_shapes(a.shape, b.shape)
    if in_place:
        return a if shape == a.shape else None
    return blank(a, shape)


def index_put(args: Sequence[Any], in_place: bool) -> Tensor | None:
    """Only of real tensors: a mask made of zeros covers another number of places."""
    return None if args[0].is_meta else unary(args, in_place)


def convolution(args: Sequence[Any], in_place: bool) -> Tensor | None:
    x, w, _, stride, padding, dilation, transposed, _, groups = args
    if transposed or x.shape[1] != w.shape[1] * groups or w.shape[0] % groups or x.ndim != w.ndim:
        return None
    n = x.ndim - 2
    stride, padding, dilation = (list(v) * (n if len(v) == 1 else 1) for v in (stride, padding, dilation))
    space = [(x.shape[d + 2] + 2 * padding[d] - dilation[d] * (w.shape[d + 2] - 1) - 1) // stride[d] + 1 for d in range(n)]
    return None if min(space, default=1) < 1 else blank(x, [x.shape[0], w.shape[0], *space])


def batch_norm(args: Sequence[Any], in_place: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    x, *vectors = args[:5]
    if any(t is not None and t.shape != x.shape[1:2] for t in vectors):
        return None
    return blank(x, x.shape), blank(x, [0]), blank(x, [0])


def layer_norm(args: Sequence[Any], in_place: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    x, shape, *affine = args[:4]
    outer, inner = x.shape[:x.ndim - len(shape)], tuple(x.shape[x.ndim - len(shape):])
    if inner != tuple(shape) or any(t is not None and tuple(t.shape) != inner for t in affine):
        return None
    stats = [*outer, *[1] * len(shape)]
    return blank(x, x.shape), blank(x, stats), blank(x, stats)


def mean(args: Sequence[Any], in_place: bool) -> Tensor | None:
    x, dims, keepdim = (*args, None, False)[:3]
    if not isinstance(dims, (list, tuple)) or not dims:
        return None
    over = {d % x.ndim for d in dims}
    return blank(x, [1 if d in over else n for d, n in enumerate(x.shape) if keepdim or d not in over])


def mm(args: Sequence[Any], in_place: bool) -> Tensor | None:
    a, b, *out_dtype = args
    fits = a.shape[1] == b.shape[0] and a.dtype == b.dtype and not out_dtype
    return blank(a, [a.shape[0], b.shape[1]]) if fits else None


def addmm(args: Sequence[Any], in_place: bool) -> Tensor | None:
    bias, *factors = args
    fits = bias.ndim == 1 and bias.shape[0] in (1, factors[1].shape[1]) and bias.dtype == factors[0].dtype
    return mm(factors, False) if fits else None
