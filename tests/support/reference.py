"""Is a narrow network the dense one without some of its channels? A check that uses no code of the narrowing.

By index coding: every float of a copy of the model is overwritten with its own flat index, the copy is narrowed, and
what survives tells which original element it was. Two networks then get random weights in float64: the narrow one the
surviving elements, the dense one the same elements and zero for all others. Their outputs must agree to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import narrower
from support.networks import IMAGES

EXACT = 1e-9  # of the output's spread over the batch


class Dull(AssertionError):
    """The outputs of this network are the same for all inputs, whatever its weights."""


def float_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and float buffers, tied ones under each of their names."""
    both = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {n: t for n, t in both if t.is_floating_point()}


def flat(out: Any) -> list[Tensor]:
    """The tensors of nested outputs."""
    if isinstance(out, Tensor):
        return [out]
    return [t for o in (out.values() if isinstance(out, dict) else out) for t in flat(o)]


def call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def doubled(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, dict):
        return {k: doubled(v) for k, v in x.items()}
    return tuple(doubled(v) for v in x)


def macs(model: nn.Module, inputs: Any) -> float:
    """Multiply-adds of convolutions and linear layers for one sample, counted by forward hooks."""
    total = 0

    def count(m: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        total += (args[0] if getattr(m, "transposed", False) else out).numel() * m.weight[0].numel()

    handles = [m.register_forward_hook(count) for m in model.modules()
               if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))]
    training = {m: m.training for m in model.modules()}
    with torch.no_grad():
        call(model.eval(), inputs)
    for m, mode in training.items():
        m.training = mode
    for h in handles:
        h.remove()
    return total / flat(inputs)[0].shape[0]


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------------------------------------ what survives


def coded(model: nn.Module) -> nn.Module:
    """A float64 copy in which every float is its own flat index."""
    out = copy.deepcopy(model).double()
    for t in float_tensors(out).values():
        t.data.copy_(torch.arange(t.numel(), dtype=torch.float64).view(t.shape))
    return out


