"""Merging a compactor into tensors: the layer computes what layer and compactor did."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from narrower.resrep.merging import apply_compactor, merge_tensors
from narrower.resrep.placement import Site


def batch_norm(y: Tensor, t: dict[str, Tensor], eps: float) -> Tensor:
    return F.batch_norm(y, t["mean"], t["var"], t["gamma"], t["beta"], eps=eps)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rest", [False, True])
def test_merging_behind_a_batch_norm(groups: int, bias: bool, rest: bool) -> None:
    g = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    t = {"weight": draw(12, 6 // groups, 3, 3), "var": draw(12) ** 2 + 0.1}
    t |= {name: draw(12) for name in ("gamma", "beta", "mean")}
    if bias:
        t["bias"] = draw(12)
    site = Site("m", "full" if groups == 1 else "block", 12, weight="w", norm="n", blocks=groups)
    q = draw(8, 12) if groups == 1 else draw(3, 3, 4)  # rectangular: rows have been dropped
    kept = q.shape[0] * (1 if groups == 1 else 3)
    scale = draw(kept).abs() + 0.1 if rest else torch.ones(kept, dtype=torch.float64)
    x = draw(2, 6, 5, 5)
    y = batch_norm(F.conv2d(x, t["weight"], t.get("bias"), groups=groups), t, 1e-3)
    want = torch.stack([apply_compactor(q, sample) for sample in y])
    new = merge_tensors(q, site, t, 1e-3, draw(kept).abs() + 0.5, scale if rest else None)
    have = batch_norm(F.conv2d(x, new["weight"], new.get("bias"), groups=groups), new, 1e-3) * scale.view(-1, 1, 1)
    torch.testing.assert_close(have, want, rtol=1e-11, atol=1e-11)
    assert set(new) == set(t)


def test_merging_a_transposed_convolution_behind_a_batch_norm() -> None:
    g = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    t = {name: draw(6) for name in ("bias", "gamma", "beta", "mean")}
    t |= {"weight": draw(6, 6, 2, 2), "var": draw(6) ** 2 + 0.1}
    q, x = draw(4, 6), draw(2, 6, 5, 5)
    y = batch_norm(F.conv_transpose2d(x, t["weight"], t["bias"]), t, 1e-3)
    site = Site("m", "full", 6, weight="w", bias="b", norm="n", transposed=True)
    new = merge_tensors(q, site, t, 1e-3, draw(4).abs() + 0.5)
    have = batch_norm(F.conv_transpose2d(x, new["weight"], new["bias"]), new, 1e-3)
    torch.testing.assert_close(have, torch.stack([apply_compactor(q, sample) for sample in y]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rest", [None, 0.3])
def test_merging_behind_layers_without_batch_norm(rest: float | None) -> None:
    g = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = draw(2, 6, 5, 5)
    after = None if rest is None else torch.full((9,), rest, dtype=torch.float64)
    w, b = draw(9, 6, 3, 3), draw(9)
    for kind, q in (("full", draw(9, 9)), ("diagonal", draw(9))):
        new = merge_tensors(q, Site("m", kind, 9, weight="w", bias="b"), {"weight": w, "bias": b}, 0.0, q[:0], after)  # type: ignore[arg-type]
        want = torch.stack([apply_compactor(q, y) for y in F.conv2d(x, w, b)])
        torch.testing.assert_close(F.conv2d(x, new["weight"], new["bias"]) * (rest or 1), want, rtol=1e-11, atol=1e-11)
    w = draw(6, 4, 2, 2)  # transposed: (I, O / groups, ...)
    for groups, q in ((1, draw(4, 4)), (1, draw(4)), (3, draw(12))):
        site = Site("m", "full" if q.dim() == 2 else "diagonal", 4 * groups, weight="w", transposed=True, blocks=groups)
        new = merge_tensors(q, site, {"weight": w}, 0.0, q[:0])
        want = torch.stack([apply_compactor(q, y) for y in F.conv_transpose2d(x, w, groups=groups)])
        torch.testing.assert_close(F.conv_transpose2d(x, new["weight"], groups=groups), want, rtol=1e-11, atol=1e-11)


def test_merging_keeps_the_length_of_filters() -> None:
    """Weight decay and the effective step of a layer before a BatchNorm depend on it."""
    g = torch.Generator().manual_seed(0)
    t = {n: torch.rand(5, generator=g, dtype=torch.float64) + 0.5 for n in ("gamma", "beta", "mean", "var")}
    t["weight"] = torch.randn(5, 4, 3, 3, generator=g, dtype=torch.float64)
    q = torch.diag(torch.tensor([1.0, 0.3, 2.0, 0.7, 1.1], dtype=torch.float64))
    new = merge_tensors(q, Site("m", "full", 5, weight="w", norm="n"), t, 1e-5, torch.ones(5, dtype=torch.float64))
    lengths = [t["weight"].flatten(1).norm(dim=1) for t in (t, new)]
    torch.testing.assert_close(lengths[0], lengths[1])
    assert not math.isclose(float(new["gamma"][1]), float(t["gamma"][1]))
