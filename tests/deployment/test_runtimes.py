"""Runtimes: what they prepare computes what the network does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.networks import Plain, images
from torch import nn

import narrower
from narrower.deployment import runtimes
from narrower.deployment.runtimes import RUNTIMES, runtime_named, torch_threads
from narrower.inputs import flatten_tensors

PACKAGES = {"onnxruntime": "onnxruntime", "openvino": "openvino"}


@pytest.mark.parametrize("name", ["eager", "onnxruntime", "openvino"])
def test_a_prepared_call_computes_what_the_network_does(name: str) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    model, x = Plain().eval(), images(batch=1)
    with torch.no_grad():
        (found,) = flatten_tensors(runtime_named(name).prepare(model, x, 1)())
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


def test_a_compiled_call_computes_what_the_network_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through dynamo; generating C++ for it would take half a minute."""
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **given: plain(module, backend="eager", **given))
    model, x = Plain().eval(), images(batch=1)
    with torch.no_grad():
        torch.testing.assert_close(runtime_named("compile").prepare(model, x, 1)(), model(x), rtol=1e-4, atol=1e-5)


def test_cuda_graphs_need_cuda() -> None:
    with pytest.raises(narrower.ConfigError, match="cudagraph needs a network on a CUDA device, not on cpu"):
        runtime_named("cudagraph").prepare(nn.Conv2d(3, 4, 1), images(), 1)


def test_files_run_on_as_many_threads_as_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, int]] = []
    monkeypatch.setattr(runtimes, "export", lambda module, inputs, path, **given: SimpleNamespace(path=path))
    monkeypatch.setattr(runtimes, "format_of", lambda path: SimpleNamespace(open=lambda *given: opened.append(given)))
    for name in PACKAGES:
        runtime_named(name).prepare(Plain(), images(), 3)
    assert [threads for _, threads in opened] == [3, 3]


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        1 / 0
    assert torch.get_num_threads() == before and len({r.name for r in RUNTIMES}) == len(RUNTIMES)


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_threads_are_counted_from_one(count: Any) -> None:
    with pytest.raises(narrower.ConfigError, match="threads="), torch_threads(count):
        pass