def survivors(small: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """For every tensor of a narrowed `coded(model)` the flat indices of its elements in the original."""
    dense, out = float_tensors(model), {}
    for name, t in float_tensors(small).items():
        index = t.detach().long()
        assert name in dense, f"{name} is not in the dense network"
        assert torch.equal(index.double(), t.detach()), f"{name}: not a selection of elements"
        assert not index.numel() or 0 <= index.min() <= index.max() < dense[name].numel(), f"{name}: not a selection"
        assert index.unique().numel() == index.numel(), f"{name}: elements repeated"
        out[name] = index
    assert out.keys() == dense.keys()
    return out


def rows(index: Tensor, shape: torch.Size) -> Tensor:
    """The rows (dimension 0) of the original that a narrow tensor keeps."""
    inner = max(1, shape[1:].numel())
    row = (index // inner).reshape(len(index), -1)
    assert bool((row == row[:, :1]).all()), "a narrow row mixes rows"
    return row[:, 0]


# ------------------------------------------------------------------------------------------------ two networks


def random_values(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random float64 values for every tensor: signals keep their scale, no branch is dead."""
    g = torch.Generator().manual_seed(seed)
    first: dict[int, str] = {}
    out: dict[str, Tensor] = {}
    for name, t in float_tensors(model).items():
        twin = first.setdefault(id(t), name)
        if twin != name:
            out[name] = out[twin]
            continue
        v = torch.randn(t.shape, generator=g, dtype=torch.float64)
        if name.endswith("running_var"):
            v = 0.5 + v.abs()
        elif name.endswith(("running_mean", "bias")):
            v = 0.3 * v
        elif t.ndim > 1 and t.numel() > t.shape[0]:
            v = v * 1.6 / (t.numel() / t.shape[0]) ** 0.5
        else:
            v = v.sign() * (0.5 + torch.rand(t.shape, generator=g, dtype=torch.float64))
        out[name] = v
    return out


def on_survivors(inner: nn.Module, kept: Tensor, dim: int) -> Callable[[Tensor], Tensor]:
    """`inner` (a layer that mixes channels, narrow) on the surviving channels, zeros elsewhere."""

    def forward(x: Tensor) -> Tensor:
        y = inner(x.index_select(dim, kept))
        if y.shape[dim] != len(kept):
            return y
        shape = list(y.shape)
        shape[dim] = x.shape[dim]
        return y.new_zeros(shape).index_copy(dim, kept, y)

    return forward


def mask_mixers(masked: nn.Module, small: nn.Module, index: Mapping[str, Tensor], mixers: Mapping[str, str]) -> None:
    """Norms over channels, and the modules named in `mixers` (with the tensor whose rows are their channels), see the
    survivors only."""
    dense = float_tensors(masked)
    for name, m in masked.named_modules():
        tensor = mixers.get(name)
        if isinstance(m, (nn.GroupNorm, nn.LayerNorm)):
            tensor = f"{name}.weight"
        if tensor is None:
            continue
        kept = rows(index[tensor], dense[tensor].shape)
        if isinstance(m, nn.GroupNorm):
            group = (kept // (m.num_channels // m.num_groups)).reshape(m.num_groups, -1)
            assert bool((group == group[:, :1]).all()), f"{name}: channels have changed their group"
        dim = -len(m.normalized_shape) if isinstance(m, nn.LayerNorm) else 1
        m.forward = on_survivors(small.get_submodule(name), kept, dim)


@torch.no_grad()
def difference(model: nn.Module, narrow: Callable[[nn.Module], nn.Module], inputs: Any,
               mixers: Mapping[str, str] | None = None) -> float:
    """Largest difference between the narrow and the masked network, relative to the spread of the output over the batch."""
    inputs = doubled(inputs)
    small = narrow(coded(model)).eval()
    index = survivors(small, model)
    mirrors(small)
    for seed in range(4):  # any values will do: take some with which the output depends on the input
        masked = copy.deepcopy(model).double().eval()
        values = random_values(model, seed)
        for name, t in float_tensors(small).items():
            t.data = values[name].flatten()[index[name]]
        for name, t in float_tensors(masked).items():
            full = (torch.ones if name.endswith("running_var") else torch.zeros)(t.numel(), dtype=torch.float64)
            at = index[name].flatten()
            full[at] = values[name].flatten()[at]
            t.data = full.view(t.shape)
        mask_mixers(masked, small, index, mixers or {})
        want, have = flat(call(masked, inputs)), flat(call(small, inputs))
        assert [t.shape for t in want] == [t.shape for t in have], "the outputs have other shapes"
        spread = [float((t - t[:1]).abs().max()) for t in want]
        if all(s > 1e-5 * float(t.abs().max()) for s, t in zip(spread, want, strict=True)):
            break
    else:
        raise Dull("the reference's output hardly depends on the input: this network tests nothing")
    errors = [float((a - b).abs().max()) / s for a, b, s in zip(want, have, spread, strict=True)]
    assert all(e == e for e in errors), "not finite"
    return max(errors)


def mirrors(small: nn.Module) -> None:
    """The attributes that repeat the shapes of tensors: a layer made from them has just these shapes."""
    for name, m in small.named_modules():
        twin: nn.Module | None = None
        if isinstance(m, nn.modules.conv._ConvNd):
            kind: Any = type(m)
            twin = kind(m.in_channels, m.out_channels, m.kernel_size, groups=m.groups, bias=m.bias is not None)
        elif type(m) is nn.Linear:
            twin = nn.Linear(m.in_features, m.out_features, m.bias is not None)
        elif isinstance(m, nn.modules.batchnorm._BatchNorm):
            twin = type(m)(m.num_features, affine=m.affine, track_running_stats=m.track_running_stats)
        elif isinstance(m, nn.GroupNorm):
            twin = nn.GroupNorm(m.num_groups, m.num_channels, affine=m.affine)
        elif isinstance(m, nn.LayerNorm):
            twin = nn.LayerNorm(m.normalized_shape, elementwise_affine=m.elementwise_affine)
        elif isinstance(m, nn.PReLU):
            twin = nn.PReLU(m.num_parameters)
        if twin is not None:
            want = {n: t.shape for n, t in twin.named_parameters()}
            assert want == {n: t.shape for n, t in m.named_parameters(recurse=False)}, f"{name}: {m} does not fit its tensors"


def exact(model: nn.Module, plan: narrower.Plan, inputs: Any, mixers: Mapping[str, str] | None = None) -> None:
    """AssertionError unless `narrow` gives the dense network with the channels of `plan` removed."""
    error = difference(model, lambda m: narrower.narrow(m, plan), inputs, mixers)
    assert error < EXACT, f"narrow and masked networks differ by {error:.1e}"


def halved(model: nn.Module, inputs: Any, seed: int = 0, remove: float = 0.5, **options: Any) -> narrower.Plan:
    """A random plan that takes a fraction of every free group."""
    graph = narrower.trace(model, inputs, **options)
    return narrower.plan(graph, narrower.random(graph, seed=seed), remove=remove)


def pair(model: nn.Module, inputs: Any = IMAGES, **options: Any) -> tuple[Any, narrower.Plan]:
    """A narrow network and its plan, see `halved`."""
    plan = halved(model, inputs, **options)
    return narrower.narrow(model, plan), plan


def state(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that narrowing must not touch."""
    tensors = {n: (id(t), t.clone()) for n, t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items()}
    plain = {n: {k: repr(v) for k, v in m.__dict__.items() if not k.startswith("_") or k == "_forward_hooks"}
             for n, m in model.named_modules()}
    return {"tensors": tensors, "plain": plain}


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a["plain"] == b["plain"] and a["tensors"].keys() == b["tensors"].keys() and all(
        i == j and torch.equal(x, y) for (i, x), (j, y) in zip(a["tensors"].values(), b["tensors"].values(), strict=True))
