"""How the two papers count, each in its own way, from the layers of our networks; without narrower's own costs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from narrower.models import make_model


class Layer(NamedTuple):
    """A convolution or linear layer: names, channels, weights for each pair of channels, positions of the output."""

    name: str
    inputs: int
    outputs: int
    area: int
    positions: int
    linear: bool


def layers_of(name: str, size: int) -> list[Layer]:
    """The layers of a network by name, in the order of its forward, on images of `size` pixels."""
    found: list[Layer] = []
    with torch.device("meta"):
        model = make_model(name).eval()

    def note(name: str) -> Callable[..., None]:
        def hook(m: Any, args: Any, output: torch.Tensor) -> None:
            w = m.weight
            found.append(Layer(name, w.shape[1], w.shape[0], w[0, 0].numel(), output[0, 0].numel(), w.ndim == 2))
        return hook

    for path, m in model.named_modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.register_forward_hook(note(path))
    model(torch.zeros(1, 3, size, size, device="meta"))
    return found


def rates_in(text: str) -> list[float]:
    """The rates that the authors write as `[0.1]+[0.60]*35`."""
    parts = (re.fullmatch(r"\[([\d.]+)\](?:\*(\d+))?", part) for part in text.split("+"))
    return [rate for part in parts if part for rate in [float(part[1])] * int(part[2] or 1)]


def hrank_rates(layers: Sequence[Layer], text: str) -> dict[str, float]:
    """The authors' rate of each layer of ours. Of GoogLeNet one for each block, none for the reductions in it."""
    rates, convolutions = rates_in(text), [x.name for x in layers if not x.linear]
    if convolutions[0] != "stem.0":
        return dict(zip(convolutions, rates, strict=True))
    blocks = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in convolutions))
    by_block = dict(zip(blocks, rates, strict=True))
    return {name: 0.0 if re.search(r"branch[35]\.0", name) else by_block[".".join(name.split(".")[:2])]
            for name in convolutions}


def hrank_count(layers: Sequence[Layer], rates: Mapping[str, float], *, fractions: bool = False, linear: int = 1,
                gone: Mapping[str, int] | None = None) -> tuple[float, float]:
    """Multiply-adds and parameters in millions, as HRank counts: a layer loses its own filters, and no inputs.

    `fractions`: widths are not whole numbers. `linear`: how often linear layers count. `gone`: inputs that do count as lost.
    """
    macs = params = 0.0
    for x in layers:
        inputs = x.inputs - (gone or {}).get(x.name, 0)
        cut = rates.get(x.name, 0.0) * x.outputs
        weights = inputs * (x.outputs - (cut if fractions else int(cut + 1e-9))) * x.area
        times = linear if x.linear else 1
        macs += times * (weights * x.positions + (x.outputs if x.linear else 0))
        params += times * (weights + (x.outputs if x.linear else 0))
    return macs / 1e6, params / 1e6


def dense_inputs_gone(layers: Sequence[Layer], rates: Mapping[str, float]) -> dict[str, int]:
    """DenseNet-40: HRank's count does take the filters of a dense block from the inputs of the transition behind it."""
    gone, lost = {}, 0
    for x in layers:
        if re.fullmatch(r"features\.[24]\.conv", x.name):
            gone[x.name], lost = lost, 0
        lost += int(rates.get(x.name, 0.0) * x.outputs + 1e-9)
    return gone


def plus_count(layers: Sequence[Layer], outputs: Mapping[str, int], inputs: Mapping[str, int], *,
               biases: bool) -> tuple[float, float]:
    """As HRankPlus counts, by thop: the narrow network for real, two operations for each value that a BatchNorm reads, and one
    for each that a convolution adds a bias to (`biases`: their VGG and GoogLeNet)."""
    macs = params = 0.0
    for x in layers:
        weights = inputs[x.name] * outputs[x.name] * x.area
        macs += weights * x.positions + (0 if x.linear else (2 + biases) * outputs[x.name] * x.positions)
        params += weights + (outputs[x.name] if x.linear else 2 * outputs[x.name])
    return macs / 1e6, params / 1e6


def resrep_resnet50(widths: Sequence[int], *, stride_first: bool) -> tuple[float, float]:
    """Multiply-adds and parameters of a ResNet-50 in millions, from ResRep's list of 53 widths (a shortcut before its block).

    `stride_first`: counted as if the first convolution of a block had its stride, as in He et al. (2016). torchvision has it in
    the second, so the first works at twice the width and height.
    """
    at = iter(widths)
    x = next(at)
    macs, params = 3 * x * 49 * 112**2, 3 * x * 49 + 2 * x
    for stage, blocks in enumerate((3, 4, 6, 3)):
        size = 56 >> stage
        for block in range(blocks):
            made = [(x, next(at), 1, size)] if block == 0 else []
            one, two, out = next(at), next(at), next(at)
            before = 2 * size if stage and block == 0 and not stride_first else size
            made += [(x, one, 1, before), (one, two, 9, size), (two, out, 1, size)]
            macs += sum(i * o * area * side**2 for i, o, area, side in made)
            params += sum(i * o * area + 2 * o for i, o, area, _ in made)
            x = out
    return (macs + 1000 * x) / 1e6, (params + 1000 * x + 1000) / 1e6


def resrep_resnet(widths: Mapping[str, int], blocks: int) -> float:
    """Multiply-adds of a CIFAR ResNet in millions as ResRep counts: its projections, 1x1, with a kernel of 2x2."""
    macs = 3 * 16 * 9 * 32**2 + 640
    x = 16
    for stage, width in enumerate((16, 32, 64)):
        side = 32 >> stage
        macs += x * width * 4 * side**2 if stage else 0
        for block in range(blocks):
            middle = widths[f"layer{stage + 1}.{block}.conv1"]
            macs += (x * middle + middle * width) * 9 * side**2
            x = width
    return macs / 1e6
