"""Segmentation: a small U-Net on generated discs, cut by measured damage, repaired without labels, and trained on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrower

SIZE = 32


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = block(1, 12), block(12, 24), block(24, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 24, 2, 2), nn.ConvTranspose2d(24, 12, 2, 2)
        self.join2, self.join1, self.head = block(48, 24), block(24, 12), nn.Conv2d(12, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        x = self.up2(self.bottom(F.max_pool2d(b, 2)))
        x = self.up1(self.join2(torch.cat([x, b], 1)))
        return self.head(self.join1(torch.cat([x, a], 1)))


def make_batch(count: int = 8) -> tuple[Tensor, Tensor]:
    """Noisy images `(N, 1, H, W)` of a bright and a dark disc, and the class of each pixel `(N, H, W)`: 0 is background."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    classes = torch.zeros(count, SIZE, SIZE, dtype=torch.long)
    for n in range(count):
        for label in (1, 2):
            row, column = torch.randint(6, SIZE - 6, (2,)).tolist()
            classes[n][(y - row) ** 2 + (x - column) ** 2 < 25] = label
    levels = torch.tensor([0.0, 1.0, -1.0])
    return levels[classes][:, None] + 0.3 * torch.randn(count, 1, SIZE, SIZE), classes


def train(model: nn.Module, batches: list, epochs: int, lr: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for _ in range(epochs):
        for images, classes in batches:
            F.cross_entropy(model(images), classes).backward()
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def mean_iou(model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    """The intersection over union of each class, averaged."""
    found = model.eval()(batch[0]).argmax(1)
    pairs = [(found == k, batch[1] == k) for k in range(3)]
    return sum(float((a & b).sum() / (a | b).sum()) for a, b in pairs) / 3


def main(epochs: int = 6) -> dict[str, float]:
    torch.manual_seed(0)
    batches, held_out = [make_batch() for _ in range(6)], make_batch(16)
    model = UNet()
    train(model, batches, epochs, lr=1e-2)
    result = {"dense": mean_iou(model, held_out)}

    images = [batch[0] for batch in batches]
    graph = narrower.trace(model, images[0][:2])
    scores = narrower.magnitude(model, graph)
    damage = narrower.sensitivity(model, graph, scores, images, measure="kl")  # of the class scores, averaged over pixels
    plan = narrower.plan(graph, scores, macs=0.5, sensitivity=damage)
    cut = narrower.narrow(model, plan)
    narrower.verify(model, cut, plan, images[0][:2])
    result["cut"] = mean_iou(cut, held_out)
    small = narrower.reconstruct(model, cut, plan, images, measure="kl").model
    result["repaired"] = mean_iou(small, held_out)
    train(small, batches, 1, lr=1e-3)
    result["trained"] = mean_iou(small, held_out)
    print(plan.summary, *(f"mean IoU {name} {value:.3f}" for name, value in result.items()), sep="\n")
    return result


if __name__ == "__main__":
    main()
