"""On a device without float64 everything gives what it gives on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support.devices import APPLE, apple
from support.networks import Head, unit
from support.resrep_training import randomised
from torch import Tensor, nn

import narrower
from narrower import inputs
from narrower.narrowing.narrow import RECORD
from narrower.surgery.copying import moved


class Given(NamedTuple):
    """What functions are called with. `images`: batches of the device."""

    model: nn.Module
    small: nn.Module
    graph: narrower.Graph
    plan: narrower.Plan
    images: list[Tensor]


def given() -> Given:
    torch.manual_seed(0)
    model = randomised(nn.Sequential(unit(3, 12), unit(12, 10, stride=2), unit(10, 8), Head(8))).eval()
    images = list(torch.randn(48, 3, 8, 8).split(16))
    graph = narrower.trace(model, images[0][:1])
    plan = narrower.plan(graph, narrower.magnitude(model, graph), remove=0.4)
    return Given(model, narrower.narrow(model, plan), graph, plan, images)


def weights(found: Any) -> dict[str, Tensor]:
    """What a repair or a training has made."""
    assert found.model.get_parameter("0.0.weight").device == found.model.get_buffer("0.1.running_mean").device
    assert hasattr(found.model, RECORD)
    return {name: t.cpu() for name, t in found.model.state_dict().items()}


CALLS: dict[str, Callable[[Given], Any]] = {
    "magnitude": lambda g: dict(narrower.magnitude(g.model, g.graph)),
    "fpgm": lambda g: dict(narrower.fpgm(g.model, g.graph)),
    "bn_scale": lambda g: dict(narrower.bn_scale(g.model, g.graph)),
    "hrank": lambda g: dict(narrower.hrank(g.model, g.graph, g.images)),
    "obs": lambda g: dict(narrower.obs(g.model, g.graph, g.images)),
    "sensitivity": lambda g: [
        c.damages for c in narrower.sensitivity(g.model, g.graph, narrower.magnitude(g.model, g.graph), g.images).curves
    ],
    "reconstruct": lambda g: weights(narrower.reconstruct(g.model, g.small, g.plan, g.images)),
    "verify": lambda g: narrower.verify(g.model, g.small, g.plan, g.images[0]).error,
    "verify in its own dtype": lambda g: narrower.verify(g.model, g.small, g.plan, g.images[0], dtype=None).error,
    "tune": lambda g: weights(narrower.tune(g.model, g.small, g.plan, g.images, steps=3, lr=1e-3)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_device_without_float64_gives_what_the_cpu_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = given()
    want = CALLS[name](here)
    with apple(monkeypatch):
        there = here._replace(
            model=moved(here.model, APPLE), small=moved(here.small, APPLE), images=[x.to(APPLE) for x in here.images]
        )
        with pytest.raises(TypeError, match="float64"):
            there.images[0].double()
        assert there.images[0].device == inputs.device_of(there.model) == APPLE
        found = CALLS[name](there)
        assert inputs.device_of(there.model) == inputs.device_of(there.small) == APPLE
    torch.testing.assert_close(found, want, rtol=0, atol=0)
