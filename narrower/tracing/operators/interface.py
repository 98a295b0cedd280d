"""What a rule for an operator is given and may say, and the few steps that many rules share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..labels import Carried, Ids, Label, aligned, collapsed


class Call(NamedTuple):
    """One operator call: `name` without overload and in-place underscore, what came out, its number among the calls of that
    name and its place among all calls of the forward."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    number: int
    place: int


class RuleContext:
    """Who runs the forward: the trace collects what rules say, the probe checks it."""

    def of(self, t: Any) -> Carried:
        """What a tensor carries."""
        raise NotImplementedError

    def unite(self, a: Ids, b: Ids) -> None:
        """Ids that must live and die together (arrays that broadcast)."""

    def tie(self, label: Label) -> None:
        """All fibres along the free dimension keep equally many."""

    def pin(self, labels: Sequence[Label], reason: str) -> None:
        """These cannot shrink."""

    def mix(self, call: Call, label: Label) -> None:
        """The call mixes channels: its result depends on which are there."""

    def product(self, call: Call, label: Label) -> None:
        """The call sums over these channels of its first factor; the second is no parameter."""

    def constant(self, call: Call, size: int, key: int) -> Ids:
        """Ids of channels that are there whatever is removed."""
        raise NotImplementedError

    def spread(self, call: Call, dims: Sequence[int], ids: Ids) -> tuple[int, ...]:
        """Those of the dimensions over which a view seems to spread channels along which they do change: channels that repeat,
        as over the positions of a kernel, change along fewer."""
        raise NotImplementedError

    def split_dim(self, call: Call, dims: Sequence[int], ids: Ids) -> int:
        """Which dimension of a view that splits channels shrinks with them."""
        raise NotImplementedError

    def weight(self, w: Tensor, blocks: int, transposed: bool) -> tuple[Label | None, Label | None]:
        """Flat ids of the channels that a convolution weight reads and makes."""
        raise NotImplementedError

    def alone(self, label: Label) -> bool:
        """Whether a parameter dimension has a single channel in the dense network: it meets all others by broadcasting."""
        raise NotImplementedError

    def role(self, label: Label | None, role: str) -> None:
        """The parameter dimension behind a label makes ("out") or reads ("in") channels."""

    def use(self, label: Label | None, macs: float) -> None:
        """The parameter behind a label takes part in that many multiply-adds."""

    def depthwise(self, call: Call) -> bool:
        """Whether a convolution has (in the dense network) one group for each channel that it reads."""
        raise NotImplementedError

    def reads(self, label: Label, source: Tensor, pool: int) -> None:
        """A convolution reads the maps of `source` (which comes from a pooling, if `pool` is its number)."""

    def pooled(self, source: Tensor) -> None:
        """A pooling reads `source`."""

    def refused(self, name: str, args: Sequence[Any]) -> None:
        """The operator has failed."""

    def happened(self, call: Call, outs: Sequence[Tensor], carried: Sequence[Carried]) -> None:
        """The call is over; what its outputs carry."""


Rule = Callable[[RuleContext, Call], Sequence[Carried]]


def free_at(c: Carried, dim: int) -> list[Label]:
    return [x for x in c.labels if x.free == dim]


def except_free_at(c: Carried, dims: Sequence[int]) -> list[Label]:
    return [x for x in c.labels if x.free not in dims]


def normal(dim: int, ndim: int) -> int:
    return dim + ndim if dim < 0 else dim


def dims_of(arg: Any, ndim: int) -> list[int]:
    if arg is None or (isinstance(arg, (list, tuple)) and not arg):
        return list(range(ndim))
    return [normal(d, ndim) for d in (arg if isinstance(arg, (list, tuple)) else [arg])]


def tensors_in(args: Any) -> list[Tensor]:
    out: list[Tensor] = []
    for a in args:
        if isinstance(a, Tensor):
            out.append(a)
        elif isinstance(a, (list, tuple)):
            out += tensors_in(a)
    return out


def plain(args: Any) -> tuple[Any, ...]:
    """The arguments that are neither tensors nor lists of them."""
    return tuple(a for a in args if not isinstance(a, Tensor) and not (isinstance(a, (list, tuple)) and tensors_in(a)))


def meet(r: RuleContext, operands: Sequence[tuple[Carried, Sequence[int]]], ndim: int, what: str) -> tuple[Label, ...]:
    """Labels of an elementwise result: operands that are free in one dimension unite there; where one of them has a
    size but no channels, nothing can shrink."""
    found: dict[int, list[Label]] = {}
    order = sorted(operands, key=lambda o: -len(o[1])) if len(operands) > 1 else operands
    for carried, _ in order:
        for label in carried.labels:
            label = aligned(label, ndim)
            found.setdefault(label.free, []).append(label)
    out: list[Label] = []
    for dim, labels in found.items():
        for other in labels[1:]:
            if other.ids is not labels[0].ids:
                r.unite(labels[0].ids, other.ids)
        for carried, shape in operands:
            d = dim - (ndim - len(shape))
            if d >= 0 and shape[d] > 1 and not carried.uniform and d not in carried.even and not free_at(carried, d):
                r.pin(labels, f"{what} with a tensor whose {shape[d]} entries cannot shrink")
                break
        out.append(labels[0])
    return tuple(out)


def piece(label: Label, dim: int, start: int, stop: int, step: int = 1) -> Label:
    if label.ids.shape[dim] == 1 and label.free != dim:
        return label
    index: list[slice] = [slice(None)] * label.ids.ndim
    index[dim] = slice(start, stop, step)
    return Label(label.ids[tuple(index)], label.free)


def at_channels(r: RuleContext, label: Label) -> Ids:
    """Flat ids along the free dimension; whatever changes elsewhere is mixed and unites."""
    others = [d for d in range(label.ids.ndim) if d != label.free]
    return collapsed(label, others, r.unite).ids.reshape(-1)
