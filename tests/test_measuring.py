"""measure and recalibrate."""

from __future__ import annotations

import pytest
import torch
from support import networks, reference
from support.networks import IMAGES, PATTERNS, Plain, images
from torch import Tensor, nn

import narrower
from narrower import measuring


@pytest.mark.parametrize("name", PATTERNS)
def test_measure_counts_what_the_plan_predicts(name: str) -> None:
    case = PATTERNS[name]
    model = case.make()
    plan = reference.halved(model, case.inputs)
    for net, k in ((model, 0), (narrower.narrow(model, plan), 1)):
        found = narrower.measure(net, case.inputs, seconds=0.0)
        assert set(found) == {"macs", "params", "latency_ms"}
        assert found["macs"] == pytest.approx(plan.macs[k]) == pytest.approx(reference.macs(net, case.inputs))
        assert found["params"] == plan.params[k] == reference.params(net)
        assert found["latency_ms"] > 0


def test_measure_and_trace_see_into_a_compiled_network_and_leave_it_compiled() -> None:
    model = Plain()
    model.compile(backend="eager")
    model.conv2.compile(backend="eager")
    assert narrower.measure(model, IMAGES, seconds=0.0)["macs"] == reference.macs(Plain(), IMAGES)
    assert [g.name for g in narrower.trace(model, IMAGES).free] == ["conv1", "conv2", "conv3"]
    assert model._compiled_call_impl is not None and model.conv2._compiled_call_impl is not None


def test_measure_takes_a_network_that_asks_for_values() -> None:
    found = narrower.measure(networks.Branching(), IMAGES, seconds=0.0)
    assert found["macs"] == reference.macs(networks.Branching(), IMAGES)


class ListOfImages(nn.Module):
    """Takes images as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)

    def forward(self, images: list[Tensor], targets: list[Tensor] | None = None) -> Tensor:
        return self.head(self.norm(self.conv(torch.stack(images))).relu())


@pytest.mark.parametrize("many", [1, 2, 5])
def test_multiply_adds_are_for_one_image_of_a_list(many: int) -> None:
    model, inputs = ListOfImages().eval(), ([torch.randn(3, 8, 8)] * many,)
    graph = narrower.trace(model, inputs)
    plan = narrower.plan(graph, narrower.random(graph), remove=0.5)
    macs = 64 * (3 * 6 * 9 + 6 * 4)
    assert plan.macs[0] == macs == narrower.measure(model, inputs, seconds=0.0)["macs"]


def test_what_needs_no_stacked_tensors_takes_batches_of_images_and_targets() -> None:
    model = ListOfImages().eval()
    batches = [([torch.randn(3, 8, 8) for _ in range(4)], [torch.zeros(1)] * 4) for _ in range(3)]
    graph = narrower.trace(model, (batches[0][0],))
    assert narrower.hrank(model, graph, batches)["conv"].shape == (6,)
    assert narrower.taylor(model, graph, batches, lambda out, targets: out.mean() + len(targets))["conv"].any()
    assert narrower.recalibrate(model, batches, images=6) == 6
    for scores in (narrower.obs, lambda *a: narrower.sensitivity(a[0], a[1], narrower.random(a[1]), a[2])):
        with pytest.raises(narrower.DataError, match="a list of images"):
            scores(model, graph, batches)


def test_measure_leaves_modes_and_statistics() -> None:
    model = Plain().train()
    model.bn3.eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    narrower.measure(model, IMAGES, seconds=0.0)
    assert model.training and model.bn1.training and not model.bn3.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_forward_ends_when_the_device_has_done_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU works on after the call: without waiting, the time is that of giving it the work."""
    waited: list[torch.device] = []
    monkeypatch.setattr(measuring, "synchronize", waited.append)
    narrower.measure(Plain().to("meta"), IMAGES.to("meta"), seconds=0.0)
    assert len(waited) == 3 + 5 and {*waited} == {torch.device("meta")}


def test_a_slower_network_is_measured_slower() -> None:
    class Slow(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.conv, self.times = nn.Conv2d(3, 3, 3, padding=1), times

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.times):
                x = self.conv(x)
            return x

    a, b = (narrower.measure(Slow(n), images(size=32), seconds=0.05)["latency_ms"] for n in (1, 20))
    assert b > 3 * a
