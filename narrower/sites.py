"""Where compactors stand: the places at which a zero row makes a channel zero for all that reads it.

The steps of a traced forward are walked once. Every activation knows the sites whose zeros make its channel zero:
a convolution or a BatchNorm is a site of its own, `relu` hands its input's on, an addition needs both operands', a product
one of them, and `sigmoid` makes something of a zero. What reads a channel then says which sites that channel needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from .groups import Graph, Step
from .ops import KINDS

Kind = Literal["full", "block", "diagonal"]
Scope = Literal["inner", "all"]


@dataclass(frozen=True)
class Site:
    """A compactor's place: behind the output of `module`, the channels in dimension `dim` there.

    `norm` names the BatchNorm that a compactor is merged into, `weight` (and `bias`) the layer: of a full or block-diagonal
    one both, where there is a BatchNorm. `blocks` are the groups of the convolution.
    """

    module: str
    kind: Kind
    size: int
    dim: int = 1
    weight: str | None = None
    bias: str | None = None
    norm: str | None = None
    transposed: bool = False
    blocks: int = 1

    @property
    def rows(self) -> tuple[str, int]:
        """The tensor and dimension whose positions are the compactor's rows."""
        if self.norm is not None:
            return f"{self.norm}.weight", 0
        return str(self.weight), int(self.transposed)


@dataclass(frozen=True, eq=False)
class Row:
    """The rows of a site that make a group's channels: `channels[n]` of the group is row `positions[n]`."""

    site: str
    channels: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True, eq=False)
class Places:
    """Sites by module, the rows that each group's channels need to be zero, and why other groups cannot be compacted."""

    sites: Mapping[str, Site]
    rows: Mapping[str, tuple[Row, ...]]
    reasons: Mapping[str, str]


class Zero(NamedTuple):
    """An activation's channel is zero if it is zero at all `sites`, unless `broken` says why not."""

    sites: frozenset[str] = frozenset()
    broken: str = ""


# operators that make zeros of zeros, whatever else they do
MOVES = {name for rule, names in KINDS.items() if rule.__name__ in (
    "view", "permute", "expand", "same", "cut", "select", "split", "unbind", "stack", "reorder", "repeat", "pixel_shuffle",
    "channel_shuffle", "reduce", "spatial") for name in names.split()} - {"logsumexp", "prod", "any", "all"}
ODD = {
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "tanh", "abs", "neg", "sign",
    "sqrt", "square", "sin", "asin", "atan", "erf", "round", "floor", "ceil", "trunc", "softshrink", "hardshrink", "prelu",
    "_prelu_kernel", "expm1", "log1p", "softsign",
}
PRODUCTS = {"mul", "bmm", "baddbmm"}


