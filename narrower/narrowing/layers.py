"""The layers of a traced forward: what produces channels, and what can take the constants that it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from ..graph.types import Graph, Step
from ..tracing.operators.table import row_of

MOVES = ("kept", "zero", "zero if padded")  # of operators whose output holds what their first input holds
TRANSPOSES = ("t", "transpose", "permute")  # of a matrix

Reference = int | str | None  # an input of a step: an activation by number, a parameter or buffer by name, None for no tensor


class Layer(NamedTuple):
    """A convolution or linear layer: its tensors and the module that returns its output ("" if none does).

    `blocks`: the groups of the convolution. `transposed`: its weight is `(I, O, ...)`: of a transposed convolution, or of a
    linear layer that computes x @ W and not x @ W.T. `padded`: it reads zeros beside its input (padding, or a transposed
    convolution).
    """

    weight: str
    bias: str | None
    module: str
    blocks: int = 1
    transposed: bool = False
    padded: bool = False
    depthwise: bool = False


class Producer(NamedTuple):
    """What makes the channels that `module` returns: a `layer`, a BatchNorm `norm` (its module), or a BatchNorm behind a layer.

    Where there are both, only the BatchNorm reads the layer, and the layer's weight is used once.
    """

    module: str
    layer: Layer | None
    norm: str | None = None

    @property
    def axis(self) -> tuple[str, int]:
        """The tensor and dimension along which its channels lie."""
        if self.layer is None or self.norm is not None:
            return f"{self.norm}.weight", 0
        return self.layer.weight, int(self.layer.transposed)


class Reader(NamedTuple):
    """A convolution or linear layer that can take constant channels `into` a tensor: its bias, a bias that it must be given
    first ("new bias"), or the running mean of the BatchNorm behind it. `blocks`, `transposed`: as of the `Layer`."""

    weight: str
    into: str
    blocks: int = 1
    kind: Literal["bias", "new bias", "running mean"] = "bias"
    transposed: bool = False


class Depthwise(NamedTuple):
    """A depthwise convolution: its output channel goes together with the input channel, so there is nothing to take."""

    weight: str


class Obstacle(NamedTuple):
    """Why a channel cannot be a constant, or why a constant cannot be taken."""

    text: str


class Layers:
    """The layers of a graph.

    `makers`: the step that makes each activation. `readers`: the steps that read an activation, a parameter or a buffer.
    `moved`: the parameter of which an activation is a view or a copy.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.makers: dict[Reference, Step] = {}
        self.readers: dict[Reference, list[Step]] = {}
        self.moved: dict[int, str] = {}
        for step in graph.steps:
            self.makers.update(dict.fromkeys(step.outputs, step))
            inputs = [i for i in step.inputs if i is not None]
            for i in inputs:
                self.readers.setdefault(i, []).append(step)
            if inputs and row_of(step.name).constants in MOVES and (name := self.parameter(inputs[0])):
                self.moved.update(dict.fromkeys(step.outputs, name))

    def parameter(self, ref: Reference) -> str | None:
        """The parameter that an input is, or is a view of."""
        return self.moved.get(ref) if isinstance(ref, int) else ref

    def has_channels(self, ref: Reference) -> bool:
        """Whether an input is an activation with channels, and no parameter."""
        return ref in self.makers and self.makers[ref].labelled and ref not in self.moved

    def uses(self, tensor: Reference) -> list[Step]:
        """The steps that use a tensor, as it is or a view of it."""
        found = []
        for step in self.readers.get(tensor, ()):
            views = [i for i in step.outputs if i in self.moved and step.inputs[0] == tensor]
            found += [use for view in views for use in self.uses(view)] if views else [step]
        return found

    def used_once(self, tensor: str, step: Step) -> bool:
        """Whether one step only uses a tensor in the forward (eval or train) of `step`; none uses a bias given since."""
        return sum(s.training == step.training for s in self.uses(tensor)) <= 1

    def shared(self, weight: str) -> bool:
        """Whether anything but one layer uses a weight. One that runs several times is one layer."""
        return len({self.returning(s) if (layer := self.layer(s)) and layer.weight == weight else None
                    for s in self.uses(weight)}) > 1

    def fixed(self, layer: Layer) -> bool:
        """Whether the weight of a layer is a buffer: nothing is merged into it, as its values may be in no state dict."""
        return layer.weight not in self.graph.parameters

    def returning(self, step: Step) -> str:
        """The module that returns the output of a step, as it is or in another shape ("" if none does)."""
        views = (s.module for s in self.readers.get(step.outputs[0], ()) if s.name in ("view", "_unsafe_view"))
        return step.module or next(filter(None, views), "")

    def layer(self, step: Step) -> Layer | None:
        """The convolution or linear layer that a step is. None if it is neither, or its weight is computed."""
        if step.name == "convolution" and isinstance(step.inputs[1], str):
            weight, shape = step.inputs[1], self.graph.shapes[step.inputs[1]]
            _, padding, _, transposed, _, blocks = step.rest[-6:]
            depthwise = blocks > 1 and (shape[0] == blocks if transposed else shape[1] == 1)
            return Layer(weight, self.bias(weight, step.inputs[2]), step.module, blocks, transposed,
                         transposed or any(padding), depthwise)
        if row_of(step.name).layer == "linear" and not step.options:
            *given, x, matrix = step.inputs
            name = matrix if isinstance(matrix, str) else self.transposed(matrix)
            if name is not None and isinstance(x, int) and x not in self.moved and self.is_bias(*given):
                return Layer(name, self.bias(name, *given), step.module, transposed=name == matrix)
        return None

    def is_bias(self, given: Reference = None) -> bool:
        """Whether a summand that is a parameter has one number for each output."""
        return not isinstance(given, str) or len(self.graph.shapes[given]) == 1

    def transposed(self, matrix: Reference) -> str | None:
        """The parameter of which a matrix is the transpose. None for other factors: a part of a parameter is no weight."""
        maker = self.makers.get(matrix)
        weight = maker.inputs[0] if maker is not None and maker.name in TRANSPOSES else None
        return weight if isinstance(weight, str) and len(self.graph.shapes[weight]) == 2 else None

    def bias(self, weight: str, given: Reference = None) -> str | None:
        """The bias of a layer: the one that the trace saw, or one that the layer was given since."""
        created = bias_name(weight) if bias_name(weight) in self.graph.created else None
        return given if isinstance(given, str) else created

    def producer(self, step: Step, layer: Layer | None) -> Producer | Obstacle:
        """The producer that ends with a step: a `layer`, or (None) a BatchNorm."""
        norm = None
        if layer is None:
            norm, layer = self.norm(step), self.layer_before(step)
            if norm is None:
                return Obstacle("a norm without scale and shift of its own")
        elif self.fixed(layer):
            return Obstacle(f"{layer.weight} is a buffer, which no training changes")
        elif self.shared(layer.weight):
            return Obstacle(f"{layer.weight} is shared by several layers")
        elif step.name != "convolution" and not (layer.weight.endswith("weight") and (layer.bias or step.name == "mm")):
            return Obstacle(f"{layer.weight} is not the weight of a plain linear layer")
        module = self.returning(step)
        if not module:
            return Obstacle(f"no module returns the output of {norm if layer is None else layer.weight}")
        return Producer(module, layer, norm)

    def norm(self, step: Step) -> str | None:
        """The module of a BatchNorm's scale, shift and statistics. InstanceNorm repeats the first two for each image."""
        repeats = [self.makers.get(i, step) for i in step.inputs[1:3]]
        scale, shift = (m.inputs[0] if m.name == "repeat" else i for i, m in zip(step.inputs[1:3], repeats, strict=True))
        owners = {t.rpartition(".")[0] for t in (scale, shift, *step.inputs[3:5]) if isinstance(t, str)}
        return owners.pop() if isinstance(scale, str) and isinstance(shift, str) and len(owners) == 1 else None

    def layer_before(self, step: Step) -> Layer | None:
        """The layer that a BatchNorm reads, if only this BatchNorm reads it and its weight is used once."""
        x = step.inputs[0]
        layer = self.layer(self.makers[x]) if x in self.makers and len(self.readers[x]) == 1 else None
        return layer if layer and self.used_once(layer.weight, step) else None

    def reader(self, step: Step, layer: Layer, takes_bias: Callable[[str], bool]) -> Reader | Obstacle | Depthwise:
        """Where a layer can take a constant channel, or why it cannot. `takes_bias`: whether the layer with a weight can be
        given a bias."""
        weight, bias, blocks = layer.weight, layer.bias, layer.blocks
        if layer.depthwise:
            return Depthwise(weight)
        if layer.padded:
            return Obstacle(f"{weight} reads them between zeros")
        if not self.used_once(weight, step):
            return Obstacle(f"{weight} is used more than once")
        if bias is not None and not self.used_once(bias, step):
            return Obstacle(f"{bias} is used more than once")
        if bias is not None:
            return Reader(weight, bias, blocks, transposed=layer.transposed)
        behind = self.readers.get(step.outputs[0], ())
        mean = behind[0].inputs[3] if len(behind) == 1 and row_of(behind[0].name).layer == "batch norm" else None
        if isinstance(mean, str) and self.used_once(mean, step):
            return Reader(weight, mean, blocks, "running mean", layer.transposed)
        if takes_bias(weight):
            return Reader(weight, bias_name(weight), blocks, "new bias", layer.transposed)
        return Obstacle(f"the layer of {weight} has neither a bias nor a BatchNorm behind it")


def bias_name(weight: str) -> str:
    """The name of the bias that belongs to a weight."""
    return f"{weight.removesuffix('weight')}bias"
