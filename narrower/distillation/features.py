"""Features that the dense and the narrow network have in common: the plan says which dense channels the narrow ones are."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..graph.selection import Kept
from ..graph.types import Graph
from ..inputs import flatten_tensors
from ..narrowing.layers import Layers


class Tap(NamedTuple):
    """Where features are compared: what `module` reads. `channels` `(n,)`: of the dense features those that the narrow network
    has. `dim`: the dimension of channels."""

    module: str
    channels: Tensor
    dim: int


def find_taps(model: nn.Module, kept: Kept) -> list[Tap]:
    """A tap at the end of each stage: at the first layer of each number of output positions, and at the last layer.

    These layers read what a stage gives, with everything that is added to it. Layers that read only the network's input, and
    those that are no plain convolution or linear module, have no tap.
    """
    taps = []
    for weight in stage_ends(kept.graph):
        name = weight.rpartition(".")[0]
        module = dict(model.named_modules()).get(name)
        if (weight, 1) in kept.graph.by_axis and weight == f"{name}.weight" and type(module) in PLAIN:
            stay = kept.positions(weight, 1)
            first = torch.arange(len(stay))[:, None] * kept.graph.shapes[weight][1]
            dim = -1 if isinstance(module, nn.Linear) else 1
            taps.append(Tap(name, (torch.as_tensor(stay) + first).flatten(), dim))
    return taps


PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def stage_ends(graph: Graph) -> list[str]:
    """The weights of the first layer of each number of output positions, and of the last layer, in the order of the forward."""
    layers = Layers(graph)
    found = [layer for step in graph.steps if not step.training and (layer := layers.layer(step))]
    weights = [layer.weight for layer in found if not layer.transposed and not layer.depthwise]
    first = {graph.uses.get(w, 0.0): w for w in reversed(weights)}
    return [w for w in dict.fromkeys(weights) if w in first.values() or w == weights[-1]]


class Watched:
    """Keeps what the tapped modules of a network read in its last forward, and what it returned."""

    def __init__(self, model: nn.Module, taps: list[Tap]) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.blind: set[str] = set()  # the modules whose input was kept under `no_grad`
        self.outputs: list[Tensor] = []
        self.handles = [model.get_submodule(t.module).register_forward_pre_hook(keep_input(self.inputs, self.blind, t.module))
                        for t in taps]
        if taps:
            self.handles.append(model.register_forward_hook(keep_outputs(self.outputs)))

    def take(self) -> dict[str, Tensor]:
        """What the tapped modules read, which is forgotten here."""
        found = dict(self.inputs)
        self.inputs.clear()
        self.outputs.clear()
        return found

    def returned(self, outputs: Any) -> bool:
        """Whether these outputs, or what they were computed from, are those of the last forward. Without gradients nobody can
        tell, and a part of the network may have run alone: then it is taken to be so."""
        if not self.outputs or all(t.grad_fn is None for t in flatten_tensors(outputs)):
            return True
        last = {t.grad_fn for t in self.outputs}
        return any(node in last for node in nodes_before(outputs))

    def without_gradients(self, outputs: Any) -> list[str]:
        """The tapped modules that ran without gradients where these outputs have them, as torch's reentrant checkpoint does it:
        backward runs them again, but what they read then is not what was kept. A part that the network itself runs under
        `no_grad` has no gradient to lose."""
        if self.blind and any(node.name().endswith("CheckpointFunctionBackward") for node in nodes_before(outputs)):
            return sorted(self.blind)
        return []

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def nodes_before(outputs: Any) -> Iterator[Any]:
    """The nodes of the autograd graph that outputs were computed by, the last first."""
    waiting = deque(t.grad_fn for t in flatten_tensors(outputs) if t.grad_fn is not None)
    seen = set(waiting)
    while waiting:
        node = waiting.popleft()
        yield node
        before = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= before
        waiting += before


def keep_input(inputs: dict[str, Tensor], blind: set[str], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook. A plain function over a dict: a copy of the network must not copy the other network with it."""
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[name] = args[0]
        (blind.discard if torch.is_grad_enabled() or args[0].requires_grad else blind.add)(name)
    return hook


def keep_outputs(outputs: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    """A hook that keeps the tensors that a network returns."""
    def hook(module: nn.Module, args: tuple[Any, ...], returned: Any) -> None:
        outputs[:] = flatten_tensors(returned)
    return hook
