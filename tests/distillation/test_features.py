"""Taps: what each stage gives, on channels that both networks have."""

from __future__ import annotations

from typing import Any

import torch
from support.networks import Head, unit
from torch import nn

import narrower
from narrower.distillation.features import find_taps, stage_ends
from narrower.graph.selection import Kept
from narrower.models.resnet import cifar_resnet20


def test_a_resnet_is_tapped_behind_each_stage() -> None:
    model = cifar_resnet20()
    graph = narrower.trace(model, torch.zeros(1, 3, 32, 32))
    assert stage_ends(graph)[1:] == ["layer2.0.conv1.weight", "layer3.0.conv1.weight", "linear.weight"]
    plan = narrower.plan(graph, narrower.magnitude(model, graph), remove=0.5)
    small: Any = narrower.narrow(model, plan)
    for tap in find_taps(model, Kept(graph, plan.keep)):
        assert tap.module != "conv1"  # it reads images
        assert len(tap.channels) == small.get_submodule(tap.module).weight.shape[1]


def test_channels_of_a_grouped_reader_are_counted_over_all_its_groups() -> None:
    model = nn.Sequential(unit(3, 12), unit(12, 8, stride=2, groups=2), Head(8))
    graph = narrower.trace(model, torch.zeros(1, 3, 8, 8))
    kept = Kept.without(graph, [("0.0", torch.tensor([1, 7]).numpy())])
    tap = next(t for t in find_taps(model, kept) if t.module == "1.0")
    assert tap.channels.tolist() == [0, 2, 3, 4, 5, 6, 8, 9, 10, 11]
