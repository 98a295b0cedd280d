"""Mixed and erased batches: what the targets say of the images, and that a seed decides all."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm")

from narrower.training.config import TrainConfig
from narrower.training.mixing import Mixing

CPU = torch.device("cpu")


def constant_images(count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Image k is k everywhere and has class k, so that a mixed image tells what it was made of."""
    y = torch.arange(count)
    return y.float().view(-1, 1, 1, 1).expand(-1, 3, 6, 6).clone(), y


def test_without_settings_nothing_changes() -> None:
    x, y = constant_images()
    mixed, target = Mixing(TrainConfig(), CPU)(x.clone(), y, 8, seed=1)
    assert torch.equal(mixed, x) and torch.equal(target, y)


@pytest.mark.parametrize("settings", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_targets_are_the_shares_of_the_images(settings: dict[str, float]) -> None:
    x, y = constant_images()
    mixing = Mixing(TrainConfig(**settings), CPU)  # type: ignore[arg-type]
    changed = False
    for seed in range(6):
        mixed, target = mixing(x.clone(), y, 10, seed)
        assert target.shape == (8, 10) and torch.allclose(target.sum(1), torch.ones(8))
        # cutmix replaces whole pixels and mixup all of them in part: the mean of an image is that of its classes
        assert torch.allclose(mixed.mean((1, 2, 3)), target @ torch.arange(10.0), atol=1e-4)
        changed |= not torch.equal(mixed, x)
    assert changed


def test_an_odd_image_is_left_out_of_a_mixed_batch() -> None:
    x, y = constant_images(7)
    mixed, target = Mixing(TrainConfig(mixup=0.8), CPU)(x, y, 7, seed=0)
    assert len(mixed) == len(target) == 6


def test_a_single_image_is_not_mixed() -> None:
    x, y = constant_images(1)
    mixed, target = Mixing(TrainConfig(mixup=0.8), CPU)(x.clone(), y, 7, seed=0)
    assert torch.equal(mixed, x) and torch.equal(target, y)


def test_erasing_changes_a_part_of_the_images() -> None:
    x, y = constant_images(64)
    erased, target = Mixing(TrainConfig(reprob=0.5), CPU)(x.clone(), y, 64, seed=0)
    touched = (erased != x).flatten(1).any(1)
    assert 16 < touched.sum() < 48 and torch.equal(target, y)
    assert 0 < (erased != x).float().mean() < 0.3


def test_a_seed_decides_all() -> None:
    x, y = constant_images()
    mixing = Mixing(TrainConfig(mixup=0.8, cutmix=1.0, reprob=0.5), CPU)
    one, two, other = (mixing(x.clone(), y, 8, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)
