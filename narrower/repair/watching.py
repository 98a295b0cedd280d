"""Watch the layers of a forward that read given weights, and the sums that their outputs go into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..surgery.walk import named_tensors
from ..tracing.interpreter import run_forward
from ..tracing.operators.call_counter import CallCounter
from ..tracing.operators.interface import Call, tensors_in
from .patches import Geometry

ORIGIN = "_narrower_origin"  # the attribute of an activation


class Origin(NamedTuple):
    """The number of the call that made an activation. `weight`: the layer whose output it is, as it is or behind the BatchNorm
    `norm`."""

    call: int
    weight: str | None = None
    norm: str | None = None


class Stream(NamedTuple):
    """A sum that a layer's output goes into, directly or through a BatchNorm: the module of the BatchNorm (None without), the
    number of the call that makes the other summand, and the number of the addition."""

    norm: str | None
    other: int
    addition: int


class LayerCall(NamedTuple):
    """One call of a layer: its weight's name, its input `(N, C, *space)`, its bias `(O,)`, its geometry, and what runs it."""

    weight: str
    x: Tensor
    bias: Tensor | None
    geometry: Geometry
    run: Callable[[], Tensor]


def input_and_weight(name: str, args: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
    """What a call multiplies, if the operator is that of a convolution or linear layer."""
    if name == "convolution":
        return args[0], args[1]
    if name in ("mm", "addmm"):
        x, matrix = tensors_in(args)[-2:]
        return x, matrix
    return None


class LayerWatch(TorchDispatchMode):
    """A forward of `model` in which `layer` is called for each layer that reads one of `weights` as it is.

    The output of `layer` goes on. `finished` sees the output of every call, by its number. Layers whose weight is used more
    than once in a forward are counted in `uses`.
    """

    def __init__(self, model: nn.Module, weights: Iterable[str]) -> None:
        super().__init__()
        named = named_tensors(model)
        self.model, self.held = model, list(named.values())
        self.by_memory = {named[n].untyped_storage()._cdata: n for n in weights}
        self.norms = {id(t): n.rpartition(".")[0] for n, t in named.items()}
        self.begin(0)

    def begin(self, images: int) -> None:
        """A forward of so many images starts."""
        self.images, self.counter = images, CallCounter(self.held)
        self.uses: Counter[str] = Counter()
        self.streams: dict[str, Stream] = {}

    def run(self, inputs: Any, images: int) -> Any:
        """The model's output."""
        self.begin(images)
        return run_forward(self.model, inputs, self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = self.counter.count(func, args, kwargs)
        found = self.layer_call(func, call)
        if found is None:
            origin = self.origin(call)
            out = func(*args, **(kwargs or {}))
        else:
            self.uses[found.weight] += 1
            origin = Origin(call.place, found.weight)
            out = self.layer(found)
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        if isinstance(first, Tensor):
            setattr(first, ORIGIN, origin)
            self.finished(call.place, first)
        return out

    def layer_call(self, func: Any, call: Call) -> LayerCall | None:
        """The layer that a call is, if it reads one of the weights."""
        args, factors = call.args, input_and_weight(call.name, call.args)
        weight = self.by_memory.get(factors[1].untyped_storage()._cdata) if factors is not None else None
        if factors is None or weight is None:
            return None
        x, matrix = factors
        bias = args[2] if call.name == "convolution" else args[0] if call.name == "addmm" else None
        if bias is not None and (bias.ndim != 1 or call.kwargs):
            return None  # a sum of matrices, or scaled: no plain layer

        def run() -> Tensor:
            out: Tensor = func(*args, **call.kwargs)
            return out

        if call.name != "convolution":
            return LayerCall(weight, x, bias, Geometry(), run)
        _, _, _, stride, padding, dilation, transposed, _, groups = args
        n = x.ndim - 2
        wide = [tuple(v) * (n if len(v) == 1 else 1) for v in (stride, padding, dilation)]
        geometry = Geometry(tuple(matrix.shape[2:]), wide[0], wide[1], wide[2], transposed, groups)
        return LayerCall(weight, x, bias, geometry, run)

    def origin(self, call: Call) -> Origin:
        """Where the output of a call comes from; notes the sums that layers go into."""
        args = call.args
        first, second = ((*(getattr(a, ORIGIN, None) for a in args[:2]), None, None))[:2]
        if "batch_norm" in call.name and first is not None and first.norm is None:
            return Origin(call.place, first.weight, self.norms.get(id(args[1])))
        if call.name == "add" and first and second and args[0].shape == args[1].shape and not call.kwargs:
            for mine, other in ((first, second), (second, first)):
                if mine.weight is not None:
                    self.streams[mine.weight] = Stream(mine.norm, other.call, call.place)
        return Origin(call.place)

    def layer(self, call: LayerCall) -> Tensor:
        """The output of a layer."""
        return call.run()

    def finished(self, number: int, out: Tensor) -> None:
        """A call is over."""
