"""The result of `trace`: the graph, its channel groups, and what else is known of the forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from ..errors import PlanError, similar

Role = Literal["out", "in", "both", "along"]


PinCode = Literal[
    "output",  # the network returns these channels, or its output shape depends on them
    "operand",  # they are combined with a tensor that cannot shrink: a constant, a buffer or an input
    "operator",  # an unknown operator, or an unsupported form of a known one
    "index",  # the code selects single channels by index
    "position",  # they move where they cannot be followed: kernel positions, scattered indices, partial writes
    "padding",  # zero padding: its size does not depend on what is removed
    "mixing",  # a layer mixes them in two dimensions (with allow_inexact=False: at all)
    "together",  # they can only be removed all at once, or there is only one
    "fails",  # the forward fails with fewer channels
    "differs",  # the forward does something else with fewer channels
]


@dataclass(frozen=True)
class PinReason:
    """Why channels cannot be removed. Programs compare `code`, people read `text`. `where`: module and source line."""

    code: PinCode
    text: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.where})" if self.where else self.text


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """Where the channels of one group are along an axis: `channels[n]` occupies `positions[n]`.

    A channel may occupy several positions, or none. The axis is a dimension of an activation or a tensor (`Slice`), the rows
    of a compactor, or the range that a stored number counts.
    """

    group: str
    channels: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True, eq=False)
class Slice(ChannelMap):
    """Where the channels of a group are along dimension `dim` of a parameter or buffer.

    `role`: "out" produces the channels (depthwise filters do too), "in" reads them, "both" does so in two uses (a tied
    autoencoder), "along" has one entry per channel (BatchNorm, bias). `blocks`: the number of groups of a grouped convolution
    whose groups read different channels. A position is then group * size + position within the group.
    """

    tensor: str
    dim: int
    role: Role
    blocks: int = 1

    @property
    def makes(self) -> bool:
        """Whether a layer makes the channels with it."""
        return self.role in ("out", "both")

    @property
    def reads(self) -> bool:
        """Whether a layer reads the channels with it."""
        return self.role in ("in", "both")


@dataclass(frozen=True, eq=False, repr=False)
class ChannelGroup:
    """Channels with shared indices: removing channel k removes it from every slice.

    `pinned`: why no channel can be removed, or None. `exact`: False if a layer normalises or pools across the channels.
    Removal then changes that layer by definition, and `verify` compares with the layer on the surviving channels. `layers`:
    the modules that produce the channels. The first gives the group its name.
    """

    name: str
    size: int
    slices: tuple[Slice, ...]
    layers: tuple[str, ...]
    pinned: PinReason | None = None
    exact: bool = True

    @property
    def free(self) -> bool:
        """Whether its channels can be removed."""
        return self.pinned is None

    @property
    def kind(self) -> str:
        """Why it is pinned, or how it is free, in words."""
        return f"pinned: {self.pinned}" if self.pinned else "free" if self.exact else "free, inexact"

    def __repr__(self) -> str:
        return f"<ChannelGroup {self.name}: {self.size} channels, {self.kind}>"


@dataclass(frozen=True, eq=False)
class MapSource:
    """Where to read feature maps in a forward pass: at the input of a convolution or of a pooling.

    `weight`: the convolution's parameter, or None for a pooling. It is the convolution's number in the forward if its weight is
    computed there or several have it. `pool`: the pooling's number in the forward. `consumers`: how many convolutions read the
    maps.
    """

    weight: str | int | None
    pool: int
    consumers: int
    members: tuple[ChannelMap, ...]


@dataclass(frozen=True, eq=False)
class Mixer:
    """A call that mixes channels, such as a layer norm or a mean over channels.

    It is call number `number` of `operator`. It mixes dimension `dim` of its input, which has `size` entries.
    """

    operator: str
    number: int
    dim: int
    size: int
    members: tuple[ChannelMap, ...]


@dataclass(frozen=True, eq=False)
class Product:
    """A matrix product of two activations that sums over channels.

    `number` counts all products without a parameter, `mm` and `bmm` alike: which of them runs depends on strides. `members`
    are positions in an array of `shape`, which broadcasts to the first factor.
    """

    number: int
    shape: tuple[int, ...]
    members: tuple[ChannelMap, ...]


@dataclass(frozen=True, eq=False)
class Tie:
    """Sets of channels that must keep equally many. A block is {group name: channel indices, with repetition}."""

    blocks: tuple[Mapping[str, np.ndarray], ...]


@dataclass(frozen=True, eq=False)
class Edit:
    """A number that a module stores and that counts channels: an attribute, or `entry` of a tuple or list.

    It is `size` in the dense network, minus the removed channels of `members` in the narrow one.
    """

    module: str
    attribute: str
    entry: int | None
    size: int
    members: tuple[ChannelMap, ...]


class Step(NamedTuple):
    """One operator call of the traced forward.

    `inputs`: an activation by number, a parameter or buffer by name, None for an argument that is not a tensor. `rest`: the
    other positional arguments. `options`: keyword arguments. `outputs`: activations by number. `labelled`: whether they have
    channels. `module`: the first module that returned them unchanged. `training`: whether this is the train forward.
    `groups`: of a call that takes channels apart, the groups in each output.
    """

    name: str
    inputs: tuple[int | str | None, ...]
    rest: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]
    outputs: tuple[int, ...]
    labelled: bool
    module: str = ""
    training: bool = False
    groups: tuple[frozenset[str], ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """All channel groups of a network, and the sizes that costs need.

    `shapes`: of every parameter and buffer. `uses`: how often each element of a convolution or linear weight is used for one
    sample, so that macs = sum(uses * elements). `computed`: {number of a convolution in the forward: parameter from which its
    weight is computed, and the dimension of it that reads}. `steps`: the calls of the eval forward, then of the train forward
    if it was traced. `edits`: numbers that modules store and that depend on the widths. `created`: biases that were added
    after tracing, to absorb constants.
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
    computed: Mapping[int, tuple[str, int]] = field(default_factory=dict)
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
        """The group of that name. Raises PlanError if there is none."""
        if name not in self.by_name:
            near = similar(str(name), self.by_name, most=3)
            raise PlanError(f"the graph has no group {name!r}{near or '; print(graph) lists them'}")
        return self.by_name[name]

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __repr__(self) -> str:
        return f"<Graph: {self.summary}>"

    def __str__(self) -> str:
        return "\n".join([table(self.rows), *self.footer])

    def _repr_html_(self) -> str:
        """For notebooks."""
        return html_table(self.rows, self.footer)

    @property
    def summary(self) -> str:
        """How many channels are free, in words."""
        free, total = sum(g.size for g in self.free), sum(g.size for g in self.groups)
        return f"{free} of {total} channels free in {len(self.free)} of {len(self.groups)} groups"

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """A header, and a row for each group."""
        return [("group", "channels", "layers", "kind"),
                *((g.name, str(g.size), str(len(g.layers)), g.kind) for g in self.groups)]

    @property
    def footer(self) -> list[str]:
        """The lines below the rows."""
        return [self.summary, *(f"note: {n}" for n in self.notes)]


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as aligned text under a header. The first and last column are left-aligned, the others right-aligned."""
    widths = [max(len(r[c]) for r in rows) for c in range(len(rows[0]))]
    last = len(widths) - 1

    def line(row: tuple[str, ...]) -> str:
        cells = [v.ljust(w) if c in (0, last) else v.rjust(w) for c, (v, w) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(rows[0]), "  ".join("-" * min(w, 60) for w in widths), *map(line, rows[1:])])


def html_table(rows: Sequence[tuple[str, ...]], footer: Sequence[str]) -> str:
    """The same rows as HTML, with lines of text below."""
    def line(row: tuple[str, ...], cell: str) -> str:
        return "<tr>" + "".join(f"<{cell}>{escape(text)}</{cell}>" for text in row) + "</tr>"

    body = "".join([line(rows[0], "th"), *(line(row, "td") for row in rows[1:])])
    return f"<table>{body}</table><p>{'<br>'.join(map(escape, footer))}</p>"


class Scores(dict[str, Tensor]):
    """{group name: Tensor[size]}: one score per channel of each free group. High scores are kept."""
