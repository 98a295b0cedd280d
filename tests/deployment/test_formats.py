"""File formats: each file computes what the network does, for any batch size, with the inputs that the network takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.networks import Plain, images
from torch import Tensor, nn

import narrower
from narrower.deployment.formats import FORMATS, Format, batch_dimensions, format_of
from narrower.inputs import call_model, flatten_tensors

FILES = ("net.onnx", "net.xml", "net.pt2", "net.ts")


class Several(nn.Module):
    """Two inputs of different kinds, and outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, image: Tensor, scale: Tensor) -> dict[str, Tensor]:
        y = self.conv(image)
        return {"out": y * scale[:, :, None, None], "aux": y.mean((2, 3))}


class Branching(nn.Module):
    """Values decide: an example of each side takes another way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((2, 3))
        if x[0, 0, 0, 0] > 0:
            return y + 1.0
        return y


@pytest.fixture(scope="module", params=FILES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Format, Path, Any]]:
    """A file of each format of the network with several inputs."""
    format = format_of(Path(request.param))
    for package in format.packages:
        pytest.importorskip(package)
    torch.manual_seed(0)
    model = Several().eval()
    path = tmp_path_factory.mktemp("files") / request.param
    with torch.no_grad():
        format.writers[0](model, {"scale": torch.rand(2, 5), "image": images(batch=2)}, path, True)
    yield format, path, model


def test_a_file_that_may_be_shared_has_no_path_of_this_machine(written: tuple[Format, Path, Any]) -> None:
    """But for TorchScript, which keeps the places of its source."""
    path = written[1]
    files = [file for file in path.parent.iterdir() if file.suffix != ".ts"]
    assert not [file for file in files if str(Path(__file__).parent).encode() in file.read_bytes()]


@pytest.mark.parametrize("batch", [1, 5])
def test_a_file_takes_keywords_in_any_order_and_any_batch(written: tuple[Format, Path, Any], batch: int) -> None:
    format, path, model = written
    inputs = {"scale": torch.rand(batch, 5), "image": images(batch=batch, seed=batch)}
    with torch.no_grad():
        expected = flatten_tensors(call_model(model, inputs))
        found = format.open(path, 1)(inputs)
    assert len(found) == 2
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "format"), [("a.onnx", "onnx"), ("a.b.pt2", "pt2"), ("a.torchscript.pt", "torchscript"),
                                              ("a.ts", "torchscript"), ("a.xml", "openvino")])
def test_the_suffix_names_the_format(name: str, format: str) -> None:
    assert format_of(Path(name)).name == format


@pytest.mark.parametrize("name", ["a.pt", "a", "onnx", "a.onnx.bak"])
def test_other_suffixes_are_refused(name: str) -> None:
    with pytest.raises(narrower.ExportError, match="names no format: give a file name that ends in one of .onnx"):
        format_of(Path(name))


def test_only_tensors_have_a_batch_dimension() -> None:
    x = torch.zeros(2, 3)
    assert batch_dimensions((x, 7), "b") == ({0: "b"}, None)
    assert batch_dimensions({"x": x, "n": 7}, "b") == {"x": {0: "b"}, "n": None}


def test_a_branch_on_values_is_kept_where_source_can_be_compiled(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    x = torch.rand(2, 3, 4, 4)
    x[..., 0] = -x[..., 0]  # the mirror image takes the other branch
    assert narrower.export(Branching(), x, tmp_path / "net.ts").difference < 1e-6
    with pytest.raises(narrower.ExportError, match=r"pt2: .*at test_formats.py:\d+: if x\[0, 0, 0, 0\] > 0"):
        narrower.export(Branching(), x, tmp_path / "net.pt2")
    assert capfd.readouterr() == ("", ""), "torch prints the graph up to the branch"


def test_names_are_unique() -> None:
    suffixes = [suffix for format in FORMATS for suffix in format.suffixes]
    assert len(set(suffixes)) == len(suffixes) and Plain().training
