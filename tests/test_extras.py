"""Optional packages: what is missing is named with the command that installs it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.networks import IMAGES, Plain

import narrower
from narrower.extras import optional


@pytest.mark.parametrize(("package", "extra", "file"), [
    ("onnxruntime", "export", "net.onnx"), ("onnxscript", "export", "net.onnx"), ("openvino", "openvino", "net.xml")])
def test_a_missing_package_is_named_before_anything_is_written(
    package: str, extra: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for present in {"onnx", "onnxscript", "onnxruntime"} - {package}:
        pytest.importorskip(present)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(narrower.MissingExtraError, match=rf"{package} is missing.*pip install 'narrower\[{extra}\]'"):
        narrower.export(Plain(), IMAGES, tmp_path / file)
    assert not list(tmp_path.iterdir())


def test_an_installed_package_is_returned() -> None:
    assert optional("onnx").__name__ == "onnx"
