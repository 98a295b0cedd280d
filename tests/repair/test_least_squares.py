"""Ridge regression from moments: against a direct solution, and what held-out samples decide."""

from __future__ import annotations

import torch

from narrower.repair.least_squares import Correction, choose, moments, solve, squared_error, together


def data(samples: int, inputs: int = 6, outputs: int = 4, groups: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(groups, samples, inputs, dtype=torch.float64) + 1
    return x, torch.randn(groups, samples, outputs, dtype=torch.float64) + x.sum(2, keepdim=True)


def test_the_solution_is_that_of_the_augmented_system() -> None:
    x, r = data(50)
    found = solve(moments(x, r), 0.1)
    for g in range(2):
        centred = x[g] - x[g].mean(0)
        ridge = 0.1 * centred.var(0, unbiased=False).mean()
        rows = torch.cat([centred, (50 * ridge).sqrt() * torch.eye(6, dtype=torch.float64)])
        targets = torch.cat([r[g] - r[g].mean(0), torch.zeros(6, 4, dtype=torch.float64)])
        want = torch.linalg.lstsq(rows, targets).solution.T
        torch.testing.assert_close(found.weight[g], want)
        torch.testing.assert_close(found.intercept[g], r[g].mean(0) - want @ x[g].mean(0))


def test_the_error_from_moments_is_that_of_the_samples() -> None:
    x, r = data(30)
    c = Correction(torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64))
    scale = torch.rand(2, 4, dtype=torch.float64)
    left = (r - x @ c.weight.transpose(1, 2) - c.intercept[:, None]) * scale[:, None]
    torch.testing.assert_close(squared_error(moments(x, r), c, scale), float(left.square().sum() / 30))


def test_moments_of_two_sets_are_those_of_both() -> None:
    x, r = data(20)
    both = together(moments(x[:, :8], r[:, :8]), moments(x[:, 8:], r[:, 8:]))
    for a, b in zip(both, moments(x, r), strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b))


def test_what_can_be_explained_is() -> None:
    x, _ = data(200)
    r = x @ torch.randn(2, 6, 4, dtype=torch.float64) + 3
    choice = choose(moments(x[:, :150], r[:, :150]), moments(x[:, 150:], r[:, 150:]), torch.ones(2, 4, dtype=torch.float64))
    assert choice.strength == 1e-4 and choice.after < 1e-5 * choice.before


def test_fewer_samples_than_inputs_do_not_ruin_the_layer() -> None:
    """Noise fits itself: on held-out samples no correction is better, or a strong ridge that hardly changes anything."""
    x, r = torch.randn(1, 40, 60, dtype=torch.float64), torch.randn(1, 40, 5, dtype=torch.float64)
    choice = choose(moments(x[:, :30], r[:, :30]), moments(x[:, 30:], r[:, 30:]), torch.ones(1, 5, dtype=torch.float64))
    assert choice.after <= choice.before
    assert choice.correction is None or (choice.strength or 0) >= 1
