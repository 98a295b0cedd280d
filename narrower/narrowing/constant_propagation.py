"""Where zeroed channels become constants, and which layers can take them.

The operator calls of a traced forward are walked once. Every activation knows the sites whose zeros make its channel a
constant: a convolution or a BatchNorm is a site of its own, `relu` hands its input's on, an addition needs both
operands', a product one of them, and `sigmoid` makes a half of a zero. What reads a channel then says which sites that
channel needs, and whether it can take the constant into its bias or its BatchNorm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..graph.types import ChannelMap, Graph, Step
from ..tracing.operators.table import row_of
from .constant_values import ZERO, Values, padded, pointwise, product, quotient, side_by_side, zero_only


@torch.no_grad()
def absorb_constants(tensors: Mapping[str, Tensor], graph: Graph, reader: Reader, group: str, values: np.ndarray,
           left: Mapping[tuple[str, int], np.ndarray]) -> None:
    """Add, in place, what channels of a group with these `values` (one each) make of the reader's output. `left`: the dense
    positions `(blocks, n)` that dimensions of narrowed tensors still have."""
    weight, into = tensors[reader.weight], tensors[reader.into]
    size = graph.shapes[reader.weight][1]
    at = np.zeros((reader.blocks, size))
    for s in graph[group].slices:
        if s.tensor == reader.weight and s.role == "in":
            at.reshape(-1)[s.positions] = values[s.channels]
    if (reader.weight, 1) in left:
        at = np.take_along_axis(at, left[reader.weight, 1], axis=1)
    sums = weight.detach().double().reshape(reader.blocks, -1, at.shape[1], weight[0, 0].numel()).sum(3)
    added = (sums * torch.as_tensor(at, device=weight.device)[:, None]).sum(2).reshape(-1)
    sign = -1 if reader.mean else 1
    into.copy_(into.double() + sign * added)


CompactorKind = Literal["full", "block", "diagonal"]


@dataclass(frozen=True)
class Site:
    """A compactor's place: behind the output of `module`, the channels in dimension `dim` there.

    `norm` names the BatchNorm that a compactor is merged into, `weight` (and `bias`) the layer: of a full or block-diagonal
    one both, where there is a BatchNorm. `blocks` are the groups of the convolution.
    """

    module: str
    kind: CompactorKind
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


class Reader(NamedTuple):
    """A convolution or linear layer that can take a constant channel into `into`: its bias, which may be `missing`, or the
    running `mean` of the BatchNorm behind it."""

    weight: str
    into: str
    blocks: int = 1
    mean: bool = False
    missing: bool = False


class Layer(NamedTuple):
    """A convolution or linear layer by its tensors, its module and the activation that it makes."""

    weight: str
    bias: str | None
    transposed: bool
    module: str
    output: int


class Activation(NamedTuple):
    """The channels of an activation are constant if they are zero at all `sites`, unless `broken` says why not. `values`: what
    they are then; `name`: which operator made that of a zero."""

    sites: frozenset[str] = frozenset()
    broken: str = ""
    values: Values = MappingProxyType({})
    name: str = ""

    @property
    def zero(self) -> bool:
        return not self.broken and all(bool((v == 0).all()) for v in set(self.values.values()))


MOVES = ("kept", "zero", "zero if padded")  # what `Operator.constants` says of operators that make zeros of zeros

Start = Callable[[Site, Layer | None, ChannelMap], Tensor]
"""What a site makes of a group's channels, which are some of its rows, given the layer before it."""


