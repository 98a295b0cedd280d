"""Watch the layers of a forward that read given weights, and the sums that their outputs go into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..inputs import flatten_tensors, map_tensors
from ..surgery.walk import named_tensors
from ..tracing.interpreter import run_forward
from ..tracing.operators.call_counter import CallCounter
from ..tracing.operators.interface import Call, Operator, address, tensors_in
from .patches import Geometry

CHUNK = 1 << 20  # numbers that a convolution reads at once on the CPU, so that its memory is reused
LARGER = 6  # on a GPU 2^6 times as many: fewer would not keep it busy
IN_PLACE = frozenset({"add", "mul", "relu", "hardtanh", "silu", "hardswish", "clamp"})
"""Operators that can write into their first operand."""
BATCH_NORMS = {"native_batch_norm": 3, "cudnn_batch_norm": 4, "miopen_batch_norm": 3}
"""The operators of BatchNorm on the CPU and on GPUs, and how many outputs they have."""
FRESH = IN_PLACE | BATCH_NORMS.keys() | {"convolution", "constant_pad_nd"}
"""Operators whose output has memory of its own."""
ORIGIN = "_narrower_origin"  # the attribute of an activation


class Origin(NamedTuple):
    """The number of the call that made an activation. `fresh`: whether it has memory of its own. `weight`: the layer whose
    output it is, as it is or behind the BatchNorm `norm`."""

    call: int
    fresh: bool
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


def input_and_weight(operator: Operator, args: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
    """What a call multiplies, if the operator is that of a convolution or linear layer."""
    if operator.layer == "convolution":
        return args[0], args[1]
    if operator.layer == "linear":
        x, matrix = tensors_in(args)[-2:]
        return x, matrix
    return None


def run_in_chunks(func: Any, call: Call) -> Any:
    """The output of a call. A convolution takes a few images at a time: its workspace stays small, and its memory is reused."""
    args = call.args
    if call.name != "convolution":
        return func(*args, **call.kwargs)
    chunk = CHUNK if args[0].device.type == "cpu" else CHUNK << LARGER
    if args[0].numel() <= chunk:
        return func(*args, **call.kwargs)
    size = max(1, chunk * len(args[0]) // args[0].numel())
    out: Tensor | None = None
    for start in range(0, len(args[0]), size):
        part = func(args[0][start: start + size], *args[1:], **call.kwargs)
        if out is None:
            out = part.new_empty((len(args[0]), *part.shape[1:]))
        out[start: start + size] = part
    return out


def in_place(call: Call) -> Any:
    """The output of a call, written into its first operand. None where that is not possible."""
    x, others = call.args[0], list(tensors_in(call.args[1:]))
    if call.name in IN_PLACE and all(t.shape == x.shape and t.dtype == x.dtype for t in others):
        return getattr(torch.ops.aten, f"{call.name}_")(*call.args, **call.kwargs)
    exact = x.dtype in (torch.float32, torch.float64)  # in half precision two steps would round twice, the kernel once
    if call.name in BATCH_NORMS and exact and len(others) == 4 and not call.args[5]:
        _, scale, shift, mean, variance, _, _, eps = call.args
        factor = scale / torch.sqrt(variance + eps)
        wide = (1, -1, *(1,) * (x.ndim - 2))
        x.mul_(factor.view(wide)).add_((shift - mean * factor).view(wide))
        return x, *(x.new_empty(0) for _ in range(BATCH_NORMS[call.name] - 1))
    return None


class LayerWatch(TorchDispatchMode):
    """A forward of `model` in which `layer` is called for each layer that reads one of `weights` as it is.

    Layers are told apart by the memory of their weights: no two of them may share it. Complex weights are passed over, as least
    squares here are real. The output of `layer` goes on. `finished` sees the output of every call, by its number. Layers whose
    weight is used more than once in a forward are counted in `uses`.
    `once`: calls whose output only one other call reads, as another forward has shown (`read_once`): that call may overwrite
    it. Fresh memory for all images takes longer than most arithmetic.
    """

    once: frozenset[int] = frozenset()

    def __init__(self, model: nn.Module, weights: Iterable[str]) -> None:
        super().__init__()
        named = named_tensors(model)
        self.model, self.held, self.tensors = model, list(named.values()), named
        self.by_memory = {address(named[n]): n for n in weights if not named[n].is_complex()}
        self.norms = {id(t): n.rpartition(".")[0] for n, t in named.items()}
        self.begin(0)

    def begin(self, images: int) -> None:
        """A forward of so many images starts."""
        self.images, self.counter = images, CallCounter(self.held)
        self.uses: Counter[str] = Counter()
        self.streams: dict[str, Stream] = {}
        self.reads: Counter[int] = Counter()

    def run(self, inputs: Any, images: int) -> Any:
        """The model's output."""
        self.begin(images)
        out = run_forward(self.model, map_tensors(inputs, torch.clone), self)  # the forward may write into its inputs
        self.note_reads(flatten_tensors(out), 2)
        return out

    def note_reads(self, tensors: Iterable[Tensor], times: int = 1) -> None:
        """The outputs of some calls are read."""
        for t in tensors:
            origin = getattr(t, ORIGIN, None)
            if origin is not None:
                self.reads[origin.call] += times

    def read_once(self) -> frozenset[int]:
        """The calls of the last forward whose output was read by one call, and is no output of the model."""
        return frozenset(call for call, times in self.reads.items() if times == 1)

    def overwritable(self, call: Call) -> bool:
        """Whether a call may write into its first operand: fresh memory that nothing else reads."""
        origin = getattr(call.args[0], ORIGIN, None) if call.args else None
        return origin is not None and origin.fresh and origin.call in self.once

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = self.counter.count(func, args, kwargs)
        self.note_reads(tensors_in(args))
        found = self.layer_call(func, call)
        if found is None:
            origin = self.origin(call)
            out = in_place(call) if self.overwritable(call) else None
            out = run_in_chunks(func, call) if out is None else out
        else:
            self.uses[found.weight] += 1
            origin = Origin(call.place, True, found.weight)
            out = self.layer(found)
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        if isinstance(first, Tensor):
            written = func._schema.name.endswith("_")  # in place: views of it may be read
            setattr(first, ORIGIN, origin._replace(fresh=False) if written else origin)
            self.finished(call.place, first)
        return out

    def layer_call(self, func: Any, call: Call) -> LayerCall | None:
        """The layer that a call is, if it reads one of the weights."""
        args, factors = call.args, input_and_weight(call.operator, call.args)
        weight = self.by_memory.get(address(factors[1])) if factors is not None else None
        if factors is None or weight is None:
            return None
        x, matrix = factors
        bias = args[2] if call.name == "convolution" else args[0] if call.name == "addmm" else None
        if bias is not None and (bias.ndim != 1 or call.kwargs):
            return None  # a sum of matrices, or scaled: no plain layer

        def run() -> Tensor:
            return run_in_chunks(func, call)

        stored = self.tensors[weight]
        whole = stored if call.name == "convolution" else stored.T if stored.ndim == 2 else None
        if whole is None or (matrix.shape, matrix.stride()) != (whole.shape, whole.stride()):
            return None  # a part of the weight, or another view
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
        if call.operator.layer == "batch norm" and first is not None and first.norm is None:
            norm = self.norms.get(id(args[1]))
            fixed = norm is not None and isinstance(args[3], Tensor) and not args[5]  # else it is no known scale and shift
            return Origin(call.place, True, first.weight, norm) if fixed else Origin(call.place, True)
        if call.name == "add" and first and second and args[0].shape == args[1].shape and not call.kwargs:
            for mine, other in ((first, second), (second, first)):
                if mine.weight is not None:
                    self.streams[mine.weight] = Stream(mine.norm, other.call, call.place)
        return Origin(call.place, call.name in FRESH)

    def layer(self, call: LayerCall) -> Tensor:
        """The output of a layer."""
        return call.run()

    def finished(self, number: int, out: Tensor) -> None:
        """A call is over."""
