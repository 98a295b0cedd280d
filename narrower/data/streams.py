"""Data sets that can only be iterated, such as WebDataset shards and streamed Hugging Face data sets, read by timm.

timm divides the shards among the processes and their readers. What is fixed here: equally many batches in all processes, images
to evaluate on exactly once, images held out, and random numbers that follow from (seed, epoch), so that a resumed run goes on
as it would have.
"""

from __future__ import annotations

import itertools
import math
import signal
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..errors import DataError
from .seeding import mix, seed_all
from .task import CLASSIFICATION, Task


@dataclass(frozen=True)
class StreamImages(IterableDataset[Any]):
    """A stream of timm, of one split. `key` = (seed, epoch) selects and seeds the training transform, and the order.

    `mean`, `std`: per channel, by which the transforms normalise. `shards`: the files of all processes, where they are
    WebDataset's (`shards_of`). `held_out`: the fingerprints of images that are left out. `endless`: it begins again at its end.
    """

    dataset: Any
    transform: Callable[[Any], Tensor]
    training: Callable[[Any], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shards: tuple[str, ...] = ()
    key: tuple[int, int] | None = None
    held_out: frozenset[int] = frozenset()
    endless: bool = False
    task: ClassVar[Task] = CLASSIFICATION

    def augmented(self, seed: int, epoch: int) -> StreamImages:
        return replace(self, key=(seed, epoch))

    def __len__(self) -> int:
        """The images of the split, all processes together."""
        return (int(getattr(self.dataset.reader, "num_samples", 0)) or len(self.dataset)) - len(self.held_out)

    def __iter__(self) -> Iterator[Any]:
        self.dataset.transform = partial(unless_held_out, self.held_out, self.transform if self.key is None else self.training)
        worker, rank = get_worker_info(), getattr(self.dataset.reader, "dist_rank", 0)
        numbers, going = itertools.count(), True
        while going:
            samples, going = iter(self.dataset), False
            for count in numbers:
                if self.key is not None:
                    seed_all(mix(*self.key, rank, worker.id if worker else 0, count))
                if (sample := next(samples, None)) is None:
                    break
                if sample[0] is not None:
                    going = self.endless
                    yield sample


def unless_held_out(held_out: frozenset[int], transform: Callable[[Any], Tensor], image: Any) -> Tensor | None:
    """The transformed image, None if it is held out."""
    return None if held_out and fingerprint(image) in held_out else transform(image)


def fingerprint(image: Any) -> int:
    """By which a PIL image is known wherever it comes in a stream. Among a million images a few are alike by chance."""
    return zlib.crc32(image.tobytes())


class HeldOut(NamedTuple):
    """Images of a stream, uint8 `[N, C, H, W]`, not augmented, their labels `[N]`, and their fingerprints."""

    images: Tensor
    labels: Tensor
    fingerprints: frozenset[int]


@lru_cache(maxsize=1)  # each training asks for them
def first_images(images: StreamImages, count: int, seed: int) -> HeldOut:
    """The first `count` images of the shuffled stream. They do not depend on the number of processes and their readers."""
    begin(images.dataset.reader, count, (0, 1), 0)
    shuffle(images, mix(seed, "held out"), 0)
    images.dataset.transform = partial(marked, images.transform)
    samples = [(*image, label) for image, label in itertools.islice(images.dataset, count)]
    if len(samples) < count:
        raise DataError(f"the stream of images ended after {len(samples)} of {count} images to hold out: see that its shards "
                        "can be read")
    marks, pixels, labels = zip(*samples, strict=True)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (images.mean, images.std))
    whole = [((x * std + mean) * 255).round().to(torch.uint8) for x in pixels]
    return HeldOut(torch.stack(whole), torch.tensor(labels), frozenset(marks))


def marked(transform: Callable[[Any], Tensor], image: Any) -> tuple[int, Tensor]:
    """The fingerprint of an image, and the transformed image."""
    return fingerprint(image), transform(image)


class StreamLoader(DataLoader[Any]):
    """Batches of a stream: the first `steps` (None: all that there are), without the first `start` of them."""

    def __init__(self, images: StreamImages, batch_size: int, *, steps: int | None, start: int, **options: Any) -> None:
        super().__init__(images, batch_size, **options)
        self.steps, self.start = steps, start

    def __len__(self) -> int:
        return super().__len__() if self.steps is None else self.steps - self.start

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        seen = 0
        for batch in itertools.islice(super().__iter__(), self.steps):
            seen += 1
            if seen > self.start:
                yield batch
        if self.steps is not None and seen < self.steps:
            raise DataError(f"the stream of images ended after {seen} of {self.steps} batches: give it as many shards as there "
                            "are processes, or more, and see that they can be read")


def stream_batches(images: StreamImages, batch_size: int, *, order: int | None, start: int, shard: tuple[int, int],
                   workers: int) -> StreamLoader:
    """This process's batches of a stream.

    In training (`order` is its seed) all batches are full, and all processes have equally many: some images of the last shards
    may come twice in an epoch, as in timm. Which images a batch has depends on the number of processes and readers. Otherwise
    each process reads its part of the shards once.

    Raises:
        DataError: there are fewer shards to train on than processes.
    """
    reader, (rank, processes) = images.dataset.reader, shard
    shards = images.shards
    if shards and order is not None and len(shards) < processes:
        raise DataError(f"{len(shards)} shards cannot be divided among {processes} processes")
    if shards:
        workers = min(workers, max(1, len(shards) // processes))
    readers = max(1, workers)
    begin(reader, batch_size, shard, workers)
    steps: int | None = None
    if order is not None:
        steps = readers * math.ceil(len(images) / (processes * readers * batch_size))
        images = replace(images, endless=True)  # one reader may have most of the images that are held out
        shuffle(images, order, rank)
    elif shards and processes > 1:  # timm would read as many images in each process, some twice or not at all
        reader.dist_rank, reader.dist_num_replicas = 0, 1
        reader.split_info = replace(reader.split_info, filenames=shards[rank::processes])
        steps = None if reader.split_info.filenames else 0
    generator = None if order is None else torch.Generator().manual_seed(mix(order, rank, "stream"))
    return StreamLoader(images, batch_size, steps=steps, start=start, num_workers=workers, generator=generator,
                        worker_init_fn=signals_of_a_worker, pin_memory=torch.cuda.is_initialized())


def shuffle(images: StreamImages, order: int, rank: int) -> None:
    """Let the reader of a process give its part of the stream in the order that the seed `order` makes."""
    reader = images.dataset.reader
    reader.common_seed, reader.worker_seed = mix(order, "shards") % 2**31, mix(order, rank, "stream")


def shards_of(reader: Any) -> tuple[str, ...]:
    """The shards of timm's reader of WebDataset. Empty for other readers."""
    return tuple(reader.split_info.filenames) if type(reader).__name__ == "ReaderWds" else ()


def begin(reader: Any, batch_size: int, shard: tuple[int, int], workers: int) -> None:
    """Let a reader of timm begin anew: what it has shuffled and buffered before is forgotten."""
    if hasattr(reader, "ds"):
        reader.ds = None
    reader.dist_rank, reader.dist_num_replicas = shard
    reader.batch_size = batch_size
    if hasattr(reader, "set_loader_cfg"):
        reader.set_loader_cfg(num_workers=workers)


def signals_of_a_worker(_: int) -> None:
    """For a process that reads images."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process, and the main one handles it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # undo the handler that training has installed
