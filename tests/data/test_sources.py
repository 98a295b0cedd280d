"""Data sets: their splits, how images are read and cached, and what is said of folders in another layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("sklearn")
from PIL import Image

from narrower.data.images import LazyImages, TensorImages, batches
from narrower.data.sources import Reading, digits, folder, open_data
from narrower.errors import ConfigError, DataError


def images(root: Path, size: int = 8, per_class: int = 3, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """A folder in ImageFolder layout, two classes; the image (split, class, number) has one grey value of its own."""
    for i, split in enumerate(splits):
        for j, name in enumerate(("10", "2")):
            (root / split / name).mkdir(parents=True)
            for k in range(per_class):
                value = 100 * i + 40 * j + 5 * k
                pixels = np.full((size, size, 3), value, np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{k}.png")
    return root


def test_digits_split_is_stratified_and_fixed() -> None:
    data, again = digits(), digits()
    assert isinstance(data.train, TensorImages) and isinstance(data.val, TensorImages)
    assert isinstance(again.val, TensorImages)
    assert (len(data.train), len(data.val)) == (1198, 599)
    assert data.val.labels.bincount().min() >= 57
    assert torch.equal(data.val.images, again.val.images)
    x, y = data.train[0]
    assert x.shape == data.input_size == (3, 16, 16) and y.dim() == 0
    seen = {image.numpy().tobytes() for image in data.train.images[:, 0]}
    shared = sum(image.numpy().tobytes() in seen for image in data.val.images[:, 0])
    assert shared == 0


def test_images_are_held_out_once_for_all() -> None:
    data = digits()
    fit, held = data.split(30, 1)
    assert isinstance(fit, TensorImages) and isinstance(held, TensorImages) and (len(fit), len(held)) == (1168, 30)
    assert data.split(30, 1) is data.split(30, 1) and data.split(0, 1) == (data.train, None)
    assert not torch.equal(data.split(30, 2)[1].labels, held.labels)  # type: ignore[union-attr]


def test_folder_in_natural_order_with_values(tmp_path: Path) -> None:
    data = folder(images(tmp_path), Reading(mean=(0.0,) * 3, std=(1.0,) * 3))
    assert (data.num_classes, data.input_size) == (2, (3, 8, 8))
    x, y = next(iter(batches(data.val, 10)))
    assert y.tolist() == [0, 0, 0, 1, 1, 1]  # class 2 comes before class 10, as in timm
    assert (x[:, 0, 0, 0] * 255).round().tolist() == [140, 145, 150, 100, 105, 110]


def test_classes_are_the_outermost_folders(tmp_path: Path) -> None:
    """Also where all innermost ones are called alike. What begins with a dot is none."""
    for split in ("train", "val"):
        for place in ("2/day/far", "10", "10/day", "10/.thumbs", ".ipynb_checkpoints"):
            (tmp_path / split / place).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / place / "0.png")
        (tmp_path / split / "2" / "._0.png").write_bytes(b"none")
    data = open_data("", tmp_path)
    assert data.classes == ("2", "10") and isinstance(data.train, TensorImages)
    assert data.train.labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize("suffix", [".webp", ".BMP", ".tif"])
def test_images_of_all_usual_kinds_count(suffix: str, tmp_path: Path) -> None:
    for path in images(tmp_path).glob("*/*/1.png"):
        Image.new("RGB", (8, 8), (90, 90, 90)).save(path.with_name(f"z{suffix}"))
    (tmp_path / "train" / "2" / "notes.txt").write_text("none")
    data = open_data("", tmp_path)
    assert (len(data.train), len(data.val)) == (8, 8)


def test_large_images_are_read_as_needed(tmp_path: Path) -> None:
    root = images(tmp_path, size=80)
    for path in root.glob("train/*/*.png"):
        Image.effect_noise((80, 80), 100).convert("RGB").save(path)  # so that every crop differs
    data = folder(root, Reading(size=72))
    assert isinstance(data.train, LazyImages) and data.input_size == (3, 72, 72)
    assert next(iter(batches(data.val, 2)))[0].shape == (2, 3, 72, 72)
    one, two = (next(iter(batches(data.train.augmented(0, 1), 6, workers=w)))[0] for w in (0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, next(iter(batches(data.train.augmented(0, 2), 6)))[0])
    assert folder(tmp_path, Reading()).input_size == (3, 224, 224)
    assert folder(tmp_path, Reading(size=16)).input_size == (3, 16, 16)


def test_wide_images_are_cropped_or_squashed(tmp_path: Path) -> None:
    """The left fifth is white: the middle of the image does not have it."""
    for path in images(tmp_path, size=80).glob("*/*/*.png"):
        Image.fromarray(np.repeat((np.arange(160) < 32)[None, :, None] * np.uint8(255), 80, 0).repeat(3, 2)).save(path)
    for mode, white in (("center", False), ("squash", True)):
        x = folder(tmp_path, Reading(size=72, mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0, crop_mode=mode)).val[0][0]
        assert x.shape == (3, 72, 72) and bool(x.max() > 0.9) == white


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    data = folder(images(tmp_path), Reading(channels=1, mean=(0.5,), std=(0.5,)))
    assert next(iter(batches(data.train, 2)))[0].shape == (2, 1, 8, 8)


def test_cache_is_used_renewed_and_never_in_the_data_folder(tmp_path: Path) -> None:
    root, cache = images(tmp_path / "data"), tmp_path / "cache"
    before = sorted(path.relative_to(root) for path in root.rglob("*"))

    def pixels() -> torch.Tensor:
        found = folder(root, Reading(cache=cache)).train
        assert isinstance(found, TensorImages)
        return found.images

    first = pixels()
    (file,) = cache.iterdir()
    np.save(file, np.load(file) + 1)
    assert torch.equal(pixels(), first + 1)  # taken from the cache
    file.write_bytes(b"damaged")
    assert torch.equal(pixels(), first)  # made anew
    Image.new("RGB", (8, 8), "white").save(root / "train" / "2" / "0.png")
    assert not torch.equal(pixels(), first)  # the files have changed
    assert sorted(path.relative_to(root) for path in root.rglob("*")) == before


def test_a_cache_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk. The images are in memory all the same."""
    def full(stream: BinaryIO, pixels: object) -> None:
        stream.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert len(folder(images(tmp_path / "images"), Reading(cache=tmp_path / "cache")).train) == 6
    assert not list((tmp_path / "cache").iterdir())


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    root = images(tmp_path)
    bad = root / "train" / "10" / "1.png"
    bad.write_bytes(bad.read_bytes()[:45])
    with pytest.raises(DataError, match=r"cannot read image .*train/10/1\.png"):
        _ = folder(root, Reading()).train


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda root: (root / "train").rename(root / "pictures"), "no folder train"),
        (lambda root: (root / "val").rename(root / "rest"), "no folder val"),
        (lambda root: [path.unlink() for path in root.glob("val/*/*")], "no images under"),
        (lambda root: (root / "val" / "2").rename(root / "val" / "3"), "different classes; only under train: '2'"),
        (lambda root: [path.unlink() for path in root.glob("*/2/*")], "one class only"),
        (lambda root: (root / "train/2/0.png").rename(root / "train/0.png"),
         r"train has images \(0.png\) and folders of images \(10\) side by side"),
        (lambda root: (root / "val/2/0.png").rename(root / "val/0.png"), "val has images .* side by side"),
    ],
)
def test_folders_in_another_layout_are_named(break_it: Callable[[Path], object], says: str, tmp_path: Path) -> None:
    break_it(images(tmp_path))
    with pytest.raises(DataError, match=says):
        open_data("", tmp_path)


