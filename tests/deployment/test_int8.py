"""int8: the quantised file is near the network, smaller, and refused where it is not near."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.networks import Plain, images
from torch import nn

import narrower
from narrower.deployment.int8 import relative_error

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def test_weights_become_bytes_and_outputs_stay_near(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    x = images()
    model(x)
    exact = narrower.export(model, x, tmp_path / "float.onnx")
    rough = narrower.export(model, x, tmp_path / "int8.onnx", calibration=[(x, torch.zeros(len(x))), x.flip(-1)])
    assert rough.precision == "int8" and 1e-4 < rough.difference < 0.1 and rough.size < 0.5 * exact.size
    kinds = {t.data_type for t in onnx.load(rough.path).graph.initializer if len(t.dims) == 4}
    assert kinds == {onnx.TensorProto.INT8}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["float.onnx", "int8.onnx"]


def test_ranges_that_do_not_hold_are_refused(tmp_path: Path) -> None:
    x = images()
    with pytest.raises(narrower.ExportError, match="differs in onnxruntime"):
        narrower.export(nn.Conv2d(3, 4, 3, bias=False), 100 * x, tmp_path / "net.onnx", calibration=[0.01 * x])
    assert not list(tmp_path.iterdir())


def test_no_batches_and_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(narrower.ExportError, match="no calibration batch"):
        narrower.export(Plain(), images(), tmp_path / "net.onnx", calibration=[])
    with pytest.raises(narrower.ExportError, match=r"int8 is written as \.onnx only"):
        narrower.export(Plain(), images(), tmp_path / "net.pt2", calibration=[images()])
    assert not list(tmp_path.iterdir())


def test_the_error_is_a_fraction_of_the_norm() -> None:
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([4.0, 5.0])) == pytest.approx(2**0.5 / 5)
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0.0
