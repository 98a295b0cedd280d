"""export: what is left on disk equals the network, or there is no file and an error says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import reference
from support.networks import Plain, images
from torch import Tensor, nn

import narrower
from narrower.deployment import exporting
from narrower.deployment.exporting import batch_size, reason, relative_difference, resized, telling
from narrower.deployment.formats import FORMATS, Format
from narrower.surgery import copying


def test_a_narrow_network_is_exported_and_stays_as_it_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = Plain().train()
    x = images(batch=1)
    small = narrower.narrow(model, reference.halved(model, x))
    before = {name: t.clone() for name, t in small.state_dict().items()}
    found = narrower.export(small, x, tmp_path / "deep" / "net.onnx")
    assert found.batch == "any" and found.format == "onnx" and found.precision == "float" and found.difference < 1e-5
    assert found.size == found.path.stat().st_size and [f.name for f in found.path.parent.iterdir()] == ["net.onnx"]
    assert "onnxruntime = PyTorch to" in str(found)
    (given,) = onnx.load(found.path).graph.input
    assert [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim] == ["batch", 3, 8, 8]
    assert capfd.readouterr() == ("", "") and not recwarn.list, "exporters print pages"
    assert small.training and all(torch.equal(t, before[name]) for name, t in small.state_dict().items())


def test_a_fixed_batch_takes_no_other(tmp_path: Path) -> None:
    found = narrower.export(Plain(), images(batch=3), tmp_path / "net.pt2", dynamic_batch=False)
    assert found.batch == "3"
    with pytest.raises(AssertionError):
        torch.export.load(found.path).module()(images(batch=4))


class Forgetful(nn.Module):
    """Tracing fixes a number that depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor, *unused: Any) -> Tensor:  # *unused: cannot be scripted
        return self.conv(x) * float(x[..., 0].sum())


def test_a_file_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.ts"
    path.write_text("an older file")
    with pytest.raises(narrower.ExportError, match=r"differs in TorchScript from PyTorch by \d\.\d\de.*tolerance 0.0001"):
        narrower.export(Forgetful(), images(), path)
    assert path.read_text() == "an older file" and list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(narrower.ExportError, match=r"cannot write .*file/net.ts: "):
        narrower.export(Plain(), images(), tmp_path / "file" / "net.ts")


