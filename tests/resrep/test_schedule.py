"""The schedule of ResRep in numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import narrower
from narrower.resrep.schedule import decouples_penalty


def test_published_settings_are_those_of_the_paper() -> None:
    s = narrower.Forgetting.published(391).over(391 * 180, 1000)
    assert (s.strength, s.warmup_steps, s.mask_interval, s.rows_per_update, s.momentum) == (1e-4, 1955, 200, 4, 0.99)
    assert (s.forget_steps, s.threshold) == (0, 1e-5)


@pytest.mark.parametrize(("steps", "channels", "want"), [
    (1000, 100, (50, 5, 100 / 30, 60, 0.95)), (40_000, 600, (2000, 200, 20, 2400, 0.99)), (4, 7, (0, 1, 7, 1, 0.0)),
])
def test_what_is_not_given_follows_from_the_number_of_steps(steps: int, channels: int, want: tuple[float, ...]) -> None:
    """Channels are chosen from 5 to 20 % of the steps, every half percent."""
    s = narrower.Forgetting().over(steps, channels)
    assert (s.warmup_steps, s.mask_interval, s.rows_per_update, s.forget_steps, s.momentum) == pytest.approx(want)


@pytest.mark.parametrize(("momentum", "decoupled"), [(0.9, False), (0.9, True), (0.0, False)])
def test_chosen_rows_reach_zero_as_soon_under_momentum(momentum: float, decoupled: bool) -> None:
    """As torch's SGD adds gradients up. What is decoupled is not added up."""
    fast = narrower.Forgetting(forget_steps=500).pulls(0.1, momentum, decoupled)[1]
    length, velocity, steps = 1.0, 0.0, 0
    while length > 1e-9:
        velocity = momentum * velocity + fast
        length, steps = length - (fast if decoupled else 0.1 * velocity), steps + 1
    assert 500 <= steps < 515


def test_no_chosen_row_is_pulled_less_than_the_others() -> None:
    assert narrower.Forgetting(strength=1.0, forget_steps=50).pulls(10.0, 0.0) == (1.0, 1.0)
    assert narrower.Forgetting(strength=1e-4, forget_steps=0).pulls(0.01, 0.9) == (1e-4, 1e-4)


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_chosen_row_goes_from_one_to_zero_in_forget_steps(decoupled: bool) -> None:
    settings = narrower.Forgetting(forget_steps=50, momentum=0.0).over(1000, 100)
    _, fast = settings.pulls(0.01, 0.0, decoupled)
    assert 50 * fast * (1.0 if decoupled else 0.01) == pytest.approx(1)


def test_momentum_is_scaled_where_learning_rates_jump_up_and_nowhere_else() -> None:
    settings = narrower.Forgetting().over(1000, 100)
    assert settings.share_of_momentum(0.1, 0.01) == pytest.approx(0.1)
    assert settings.share_of_momentum(0.1, 0.0) == pytest.approx(1e-11)
    assert {settings.share_of_momentum(lr, 0.1) for lr in (0.0, 0.01, 0.1, 0.105)} == {1.0}
    assert narrower.Forgetting.published(9).over(1000, 100).share_of_momentum(0.1, 0.01) == 1


def test_the_penalty_is_decoupled_for_adaptive_optimizers_only() -> None:
    w = [torch.nn.Parameter(torch.zeros(1))]
    for make, decoupled in ((torch.optim.SGD, False), (torch.optim.AdamW, True)):
        optimizer = make(w)
        assert decouples_penalty(optimizer) == decoupled
        wrapped: Any = SimpleNamespace(optimizer=optimizer)  # as accelerate does
        assert decouples_penalty(wrapped) == decoupled


def test_rows_are_chosen_every_two_hundred_steps_at_least_however_long_the_training() -> None:
    assert [narrower.Forgetting().over(steps, 100).mask_interval for steps in (10, 1000, 40_000, 1_000_000)] == [1, 5, 200, 200]


@pytest.mark.parametrize("setting", ["strength", "warmup_steps", "mask_interval", "rows_per_update", "forget_steps", "momentum",
                                     "lr_scale", "threshold"])
def test_settings_that_are_no_numbers_are_refused(setting: str) -> None:
    """With them no row was ever chosen, or all were, without a word."""
    wrong: Any
    for wrong in (-1, float("nan"), "1"):
        with pytest.raises(narrower.ConfigError, match=f"{setting}=.*give a"):
            narrower.Forgetting(**{setting: wrong})


def test_steps_are_whole_and_rankings_known() -> None:
    settings: dict[str, Any]
    for settings in ({"warmup_steps": 2.5}, {"mask_interval": 0}, {"momentum": 1.5}, {"ranking": "size"}):
        with pytest.raises(narrower.ConfigError, match=f"{next(iter(settings))}="):
            narrower.Forgetting(**settings)
