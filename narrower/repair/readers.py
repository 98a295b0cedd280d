"""The layers that read channels: how many images they ask for, which lose inputs, and where their intercepts go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from math import ceil, prod

import numpy as np
import torch
from torch import Tensor, nn

from ..graph.selection import Kept
from ..graph.types import Graph, Step
from ..narrowing.layers import Layer, Layers, Reader
from ..surgery.resize import give_bias, takes_bias


def input_counts(graph: Graph) -> dict[str, int]:
    """The weights of the layers that read free groups, and how many inputs each reads at a position.

    A weight of two layers that read it along different dimensions, as in a tied autoencoder, is not among them: what is best
    for one is not for the other.
    """
    axes = {(s.tensor, s.dim) for g in graph for s in g.slices if s.reads}
    times = Counter(tensor for tensor, _ in axes)
    names = {s.tensor for g in graph.free for s in g.slices if s.reads and s.tensor in graph.uses and times[s.tensor] == 1}
    return {name: prod(graph.shapes[name][1:]) for name in sorted(names)}


def images_wanted(graph: Graph, reads: Mapping[str, int]) -> str:
    """Which layer asks for the most images. `reads`: how many inputs each weight reads at a position."""
    wanted = {name: ceil(count / max(1.0, graph.uses.get(name, 1.0))) for name, count in reads.items()}
    name = max(wanted, key=lambda n: wanted[n], default="")
    if not name:
        return "no layer to repair"
    return f"{name} reads {reads[name]:,} inputs: {wanted[name]:,} images give as many samples"


def losing_inputs(kept: Kept) -> tuple[dict[str, Tensor], dict[str, str]]:
    """For each weight that has lost inputs, the dense output channels that its layer still has `(O,)`; and why other weights
    cannot be repaired."""
    graph = kept.graph
    losing = [g.name for g in graph.free if not kept.mask(g.name).all()]
    weights = sorted({s.tensor for name in losing for s in graph[name].slices if s.reads and s.tensor in kept.cuts})
    steps, layers = layer_steps(kept, weights), Layers(graph)
    outputs, left = {}, {}
    for weight in weights:
        if weight not in steps:
            left[weight] = "its layer computes its weight first, or is no plain convolution or linear layer"
            continue
        if not layers.used_once(weight, steps[weight][0]):
            left[weight] = "it is used more than once in a forward"
            continue
        dim = int(steps[weight][1].transposed)
        stay = kept.positions(weight, dim)
        if dim and (weight, dim) not in graph.by_axis:  # a transposed convolution whose outputs all stay
            stay = np.tile(stay, (steps[weight][1].blocks, 1))
        first = np.arange(len(stay))[:, None] * graph.shapes[weight][dim]
        outputs[weight] = torch.as_tensor((stay + first).reshape(-1))
    return outputs, left


def layer_steps(kept: Kept, weights: Iterable[str]) -> dict[str, tuple[Step, Layer]]:
    """The step of the eval forward in which each of the weights is read by a convolution or linear layer."""
    layers = Layers(kept.graph)
    found: dict[str, tuple[Step, Layer]] = {}
    for step in kept.graph.steps:
        layer = None if step.training else layers.layer(step)
        if layer is not None and layer.weight in weights:
            found.setdefault(layer.weight, (step, layer))
    return found


def give_intercepts(small: nn.Module, kept: Kept, weights: Iterable[str]) -> dict[str, Reader]:
    """Where the intercept of each layer goes: its bias, the running mean of the BatchNorm behind it, or a new bias of zeros,
    which the layer of `small` gets, in place. Layers without such a place have no entry."""
    layers = Layers(kept.graph)
    places = {}
    for weight, (step, layer) in layer_steps(kept, weights).items():
        plain = layer._replace(padded=False, depthwise=False)  # an intercept is added to outputs: padding does not matter
        place = layers.reader(step, plain, partial(takes_bias, small))
        if isinstance(place, Reader):
            places[weight] = place
            if place.kind == "new bias":
                give_bias(small, place.into)
    return places
