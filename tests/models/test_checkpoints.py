"""Foreign checkpoints: every nesting loads, everything else is refused by name, and nothing is loaded in part."""

from __future__ import annotations

import os
import pickle
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.damage import damaged_bytes
from torch import Tensor, nn

from narrower.errors import StorageError
from narrower.models import make_model
from narrower.models.checkpoints import load_checkpoint

SHARED = Path(os.environ.get("NARROWER_SHARED", Path(__file__).resolve().parents[3] / "shared"))


def network(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def averaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As torch.optim.swa_utils.AveragedModel keeps them."""
    return {"n_averaged": torch.tensor(3), **prefixed(state, "module.")}


@pytest.mark.parametrize(
    "nested",
    [
        lambda state: state,
        lambda state: prefixed(state, "module."),
        lambda state: prefixed(state, "_orig_mod.module."),
        lambda state: prefixed(state, "module._orig_mod."),
        lambda state: {"state_dict": prefixed(state, "module."), "epoch": 3},
        lambda state: {"model": state, "args": {"lr": 0.1}},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"state_dict": {k: v + 1 for k, v in state.items()}, "state_dict_ema": state},
        lambda state: {"model": {k: v + 1 for k, v in state.items()}, "model_ema": prefixed(state, "module.")},
        lambda state: {key: value for key, value in state.items() if "num_batches" not in key},
        lambda state: {"state_dict": prefixed(state, "model."), "hyper_parameters": {"lr": 0.1}},  # of a LightningModule
        lambda state: {"state_dict": prefixed(state, "model._orig_mod.")},  # that compiled it
        lambda state: {"state_dict": prefixed(state, "_orig_mod.model.module.")},
        averaged,
        lambda state: {"model": {k: v + 1 for k, v in state.items()}, "model_ema": averaged(state)},  # of torchvision's script
    ],
)
def test_every_nesting_and_prefix_loads(nested: Any, tmp_path: Path) -> None:
    source, target = network(), network()
    torch.save(nested(source.state_dict()), tmp_path / "weights.pt")
    assert load_checkpoint(target, tmp_path / "weights.pt") is target
    assert equal(source.state_dict(), target.state_dict())


@pytest.mark.skipif(not hasattr(torch.serialization, "safe_globals"), reason="torch before 2.5 takes no such file")
def test_the_settings_of_a_training_script_do_not_stand_in_the_way(tmp_path: Path) -> None:
    """timm and torchvision keep their arguments beside the weights."""
    source, target = network(), network()
    torch.save({"state_dict": source.state_dict(), "args": Namespace(lr=0.1, opt="sgd", sizes=[1, 2])}, tmp_path / "weights.pt")
    load_checkpoint(target, tmp_path / "weights.pt")
    assert equal(source.state_dict(), target.state_dict())


def test_a_first_name_is_taken_off_only_where_the_network_then_has_all_others(tmp_path: Path) -> None:
    torch.save(prefixed(nn.Sequential(nn.Linear(2, 2)).state_dict(), "0."), tmp_path / "weights.pt")
    with pytest.raises(StorageError, match="another network"):
        load_checkpoint(nn.ModuleDict({"a": nn.Linear(2, 2)}), tmp_path / "weights.pt")


def test_another_number_of_classes_alone_is_said_by_its_flag(tmp_path: Path) -> None:
    """Whichever has more, and with several heads; not where other layers differ too."""

    def made(classes: int, width: int = 4) -> Any:
        heads = {name: nn.Linear(width, classes) for name in ("head", "aux")}
        return nn.Sequential(OrderedDict(body=nn.Linear(3, width), **heads))

    for saved, own, says in ((made(10), made(2), True), (made(2), made(10), True), (made(10, 8), made(2), False)):
        torch.save(saved.state_dict(), tmp_path / "weights.pt")
        with pytest.raises(StorageError, match="of another network") as caught:
            load_checkpoint(own, tmp_path / "weights.pt")
        assert (f"only the number of outputs differs: give --num-classes {len(saved.head.weight)}" in str(caught.value)) == says


def test_safetensors_load(tmp_path: Path) -> None:
    source, target = network(), network()
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    load_checkpoint(target, tmp_path / "weights.safetensors")
    assert equal(source.state_dict(), target.state_dict())


def test_names_that_begin_with_module_are_kept(tmp_path: Path) -> None:
    """Only a prefix that all keys share is taken for one."""
    source, target = (nn.ModuleDict({"module": nn.Linear(2, 2), "head": nn.Linear(2, 2)}) for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    load_checkpoint(target, tmp_path / "weights.pt")
    assert equal(source.state_dict(), target.state_dict())


def test_another_network_is_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = network(8).state_dict()
    state["extra.weight"] = torch.zeros(1)
    del state["1.running_mean"]
    torch.save(state, tmp_path / "weights.pt")
    target = network()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(StorageError) as caught:
        load_checkpoint(target, tmp_path / "weights.pt")
    message = str(caught.value)
    assert "than the Sequential that it is for (--model)" in message
    assert "1 missing from the file: 1.running_mean" in message
    assert "1 not in the network: extra.weight" in message
    assert "0.weight is (8, 3, 3, 3), the network has (4, 3, 3, 3)" in message
    assert equal(before, target.state_dict())


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    """Also those of buffers, which no loss shows before the evaluation."""
    for name, value in (("0.weight", float("nan")), ("1.running_var", float("inf"))):
        state = {key: tensor.clone() for key, tensor in network().state_dict().items()}
        state[name].view(-1)[0] = value
        torch.save(state, tmp_path / "weights.pt")
        with pytest.raises(StorageError, match=rf"not finite \(nothing was loaded\).*1 tensors: {name}"):
            load_checkpoint(network(), tmp_path / "weights.pt")


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path("exploded"),)  # type: ignore[return-value]


def test_a_narrow_network_is_called_narrow(tmp_path: Path) -> None:
    """With a bias that narrowing has added, too. A head for fewer classes is no narrow network."""
    def net(width: int, classes: int = 5, *, bias: bool = False) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, width, 3, bias=bias), nn.Flatten(), nn.Linear(width, classes))

    file = tmp_path / "weights.pt"
    for narrow in (net(2), net(2, bias=True)):
        torch.save(narrow.state_dict(), file)
        with pytest.raises(StorageError, match="is of a narrow network.*the dense one is needed.*narrower eval"):
            load_checkpoint(net(4), file)
    for other in (net(4, 3), net(6), nn.Sequential(nn.Conv2d(3, 2, 3))):
        torch.save(other.state_dict(), file)
        with pytest.raises(StorageError, match="of another network"):
            load_checkpoint(net(4), file)


def test_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save({"state_dict": Bomb()}, tmp_path / "nested.pt")
    torch.save(network(), tmp_path / "module.pt")
    for name in ("plain.pt", "nested.pt", "module.pt"):
        with pytest.raises(StorageError, match=r"contains more than tensors.*weights_only=False\)"):
            load_checkpoint(network(), tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("length", [0, 4, 100, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_files_are_an_error(kind: str, length: float, tmp_path: Path) -> None:
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
        save_file(network().state_dict(), path)
    else:
        torch.save(network().state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(length * len(data)) if 0 < length < 1 else int(length)])
    with pytest.raises(StorageError, match=r"damaged.*fetch it again"):
        load_checkpoint(network(), path)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One checkpoint of each kind of file."""
    path = tmp_path_factory.mktemp("valid") / "weights"
    state, out = network().state_dict(), {}
    save_file(state, path)
    out["safetensors"] = path.read_bytes()
    for kind in ("zip", "legacy"):
        torch.save({"state_dict": prefixed(state, "module."), "epoch": 3}, path, _use_new_zipfile_serialization=kind == "zip")
        out[kind] = path.read_bytes()
    return out


@given(st.sampled_from(["zip", "legacy", "safetensors"]), st.data())
def test_damaged_bytes_are_an_error_or_load_with_the_right_shapes(
    valid: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / ("damaged.safetensors" if kind == "safetensors" else "damaged.pt")
    path.write_bytes(damaged_bytes(valid[kind], data))
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        load_checkpoint(model, path)
    except StorageError as error:
        assert str(path) in str(error)
        assert equal(model.state_dict(), before)  # all or nothing
    assert {k: (t.shape, t.dtype) for k, t in model.state_dict().items()} == {k: (t.shape, t.dtype) for k, t in before.items()}


def test_files_of_another_kind_are_called_so(tmp_path: Path) -> None:
    """Unpickling a picture or a text fails as code does, and its advice would be wrong."""
    for content in (b"\xff\xd8\xff\xe0\x00\x10JFIF", b"import torch\n", b"\x89PNG\r\n"):
        (tmp_path / "weights.pt").write_bytes(content)
        with pytest.raises(StorageError, match="is no checkpoint, nor what is left of one"):
            load_checkpoint(network(), tmp_path / "weights.pt")


def test_missing_files_folders_and_empty_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        load_checkpoint(network(), tmp_path / "nowhere.pt")
    with pytest.raises(StorageError, match="is a folder"):
        load_checkpoint(network(), tmp_path)
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(StorageError, match=r"holds no state dict.*found: epoch"):
        load_checkpoint(network(), tmp_path / "empty.pt")


@pytest.mark.skipif(not (SHARED / "weights").is_dir(), reason="the shared checkpoints are not here")
@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_published_resnets_load(depth: int) -> None:
    for path in (SHARED / "weights").glob(f"resnet{depth}-*.*t*"):
        load_checkpoint(make_model(f"cifar_resnet{depth}", 10), path)
