"""What any installation must do with nothing but what its metadata names: the whole way of a small network, and the command.

    python smoke.py           the library, and the command where the extra `cli` is installed

Run it where the checkout is not on the path: it must find the installed package.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

import narrower

DEMO = ("--img-size", "8", "--dense-epochs", "1", "--epochs", "1", "--images", "48", "--recalibrate", "256",
        "--cache-dir", "none", "--device", "cpu", "--method", "magnitude", "--allocate", "share", "--no-reconstruct")
CLI = ("timm", "torchvision", "accelerate", "rich", "jsonargparse", "sklearn", "yaml", "PIL")


class Net(nn.Module):
    """A residual sum, a grouped convolution, a depthwise one, BatchNorm and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.wide = nn.Sequential(nn.Conv2d(16, 32, 1), depthwise, nn.ReLU(), nn.Conv2d(32, 16, 1))
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(torch.relu(self.grouped(x + self.wide(x))).mean((2, 3)))


def whole_way() -> None:
    """import, trace, plan, narrow, verify; repair, ResRep; save, load, measure."""
    torch.manual_seed(0)
    model, images = Net().eval(), torch.randn(8, 3, 16, 16)
    graph = narrower.trace(model, images)
    batches = [torch.randn(8, 3, 16, 16) for _ in range(4)]
    for scores in (narrower.magnitude(model, graph), narrower.hrank(model, graph, batches)):
        plan = narrower.plan(graph, scores, macs=0.5)
        small = narrower.narrow(model, plan)
        found = narrower.verify(model, small, plan, images)
    narrower.sensitivity(model, graph, scores, batches)
    small = narrower.reconstruct(model, small, plan, batches).model
    assert narrower.measure(small, images, seconds=0.01)["macs"] <= 0.5 * narrower.measure(model, images, seconds=0.01)["macs"]
    with tempfile.TemporaryDirectory() as folder:
        narrower.save(small, folder)
        again = narrower.load(folder, Net).eval()
    torch.testing.assert_close(again(images), small(images))
    print(found)
    resrep = narrower.ResRep(model.train(), graph, macs=0.5, steps=8)
    optimizer = torch.optim.SGD(resrep.param_groups(lr=0.01, momentum=0.9, weight_decay=1e-4))
    resrep.attach(optimizer)
    for step in range(8):
        model(batches[step % 4]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    merged = resrep.merge()
    assert merged(images).shape == (8, 10)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed command."""
    program = Path(sys.executable).with_name("narrower")
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=600)


def command() -> None:
    """With the extra `cli` a small run from the digits to a narrow network; without it a line that names the extra."""
    if not all(find_spec(name) for name in CLI):
        done = run("--help")
        assert done.returncode == 2 and "narrower[cli]" in done.stderr, done.stdout + done.stderr
        print(done.stderr.strip())
        return
    assert "prune" in run("--help").stdout
    with tempfile.TemporaryDirectory() as folder:
        done = run("prune", *DEMO, "--output", folder)
        assert done.returncode == 0 and (Path(folder) / "narrower.json").is_file(), done.stdout + done.stderr
    print(done.stdout)


def main() -> None:
    checkout = Path(__file__).resolve().parent.parent
    assert checkout not in Path(narrower.__file__).resolve().parents, f"{narrower.__file__} is the checkout"
    assert version("narrower") == narrower.__version__
    package = files("narrower")
    for name in ("py.typed", "configs/resrep-resnet56-53.yaml", "report/page.html.jinja", "report/card.md.jinja"):
        assert package.joinpath(name).is_file(), f"{name} was not installed"
    whole_way()
    command()
    print(f"Python {platform.python_version()}, torch {torch.__version__}: all well")


main()
