"""What becomes of channels that are the same number everywhere, on their way to what reads them.

The operators themselves are run on these numbers. `nan` stands for what changes over space or images, or is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Values = Mapping[str, Tensor]
"""What a group's channels are at an activation that has them: a number, or one for each of them."""

ZERO = torch.zeros((), dtype=torch.float64)

NAN = torch.full((), float("nan"), dtype=torch.float64)


def jointly(operands: Sequence[Values], join: Callable[..., Tensor]) -> Values:
    """`join` of the operands, group by group, nan for one that lacks the group."""
    done: dict[tuple[int, ...], Tensor] = {}
    out = {}
    for group in dict.fromkeys(g for values in operands for g in values):
        given = [values.get(group, NAN) for values in operands]
        key = tuple(map(id, given))
        if key not in done:
            done[key] = join(*given)
        out[group] = done[key]
    return out


def side_by_side(operands: Sequence[Values]) -> Values:
    """Of a group that several operands have, what all agree on."""
    out: dict[str, Tensor] = {}
    for values in operands:
        for group, v in values.items():
            have = out.setdefault(group, v)
            out[group] = v if have is v else torch.where(have == v, v, NAN)
    return out


def zero_only(values: Values) -> Values:
    """Through an operator that leaves a zero zero, and of which no more is known."""
    return jointly([values], lambda v: torch.where(v == 0, v, NAN))


def product(operands: Sequence[Values]) -> Values:
    """Zero where one factor is."""
    def join(*factors: Tensor) -> Tensor:
        out = factors[0]
        for f in factors[1:]:
            out = torch.where((out == 0) | (f == 0), 0.0, out * f)
        return out
    return jointly(operands, join)


def quotient(above: Values, below: Values) -> Values:
    return jointly([above, below], lambda a, b: torch.where(a == 0, a, a / b))


def padded(values: Values, filler: float) -> Values:
    return jointly([values], lambda v: torch.where(v == filler, v, NAN))


def pointwise(name: str, operands: Sequence[Values], rest: Sequence[Any], options: Mapping[str, Any]) -> Values:
    """Through the pointwise operator `aten.name`, whose tensors come first."""
    operator = getattr(torch.ops.aten, name)

    def join(*numbers: Tensor) -> Tensor:
        try:
            out = operator(*numbers, *rest, **options)
        except (RuntimeError, TypeError, IndexError):  # wants tensors of another kind
            return NAN
        return out.double() if isinstance(out, Tensor) else NAN
    return jointly(operands, join)
