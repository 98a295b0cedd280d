"""WebDataset shards and Hugging Face data sets through timm: all images once, the same order again, parts for processes."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("PIL")
from PIL import Image
from support.processes import in_two

from narrower.data import ImageData, Parts, Reading, StreamImages, batches, hold_out, open_data
from narrower.data.streams import fingerprint
from narrower.errors import DataError

READING = Reading(size=8, flip=0.5)
COUNTS = {"train": 44, "validation": 21}
SHARDS = {"train": 4, "validation": 3}


def picture(index: int) -> Any:
    """An image for each index, which its label is. Cropped or mirrored it is another one."""
    pixels = np.random.default_rng(index).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_shards(root: Path) -> None:
    """Tar files of WebDataset, with the file that tells timm how many images they have."""
    splits: dict[str, Any] = {}
    root.mkdir()
    for split, count in COUNTS.items():
        parts = np.array_split(np.arange(count), SHARDS[split])
        names = [f"{split}-{k:02d}.tar" for k in range(len(parts))]
        for name, part in zip(names, parts, strict=True):
            with tarfile.open(root / name, "w") as tar:
                for index in map(int, part):
                    image = io.BytesIO()
                    picture(index).save(image, "PNG")
                    for end, content in (("png", image.getvalue()), ("cls", str(index).encode())):
                        member = tarfile.TarInfo(f"{index:04d}.{end}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        splits[split] = {"name": split, "num_samples": count, "filenames": names, "shard_lengths": [len(p) for p in parts]}
    (root / "_info.json").write_text(json.dumps({"splits": splits}))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("webdataset")
    root = tmp_path_factory.mktemp("wds") / "shards"
    write_shards(root)
    return root


def opened(shards: Path) -> ImageData:
    return open_data("wds/", shards, READING, num_classes=44)


def labels(loader: Any) -> list[int]:
    return [int(label) for _, y in loader for label in y]


def test_shards_are_evaluated_once_by_any_number_of_processes_and_readers(shards: Path) -> None:
    for workers in (0, 2):
        assert sorted(labels(batches(opened(shards).val, 4, workers=workers))) == list(range(21))
    found = in_two(lambda rank: labels(batches(opened(shards).val, 4, shard=(rank, 2), workers=2 * rank)))
    assert sorted(found[0] + found[1]) == list(range(21)) and found[0] and found[1]
    more = [labels(batches(opened(shards).val, 4, shard=(rank, 5))) for rank in range(5)]  # than shards
    assert sorted(itertools.chain(*more)) == list(range(21))


@pytest.mark.parametrize("cuda", [False, True])
def test_batches_lie_in_pinned_memory_where_cuda_is_used(cuda: bool, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: cuda)
    assert batches(opened(shards).val, 4).pin_memory is cuda


def epoch(data: ImageData, number: int = 0, **options: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(batches(data.train.augmented(7, number), 4, order=number, **options))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_comes_again_as_it_was_and_goes_on_in_the_middle(shards: Path, workers: int) -> None:
    def same(one: Any, two: Any) -> bool:
        return len(one) == len(two) and all(a.equal(c) and b.equal(d) for (a, b), (c, d) in zip(one, two, strict=True))

    data = opened(shards)
    first, second = (epoch(data, number, workers=workers) for number in (0, 1))
    assert len(first) == len(batches(data.train.augmented(7, 0), 4, order=0, workers=workers)) and not same(first, second)
    assert all(len(y) == 4 for _, y in first)
    other = opened(shards)
    assert same(epoch(other, 1, workers=workers, start=5), second[5:])
    assert same(epoch(other, 0, workers=workers), first)
    if not workers:
        assert sorted(labels(first)) == list(range(44))


def test_processes_train_on_different_shards_in_equally_many_batches(shards: Path) -> None:
    found = in_two(lambda rank: [y.tolist() for _, y in epoch(opened(shards), shard=(rank, 2), workers=2)])
    one, two = ({n for y in part for n in y} for part in found)
    assert len(found[0]) == len(found[1]) >= 6 and not one & two and one | two == set(range(44))


def test_training_images_without_augmentation_are_plain(shards: Path) -> None:
    train = opened(shards).train
    assert isinstance(train, StreamImages)
    plain = {int(k): x for xs, y in batches(train, 4, order=0) for x, k in zip(xs, y, strict=True)}
    validation = {int(k): x for xs, y in batches(opened(shards).val, 4) for x, k in zip(xs, y, strict=True)}
    assert all(plain[k].equal(validation[k]) for k in validation)


def test_fewer_shards_than_processes_are_refused(shards: Path) -> None:
    with pytest.raises(DataError, match="4 shards cannot be divided among 5 processes"):
        epoch(opened(shards), shard=(0, 5))


def held_and_fit(shards: Path, shard: tuple[int, int] = (0, 1), workers: int = 0) -> tuple[list[int], list[int], list[int]]:
    """The labels of the images held out; of two epochs of the others; of those sampled from these."""
    fit, held = hold_out(opened(shards).train, 1000, seed=3)
    assert held is not None
    assert len(held) == 2 and len(fit) == 42  # 5 % of the images
    first, second = (labels(batches(fit.augmented(7, k), 4, order=k, shard=shard, workers=workers)) for k in range(2))
    assert len(first) == len(second) and len(first) % 4 == 0
    return labels(batches(held, 4)), first + second, labels(batches(fit, 4, order=5, limit=12))[:12]


def test_the_same_images_are_held_out_and_sampled_in_any_number_of_processes_and_readers(shards: Path) -> None:
    held, fit, sampled = held_and_fit(shards)
    assert len({*held}) == 2 and {*fit} == set(range(44)) - {*held} and len({*sampled}) == 12 and {*sampled} <= {*fit}
    for found in in_two(lambda rank: held_and_fit(shards, (rank, 2), 2)):
        assert (found[0], found[2]) == (held, sampled) and not {*found[1]} & {*held}
    fit_alone, held_alone = hold_out(opened(shards).train, 0, seed=3)
    assert held_alone is None and len(fit_alone) == 44


def test_images_held_out_are_as_those_to_evaluate_on(shards: Path) -> None:
    _, held = hold_out(opened(shards).train, 2, seed=1)
    assert held is not None
    plain = {int(k): x for xs, y in batches(opened(shards).train, 4, order=0) for x, k in zip(xs, y, strict=True)}
    for image, label in batches(held, 1):
        torch.testing.assert_close(image[0], plain[int(label)])


def test_a_process_that_has_only_images_held_out_is_told(shards: Path) -> None:
    """It would read its shard again for ever."""
    train = opened(shards).train
    assert isinstance(train, StreamImages)
    fit = replace(train, held_out=frozenset(fingerprint(picture(k)) for k in range(11)))  # all of one shard
    ended = 0
    for rank in range(4):
        try:
            assert len(labels(batches(fit.augmented(7, 0), 4, order=0, shard=(rank, 4)))) == 12
        except DataError as error:
            assert "ended after 0 of 3 batches" in str(error)
            ended += 1
    assert ended == 1


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet files as on the hub, with the card that tells a streaming reader how many images they have."""
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("hf") / "set"
    (root / "data").mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=44)})
    for split, count in COUNTS.items():
        for k in range(2):
            index = list(range(k, count, 2))
            part = datasets.Dataset.from_dict({"image": [picture(i) for i in index], "label": index}, features=features)
            part.to_parquet(root / "data" / f"{split}-{k:05d}-of-00002.parquet")
    lines = [f"    - name: {split}\n      num_examples: {count}\n      num_bytes: {count}" for split, count in COUNTS.items()]
    (root / "README.md").write_text("---\ndataset_info:\n  splits:\n" + "\n".join(lines) + "\n---\n")
    return root


