"""Data sets: digits (included in scikit-learn), a folder in ImageFolder layout, or a data set of timm by name.

Images of at most 64 px are decoded once into a uint8 tensor and augmented in batches. Larger images are read when they are
needed, with timm's transforms.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import IterableDataset

from ..errors import ConfigError, DataError
from ..extras import optional
from .decoding import decoded
from .images import Files, Images, LazyImages, Source, TensorImages, hold_out
from .streams import StreamImages, shards_of
from .task import CLASSIFICATION, Task
from .unlabelled import SUFFIXES, unlabelled_files

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SMALL = 64  # pixels: such data sets fit in memory, and decoding them every epoch would take longer than training
FOLDERS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test", "eval")}
Watch = Callable[..., Any]
"""Wraps an iterable to show progress: `watch(iterable, description, total)`."""


def silent(iterable: Any, description: str = "", total: int = 0) -> Any:
    """The `Watch` that shows nothing."""
    return iterable


@dataclass(frozen=True)
class Reading:
    """How images become tensors.

    Attributes:
        size: pixels. None keeps the size of small images and resizes others to `large`.
        large: pixels.
        channels: 3 (RGB) or 1 (grey).
        mean, std: per channel, of pixels in [0, 1].
        flip: probability that a training image is mirrored.
        aa: timm's name of an augmentation of each training image, such as "rand-m9-mstd0.5-inc1".
        scale, color_jitter: of the crops and colours of large training images, as in timm.
        crop_pct, crop_mode, interpolation: how large images are resized for evaluation, as in timm.
        cache: folder for decoded small images. None keeps them in memory only.
    """

    size: int | None = None
    large: int = 224
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    flip: float = 0.5
    aa: str | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    color_jitter: float = 0.0
    crop_pct: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    cache: Path | None = None

    @property
    def mode(self) -> str:
        return "RGB" if self.channels == 3 else "L"


@dataclass(frozen=True)
class Parts:
    """What a data set of timm calls its splits, and its columns of images and labels (None: timm's names for them).

    `val_alone`: a folder of images without `train` will do.
    """

    train: str = "train"
    val: str = "validation"
    images: str | None = None
    labels: str | None = None
    val_alone: bool = False


@dataclass(frozen=True)
class ImageData:
    """Images for training and evaluation. Pixels are read at the first access of `train` or `val`.

    Where images have no classes, `labelled` is False, `num_classes` is 0 and labels mean nothing. Of a user's `task`,
    `num_classes` is 0 too. `classes`: their names, where the data set tells them.
    """

    name: str
    num_classes: int
    input_size: tuple[int, int, int]
    read: Callable[[str], Images] = field(repr=False)
    labelled: bool = True
    task: Task = CLASSIFICATION
    classes: tuple[str, ...] = ()

    @cached_property
    def train(self) -> Images:
        return self.read("train")

    @cached_property
    def val(self) -> Images:
        return self.read("val")

    def split(self, held_out: int, seed: int) -> tuple[Images, Images | None]:
        """The training images to fit, and those that are held out, as `hold_out` gives them. Kept: both may be copies."""
        if (held_out, seed) not in self._splits:
            self._splits[held_out, seed] = hold_out(self.train, held_out, seed)
        return self._splits[held_out, seed]

    @cached_property
    def _splits(self) -> dict[tuple[int, int], tuple[Images, Images | None]]:
        return {}


def open_data(
    dataset: str = "", root: str | Path | None = None, reading: Reading | None = None, *, parts: Parts | None = None,
    download: bool = False, num_classes: int | None = None, watch: Watch = silent,
) -> ImageData:  # fmt: skip
    """Open a data set: "digits", a folder, or a name that timm's `create_dataset` takes.

    Args:
        dataset: "digits", or "" or "folder" for the folder `root`, else a name of timm such as "torch/cifar10".
        root: the folder with the images. For a name of timm, where the data are stored or downloaded to.
        reading: size, channels and normalisation of the images.
        parts: splits and columns of a data set of timm; whether a folder needs `train`.
        download: let timm download the data.
        num_classes: needed if the data set does not tell it.
        watch: shows the progress of decoding.

    Raises:
        DataError: there are no images, classes differ between the splits, or an image cannot be read.
        MissingExtraError: a package is missing.
        ConfigError: a setting is missing, or there is a folder for the digits.
    """
    reading, parts = reading or Reading(), parts or Parts()
    if dataset == "digits":
        if root is not None:
            raise ConfigError(f"the digits are embedded, they do not come from --data-dir {root}: give --dataset folder for "
                              "the images there")
        if reading.aa is not None:
            raise ConfigError(f"--aa {reading.aa} is for photographs, the digits are only shifted")
        return digits(reading.size or 16, reading.channels, reading.mean, reading.std)
    if dataset in ("", "folder"):
        if root is None:
            raise ConfigError("say where the images are (--data-dir), or take the embedded ones (--dataset digits)")
        return folder(Path(root), reading, watch, parts.val_alone)
    return from_timm(dataset, root, reading, parts=parts, download=download, num_classes=num_classes, watch=watch)


def digits(
    size: int = 16,
    channels: int = 3,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> ImageData:
    """The 1,797 8x8 digits of scikit-learn, enlarged to `size` px, in a stratified split.

    Training shifts them by up to size / 8 pixels and never mirrors them.
    """
    bunch = optional("sklearn.datasets").load_digits()
    pixels = torch.tensor(bunch.images, dtype=torch.float32)[:, None] * (255 / 16)
    pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True).round().clamp(0, 255)
    images = pixels.to(torch.uint8).expand(-1, channels, -1, -1)
    labels = torch.tensor(bunch.target)
    split = optional("sklearn.model_selection").train_test_split
    train, val = split(np.arange(len(labels)), test_size=1 / 3, stratify=labels, random_state=0)

    def read(split: str) -> Images:
        index = torch.from_numpy(np.sort(train if split == "train" else val))
        return TensorImages(images[index], labels[index], mean[:channels], std[:channels], pad=max(1, size // 8))

    return ImageData("digits", 10, (channels, size, size), read)


def folder(root: Path, reading: Reading, watch: Watch = silent, val_alone: bool = False) -> ImageData:
    """Images under `root/train/<class>/` and `root/val/<class>/` (or validation, valid, test, eval), also in folders in there.

    Images that lie directly in `root`, or in `root/train` and `root/val`, have no classes. With `val_alone` there may be no
    training images; there is then no `train` to read.
    """
    if not root.is_dir():
        raise DataError(f"data folder {root} does not exist" if not root.exists() else f"{root} is not a folder")
    if (unlabelled := unlabelled_files(root, reading.mode, FOLDERS)) is not None:
        return replace(_image_data(str(root), 0, unlabelled, reading, watch), labelled=False)
    splits = ["val"] if val_alone and _place(root, "train") is None else list(FOLDERS)
    found = {split: _scan(root, split, reading.mode) for split in splits}
    (_, classes), (_, val_classes) = found[splits[0]], found["val"]
    if classes != val_classes:
        only = [f"only under train: {name!r}" for name in classes if name not in val_classes]
        only += [f"only under val: {name!r}" for name in val_classes if name not in classes]
        raise DataError(f"train and val of {root} have different classes; " + ", ".join(only[:8]))
    parts = {split: files for split, (files, _) in found.items()}
    return replace(_image_data(str(root), len(classes), parts, reading, watch), classes=tuple(classes))


def _place(root: Path, split: str) -> Path | None:
    """The folder of a split, if there is one."""
    return next((root / name for name in FOLDERS[split] if (root / name).is_dir()), None)


def _scan(root: Path, split: str, mode: str) -> tuple[Files, list[str]]:
    """The images of one split, and its classes in timm's natural order (2 before 10)."""
    natural_key = optional("timm.utils.misc").natural_key
    if (place := _place(root, split)) is None:
        inside = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        raise DataError(f"{root} has no folder {' or '.join(FOLDERS[split])} (found: {inside}); expected train/<class>/<image>")
    reader = optional("timm.data.readers.reader_image_folder")
    samples, _ = reader.find_images_and_targets(str(place), types=SUFFIXES)  # its classes are the innermost folders
    start = len(str(place))
    paths = [path for path, _ in samples if f"{os.sep}." not in path[start:]]
    if not paths:
        raise DataError(f"no images under {place}; expected {place}/<class>/<image>.jpg (or .png, ...)")
    labels = [path[start + 1 :].rpartition(os.sep)[0].partition(os.sep)[0] for path in paths]
    classes = {name: k for k, name in enumerate(sorted(set(labels), key=lambda name: (natural_key(name), name)))}
    if len(classes) < 2:
        raise DataError(f"{place} has one class only ({next(iter(classes)) or 'no class folders'})")
    return Files(paths, [classes[label] for label in labels], mode), list(classes)


def from_timm(
    name: str, root: str | Path | None, reading: Reading, *, parts: Parts | None = None, download: bool = False,
    num_classes: int | None = None, watch: Watch = silent,
) -> ImageData:  # fmt: skip
    """A data set of timm's `create_dataset`."""
    timm = optional("timm.data")
    if root is None and not name.lower().startswith(("hfds/", "hfids/")):
        raise ConfigError(f"--dataset {name} needs --data-dir: the folder where the data are, or go to")
    place, parts = None if root is None else str(root), parts or Parts()
    try:
        found = {
            split: timm.create_dataset(name, place, split=theirs, is_training=split == "train", download=download,
                                  input_img_mode=reading.mode, input_key=parts.images, target_key=parts.labels)
            for split, theirs in (("train", parts.train), ("val", parts.val))
        }  # fmt: skip
        for part in found.values():
            check_columns(getattr(part, "reader", None))
    except Exception as error:  # readers raise anything, and import what may be missing
        raise DataError(
            f"timm cannot open dataset {name!r} in {place}: {type(error).__name__}: {error} (--dataset-download gets those "
            "that can be; --train-split, --val-split, --input-key and --target-key name its splits and columns; names of data "
            "sets: digits, folder, torch/..., hfds/..., wds/..., tfds/...)"
        ) from error
    names = _class_names(found["train"])
    known = len(names) or _count_classes(found["train"]) or num_classes
    if known is None:
        raise ConfigError(f"dataset {name!r} does not tell its number of classes: say --num-classes")
    return replace(_image_data(name, known, found, reading, watch), classes=names)


def check_columns(reader: Any) -> None:
    """Raise DataError if a reader of Hugging Face's data sets lacks a column. It would see this at the first image."""
    if hasattr(reader, "builder"):
        columns, names = list(reader.builder.info.features or ()), [reader.input_key, reader.target_key]
    elif hasattr(reader, "image_key"):  # it has cast its column of images: one that did not exist has nothing in it
        columns = [name for name, value in reader.dataset[0].items() if value is not None]
        names = [reader.image_key, reader.label_key]
    else:
        return
    if columns and (missing := [name for name in names if name not in columns]):
        raise DataError(f"it has no column {missing[0]!r}, but {', '.join(columns)}")


def _class_names(dataset: Any) -> tuple[str, ...]:
    """In the order of their numbers; empty where the data set does not tell them."""
    found = getattr(dataset, "classes", None) or getattr(getattr(dataset, "reader", None), "class_to_idx", None) or ()
    return tuple(map(str, sorted(found, key=found.__getitem__) if isinstance(found, dict) else found))


def _count_classes(dataset: Any) -> int | None:
    feature = getattr(getattr(getattr(dataset, "reader", None), "dataset", None), "features", {}).get("label")
    return getattr(feature, "num_classes", None)


def _image_data(name: str, num_classes: int, parts: dict[str, Any], reading: Reading, watch: Watch) -> ImageData:
    """Keep small images in memory, read large ones file by file, and iterate over streams."""
    first = next(iter(parts.values()))
    stream = isinstance(first, IterableDataset)
    size = (reading.size, reading.size) if reading.size else _size(first, stream, reading.large)
    height, width = size

    def read(split: str) -> Images:
        if not stream and max(size) <= SMALL:
            images, labels = decoded(parts[split], size, reading.mode, reading.cache,
                                     lambda it, n: watch(it, f"decoding {split} images", n))
            return TensorImages(images, labels, reading.mean, reading.std, max(1, min(size) // 8), reading.flip,
                                augment=augmentation(reading))
        plain, training = _transforms((reading.channels, height, width), reading)
        if stream:
            return StreamImages(parts[split], plain, training, reading.mean, reading.std, shards_of(parts[split].reader))
        return LazyImages(parts[split], plain, training, reading.mode)

    return ImageData(name, num_classes, (reading.channels, height, width), read)


def _size(source: Source, stream: bool, large: int) -> tuple[int, int]:
    """Height and width of the images if a sample of them has one small size. Otherwise `large` for both."""
    if stream:
        return large, large
    sizes = {source[index][0].size for index in range(0, len(source), max(1, len(source) // 32))}
    if len(sizes) == 1:
        width, height = sizes.pop()
        if max(width, height) <= SMALL:
            return height, width
    return large, large


def _transforms(size: tuple[int, int, int], reading: Reading) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """timm's transforms for evaluation (resize, centre crop) and training (random resized crop, mirror)."""
    from timm.data import create_transform

    common: dict[str, Any] = {"mean": reading.mean, "std": reading.std, "interpolation": reading.interpolation}
    plain = create_transform(size, is_training=False, crop_pct=reading.crop_pct, crop_mode=reading.crop_mode, **common)
    augmentation(reading)  # its errors
    training = create_transform(size, is_training=True, hflip=reading.flip, color_jitter=reading.color_jitter,
                                auto_augment=reading.aa, scale=reading.scale, **common)
    training.transforms = [Augmentation(str(reading.aa), step) if operations(step) else step for step in training.transforms]
    return plain, training


def augmentation(reading: Reading) -> Callable[[Any], Any] | None:
    """timm's augmentation of a PIL image by name, None where there is no name.

    Raises:
        MissingExtraError: timm is missing.
        ConfigError: timm has no such augmentation, or none for images of one channel.
    """
    if reading.aa is None:
        return None
    if reading.channels != 3:
        raise ConfigError(f"--aa {reading.aa} is for images of 3 channels, these have {reading.channels}")
    timm = optional("timm.data.auto_augment")
    makers = {"rand": timm.rand_augment_transform, "augmix": timm.augment_and_mix_transform}
    make = next((make for start, make in makers.items() if reading.aa.startswith(start)), timm.auto_augment_transform)
    try:
        change = make(reading.aa, {"translate_const": 10, "img_mean": tuple(round(255 * value) for value in reading.mean)})
    except (AssertionError, ValueError, KeyError) as error:
        raise ConfigError(f"--aa {reading.aa}: {error}; give a name of timm's, such as rand-m9-mstd0.5-inc1") from error
    return Augmentation(reading.aa, change)


class Augmentation:
    """An augmentation of timm. It changes a PIL image, and what it raises is a DataError with its name."""

    def __init__(self, name: str, change: Callable[[Any], Any]) -> None:
        self.name, self.change = name, change
        for operation in operations(change):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize

    def __call__(self, image: Any) -> Any:
        try:
            return self.change(image)
        except Exception as error:  # whatever timm and PIL raise
            raise DataError(f"--aa {self.name} fails on an image of {image.size[0]}x{image.size[1]} pixels: take another "
                            f"({type(error).__name__}: {error})") from error


def operations(change: Any) -> list[Any]:
    """What an augmentation of timm draws from. Empty for other transforms."""
    return [*getattr(change, "ops", ()), *(operation for group in getattr(change, "policy", ()) for operation in group)]


def posterize(image: Any, bits: int, **_: Any) -> Any:
    """As timm's, with 1 bit where its strongest leaves none: an image without contents, which Pillow 13 refuses to make."""
    return optional("timm.data.auto_augment").posterize(image, max(1, bits))
