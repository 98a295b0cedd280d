"""The nouns: what `trace` finds in a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

Role = Literal["out", "in", "along"]


PinCode = Literal[
    "output",  # the network returns these channels, or the shape of its output depends on them
    "operand",  # they meet a tensor that cannot shrink: a constant, a buffer, an input
    "operator",  # an operator that is not known, or in a form that is not known
    "index",  # single channels are taken by their numbers
    "position",  # they are laid where they cannot be followed: kernel positions, scattered indices, writes into a part
    "padding",  # channels of zeros that are there whatever is removed
    "mixing",  # a layer mixes them in two dimensions, or (allow_inexact=False) at all
    "together",  # all of them can only go together, or there is one only
    "fails",  # the forward fails when narrow
    "differs",  # the narrow forward does something else
]


@dataclass(frozen=True)
class PinReason:
    """Why channels cannot go: a code that decides, a text for people, and the module and source line where it was found."""

    code: PinCode
    text: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.where})" if self.where else self.text


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """Where the channels of one group are along an axis: `channels[n]` occupies `positions[n]`.

    A channel may occupy several positions, or none. The axis is a dimension of an activation, of a tensor (`Slice`), the
    rows of a compactor, or the numbers that a stored value counts.
    """

    group: str
    channels: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True, eq=False)
class Slice(ChannelMap):
    """Where the channels of a group are along dimension `dim` of a parameter or buffer.

    `role`: "out" makes the channels, "in" reads them, "along" has one entry for each (BatchNorm, bias, depthwise filters).
    `blocks`: the number of groups of a grouped convolution that reads other channels in each of them. Positions then count
    through all of them: block * size + position.
    """

    tensor: str
    dim: int
    role: Role
    blocks: int = 1


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that live and die by the same indices.

    `pinned` is the reason why none can go, or None. `exact` is False where some layer normalises or pools across the
    channels: removal then changes that layer by definition (its reference sees the surviving channels only).
    `layers` names the modules that make the channels; the first names the group.
    """

    name: str
    size: int
    slices: tuple[Slice, ...]
    layers: tuple[str, ...]
    pinned: PinReason | None = None
    exact: bool = True

    @property
    def free(self) -> bool:
        """Whether its channels can go."""
        return self.pinned is None


@dataclass(frozen=True, eq=False)
class MapSource:
    """Where feature maps can be seen in a forward pass: at the input of the convolution with that weight (or of that number in
    the forward, if its weight is computed there), or of the pooling of that number. `consumers` counts the convolutions
    that read them."""

    weight: str | int | None
    pool: int
    consumers: int
    members: tuple[ChannelMap, ...]


@dataclass(frozen=True, eq=False)
class Mixer:
    """A call that mixes channels (a layer norm, a mean over channels): `operator`'s call with that number, dimension
    `dim` of its input with `size` entries."""

    operator: str
    number: int
    dim: int
    size: int
    members: tuple[ChannelMap, ...]


@dataclass(frozen=True, eq=False)
class Product:
    """A product of activations that sums over channels: by its number among all products without a parameter (whether a linear
    layer is `mm` or `bmm` depends on strides). Its first factor has `members` at the positions of an array of `shape`, which
    broadcasts to it."""

    number: int
    shape: tuple[int, ...]
    members: tuple[ChannelMap, ...]


@dataclass(frozen=True, eq=False)
class Tie:
    """Sets of channels that must keep equally many: each block is {group name: channel indices, with repetition}."""

    blocks: tuple[Mapping[str, np.ndarray], ...]


@dataclass(frozen=True, eq=False)
class Edit:
    """A number that a module stores (an attribute, or `entry` of a tuple or list), which counts channels: `size` in the
    dense network, less those of `members` that go."""

    module: str
    attribute: str
    entry: int | None
    size: int
    members: tuple[ChannelMap, ...]


class Step(NamedTuple):
    """One operator call of the traced forward: activations by number, parameters and buffers by name (None for arguments that
    are no tensor); the other arguments (`rest` in their order, `options` by keyword); what came out, whether that has
    channels, and the first module that returned it as it is; whether it is of the train forward."""

    name: str
    inputs: tuple[int | str | None, ...]
    rest: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]
    outputs: tuple[int, ...]
    labelled: bool
    module: str = ""
    training: bool = False


@dataclass(frozen=True, eq=False)
class Graph:
    """All channel groups of a network, and the sizes that costs need.

    `shapes` has every parameter and buffer; `uses` the number of times that each element of a convolution or linear
    weight is used for one sample, so that macs = sum(uses * elements). `computed` names the parameter behind each
    convolution (by its number in the forward) that does not read one as it is. `steps` are the calls of the forward, in order
    (of the eval forward, then of the train forward where that was traced too). `edits` are numbers that modules store and that
    follow the widths. `created` names biases that layers were given since, for constants.
    """

    groups: tuple[ChannelGroup, ...]
    shapes: Mapping[str, tuple[int, ...]]
    parameters: frozenset[str]
    uses: Mapping[str, float]
    ties: tuple[Tie, ...] = ()
    sources: tuple[MapSource, ...] = ()
    mixers: tuple[Mixer, ...] = ()
    products: tuple[Product, ...] = ()
    notes: tuple[str, ...] = field(default=())
    computed: Mapping[int, str] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    edits: tuple[Edit, ...] = ()
    created: tuple[str, ...] = ()

    @cached_property
    def by_name(self) -> dict[str, ChannelGroup]:
        return {g.name: g for g in self.groups}

    @cached_property
    def by_axis(self) -> dict[tuple[str, int], tuple[Slice, ...]]:
        """The slices along each dimension of each tensor: {(tensor, dim): slices}."""
        out: dict[tuple[str, int], tuple[Slice, ...]] = {}
        for s in (s for g in self.groups for s in g.slices):
            out[s.tensor, s.dim] = *out.get((s.tensor, s.dim), ()), s
        return out

    @cached_property
    def free(self) -> tuple[ChannelGroup, ...]:
        return tuple(g for g in self.groups if g.free)

    def __getitem__(self, name: str) -> ChannelGroup:
        return self.by_name[name]

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __str__(self) -> str:
        rows = [("group", "channels", "layers", "kind")]
        for g in self.groups:
            kind = f"pinned: {g.pinned}" if g.pinned else "free" if g.exact else "free, inexact"
            rows.append((g.name, str(g.size), str(len(g.layers)), kind))
        free = sum(g.size for g in self.free)
        total = sum(g.size for g in self.groups)
        lines = [table(rows), f"{free} of {total} channels free in {len(self.free)} of {len(self.groups)} groups"]
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns under a header: the first and last to the left, numbers to the right."""
    widths = [max(len(r[c]) for r in rows) for c in range(len(rows[0]))]
    last = len(widths) - 1

    def line(row: tuple[str, ...]) -> str:
        cells = [v.ljust(w) if c in (0, last) else v.rjust(w) for c, (v, w) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(rows[0]), "  ".join("-" * min(w, 60) for w in widths), *map(line, rows[1:])])


class Scores(dict[str, Tensor]):
    """{group name: Tensor[size]}: one score for each channel of each free group; higher is kept."""
