"""Ridge regression from moments: against a direct solution, and what held-out samples decide."""

from __future__ import annotations

import pytest
import torch

from narrower.repair import least_squares
from narrower.repair.least_squares import (
    STRENGTHS,
    Correction,
    Moments,
    choose,
    lowest,
    moments,
    solve,
    squared_error,
    together,
)


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


def test_the_error_is_the_mean_of_scaled_squares() -> None:
    x, r = data(30)
    c = Correction(torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64))
    scale = torch.rand(2, 4, dtype=torch.float64)
    want = sum(float(((r[g, p] - c.weight[g] @ x[g, p] - c.intercept[g]) * scale[g]).square().sum())
               for g in range(2) for p in range(30)) / 30
    assert squared_error(x, r, c, scale) == pytest.approx(want)
    assert squared_error(x.float(), r.float(), c, scale) == pytest.approx(want, rel=1e-5)


def test_moments_of_two_sets_are_those_of_both() -> None:
    x, r = data(20)
    both = together(moments(x[:, :8], r[:, :8]), moments(x[:, 8:], r[:, 8:]))
    for a, b in zip(both, moments(x, r), strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b))


def test_what_can_be_explained_is() -> None:
    x, _ = data(200)
    r = x @ torch.randn(2, 6, 4, dtype=torch.float64) + 3
    choice = choose(x, r, torch.arange(200) >= 150, torch.ones(2, 4, dtype=torch.float64))
    assert choice.strength == 1e-4 and choice.after < 1e-5 * choice.before


def test_without_a_place_for_an_intercept_none_is_fitted() -> None:
    x, _ = data(200)
    x = x + 2.0
    r = x @ torch.randn(2, 6, 4, dtype=torch.float64) + 3.0
    held_out, ones = torch.arange(200) >= 150, torch.ones(2, 4, dtype=torch.float64)
    choice = choose(x, r, held_out, ones, intercept=False)
    assert choice.correction is not None and choice.strength is not None and not choice.correction.intercept.any()
    best = torch.linalg.lstsq(x, r).solution.transpose(1, 2)
    left, least = (squared_error(x, r, Correction(w, torch.zeros_like(ones)), ones) for w in (choice.correction.weight, best))
    dropped = choose(x, r, held_out, ones).correction
    assert dropped is not None
    assert left < 1.01 * least < 0.1 * squared_error(x, r, dropped._replace(intercept=torch.zeros_like(ones)), ones)


def test_fewer_samples_than_inputs_do_not_ruin_the_layer() -> None:
    """Noise fits itself: on held-out samples no correction is better, or a strong ridge that hardly changes anything."""
    x, r = torch.randn(1, 40, 60, dtype=torch.float64), torch.randn(1, 40, 5, dtype=torch.float64)
    choice = choose(x, r, torch.arange(40) >= 30, torch.ones(1, 5, dtype=torch.float64))
    assert choice.after <= choice.before
    assert choice.correction is None or (choice.strength or 0) >= 1


def test_where_inputs_say_nothing_the_intercept_alone_is_fitted() -> None:
    x, ones = torch.randn(1, 60, 40, dtype=torch.float64), torch.ones(1, 5, dtype=torch.float64)
    r = 3 + 0.1 * torch.randn(1, 60, 5, dtype=torch.float64)
    choice = choose(x, r, torch.arange(60) >= 40, ones)
    assert choice.strength == float("inf") and choice.correction is not None and not choice.correction.weight.any()
    torch.testing.assert_close(choice.correction.intercept, r.mean(1))


def test_weights_stay_where_nothing_helps_on_held_out_samples() -> None:
    held_out = torch.arange(40) >= 30
    x = torch.randn(1, 40, 6, dtype=torch.float64)
    r = torch.where(held_out, -1.0, 1.0).double().view(1, 40, 1).expand(1, 40, 5)
    choice = choose(x, r, held_out, torch.ones(1, 5, dtype=torch.float64))
    assert choice.correction is None and choice.strength is None and choice.after == choice.before


@pytest.mark.parametrize("best", range(7))
def test_the_walk_finds_the_lowest_of_errors_that_fall_and_rise(best: int) -> None:
    values, tried = list(range(7)), []

    def error(value: float) -> float:
        tried.append(value)
        return abs(value - best)

    assert lowest(error, values) == best
    assert len(set(tried)) <= abs(best - 3) + 3


def test_the_ridge_is_the_best_on_held_out_samples_and_the_fit_uses_all() -> None:
    torch.manual_seed(3)
    held_out = torch.arange(60) % 3 == 0
    scale = torch.ones(1, 4, dtype=torch.float64)
    seen = set()
    for noise in (0.01, 1.0, 10.0, 100.0):
        x = torch.randn(1, 60, 20, dtype=torch.float64)
        r = x @ torch.randn(1, 20, 4, dtype=torch.float64) + noise * torch.randn(1, 60, 4, dtype=torch.float64)
        fit, judge = moments(x[:, ~held_out], r[:, ~held_out]), (x[:, held_out], r[:, held_out])
        errors = {s: squared_error(*judge, solve(fit, s), scale) for s in STRENGTHS}
        choice = choose(x, r, held_out, scale)
        if choice.strength in errors:
            assert choice.after == min(errors.values()) and errors[choice.strength] == choice.after
            torch.testing.assert_close(choice.correction, solve(moments(x, r), choice.strength))
            seen.add(choice.strength)
    assert len(seen) > 1


@pytest.mark.parametrize("least", [1e-2, 100.0], ids=["one that was tried", "a larger one"])
def test_a_ridge_that_all_samples_do_not_take_grows(least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = data(200)
    r, whole = x @ torch.randn(2, 6, 4, dtype=torch.float64), solve
    held_out = torch.arange(200) >= 150

    def failing(m: Moments, strength: float) -> Correction:
        if m.size == 200 and strength < least / 2:
            raise torch.linalg.LinAlgError("indefinite")
        return whole(m, strength)

    monkeypatch.setattr(least_squares, "solve", failing)
    choice = choose(x, r, held_out, torch.ones(2, 4, dtype=torch.float64))
    assert choice.strength == pytest.approx(least) and choice.after < choice.before
    assert choice.correction is not None and choice.correction.weight.any()
