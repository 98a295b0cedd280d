"""Lightning: the callback of narrower.lightning runs ResRep or soft pruning, and the fit ends with the narrow network.

    pip install -e '.[examples]' && python examples/lightning_callback.py [resrep | soft]
"""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import narrower
from narrower.lightning import Narrowing, param_groups


def make_network() -> nn.Module:
    """In earnest: your trained network."""
    def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(block(3, 16), block(16, 32, 2), block(32, 32), pool, nn.Linear(32, 4))


class Classifier(pl.LightningModule):
    """Two things to note: the network is one attribute, and the optimizer takes `param_groups`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_network()

    def training_step(self, batch: Any, number: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(param_groups(self, lr=0.05, momentum=0.9, weight_decay=1e-4))


EXAMPLE = torch.randn(2, 3, 16, 16)


def resrep(model: nn.Module, trainer: pl.Trainer) -> narrower.ResRep:
    return narrower.ResRep(model, narrower.trace(model, EXAMPLE), macs=0.5, steps=int(trainer.estimated_stepping_batches))


def soft(model: nn.Module, trainer: pl.Trainer) -> narrower.SoftPruning:
    return narrower.SoftPruning(model, narrower.trace(model, EXAMPLE), macs=0.5, steps=trainer.max_epochs)


def main(method: str = "resrep", epochs: int = 8) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(64, 3, 16, 16), torch.arange(64) % 4), batch_size=16, shuffle=True)
    narrowing = Narrowing({"resrep": resrep, "soft": soft}[method])  # output="folder" saves the narrow network there
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, callbacks=[narrowing])
    module = Classifier()
    trainer.fit(module, data)  # ckpt_path=... goes on after an interruption
    print(narrowing.method)
    print(f"multiply-adds {narrower.measure(module.model, EXAMPLE)['macs']:,.0f}")
    return make_network(), module.model


if __name__ == "__main__":
    main(*sys.argv[1:2])
