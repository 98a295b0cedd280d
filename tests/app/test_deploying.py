"""narrower export and bench: files of runs and of networks with weights, on images of the run or without any."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")
from PIL import Image
from safetensors.torch import save_file
from support.command_line import rows
from torch import nn

from narrower.app import cli, deploying
from narrower.app.config import ExportConfig, ModelConfig
from narrower.app.job import Settings
from narrower.app.reporting import graph_of
from narrower.app.run_folder import read_settings, to_yaml
from narrower.deployment import benchmarking
from narrower.graph.cost import CostModel

NETWORK = """
from torch import nn

def net(num_classes=5):
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder of a dense network, its factory, and images without classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    Path("net.py").write_text(NETWORK)
    sys.modules.pop("net", None)
    Path("photos").mkdir()
    for number in range(20):
        Image.new("RGB", (8, 8), (12 * number, 90, 200 - number)).save(f"photos/{number}.png")
    Path("run").mkdir()
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    save_file(model.state_dict(), "run/model.safetensors")
    settings = {"model": "net.py:net", "num_classes": 5, "data_dir": "photos", "img_size": 8, "cache_dir": "none", "images": 9}
    Path("run/config.yaml").write_text(to_yaml({**settings, "output": None}))


def test_a_run_is_exported_into_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "run", "--format", "pt2"]) == 0
    shown = capsys.readouterr()
    assert "run/model.pt2 (0." in shown.out and "torch.export = PyTorch to" in shown.out and not shown.err
    assert Path("run/model.pt2").is_file()


def test_int8_is_calibrated_on_images_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    assert cli.main(["export", "run", "--int8", "--calibration-images", "8"]) == 0
    assert "run/model.int8.onnx (int8" in capsys.readouterr().out
    assert [path.name for path in Path("run").glob("*.onnx")] == ["model.int8.onnx"]
    Path("photos").rename("elsewhere")
    assert cli.main(["export", "run", "--int8"]) == 2
    assert "photos" in capsys.readouterr().err


def test_a_fixed_file_is_calibrated_on_as_many_images_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploying, "sample", lambda job, count: [(torch.zeros(4, 3, 8, 8), None)] * 2)
    for fixed, sizes in ((None, [4, 4]), (3, [3, 3])):
        found = deploying.calibration_batches(None, ExportConfig(int8=True, fixed_batch=fixed))  # type: ignore[arg-type]
        assert [len(x) for x in found] == sizes


def test_without_images_noise_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos").rename("elsewhere")
    assert cli.main(["export", "run", "--format", "torchscript", "--output", "deep/net.ts"]) == 0
    shown = capsys.readouterr()
    assert "compared with PyTorch on noise" in shown.err and Path("deep/net.ts").is_file() and "deep/net.ts" in shown.out
    assert "batch size: any" in shown.out
    weights = ["--model", "net.py:net", "--checkpoint", "run/model.safetensors", "--img-size", "8"]
    assert cli.main(["export", *weights, "--format", "torchscript", "--output", "own.ts", "--fixed-batch", "1"]) == 0
    assert "batch size: 1" in capsys.readouterr().out
    assert Path("own.ts").is_file()


