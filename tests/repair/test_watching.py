"""The layers that a forward shows, and the sums that they go into."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.devices import APPLE, Apple
from support.resrep_training import randomised
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from narrower.inputs import flatten_tensors
from narrower.repair import watching
from narrower.repair.watching import LayerCall, LayerWatch
from narrower.tracing.operators.call_counter import CallCounter


class Block(nn.Module):
    """A residual block: conv, BatchNorm, added to the input; then a linear layer on rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.twice, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        x = x + self.norm(self.conv(x))
        x = self.twice(torch.relu(self.twice(x)))
        return self.fc(x.flatten(2).transpose(1, 2).reshape(-1, 4))


class ConvolutionSizes(TorchDispatchMode):
    """How many images each convolution gets."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.seen.append(len(args[0]))
        return func(*args, **(kwargs or {}))


class Seen(LayerWatch):
    def __init__(self, model: nn.Module, weights: list[str]) -> None:
        super().__init__(model, weights)
        self.layers: list[LayerCall] = []
        self.outs: dict[int, Tensor] = {}

    @property
    def memory(self) -> int:
        """How many memories the outputs of all calls have."""
        return len({t.untyped_storage()._cdata for t in self.outs.values()})

    def layer(self, call: LayerCall) -> Tensor:
        self.layers.append(call)
        return call.run()

    def finished(self, number: int, out: Tensor) -> None:
        self.outs[number] = out


def test_layers_are_seen_with_their_inputs_and_geometry() -> None:
    model, x = Block().eval(), torch.randn(2, 4, 5, 5)
    watch = Seen(model, ["conv.weight", "twice.weight", "fc.weight"])
    out = watch.run(x, 2)
    with torch.no_grad():
        assert torch.equal(out, model(x))
    assert [c.weight for c in watch.layers] == ["conv.weight", "twice.weight", "twice.weight", "fc.weight"]
    assert torch.equal(watch.layers[0].x, x.relu())
    assert watch.layers[0].geometry.kernel == (3, 3) and watch.layers[0].geometry.padding == (1, 1)
    assert watch.layers[3].x.shape == (50, 4) and watch.layers[3].geometry.kernel == ()
    assert watch.uses == {"conv.weight": 1, "twice.weight": 2, "fc.weight": 1}


def test_a_sum_is_known_by_its_norm_its_other_summand_and_the_addition() -> None:
    model, x = Block().eval(), torch.randn(2, 4, 5, 5)
    watch = Seen(model, ["conv.weight"])
    watch.run(x, 2)
    stream = watch.streams["conv.weight"]
    assert stream.norm == "norm"
    with torch.no_grad():
        assert torch.equal(watch.outs[stream.other], x.relu())
        assert torch.equal(watch.outs[stream.addition], x.relu() + model.norm(model.conv(x.relu())))


def test_other_weights_are_not_seen() -> None:
    watch = Seen(Block().eval(), ["fc.weight"])
    watch.run(torch.randn(2, 4, 5, 5), 2)
    assert [c.weight for c in watch.layers] == ["fc.weight"] and not watch.streams


def test_a_part_of_a_weight_is_no_layer_of_it() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(4, 6, 1), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.conv2d(x, self.conv.weight[:4]).mean((2, 3))
            return self.fc(y) + y @ self.fc.weight

    watch = Seen(Part().eval(), ["conv.weight", "fc.weight"])
    watch.run(torch.randn(2, 4, 5, 5), 2)
    assert [c.weight for c in watch.layers] == ["fc.weight"]


def test_large_convolutions_run_in_chunks_that_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Block().eval(), torch.randn(5, 4, 5, 5)
    seen: list[int] = []
    with torch.no_grad():
        want = model(x)
        for chunk in (1, 250, 500):
            monkeypatch.setattr(watching, "CHUNK", chunk)
            with ConvolutionSizes() as sizes:
                torch.testing.assert_close(Seen(model, ["conv.weight"]).run(x, 5), want)
            seen.append(max(sizes.seen))
    assert seen == [1, 2, 5]


def test_a_gpu_gets_larger_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(200, 1, 2, 2), torch.randn(1, 1, 1, 1)
    monkeypatch.setattr(watching, "CHUNK", 8)
    seen = []
    for device in ("cpu", APPLE):
        with Apple(), ConvolutionSizes() as sizes:
            args = (x.to(device), w.to(device), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
            func = torch.ops.aten.convolution.default
            out = watching.run_in_chunks(func, CallCounter().count(func, args, {}))
            torch.testing.assert_close(out.cpu(), x * w)
        seen.append(sizes.seen)
    assert seen == [[2] * 100, [128, 72]]


class Cudnn(nn.Module):
    """What `nn.BatchNorm2d` calls on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        norm, out = self.norm, self.conv(x)
        tensors = out, norm.weight, norm.bias, norm.running_mean, norm.running_var
        return torch.ops.aten.cudnn_batch_norm(*tensors, False, 0.1, 1e-5)[0]


