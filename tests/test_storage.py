"""save and load: what comes back is what was saved, or a StorageError says why not."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import reference
from support.damage import damaged, damaged_bytes
from support.networks import IMAGES, PATTERNS, Plain, Shared, UNet
from torch import nn

import narrower
from narrower.storage import write_whole


def saved(model: nn.Module, inputs: Any, folder: Path, **extra: Any) -> Any:
    small = narrower.narrow(model, reference.halved(model, inputs))
    narrower.save(small, folder, **extra)
    return small


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


@pytest.mark.parametrize("name", PATTERNS)
def test_what_is_loaded_is_what_was_saved(name: str, tmp_path: Path) -> None:
    case = PATTERNS[name]
    model = case.make()
    small = saved(model, case.inputs, tmp_path)
    for p in small.parameters():
        p.data.mul_(1.5)  # trained since
    with torch.no_grad():
        reference.call(small.train(), case.inputs)  # batch statistics, integer counters
    narrower.save(small, tmp_path)
    again = narrower.load(tmp_path, case.make)
    want, have = tensors(small), tensors(again)
    assert want.keys() == have.keys()
    for n, t in want.items():
        assert torch.equal(t, have[n]) and t.dtype == have[n].dtype and type(t) is type(have[n]), n
    reference.mirrors(again)
    a, b = (reference.flat(reference.call(m.eval(), case.inputs)) for m in (small, again))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "narrower.json"]


def test_tied_parameters_are_stored_once_and_loaded_tied(tmp_path: Path) -> None:
    saved(Shared(), IMAGES, tmp_path)
    again: Any = narrower.load(tmp_path, Shared)
    assert again.left.weight is again.right.weight
    assert len([n for n in load_file(tmp_path / "model.safetensors") if n in ("left.weight", "right.weight")]) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    small = saved(Plain().to(dtype), IMAGES.to(dtype), tmp_path)
    again = narrower.load(tmp_path, lambda: Plain().to(dtype))
    assert all(torch.equal(a, b) and a.dtype == b.dtype == dtype
               for a, b in zip(small.parameters(), again.parameters(), strict=True))


def test_frozen_parameters_follow_the_factory_and_what_is_loaded_trains(tmp_path: Path) -> None:
    saved(Plain(), IMAGES, tmp_path)

    def frozen() -> nn.Module:
        model = Plain()
        model.conv1.requires_grad_(False)
        return model

    again: Any = narrower.load(tmp_path, frozen)
    assert not again.conv1.weight.requires_grad and again.conv2.weight.requires_grad
    again(IMAGES).sum().backward()
    assert again.conv2.weight.grad.shape == again.conv2.weight.shape


def test_a_network_made_on_meta_is_loaded_with_its_weights(tmp_path: Path) -> None:
    def on_meta() -> nn.Module:
        with torch.device("meta"):
            return Plain()

    small = saved(Plain(), IMAGES, tmp_path).eval()
    again = narrower.load(tmp_path, on_meta).eval()
    assert {t.device.type for t in tensors(again).values()} == {"cpu"}
    assert torch.equal(again(IMAGES), small(IMAGES))


def test_the_memory_format_is_that_of_the_dense_network(tmp_path: Path) -> None:
    def channels_last() -> nn.Module:
        return Plain().to(memory_format=torch.channels_last)

    small = saved(channels_last(), IMAGES, tmp_path)
    for make, fmt in ((channels_last, torch.channels_last), (Plain, torch.contiguous_format)):
        again: Any = narrower.load(tmp_path, make)
        assert torch.equal(again.conv2.weight, small.conv2.weight) and again.conv2.weight.is_contiguous(memory_format=fmt)


def test_load_trace_narrow_save_again(tmp_path: Path) -> None:
    saved(UNet(), IMAGES, tmp_path / "once")
    once = narrower.load(tmp_path / "once", UNet)
    twice = narrower.narrow(once, reference.halved(once, IMAGES, seed=1, remove=0.3))
    narrower.save(twice, tmp_path / "twice")
    again = narrower.load(tmp_path / "twice", UNet)
    assert all(torch.equal(a, b) for a, b in zip(twice.parameters(), again.parameters(), strict=True))
    assert json.loads((tmp_path / "twice/narrower.json").read_text())["dense"] == {
        n: list(t.shape) for n, t in tensors(UNet()).items()}


FORMAT_1 = """{"format": 1, "dense": {"0.weight": [4, 1, 1, 1], "0.bias": [4], "2.weight": [2, 4, 1, 1], "2.bias": [2]},
 "shapes": {"0.weight": [2, 1, 1, 1], "0.bias": [2], "2.weight": [2, 2, 1, 1], "2.bias": [2]}, "tied": {},
 "plans": [{"0": [2, 3]}], "numbers": [], "created": [], "extra": {}}"""


def test_a_folder_of_format_1_loads_and_is_saved_as_format_2(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))

    shapes = {"0.weight": (2, 1, 1, 1), "0.bias": (2,), "2.weight": (2, 2, 1, 1), "2.bias": (2,)}
    values = {n: torch.randn(s) for n, s in shapes.items()}
    (tmp_path / "narrower.json").write_text(FORMAT_1)
    save_file(values, tmp_path / "model.safetensors")
    model = narrower.load(tmp_path, make)
    assert all(torch.equal(t, values[n]) for n, t in tensors(model).items())
    narrower.save(model, tmp_path)
    meta = json.loads((tmp_path / "narrower.json").read_text())
    old = json.loads(FORMAT_1)
    assert meta.pop("format") == 2 and old.pop("plans") and meta == {k: v for k, v in old.items() if k != "format"}


def test_copies_and_pickles_of_a_narrow_network_can_be_saved(tmp_path: Path) -> None:
    small = saved(UNet(), IMAGES, tmp_path)
    torch.save(small, tmp_path / "pickle")
    for k, other in enumerate((copy.deepcopy(small), torch.load(tmp_path / "pickle", weights_only=False))):
        again = narrower.load(narrower.save(other, tmp_path / str(k)), UNet)
        assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))


def test_saving_over_a_run_replaces_it_and_a_failed_save_does_not(tmp_path: Path) -> None:
    first = saved(Plain(), IMAGES, tmp_path)
    with pytest.raises(Exception, match="JSON|serializable"):
        narrower.save(first, tmp_path, extra=object())
    again = narrower.load(tmp_path, Plain)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    second = saved(Plain(), IMAGES, tmp_path)
    assert torch.equal(narrower.load(tmp_path, Plain).get_parameter("conv1.weight"), second.conv1.weight)


def test_what_cannot_be_written_replaces_nothing(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "file" / "two"
    for path in (one, tmp_path / "file"):
        path.write_text("old")
    with pytest.raises(narrower.StorageError, match="cannot write .*file: "):
        write_whole({one: b"new", two: b"new"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"one": "old", "file": "old"}


def test_extra_values_are_kept(tmp_path: Path) -> None:
    saved(Plain(), IMAGES, tmp_path, accuracy=0.5, names=["a", "b"])
    assert json.loads((tmp_path / "narrower.json").read_text())["extra"] == {"accuracy": 0.5, "names": ["a", "b"]}


def test_extra_numbers_may_be_of_numpy_or_torch_and_other_values_are_an_error(tmp_path: Path) -> None:
    small = saved(Plain(), IMAGES, tmp_path, accuracy=np.float32(0.5), images=np.int64(7), loss=torch.tensor(0.25))
    assert json.loads((tmp_path / "narrower.json").read_text())["extra"] == {"accuracy": 0.5, "images": 7, "loss": 0.25}
    for value, kind in ((torch.zeros(2), "Tensor"), ({1, 2}, "set")):
        with pytest.raises(narrower.StorageError, match=f"what JSON holds: {kind}"):
            narrower.save(small, tmp_path, accuracy=value)


def test_a_compiled_network_is_saved_as_the_network_itself(tmp_path: Path) -> None:
    small = saved(Plain(), IMAGES, tmp_path / "own")
    narrower.save(torch.compile(small), tmp_path / "compiled")  # type: ignore[arg-type]
    for name in ("model.safetensors", "narrower.json"):
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "compiled" / name).read_bytes()


def test_only_narrowed_models_are_saved(tmp_path: Path) -> None:
    with pytest.raises(narrower.StorageError, match="narrow"):
        narrower.save(Plain(), tmp_path / "x")
    small = narrower.narrow(Plain(), reference.halved(Plain(), IMAGES))
    small.added = nn.Linear(2, 2)
    with pytest.raises(narrower.StorageError, match="added"):
        narrower.save(small, tmp_path / "x")
    del small.added
    small.fc = nn.Linear(6, 9)
    with pytest.raises(narrower.StorageError, match="fc"):
        narrower.save(small, tmp_path / "x")
    del small.fc
    with pytest.raises(narrower.StorageError, match="fc"):
        narrower.save(small, tmp_path / "x")
    assert not (tmp_path / "x").exists() or not list((tmp_path / "x").iterdir())


# ------------------------------------------------------------------------------------------------ damage


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    saved(Shared(), IMAGES, path)
    yield path


@pytest.fixture
def copy_of(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_missing_files(copy_of: Path, tmp_path: Path) -> None:
    with pytest.raises(narrower.StorageError, match=r"narrower\.json.*missing"):
        narrower.load(tmp_path / "nothing", Shared)
    (copy_of / "model.safetensors").unlink()
    with pytest.raises(narrower.StorageError, match=r"model\.safetensors.*missing"):
        narrower.load(copy_of, Shared)


@given(st.data())
def test_truncated_tensors(folder: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    cut = data.draw(st.integers(0, len(whole) - 1))
    path = tmp_path_factory.mktemp("cut")
    shutil.copy(folder / "narrower.json", path)
    (path / "model.safetensors").write_bytes(whole[:cut])
    with pytest.raises(narrower.StorageError, match=r"model\.safetensors"):
        narrower.load(path, Shared)
    shutil.rmtree(path)


def test_a_pickle_is_not_executed(copy_of: Path) -> None:
    torch.save({"stem.0.weight": torch.zeros(3)}, copy_of / "model.safetensors")
    with pytest.raises(narrower.StorageError, match="no safetensors|cannot be read"):
        narrower.load(copy_of, Shared)


@pytest.mark.parametrize("what", ["lacks", "shape", "dtype"])
def test_tensors_that_do_not_belong_to_the_description(copy_of: Path, what: str) -> None:
    data = load_file(copy_of / "model.safetensors")
    if what == "lacks":
        del data["stem.0.weight"]
    elif what == "shape":
        data["stem.0.weight"] = data["stem.0.weight"][1:].clone()
    else:
        data["stem.0.weight"] = data["stem.0.weight"].int()
    save_file(data, copy_of / "model.safetensors")
    with pytest.raises(narrower.StorageError, match=r"stem\.0\.weight"):
        narrower.load(copy_of, Shared)


def test_another_model(copy_of: Path) -> None:
    with pytest.raises(narrower.StorageError, match="another network"):
        narrower.load(copy_of, Plain)

    def wider() -> nn.Module:
        model = Shared()
        model.head.fc = nn.Linear(7, 6)
        return model

    with pytest.raises(narrower.StorageError, match=r"head\.fc\.weight: expected \[5, 7\], found \[6, 7\]"):
        narrower.load(copy_of, wider)


def test_a_later_version(copy_of: Path) -> None:
    meta = json.loads((copy_of / "narrower.json").read_text())
    (copy_of / "narrower.json").write_text(json.dumps({**meta, "format": meta["format"] + 1}))
    with pytest.raises(narrower.StorageError, match="update narrower"):
        narrower.load(copy_of, Shared)


@given(st.data())
def test_a_damaged_description_is_an_error_or_loads_rightly(folder: Path, tmp_path_factory: pytest.TempPathFactory,
                                                            data: st.DataObject) -> None:
    valid = (folder / "narrower.json").read_text()
    text = json.dumps(damaged(json.loads(valid), data))
    if data.draw(st.integers(0, 4)) == 0:
        text = text[: data.draw(st.integers(0, len(text)))]
    path = tmp_path_factory.mktemp("fuzz")
    (path / "narrower.json").write_text(text)
    shutil.copy(folder / "model.safetensors", path)
    try:
        model = narrower.load(path, Shared)
    except narrower.StorageError as e:
        assert "narrower.json" in str(e) or "safetensors" in str(e)
    else:
        want = tensors(narrower.load(folder, Shared))
        assert all(torch.equal(t, want[n]) for n, t in tensors(model).items())
        small = narrower.narrow(model, reference.halved(model, IMAGES))
        narrower.save(small, path)
    finally:
        shutil.rmtree(path)


@given(st.data())
def test_damaged_weights_are_an_error_or_load_with_the_right_shapes(folder: Path, tmp_path_factory: pytest.TempPathFactory,
                                                                    data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("fuzz")
    shutil.copy(folder / "narrower.json", path)
    (path / "model.safetensors").write_bytes(damaged_bytes((folder / "model.safetensors").read_bytes(), data))
    try:
        model = narrower.load(path, Shared)
    except narrower.StorageError as e:
        assert "safetensors" in str(e)
    else:  # flipped bits of a weight cannot be known
        want = tensors(narrower.load(folder, Shared))
        assert {n: t.shape for n, t in tensors(model).items()} == {n: t.shape for n, t in want.items()}
    finally:
        shutil.rmtree(path)


@pytest.mark.parametrize("edit", ["tie", "untie", "swap"])
def test_edited_ties_are_refused(copy_of: Path, edit: str) -> None:
    """A description that says other tensors are shared than the network shares would load wrong values."""
    meta = json.loads((copy_of / "narrower.json").read_text())
    if edit == "tie":
        meta["tied"]["bn2.weight"] = "bn1.weight"
    elif edit == "untie":
        meta["tied"] = {}
    else:
        meta["tied"] = {"left.weight": "right.weight"}
    (copy_of / "narrower.json").write_text(json.dumps(meta))
    with pytest.raises(narrower.StorageError):
        narrower.load(copy_of, Shared)


def test_a_factory_that_gives_no_module(copy_of: Path) -> None:
    with pytest.raises(narrower.StorageError):
        narrower.load(copy_of, lambda: None)  # type: ignore[arg-type, return-value]


def test_load_takes_a_factory_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(narrower.ConfigError, match=r"takes a function that makes the dense network, not Plain: load"):
        narrower.load(tmp_path, Plain())