@pytest.mark.parametrize(("arguments", "text"), [
    (["--model", "net.py:net"], "say what to export: a run folder, or --model with"),
    (["run", "--format", "tflite"], "take one of onnx, openvino, pt2, torchscript"),
    (["run", "--format", "pt2", "--output", "net.onnx"], "must end in .pt2 for --format pt2, or give --format onnx"),
    (["run", "--format", "pt2", "--int8"], "--int8 is for --format onnx"),
    (["--model", "net.py:net", "--checkpoint", "run/model.safetensors", "--int8"], "--int8 needs images for calibration"),
    (["nowhere"], "no run folder"),
])
def test_what_cannot_be_done_is_said_in_one_line(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks take equal times, and nothing disturbs them."""
    monkeypatch.setattr(benchmarking, "in_turn", lambda calls, *given: [[1.0] * 9 for _ in calls])


def test_networks_are_timed_side_by_side(calm: None, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--seconds", "0", "--img-size", "8"]
    assert cli.main(["bench", "run", "net.py:net", *few, "--batch-sizes", "1", "2", "--num-classes", "3"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "eager" in line and "noisy" not in line]
    assert [(row[0], row[5]) for row in rows] == [("run", "1x3x8x8"), ("net.py:net", "1x3x8x8"), ("run", "2x3x8x8"),
                                                  ("net.py:net", "2x3x8x8")]


def test_noise_that_hides_which_is_faster_is_an_error(monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    """Below the table, which has all that was measured."""
    monkeypatch.setattr(benchmarking, "in_turn", lambda calls, *given: [[1.0] * 9, [0.5, 1.5] * 4 + [1.0]])
    assert cli.main(["bench", "run", "net.py:net", "--seconds", "0", "--img-size", "8", "--num-classes", "3"]) == 2
    shown = capsys.readouterr()
    assert "net.py:net" in shown.out and "too noisy to say whether net.py:net is faster than run in eager" in shown.err
    assert "spread 100%" in shown.err


def test_a_narrow_run_is_timed_against_the_dense_network(calm: None, capsys: pytest.CaptureFixture[str]) -> None:
    import narrower
    from narrower.models import make_model

    model, x = make_model("net.py:net", 5), torch.zeros(1, 3, 8, 8)
    graph = narrower.trace(model, x)
    narrower.save(narrower.narrow(model, narrower.plan(graph, narrower.magnitude(model, graph), remove=0.5)), "run")
    assert cli.main(["bench", "run", "--seconds", "0"]) == 0
    dense, narrow = [line.split() for line in capsys.readouterr().out.splitlines() if "eager" in line and "noisy" not in line]
    assert dense[0] == "dense" and narrow[0] == "run" and float(dense[-8]) > float(narrow[-8])


def test_a_run_on_wide_images_is_inspected_timed_reported_and_exported_with_such(
        calm: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings have one size, of square images: the run says which it began with. Its multiply-adds depend on it."""
    for split, name in product(("train", "val"), "ab"):
        Path("wide", split, name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (12, 8), (60 * number, 90, 7)).save(f"wide/{split}/{name}/{number}.png")
    given = ["--model", "net.py:net", "--data-dir", "wide", "--cache-dir", "none", "--device", "cpu", "--workers", "0"]
    assert cli.main(["train", *given, "-b", "4", "--epochs", "1", "--output", "seen"]) == 0
    settings = read_settings(Path("seen"))
    assert settings["img_size"] is None and rows("seen")[0]["input_size"] == [3, 8, 12]
    capsys.readouterr()
    assert cli.main(["inspect", "seen", "--device", "cpu"]) == 0
    macs = 16 * 3 * 9 * 6 * 10 + 16 * 2  # of the convolution without padding, and of the linear layer
    assert f"MACs {macs / 1e6:.2f} M" in capsys.readouterr().out
    assert cli.main(["bench", "seen", "--seconds", "0", "--device", "cpu"]) == 0
    assert " 1x3x8x12 " in capsys.readouterr().out
    assert sum(CostModel(graph_of(Path("seen"), settings)).dense_costs("macs").values()) == macs
    assert deploying.noise(Settings(ModelConfig("net.py:net", checkpoint="seen")), 2).shape == (2, 3, 8, 12)


@pytest.mark.parametrize(("arguments", "text"), [
    ([], "networks"),
    (["run", "--runtimes", "tvm"], "there is no runtime 'tvm': take one of eager, compile"),
    (["run", "--threads", "0"], "--threads must be numbers from 1"),
    (["run", "cifar_resnet20"], "take images of different sizes (run: 3x8x8, cifar_resnet20: 3x32x32): give --img-size"),
    (["nowhere_net"], "no network is called 'nowhere_net'"),
    (["runs/nope"], "there is no run folder runs/nope, and no network is called so"),
])
def test_what_cannot_be_timed_is_said(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    assert text in capsys.readouterr().err
