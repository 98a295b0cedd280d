"""The rule for compactors, and their merging, as arithmetic on tensors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from narrower.resrep.compactor import Compactor, diagonal, resrep_gradient, row_norms, rows_at_zero
from narrower.resrep.merging import apply_compactor, merge_tensors
from narrower.resrep.placement import Site

KINDS = {"full": Site("m", "full", 6), "block": Site("m", "block", 6, blocks=2), "diagonal": Site("m", "diagonal", 6)}


def test_one_step_of_the_rule_by_hand() -> None:
    """Rows (3, 4) and (0, 2): the unit rows are (0.6, 0.8) and (0, 1); the task's gradient of the chosen one is reset."""
    q = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    grad = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    out = resrep_gradient(grad, q, torch.tensor([True, False]), torch.tensor([0.5, 0.1]))
    torch.testing.assert_close(out, torch.tensor([[0.3, 0.4], [30.0, 40.1]]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_is_the_gradient_of_the_sum_of_norms(kind: str) -> None:
    q = torch.randn_like(diagonal(torch.ones(6), KINDS[kind]), dtype=torch.float64).requires_grad_()
    norms = torch.stack([row.norm() for row in q.reshape(6, -1)])
    (want,) = torch.autograd.grad(norms.sum(), q)
    none, every = torch.zeros(6, dtype=torch.bool), torch.ones(6, dtype=torch.float64)
    have = resrep_gradient(torch.zeros_like(q), q.detach(), none, every)
    torch.testing.assert_close(have, want)
    torch.testing.assert_close(row_norms(q.detach()), norms.detach())


def test_a_zero_row_stays_finite_and_zero() -> None:
    q = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    out = resrep_gradient(torch.ones(2, 2), q, torch.tensor([True, False]), torch.ones(2))
    assert torch.equal(out[0], torch.zeros(2))
    assert out.isfinite().all()


def test_a_chosen_row_is_finished_when_it_turns_around_or_is_short() -> None:
    old = torch.tensor([[0.1, 0.0], [0.1, 0.0], [0.1, 0.0], [2e-6, 0.0]])
    new = torch.tensor([[-0.1, 0.0], [0.05, 0.0], [-0.1, 0.0], [1e-6, 0.0]])
    chosen = torch.tensor([True, True, False, True])
    assert rows_at_zero(new, old, chosen, 1e-5).tolist() == [True, False, False, True]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 5), (3, 6, 5, 4), (3, 6, 2, 3, 4)])
def test_starts_as_the_identity(kind: str, shape: tuple[int, ...]) -> None:
    c = Compactor(KINDS[kind], torch.zeros(1), torch.ones(6))
    x = torch.randn(shape)
    assert torch.equal(c(x), x)


@pytest.mark.parametrize("kind", KINDS)
def test_computes_what_its_matrix_says(kind: str) -> None:
    c = Compactor(KINDS[kind], torch.zeros(1, dtype=torch.float64), None)
    torch.nn.init.normal_(c.weight)
    w = c.weight.detach()
    matrix = torch.diag(w) if w.dim() == 1 else w if w.dim() == 2 else torch.block_diag(*w)
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(c(x), torch.einsum("kc,nchw->nkhw", matrix, x))
    torch.testing.assert_close(apply_compactor(w, x[0]), torch.einsum("kc,chw->khw", matrix, x[0]))


def test_follows_the_variance_of_its_output() -> None:
    c = Compactor(KINDS["full"], torch.zeros(1), torch.ones(6)).train()
    for seed in range(100):
        g = torch.Generator().manual_seed(seed)
        c(torch.randn(16, 6, 8, 8, generator=g) * torch.arange(1.0, 7).view(-1, 1, 1))
    torch.testing.assert_close(c.variance, torch.arange(1.0, 7) ** 2, rtol=0.1, atol=0)
    before = c.variance.clone()
    c.eval()(torch.zeros(4, 6, 2, 2))
    assert torch.equal(before, c.variance)


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
