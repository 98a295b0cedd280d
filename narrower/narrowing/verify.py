"""verify: check that the narrow network computes what the dense one does without the removed channels."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import VerifyError, first_line
from ..graph.selection import Kept
from ..graph.types import Mixer, Product
from ..inputs import advice, device_of, flatten_tensors, has_float64, map_tensors, ordinary
from ..planning.plan import Plan
from ..preconditions import check_number, checked
from ..surgery.copying import duplicate, same_tensors, where_float64_is
from ..surgery.masking import removed_inputs
from ..surgery.walk import named_tensors, outer_modes_off
from ..tracing.interpreter import run_forward
from ..tracing.operators.call_counter import CallCounter
from ..tracing.operators.interface import Call, address, tensors_in


class Verification(NamedTuple):
    """`error`: the largest relative difference of the outputs (see `largest_difference`). `tolerance`: what was allowed."""

    error: float
    tolerance: float
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"narrow = masked dense to {self.error:.1e} of the output ({self.dtype}, tolerance {self.tolerance:.0e})"


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


@checked
@outer_modes_off()
def verify(model: nn.Module, small: nn.Module, plan: Plan, example_inputs: Any, *,
           dtype: torch.dtype | None = torch.float64, tolerance: float | None = None) -> Verification:
    """Compare the outputs of `small` with those of the masked dense network, in eval mode.

    The masked dense network is `model` with every weight that reads a removed channel set to zero. Layers that mix channels
    see only the surviving ones. `dtype`: of the computation; None takes the model's own. `tolerance`: relative to the variation
    of the outputs over the batch. It is relative to the largest output if there is only one sample, or if the difference is
    float64 rounding. Of outputs that are whole numbers or masks, this share of the entries may differ.

    Raises VerifyError if the outputs differ by more, have other shapes, are not finite, or are no numbers at all. Also if
    rounding alone could cause the difference: these inputs then decide nothing. Raises ConfigError for a negative tolerance.
    """
    if tolerance is not None:
        check_number("tolerance", tolerance, 0)
    kept = Kept(plan.graph, plan.keep)
    kind = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    limit = TOLERANCE.get(kind, 1e-3) if tolerance is None else tolerance
    same_tensors(model, plan.graph)
    if kind == torch.float64:
        model, small = where_float64_is(model), where_float64_is(small)
    inputs = map_tensors(example_inputs, partial(as_input, kind=kind, device=device_of(model)))
    reference = in_precision(mask_consumers(model, kept), kind)
    memo = {id(t): t.detach().clone() for t in small.buffers()}
    candidate = in_precision(duplicate(small, memo), kind)
    outs = []
    modes: list[tuple[str, nn.Module, AbstractContextManager[Any]]] = [
        ("dense", reference, Survivors(kept, named_tensors(reference).values())), ("narrow", candidate, nullcontext())]
    for what, net, mode in modes:
        try:
            with Apart(model, small):
                outs.append(flatten_tensors(run_forward(net, inputs, mode)))
        except VerifyError:
            raise
        except Exception as e:
            own = "" if dtype is None else f" (it ran in {kind}: dtype=None takes the model's own)"
            raise VerifyError(f"the {what} network fails on these inputs: {first_line(e)}{own}"
                              f"{advice(example_inputs)}") from e
    want, have = outs
    if [t.shape for t in want] != [t.shape for t in have]:
        raise VerifyError(f"the narrow network's outputs have shapes {[tuple(t.shape) for t in have]}, "
                          f"the dense one's {[tuple(t.shape) for t in want]}")
    worst = largest_difference(want, have)
    if worst <= limit:
        return Verification(worst, limit, kind)
    eps = torch.finfo(kind).eps
    shaken = map_tensors(inputs, lambda t: t * (1 + eps * torch.randn_like(t)) if t.is_floating_point() else t)
    again = run_forward(reference, shaken, Survivors(kept, named_tensors(reference).values()))
    noise = largest_difference(want, flatten_tensors(again))
    if noise > limit / 100:
        raise VerifyError(f"on these inputs it cannot be told: the networks differ by {worst:.1e} of the output, but the dense "
                          f"one alone by {noise:.1e} when its inputs are rounded otherwise: give verify inputs as the network "
                          "was trained on")
    raise VerifyError(f"the narrow network differs from the masked dense one by {worst:.1e} of the output (tolerance "
                      f"{limit:.0e} in {kind}): it was changed after narrowing, or its forward branches on the number of "
                      "channels (as by `if x.shape[1] > 64`: the trace tries moderate widths only), or narrower is at fault: "
                      "please report it")


ROUNDING = 2e-13  # of the largest output, in float64


def largest_difference(want: Sequence[Tensor], have: Sequence[Tensor]) -> float:
    """The largest difference, divided by the variation of the outputs over the batch.

    Divided by the largest output instead if the outputs do not vary, or if the difference is float64 rounding. Of outputs that
    are whole numbers or masks, the share of entries that differ.
    """
    worst, pairs = 0.0, [(a.reshape(-1) if a.ndim == 0 else a, b) for a, b in zip(want, have, strict=True) if a.numel()]
    if not pairs:
        raise VerifyError(f"there is nothing to compare: on these inputs the networks return "
                          f"{f'{len(want)} empty tensors' if want else 'no tensors'}: give verify inputs for which they do")
    for a, b in pairs:
        if not (a.is_floating_point() or a.is_complex()):
            worst = max(worst, float((a != b).double().mean()))
            continue
        if not bool(a.isfinite().all()):
            raise VerifyError("the dense network's output is not finite on these inputs: give verify others")
        gap, largest = float((a - b).abs().max()), float(a.abs().max()) or 1.0
        spread = float((a - a[:1]).abs().max())
        alike = spread < 1e-7 * largest
        if alike and len(a) > 1:
            warnings.warn("verify: the output hardly depends on these inputs, which proves little: the network is "
                          "untrained or the inputs are alike", stacklevel=5)
        rounding = a.dtype == torch.float64 and gap <= ROUNDING * largest
        worst = max(worst, gap / (largest if alike or rounding else spread)) if gap == gap else gap
    return worst


def as_input(t: Tensor, kind: torch.dtype, device: torch.device) -> Tensor:
    """A tensor for a model of that floating dtype, on its device if its own has no float64."""
    return cast(ordinary(t).detach() if has_float64(t.device) else t.detach().to(device), kind)


def in_precision(model: nn.Module, kind: torch.dtype) -> nn.Module:
    """The model, whose tensors are cast in place, in eval mode."""
    return model._apply(partial(cast, kind=kind)).eval()  # .to(kind) would drop imaginary parts


def cast(t: Tensor, kind: torch.dtype) -> Tensor:
    """A tensor in a floating dtype, or the complex one of that precision. Whole numbers and masks stay."""
    if t.is_complex():
        return t.to(torch.complex128 if kind == torch.float64 else torch.complex64)
    return t.to(kind) if t.is_floating_point() else t


def mask_consumers(model: nn.Module, kept: Kept) -> nn.Module:
    """A copy of the dense model in which no weight reads a removed channel."""
    copy = duplicate(model, {})
    tensors = named_tensors(copy)
    for (name, _), gone in removed_inputs(tensors, kept).items():
        tensors[name].data.masked_fill_(gone, 0)
    return copy


class Apart(TorchDispatchMode):
    """Raises if a forward reads a parameter or buffer of `originals`: that of a copy has its own."""

    def __init__(self, *originals: nn.Module) -> None:
        super().__init__()
        self.owners = {address(t): name for model in originals for name, t in named_tensors(model).items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in tensors_in((*args, *(kwargs or {}).values())):
            if name := self.owners.get(address(t)):
                raise VerifyError(f"a copy of the network reads {name} of the original: some object that is not copied with it "
                                  "holds the original module or its forward. Keep what is called as modules of the model")
        return func(*args, **(kwargs or {}))


class Survivors(TorchDispatchMode):
    """Runs calls that mix channels on the surviving channels only, and fills the other channels with zeros."""

    def __init__(self, kept: Kept, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.kept, graph = kept, kept.graph
        self.mixers: dict[tuple[str, int], Mixer] = {(m.operator, m.number): m for m in graph.mixers}
        self.products: dict[int, Product] = {p.number: p for p in graph.products}
        self.unread = {number: np.nonzero(~kept.axis_mask(*axis).reshape(-1))[0] for number, axis in graph.computed.items()}
        self.counter = CallCounter(held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, self.counter.count(func, args, kwargs))

    def changes(self, call: Call) -> bool:
        """Whether a call of the dense forward gives something else without the removed channels, whatever it reads."""
        if (product := self.products.get(call.product)) is not None:
            return not self.kept.mask_along(product.members, int(np.prod(product.shape))).all()
        if (mixer := self.mixers.get((call.name, call.number))) is not None:
            return not self.kept.mask_along(mixer.members, mixer.size).all()
        return call.name == "convolution" and len(self.unread.get(call.number, ())) > 0

    def run(self, func: Any, call: Call) -> Any:
        """The output of a call."""
        args: Any = call.args
        if call.name == "convolution" and call.number in self.unread:
            # Its weight is computed from a masked one and may no longer be zero there. So its input is masked.
            gone = torch.as_tensor(self.unread[call.number], device=args[0].device)
            args = (args[0].index_fill(1, gone, 0), *args[1:])
        product = self.products.get(call.product)
        if product is not None:
            first = len(tensors_in(args)) - 2  # addmm and baddbmm have a summand before the factors
            args = (*args[:first], args[first] * self.left(product, args[first]), *args[first + 1:])
        mixer = self.mixers.get((call.name, call.number))
        if mixer is None or len(stays := self.stays(mixer, args[0])) == args[0].shape[mixer.dim]:
            return func(*args, **call.kwargs)
        x, restrict = args[0], call.operator.restrict_args
        args = restrict(args, mixer.dim, stays) if restrict else [x.index_select(mixer.dim, stays), *args[1:]]
        out = func(*args, **call.kwargs)
        if isinstance(out, Tensor):
            return scatter(out, x, mixer.dim, stays)
        return (scatter(out[0], x, mixer.dim, stays), *out[1:])

    def left(self, product: Product, x: Tensor) -> Tensor:
        """A mask for the first factor `x`: one where a channel stays, zero where it is removed."""
        stays = self.kept.mask_along(product.members, int(np.prod(product.shape))).reshape(product.shape)
        if len(stays) > 1:  # images * heads: the batch may be larger than the traced one
            stays = stays[np.arange(len(x)) % len(stays)]
        return torch.as_tensor(stays, dtype=x.dtype, device=x.device)

    def stays(self, mixer: Mixer, x: Tensor) -> Tensor:
        """The indices of the surviving channels along the mixed dimension of `x`."""
        stays = np.tile(self.kept.mask_along(mixer.members, mixer.size), x.shape[mixer.dim] // mixer.size)
        return torch.as_tensor(np.nonzero(stays)[0], device=x.device)


def scatter(out: Tensor, x: Tensor, dim: int, stays: Tensor) -> Tensor:
    if out.ndim != x.ndim or out.shape[dim] != len(stays):
        return out
    shape = list(out.shape)
    shape[dim] = x.shape[dim]
    return out.new_zeros(shape).index_copy(dim, stays, out)
