"""A user's task in training and evaluation: its figures, and one line for what it does wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.networks import Plain
from torch import Tensor, nn

pytest.importorskip("timm")
pytest.importorskip("accelerate")
import narrower
from narrower.data import CLASSIFICATION, Classification, ImageData, OwnImages
from narrower.errors import ConfigError
from narrower.training import TrainConfig, TrainContext, evaluate, make_accelerator, train
from narrower.training.checking import OURS, task_in_training, try_task

CPU = make_accelerator("cpu")
CONFIG = TrainConfig(batch_size=8, workers=0, epochs=2, lr=0.01, warmup_epochs=0, recalibrate=0)
X = torch.randn(60, 2, 1, 1, generator=torch.Generator().manual_seed(0))


class Halve:
    """Outputs {"half": ...} should be half of the inputs. The figure is the share that is close."""

    input_size = (2, 1, 1)

    def data(self, split: str) -> Any:
        return [(x, {"half": x / 2}) for x in (X[:40] if split == "train" else X[40:])]

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return (outputs["half"] - targets["half"]).square().mean()

    def measure(self, outputs: Any, targets: Any) -> Tensor:
        close = ((outputs["half"] - targets["half"]).abs() < 0.5).flatten(1).all(1)
        return torch.stack((close.sum(), torch.tensor(len(close))))

    def figures(self, total: Tensor) -> dict[str, float]:
        return {"close": 100 * float(total[0] / total[1]), "count": float(total[1])}


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"half": self.conv(x)}


def data_of(task: Any) -> ImageData:
    return ImageData("own", 0, task.input_size, lambda split: OwnImages(task.data(split), task), task=task)


def test_a_task_trains_and_reports_its_own_figures() -> None:
    data = data_of(Halve())
    rows: list[dict[str, Any]] = []
    torch.manual_seed(0)
    model = Scale()
    before = evaluate(model, data.val, CONFIG, CPU)
    train(model, data, replace(CONFIG, epochs=8, lr=0.1), TrainContext(CPU, log=rows.append))
    after = evaluate(model, data.val, CONFIG, CPU)
    assert list(after) == ["close", "count", "loss"] and after["count"] == 20
    assert after["close"] > before["close"] and after["loss"] < before["loss"] / 4
    with torch.no_grad():
        assert after["loss"] == pytest.approx(float((model(X[40:])["half"] - X[40:] / 2).square().mean()))
    last = [row for row in rows if "epoch" in row][-1]
    assert last["headline"] == "close" and last["close"] == after["close"] and last["val_loss"] == after["loss"]


@pytest.mark.parametrize("method", [narrower.ResRep, narrower.SoftPruning, narrower.CentripetalSGD])
def test_what_methods_report_is_no_name_for_a_figure(method: Any) -> None:
    model, images = Plain(), torch.zeros(1, 3, 8, 8)
    progress = method(model, narrower.trace(model, images), macs=0.5, steps=10).progress()
    assert progress and progress.keys() <= {*OURS}


def test_smoothing_is_classifications_and_other_tasks_refuse_what_is_for_classes() -> None:
    assert task_in_training(CLASSIFICATION, replace(CONFIG, smoothing=0.1)) == Classification(0.1)
    assert isinstance(task_in_training(Halve(), CONFIG), Halve)
    mixed = {"mixup": replace(CONFIG, mixup=0.5), "cutmix": replace(CONFIG, cutmix=0.5),
             "smoothing": replace(CONFIG, smoothing=0.5)}
    for name, config in mixed.items():
        with pytest.raises(ConfigError, match=f"--{name} 0.5 is for images with classes"):
            train(Scale(), data_of(Halve()), config, TrainContext(CPU))


FAULTS: dict[str, tuple[dict[str, Callable[..., Any]], str]] = {
    "loss of each image": ({"loss": lambda self, o, t: o["half"].mean((1, 2, 3))}, r"loss\(\) .* scalar .* not shape \(2,\)"),
    "loss is a number": ({"loss": lambda self, o, t: 1.0}, "scalar tensor, .* not float"),
    "loss is nan": ({"loss": lambda self, o, t: o["half"].mean() * float("nan")}, "gives nan on the first batch"),
    "measure is a number": ({"measure": lambda self, o, t: 3}, r"measure\(\) of the task must give a tensor, not int"),
    "figures are a number": ({"figures": lambda self, total: 3.0}, r"figures\(\) .* dict of numbers"),
    "no figures": ({"figures": lambda self, total: {}}, r"figures\(\) .* dict of numbers"),
    "a figure is a tensor": ({"figures": lambda self, total: {"close": total[0]}}, "close must be a number, not Tensor"),
    "a name of ours": ({"figures": lambda self, total: {"epoch": 1.0}}, "'epoch' has another meaning"),
    "an error": ({"loss": lambda self, o, t: o["other"]}, r"fails on a batch .* KeyError: 'other' \(line \d+ of .*test_ch"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_task_does_wrong_is_found_on_one_batch(fault: str) -> None:
    methods, message = FAULTS[fault]
    task = type("Faulty", (Halve,), methods)()
    with pytest.raises(ConfigError, match=message):
        try_task(task, Scale()(X[:2]), (X[:2], {"half": X[:2] / 2}))
    try_task(Halve(), Scale()(X[:2]), (X[:2], {"half": X[:2] / 2}))


def test_a_statistic_of_changing_shape_is_refused() -> None:
    task = type("PerImage", (Halve,), {"measure": lambda self, o, t: o["half"][:, 0, 0, 0]})()
    with pytest.raises(ConfigError, match=r"gave shape \(4,\) after \(8,\): what is added"):
        evaluate(Scale(), data_of(task).val, CONFIG, CPU)
