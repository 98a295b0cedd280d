"""Norms: statistics over channels mix them; scales and shifts go with their channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.operators import C, assert_each_for_itself, assert_mixed, assert_pinned, collected
from torch import Tensor

from narrower.tracing.operators.normalisation import restrict_group_norm, restrict_layer_norm

MIXED: dict[str, Callable[[Tensor], Any]] = {
    "layer norm": lambda x: F.layer_norm(x.movedim(1, 3), (C,)), "group norm": lambda x: F.group_norm(x, 3),
}


@pytest.mark.parametrize("name", MIXED)
def test_statistics_over_channels_mix_them(name: str) -> None:
    assert_mixed(MIXED[name])


def test_a_batch_norm_leaves_each_channel_to_itself() -> None:
    assert_each_for_itself(lambda x: F.batch_norm(x, torch.zeros(C, device="meta"), torch.ones(C, device="meta")))


def test_a_batch_norm_with_scales_that_cannot_shrink_pins() -> None:
    def norm(x: Tensor) -> Tensor:
        fixed = torch.arange(C, dtype=torch.float32, device="meta")
        return F.batch_norm(x, fixed, fixed + 1, fixed)

    assert_pinned(norm, "operand")


def test_groups_of_a_group_norm_keep_equally_many() -> None:
    collector, _ = collected(lambda x: F.group_norm(x, 2))
    assert [sorted(r) for r in collector.ties[0].tolist()] == [list(range(6)), list(range(6, 12))]


def test_restricted_arguments_give_the_norm_of_the_surviving_channels() -> None:
    x, scale, shift = torch.randn(2, 5, C), torch.randn(C), torch.randn(C)
    stays = torch.tensor([0, 3, 4, 7, 8, 11])
    out, *_ = torch.native_layer_norm(*restrict_layer_norm((x, [C], scale, shift, 1e-5), 2, stays))
    torch.testing.assert_close(out, F.layer_norm(x[..., stays], (6,), scale[stays], shift[stays]))
    x = torch.randn(2, C, 5)
    out, *_ = torch.native_group_norm(*restrict_group_norm((x, scale, None, 2, C, 5, 3, 1e-5), 1, stays))
    torch.testing.assert_close(out, F.group_norm(x[:, stays], 3, scale[stays]))
