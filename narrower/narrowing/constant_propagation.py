"""Where constant channels go in a forward, and which layers read them.

Example: convolution, BatchNorm, `sigmoid`, convolution. Where scale and shift of the BatchNorm are zero, its channel is zero.
`sigmoid` makes 0.5 of it, and the second convolution adds 0.5 * sum(kernel) to each output. This is a bias: the channel can be
removed without a trace if the second convolution's bias takes it over.

A product is zero if one factor is. The other factor is then called a gate (squeeze-excite): its producers need not be zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..graph.types import Graph, Step
from ..tracing.operators.table import row_of
from .constant_values import NAN, Values, by_group, constants_after, effect_of
from .layers import Depthwise, Layer, Layers, Obstacle, Producer, Reader, Reference

Seed = Callable[[Producer], Tensor]
"""The constants that a producer makes: shape `(channels,)`, or `()` if all are the same; nan for channels that change."""


class Activation(NamedTuple):
    """What is known of an activation: its channels are the constants `values` if its `producers` make what the seed says.

    `obstacle`: why its channels are not constant even then; what makes them may then be no producer ("" as its module).
    `changed_by`: the operator that made another constant of zero.
    """

    producers: frozenset[Producer] = frozenset()
    values: Values = MappingProxyType({})
    obstacle: str | None = None
    changed_by: str | None = None

    @property
    def zero(self) -> bool:
        """Whether all its channels are zero."""
        return self.obstacle is None and all(bool((v == 0).all()) for v in set(self.values.values()))


    def part(self, groups: frozenset[str]) -> Activation:
        """What is known of a part of it that has channels of these groups only. The whole, if none are named."""
        return self._replace(values={g: v for g, v in self.values.items() if g in groups}) if groups else self


WITHOUT_CHANNELS = Activation(obstacle="a tensor without channels")


class Consumer(NamedTuple):
    """An activation where a layer reads it, and whether that layer can take its constants."""

    activation: Activation
    layer: Reader | Obstacle | Depthwise


@dataclass(frozen=True, eq=False)
class Propagation:
    """What `propagate` finds: all producers and consumers, and the producers of gates."""

    producers: tuple[Producer, ...]
    consumers: tuple[Consumer, ...]
    gates: frozenset[Producer]


def propagate(graph: Graph, takes_bias: Callable[[str], bool], seed: Seed) -> Propagation:
    """Follow the constants that producers make (`seed`) through the steps of a graph, to the layers that read them.

    `takes_bias`: whether the layer with a weight can be given a bias.
    """
    walk = Walk(graph, takes_bias, seed)
    for step in graph.steps:
        found = walk.after(step)
        walk.activations.update(dict.fromkeys(step.outputs, found))
        walk.activations.update((n, found.part(groups)) for n, groups in zip(step.outputs, step.groups, strict=False))
    return Propagation(tuple(walk.producers), tuple(walk.consumers), frozenset(walk.gates))


class Walk:
    """The state of `propagate`: what it has found so far."""

    def __init__(self, graph: Graph, takes_bias: Callable[[str], bool], seed: Seed) -> None:
        self.graph, self.takes_bias, self.seed = graph, takes_bias, seed
        self.layers = Layers(graph)
        self.activations: dict[int, Activation] = {}
        self.producers: dict[Producer, None] = {}  # an ordered set
        self.consumers: list[Consumer] = []
        self.gates: set[Producer] = set()

    def activation(self, ref: Reference) -> Activation:
        """What is known of an input of a step."""
        return self.activations.get(ref, WITHOUT_CHANNELS) if isinstance(ref, int) else WITHOUT_CHANNELS

    def after(self, step: Step) -> Activation:
        """What is known of the output of a step. Notes the consumers and gates there."""
        kind = row_of(step.name).layer
        if kind == "batch norm":
            return self.after_producer(step, None)
        if kind is None:
            return self.after_operator(step)
        layer = self.layers.layer(step)
        if layer is None:
            return self.after_product(step)
        x = self.activation(step.inputs[int(step.name == "addmm")])
        if not self.reads_channels(layer, x):
            return self.after_obstacle(f"{layer.weight} (over positions)", [x], [x])
        self.consumers.append(Consumer(x, self.layers.reader(step, layer, self.takes_bias)))
        if layer.depthwise and layer.bias is None and self.layers.fixed(layer):
            return x._replace(values=by_group([x.values], lambda v: torch.where(v == 0, v, NAN)))  # as a blur
        return self.after_producer(step, layer)

    def reads_channels(self, layer: Layer, x: Activation) -> bool:
        """Whether a layer sums over the channels of its input. A linear layer over positions, or a convolution that has the
        channels among its images, makes something else of the zeros of a channel: its bias."""
        dim = 0 if layer.depthwise else int(not layer.transposed)
        read = {s.group for s in self.graph.by_axis.get((layer.weight, dim), ())}
        given = {s.group for p in x.producers for s in self.graph.by_axis.get(p.axis, ())}
        return not given or bool(read & given)

    def after_producer(self, step: Step, layer: Layer | None) -> Activation:
        """Behind a layer or (None) a BatchNorm, the channels are what the seed says."""
        producer = self.layers.producer(step, layer)
        if isinstance(producer, Obstacle):
            before = self.activation(step.inputs[0]).producers if layer is None else frozenset({Producer("", layer)})
            return Activation(before, obstacle=producer.text)
        self.producers[producer] = None
        slices, values = self.graph.by_axis.get(producer.axis, ()), {}
        rows = self.seed(producer) if slices else NAN
        for s in slices:
            values[s.group] = rows
            if rows.dim():
                values[s.group] = NAN.repeat(self.graph[s.group].size)
                values[s.group][s.channels] = rows[s.positions]
        return Activation(frozenset([producer]), values)

    def after_product(self, step: Step) -> Activation:
        """Behind a convolution with a computed weight or a product of activations, no channel is constant."""
        if step.name == "convolution":
            x = self.activation(step.inputs[0])
            kept = [x] if step.rest[-1] > 1 else []  # filters made as wide as what they read: its channels go on
            return self.after_obstacle("a convolution whose weight is computed", [x], kept)
        read = [self.activation(i) for i in step.inputs if self.layers.has_channels(i)]
        return self.after_obstacle("a product of activations", read, read)

    def after_obstacle(self, what: str, read: Sequence[Activation], kept: Sequence[Activation]) -> Activation:
        """Behind something that takes no constants, none is left. `kept`: the activations whose channels go on."""
        self.consumers += [Consumer(x, Obstacle(f"{what} reads them")) for x in read]
        return Activation(joined(kept).producers, obstacle=what)

    def after_operator(self, step: Step) -> Activation:
        """Behind an operator without weights, constants are what it makes of them."""
        tensors = tuple(i for i in step.inputs if i is not None)
        live = tuple(i for i in tensors if self.layers.has_channels(i))
        if not live:
            return WITHOUT_CHANNELS
        operands, effect = [self.activation(i) for i in live], effect_of(step)
        out, values = joined(operands), [x.values for x in operands]
        if effect == "product":
            values += [{}] * (len(tensors) - len(live))
            if zeros := [x for x in operands if x.zero]:
                out = zeros[0]
                self.gates.update(p for x in operands if not x.zero for p in x.producers)
        elif effect == "quotient":
            out, below = self.activation(tensors[0]), self.activation(tensors[1])
            values = [out.values, below.values]
        elif effect == "pointwise" and step.inputs[:len(tensors)] != live:
            effect = "unknown"  # its tensors do not come first, or one has no channels
        made = constants_after(step, effect, values)
        obstacle = f"{step.name} of zero may not be zero" if out.obstacle is None and made is None else out.obstacle
        out = out._replace(values=made if made is not None and obstacle is None else {}, obstacle=obstacle)
        if not out.zero and out.changed_by is None:
            out = out._replace(changed_by=step.name)
        if not step.labelled:
            read = [out] if effect == "product" else operands
            self.consumers += [Consumer(x, Obstacle(f"{step.name} reads them")) for x in read]
        return out


def joined(operands: Sequence[Activation]) -> Activation:
    """What is known where all operands are needed, but for the values."""
    return Activation(frozenset().union(*(x.producers for x in operands)),
                      obstacle=next((x.obstacle for x in operands if x.obstacle is not None), None),
                      changed_by=next((x.changed_by for x in operands if x.changed_by is not None), None))
