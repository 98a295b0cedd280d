"""The description of an operator, the interface between a rule and a forward, and helpers that many rules share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ...graph.types import PinCode, Role
from ..labels import Carried, Ids, Label, aligned, collapsed

OfConstants = Literal[
    "kept",  # values are moved or averaged: a constant channel keeps its constant
    "zero",  # zeros stay zeros; another constant becomes something else
    "zero if padded",  # kept, or only zeros where it pads with zeros
    "product",  # zero where one factor is zero
    "quotient",  # zero where the numerator is zero
    "padding",  # kept where it equals the padding
    "pointwise",  # the operator itself says what a number becomes
    "unknown",  # even zeros may become something else
]


@dataclass(frozen=True)
class Operator:
    """All that is known of one ATen operator: a row of `table.ROWS`."""

    name: str
    # What happens to the channels. None: not known, so the channels that the operator reads are pinned.
    rule: Rule | None = None
    # The positional arguments that must not change with the widths (the first, and one past the last).
    fixed_args: tuple[int, int | None] = (0, None)
    # What else must not change. Of a first input without channels: its shape or its values. Of a first input (of a product: the
    # first factor) that was expanded or is uniform: its sizes there ("expanded", and "shape" too), as it may sum over them.
    compared: Literal["nothing", "expanded", "shape", "values"] = "nothing"
    # What becomes of a channel that is constant.
    constants: OfConstants = "unknown"
    # Whether a call pools over space ("over space": where it reduces exactly the spatial dimensions).
    pools: Literal["never", "always", "over space"] = "never"
    # Whether the output, or its shape, depends on values ("by mask": where a mask is among the indices).
    data_dependent: Literal["never", "always", "by mask"] = "never"
    # The layer that a call with a parameter as its weight is.
    layer: Literal["convolution", "linear", "batch norm"] | None = None
    # A matrix product: the last two tensors among its arguments are the factors.
    matrix_product: bool = False
    # Reads a range of channels by their numbers.
    takes_by_number: bool = False
    # The output on meta tensors.
    shape_rule: ShapeRule | None = None
    # The arguments of a normalisation, cut to the channels that survive. None: only the first argument has channels.
    restrict_args: RestrictArgs | None = None

    def is_pooling(self, args: Sequence[Any]) -> bool:
        """Whether a call pools over space."""
        if self.pools == "over space":
            return len(args) > 1 and args[0].ndim > 2 and sorted(dims_of(args[1], args[0].ndim)) == [*range(2, args[0].ndim)]
        return self.pools == "always"

    def depends_on_data(self, args: Sequence[Any]) -> bool:
        """Whether the output of a call, or its shape, depends on values."""
        return self.data_dependent == "always" or (self.data_dependent == "by mask" and any(map(is_mask, args[1])))


class Call(NamedTuple):
    """One operator call of a forward, numbered by `CallCounter`.

    `number` counts the calls of the same operator, `place` all calls, `pool` the poolings over space, `product` the matrix
    products without a parameter. The last two are -1 for other calls. `out` is None until the call has run.
    """

    operator: Operator
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    number: int
    place: int
    pool: int = -1
    product: int = -1
    out: Any = None

    @property
    def name(self) -> str:
        """The operator's name, without overload and in-place underscore."""
        return self.operator.name


class UnknownForm(Exception):
    """A rule does not support this form of its operator. The channels are pinned."""


class Queries(Protocol):
    """What a rule may ask. The answers differ between the dense forward and a narrowed one."""

    def of(self, t: Any) -> Carried:
        """What a tensor carries."""

    def weight_axes(self, w: Tensor, blocks: int, transposed: bool) -> tuple[Label | None, Label | None] | None:
        """Flat ids of the channels that a convolution weight reads and produces. None if it is not an unchanged parameter."""

    def is_single(self, label: Label) -> bool:
        """Whether a parameter dimension has one channel in the dense network, which broadcasts to all others."""

    def is_depthwise(self, call: Call) -> bool:
        """Whether a convolution has one group per input channel in the dense network, where this is noted for the probe."""

    def padding_ids(self, call: Call, size: int, part: int) -> Ids:
        """Ids of channels that a call adds. `part`: which of the blocks that it adds."""

    def spread_dims(self, call: Call, dims: Sequence[int], ids: Ids) -> tuple[int, ...]:
        """Of the `dims` over which a view seems to spread channels, those along which the ids vary.

        If channels repeat, for example over kernel positions, these are fewer.
        """

    def view_dim(self, call: Call, dims: Sequence[int], ids: Ids) -> int:
        """Which of the `dims` over which a view splits channels shrinks when channels are removed."""


