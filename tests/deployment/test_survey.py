"""survey: every layer of the forward with its geometry, and sizes to measure that exist and say enough."""

from __future__ import annotations

import math

import pytest
import torch
from support import reference
from support.latency import survey_of
from support.networks import PATTERNS
from support.plans import graph_of
from torch import nn

import narrower
from narrower.deployment.layer_times import Copies, channels, input_of
from narrower.deployment.survey import share_of, sizes_for, survey


@pytest.mark.parametrize("name", ["plain", "residual", "depthwise", "grouped", "transposed", "volume", "tokens", "shared"])
def test_layers_are_those_of_the_forward_with_their_sizes(name: str) -> None:
    """Their multiply-adds, from kinds and sizes alone, are those that PyTorch counts."""
    found, case = survey_of(name), PATTERNS[name]
    total = 0.0
    for layer in found.layers:
        kind = found.kinds[layer.kind]
        read = math.prod(kind.size) if kind.operator == "conv_transpose" else layer.positions / batch(case.inputs)
        total += layer.calls * math.prod(layer.sizes) * math.prod(kind.kernel) * read
    assert total == pytest.approx(reference.macs(case.make(), case.inputs))


def batch(inputs: object) -> int:
    first = inputs[0] if isinstance(inputs, tuple) else inputs
    return int(first.shape[0]) if isinstance(first, torch.Tensor) else 1


@pytest.mark.parametrize("name", ["plain", "residual", "depthwise", "grouped", "transposed", "volume", "tokens"])
def test_every_job_can_be_run(name: str) -> None:
    jobs = list(survey_of(name).jobs())
    assert jobs
    for job in jobs:
        network = Copies(job, 2)
        out = network(input_of(job, 2, torch.float32, "cpu"))
        weight = next(network.parameters())
        assert tuple(weight.shape[:2]) == tuple(job["sizes"]), "the sizes are those of the weight"
        groups = max(1, job["groups"] or job["sizes"][0])
        made = job["sizes"][1] * groups if job["operator"] == "conv_transpose" else job["sizes"][0]
        assert out.shape == (2, made)
        assert channels(job)[0] % groups == 0


def test_pinned_dimensions_stay_as_they_are() -> None:
    found = survey_of("plain")
    stem = next(layer for layer in found.layers if layer.tensor == "conv1.weight")
    assert {n1 for _, n1 in sizes_for(graph_of("plain"), "conv1.weight", found.kinds[stem.kind])} == {3}
    last = next(layer for layer in found.layers if layer.tensor == "fc.weight")
    assert {sizes[0] for kind, sizes in found.points if kind == last.kind} == {5}
    assert len({sizes for kind, sizes in found.points if kind == last.kind}) > 1


def test_neighbouring_widths_are_measured_once_for_all_image_sizes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 40, 3), nn.Conv2d(40, 6, 3)).eval()
    x = torch.zeros(1, 3, 32, 32)
    found = survey(model, narrower.trace(model, x), x)
    assert [(dim, widths) for _, dim, widths, _ in found.steps] == [
        (0, (64, 63, 62, 60, 56, 48, 32)), (1, (64, 63, 62, 60, 56, 48, 32))]
    assert not survey_of("plain").steps, "its layers are too narrow to tell"


def test_shares_are_round_and_whole_groups() -> None:
    assert [share_of(n, 0.5, 1) for n in (256, 96, 40, 10, 3, 1)] == [128, 48, 16, 4, 2, 1]
    assert share_of(12, 0.25, 4) == 4 and share_of(64, 0.5, 32) == 32 and graph_of("plain")
