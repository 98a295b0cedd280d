"""Images without classes: found directly in a folder, split, and given labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")
from PIL import Image

from narrower.data.sources import Reading, open_data
from narrower.data.unlabelled import relabelled
from narrower.errors import DataError


def make(place: Path, count: int, size: int = 8) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        Image.new("RGB", (size, size), (10 * k, 0, 0)).save(place / f"{k:03}.png")
    return place


def test_every_fifth_image_of_a_flat_folder_is_kept_for_evaluation(tmp_path: Path) -> None:
    data = open_data(root=make(tmp_path, 11))
    assert not data.labelled and data.num_classes == 0
    assert (len(data.train), len(data.val)) == (9, 2)
    reds = [round(float(data.val[k][0][0, 0, 0] * 0.229 + 0.485) * 25.5) for k in range(2)]
    assert reds == [4, 9]


def test_flat_folders_of_both_splits_are_taken_as_they_are(tmp_path: Path) -> None:
    make(tmp_path / "train", 6), make(tmp_path / "val", 3)
    data = open_data(root=tmp_path)
    assert (len(data.train), len(data.val)) == (6, 3)


def test_hidden_files_and_folders_are_passed_over_and_folders_beside_images_only_without_images(tmp_path: Path) -> None:
    """Images lie in `train` and `val` or in folders there, not both: whether they have classes is not guessed."""
    make(tmp_path / "train", 5), make(tmp_path / "val", 3), make(tmp_path / "train" / ".thumbs", 1)
    (tmp_path / "train" / "notes").mkdir()
    (tmp_path / "train" / "._000.png").write_bytes(b"none")
    data = open_data(root=tmp_path)
    assert not data.labelled and (len(data.train), len(data.val)) == (5, 3)
    make(tmp_path / "train" / "notes" / "more", 1)
    with pytest.raises(DataError, match=r"train has images \(000.png\) and folders of images \(notes\) side by side"):
        open_data(root=tmp_path)


@pytest.mark.parametrize("size", [8, 80])  # in memory, and read file by file
def test_images_can_be_given_labels(size: int, tmp_path: Path) -> None:
    images = open_data(root=make(tmp_path, 10, size), reading=Reading(large=32)).val
    assert [int(images[k][1]) for k in range(2)] == [0, 0]
    labelled = relabelled(images, torch.tensor([3, 5]))
    assert [int(labelled[k][1]) for k in range(2)] == [3, 5]
    assert torch.equal(images[1][0], labelled[1][0])


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 4 images: 5 at least"):
        open_data(root=make(tmp_path, 4))