class CudnnOnTheCpu(TorchDispatchMode):
    """Runs cuDNN's BatchNorm by the one of the CPU, and counts how often."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.cudnn_batch_norm.default:
            self.count += 1
            return *torch.ops.aten.native_batch_norm(*args), args[0].new_empty(0, dtype=torch.uint8)
        return func(*args, **(kwargs or {}))


def test_the_batch_norm_of_cuda_is_written_in_place_too() -> None:
    model: Any = randomised(Cudnn()).eval()
    x = torch.randn(3, 4, 5, 5)
    first, second = (Seen(model, ["conv.weight"]) for _ in range(2))
    with torch.no_grad(), CudnnOnTheCpu() as cudnn:
        want = first.run(x, 3)
        second.once = first.read_once()
        torch.testing.assert_close(second.run(x, 3), want)
        torch.testing.assert_close(want, model.norm(model.conv(x)))
    assert cudnn.count == 1 and second.memory < first.memory


def test_a_batch_norm_in_half_precision_is_not_written_in_place_as_that_would_round_twice() -> None:
    model, x = randomised(Block()).eval().bfloat16(), torch.randn(3, 4, 5, 5).bfloat16()
    with torch.no_grad():
        first, second = (Seen(model, ["conv.weight"]) for _ in range(2))
        want = first.run(x, 3)
        second.once = first.read_once()
        assert torch.equal(second.run(x, 3), want) and torch.equal(want, model(x))


def test_a_second_forward_starts_anew() -> None:
    watch = Seen(Block().eval(), ["conv.weight"])
    for _ in range(2):
        watch.run(torch.randn(2, 4, 5, 5), 2)
    assert watch.uses == {"conv.weight": 1} and len(watch.layers) == 2


class Careless(nn.Module):
    """Outputs that others read as well: twice, through a view, as an output of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 1) for _ in range(4))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.a(x)
        y = torch.relu(x) + x  # x is read twice
        z = self.b(y)
        flat = z.flatten(2)
        z = torch.relu(z) + flat.mean()  # a view reads it
        w = self.c(z)
        rows = w.flatten(2)
        w.relu_()
        out = torch.nn.functional.hardtanh(w) * 2  # a view made before reads what is written in place
        kept = self.d(out)
        last = self.c(kept)
        return torch.relu(kept), kept, self.norm(self.a(kept)), rows.sum(), torch.relu(last), last


@pytest.mark.parametrize("name", ["block", "careless"])
def test_calls_overwrite_only_what_nothing_else_reads(name: str) -> None:
    model, x = randomised(Block() if name == "block" else Careless()).eval(), torch.randn(3, 4, 5, 5)
    with torch.no_grad():
        first, second = (Seen(model, ["conv.weight"] if name == "block" else ["d.weight"]) for _ in range(2))
        want = [t.clone() for t in flatten_tensors(first.run(x, 3))]
        second.once = first.read_once()
        found = flatten_tensors(second.run(x, 3))
        torch.testing.assert_close(found, want)
        torch.testing.assert_close(found, flatten_tensors(model(x)))
    assert second.memory < first.memory


def test_a_product_with_a_scaled_or_summed_bias_is_no_plain_layer() -> None:
    class Scaled(nn.Module):
        def __init__(self, beta: float, alpha: float) -> None:
            super().__init__()
            self.fc, self.beta, self.alpha = nn.Linear(4, 3), beta, alpha

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.fc.bias, x, self.fc.weight.T, beta=self.beta, alpha=self.alpha)

    x = torch.randn(5, 4)
    for beta, alpha, layers in ((1, 1, 1), (0.5, 1, 0), (1, 2, 0)):
        model = Scaled(beta, alpha)
        watch = Seen(model, ["fc.weight"])
        torch.testing.assert_close(watch.run(x, 5), model(x))
        assert len(watch.layers) == layers
