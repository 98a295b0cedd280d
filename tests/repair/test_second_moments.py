"""Weights repaired from second moments are least squares on the inputs, for every width from one factor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from narrower.repair import second_moments as module
from narrower.repair.patches import as_matrix, patches_at, sample_positions
from narrower.repair.second_moments import repaired_weights, second_moments


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(6, 4, 1, groups=2), nn.ConvTranspose2d(6, 5, 2, 2)],
                         ids=["conv", "grouped", "transposed"])
def test_each_width_is_the_ridge_solution_of_its_own(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_SAMPLES", 10**6)  # all positions
    model, x = nn.Sequential(layer).double().eval(), torch.randn(6, 6, 5, 5, dtype=torch.float64) + 0.5
    weight = model.get_parameter("0.weight").detach()
    m = second_moments(model, ["0.weight"], [(x[:4], 4), (x[4:], 2)])["0.weight"]
    groups = m.geometry.groups
    per_group = 6 // groups
    removed = [np.arange(per_group) < n for n in (1, 2)]
    found = repaired_weights(weight, m, [np.broadcast_to(r, (groups, per_group)) for r in removed])
    with torch.no_grad():
        out = model(x)
    at = sample_positions(out, 6, 10**6, torch.Generator())
    inputs, w = patches_at(x, m.geometry, at), as_matrix(weight, m.geometry)
    taps = inputs.shape[2] // per_group
    for r, result in zip(removed, found, strict=True):
        gone = torch.as_tensor(np.repeat(r, taps))
        new, bias = as_matrix(result.weight, m.geometry), result.intercept.view(groups, -1)
        assert not new[..., gone].any()
        for g in range(groups):
            kept = torch.cat([torch.ones(len(inputs[g]), 1, dtype=torch.float64), inputs[g][:, ~gone]], 1)
            lost = inputs[g][:, gone] @ w[g][:, gone].T
            ridge = module.STRENGTH * inputs[g].square().mean()
            diagonal = torch.full((kept.shape[1],), float(ridge), dtype=torch.float64)
            diagonal[0] = 1e-9
            change = torch.linalg.solve(kept.T @ kept / len(kept) + torch.diag(diagonal), kept.T @ lost / len(kept)).T
            torch.testing.assert_close(new[g][:, ~gone], w[g][:, ~gone] + change[:, 1:])
            torch.testing.assert_close(bias[g], change[:, 0])


def test_moments_that_rounding_made_indefinite_get_a_larger_ridge() -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    h = x.T @ x - 0.1 * torch.eye(5, dtype=torch.float64)
    factor = module.ridge_factor(h)
    assert factor.isfinite().all() and (factor.diagonal() > 0).all()


@pytest.mark.parametrize(("asked", "taken"), [(0, 4), (1, 8)])
def test_so_many_positions_are_sampled_for_each_input(asked: int, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_SAMPLES", 1)
    model = nn.Sequential(nn.Conv2d(8, 2, 1)).double().eval()
    m = second_moments(model, ["0.weight"], [(torch.randn(4, 8, 6, 6, dtype=torch.float64), 4)], asked)["0.weight"]
    assert int(torch.linalg.matrix_rank(m.mean[0])) == taken, "one position of each image, or two"


def test_sums_of_half_precision_do_not_overflow() -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 2, 1)), 100 * torch.rand(4, 2, 40, 40)
    want = second_moments(model, ["0.weight"], [(x, 4)])["0.weight"].mean
    found = second_moments(model.half(), ["0.weight"], [(x.half(), 4)])["0.weight"].mean
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, want, rtol=1e-2, atol=0)


def test_layers_with_too_many_inputs_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_INPUTS", 8)
    model = nn.Sequential(nn.Conv2d(2, 2, 2), nn.Conv2d(2, 2, 3))
    assert list(second_moments(model, ["0.weight", "1.weight"], [(torch.randn(4, 2, 6, 6), 4)])) == ["0.weight"]


def test_a_fused_kernel_of_an_encoder_layer_hides_no_layer() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 6, batch_first=True)).eval()
    assert list(second_moments(model, ["0.linear2.weight"], [(torch.randn(4, 5, 8), 4)])) == ["0.linear2.weight"]
