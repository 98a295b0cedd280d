"""Images in memory, read file by file, or from a stream; and batches of them.

Augmentation and order are pure functions of (seed, epoch, index). A resumed run therefore gives the same result as one that
was never interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..errors import DataError, NarrowerError, in_one_line
from .seeding import mix, seed_all
from .streams import StreamImages, first_images, signals_of_a_worker, stream_batches
from .task import CLASSIFICATION, OwnTask, Task

Batch = tuple[Tensor, Any]
"""Images `[N, C, H, W]`, normalised floats, and labels `[N]` or the targets of a user's task."""


class Source(Protocol):
    """Decoded images by index: `(PIL image, label)`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


@dataclass(frozen=True)
class TensorImages(Dataset[Batch]):
    """Images in memory, uint8 `[N, C, H, W]`.

    `moves` `[N, 3]`: the shift (y, x) of each image, and whether it is mirrored. `augment` changes moved images, as PIL images,
    by random numbers that `key` = (seed, epoch) seeds.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int = 0
    flip: float = 0.0
    moves: Tensor | None = None
    augment: Callable[[Any], Any] | None = None
    key: tuple[int, int] = (0, 0)
    task: ClassVar[Task] = CLASSIFICATION

    def __len__(self) -> int:
        return len(self.labels)

    def augmented(self, seed: int, epoch: int) -> TensorImages:
        """The same images, padded, randomly cropped, and mirrored with probability `flip`."""
        draw = torch.Generator().manual_seed(mix(seed, epoch, "augment"))
        shifts = torch.randint(0, 2 * self.pad + 1, (len(self), 2), generator=draw)
        mirror = torch.rand(len(self), 1, generator=draw) < self.flip
        return replace(self, moves=torch.cat((shifts, mirror.long()), dim=1), key=(seed, epoch))

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        index = torch.as_tensor(indices)
        images = self.images[index]
        if self.moves is not None:
            images = move(images, self.moves[index], self.pad)
            if self.augment is not None:
                images = torch.stack([self._augmented(image, int(at)) for image, at in zip(images, indices, strict=True)])
        mean = torch.tensor(self.mean).view(-1, 1, 1) * 255
        std = torch.tensor(self.std).view(-1, 1, 1) * 255
        return (images.float() - mean) / std, self.labels[index]

    def _augmented(self, image: Tensor, index: int) -> Tensor:
        from PIL import Image

        assert self.augment is not None
        seed_all(mix(*self.key, index, "augment"))
        changed = self.augment(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))
        return torch.from_numpy(np.array(changed)).permute(2, 0, 1)


def move(images: Tensor, moves: Tensor, pad: int) -> Tensor:
    """Pad `[N, C, H, W]` with zeros, crop `H x W` at (y, x) = `moves[:, :2]`, mirror if `moves[:, 2]`. One gather for all."""
    count, _, height, width = images.shape
    padded = F.pad(images, (pad, pad, pad, pad))
    rows = moves[:, 0, None] + torch.arange(height)
    columns = torch.arange(width).expand(count, width)
    columns = torch.where(moves[:, 2, None] > 0, columns.flip(1), columns) + moves[:, 1, None]
    batch = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class LazyImages(Dataset[Batch]):
    """Images that are read and transformed one by one. `key` = (seed, epoch) selects and seeds the training transform."""

    source: Source
    transform: Callable[[Any], Tensor]
    training: Callable[[Any], Tensor]
    mode: str = "RGB"
    key: tuple[int, int] | None = None
    task: ClassVar[Task] = CLASSIFICATION

    def __len__(self) -> int:
        return len(self.source)

    def augmented(self, seed: int, epoch: int) -> LazyImages:
        return replace(self, key=(seed, epoch))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.source[index]
        image = converted(image, self.mode)
        if self.key is None:
            return self.transform(image), label
        seed_all(mix(*self.key, index))
        return self.training(image), label


@dataclass(frozen=True)
class OwnImages(Dataset[Batch]):
    """The samples of a user's task. `key` = (seed, epoch) seeds what is random about them in training."""

    source: Any
    task: OwnTask
    key: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def augmented(self, seed: int, epoch: int) -> OwnImages:
        return replace(self, key=(seed, epoch))

    def __getitem__(self, index: int) -> Any:
        seed_all(mix(self.key, index))
        try:
            return self.source[index]
        except NarrowerError:
            raise
        except Exception as error:  # whatever the user's data set raises
            raise DataError(f"sample {index} of the task's data cannot be read: {in_one_line(error)}") from error


Images = TensorImages | LazyImages | StreamImages | OwnImages

OF_16_BITS = ("PNG", "PPM")
"""Formats whose pixels have 16 bits where PIL gives them 32."""
HELD_OUT_SHARE = 0.05  # of the training images, at most


