"""A run of the command line in a second or two: a small network, the digits at 8 pixels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from narrower.app import run_folder
from narrower.app.terminal import Terminal

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(x + self.conv3(x))
        return self.head(x.mean((2, 3)))
"""
SMALL = ["--model", "net.py:Net", "--img-size", "8", "--device", "cpu", "--cache-dir", "none", "--images", "48",
         "--recalibrate", "256", "--dense-epochs", "1"]
RESREP = ["--method", "resrep", "--scope", "all", "--macs", "0.5"]


def weights(run: Path | str, name: str = run_folder.MODEL) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / name)


def rows(run: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / run_folder.METRICS).read_text().splitlines() if line]


def at_batch(patch: pytest.MonkeyPatch, description: str, number: int, act: Callable[[], object]) -> None:
    """Act before this batch of what is watched under a description that starts so."""
    plain = Terminal.watch

    def watch(self: Terminal, iterable: Any, text: str = "", total: int = 0) -> Iterator[Any]:
        for count, item in enumerate(plain(self, iterable, text, total)):
            if text.startswith(description) and count == number:
                act()
            yield item

    patch.setattr(Terminal, "watch", watch)
