"""Images that judge are not fitted, and batches are checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.devices import APPLE, Apple
from torch import Tensor, nn

import narrower
from narrower.repair import held_out
from narrower.repair.held_out import checked_inputs, split


def test_no_image_is_both_fitted_and_held_out() -> None:
    x = torch.arange(100).view(-1, 1)
    fit, held_out = split([(x[:37], 37), (x[37:], 63)], 6, 64)
    a, b = (sorted(v for t, _ in part for v in t.flatten().tolist()) for part in (fit, held_out))
    assert sorted(a + b) == list(range(100)) and b == list(range(5, 100, 6))
    assert all(len(t) == n for t, n in fit + held_out)


def test_no_more_images_are_held_out_than_asked() -> None:
    x = torch.arange(100).view(-1, 1)
    fit, held_out = split([(x, 100)], 4, 3)
    assert torch.cat([t for t, _ in held_out]).flatten().tolist() == [3, 7, 11] and sum(n for _, n in fit) == 97


def test_a_gpu_gets_more_images_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(100.0).view(-1, 1)
    for chunk, here, there in ((5, [5, 5, 5, 1], [16]), (1, [1] * 16, [8, 8])):
        monkeypatch.setattr(held_out, "CHUNK", chunk)
        assert [n for _, n in split([(x, 100)], 6, 64)[1]] == here
        with Apple():
            assert [n for _, n in split([(x.to(APPLE), 100)], 6, 64)[1]] == there


def test_batches_become_inputs_or_an_error_says_what_is_wrong() -> None:
    model = nn.Linear(3, 2)

    def checked(*batches: Any, images: int | None = None) -> list[tuple[Any, int]]:
        return checked_inputs("test", batches, model, images, 4, "wish")

    found = checked((torch.zeros(3, 3), torch.zeros(3)), torch.ones(2, 3))
    assert [n for _, n in found] == [3, 2] and all(isinstance(x, Tensor) for x, _ in found)
    assert [n for _, n in checked(torch.ones(9, 3), images=4)] == [4]
    wrong: list[tuple[list[Any], str]] = [
        ([], r"test got 0 images: give it 4 at least, better some hundreds \(wish\)"),
        ([torch.ones(3, 3)], "got 3 images"),
        ([torch.ones(3, 3), torch.ones(3, 4)], r"batch 1 has shape \(3, 4\), the first one \(3, 3\)"),
        ([{"x": torch.ones(3, 3), "y": torch.ones(2, 3)}], "batch 0 has shape"),
        ([torch.ones(3, 3), torch.full((3, 3), torch.inf)], "batch 1 is not finite"),
        (["image.jpg"], "batch 0 is a str without a tensor"),
        ([torch.ones(())], "batch 0 is a Tensor without a tensor"),
    ]
    for batches, message in wrong:
        with pytest.raises(narrower.DataError, match=message):
            checked(*batches)