class Facts(Protocol):
    """What a rule may report. The collector stores all of it. The probe checks that united ids are equal."""

    def unite(self, a: Ids, b: Ids) -> None:
        """Channels with these ids must be removed together. The arrays broadcast."""

    def tie(self, label: Label) -> None:
        """All fibres along the free dimension must keep equally many channels."""

    def pin(self, labels: Sequence[Label], code: PinCode, text: str) -> None:
        """These channels cannot be removed. `text`: why, for people."""

    def mix(self, call: Call, label: Label) -> None:
        """The call mixes channels: its result depends on which channels exist."""

    def sum_over(self, call: Call, label: Label) -> None:
        """The call sums over these channels of its first factor. Neither factor is a parameter."""

    def use_axis(self, call: Call, label: Label | None, role: Role) -> None:
        """The parameter dimension of a label produces ("out") or reads ("in") channels."""

    def use_weight(self, label: Label | None, macs: float) -> None:
        """The parameter of a label is used in this many multiply-adds."""

    def read_maps(self, call: Call, label: Label, pool: int) -> None:
        """A layer reads feature maps: its first input, or, if `pool` is the number of a pooling, the input of that pooling."""


class RuleContext(Queries, Facts, Protocol):
    """The second argument of a rule, beside the call."""


Rule = Callable[[RuleContext, Call], Sequence[Carried]]
"""Computes from a call what each of its outputs carries."""

ShapeRule = Callable[[Sequence[Any], bool], Any]
"""Computes the output from the arguments and from whether the call is in place. None if the rule does not apply."""

RestrictArgs = Callable[[Sequence[Any], int, Tensor], list[Any]]
"""Restricts the arguments to the surviving indices (third) of a dimension (second) of the input."""


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


def is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


NUMBERS = {int, float, bool, type(None)}  # isinstance of a Tensor is slow: it asks a metaclass


def address(t: Tensor) -> int:
    """The address of a tensor's storage. Views of a tensor share it."""
    return t.untyped_storage()._cdata


def tensors_in(args: Any) -> list[Tensor]:
    """The tensors in nested lists and tuples."""
    out: list[Tensor] = []
    for a in args:
        if type(a) in NUMBERS:
            continue
        if isinstance(a, (list, tuple)):
            out += tensors_in(a)
        elif isinstance(a, Tensor):
            out.append(a)
    return out


def plain(args: Any) -> tuple[Any, ...]:
    """The arguments that are neither tensors nor lists of them."""
    return tuple(a for a in args if type(a) in NUMBERS or not tensors_in((a,)))


def meet(r: RuleContext, operands: Sequence[tuple[Carried, Sequence[int]]], ndim: int, what: str) -> tuple[Label, ...]:
    """Labels of an elementwise result. Operands that are free in the same dimension are united there.

    If an operand has a size but no channels in that dimension, the channels of the others are pinned. Labels keep the axis of a
    parameter, unless an activation has all these dimensions: the result is an activation then, no weight. A style that
    multiplies the inputs of a weight is broadcast over its outputs, so that the product is a weight still.
    """
    found: dict[int, list[Label]] = {}
    order = sorted(operands, key=lambda o: -len(o[1])) if len(operands) > 1 else operands
    for carried, _ in order:
        for label in carried.labels:
            label = aligned(label, ndim)
            found.setdefault(label.free, []).append(label)
    activation = any(is_activation(c) and all(len(shape) >= ndim - dim and shape[dim - ndim] > 1 for dim in found)
                     for c, shape in operands)
    out: list[Label] = []
    for dim, labels in found.items():
        for other in labels[1:]:
            if other.ids is not labels[0].ids:
                r.unite(labels[0].ids, other.ids)
        for carried, shape in operands:
            d = dim - (ndim - len(shape))
            if d >= 0 and shape[d] > 1 and not carried.uniform and d not in carried.even and not free_at(carried, d):
                r.pin(labels, "operand", f"{what} with a tensor whose {shape[d]} entries cannot shrink")
                break
        out.append(labels[0]._replace(axis=None) if activation else labels[0])
    return tuple(out)


def labels_outside(r: RuleContext, x: Tensor, dims: Sequence[int], what: str) -> list[Label]:
    """The labels of a tensor that do not run along `dims`. The others are pinned: an operator that has no rule for them."""
    labels = r.of(x).labels
    r.pin([label for label in labels if label.free in dims], "operator", f"{what} along the channels")
    return [label for label in labels if label.free not in dims]


def is_activation(c: Carried) -> bool:
    """Whether channels are carried, and by no parameter nor by what is made of one."""
    return bool(c.labels) and not c.weight and not any(x.axis for x in c.labels)


def piece(label: Label, dim: int, start: int, stop: int, step: int = 1) -> Label:
    if label.ids.shape[dim] == 1 and label.free != dim:
        return label
    return Label(label.ids[(*[slice(None)] * dim, slice(start, stop, step))], label.free)


def at_channels(r: RuleContext, label: Label) -> Ids:
    """Flat ids along the free dimension. Ids that vary along other dimensions are united."""
    others = [d for d in range(label.ids.ndim) if d != label.free]
    return collapsed(label, others, r.unite).ids.reshape(-1)