def hold_out(images: Images, count: int, seed: int) -> tuple[Images, Images | None]:
    """Training images to fit, and `count` random others (5 % at most) that no training sees: they decide between networks.

    The second part is None if there is none: for less than 20 images. That of a stream is read at once, into memory.
    """
    count = min(count, int(len(images) * HELD_OUT_SHARE))
    if not count:
        return images, None
    if isinstance(images, StreamImages):
        found = first_images(images, count, seed)
        return (replace(images, held_out=found.fingerprints),
                TensorImages(found.images, found.labels, images.mean, images.std))
    index = torch.randperm(len(images), generator=torch.Generator().manual_seed(mix(seed, "held out")))
    held, fit = (subset(images, part.sort().values) for part in (index[:count], index[count:]))
    return fit, held


def subset(images: Images, index: Tensor) -> Images:
    """Some of the images, by their numbers."""
    if isinstance(images, TensorImages):
        return replace(images, images=images.images[index], labels=images.labels[index])
    if isinstance(images, StreamImages):
        raise DataError("a stream has no images by number")
    return replace(images, source=Subset(cast(Any, images.source), index.tolist()))


def converted(image: Any, mode: str) -> Any:
    """A PIL image in another mode of 8 bits, RGB or L. Grey images of 16 bits are scaled: PIL would clip them at 255.

    Raises:
        DataError: the pixels are 32-bit or real numbers, of which the file does not tell what is white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in OF_16_BITS):
        from PIL import Image

        return Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8)).convert(mode)
    if image.mode in ("I", "F"):
        kind = "32-bit" if image.mode == "I" else "real"
        raise DataError(f"{getattr(image, 'filename', '') or 'an image'} has {kind} numbers for pixels, and what is black and "
                        "white among them is not known: save the images with 8 or 16 bits, or read them by a --task")
    return image.convert(mode)


@dataclass(frozen=True)
class Files:
    """Image files and their labels, converted to a PIL mode."""

    paths: list[str]
    labels: list[int]
    mode: str = "RGB"

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> tuple[Any, int]:
        from PIL import Image

        try:
            with Image.open(self.paths[index]) as image:
                return converted(image, self.mode), self.labels[index]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(
                f"cannot read image {self.paths[index]}: remove or replace it ({str(error).splitlines()[0]})"
            ) from error


def batches(
    images: Images,
    batch_size: int,
    *,
    order: int | None = None,
    start: int = 0,
    shard: tuple[int, int] = (0, 1),
    workers: int = 0,
    limit: int | None = None,
) -> DataLoader[Batch]:
    """Batches of `images`, in their own order or shuffled by the seed `order`.

    Args:
        images: the images to read.
        batch_size: images per batch and process. The last batch may be smaller.
        order: seed of the shuffling, for training. All processes then get equally many batches, with one image more or less
            in the last, and the last is not too small (`trained_on`). None keeps the order and all images.
        start: number of batches to skip, for a resumed epoch.
        shard: (rank, number of processes). Each process takes every n-th image.
        workers: number of reader processes. Not used for images in memory.
        limit: number of images, the first of the order. A stream has no limit.
    """
    if isinstance(images, StreamImages):
        return stream_batches(images, batch_size, order=order, start=start, shard=shard, workers=workers)
    count = len(images)
    if order is None:
        index = torch.arange(count)
    else:
        index = torch.randperm(count, generator=torch.Generator().manual_seed(order))[: trained_on(count, batch_size, shard[1])]
    chunks = [chunk.tolist() for chunk in index[:limit][shard[0] :: shard[1]].split(batch_size)]
    pin = torch.cuda.is_initialized()  # by what the batches are for: pinning makes a CUDA context where there is none
    if isinstance(images, TensorImages):
        return DataLoader(images, batch_sampler=chunks[start:], collate_fn=_as_it_is, pin_memory=pin)
    collate = getattr(images.task, "collate", None)
    return DataLoader(images, batch_sampler=chunks[start:], num_workers=workers, worker_init_fn=signals_of_a_worker,
                      collate_fn=collate, pin_memory=pin)


def trained_on(count: int, batch_size: int, processes: int = 1) -> int:
    """How many of `count` images an epoch has: without a small last batch, of less than a sixteenth of a whole one.

    With 32 images or more a process, this is the same for any number of processes. With less, a last batch in which a process
    had less than two images, as BatchNorm needs, is left out too. Raises DataError if there are more processes than images.
    """
    if count < processes:
        raise DataError(f"{count} images cannot be divided among {processes} processes")
    whole = batch_size * processes
    rest = count % whole
    return count - rest if rest < min(max(2 * processes, whole // 16), count) else count


def _as_it_is(batch: Any) -> Any:
    return batch
