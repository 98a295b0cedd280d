"""Rules for operators: ids go where the numbers go, and what a rule cannot follow it pins."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from narrower.tracing.constraints import ConstraintCollector
from narrower.tracing.interpreter import CARRIED
from narrower.tracing.labels import Axes, Carried, Label, along
from narrower.tracing.operators.call_counter import CallCounter
from narrower.tracing.operators.elementwise import elementwise
from narrower.tracing.operators.shapes import infer_output
from narrower.tracing.operators.table import ROWS, TABLE, operator_of

C = 12


def traced(function: Callable[[Tensor], Any], shape: tuple[int, ...] = (2, C, 4, 6),
           free: int = 1) -> tuple[ConstraintCollector, Any]:
    """Run a function on a meta tensor whose channels along `free` have the ids 0..size."""
    axes = Axes()
    axes.ids(("x", free), shape[free])
    trace = ConstraintCollector(nn.Identity(), axes, {})
    x = torch.empty(shape, device="meta")
    setattr(x, CARRIED, Carried((Label(along(np.arange(shape[free]), len(shape), free), free),)))
    with torch.no_grad(), trace:
        return trace, function(x)


def units(trace: ConstraintCollector) -> Callable[[int], int]:
    """Which ids have been united."""
    parent = list(range(trace.axes.total))

    def find(k: int) -> int:
        while parent[k] != k:
            k = parent[k]
        return k

    for a, b in trace.pairs:
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            parent[find(x)] = find(y)
    return find


def pinned(trace: ConstraintCollector) -> set[int]:
    return {int(k) for ids, _ in trace.pins for k in ids}


# ------------------------------------------------------------------------------------------------ movement

SWAP = torch.tensor([1, 0])
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(2, C, 24),
    "flatten": lambda x: x.flatten(1),
    "unflatten": lambda x: x.unflatten(1, (3, 4)),
    "shuffle": lambda x: x.view(2, 3, 4, 4, 6).transpose(1, 2).reshape(2, C, 4, 6),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "permute negative": lambda x: x.permute(0, -2, -1, 1),
    "transpose": lambda x: x.transpose(1, -1),
    "movedim": lambda x: x.movedim(1, 3),
    "t": lambda x: x[0, :, 0].t(),
    "unsqueeze": lambda x: x.unsqueeze(1).unsqueeze(-1),
    "squeeze": lambda x: x[:, :, :1].squeeze(2),
    "expand": lambda x: x.unsqueeze(0).expand(3, -1, -1, -1, -1),
    "slice": lambda x: x[:, 2:7],
    "slice from the end": lambda x: x[:, -5:-1],
    "slice with a step": lambda x: x[:, 1::3],
    "every second": lambda x: x[:, ::2],
    "slice of space": lambda x: x[:, :, ::2, 1:],
    "select a row": lambda x: x[:, :, 2],
    "narrow": lambda x: x.narrow(1, 3, 4),
    "last chunk": lambda x: x.chunk(3, 1)[2],
    "uneven chunk": lambda x: x.chunk(5, 1)[3],
    "split": lambda x: x.split([5, 4, 3], 1)[1],
    "unbound rows": lambda x: x.unbind(2)[1],
    "cat": lambda x: torch.cat([x[:, 4:], x, x[:, :2]], 1),
    "cat in space": lambda x: torch.cat([x, x], 3),
    "cat in the batch": lambda x: torch.cat([x, x, x]),
    "stack": lambda x: torch.stack([x, x], 2),
    "stack in front": lambda x: torch.stack([x, x]),
    "flip": lambda x: x.flip(1, 3),
    "roll": lambda x: x.roll(5, 1),
    "roll of space": lambda x: x.roll((1, 2), (2, 3)),
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "repeat with a new dimension": lambda x: x.repeat(2, 1, 3, 1, 1),
    "repeat interleaved": lambda x: x.repeat_interleave(2, 1),
    "tile": lambda x: x.tile(1, 2, 1, 1),
    "unshuffled pixels": lambda x: F.pixel_unshuffle(x, 2),
    "shuffled pixels": lambda x: F.pixel_shuffle(x, 2),
    "cropped channels": lambda x: F.pad(x, (0, 0, 0, 0, -2, -3)),
    "indexed rows": lambda x: x[:, :, torch.tensor([1, 0, 3])],
    "indexed rows and columns": lambda x: x[:, :, SWAP, SWAP + 2],
    "selected rows": lambda x: x.index_select(2, torch.tensor([1, 1])),
    "windows": lambda x: x.view(2, C, 2, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(12, C, 2, 2),
    "tokens": lambda x: x.flatten(2).transpose(1, 2),
    "heads": lambda x: x.flatten(2).transpose(1, 2).reshape(2, 24, 3, 4).transpose(1, 2),
    "channels in the batch": lambda x: x.reshape(2 * C, 1, 4, 6),
}


def holds(function: Callable[[Tensor], Tensor], shape: tuple[int, ...] = (2, C, 4, 6), free: int = 1) -> None:
    """The label of what comes out, written out, is the same movement of the ids, up to those that were united."""
    trace, out = traced(function, shape, free)
    x = torch.arange(shape[free]).view([-1 if d == free else 1 for d in range(len(shape))]).expand(shape)
    want = function(x.float()).long()
    carried = trace.of(out)
    find = units(trace)
    if not carried.labels:
        gone = {find(int(k)) for k in want.unique()}
        assert len(gone) == 1 or gone <= {find(k) for k in pinned(trace)}, "channels were lost without a pin"
        return
    assert tuple(out.shape) == tuple(want.shape)
    ids = np.broadcast_to(carried.labels[0].ids, tuple(want.shape)).reshape(-1)
    assert [find(int(a)) for a in ids] == [find(int(b)) for b in want.reshape(-1)]


@pytest.mark.parametrize("name", MOVES)
def test_movement_carries_the_ids(name: str) -> None:
    holds(MOVES[name])


@given(st.data())
def test_any_chain_of_movements(data: st.DataObject) -> None:
    """Views, permutations, slices, concatenations in any order, drawn for the shape at hand."""
    steps: list[tuple[str, Any]] = []

    def function(x: Tensor) -> Tensor:
        for kind, a in steps:
            if kind == "view":
                x = x.reshape(a)
            elif kind == "permute":
                x = x.permute(a)
            elif kind == "slice":
                x = x[(slice(None),) * a[0] + (slice(*a[1:]),)]
            elif kind == "cat":
                x = torch.cat([x, x.flip(a)], a)
            elif kind == "flip":
                x = x.flip(a)
            elif kind == "unsqueeze":
                x = x.unsqueeze(a)
        return x

    shape = (2, data.draw(st.sampled_from([4, 6, 8, 12])), data.draw(st.integers(1, 3)), 2)
    for _ in range(data.draw(st.integers(1, 4))):
        now = tuple(function(torch.zeros(shape)).shape)
        kind = data.draw(st.sampled_from(["view", "view", "permute", "slice", "cat", "flip", "unsqueeze"]))
        dim = data.draw(st.integers(0, len(now) - 1))
        if kind == "view":
            left = prod(now)
            new: list[int] = []
            while left > 1 and len(new) < 4:
                new.append(data.draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0])))
                left //= new[-1]
            steps.append((kind, (*new, left)))
        elif kind == "permute":
            steps.append((kind, data.draw(st.permutations(range(len(now))))))
        elif kind == "slice":
            start = data.draw(st.integers(0, now[dim] - 1))
            step = data.draw(st.integers(1, 2))
            steps.append((kind, (dim, start, data.draw(st.integers(start + 1, now[dim])), step)))
        elif prod(now) < 500:
            steps.append((kind, dim))
    holds(function, shape)


# ------------------------------------------------------------------------------------------------ what rules say

KEEPS: dict[str, Callable[[Tensor], Tensor]] = {
    **{f.__name__: f for f in (F.relu, F.silu, F.gelu, F.mish, F.elu, F.celu, F.selu, F.softplus, F.hardtanh,
                               F.hardswish, F.hardsigmoid, F.relu6, F.leaky_relu, F.softsign, F.tanhshrink, torch.tanh,
                               torch.exp, torch.sqrt, torch.abs, torch.neg, torch.sign, torch.erf, torch.sin,
                               torch.reciprocal, torch.rsqrt, torch.log1p, torch.floor, torch.isnan, torch.square)},
    "dropout": lambda x: F.dropout2d(F.dropout(x, 0.5, True), 0.2, True),
    "scalar": lambda x: (2 - x * 3 / 4 + 1) ** 2,
    "clamp": lambda x: x.clamp(-1, 1).clamp_min(0),
    "in place": lambda x: x.clone().mul_(2).add_(1).relu_(),
    "dtype": lambda x: x.half().float().contiguous(),
    "where": lambda x: torch.where(x > 0, x, torch.zeros(())),
    "ones": lambda x: x * torch.ones_like(x) + torch.zeros(1, C, 1, 1, device="meta"),
    "maximum": lambda x: torch.maximum(x, x * 2).minimum(x),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=2.0),
    "lerp": lambda x: torch.lerp(x, 2 * x, 0.3),
    "mean of space": lambda x: x.mean((2, 3)),
    "keepdim": lambda x: x.amax((2, 3), keepdim=True) + x.sum(3, keepdim=True),
    "norm of space": lambda x: x.flatten(2).norm(dim=2),
    "softmax of space": lambda x: x.flatten(2).softmax(2),
    "max pool": lambda x: F.max_pool2d(x, 2),
    "average pool": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, (2, 3)) + F.adaptive_max_pool2d(x, (2, 3)),
    "upsampled": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear") + F.interpolate(x, scale_factor=2),
    "reflected": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "sampled": lambda x: F.grid_sample(x, torch.zeros(2, 3, 3, 2, device="meta")),
    "padded space": lambda x: F.pad(x, (1, 2, 3, 4), value=1.0),
    "unpooled": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), [2, 2]),
    "widened": lambda x: torch.zeros_like(x) + x,
    "pooled rows": lambda x: F.avg_pool1d(x.flatten(2), 3),
}
MIXES: dict[str, Callable[[Tensor], Any]] = {
    "softmax": lambda x: x.softmax(1), "log_softmax": lambda x: x.log_softmax(1), "mean": lambda x: x.mean(1),
    "sum": lambda x: x.sum((1, 2)), "max": lambda x: x.amax(1), "max with indices": lambda x: x.max(1),
    "std": lambda x: x.std(1), "norm": lambda x: x.norm(dim=1), "all": lambda x: x.mean(), "cumsum": lambda x: x.cumsum(1),
    "layer norm": lambda x: F.layer_norm(x.movedim(1, 3), (C,)), "group norm": lambda x: F.group_norm(x, 3),
    "logsumexp": lambda x: x.logsumexp(1), "argmax": lambda x: x.argmax(1),
}
PINS: dict[str, Callable[[Tensor], Any]] = {
    "constant": lambda x: x + torch.arange(C, dtype=torch.float32, device="meta").view(1, C, 1, 1),
    "weights without channels": lambda x: F.conv2d(x, torch.zeros(5, C, 1, 1, device="meta")),
    "matrix without channels": lambda x: x.mean((2, 3)) @ torch.zeros(C, 5, device="meta"),
    "sort": lambda x: x.sort(1), "topk": lambda x: x.topk(3, 1), "fft": lambda x: torch.fft.fft(x, dim=1),
    "unfold": lambda x: F.unfold(x, 2), "gather": lambda x: x.gather(1, torch.zeros(x.shape, dtype=torch.long, device="meta")),
    "every second": lambda x: x[:, ::2],
    "index": lambda x: x[:, torch.tensor([1, 2, 3])], "index_select": lambda x: x.index_select(1, torch.tensor([1, 2])),
    "one channel": lambda x: x[:, 3], "unbound": lambda x: x.unbind(1),
    "pooled channels": lambda x: F.max_pool1d(x.mean(3).transpose(1, 2), 2),
    "written slice": lambda x: torch.zeros_like(x)[:, :4].copy_(x[:, 4:8]),
    "concatenated in space": lambda x: torch.cat([x, torch.zeros(2, C, 4, 1, device="meta")], 3),
    "grid": lambda x: F.grid_sample(torch.zeros(2, 3, 3, 3, device="meta"), x[:, :2].permute(0, 2, 3, 1)),
    "distances": lambda x: torch.cdist(x.mean(3), x.mean(3)),
}


@pytest.mark.parametrize("name", KEEPS)
def test_each_channel_for_itself(name: str) -> None:
    trace, out = traced(KEEPS[name])
    label = trace.of(out).labels[0]
    find = units(trace)
    assert label.ids.reshape(-1).tolist() == list(range(C)) and out.shape[label.free] == C
    assert not trace.pins and not trace.mixers and not trace.ties and len({find(k) for k in range(C)}) == C


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_channels_says_so(name: str) -> None:
    trace, _ = traced(MIXES[name])
    assert trace.mixers and {int(k) for k in trace.mixers[0][-1]} == set(range(C)) and not trace.pins


@pytest.mark.parametrize("name", PINS)
def test_what_cannot_shrink_is_pinned(name: str) -> None:
    trace, _ = traced(PINS[name])
    assert pinned(trace) and all(why.code and why.text for _, why in trace.pins)


def test_an_unknown_operator_pins_and_is_named() -> None:
    trace, out = traced(lambda x: x.sort(1).values)
    assert pinned(trace) == set(range(C)) and "aten.sort is not known" in trace.pins[0][1].text
    assert not trace.of(out).labels


@pytest.mark.parametrize(("function", "sets"), [
    (lambda x: x.chunk(3, 1), [range(4), range(4, 8), range(8, 12)]),
    (lambda x: F.group_norm(x, 2), [range(6), range(6, 12)]),
    (lambda x: x.view(2, 3, 4, 4, 6), [range(4), range(4, 8), range(8, 12)]),
])
def test_parts_that_must_keep_equally_many(function: Callable[[Tensor], Any], sets: list[range]) -> None:
    trace, _ = traced(function)
    assert [sorted(r) for r in trace.ties[0].tolist()] == [list(s) for s in sets]


@pytest.mark.parametrize(("function", "pairs"), [
    (lambda x: x[:, :6] + x[:, 6:], [(k, k + 6) for k in range(6)]),
    (lambda x: x * x.flip(1), [(k, 11 - k) for k in range(6)]),
    (lambda x: F.glu(x, 1), [(k, k + 6) for k in range(6)]),
    (lambda x: F.pixel_shuffle(x, 2), [(4 * k, 4 * k + j) for k in range(3) for j in range(1, 4)]),
    (lambda x: x.view(2, 6, 2, 4, 6).amax(1), [(k, k + 2) for k in range(10)]),
])
def test_channels_that_meet_are_united(function: Callable[[Tensor], Any], pairs: list[tuple[int, int]]) -> None:
    find = units(traced(function)[0])
    assert all(find(a) == find(b) for a, b in pairs)
    assert len({find(k) for k in range(C)}) == C - len(pairs)


def test_zero_padding_adds_channels_that_stay() -> None:
    trace, out = traced(lambda x: F.pad(x, (0, 0, 0, 0, 2, 3)))
    ids = trace.of(out).labels[0].ids.reshape(-1)
    assert ids[2:-3].tolist() == list(range(C)) and pinned(trace) == {*ids[:2].tolist(), *ids[-3:].tolist()}
    assert trace.pins[0][1].code == "padding"


# ------------------------------------------------------------------------------------------------ names and shapes


def test_every_rule_is_of_an_operator_that_exists() -> None:
    known = {n.split(".")[0].removeprefix("aten::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::")}
    elsewhere = {"roi_align", "roi_pool", "nms"}  # torchvision's
    missing = {n for n in TABLE if n not in known and f"{n}_" not in known} - elsewhere
    assert not missing
    assert len(ROWS) == len(TABLE), "an operator has two rows"


def test_names_of_operators() -> None:
    aten = torch.ops.aten
    assert operator_of(aten.add_.Tensor) is TABLE["add"] and operator_of(aten.exp_.default).rule is elementwise
    assert operator_of(aten.sort.default).name == "sort" and operator_of(aten.sort.default).rule is None
    x = torch.zeros(1, 2, 3, 3)
    mean = TABLE["mean"]
    assert TABLE["max_pool2d"].is_pooling((x,)) and mean.is_pooling((x, [2, 3])) and mean.is_pooling((x, [-1, -2]))
    assert not mean.is_pooling((x, [1])) and not mean.is_pooling((x,)) and not TABLE["add"].is_pooling((x, x))


class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
    """Compares the shapes that are worked out directly with PyTorch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.checked: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = CallCounter().count(func, args, kwargs)
        name, in_place = call.name, func._schema.name[-1] == "_"
        try:
            out = func(*args, **(kwargs or {}))
        except Exception:
            assert infer_output(call, in_place, hollow=False) is None, f"{name} should fail"
            raise
        quick = infer_output(call, in_place, hollow=False)
        if quick is not None:
            self.checked.add(name)
            a, b = (quick, out) if isinstance(out, Tensor) else (quick[0], out[0])  # no network uses the saved statistics
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), name
            assert (quick is args[0]) == (out is args[0])
        return out


