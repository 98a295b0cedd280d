"""What is kept at the end of a training: no reported accuracy hangs on stale BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..batchnorm import recalibrate
from ..data.images import Batch, Images, batches, mix
from ..surgery.walk import named_tensors
from .accelerator import to_device
from .config import TrainConfig
from .evaluate import evaluate

if TYPE_CHECKING:
    from accelerate import Accelerator

TRAINED = "as trained"
CLEARLY = 0.95  # what is kept instead must have at most this share of the loss: small differences are chance


@dataclass(frozen=True)
class Settled:
    """What was kept, and the cross-entropy of each candidate on the held-out images."""

    kept: str = TRAINED
    losses: dict[str, float] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        return self.kept != TRAINED


def settle(model: nn.Module, fit: Images, held: Images, config: TrainConfig, accelerator: Accelerator, *, seed: int = 0,
           average: nn.Module | None = None) -> Settled:
    """Give `model`, in place, the best of: its values as trained, and with renewed BatchNorm statistics; likewise of `average`.

    Running statistics lag behind the weights, by much after few steps. Statistics of images that were not augmented as in
    training may be worse still. So `config.recalibrate` images of `fit` are. The values as trained stay, unless others have a
    clearly lower cross-entropy on the images of `held`, which this training has not seen.
    """
    values: dict[str, dict[str, Tensor]] = {}
    losses: dict[str, float] = {}
    for name, source in ((TRAINED, model), ("average of the weights", average)):
        if source is None:
            continue
        restore(model, named_tensors(source))
        for candidate, renewed in ((name, False), (f"{name}, BatchNorm renewed", True)):
            if not renewed or (config.recalibrate and recalibrate(
                    model, train_batches(fit, config, accelerator, seed), images=config.recalibrate)):
                values[candidate] = snapshot(model)
                losses[candidate] = evaluate(model, held, config, accelerator)["loss"]
    best = min(losses, key=lambda name: losses[name])
    kept = best if losses[best] < CLEARLY * losses[TRAINED] else TRAINED
    restore(model, values[kept])
    return Settled(kept, losses)


def train_batches(fit: Images, config: TrainConfig, accelerator: Accelerator, seed: int) -> Iterator[Batch]:
    """Batches exactly as in training: shuffled and augmented, on the device."""
    loader = batches(fit.augmented(seed, config.epochs), config.batch_size, order=mix(seed, config.epochs),
                     workers=config.workers)
    return (to_device(x, y, config, accelerator.device) for x, y in loader)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: t.detach().clone() for name, t in named_tensors(model).items()}


@torch.no_grad()
def restore(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put the values back, in place."""
    for name, t in named_tensors(model).items():
        t.copy_(values[name])
