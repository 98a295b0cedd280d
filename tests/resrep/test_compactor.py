"""The rule for compactors, and their merging, as arithmetic on tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from narrower.resrep.compactor import (
    Compactor,
    diagonal,
    insert_compactor,
    remove_compactor,
    resrep_gradient,
    row_norms,
    rows_at_zero,
    submatrix,
)
from narrower.resrep.merging import apply_compactor
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


def test_behind_a_linear_layer_channels_are_last() -> None:
    c = Compactor(Site("0", "diagonal", 6, dim=-1), torch.zeros(1), None)
    torch.nn.init.normal_(c.weight)
    x = torch.randn(2, 5, 6)
    assert torch.equal(c(x), x * c.weight)


def test_one_value_of_each_channel_has_no_variance_to_follow() -> None:
    """As a global pooling leaves it, of a single image."""
    c = Compactor(KINDS["full"], torch.zeros(1), torch.ones(6)).train()
    x = torch.randn(1, 6, 1, 1)
    assert torch.equal(c(x), x) and torch.equal(c.variance, torch.ones(6))


def test_follows_the_variance_of_its_output() -> None:
    c = Compactor(KINDS["full"], torch.zeros(1), torch.ones(6)).train()
    for seed in range(100):
        g = torch.Generator().manual_seed(seed)
        c(torch.randn(16, 6, 8, 8, generator=g) * torch.arange(1.0, 7).view(-1, 1, 1))
    torch.testing.assert_close(c.variance, torch.arange(1.0, 7) ** 2, rtol=0.1, atol=0)
    before = c.variance.clone()
    c.eval()(torch.zeros(4, 6, 2, 2))
    assert torch.equal(before, c.variance)


def test_the_variance_is_that_of_the_whole_batch() -> None:
    """A part of it would be of other images in one process than in several that share the batch."""
    compactor = Compactor(KINDS["full"], torch.ones(6), torch.ones(6))
    y = torch.randn(70, 6, 2, 2, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 70).view(-1, 1, 1, 1)
    compactor.follow(y)
    torch.testing.assert_close(compactor.variance, 0.75 + 0.25 * y.var((0, 2, 3)))


def test_nothing_is_measured_between_the_steps_that_are_followed() -> None:
    compactor = Compactor(KINDS["full"], torch.zeros(1), torch.ones(6)).train()
    compactor.following = False
    compactor(3 * torch.randn(16, 6, 8, 8))
    assert torch.equal(compactor.variance, torch.ones(6))


def test_rows_at_zero_stay_there_and_chosen_and_have_no_momentum() -> None:
    compactor = Compactor(KINDS["block"], torch.zeros(1), None)
    old = compactor.weight.detach().clone()
    compactor.choose(torch.arange(6) == 0)
    compactor.weight.detach().neg_()  # all rows turn around
    momentum, others = torch.ones(2, 3, 3), {"step": torch.tensor(3.0), "of_rows": torch.ones(6)}
    with torch.no_grad():
        compactor.settle(old, 1e-5, {"momentum_buffer": momentum, **others})
    assert compactor.gone.tolist() == (row_norms(compactor.weight) == 0).tolist() == [1, 0, 0, 0, 0, 0]
    assert momentum.flatten(0, 1).sum(1).tolist() == [0, 3, 3, 3, 3, 3]
    assert others["step"] == 3 and torch.equal(others["of_rows"], torch.ones(6))
    compactor.choose(torch.arange(6) == 4)
    assert compactor.chosen.tolist() == [1, 0, 0, 0, 1, 0]


def test_a_restricted_compactor_keeps_what_belongs_to_its_rows() -> None:
    compactor = Compactor(KINDS["full"], torch.zeros(1), torch.arange(6.0))
    compactor.weight.requires_grad_(False)
    compactor.penalised[::2], compactor.chosen[1], compactor.gone[4] = 1, 1, 1
    old = compactor.weight.detach().clone()
    swap = compactor.restrict(np.array([1, 2, 4]), np.array([0, 1, 2, 4]))
    assert swap.new is compactor.weight and not compactor.weight.requires_grad
    assert torch.equal(compactor.weight, old[[1, 2, 4]][:, [0, 1, 2, 4]])
    assert [getattr(compactor, name).tolist() for name in ("penalised", "chosen", "gone", "variance")] == [
        [0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 2, 4]]
    assert "penalised" not in compactor.state_dict(), "it follows from the placement"


def test_hooks_of_the_user_stay_when_a_compactor_is_removed() -> None:
    layer, calls = nn.Conv2d(3, 6, 1), list[str]()
    layer.register_forward_hook(lambda *_: calls.append("user"))
    insert_compactor(layer, Compactor(KINDS["full"], torch.zeros(1), None))
    remove_compactor(layer)
    layer(torch.randn(1, 3, 2, 2))
    assert calls == ["user"] and len(layer._forward_hooks) == 1 and not list(layer.children())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
def test_behind_a_convolution_a_single_image_gives_what_a_batch_gives(kind: str, conv: type[nn.Conv2d]) -> None:
    layer = conv(3, 6, 1)
    insert_compactor(layer, compactor := Compactor(KINDS[kind], torch.zeros(1), None))
    nn.init.normal_(compactor.weight)
    x = torch.randn(2, 3, *(6,) * (layer.weight.dim() - 2))
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


def test_of_a_block_diagonal_weight_each_block_gives_its_own_rows_and_columns() -> None:
    blocks = torch.randn(2, 4, 4)
    rows, columns = np.array([1, 2, 4, 7]), np.array([2, 3, 5, 7])
    whole = torch.block_diag(*blocks)[rows][:, columns]
    assert torch.equal(torch.block_diag(*submatrix(blocks, rows, columns)), whole)