@given(st.data())
def test_shapes_worked_out_directly_are_those_of_pytorch(data: st.DataObject) -> None:
    i, o = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    groups = data.draw(st.sampled_from([1, 1, 2]))
    k, stride, padding, dilation = (data.draw(st.integers(a, b)) for a, b in ((1, 4), (1, 3), (0, 2), (1, 2)))
    size = (data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))

    def blank(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    x = blank(2, groups * i, *size)
    calls: list[Callable[[], Any]] = [
        lambda: F.conv2d(x, blank(groups * o, i, k, k), blank(groups * o), stride, padding, dilation, groups),
        lambda: F.conv2d(x, blank(groups * o, i, k, 1), None, stride, "same" if stride == 1 else "valid", 1, groups),
        lambda: F.conv1d(x[..., 0], blank(groups * o, i, k), None, stride, padding, dilation, groups),
        lambda: F.conv_transpose2d(x, blank(groups * i, o, k, k), None, stride, 0, 0, groups),
        lambda: F.conv2d(x, blank(groups * o, i + 1, k, k)),
        lambda: F.batch_norm(x, blank(groups * i), blank(groups * i), blank(groups * i), blank(groups * i)),
        lambda: F.batch_norm(x, blank(groups * i), blank(groups * i), blank(groups * i), blank(groups * i), training=True),
        lambda: F.batch_norm(x, blank(groups * i + 1), blank(groups * i + 1)),
        lambda: x.mean((2, 3)), lambda: x.mean((-1, 1), keepdim=True), lambda: x.mean(), lambda: x.mean(1),
        lambda: x + blank(1, groups * i, 1, 1), lambda: x * blank(*size), lambda: x + blank(7, 5, 3), lambda: x / 3,
        lambda: x.add_(blank(1, groups * i, 1, 1)), lambda: x.clone().mul_(2), lambda: blank(size[1]).add_(x),
        lambda: x + x.float(), lambda: x + x.long(), lambda: F.relu(x, inplace=True), lambda: F.silu(x), lambda: F.gelu(x),
        lambda: F.hardtanh(x), lambda: F.leaky_relu_(x, 0.1), lambda: x.permute(1, 0, 2, 3).clone(),
        lambda: F.linear(x.mean((2, 3)), blank(o, groups * i), blank(o)), lambda: F.linear(x[..., 0, 0], blank(o, i + 7)),
        lambda: F.linear(x.flatten(2).transpose(1, 2), blank(o, groups * i)), lambda: blank(3, 4).mm(blank(4, 2)),
        lambda: F.layer_norm(x.movedim(1, 3), (groups * i,), blank(groups * i)), lambda: F.layer_norm(x, size),
        lambda: F.layer_norm(x, (3, 77)), lambda: torch.addmm(blank(1), blank(3, 4), blank(4, 2)),
    ]
    mode = Shapes()
    with torch.no_grad(), mode:
        for n in data.draw(st.lists(st.integers(0, len(calls) - 1), min_size=8, max_size=12, unique=True)):
            try:
                calls[n]()
            except (RuntimeError, ValueError, TypeError) as e:
                assert not isinstance(e, AssertionError)
    SEEN.update(mode.checked)


SEEN: set[str] = set()


def test_those_shapes_have_been_seen() -> None:
    for name in ("convolution", "native_batch_norm", "mean", "add", "mul", "relu", "mm", "addmm", "native_layer_norm"):
        assert name in SEEN