class Walk:
    """One pass over the steps of a graph, in which the channels of every site are what `start` says: zero. `takes_bias` says
    whether the layer with a weight can be given a bias."""

    def __init__(self, graph: Graph, takes_bias: Callable[[str], bool],
                 start: Start = lambda site, layer, rows: ZERO) -> None:
        self.graph, self.takes_bias, self.start = graph, takes_bias, start
        self.sites: dict[str, Site] = {}
        self.activations: dict[int, Activation] = {}
        self.labelled: set[int] = set()
        self.origin: dict[int, str] = {}  # activations that are a parameter, moved
        self.repeated: dict[int, str] = {}  # scales and shifts of an InstanceNorm, which has them for each image
        self.layers: dict[int, Layer] = {}  # by what they make
        self.readers: dict[int, list[Step]] = {}
        self.users: dict[str, set[str]] = {}  # the modules that use a convolution's weight
        self.uses: Counter[tuple[str, bool]] = Counter()  # and how often it is used in one forward
        for s in graph.steps:
            self.users.setdefault(self.weight_of(s), set()).add(s.module)
            self.uses[self.weight_of(s), s.training] += 1
            for i in s.inputs:
                if isinstance(i, int):
                    self.readers.setdefault(i, []).append(s)
        self.needs: list[tuple[Activation, Reader | str]] = []  # or why the reader cannot take a constant
        self.gates: set[str] = set()  # sites that make what multiplies a channel
        self.depthwise: set[str] = set()
        for step in graph.steps:
            out = self.passed(step)
            for number in step.outputs:
                self.activations[number] = out
                if step.labelled:
                    self.labelled.add(number)

    def weight_of(self, step: Step) -> str:
        return str(step.inputs[1]) if step.name == "convolution" and isinstance(step.inputs[1], str) else ""

    def of(self, ref: int | str | None) -> Activation:
        if isinstance(ref, int):
            return self.activations.get(ref, Activation(broken="an input"))
        return Activation(broken="a parameter")

    def passed(self, step: Step) -> Activation:
        """What the channels of a step's output are."""
        name, inputs = step.name, step.inputs
        moved = next((i for i in inputs if i is not None), None)
        if row_of(name).constants in MOVES and (isinstance(moved, str) or moved in self.origin):
            self.origin.update(dict.fromkeys(step.outputs, moved if isinstance(moved, str) else self.origin[moved]))
        if name == "repeat" and isinstance(moved, str):
            self.repeated[step.outputs[0]] = moved
        if name == "convolution":
            return self.convolution(step)
        if name in ("mm", "addmm"):
            return self.linear(step)
        if "batch_norm" in name:
            return self.batch_norm(step)
        live = [i for i in inputs if isinstance(i, int) and i in self.labelled and i not in self.origin]
        if not live:
            return Activation(broken="no channels")
        operands = [self.of(i) for i in live]
        out = self.made_of(step, operands, others=[i for i in inputs if i is not None and i not in live])
        if not step.labelled:
            self.needs += [(x, f"{name} reads them") for x in ([out] if row_of(name).constants == "product" else operands)]
        return out

    def made_of(self, step: Step, operands: list[Activation], others: list[int | str]) -> Activation:
        """The output of an operator without weights."""
        name, values, known = step.name, [x.values for x in operands], row_of(step.name).constants
        out = Activation(frozenset().union(*(x.sites for x in operands)), next((x.broken for x in operands if x.broken), ""),
                         name=next((x.name for x in operands if x.name), ""))
        if known == "product" and (others or len(operands) > 1):
            zeros = [x for x in operands if x.zero]
            if zeros:
                out = zeros[0]
                self.gates |= {m for x in operands if not x.zero for m in x.sites}
            found = product([*values, *({} for _ in others)])
        elif known == "quotient" and (others or len(operands) > 1):
            out = self.of(step.inputs[0])
            found = quotient(out.values, self.of(step.inputs[1]).values)
        elif known in MOVES:
            found = side_by_side(values)
            if known == "zero" or (known == "zero if padded" and len(step.rest) > 2 and any(step.rest[2])):
                found = zero_only(found)
        elif known == "padding":
            found = padded(values[0], float(step.rest[1]) if len(step.rest) > 1 else 0.0)
        elif known == "slope":
            found = zero_only(values[0])
        elif known in ("pointwise", "product", "quotient") and not others and None not in step.inputs[: len(operands)]:
            found = pointwise(name, values, step.rest, dict(step.options))
        else:
            return out._replace(broken=out.broken or f"{name} of zero may not be zero", values={})
        out = out._replace(values={} if out.broken else found)
        return out if out.zero or out.name else out._replace(name=name)

    def found(self, step: Step, layer: Layer | None, **site: object) -> Activation:
        """The output of a step as a site, if a module returns it and can hold a compactor there."""
        root = step.outputs[0]
        module = step.module or next((s.module for s in self.graph.steps if s.module and s.name in ("view", "_unsafe_view")
                                      and root in s.inputs), "")
        new = Site(module, **site)  # type: ignore[arg-type]
        if not module:
            return Activation(broken=f"no module returns the output of {new.weight or new.norm}")
        if self.sites.setdefault(module, new) != new:
            return Activation(frozenset([module]), f"{module} is used in two ways")
        return Activation(frozenset([module]), values={
            s.group: self.start(new, layer, s) for s in self.graph.by_axis.get(new.rows, ())})

    @staticmethod
    def own_bias(weight: str) -> str:
        return f"{weight.removesuffix('weight')}bias"

    def bias(self, weight: str, given: int | str | None) -> str | None:
        """The bias of a layer: the one that the trace saw, or that it has been given since."""
        own = self.own_bias(weight)
        return given if isinstance(given, str) else own if own in self.graph.created else None

    def reader(self, step: Step, weight: str, bias: str | None) -> Reader | str:
        """Where a layer can take a constant, or why it cannot."""
        blocks = 1
        if step.name == "convolution":
            _, padding, _, transposed, _, blocks = step.rest[-6:]
            if any(padding) or transposed:
                return f"{weight} reads them between zeros"
        if self.uses[weight, step.training] > 1:
            return f"{weight} is used more than once"
        if bias is not None:
            return Reader(weight, bias, blocks)
        behind = self.readers.get(step.outputs[0], [])
        if len(behind) == 1 and "batch_norm" in behind[0].name and isinstance(behind[0].inputs[3], str):
            mean = behind[0].inputs[3]
            if sum(s.inputs[3:4] == (mean,) for s in self.graph.steps if s.training == step.training) == 1:
                return Reader(weight, mean, blocks, mean=True)
        if self.takes_bias(weight):
            return Reader(weight, self.own_bias(weight), blocks, missing=True)
        return f"the layer of {weight} has neither a bias nor a BatchNorm behind it"

    def convolution(self, step: Step) -> Activation:
        x, weight, bias = step.inputs[:3]
        if not isinstance(weight, str):
            self.needs.append((self.of(x), "a convolution whose weight is computed reads them"))
            return Activation(broken="a convolution whose weight is computed")
        shape, bias = self.graph.shapes[weight], self.bias(weight, bias)
        transposed, _, groups = step.rest[-3:]
        if groups > 1 and groups == (shape[0] if transposed else shape[1] * groups):
            self.depthwise.add(weight)  # what it makes of them goes with them
            self.needs.append((self.of(x), ""))
        else:
            self.needs.append((self.of(x), self.reader(step, weight, bias)))
        wide = shape[1] * groups if transposed else shape[0]
        kind = self.kind(shape, groups, transposed)
        layer = self.layers[step.outputs[0]] = Layer(weight, bias, bool(transposed), step.module, step.outputs[0])
        if len(self.users[weight]) > 1:
            return Activation(broken=f"{weight} is shared by several layers")
        return self.found(step, layer, kind=kind, size=wide, weight=weight, bias=bias, transposed=transposed, blocks=groups)

    @staticmethod
    def kind(shape: tuple[int, ...], groups: int, transposed: bool) -> CompactorKind:
        """A compactor that costs more than its convolution is made diagonal: it could add nothing but time."""
        out, fan_in = (shape[1], shape[0] // groups) if transposed else (shape[0] // groups, int(np.prod(shape[1:])))
        if transposed:
            return "full" if groups == 1 and out <= fan_in * int(np.prod(shape[2:])) else "diagonal"
        if out > fan_in or groups == shape[1] * groups > 1:
            return "diagonal"
        return "full" if groups == 1 else "block"

    def linear(self, step: Step) -> Activation:
        operands = [i for i in step.inputs if i is not None]
        bias = operands.pop(0) if step.name == "addmm" else None
        x, w = operands[:2]
        weight = w if isinstance(w, str) else self.origin.get(w or 0)
        if not isinstance(x, int) or weight is None:
            live = [self.of(i) for i in operands if isinstance(i, int) and i in self.labelled]
            self.needs += [(a, "a product of activations reads them") for a in live]
            return Activation(frozenset().union(*(a.sites for a in live)), "a product of activations")
        bias = self.bias(weight, bias)
        self.needs.append((self.of(x), self.reader(step, weight, bias)))
        layer = self.layers[step.outputs[0]] = Layer(weight, bias, False, step.module, step.outputs[0])
        if not weight.endswith("weight") or (step.name == "addmm" and bias is None):
            return Activation(broken=f"{weight} is not the weight of a plain linear layer")
        size = self.graph.shapes[weight][0]
        return self.found(step, layer, kind="diagonal", size=size, dim=-1, weight=weight, bias=bias)

    def batch_norm(self, step: Step) -> Activation:
        x, *named = step.inputs[:5]
        scale, shift = (n if isinstance(n, str) else self.repeated.get(n or 0) for n in named[:2])
        if scale is None or shift is None:
            return Activation(self.of(x).sites, "a norm without scale and shift")
        norm = scale.rpartition(".")[0]
        layer = self.layers.get(x) if isinstance(x, int) else None
        if layer is not None and (len(self.readers[layer.output]) > 1 or self.uses[layer.weight, step.training] > 1):
            layer = None
        size = self.graph.shapes[scale][0]
        own = self.sites.get(layer.module) if layer is not None else None
        if own is None or own.kind == "diagonal" or not isinstance(named[2], str):
            return self.found(step, layer, kind="diagonal", size=size, norm=norm)
        return self.found(step, layer, kind=own.kind, size=size, norm=norm, weight=own.weight, bias=own.bias,
                          transposed=own.transposed, blocks=own.blocks)