def test_missing_data_are_an_error_with_advice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_data("", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="--data-dir"):
        open_data("")
    with pytest.raises(DataError, match=r"timm cannot open dataset 'torch/cifar10'.*--dataset-download"):
        open_data("torch/cifar10", tmp_path)
    with pytest.raises(DataError, match="timm cannot open dataset 'no_such_set'"):
        open_data("no_such_set", tmp_path)


def test_a_folder_is_not_ignored_for_the_digits(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="do not come from --data-dir .*: give --dataset folder"):
        open_data("digits", images(tmp_path))
    assert open_data("folder", tmp_path).num_classes == 2


def test_the_number_of_classes_is_that_of_the_images(tmp_path: Path) -> None:
    """The one that is asked for only counts where a data set does not tell its own."""
    assert open_data("torch/image_folder", images(tmp_path), num_classes=5).num_classes == 2


def test_names_of_timm_open_its_data_sets(tmp_path: Path) -> None:
    data = open_data("torch/image_folder", images(tmp_path))
    assert (data.num_classes, data.input_size, len(data.val)) == (2, (3, 8, 8), 6)


def deep(kind: str, values: np.ndarray) -> Image.Image:
    """A grey image whose pixels have 16 bits, 32 bits, or are real numbers."""
    return Image.fromarray((values * {"I;16": 257, "I": 1000, "F": 1 / 255}[kind]).astype(
        {"I;16": np.uint16, "I": np.int32, "F": np.float32}[kind]))  # fmt: skip


@pytest.mark.parametrize("size", [None, 72])
@pytest.mark.parametrize(("channels", "suffix"), [(3, ".png"), (1, ".tif"), (1, ".pgm")])
def test_pixels_of_16_bits_are_scaled_to_8(channels: int, suffix: str, size: int | None, tmp_path: Path) -> None:
    """PIL clips them at 255, so that all is white. Small images are decoded, large ones read as needed."""
    values = np.arange(64).reshape(8, 8) * 4
    for path in images(tmp_path).glob("*/*/*.png"):
        path.unlink()
        deep("I;16", values).save(path.with_suffix(suffix))
        if suffix == ".pgm":  # PIL opens it with 32 bits, its numbers are of 16
            assert Image.open(path.with_suffix(suffix)).mode.startswith("I")
    x = folder(tmp_path, Reading(size=size, channels=channels, mean=(0.0,) * channels, std=(1.0,) * channels)).val[0][0]
    if size is None:
        assert torch.equal((x * 255).round(), torch.from_numpy(values).float().expand(channels, 8, 8))
    assert abs(float(x.mean()) - values.mean() / 255) < 0.02


@pytest.mark.parametrize(("kind", "says"), [("I", "32-bit numbers"), ("F", "real numbers")])
def test_pixels_of_unknown_white_are_refused(kind: str, says: str, tmp_path: Path) -> None:
    for path in images(tmp_path).glob("*/*/0.png"):
        path.unlink()
        deep(kind, np.full((8, 8), 90)).save(path.with_suffix(".tif"))
    with pytest.raises(DataError, match=rf"0\.tif has {says} for pixels.*with 8 or 16 bits, or read them by a --task"):
        _ = folder(tmp_path, Reading()).train
