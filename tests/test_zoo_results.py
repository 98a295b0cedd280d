"""A part of `results/zoo.csv` is what the present code gives.

The list was made with 97 classes, images of 64 pixels, and half of each free group removed at random. "ok" says that the narrow
network equals the masked dense one, and that less than 75 % of the parameters remain.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from support import reference

import narrower
from narrower.models import make_model

ZOO = Path(__file__).resolve().parent.parent / "results" / "zoo.csv"
SMALL = ["tv/shufflenet_v2_x0_5", "tv/squeezenet1_1", "tv/mnasnet0_5", "timm/mobilenetv3_small_050", "timm/regnety_002",
         "timm/ghostnet_050", "timm/lcnet_035"]


@pytest.mark.parametrize("name", SMALL)
def test_verdict_and_ratio_are_those_of_the_list(name: str) -> None:
    pytest.importorskip("torchvision" if name.startswith("tv/") else "timm")
    with ZOO.open(encoding="utf-8") as file:
        (row,) = [row for row in csv.DictReader(file) if row["model"] == name]
    assert row["verdict"] == "ok"
    torch.manual_seed(0)
    model = make_model(name.replace("tv/", "torchvision/").removeprefix("timm/"), 97).eval()
    x = torch.randn(2, 3, 64, 64)
    graph = narrower.trace(model, x)
    plan = narrower.plan(graph, narrower.random(graph, seed=0), remove=0.5)
    reference.exact(model, plan, x)
    small = narrower.narrow(model, plan)
    assert reference.params(small) / reference.params(model) == pytest.approx(float(row["params_ratio"]), abs=0.003)
