"""Data sets that can only be iterated, such as WebDataset shards and streamed Hugging Face data sets, read by timm.

timm divides the shards among the processes and their readers. What is fixed here: equally many batches in all processes, images
to evaluate on exactly once, and random numbers that follow from (seed, epoch), so that a resumed run goes on as it would have.
"""

from __future__ import annotations

import itertools
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..errors import DataError
from .seeding import mix, seed_all
from .task import CLASSIFICATION, Task


@dataclass(frozen=True)
class StreamImages(IterableDataset[Any]):
    """A stream of timm, of one split. `key` = (seed, epoch) selects and seeds the training transform, and the order.

    `shards`: the files of all processes, where they are WebDataset's (`shards_of`).
    """

    dataset: Any
    transform: Callable[[Any], Tensor]
    training: Callable[[Any], Tensor]
    shards: tuple[str, ...] = ()
    key: tuple[int, int] | None = None
    task: ClassVar[Task] = CLASSIFICATION

    def augmented(self, seed: int, epoch: int) -> StreamImages:
        return replace(self, key=(seed, epoch))

    def __len__(self) -> int:
        """The images of the split, all processes together."""
        return int(getattr(self.dataset.reader, "num_samples", 0)) or len(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        self.dataset.transform = self.transform if self.key is None else self.training
        worker, rank = get_worker_info(), getattr(self.dataset.reader, "dist_rank", 0)
        samples = iter(self.dataset)
        for count in itertools.count():
            if self.key is not None:
                seed_all(mix(*self.key, rank, worker.id if worker else 0, count))
            try:
                yield next(samples)
            except StopIteration:
                return


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
    may come twice in an epoch, as in timm. Otherwise each process reads its part of the shards once.

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
        seed, epoch = images.key or (0, 0)
        reader.common_seed, reader.worker_seed = mix(seed, "shards") % 2**31, mix(order, rank, "stream")
        images.dataset.set_epoch(epoch)
    elif shards and processes > 1:  # timm would read as many images in each process, some twice or not at all
        reader.dist_rank, reader.dist_num_replicas = 0, 1
        reader.split_info = replace(reader.split_info, filenames=shards[rank::processes])
        steps = None if reader.split_info.filenames else 0
    generator = None if order is None else torch.Generator().manual_seed(mix(order, rank, "stream"))
    return StreamLoader(images, batch_size, steps=steps, start=start, num_workers=workers, generator=generator,
                        worker_init_fn=signals_of_a_worker)


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
