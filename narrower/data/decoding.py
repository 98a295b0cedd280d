"""Small images, decoded once into one tensor, and kept decoded on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .images import Files, Source, converted
from .seeding import mix

DECODING = 2  # counts changes of what a file becomes: 16-bit images were white once


def decoded(
    source: Source, size: tuple[int, int], mode: str, cache: Path | None, watch: Callable[..., Any]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All images as uint8 `[N, C, H, W]`, and their labels. Read from the folder `cache` if possible, else written there.

    `mode`: of PIL, RGB or L. `watch(iterable, count)` shows progress.
    """
    file = cache_file(source, size, mode, cache)
    if file is not None and file.is_file() and isinstance(source, Files):
        try:
            return torch.from_numpy(np.load(file)).permute(0, 3, 1, 2), torch.tensor(source.labels)
        except (OSError, ValueError):
            pass  # replace a damaged cache
    pixels = np.empty((len(source), *size, len(mode)), dtype=np.uint8)
    labels = np.empty(len(source), dtype=np.int64)

    def decode(index: int) -> None:
        image, labels[index] = source[index]
        pixels[index] = fitted(image, size, mode)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in watch(pool.map(decode, range(len(source))), len(source)):
            pass
    if file is not None:
        store(file, pixels)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels)


def fitted(image: Any, size: tuple[int, int], mode: str) -> np.ndarray[Any, Any]:
    """The pixels `[H, W, C]`, scaled and cropped at the centre to `size`."""
    from PIL import ImageOps

    image = converted(image, mode)
    if image.size != (size[1], size[0]):
        image = ImageOps.fit(image, (size[1], size[0]))
    return np.asarray(image).reshape(*size, -1)


def cache_file(source: Source, size: tuple[int, int], mode: str, cache: Path | None) -> Path | None:
    """The cache file. Its name is a hash of all that determines the pixels: the files' paths, sizes and times, size and mode.

    None if nothing is cached.
    """
    if cache is None or not isinstance(source, Files):
        return None
    stats = [(path, stat.st_size, stat.st_mtime_ns) for path in source.paths for stat in [os.stat(path)]]
    return cache / f"images-{mix(stats, size, mode, DECODING):014x}.npy"


def store(file: Path, pixels: np.ndarray[Any, Any]) -> None:
    """Write the file whole, or not at all."""
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as stream:
            np.save(stream, pixels)
        part.replace(file)
    except OSError:  # disk full or no permission: the images are in memory anyway
        with suppress(OSError):
            part.unlink(missing_ok=True)
