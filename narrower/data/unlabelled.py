"""Images without classes: what measuring, repairing and label-free training need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataError
from .images import Files, Images, LazyImages, TensorImages

EVALUATED = 5
"""Without a folder for evaluation every fifth image is kept for it."""
SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Of image files. Others, and what begins with a dot, are passed over."""


def unlabelled_files(root: Path, mode: str, folders: dict[str, tuple[str, ...]]) -> dict[str, Files] | None:
    """The images of `root`, or of its folders for training and evaluation, where they lie directly there. None if none do.

    Raises:
        DataError: they are too few, or folders with images lie beside them.
    """
    places = {split: next((root / name for name in names if (root / name).is_dir()), None) for split, names in folders.items()}
    for place in filter(None, places.values()):
        check_alike(place)
    train = image_files(places["train"] or root)
    if not train:
        return None
    val = image_files(places["val"]) if places["val"] is not None else []
    if not val:
        train, val = [p for k, p in enumerate(train) if (k + 1) % EVALUATED], train[EVALUATED - 1 :: EVALUATED]
    if not val:
        raise DataError(f"{root} has {len(train)} images: {EVALUATED} at least are needed, one of them to evaluate on")
    return {split: Files(paths, [0] * len(paths), mode) for split, paths in (("train", train), ("val", val))}


def check_alike(place: Path) -> None:
    """Raise DataError where images lie directly in a folder and in folders inside it: have they classes or not?"""
    if not (loose := image_files(place)):
        return
    inside = (folder for folder in sorted(place.iterdir()) if folder.is_dir() and not folder.name.startswith("."))
    if folder := next((folder for folder in inside if any(map(is_image, folder.rglob("*")))), None):
        raise DataError(f"{place} has images ({Path(loose[0]).name}) and folders of images ({folder.name}) side by side: with "
                        "classes all must lie in folders, without classes none may")


def image_files(place: Path) -> list[str]:
    """The image files directly in a folder, sorted by name."""
    return sorted(str(path) for path in place.iterdir() if is_image(path))


def is_image(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def relabelled(images: Images, labels: Tensor) -> Images:
    """The same images with other labels `(N,)`. Raises DataError for a stream."""
    if isinstance(images, TensorImages):
        return replace(images, labels=labels)
    if not isinstance(images, LazyImages) or not isinstance(images.source, Files):
        raise DataError("these images cannot be given labels: only those of a folder can")
    return replace(images, source=replace(images.source, labels=torch.as_tensor(labels).tolist()))
