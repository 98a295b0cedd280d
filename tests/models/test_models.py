"""The network zoo: shapes, parameter counts of the papers, copies, and names that are not there."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from narrower.errors import ConfigError
from narrower.models import CIFAR_MODELS, expected_images, make_model

# Parameters with 10 classes, counted by hand from the papers' tables (He et al.: 0.27, 0.46, 0.66, 0.85, 1.7 million).
PARAMETERS = {
    "cifar_resnet20": 269_722,
    "cifar_resnet32": 464_154,
    "cifar_resnet44": 658_586,
    "cifar_resnet56": 853_018,
    "cifar_resnet110": 1_727_962,
    "cifar_vgg16_bn": 14_987_722,
    "cifar_densenet40": 1_059_298,
    "cifar_googlenet": 6_158_346,
    "cifar_mobilenet_v1": 3_217_226,
}


def test_every_network_is_counted() -> None:
    assert PARAMETERS.keys() == CIFAR_MODELS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_networks_have_the_parameters_of_the_papers(name: str) -> None:
    with torch.device("meta"):
        model = make_model(name, 10)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name not in ("cifar_resnet110", "cifar_resnet44")])
def test_takes_small_images_and_other_channels(name: str) -> None:
    model = make_model(name, 7, in_channels=1).eval()
    for size in (8, 32):
        assert model(torch.randn(2, 1, size, size)).shape == (2, 7)
    model.train()(torch.randn(2, 1, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_densenet40"])
def test_copies_and_pickles_compute_the_same(name: str) -> None:
    model = make_model(name, 10).eval()
    x = torch.randn(1, 3, 16, 16)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(twin(x), model(x))


def test_shortcut_pads_with_zeros() -> None:
    """Option A: where the main path gives nothing, the block returns its subsampled input between zero channels."""
    block = make_model("cifar_resnet20", 10).get_submodule("layer2.0").eval()
    nn.init.zeros_(block.get_parameter("bn2.weight"))
    x = torch.rand(1, 16, 8, 8)
    y = block(x)
    assert y.shape == (1, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()


def test_names_of_timm_and_torchvision_make_their_networks() -> None:
    pytest.importorskip("timm")
    with torch.device("meta"):
        assert make_model("resnet18", 5, in_channels=1).get_parameter("fc.weight").shape == (5, 512)
        assert make_model("torchvision/resnet18", 5).get_parameter("fc.weight").shape == (5, 512)


def test_images_are_read_as_the_published_weights_expect() -> None:
    """Values of torchvision's and timm's own pages. Of a detector, a network of one's own and an unknown name nothing."""
    pytest.importorskip("timm")
    large = expected_images("torchvision/efficientnet_v2_l")
    assert large == {"large": 480, "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "interpolation": "bicubic"}
    assert expected_images("torchvision/inception_v3")["large"] == 299
    second = expected_images("torchvision/resnet50")  # of the weights that --pretrained loads, IMAGENET1K_V2
    assert (second["large"], second["crop_pct"], second["interpolation"]) == (224, 224 / 232, "bilinear")
    squashed = expected_images("convnextv2_huge.fcmae_ft_in22k_in1k_384")
    assert (squashed["large"], squashed["crop_mode"]) == (384, "squash")
    assert all(expected_images(name) == {"large": 32} for name in CIFAR_MODELS)
    assert not any(expected_images(name) for name in ("torchvision/ssd300_vgg16", "torchvision/resnet51", "own.py:make"))


def test_own_factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factory gets those of our arguments that it names, and only those."""
    text = "from torch import nn\ndef small(num_classes): return nn.Linear(2, num_classes)\ndef odd(): return 3\n"
    (tmp_path / "own_networks.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    for name in ("own_networks:small", str(tmp_path / "own_networks.py") + ":small"):
        assert make_model(name, 5).get_parameter("weight").shape == (5, 2)
    with pytest.raises(ConfigError, match="returned int"):
        make_model("own_networks:odd")
    with pytest.raises(ConfigError, match="no function or class 'large'; it has small, odd"):
        make_model("own_networks:large")
    with pytest.raises(ConfigError, match="pretrained"):
        make_model("own_networks:small", 5, pretrained=True)


def test_a_file_imports_those_beside_it(tmp_path: Path) -> None:
    """Its folder is on the path meanwhile, and not afterwards, even if the file fails."""
    (tmp_path / "beside_it.py").write_text("from torch import nn\nLayer = nn.Linear\n")
    (tmp_path / "own.py").write_text("from beside_it import Layer\ndef small(num_classes): return Layer(2, num_classes)\n")
    (tmp_path / "fails.py").write_text("import beside_it\nraise ValueError('no')\n")
    before = list(sys.path)
    assert make_model(f"{tmp_path}/own.py:small", 5).get_parameter("weight").shape == (5, 2)
    with pytest.raises(ConfigError, match="ValueError: no"):
        make_model(f"{tmp_path}/fails.py:small", 5)
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cifar_resnet57", "did you mean cifar_resnet56"),
        ("resnet5", "did you mean resnet5"),
        ("torchvision/resnet51", "did you mean torchvision/resnet50"),
        ("no_such_package:make", "cannot import 'no_such_package'"),
    ],
)
def test_unknown_names_suggest_known_ones(name: str, says: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=says):
        make_model(name)


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(ConfigError, match="colour"):
        make_model("cifar_resnet20", colour="red")


def test_published_weights_without_a_network_are_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after a minute of retries; and where the hub is said to be away, its cache is looked at, as before."""
    pytest.importorskip("timm")
    constants: Any = pytest.importorskip("huggingface_hub.constants")
    asked: list[str] = []

    def create(model_name: str, **_: Any) -> torch.nn.Module:
        asked.append(model_name)
        return torch.nn.Identity()

    monkeypatch.setattr("timm.create_model", create)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConfigError, match=r"weights of resnet18 cannot be fetched: http://127.0.0.1:9 cannot be reached"):
        make_model("resnet18", pretrained=True)
    assert not asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    make_model("resnet18", pretrained=True)
    assert asked == ["resnet18"]
