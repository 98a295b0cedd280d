"""A YOLO-style detector of realistic size for benchmarks: C2f blocks (chunk and concat), SPPF, a PAN neck, a decoupled head."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def unit(i: int, o: int, k: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, bias=False), nn.BatchNorm2d(o), nn.SiLU())


class C2f(nn.Module):
    def __init__(self, i: int, o: int, n: int, shortcut: bool = True) -> None:
        super().__init__()
        half, self.shortcut = o // 2, shortcut
        self.cv1, self.cv2 = unit(i, o, 1), unit((2 + n) * half, o, 1)
        self.m = nn.ModuleList(nn.Sequential(unit(half, half), unit(half, half)) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        for m in self.m:
            y.append(y[-1] + m(y[-1]) if self.shortcut else m(y[-1]))
        return self.cv2(torch.cat(y, 1))


class TwoConvolutions(nn.Module):
    """What a C2f computes, by a convolution for each half in place of one and `chunk`."""

    def __init__(self, block: C2f) -> None:
        super().__init__()
        self.halves = nn.ModuleList(half_of(block.cv1, k) for k in range(2))
        self.cv2, self.m, self.shortcut = block.cv2, block.m, block.shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = [half(x) for half in self.halves]
        for m in self.m:
            y.append(y[-1] + m(y[-1]) if self.shortcut else m(y[-1]))
        return self.cv2(torch.cat(y, 1))


def half_of(block: nn.Sequential, which: int) -> nn.Sequential:
    """A unit that gives the first or the second half of the channels of another."""
    conv, norm = block[0], block[1]
    assert isinstance(conv, nn.Conv2d)
    small = unit(conv.in_channels, conv.out_channels // 2, conv.kernel_size[0], conv.stride[0])
    for old, new in ((conv, small[0]), (norm, small[1])):
        new.load_state_dict({name: t.chunk(2)[which] if t.ndim else t for name, t in old.state_dict().items()})
    return small.train(block.training)


def without_chunk(model: nn.Module) -> nn.Module:
    """A copy with `TwoConvolutions` in place of each C2f: torch-pruning's own example for YOLOv8 does the same.

    Its index mapping does not follow the halves of a `chunk` that meet again in a `cat` (IndexError, torch-pruning 1.6.1).
    """
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, C2f):
                setattr(parent, name, TwoConvolutions(child))
    return model


class SPPF(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1, self.cv2, self.pool = unit(c, c // 2, 1), unit(2 * c, c, 1), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        y += [a := self.pool(y[0]), b := self.pool(a), self.pool(b)]
        return self.cv2(torch.cat(y, 1))


class Yolo(nn.Module):
    """`width` 32 and `depth` 1 are those of YOLOv8s: about 14 GMACs at 640 pixels, 6 at 416. The outputs are raw maps."""

    def __init__(self, width: int = 32, depth: int = 1, classes: int = 80) -> None:
        super().__init__()
        w = [width * k for k in (1, 2, 4, 8, 16)]
        self.stem = nn.Sequential(unit(3, w[0], 3, 2), unit(w[0], w[1], 3, 2), C2f(w[1], w[1], depth))
        self.p3 = nn.Sequential(unit(w[1], w[2], 3, 2), C2f(w[2], w[2], 2 * depth))
        self.p4 = nn.Sequential(unit(w[2], w[3], 3, 2), C2f(w[3], w[3], 2 * depth))
        self.p5 = nn.Sequential(unit(w[3], w[4], 3, 2), C2f(w[4], w[4], depth), SPPF(w[4]))
        self.up = nn.Upsample(scale_factor=2)
        self.n4, self.n3 = C2f(w[4] + w[3], w[3], depth, False), C2f(w[3] + w[2], w[2], depth, False)
        self.d4, self.m4 = unit(w[2], w[2], 3, 2), C2f(w[2] + w[3], w[3], depth, False)
        self.d5, self.m5 = unit(w[3], w[3], 3, 2), C2f(w[3] + w[4], w[4], depth, False)
        self.boxes = nn.ModuleList(self.branch(c, 2 * width, 64) for c in w[2:])
        self.classes = nn.ModuleList(self.branch(c, 4 * width, classes) for c in w[2:])

    @staticmethod
    def branch(i: int, c: int, o: int) -> nn.Sequential:
        return nn.Sequential(unit(i, c), unit(c, c), nn.Conv2d(c, o, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        p3 = self.p3(self.stem(x))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n4 = self.n4(torch.cat((self.up(p5), p4), 1))
        n3 = self.n3(torch.cat((self.up(n4), p3), 1))
        m4 = self.m4(torch.cat((self.d4(n3), n4), 1))
        m5 = self.m5(torch.cat((self.d5(m4), p5), 1))
        return [torch.cat((b(f), c(f)), 1) for b, c, f in zip(self.boxes, self.classes, (n3, m4, m5), strict=True)]
