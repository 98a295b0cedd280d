"""What is kept at the end of a training: no reported accuracy hangs on stale BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..batchnorm import recalibrate
from ..data.images import Batch, Images, batches
from ..data.seeding import mix
from ..surgery.walk import named_tensors
from .accelerator import shard_of, to_device
from .config import TrainConfig
from .evaluate import evaluate
from .mixing import Mixing
from .synced_batchnorm import SyncedBatchNorm

if TYPE_CHECKING:
    from accelerate import Accelerator

TRAINED = "as trained"
AVERAGE = "average of the weights"
BEGAN = "as before the training"
CLEARLY = 0.95  # what is kept instead must have at most this share of the loss: small differences are chance


@dataclass(frozen=True)
class Settled:
    """What was kept, and the loss of each candidate on the held-out images."""

    kept: str = TRAINED
    losses: dict[str, float] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        return self.kept != TRAINED


def settle(model: nn.Module, fit: Images, held: Images, config: TrainConfig, accelerator: Accelerator, *, seed: int = 0,
           others: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({})) -> Settled:
    """Give `model`, in place, the best of: its values as trained, and with renewed BatchNorm statistics; likewise of `others`.

    Running statistics lag behind the weights, by much after few steps. Statistics of images that were not augmented as in
    training may be worse still. So `config.recalibrate` images of `fit` are. The values as trained stay, unless others have a
    clearly lower loss on the images of `held`, which this training has not seen. Those named `BEGAN` are taken as they are, and
    only if no other has a higher headline: a training may rightly give up some loss for accuracy.
    """
    values: dict[str, dict[str, Tensor]] = {}
    losses: dict[str, float] = {}
    headlines: dict[str, float] = {}
    trained = snapshot(model)
    sources = {TRAINED: trained, **others}
    try:
        for name, source in sources.items():
            restore(model, source)
            for candidate, renewed in ((name, False), (f"{name}, BatchNorm renewed", True)):
                if renewed and (name == BEGAN or not config.recalibrate or not renew(model, fit, config, accelerator, seed)):
                    continue
                values[candidate] = snapshot(model)
                figures = evaluate(model, held, config, accelerator)
                losses[candidate], headlines[candidate] = figures["loss"], next(iter(figures.values()))
    except BaseException:  # Ctrl-C, say
        restore(model, trained)
        raise
    allowed = [name for name in losses if name != BEGAN or headlines[BEGAN] == max(headlines.values())]
    best = min(allowed, key=lambda name: losses[name])
    kept = best if losses[best] < CLEARLY * losses[TRAINED] else TRAINED
    restore(model, values[kept])
    return Settled(kept, losses)


def renew(model: nn.Module, fit: Images, config: TrainConfig, accelerator: Accelerator, seed: int) -> int:
    """Renew the BatchNorm statistics from `config.recalibrate` images as in training. Returns their number.

    Each process takes its part of every batch, and statistics are over all parts.
    """
    count = accelerator.num_processes
    with SyncedBatchNorm():
        seen = recalibrate(model, train_batches(fit, config, accelerator, seed), images=-(-config.recalibrate // count))
    return count * seen


def train_batches(fit: Images, config: TrainConfig, accelerator: Accelerator, seed: int) -> Iterator[Batch]:
    """This process's batches exactly as in training: shuffled, augmented and mixed, on the device. Labels are not mixed."""
    shard = shard_of(accelerator)
    loader = batches(fit.augmented(seed, config.epochs), config.batch_size, order=mix(seed, config.epochs),
                     shard=shard, workers=config.workers)
    mixing = Mixing(config, accelerator.device)
    for step, (x, y) in enumerate(loader):
        x, y = to_device(x, y, config, accelerator.device)
        yield mixing(x, y, None, mix(seed, "settle", step, shard[0]))[0], y


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: t.detach().clone() for name, t in named_tensors(model).items()}


@torch.no_grad()
def restore(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put the values back, in place."""
    for name, t in named_tensors(model).items():
        t.copy_(values[name])
