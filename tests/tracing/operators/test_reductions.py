"""Reductions, softmax, pooling and resizing: over space each channel for itself; over channels they mix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.operators import C, assert_each_for_itself, assert_mixed, assert_pinned, collected, units
from torch import Tensor

KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "mean of space": lambda x: x.mean((2, 3)),
    "keepdim": lambda x: x.amax((2, 3), keepdim=True) + x.sum(3, keepdim=True),
    "norm of space": lambda x: x.flatten(2).norm(dim=2),
    "softmax of space": lambda x: x.flatten(2).softmax(2),
    "max pool": lambda x: F.max_pool2d(x, 2),
    "average pool": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, (2, 3)) + F.adaptive_max_pool2d(x, (2, 3)),
    "upsampled": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear") + F.interpolate(x, scale_factor=2),
    "reflected": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "sampled": lambda x: F.grid_sample(x, torch.zeros(2, 3, 3, 2, device="meta"), align_corners=False),
    "unpooled": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), [2, 2]),
    "sorted": lambda x: x.sort(3, descending=True)[0] + torch.sort(x, dim=2, stable=True)[0],
    "largest": lambda x: x.flatten(2).topk(3)[0] + x.flatten(2).topk(3, 2)[1],
    "median": lambda x: x.flatten(2).median(2)[0] + x.nanmedian(3)[0].median(2, keepdim=True)[0].squeeze(2),
    "third": lambda x: x.kthvalue(3, 2)[0] + x.kthvalue(2, -2)[1] + x.mode(2)[0],
    "largest so far": lambda x: x.cummax(2)[0] + x.cummin(3)[0],
    "transformed": lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 2, s=(4, 6)) + torch.fft.fft(x, dim=2).real.abs(),
    "pooled rows": lambda x: F.avg_pool1d(x.flatten(2), 3),
}
MIXED: dict[str, Callable[[Tensor], Any]] = {
    "softmax": lambda x: x.softmax(1), "log_softmax": lambda x: x.log_softmax(1), "mean": lambda x: x.mean(1),
    "sum": lambda x: x.sum((1, 2)), "max": lambda x: x.amax(1), "max with indices": lambda x: x.max(1),
    "values of a minimum": lambda x: x.min(1)[0].relu(),
    "std": lambda x: x.std(1), "norm": lambda x: x.norm(dim=1), "all": lambda x: x.mean(), "cumsum": lambda x: x.cumsum(1),
    "logsumexp": lambda x: x.logsumexp(1),
}
NUMBERED: dict[str, Callable[[Tensor], Any]] = {
    "argmax": lambda x: x.argmax(1), "argmin": lambda x: x.argmin(1, keepdim=True), "argmax of all": lambda x: x.argmax(),
    "max": lambda x: x.max(1)[1] + 1, "min": lambda x: x.min(1, keepdim=True)[1].float(),
}
PINNED: dict[str, Callable[[Tensor], Any]] = {
    "pooled channels": lambda x: F.max_pool1d(x.mean(3).transpose(1, 2), 2),
    "grid": lambda x: F.grid_sample(torch.zeros(2, 3, 3, 3, device="meta"), x[:, :2].permute(0, 2, 3, 1), align_corners=False),
}


@pytest.mark.parametrize("name", KEPT)
def test_each_channel_for_itself(name: str) -> None:
    assert_each_for_itself(KEPT[name])


@pytest.mark.parametrize("name", MIXED)
def test_a_reduction_over_channels_mixes_them(name: str) -> None:
    assert_mixed(MIXED[name])


@pytest.mark.parametrize("name", NUMBERED)
def test_channels_whose_numbers_are_used_are_pinned(name: str) -> None:
    assert_pinned(NUMBERED[name], "index")


def test_numbers_of_places_say_nothing_of_the_channels() -> None:
    collector, out = collected(lambda x: (x.flatten(2).argmax(2), x.max(3)[1] + 1))
    assert not collector.pins and all(collector.of(t).labels for t in out)


@pytest.mark.parametrize("function", [
    lambda x: x.sort(1), lambda x: x.topk(2, 1), lambda x: x.transpose(1, 3).topk(2), lambda x: x.median(1),
    lambda x: x.median(), lambda x: x.kthvalue(2, 1), lambda x: x.cummax(1), lambda x: torch.fft.fft(x, dim=1),
    lambda x: torch.fft.rfft2(x.transpose(1, 2)), lambda x: x.mean((0, 2, 3)).dot(torch.zeros(C, device="meta"))])
def test_an_order_or_a_transform_along_channels_pins(function: Callable[[Tensor], Any]) -> None:
    assert_pinned(function, "operator")


def test_what_changes_along_an_order_or_a_transform_is_united() -> None:
    """Channels in two dimensions, of which one is sorted: each of its values may come from any of the others."""
    for function in (lambda x: x.view(2, 3, 4, 4, 6).sort(1)[0], lambda x: torch.fft.fft(x.view(2, 3, 4, 4, 6), dim=1)):
        find = units(collected(function)[0])
        assert all(find(k) == find(k + 4) for k in range(8)) and len({find(k) for k in range(C)}) == 4


@pytest.mark.parametrize("name", PINNED)
def test_pooling_along_channels_pins(name: str) -> None:
    assert_pinned(PINNED[name], "position")


def test_both_halves_of_a_glu_are_united() -> None:
    find = units(collected(lambda x: F.glu(x, 1))[0])
    assert all(find(k) == find(k + 6) for k in range(6)) and len({find(k) for k in range(C)}) == 6


def test_mixing_along_two_dimensions_pins() -> None:
    """As the sum of all entries of a matrix of channels times channels."""
    assert_pinned(lambda x: (x.flatten(2) @ x.flatten(2).transpose(1, 2)).sum((1, 2)), "mixing")