@pytest.mark.parametrize(("name", "package"), [("net.onnx", "onnxruntime"), ("net.xml", "openvino")])
def test_a_file_that_runs_on_the_cpu_is_compared_with_the_network_on_the_cpu(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a network on a GPU: what it computes in PyTorch is rounded, as by TF32."""
    pytest.importorskip(package)

    class OnGpu(Plain):
        def forward(self, x: Tensor) -> Tensor:
            rounds = self is model and not torch.compiler.is_compiling()
            return super().forward(x) * (1.001 if rounds else 1)

    model = OnGpu()
    monkeypatch.setattr(copying, "device_of", lambda module: torch.device("cuda"))
    assert narrower.export(model, images(batch=1), tmp_path / name).difference < 1e-5 and model.training


def test_torch_runs_its_own_files_on_the_device_of_the_network() -> None:
    assert {format.name for format in FORMATS if format.on_cpu} == {"onnx", "openvino"}


def test_a_directory_is_no_place_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "net.pt2").mkdir()
    with pytest.raises(narrower.ExportError, match=r"net.pt2: it is a directory"):
        narrower.export(Plain(), images(), tmp_path / "net.pt2")
    assert not list((tmp_path / "net.pt2").iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_without_a_finite_value_prove_nothing(value: float, tmp_path: Path) -> None:
    model = Plain()
    torch.nn.init.constant_(model.fc.bias, value)
    with pytest.raises(narrower.ExportError, match="output 0 of Plain has no finite value for the example inputs"):
        narrower.export(model, images(), tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


def test_files_are_compared_on_mirror_images_and_never_on_equal_values(tmp_path: Path) -> None:
    x = images(batch=2)
    (given, _), (other, (expected,)) = exporting.expected_outputs(nn.Identity(), x, False)
    assert given is x and torch.equal(other, x.flip(-1)) and torch.equal(expected, other)
    with pytest.raises(narrower.ExportError, match="differs in TorchScript"):
        narrower.export(Forgetful(), torch.zeros(2, 3, 8, 8), tmp_path / "net.ts")


def test_a_writer_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first(module: nn.Module, inputs: Any, path: Path, dynamic: bool) -> None:
        path.with_name("weights.bin").write_text("half of them")
        raise ValueError("full")

    def second(module: nn.Module, inputs: Any, path: Path, dynamic: bool) -> None:
        path.write_text("all")

    made = Format("made", (".made",), "nothing", (), (first, second), lambda path, threads: lambda inputs: [inputs])
    monkeypatch.setattr(exporting, "format_of", lambda path: made)
    narrower.export(nn.Identity(), images(), tmp_path / "net.made")
    assert [path.name for path in tmp_path.iterdir()] == ["net.made"]


def test_the_advice_is_of_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: Tensor) -> str:
        with pytest.raises(narrower.ExportError, match="differs in nothing") as caught:
            narrower.export(nn.Identity(), x, tmp_path / "net.made")
        return str(caught.value)

    def write_nothing(*args: Any) -> None:
        pass

    made = Format("made", (".made",), "nothing", (), (write_nothing,), lambda path, threads: lambda inputs: [inputs + 1])
    monkeypatch.setattr(exporting, "format_of", lambda path: made)
    assert "dynamic_batch" not in fails(images(batch=2)) and "float()" not in fails(images(batch=2))
    assert "dynamic_batch=False" in fails(images(batch=1)), "the file was written with two"
    assert "In torch.float16 " in (text := fails(images().half())) and "module.float(), or give a larger tolerance=" in text


def test_a_file_that_becomes_int8_may_round_as_the_network_does() -> None:
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 2**-6), (torch.bfloat16, 2**-3)):
        checks = [(None, [torch.zeros(2, dtype=dtype), torch.zeros(2, dtype=torch.int64)])]
        assert exporting.exactness(checks, 0.5, True) == tolerance and exporting.exactness(checks, None, False) == 1e-4
        assert exporting.exactness(checks, 0.5, False) == 0.5


def test_the_tolerance_is_that_of_the_caller(tmp_path: Path) -> None:
    assert narrower.export(Forgetful(), images(), tmp_path / "net.ts", tolerance=1e3).difference > 1e-4


class Singular(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(self.conv(x)[:, 0])


@pytest.mark.parametrize(("file", "package"), [("net.onnx", "onnxscript"), ("net.xml", "openvino")])
def test_an_operator_that_an_exporter_does_not_take_is_named_in_one_line(file: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    with pytest.raises(narrower.ExportError, match=r"Singular.*the operator aten\._linalg_svd\S* is not supported") as caught:
        narrower.export(Singular(), images(), tmp_path / file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert not list(tmp_path.iterdir())


def test_a_network_that_fixes_its_batch_needs_a_fixed_file(tmp_path: Path) -> None:
    """Whether PyTorch takes other numbers or not, the error says what helps."""

    class Fixed(nn.Module):
        def __init__(self, *sizes: int) -> None:
            super().__init__()
            self.sizes = sizes

        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(self.sizes) * 2

    x = images(batch=2)
    for module, text in ((Fixed(2, 3, 8, 8), "takes the example inputs, but not 3 samples: RuntimeError: shape"),
                         (Fixed(2, -1), "no pt2 file of Fixed was written")):
        with pytest.raises(narrower.ExportError, match=rf"{text}.*dynamic_batch=False, --fixed-batch 1"):
            narrower.export(module, x, tmp_path / "net.pt2")
        assert narrower.export(module, x, tmp_path / "net.pt2", dynamic_batch=False).batch == "2"


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("a", "b", "difference"), [
    ([1.0, -4.0], [1.0, -4.0], 0.0), ([1.0, -4.0], [2.0, -4.0], 0.25), ([0.0], [3.0], 3.0), ([], [], 0.0),
    ([NAN, 2.0], [NAN, 1.0], 0.5), ([NAN], [1.0], INF), ([1.0], [NAN], INF), ([INF, 2.0], [INF, 2.0], 0.0),
    ([INF], [-INF], INF),
])
def test_differences_are_fractions_of_the_largest_value(a: list[float], b: list[float], difference: float) -> None:
    assert relative_difference(torch.tensor(a), torch.tensor(b)) == difference


def test_batches_are_found_and_resized() -> None:
    x, y = torch.arange(6.0).view(3, 2), torch.zeros(3)
    assert batch_size(x) == batch_size((x, y)) == batch_size({"x": x, "n": 1}) == 3
    assert batch_size((x, torch.zeros(2))) is None and batch_size(([x, x],)) is None and batch_size(torch.tensor(1.0)) is None
    assert resized(x, 5).tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]] and resized(x, 2).tolist() == [[0, 1], [2, 3]]


def test_inputs_of_equal_values_become_noise() -> None:
    x = images()
    assert telling(x) is x and telling(torch.zeros(2, 3)).std() > 0.1 and telling(torch.zeros(2, dtype=torch.long)).eq(0).all()


def test_a_reason_is_one_line() -> None:
    assert reason(ValueError("first\nsecond")) == "ValueError: first"
    assert reason(RuntimeError("Exception from core.cpp:84:\nCheck 'x' failed")) == "RuntimeError: Check 'x' failed"
    assert reason(RuntimeError("Exception from core.cpp:84:")) == "RuntimeError: Exception from core.cpp:84:"
    assert reason(KeyError()) == "KeyError: KeyError" and len(reason(ValueError("x" * 1000))) < 330


def test_a_runtime_that_gives_other_outputs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = exporting.expected_outputs
    for change, text in ((lambda ts: [*ts, ts[0]], "gives 1 outputs, PyTorch 2"), (lambda ts: [ts[0][:1]], "has shape")):
        monkeypatch.setattr(exporting, "expected_outputs", lambda *a, c=change: [(x, c(ts)) for x, ts in checks(*a)])
        with pytest.raises(narrower.ExportError, match=text):
            narrower.export(nn.Conv2d(3, 4, 1), images(), tmp_path / "net.pt2")
    assert json.dumps([p.name for p in tmp_path.iterdir()]) == "[]"