def test_hugging_face_data_sets_are_read_by_index_and_streamed(hugging_face: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cache = hugging_face.parent / "cache"
    data = open_data(f"hfds/{hugging_face}", cache, READING)
    assert data.num_classes == 44 and (len(data.train), len(data.val)) == (44, 21)
    found = [labels(batches(data.train, 4, order=1, shard=(rank, 2))) for rank in (0, 1)]
    assert sorted(found[0] + found[1]) == list(range(44))

    stream = open_data(f"hfids/{hugging_face}", cache, READING, num_classes=44)
    assert isinstance(stream.train, StreamImages)
    assert sorted(labels(batches(stream.val, 4))) == list(range(21))
    first = epoch(stream)
    assert sorted(labels(first)) == list(range(44)) and len(first) == 11
    assert labels(epoch(stream, start=4)) == labels(first[4:]) and labels(epoch(stream, 1)) != labels(first)
    parts = in_two(lambda rank: labels(batches(open_data(f"hfids/{hugging_face}", cache, READING, num_classes=44).val, 4,
                                               shard=(rank, 2))))
    assert sorted(parts[0] + parts[1]) == list(range(21))


def test_a_folder_of_save_to_disk_is_read_by_the_names_that_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    features = datasets.Features({"img": datasets.Image(), "digit": datasets.ClassLabel(num_classes=9)})
    splits = {name: datasets.Dataset.from_dict({"img": [picture(k) for k in range(count)], "digit": [*range(count)]}, features)
              for name, count in (("train", 5), ("test", 3))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    for kind in ("hfds", "hfids"):
        name, cache = f"{kind}/{tmp_path / 'set'}", tmp_path / "cache"
        data = open_data(name, cache, READING, parts=Parts(val="test", images="img", labels="digit"), num_classes=9)
        assert data.num_classes == 9 and labels(batches(data.val, 4)) == [0, 1, 2] and len(data.train) == 5
        for parts, said in ((Parts(images="img", labels="digit"), "--val-split"),
                            (Parts(val="test", labels="digit"), "no column 'image', but"),
                            (Parts(val="test", images="img"), "no column 'label', but img, digit")):
            with pytest.raises(DataError, match=said):
                open_data(name, cache, READING, parts=parts, num_classes=9)
