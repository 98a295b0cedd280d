"""recalibrate: BatchNorm statistics from data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import networks
from support.networks import Plain, images
from torch import Tensor, nn

import narrower


def batches(n: int = 3) -> list[Tensor]:
    return [images(batch=4, seed=k) + k for k in range(n)]


def test_recalibrate_gives_the_plain_average_of_batch_statistics() -> None:
    """Every BatchNorm sees what the ones before it normalise with their own batch statistics."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5))
    norm: Any = model[1]
    norm.running_mean.fill_(7.0)
    assert narrower.recalibrate(model, batches()) == 12
    maps = [model[0](x) for x in batches()]
    mean = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
    var = torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0)
    assert torch.allclose(norm.running_mean, mean, atol=1e-5) and torch.allclose(norm.running_var, var, rtol=1e-4)
    assert norm.num_batches_tracked == 3


@pytest.mark.parametrize("wrap", ["tensor", "pair", "dict", "generator"])
def test_recalibrate_takes_any_batch(wrap: str) -> None:
    model: nn.Module = Plain()
    given: Any = batches()
    if wrap == "pair":
        given = [(x, torch.zeros(4)) for x in given]
    elif wrap == "generator":
        given = (x for x in given)
    elif wrap == "dict":
        model = networks.ManyEnds()
        given = [{"image": x, "depth": images(2)} for x in given]
    assert narrower.recalibrate(model, given) == 12
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.running_mean is not None and norm.running_mean.abs().sum() > 0


def test_recalibrate_leaves_modes_momentum_and_weights() -> None:
    model = Plain().train()
    model.bn1.momentum, model.conv2.training = 0.03, False
    before = {n: p.clone() for n, p in model.named_parameters()}
    narrower.recalibrate(model, batches(1))
    assert model.bn1.momentum == 0.03 and model.bn3.momentum == 0.1 and model.training and not model.conv2.training
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


def test_recalibrate_on_a_number_of_images() -> None:
    a, b = Plain(), Plain()
    b.load_state_dict(a.state_dict())
    assert narrower.recalibrate(a, batches(3), images=8) == 8
    narrower.recalibrate(b, batches(2))
    assert torch.equal(a.bn3.running_mean, b.bn3.running_mean)  # type: ignore[arg-type]


def test_recalibrate_without_batches_is_an_error_and_changes_nothing() -> None:
    model = Plain()
    model.bn1.running_mean.fill_(3.0)  # type: ignore[union-attr]
    with pytest.raises(narrower.DataError, match="no batches"):
        narrower.recalibrate(model, [])
    assert model.bn1.momentum == 0.1 and model.training
    assert bool((model.bn1.running_mean == 3).all()), "the statistics are lost"  # type: ignore[union-attr]


class Domains(nn.Module):
    """A BatchNorm for each domain."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])
        for buffers in (dict(norm.named_buffers()) for norm in self.norms):
            buffers["running_mean"].fill_(3.0)
            buffers["num_batches_tracked"].fill_(5)

    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        return self.norms[domain](x)


def test_a_norm_that_no_batch_reaches_keeps_its_statistics() -> None:
    model = Domains()
    narrower.recalibrate(model, batches())
    reached, other = (dict(n.named_buffers()) for n in model.norms)
    assert not bool((reached["running_mean"] == 3).any()) and reached["num_batches_tracked"] == 3
    assert bool((other["running_mean"] == 3).all()) and other["num_batches_tracked"] == 5


def test_an_error_in_the_middle_leaves_all_statistics() -> None:
    model = Domains()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(narrower.DataError, match="does not run on inputs of shape"):
        narrower.recalibrate(model, [*batches(1), torch.randn(2, 4, 8, 8)])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_recalibrate_without_batch_norm_does_nothing() -> None:
    assert narrower.recalibrate(nn.Conv2d(3, 4, 3), batches()) == 0


def test_an_image_left_of_a_batch_does_not_count_where_it_has_no_variance() -> None:
    """Behind a global pooling one image has one value for each channel."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(6))
    assert narrower.recalibrate(model, batches(), images=5) == 5
    first, second = (dict(model[k].named_buffers()) for k in (1, 3))
    assert (int(first["num_batches_tracked"]), int(second["num_batches_tracked"])) == (2, 1)
    narrower.recalibrate(model, batches(1))
    assert all(torch.equal(t, model[3].get_buffer(n)) for n, t in second.items()) and not model[3]._forward_pre_hooks
    with pytest.raises(narrower.DataError, match="more than 1 value"):
        narrower.recalibrate(model, batches(), images=1)
