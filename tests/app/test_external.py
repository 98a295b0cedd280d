"""Rows by torch-pruning: it narrows a copy to the budget, and what it cannot narrow stays whole."""

from __future__ import annotations

import pytest

pytest.importorskip("torch_pruning")
pytest.importorskip("timm")
pytest.importorskip("accelerate")
import torch
from torch import nn

import narrower
from narrower.app.external import EXTERNAL, narrowed, streams
from narrower.measuring import macs_of
from narrower.models import make_model


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(16, 10)).eval()


@pytest.mark.parametrize("method", EXTERNAL)
def test_a_copy_is_cut_to_just_below_the_budget(method: str) -> None:
    model, x = network(), torch.zeros(1, 3, 12, 12)
    before = macs_of(model, x)
    small = narrowed(model, x, method, 0.5)
    assert 0.4 < macs_of(small, x) / before <= 0.5 and macs_of(model, x) == before
    assert small(x).shape == (1, 10)


def test_an_unreachable_budget_is_named() -> None:
    with pytest.raises(narrower.NarrowerError, match="no ratio of channels .* leaves as little as 10 MACs"):
        narrowed(network(), torch.zeros(1, 3, 12, 12), "tp-magnitude", 10)


def test_streams_are_the_layers_that_write_with_others_or_cannot_go() -> None:
    model = make_model("cifar_resnet20", 10)
    graph = narrower.trace(model, torch.zeros(1, 3, 32, 32))
    found = {name for name, module in model.named_modules() if module in streams(model, graph)}
    assert "layer1.0.conv2" in found and "layer1.0.conv1" not in found and "layer3.2.conv1" not in found
