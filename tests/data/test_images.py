"""Images: augmentation, order and batches are functions of seed, epoch and index."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("sklearn")
from PIL import Image

from narrower.data.images import LazyImages, TensorImages, batches, move, trained_on
from narrower.data.seeding import seed_all
from narrower.data.sources import Augmentation, Reading, _transforms, augmentation, digits
from narrower.errors import ConfigError, DataError


def test_move_is_pad_crop_flip() -> None:
    """One gather for the batch equals the plain operations on each image."""
    x = torch.randint(0, 256, (20, 3, 5, 7), dtype=torch.uint8)
    moves = torch.cat((torch.randint(0, 5, (20, 2)), torch.randint(0, 2, (20, 1))), dim=1)
    for image, moved, (top, left, mirrored) in zip(x, move(x, moves, 2), moves.tolist(), strict=True):
        want = torch.nn.functional.pad(image, (2, 2, 2, 2))[:, top : top + 5, left : left + 7]
        assert torch.equal(moved, want.flip(2) if mirrored else want)


def test_augmentation_and_order_follow_seed_and_epoch() -> None:
    data = digits()

    def epoch(seed: int, epoch: int, order: int = 5, start: int = 0) -> list[torch.Tensor]:
        return [x for x, _ in batches(data.train.augmented(seed, epoch), 500, order=order, start=start)]

    assert all(torch.equal(a, b) for a, b in zip(epoch(0, 1), epoch(0, 1), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(epoch(0, 1)[1:], epoch(0, 1, start=1), strict=True))
    assert not torch.equal(epoch(0, 1)[0], epoch(1, 1)[0])
    assert not torch.equal(epoch(0, 1)[0], epoch(0, 2)[0])
    assert not torch.equal(epoch(0, 1)[0], epoch(0, 1, order=6)[0])


def test_an_augmentation_follows_seed_epoch_and_index() -> None:
    """timm's RandAugment on images in memory: the same in every batch that an image is part of."""
    pixels = torch.randint(0, 256, (6, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = TensorImages(pixels, torch.arange(6), (0.5,) * 3, (0.5,) * 3, augment=augmentation(Reading(aa="rand-m9-mstd0.5")))
    plain = replace(data, augment=None)

    def images(of: TensorImages, epoch: int, index: list[int]) -> torch.Tensor:
        return of.augmented(3, epoch).__getitems__(index)[0]

    whole = images(data, 1, [0, 1, 2, 3, 4, 5])
    assert torch.equal(whole[[4, 2]], images(data, 1, [4, 2])) and not torch.equal(whole, images(data, 2, [*range(6)]))
    assert not torch.equal(whole, images(plain, 1, [*range(6)])) and whole.abs().max() <= 1
    assert torch.equal(data.__getitems__([1])[0], plain.__getitems__([1])[0])  # not for evaluation
    with pytest.raises(ConfigError, match="--aa nonsense"):
        augmentation(Reading(aa="nonsense"))
    with pytest.raises(ConfigError, match="3 channels"):
        augmentation(Reading(aa="rand-m9", channels=1))


def test_what_an_augmentation_raises_has_its_name() -> None:
    """Of images in memory and of those that are read one by one."""
    augment = augmentation(Reading(aa="rand-m9"))
    training = _transforms((3, 12, 12), Reading(aa="rand-m9"))[1]
    image = Image.new("RGB", (12, 12))
    step = next(step for step in training.transforms if isinstance(step, Augmentation))  # type: ignore[attr-defined]
    for given in (augment, step):
        assert isinstance(given, Augmentation)
        for operation in given.change.ops:  # type: ignore[attr-defined]
            operation.aug_fn = None
            operation.prob = 1.0
    for change in (augment, training):
        assert change is not None
        with pytest.raises(DataError, match=r"--aa rand-m9 fails on an image of 12x12 pixels.*TypeError"):
            change(image)


@pytest.mark.parametrize("name", ["rand-m9-mstd0.5-inc1", "rand-m0", "rand-m20-mmax20-inc1", "augmix-m10-mstd2", "v0"])
def test_augmentations_do_not_fail_in_their_strongest(name: str) -> None:
    """timm's posterize comes to 0 bits, which Pillow 13 refuses."""
    image = Image.effect_noise((16, 16), 100).convert("RGB")
    augment, training = augmentation(Reading(aa=name)), _transforms((3, 16, 16), Reading(aa=name))[1]
    for change in (augment, training):
        assert change is not None
        for seed in range(300):
            seed_all(seed)
            change(image)


def test_each_image_once_and_shards_are_disjoint() -> None:
    data = TensorImages(torch.zeros(30, 1, 2, 2, dtype=torch.uint8), torch.arange(30), (0.5,), (0.5,))
    assert torch.cat([y for _, y in batches(data, 7)]).tolist() == list(range(30))
    for order in (None, 3):
        parts = [torch.cat([y for _, y in batches(data, 4, order=order, shard=(rank, 3))]) for rank in range(3)]
        assert torch.cat(parts).sort().values.tolist() == list(range(30))
        assert order is None or parts[0].tolist() != sorted(parts[0].tolist())


@pytest.mark.parametrize("cuda", [False, True])
def test_batches_lie_in_pinned_memory_where_cuda_is_used(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only from there is a copy to the GPU not waited for. With `--device cpu` a GPU that is there is left alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: cuda)
    memory = TensorImages(torch.zeros(9, 1, 2, 2, dtype=torch.uint8), torch.arange(9), (0.5,), (0.5,))
    files = LazyImages([], torch.as_tensor, torch.as_tensor)
    assert [batches(images, 4).pin_memory for images in (memory, files)] == [cuda, cuda]


def test_training_shards_have_the_same_number_of_batches() -> None:
    data = TensorImages(torch.zeros(9, 1, 2, 2, dtype=torch.uint8), torch.arange(9), (0.5,), (0.5,))
    more = TensorImages(torch.zeros(11, 1, 2, 2, dtype=torch.uint8), torch.arange(11), (0.5,), (0.5,))
    assert len({len(batches(more, 2, order=0, shard=(rank, 3))) for rank in range(3)}) == 1
    assert [len(y) for _, y in batches(data, 4, order=0)] == [4, 4]  # a single image would break BatchNorm
    assert [len(y) for _, y in batches(data, 4)] == [4, 4, 1]


@pytest.mark.parametrize("count", range(12, 25))
def test_a_step_of_all_processes_has_the_images_of_one_step_of_a_single_one(count: int) -> None:
    """Also the last, unless a process had less than two images in it."""
    data = TensorImages(torch.zeros(count, 1, 2, 2, dtype=torch.uint8), torch.arange(count), (0.5,), (0.5,))
    parts = [[y.tolist() for _, y in batches(data, 4, order=0, shard=(rank, 3))] for rank in range(3)]
    together = [sorted(y for part in step for y in part) for step in zip(*parts, strict=True)]
    alone = [sorted(y.tolist()) for _, y in batches(data, 12, order=0)]
    assert together == alone[: len(together)]
    assert sum(map(len, together)) == trained_on(count, 4, 3) == (12 if count < 18 else count if count < 24 else 24)
    assert all(len(part) > 1 for steps in parts for part in steps)


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_any_number_of_processes_trains_on_as_many_images(processes: int) -> None:
    for count in range(processes, 1100):
        assert trained_on(count, 256 // processes, processes) == trained_on(count, 256)
    assert [trained_on(256 + rest, 256) for rest in (0, 15, 16, 255)] == [256, 256, 272, 511]


def test_images_cannot_be_fewer_than_processes() -> None:
    with pytest.raises(DataError, match="2 images cannot be divided among 3 processes"):
        trained_on(2, 4, 3)
