"""A detector in the style of ultralytics' YOLO: C2f blocks (chunk, concatenation), a neck that upsamples, a loss of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrower

SIZE, STRIDE, CLASSES = 64, 8, 2


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.SiLU())


class C2f(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.cv1, self.cv2 = conv(inputs, outputs, 1), conv(outputs + half, outputs, 1)
        self.m = nn.Sequential(conv(half, half), conv(half, half))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.cv1(x).chunk(2, 1)
        return self.cv2(torch.cat([a, b, b + self.m(b)], 1))


class Detector(nn.Module):
    """For each cell of `STRIDE` pixels: whether an object's centre is there, its box and its class."""

    def __init__(self) -> None:
        super().__init__()
        self.p2 = nn.Sequential(conv(3, 16, stride=2), conv(16, 24, stride=2), C2f(24, 24))
        self.p3 = nn.Sequential(conv(24, 32, stride=2), C2f(32, 32))
        self.p4 = nn.Sequential(conv(32, 48, stride=2), C2f(48, 48))
        self.neck = C2f(80, 32)
        self.objects, self.boxes, self.classes = nn.Conv2d(32, 1, 1), nn.Conv2d(32, 4, 1), nn.Conv2d(32, CLASSES, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        p3 = self.p3(self.p2(x))
        x = self.neck(torch.cat([F.interpolate(self.p4(p3), scale_factor=2), p3], 1))
        return {"objects": self.objects(x), "boxes": self.boxes(x), "classes": self.classes(x)}


def make_batch(count: int = 8) -> tuple[Tensor, dict[str, Tensor]]:
    """Images of a red or blue rectangle, and targets on the grid; a box is its centre within the cell and its size."""
    images, grid = 0.1 * torch.randn(count, 3, SIZE, SIZE), SIZE // STRIDE
    objects, boxes = torch.zeros(count, 1, grid, grid), torch.zeros(count, 4, grid, grid)
    classes = torch.zeros(count, grid, grid, dtype=torch.long)
    for n in range(count):
        label, (w, h, left, top) = n % CLASSES, torch.randint(8, 24, (4,)).tolist()
        images[n, 2 * label, top:top + h, left:left + w] += 1
        x, y = (left + w / 2) / STRIDE, (top + h / 2) / STRIDE
        column, row = int(x), int(y)
        objects[n, 0, row, column], classes[n, row, column] = 1, label
        boxes[n, :, row, column] = torch.tensor([x - column, y - row, w / SIZE, h / SIZE])
    return images, {"objects": objects, "boxes": boxes, "classes": classes}


def loss_of(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    there = targets["objects"][:, 0] > 0
    objectness = F.binary_cross_entropy_with_logits(outputs["objects"], targets["objects"], pos_weight=torch.tensor(20.0))
    boxes = (outputs["boxes"] - targets["boxes"]).movedim(1, -1)[there].abs().mean()
    return objectness + boxes + F.cross_entropy(outputs["classes"].movedim(1, -1)[there], targets["classes"][there])


def train(model: nn.Module, batches: list, epochs: int, lr: float) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    losses = []
    for _ in range(epochs):
        for images, targets in batches:
            loss = loss_of(model(images), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return losses


def main(epochs: int = 8) -> tuple[narrower.Plan, list[float]]:
    torch.manual_seed(0)
    batches = [make_batch() for _ in range(4)]
    model = Detector()
    before = train(model, batches, epochs, lr=3e-3)
    graph = narrower.trace(model, batches[0][0][:2])
    plan = narrower.plan(graph, narrower.magnitude(model, graph), macs=0.5, round_to=4)
    small = narrower.narrow(model, plan)
    narrower.verify(model, small, plan, batches[0][0][:2])
    after = train(small, batches, epochs, lr=1e-3)
    print(plan, f"loss {before[-1]:.3f} dense, {after[0]:.3f} cut, {after[-1]:.3f} trained on", sep="\n")
    return plan, after


if __name__ == "__main__":
    main()
