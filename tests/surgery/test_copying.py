"""Copies of a model are complete and share nothing that they should not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import reference
from support.networks import IMAGES, PATTERNS
from torch import nn

from narrower.surgery.copying import duplicate, loose_tensors, moved
from narrower.surgery.walk import named_tensors


@pytest.mark.parametrize("name", PATTERNS)
def test_a_duplicate_has_the_given_tensors_and_everything_else_of_its_own(name: str) -> None:
    case = PATTERNS[name]
    model = case.make().eval()
    given: dict[int, torch.Tensor] = {}
    for t in named_tensors(model).values():
        new = t.detach().clone()
        given.setdefault(id(t), nn.Parameter(new) if isinstance(t, nn.Parameter) else new)
    dup = duplicate(model, given)
    assert all(named_tensors(dup)[n] is given[id(t)] for n, t in named_tensors(model).items())
    assert not {id(m) for m in model.modules()} & {id(m) for m in dup.modules()}
    a, b = (reference.flat(reference.call(m, case.inputs)) for m in (model, dup))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_duplicate_keeps_what_refers_to_its_own_parts() -> None:
    class Cyclic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.parts = [self.conv, {"again": self.conv}]
            self.config = {"width": 4}
            self.me = (self,)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.parts[0] is self.conv and self.me[0] is self
            return self.conv(x)

    model = Cyclic()
    dup = duplicate(model, {})
    assert dup.parts[0] is dup.conv is dup.parts[1]["again"] is not model.conv  # type: ignore[index]
    assert dup.me[0] is dup and dup.config is not model.config  # type: ignore[index]
    dup(IMAGES)


def test_a_moved_model_is_a_copy_with_its_loose_tensors_and_the_same_model_where_it_is_already() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[0].scale = torch.ones(4)
    model[1].weight = model[0].bias  # tied
    there: Any = moved(model, torch.device("meta"))
    tensors = [*named_tensors(there).values(), *loose_tensors(there)]
    assert {t.device.type for t in tensors} == {"meta"} and len(tensors) == 8
    assert there[1].weight is there[0].bias and isinstance(there[0].bias, nn.Parameter)
    assert {t.device.type for t in (*named_tensors(model).values(), *loose_tensors(model))} == {"cpu"}
    assert moved(model, torch.device("cpu")) is model
