"""Output shapes of the commonest operators, worked out directly.

On meta tensors PyTorch computes many of them in Python, at up to a millisecond a call; a trace needs nothing but the shape.
Whatever is not covered here returns None and goes the ordinary way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

UNARY = {
    "relu", "silu", "gelu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "elu", "mish", "clone",
}

BINARY = {"add", "sub", "mul", "div"}


def blank(like: Tensor, shape: Sequence[int]) -> Tensor:
    make = torch.empty if like.is_meta else torch.zeros
    return make(shape, dtype=like.dtype, device=like.device)


def infer_output(name: str, in_place: bool, args: Sequence[Any], hollow: bool = False) -> Any:
    """The output of a call on meta tensors, or, if `hollow`, zeros of its shape on others; None where there is no rule."""
    if not args or not isinstance(args[0], Tensor) or not (hollow or args[0].is_meta) or not args[0].is_floating_point():
        return None
    if name in UNARY:
        return args[0] if in_place else blank(args[0], args[0].shape)
    if name in BINARY:
        return binary(in_place, *args[:2])
    if name == "index_put" and hollow:  # a mask made of zeros covers another number of places
        return args[0] if in_place else blank(args[0], args[0].shape)
    special = SPECIAL.get(name)
    return special(*args) if special else None


def binary(in_place: bool, a: Tensor, b: Any) -> Tensor | None:
    if isinstance(b, Tensor):
        if a.dtype != b.dtype or b.device != a.device:
            return None
        shape = a.shape if a.shape == b.shape else torch.broadcast_shapes(a.shape, b.shape)
    else:
        shape = a.shape
    if in_place:
        return a if shape == a.shape else None
    return blank(a, shape)


def convolution(x: Tensor, w: Tensor, bias: Any, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
                transposed: bool, output_padding: Sequence[int], groups: int) -> Tensor | None:
    if transposed or x.shape[1] != w.shape[1] * groups or w.shape[0] % groups or x.ndim != w.ndim:
        return None
    n = x.ndim - 2
    stride, padding, dilation = (list(v) * (n if len(v) == 1 else 1) for v in (stride, padding, dilation))
    space = [(x.shape[d + 2] + 2 * padding[d] - dilation[d] * (w.shape[d + 2] - 1) - 1) // stride[d] + 1 for d in range(n)]
    return None if min(space, default=1) < 1 else blank(x, [x.shape[0], w.shape[0], *space])


def batch_norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    vectors = [t for t in rest[:4] if t is not None]
    if any(t.shape != x.shape[1:2] for t in vectors):
        return None
    return blank(x, x.shape), blank(x, [0]), blank(x, [0])


def mean(x: Tensor, dims: Any = None, keepdim: bool = False) -> Tensor | None:
    if not isinstance(dims, (list, tuple)) or not dims:
        return None
    over = {d % x.ndim for d in dims}
    kept = [1 if d in over else n for d, n in enumerate(x.shape) if keepdim or d not in over]
    return blank(x, kept)


def layer_norm(x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> tuple[Tensor, Tensor, Tensor] | None:
    inner = tuple(x.shape[x.ndim - len(shape):])
    if inner != tuple(shape) or any(t is not None and tuple(t.shape) != inner for t in (weight, bias)):
        return None
    stats = [*x.shape[: x.ndim - len(shape)], *[1] * len(shape)]
    return blank(x, x.shape), blank(x, stats), blank(x, stats)


def mm(a: Tensor, b: Tensor) -> Tensor | None:
    return blank(a, [a.shape[0], b.shape[1]]) if a.shape[1] == b.shape[0] and a.dtype == b.dtype else None


def addmm(c: Tensor, a: Tensor, b: Tensor) -> Tensor | None:
    return mm(a, b) if c.ndim == 1 and c.shape[0] in (1, b.shape[1]) and c.dtype == a.dtype else None


SPECIAL: dict[str, Callable[..., Any]] = {
    "convolution": convolution, "native_batch_norm": batch_norm, "mean": mean, "native_layer_norm": layer_norm,
    "mm": mm, "addmm": addmm,
}
