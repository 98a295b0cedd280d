"""A callback for Lightning: ResRep, soft pruning or distillation inside a Trainer, and the narrow network in the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .distillation import Distillation
from .errors import ConfigError, MissingExtraError
from .resrep import ResRep
from .soft import SoftPruning
from .storage import save

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer
    except ImportError as error:
        raise MissingExtraError(f"lightning is missing ({error}): pip install 'narrower[examples]'") from error

Make = Callable[[nn.Module, Trainer], ResRep | SoftPruning]


class Narrowing(Callback):
    """Train a network of a LightningModule by ResRep or soft pruning. When the fit ends, the narrow network takes its place.

    Checkpoints of the Trainer hold the method's state, so `trainer.fit(..., ckpt_path=...)` goes on as if uninterrupted.

    Args:
        make: makes the method around the network when the fit begins, before the optimizer is made. `SoftPruning.step` is
            called after each epoch, so its `steps` are `trainer.max_epochs`; those of ResRep are
            `trainer.estimated_stepping_batches`. None: only distil.
        network: the attribute of the LightningModule that holds the network, such as "model" or "net.backbone".
        teacher: the dense network for distillation: `distilled` then returns the loss against it. It is no part of checkpoints.
        shrink: ResRep removes channels that are zero after each epoch. Not with several processes.
        output: a folder to `narrower.save` the narrow network in.
        options: of `Distillation`.

    Attributes:
        method: the ResRep or SoftPruning.
        small: the narrow network, once the fit has ended.
    """

    def __init__(self, make: Make | None = None, *, network: str = "model", teacher: nn.Module | None = None,
                 shrink: bool = False, output: str | Path | None = None, **options: Any) -> None:
        if make is None and teacher is None:
            raise ConfigError("Narrowing needs make=, teacher= or both")
        self.make, self.network, self.teacher, self.shrink, self.output = make, network, teacher, shrink, output
        self.options = options
        self.method: ResRep | SoftPruning | None = None
        self.distillation: Distillation | None = None
        self.small: nn.Module | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the method. Its state is restored when Lightning hands the checkpoint to the module: before the weights, which
        may be narrower already, and before the optimizer is made."""
        if stage != "fit":
            return
        if self.shrink and trainer.world_size > 1:
            raise ConfigError("shrink=True replaces parameters, which DistributedDataParallel does not follow: leave it out")
        network = pl_module.get_submodule(self.network)
        self.method = None if self.make is None else self.make(network, trainer)
        if self.teacher is not None:
            self.distillation = Distillation(self.teacher.to(pl_module.device), network, **self.options)
        before = pl_module.on_load_checkpoint

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            state = checkpoint["callbacks"].get(self.state_key)
            if self.method is not None and not state:
                raise ConfigError("the checkpoint has no state of Narrowing: it is of a training without it")
            if self.method is not None:
                self.method.load_state_dict(state["method"])
            before(checkpoint)

        pl_module.on_load_checkpoint = on_load_checkpoint

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the method to the optimizer."""
        del pl_module.on_load_checkpoint  # the class has its own again
        if self.teacher is not None:
            self.teacher.to(pl_module.device)
        if self.method is not None:
            if len(trainer.optimizers) != 1:
                raise ConfigError(f"Narrowing works with one optimizer, and this module has {len(trainer.optimizers)}")
            self.method.attach(trainer.optimizers[0])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mask channels, or remove those that are zero; log how far it is."""
        if isinstance(self.method, SoftPruning):
            self.method.step()
        elif self.method is not None and self.shrink:
            self.method.shrink()
        if self.method is not None:
            pl_module.log_dict({f"narrowing/{name}": value for name, value in self.method.progress().items()})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the narrow network in the place of the trained one."""
        if self.distillation is not None:
            self.distillation.close()
        network = pl_module.get_submodule(self.network)
        if self.method is None:
            self.small = network
        else:
            self.small = (self.method.merge(over=trainer.global_step >= self.method.steps)
                          if isinstance(self.method, ResRep) else self.method.narrow())
            owner, _, leaf = self.network.rpartition(".")
            setattr(pl_module.get_submodule(owner), leaf, self.small)
        if self.output is not None and trainer.is_global_zero:
            save(self.small, self.output)

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints."""
        return {} if self.method is None else {"method": self.method.state_dict()}


def narrowing_of(module: LightningModule) -> Narrowing | None:
    """The Narrowing among the callbacks of a module's Trainer."""
    found: list[Narrowing] = [c for c in module.trainer.callbacks if isinstance(c, Narrowing)]
    return found[0] if found else None


def param_groups(module: LightningModule, lr: float, weight_decay: float | None = None, momentum: float | None = None,
                 **options: Any) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, for `configure_optimizers`. ResRep's compactors have one of their own. Without ResRep
    there is a single group, so that the module can be trained with the callback and without. Where `weight_decay` or `momentum`
    is not given, the optimizer's own hold."""
    narrowing = narrowing_of(module)
    resrep = None if narrowing is None else narrowing.method
    if isinstance(resrep, ResRep):
        groups = resrep.param_groups(lr=lr, weight_decay=weight_decay, momentum=momentum, **options)
        own = {id(p) for group in groups for p in group["params"]}
        groups[0]["params"] += [p for p in module.parameters() if id(p) not in own]
        return groups
    given = {name: value for name, value in (("weight_decay", weight_decay), ("momentum", momentum)) if value is not None}
    return [{"params": list(module.parameters()), "lr": lr, **given, **options}]


def distilled(module: LightningModule, batch: Any, outputs: Any, task: Tensor | float = 0.0) -> Tensor:
    """The loss of a step, for `training_step`: `Distillation.loss` if the callback has a teacher, else the task's."""
    narrowing = narrowing_of(module)
    if narrowing is None or narrowing.distillation is None:
        return torch.as_tensor(task)
    return narrowing.distillation.loss(batch, outputs, task)
