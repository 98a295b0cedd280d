"""What operators make of constant channels.

A channel is constant if it has the same number at every position of every image. For example, `relu` keeps a channel of zeros;
`sigmoid` turns it into a channel of 0.5, which is another constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..graph.types import Step
from ..tracing.operators.interface import OfConstants
from ..tracing.operators.table import row_of

Values = Mapping[str, Tensor]
"""The constants at one activation, by group: shape `(size,)`, or `()` if all channels have the same. `nan`: the channel is not
constant, or its constant is not known."""

ZERO = torch.zeros((), dtype=torch.float64)

NAN = torch.full((), float("nan"), dtype=torch.float64)


def effect_of(step: Step) -> OfConstants:
    """What a step without weights does to constants."""
    known = row_of(step.name).constants
    if known in ("product", "quotient") and sum(i is not None for i in step.inputs) == 1:
        return "pointwise"  # by a number
    if known == "zero if padded":
        return "zero" if len(step.rest) > 2 and any(step.rest[2]) else "kept"
    return known


def constants_after(step: Step, effect: OfConstants, operands: Sequence[Values]) -> Values | None:
    """The constants behind a step without weights, from those of its operands; None where the effect is not known."""
    if effect == "product":
        return by_group(operands, product)
    if effect == "quotient":
        return by_group(operands, lambda a, b: torch.where(a == 0, a, a / b))
    if effect == "pointwise":
        return by_group(operands, lambda *numbers: computed(step, numbers))
    if effect == "padding":
        filler = float(step.rest[1]) if len(step.rest) > 1 else 0.0
        return by_group(operands, lambda v: torch.where(v == filler, v, NAN))
    if effect in ("kept", "zero"):
        kept = where_equal(operands)
        return kept if effect == "kept" else by_group([kept], lambda v: torch.where(v == 0, v, NAN))
    return None


def by_group(operands: Sequence[Values], combine: Callable[..., Tensor]) -> Values:
    """`combine` of the operands' constants, group by group; nan for an operand that lacks the group."""
    done: dict[tuple[int, ...], Tensor] = {}  # many groups share one tensor
    out = {}
    for group in dict.fromkeys(g for values in operands for g in values):
        given = [values.get(group, NAN) for values in operands]
        key = tuple(map(id, given))
        if key not in done:
            done[key] = combine(*given)
        out[group] = done[key]
    return out


def where_equal(operands: Sequence[Values]) -> Values:
    """The constants of operands side by side (`cat`). Where several have the same group: the constants on which they agree."""
    out: dict[str, Tensor] = {}
    for values in operands:
        for group, v in values.items():
            have = out.setdefault(group, v)
            out[group] = v if have is v else torch.where(have == v, v, NAN)
    return out


def product(first: Tensor, *others: Tensor) -> Tensor:
    """Zero where one factor is, whatever the others are."""
    for factor in others:
        first = torch.where((first == 0) | (factor == 0), 0.0, first * factor)
    return first


def computed(step: Step, numbers: Sequence[Tensor]) -> Tensor:
    """What the elementwise operator of a step makes of numbers; nan if it needs or makes tensors of another kind."""
    try:
        out = getattr(torch.ops.aten, step.name)(*numbers, *step.rest, **dict(step.options))
    except (AttributeError, RuntimeError, TypeError, IndexError):
        return NAN
    return out.double() if isinstance(out, Tensor) and not out.is_complex() else NAN
