"""`--schedule layer`: one layer is cut, the network is fine-tuned, the next is cut."""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command_line import NETWORK, SMALL, at_batch, rows, weights

import narrower
from narrower.app import layerwise, oneshot, run_folder
from narrower.app.cli import main
from narrower.app.job import Job
from narrower.app.layerwise import cut_order
from narrower.models import make_model

CUT = ["prune", *SMALL, "--method", "hrank", "--remove", '{"conv1": 0.5, "conv2": 0.25}', "--epochs", "0", "--no-distill",
       "-b", "256"]
LAYERS = [*CUT, "--schedule", "layer", "--epochs-per-layer", "2"]


def stages(run: str) -> list[str]:
    return [f"{row['stage']} {row.get('epoch', '')}" for row in rows(run)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_layers_are_cut_in_the_order_of_the_forward() -> None:
    model = make_model("cifar_resnet20")
    graph = narrower.trace(model, torch.zeros(1, 3, 8, 8))
    plan = narrower.plan(graph, narrower.random(graph), remove={"layer3.*.conv1": 0.5, "layer1.0.conv1": 0.25})
    assert cut_order(plan) == [["layer1.0.conv1"], ["layer3.0.conv1"], ["layer3.1.conv1"], ["layer3.2.conv1"]]


def test_each_layer_is_cut_and_trained_and_a_resumed_run_equals_an_uninterrupted_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the second layer: the first is not trained again."""
    assert main([*LAYERS, "--output", "whole"]) == 0
    first = [f"layer 1/2 conv1 {k}" for k in (1, 2)]
    second = [f"layer 2/2 conv2 {k}" for k in (1, 2)]
    order = ["cut conv1 ", *first, "layer 1/2 conv1 ", "cut conv2 ", *second, "layer 2/2 conv2 ", "layers "]
    assert [stage for stage in stages("whole") if stage in order] == order
    with monkeypatch.context() as patched:
        at_batch(patched, "layer 2/2 conv2: epoch 1", 1, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert main([*LAYERS, "--output", "cut"]) == 130
    assert Path("cut", run_folder.LAYERS).exists() and Path("cut", run_folder.LAYERS_CHECKPOINT).exists()
    assert main(["prune", "--resume", "cut"]) == 0
    order.remove("cut conv2 ")  # the cut is made again
    assert [stage for stage in stages("cut") if stage in order] == order
    one, two = weights("whole"), weights("cut")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert one["conv1.weight"].shape[0] == 4 and one["conv2.weight"].shape[:2] == (12, 4)
    assert not any(Path(run, run_folder.LAYERS).exists() for run in ("whole", "cut"))


def test_the_images_of_the_scores_are_gone_in_the_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, cut = oneshot.sample, layerwise.cut
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def sample(job: Job, count: int) -> Iterator[Any]:
        for x, y in plain(job, count):
            held.append(weakref.ref(x))
            yield x, y

    def noted(*given: Any) -> Any:
        alive.append(sum(image() is not None for image in held))
        return cut(*given)

    monkeypatch.setattr(oneshot, "sample", sample)
    monkeypatch.setattr(layerwise, "cut", noted)
    assert main([*LAYERS, "--epochs-per-layer", "0", "--dense-epochs", "0", "--output", "run"]) == 0
    assert held and alive == [0, 0]


def test_the_scores_are_those_of_the_dense_network() -> None:
    """With no training between, the layers come out as from one cut."""
    start = [*CUT, "--dense-epochs", "0"]
    assert main([*start, "--schedule", "layer", "--epochs-per-layer", "0", "--output", "one"]) == 0
    assert main([*start, "--no-reconstruct", "--recalibrate", "0", "--output", "two"]) == 0
    one, two = weights("one"), weights("two")
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_what_trains_towards_zeros_has_no_layers_to_wait_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", *SMALL, "--method", "resrep", "--schedule", "layer"]) == 2
    assert "--schedule layer is for methods that score and cut" in capsys.readouterr().err
    assert main(["prune", *SMALL, "--schedule", "slice"]) == 2
    assert "give once or layer" in capsys.readouterr().err
