"""Shapes that are worked out directly are those that PyTorch computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from narrower.tracing.operators.call_counter import CallCounter
from narrower.tracing.operators.shapes import binary, infer_output, unary
from narrower.tracing.operators.table import ROWS


class Shapes(TorchDispatchMode):
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

ELEMENTWISE = {row.name: 1 if row.shape_rule is unary else 2 for row in ROWS if row.shape_rule in (unary, binary)}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_the_shape_of_an_elementwise_operator_is_that_of_pytorch(name: str) -> None:
    operator, mode = getattr(torch.ops.aten, name), Shapes()
    with torch.no_grad(), mode:
        operator(*[torch.empty(3, 4, device="meta")] * ELEMENTWISE[name])
    assert mode.checked == {name}


def test_every_other_shape_rule_has_been_seen_above() -> None:
    of_real_tensors = {"index_put"}
    assert {row.name for row in ROWS if row.shape_rule is not None} - of_real_tensors - ELEMENTWISE.keys() <= SEEN


def test_masked_writes_into_real_tensors_keep_the_shape() -> None:
    """A mask of zeros covers another number of places than the one that the forward made."""
    x = torch.ones(4, 3)
    write = torch.ops.aten.index_put_.default
    call = CallCounter().count(write, (x, [torch.zeros(4, dtype=torch.bool)], torch.ones(2, 3)), {})
    assert infer_output(call, True, hollow=True) is x and infer_output(call, True, hollow=False) is None
    on_meta = CallCounter().count(write, (x.to("meta"), *call.args[1:]), {})
    assert infer_output(on_meta, True, hollow=False) is None, "a mask on meta covers an unknown number of places"
