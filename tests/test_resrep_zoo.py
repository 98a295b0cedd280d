"""ResRep on the networks of the papers and of torchvision and timm: identity at the start, merged = trained."""

from __future__ import annotations

import warnings

import pytest
import torch
from support import resrep_training
from support.resrep_training import difference, outputs, randomised, sgd

import narrower
from narrower.models import make_model

# name, budget, scope, pixels, kinds of compactors that it must have
NETWORKS = [
    ("cifar_resnet20", 0.5, "all", 32, {"full"}),
    ("cifar_vgg16_bn", 0.5, "inner", 32, {"full", "diagonal"}),
    ("cifar_densenet40", 0.7, "inner", 16, {"diagonal"}),  # pre-activation: behind the consumers' BatchNorms
    ("cifar_googlenet", 0.6, "inner", 16, {"full"}),
    ("cifar_mobilenet_v1", 0.5, "inner", 32, {"full", "diagonal"}),
    ("torchvision/resnet50", 0.6, "all", 48, {"full", "diagonal"}),
    ("torchvision/mobilenet_v3_large", 0.6, "all", 48, {"full", "diagonal"}),
    ("torchvision/densenet121", 0.7, "inner", 48, {"full", "diagonal"}),
    ("torchvision/resnext50_32x4d", 0.6, "inner", 48, {"full", "block"}),
    ("torchvision/shufflenet_v2_x1_0", 0.7, "all", 48, {"full", "diagonal"}),
    ("resnetv2_50", 0.6, "all", 48, {"full", "diagonal"}),
    ("regnety_002", 0.8, "inner", 64, {"full", "block"}),
]
FAST = {"cifar_resnet20", "torchvision/shufflenet_v2_x1_0", "regnety_002"}  # together they have every kind of compactor


@pytest.mark.parametrize(("name", "budget", "scope", "size", "kinds"), [
    pytest.param(*network, id=network[0], marks=() if network[0] in FAST else pytest.mark.slow) for network in NETWORKS])
def test_merged_is_trained(name: str, budget: float, scope: str, size: int, kinds: set[str]) -> None:
    if not name.startswith("cifar"):
        pytest.importorskip("torchvision" if "/" in name else "timm")
    exact, limit = (torch.float64, 1e-10) if name != "cifar_resnet20" else (torch.float32, 1e-5)
    torch.manual_seed(0)
    model = randomised(make_model(name, 10)).to(exact)
    x = torch.randn(2, 3, size, size, dtype=exact)
    graph = narrower.trace(model, x)
    dense = outputs(model, x)
    resrep = narrower.ResRep(model, graph, macs=budget, steps=8, scope=scope)  # type: ignore[arg-type]
    assert kinds <= {s.kind for s in resrep.placement.sites.values()}
    assert difference(dense, outputs(model, x)) < limit
    optimizer = sgd(resrep, lr=1e-4)
    resrep_training.train(resrep, optimizer, x, 4)
    before = outputs(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert difference(before, outputs(resrep.merge(), x)) < limit
    assert resrep.shrink() < 1
    assert difference(before, outputs(model, x)) < limit
    resrep_training.train(resrep, optimizer, x, 4)
    small = resrep.merge()
    assert difference(outputs(model, x), outputs(small, x)) < limit
    cost = narrower.measure(small, x, seconds=0)
    assert cost["macs"] <= budget * resrep.dense["macs"]
    assert cost["macs"] == pytest.approx(resrep.reached() * resrep.dense["macs"])
