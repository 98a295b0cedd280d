"""Each mode of restructure, on a network with a full, a block-diagonal and a diagonal compactor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.devices import without_float64
from support.resrep_training import difference, outputs, randomised
from torch import nn

import narrower
from narrower.graph.selection import Kept
from narrower.resrep.compactor import NAME, Compactor, rows_like
from narrower.resrep.restructure import Mode, restructure

X = torch.randn(4, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
MODES: list[Mode] = ["cut", "fold", "freeze", "merge"]


def compacted() -> tuple[Any, narrower.ResRep, Kept]:
    """A network whose compactors are no identities, some of their rows zero, and what stays without these."""
    torch.manual_seed(0)
    model = randomised(nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8), nn.Sigmoid(),  # what is zero becomes 0.5
        nn.Conv2d(8, 40, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 5))).double().eval()
    resrep = narrower.ResRep(model, narrower.trace(model, X), macs=0.9, steps=10, scope="all")
    assert {s.kind for s in resrep.placement.sites.values()} == {"full", "block", "diagonal"}
    with torch.no_grad():
        for c in resrep.compactors().values():
            c.weight.add_(0.1 * torch.randn_like(c.weight))
            c.gone.view(2, -1)[:, 0] = 1  # equally many in each group of the grouped convolution
            c.weight.masked_fill_(rows_like(c.gone.bool(), c.weight), 0)
    kept = resrep.remaining()
    assert all(len(kept.keep[n]) < resrep.graph[n].size for n in resrep.placement.rows)
    return model, resrep, kept


def test_a_device_without_float64_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, resrep, kept = compacted()
    model.float()
    before = outputs(model, X.float())
    with without_float64(monkeypatch, "resrep.restructure", "narrowing.fold"):
        restructure(model, resrep.placement, resrep.kept, kept, "fold")
    assert difference(before, outputs(model, X.float())) < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_computes_what_was_trained(mode: Mode) -> None:
    model, resrep, kept = compacted()
    before = outputs(model, X)
    restructure(model, resrep.placement, resrep.kept, kept, mode)
    assert difference(before, outputs(model, X)) < 1e-12
    assert model[3].weight.shape[1] * 2 == len(kept.keep["0"])
    assert model[10].in_features == len(kept.keep["6"])


@pytest.mark.parametrize("mode", MODES)
def test_layers_before_compactors_narrow_unless_only_rows_are_cut(mode: Mode) -> None:
    model, resrep, kept = compacted()
    restructure(model, resrep.placement, resrep.kept, kept, mode)
    assert model[0].out_channels == (8 if mode == "cut" else len(kept.keep["0"]))
    assert len(model[6].weight) == len(kept.keep["6"]), "a diagonal compactor has nothing to gain from the rows"


def test_cut_rows_are_the_kept_rows() -> None:
    model, resrep, kept = compacted()
    dense = {n: c.weight.detach().clone() for n, c in resrep.compactors().items()}
    restructure(model, resrep.placement, resrep.kept, kept, "cut")
    for name, c in resrep.compactors().items():
        rows = dense[name].flatten(0, -2) if dense[name].dim() > 1 else dense[name]
        assert torch.equal(c.weight.flatten(0, -2) if c.weight.dim() > 1 else c.weight, rows[torch.as_tensor(c.rows)])
        assert not c.gone.any() and len(c.rows) == len(c.gone) < len(dense[name].reshape(len(rows), -1))


def test_folded_compactors_are_diagonals_of_their_row_norms() -> None:
    model, resrep, kept = compacted()
    norms = resrep.norms()["0"][kept.keep["0"]]
    restructure(model, resrep.placement, resrep.kept, kept, "fold")
    c = resrep.compactors()["1"]
    torch.testing.assert_close(c.weight.detach(), torch.diag(torch.as_tensor(norms)))


def test_a_row_that_stays_and_is_nearly_zero_can_still_grow_after_it_is_folded() -> None:
    """A diagonal compactor of nothing would have no gradient left to come back by."""
    model, resrep, kept = compacted()
    c = resrep.compactors()["1"]
    with torch.no_grad():
        c.weight[kept.keep["0"][0]] = 0
    before = outputs(model, X)
    restructure(model, resrep.placement, resrep.kept, kept, "fold")
    assert difference(before, outputs(model, X)) < 1e-12
    assert 0 < float(c.weight.detach().diagonal().min()) <= 1e-3


def test_frozen_compactors_are_identities_without_gradient() -> None:
    model, resrep, kept = compacted()
    restructure(model, resrep.placement, resrep.kept, kept, "freeze")
    assert all(c.frozen and not c.weight.requires_grad for c in resrep.compactors().values())


def test_merged_networks_have_no_compactors() -> None:
    model, resrep, kept = compacted()
    restructure(model, resrep.placement, resrep.kept, kept, "merge")
    assert not any(hasattr(m, NAME) or m._forward_hooks or isinstance(m, Compactor) for m in model.modules())
