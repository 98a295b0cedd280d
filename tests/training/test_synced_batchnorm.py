"""BatchNorm over two processes is BatchNorm over all their images: outputs, gradients and running statistics."""

from __future__ import annotations

import copy
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.processes import in_two
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules._functions import SyncBatchNorm as Fused

from narrower.training import synced_batchnorm
from narrower.training.synced_batchnorm import SyncedBatchNorm

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")

PARTS = (slice(0, 3), slice(3, 8))  # of different size


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Tanh(), nn.Flatten(),
                          nn.BatchNorm1d(36, momentum=None)).double()
    nn.init.normal_(model.get_parameter("0.weight"))
    return model


def images() -> Tensor:
    return 3 + torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def part(rank: int) -> dict[str, Any]:
    dist.init_process_group("gloo")
    model, x = network(), images()[PARTS[rank]].requires_grad_()
    with SyncedBatchNorm():
        out = model(x)
        out.pow(3).sum().backward()
        half = nn.BatchNorm2d(3)(x.detach().bfloat16()).dtype
    evaluated = copy.deepcopy(model).eval()
    with SyncedBatchNorm():
        assert torch.equal(evaluated(x), evaluated(x))
    state = {name: t.tolist() for name, t in model.state_dict().items()}
    return {"out": out.tolist(), "x": x.grad.tolist(), "weight": model.get_parameter("1.weight").grad.tolist(), "state": state,  # type: ignore[union-attr]
            "half": half == torch.bfloat16}


def test_on_cuda_the_kernels_of_torch_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are fused: this module's own arithmetic keeps several copies of each activation, in float32."""
    names, given = [*inspect.signature(Fused.forward).parameters][1:], list[Any]()

    def apply(*args: Any) -> Any:
        given.extend(args)
        return args[0]

    monkeypatch.setattr(synced_batchnorm, "several", lambda: True)
    monkeypatch.setattr(synced_batchnorm, "Fused", SimpleNamespace(apply=apply))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with FakeTensorMode(), torch.device("cuda"), SyncedBatchNorm():
        layer, x = nn.BatchNorm2d(3, eps=1e-3, momentum=0.2), torch.zeros(2, 3, 4, 4)
        assert layer(x) is x
    found = dict(zip(names, given, strict=True))
    assert (found["input"], found["weight"], found["bias"]) == (x, layer.weight, layer.bias)
    assert (found["running_mean"], found["running_var"]) == (layer.running_mean, layer.running_var)
    assert (found["eps"], found["momentum"], found["world_size"]) == (1e-3, 0.2, 2)


def test_two_processes_normalise_as_one() -> None:
    found = in_two(part)
    model, x = network(), images().requires_grad_()
    with SyncedBatchNorm():  # does nothing in one process
        out = model(x)
    out.pow(3).sum().backward()
    for key, want in (("out", out), ("x", x.grad)):
        torch.testing.assert_close(torch.cat([torch.tensor(f[key], dtype=torch.float64) for f in found]), want)
    total = sum(torch.tensor(f["weight"], dtype=torch.float64) for f in found)
    torch.testing.assert_close(total, model.get_parameter("1.weight").grad)
    for f in found:
        assert f["half"]
        for name, t in model.state_dict().items():
            torch.testing.assert_close(torch.tensor(f["state"][name], dtype=t.dtype), t)
