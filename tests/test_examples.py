"""Every file of examples/ runs, is short, and stands on a page of the documentation."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import narrower

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
IMAGES = torch.randn(1, 3, 16, 16)


def names_of(name: str, *packages: str) -> dict[str, Any]:
    """What an example defines."""
    for package in packages:
        pytest.importorskip(package, reason=f"needs {package}: pip install -e '.[examples]'")
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


def main_of(name: str, *packages: str) -> Any:
    return names_of(name, *packages)["main"]


def macs(model: Any) -> float:
    return float(narrower.measure(model, IMAGES)["macs"])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_tested_and_on_a_page(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 100
    assert f"(../examples/{path.name})" in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert f'"{path.stem}"' in Path(__file__).read_text(encoding="utf-8")


@pytest.mark.parametrize("method", ["resrep", "soft"])
def test_plain_loop(method: str) -> None:
    example = names_of("plain_loop")
    dense, small = example["main"](method, epochs=8)
    assert macs(small) <= 0.5 * macs(dense)
    right = [small.eval()(images).argmax(1) == labels for images, labels in example["make_batches"](16)]
    assert torch.cat(right).float().mean() > 0.4  # of four classes, on new images


def test_detector() -> None:
    plan, losses = main_of("detector")(epochs=3)
    assert plan.macs[1] <= 0.5 * plan.macs[0]
    assert sum(losses[-4:]) < sum(losses[:4])  # an epoch has four steps


def test_segmentation() -> None:
    result = main_of("segmentation")(epochs=1)
    assert list(result) == ["dense", "cut", "repaired", "trained"] and all(0 < value <= 1 for value in result.values())
    assert abs(result["repaired"] - result["dense"]) < 0.5 * abs(result["cut"] - result["dense"])
    assert result["trained"] > result["repaired"]


def test_segmentation_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("rich", "timm", "accelerate", "jsonargparse"):
        pytest.importorskip(package)
    from narrower.app import cli

    file = (ROOT / "examples" / "segmentation_task").with_suffix(".py")
    where = ["--task", f"{file}:Shapes", "--model", f"{file}:network", "--output", str(tmp_path / "run"), "--device", "cpu"]
    short = ["--dense-epochs", "1", "--epochs", "0", "--images", "16", "--no-reconstruct", "--recalibrate", "0", "-j", "0"]
    assert cli.main(["prune", *where, *short, "--method", "magnitude", "--allocate", "share"]) == 0
    assert "miou" in capsys.readouterr().out
    shapes = names_of("segmentation_task")["Shapes"]()
    true = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2]])
    found = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 0]])  # of the classes 3 of 5, 2 of 3 and 1 of 2
    figures = shapes.figures(shapes.measure(torch.eye(3)[found].movedim(-1, 1), true))
    assert figures == pytest.approx({"miou": 100 * (3 / 5 + 2 / 3 + 1 / 2) / 3, "pixels": 75})
    images, classes = zip(*(shapes.data("val")[k] for k in range(4)), strict=True)
    levels = [torch.stack(images)[:, 0][torch.stack(classes) == k].mean() for k in range(3)]
    assert levels == pytest.approx([0, 1, -1], abs=0.1)


def test_timm_train() -> None:
    small, average = main_of("timm_train", "timm")()
    assert {n: p.shape for n, p in small.named_parameters()} == {n: p.shape for n, p in average.named_parameters()}
    assert not any(p.equal(q) for p, q in zip(small.parameters(), average.parameters(), strict=True))
    assert not any("compactor" in name for name, _ in small.named_modules())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["resrep", "soft"])
def test_lightning_callback(method: str) -> None:
    dense, small = main_of("lightning_callback", "lightning")(method)
    assert macs(small) <= 0.5 * macs(dense)


@pytest.mark.slow
def test_huggingface_trainer_and_its_resuming(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = main_of("huggingface_trainer", "timm", "transformers", "accelerate")
    whole = main(tmp_path / "whole")
    assert main(tmp_path / "parts", stop_after=1) is None
    capsys.readouterr()
    resumed = main(tmp_path / "parts")
    assert "step 8 of 8" in capsys.readouterr().out
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
