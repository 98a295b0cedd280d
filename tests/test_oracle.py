"""The shared black-box oracle on a few published networks, where it lies beside the repository (NARROWER_SHARED)."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import narrower

SHARED = Path(os.environ.get("NARROWER_SHARED", Path(__file__).resolve().parent.parent.parent / "shared"))
torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
if not (SHARED / "oracle" / "oracle.py").is_file():
    pytest.skip("the oracle is not here", allow_module_level=True)
sys.path.insert(0, str(SHARED / "oracle"))
oracle: Any = importlib.import_module("oracle")
sys.path.remove(str(SHARED / "oracle"))

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 64),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.5), 64),
    "shufflenet_v2_x0_5": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10), 64),
    "squeezenet1_1": (lambda: torchvision.models.squeezenet1_1(num_classes=10), 64),
    "mobilenetv3_small_050": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=10), 64),
    "resnet10t": (lambda: timm.create_model("resnet10t", num_classes=10), 64),
    "convnext_atto": (lambda: timm.create_model("convnext_atto", num_classes=10), 64),
    "efficientnet_b0": (lambda: timm.create_model("efficientnet_b0", num_classes=10), 64),
}


def prune(model: nn.Module, x: torch.Tensor, ratio: float, seed: int, code: Callable[[nn.Module], None]) -> nn.Module:
    graph = narrower.trace(model, x)
    plan = narrower.plan(graph, narrower.random(graph, seed=seed), remove=ratio)
    code(model)  # from here on every element is its own index
    return narrower.narrow(model, plan)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_oracle_calls_every_network_right(name: str) -> None:
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    result = oracle.examine(make(), (3, size, size), prune)
    assert result.verdict == "ok", f"{result.verdict}: {result.message}"
    assert result.ratio < 0.6
    assert result.check == "consistency" or result.err < 1e-9