class Walk:
    """One pass over the steps of a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.sites: dict[str, Site] = {}
        self.zero: dict[int, Zero] = {}
        self.labelled: set[int] = set()
        self.origin: dict[int, str] = {}  # activations that are a parameter, moved
        self.maker: dict[int, Step] = {}  # outputs of convolutions and linear layers
        self.readers = Counter(i for s in graph.steps for i in s.inputs if isinstance(i, int))
        self.users: dict[str, set[str]] = {}  # the modules that use a convolution's weight
        self.uses: Counter[str] = Counter()  # and how often it is used
        for s in graph.steps:
            self.users.setdefault(self.weight_of(s), set()).add(s.module)
            self.uses[self.weight_of(s)] += 1
        self.needs: list[Zero] = []
        self.gates: set[str] = set()  # sites that make what multiplies a channel
        self.depthwise: set[str] = set()
        for step in graph.steps:
            out = self.passed(step)
            for number in step.outputs:
                self.zero[number] = out
                if step.labelled:
                    self.labelled.add(number)

    def weight_of(self, step: Step) -> str:
        return str(step.inputs[1]) if step.name == "convolution" and isinstance(step.inputs[1], str) else ""

    def of(self, ref: int | str | None) -> Zero:
        return self.zero.get(ref, Zero(broken="an input")) if isinstance(ref, int) else Zero(broken="a parameter")

    def passed(self, step: Step) -> Zero:
        """What the output of a step needs to be zero."""
        name, inputs = step.name, step.inputs
        moved = next((i for i in inputs if i is not None), None)
        if name in MOVES and (isinstance(moved, str) or moved in self.origin):
            self.origin.update(dict.fromkeys(step.outputs, moved if isinstance(moved, str) else self.origin[moved]))
        if name == "convolution":
            return self.convolution(step)
        if name in ("mm", "addmm"):
            return self.linear(step)
        if "batch_norm" in name:
            return self.batch_norm(step)
        live = [i for i in inputs if isinstance(i, int) and i in self.labelled]
        if not live:
            return Zero(broken="no channels")
        if name in PRODUCTS:
            whole = [i for i in live if not self.of(i).broken]
            for i in live:
                if whole and i not in whole:
                    self.gates |= self.of(i).sites
            out = self.of(whole[0]) if whole else self.all_of(live)
        elif name == "div":
            out = self.of(inputs[0])
        elif name in ("add", "sub", "cat", "maximum", "minimum", "concat"):
            others = [i for i in inputs if i is not None and i not in live]
            bare = name not in ("cat", "concat") and (others or any(step.numbers[:1]))
            out = self.all_of(live)
            if bare and not out.broken:
                out = Zero(out.sites, f"{name} of a constant")
        elif name in MOVES or name in ODD or self.through_zero(step):
            out = self.all_of(live)
        else:
            out = Zero(self.all_of(live).sites, f"{name} of zero may not be zero")
        if not step.labelled:
            self.needs += [out] if name in PRODUCTS else [self.of(i) for i in live]
        return out

    def all_of(self, numbers: list[int]) -> Zero:
        found = [self.of(i) for i in numbers]
        return Zero(frozenset().union(*(z.sites for z in found)), next((z.broken for z in found if z.broken), ""))

    def through_zero(self, step: Step) -> bool:
        """Whether these numbers leave a zero zero."""
        if step.name == "constant_pad_nd":
            return not any(step.numbers)
        if step.name in ("hardtanh", "clamp"):
            low, high = step.numbers if len(step.numbers) == 2 else (1.0, 0.0)
            return low <= 0 <= high
        if step.name in ("clamp_min", "clamp_max", "threshold"):
            return bool(step.numbers) and step.numbers[-1] == 0
        return step.name == "pow" and bool(step.numbers) and step.numbers[0] > 0

    def found(self, step: Step, **site: object) -> Zero:
        """The output of a step as a site, if a module returns it and can hold a compactor there."""
        root = step.outputs[0]
        module = step.module or next((s.module for s in self.graph.steps if s.module and s.name in ("view", "_unsafe_view")
                                      and root in s.inputs), "")
        new = Site(module, **site)  # type: ignore[arg-type]
        if not module:
            return Zero(broken=f"no module returns the output of {new.weight or new.norm}")
        if self.sites.setdefault(module, new) != new:
            return Zero(frozenset([module]), f"{module} is used in two ways")
        return Zero(frozenset([module]))

    def convolution(self, step: Step) -> Zero:
        x, weight, bias = step.inputs[:3]
        self.needs.append(self.of(x))
        if not isinstance(weight, str):
            return Zero(broken="a convolution whose weight is computed")
        shape = self.graph.shapes[weight]
        transposed, groups = bool(step.numbers[0]), int(step.numbers[1])
        if groups > 1 and groups == (shape[0] if transposed else shape[1] * groups):
            self.depthwise.add(weight)
        wide = shape[1] * groups if transposed else shape[0]
        kind = self.kind(shape, groups, transposed)
        self.maker[step.outputs[0]] = step
        if len(self.users[weight]) > 1:
            return Zero(broken=f"{weight} is shared by several layers")
        bias = bias if isinstance(bias, str) else None
        return self.found(step, kind=kind, size=wide, weight=weight, bias=bias, transposed=transposed, blocks=groups)

    @staticmethod
    def kind(shape: tuple[int, ...], groups: int, transposed: bool) -> Kind:
        """A compactor that costs more than its convolution is made diagonal: it could add nothing but time."""
        out, fan_in = (shape[1], shape[0] // groups) if transposed else (shape[0] // groups, int(np.prod(shape[1:])))
        if transposed:
            return "full" if groups == 1 and out <= fan_in * int(np.prod(shape[2:])) else "diagonal"
        if out > fan_in or groups == shape[1] * groups > 1:
            return "diagonal"
        return "full" if groups == 1 else "block"

    def linear(self, step: Step) -> Zero:
        operands = [i for i in step.inputs if i is not None]
        bias = operands.pop(0) if step.name == "addmm" else None
        x, w = operands[:2]
        weight = w if isinstance(w, str) else self.origin.get(w or 0)
        if not isinstance(x, int) or weight is None:
            live = [i for i in operands if isinstance(i, int) and i in self.labelled]
            self.needs.append(self.all_of(live))
            return Zero(self.all_of(live).sites, "a product of activations")
        self.needs.append(self.of(x))
        self.maker[step.outputs[0]] = step
        if not weight.endswith("weight") or (bias is not None and not isinstance(bias, str)):
            return Zero(broken=f"{weight} is not the weight of a plain linear layer")
        size = self.graph.shapes[weight][0]
        return self.found(step, kind="diagonal", size=size, dim=-1, weight=weight, bias=bias)

    def batch_norm(self, step: Step) -> Zero:
        x, *named = step.inputs[:5]
        if not isinstance(named[0], str) or not isinstance(named[1], str):
            return Zero(self.of(x).sites, "a BatchNorm without scale and shift")
        norm = named[0].rpartition(".")[0]
        maker = self.maker.get(x) if isinstance(x, int) else None
        size = self.graph.shapes[named[0]][0]
        plain: dict[str, object] = {"kind": "diagonal", "size": size, "norm": norm}
        own = self.sites.get(maker.module) if maker is not None else None
        if maker is None or own is None or own.kind == "diagonal" or not isinstance(named[2], str) or (
                self.readers[maker.outputs[0]] > 1 or self.uses[str(own.weight)] > 1):
            return self.found(step, **plain)
        return self.found(step, kind=own.kind, size=size, norm=norm, weight=own.weight, bias=own.bias,
                          transposed=own.transposed, blocks=own.blocks)


def places(graph: Graph, scope: Scope = "inner") -> Places:
    """Sites and rows for the free groups of a graph; `scope="inner"` leaves out the channels that several layers make."""
    walk = Walk(graph)
    by_tensor: dict[tuple[str, int], list[tuple[str, np.ndarray, np.ndarray]]] = {}
    for g in graph.groups:
        for s in g.slices:
            by_tensor.setdefault((s.tensor, s.dim), []).append((g.name, s.channels, s.positions))
    needed: dict[str, dict[str, Row]] = {}
    reasons: dict[str, str] = {}
    for zero in walk.needs:
        for module in sorted(zero.sites):
            for group, channels, positions in by_tensor.get(walk.sites[module].rows, ()):
                if zero.broken:
                    reasons.setdefault(group, zero.broken)
                needed.setdefault(group, {})[module] = Row(module, channels, positions)
    gates = {walk.sites[m].weight for m in walk.gates}
    rows: dict[str, tuple[Row, ...]] = {}
    for g in graph.free:
        mine = tuple(needed.get(g.name, {}).values())
        makers = {s.tensor for s in g.slices if s.role == "out"} - gates - walk.depthwise
        if not g.exact:
            reasons[g.name] = "a layer mixes these channels: a zero among them is not as good as none"
        elif not mine or len(np.unique(np.concatenate([r.channels for r in mine]))) < g.size:
            reasons.setdefault(g.name, "no layer was found whose zeros would reach all that reads them")
        elif scope == "inner" and len(makers) > 1:
            reasons.setdefault(g.name, f"{len(makers)} layers make these channels (scope='inner')")
        if g.name not in reasons:
            rows[g.name] = mine
    used = {r.site for mine in rows.values() for r in mine}
    return Places({m: s for m, s in walk.sites.items() if m in used}, rows,
                  {g.name: reasons[g.name] for g in graph.free if g.name in reasons})
