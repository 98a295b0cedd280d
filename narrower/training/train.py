"""The reference loop, on accelerate and timm.

No random state passes from step to step: order, augmentation and dropout are drawn from (seed, epoch, step), and each step
seeds torch's global generator anew. A checkpoint is therefore model, optimizer, epoch and step. A resumed run equals an
uninterrupted one bit for bit (on the CPU).
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data.images import Images, batches, trained_on
from ..data.seeding import mix
from ..data.sources import ImageData, Watch, silent
from ..data.streams import StreamImages
from ..errors import ConfigError, StorageError
from ..inputs import precise
from ..storage import write_whole
from ..surgery.walk import named_tensors
from .accelerator import autocast, collect_interrupts, make_accelerator, shard_of, to_device
from .agreement import anywhere, ask, first, share
from .checking import task_in_training
from .config import TrainConfig
from .evaluate import evaluate, evaluate_classes, headline
from .methods import Methods
from .mixing import Mixing
from .optimizing import make_average, make_optimizer, make_schedule, updates_per_epoch
from .settle import AVERAGE, BEGAN, TRAINED, settle, snapshot
from .synced_batchnorm import SyncedBatchNorm

if TYPE_CHECKING:
    from accelerate import Accelerator

Log = Callable[[dict[str, Any]], None]
"""Takes a row of metrics."""

DIVERGED = 1e4
"""No loss of a training that works is as high: guessing has the logarithm of the number of classes."""
WORTH_SHRINKING = 0.05
"""After an epoch `ResRep.shrink` is called if it saves at least this share of the dense network's cost."""


@dataclass(frozen=True)
class TrainContext:
    """Where a training runs, and whom it tells.

    Attributes:
        accelerator: from `make_accelerator`; made by `train` if not given.
        stage: name of the training in the rows of `log`.
        checkpoint: file that is replaced after every epoch. If it exists, training resumes from it.
        log: takes a row per epoch: stage, epoch, lr, loss, figures of the task, val_loss, seconds, images_per_second, and what
            `progress` of the methods returns.
        watch: shows progress.
        best: called after an epoch whose loss on the images held out is the lowest so far, in order to save the network.
    """

    accelerator: Accelerator | None = None
    stage: str = "train"
    checkpoint: Path | None = None
    log: Log = lambda row: None
    watch: Watch = silent
    best: Callable[[], None] | None = None


class Position(NamedTuple):
    """How far a training is: the epoch, the steps done in it, and the sum of the losses of their images (of all processes)."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0


class Best(NamedTuple):
    """The epoch, from 1, with the lowest loss on the images held out. Validation images choose nothing."""

    epoch: int = 0
    loss: float = math.inf


def train(
    model: nn.Module, data: ImageData, config: TrainConfig, context: TrainContext | None = None, *, seed: int = 0,
    methods: Methods | None = None,
) -> nn.Module:  # fmt: skip
    """Train `model` in place for `config.epochs` and return it, on the accelerator's device.

    `config.held_out` training images are not trained on. At the end they decide whether the BatchNorm statistics are renewed,
    whether the average of the weights is taken, and whether the network was better before the training (`settle`; a row of the
    log says which). With a method that narrows the caller settles, once the network is narrow.

    Args:
        model: images `[N, C, H, W]` to logits `[N, num_classes]`, or to what the task of the data takes.
        data: training images, and those to evaluate on after every epoch.
        config: the settings.
        context: device, checkpoint, log and progress.
        seed: of order, augmentation and dropout.
        methods: what trains along with the model.

    Raises:
        ConfigError: the loss is not finite or above `DIVERGED`, or the checkpoint belongs to other settings.
        StorageError: the checkpoint cannot be read, or is of another network.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the step under way is finished and saved in the checkpoint first.
    """
    with collect_interrupts() as interrupted:
        loop = TrainLoop(model, data, config, context or TrainContext(), seed, methods or Methods())
    if anywhere(bool(interrupted)):
        raise KeyboardInterrupt
    for epoch in range(loop.start.epoch, config.epochs):
        loop.run_epoch(loop.start if epoch == loop.start.epoch else Position(epoch))
    if config.epochs and not loop.methods.narrows:
        loop.settle()
    loop.accelerator.free_memory()
    return model


class TrainLoop:
    """One training under way: the model, the optimizer, and `wrapped`, the model as accelerate runs it, change with it."""

    def __init__(self, model: nn.Module, data: ImageData, config: TrainConfig, context: TrainContext, seed: int,
                 methods: Methods) -> None:
        self.model, self.data, self.config, self.context = model, data, config, context
        self.seed, self.methods = seed, methods
        self.resrep, self.distillation = methods.resrep, methods.distillation
        self.accelerator = context.accelerator or make_accelerator()
        self.shard = shard_of(self.accelerator)
        self.steps = 0  # batches per epoch, counted by the first one
        self.schedule: Any = None  # made then
        self.best = Best()
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        model.to(self.accelerator.device)
        if self.distillation is not None:
            self.distillation.teacher.to(self.accelerator.device)
        self.task = task_in_training(data.task, config)
        self.fit, self.held = data.split(config.held_out, seed)
        if config.model_ema and self.held is None:
            raise ConfigError(f"--model-ema: of {len(self.fit)} training images none are held out that could decide whether it "
                              "is kept; 20 images have one")
        self.average = make_average(model, config, methods.narrows)
        self.mixing = Mixing(config, self.accelerator.device)
        scales = config.amp and config.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=scales)
        self.settings = {
            "batch_size": config.batch_size, "seed": seed, "processes": self.shard[1], "held_out": config.held_out,
            "grad_accum_steps": config.grad_accum_steps, "opt": config.opt,
        }
        optimizer = make_optimizer(model, config, self.resrep)
        methods.attach(optimizer)
        self.began: dict[str, Tensor] = {}  # the values before the training
        self.start = self.resume(optimizer)
        self.wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.compile()

    def run_epoch(self, start: Position) -> None:
        """Train from `start` to the end of its epoch, save, evaluate and log."""
        began = time.perf_counter()
        images = self.fit.augmented(self.seed, start.epoch)
        options: dict[str, Any] = {
            "order": mix(self.seed, start.epoch), "shard": self.shard, "workers": self.config.workers,
        }
        self.steps = self.steps or len(batches(images, self.config.batch_size, **options))
        self.schedule = self.schedule or make_schedule(self.optimizer, self.config, updates_per_epoch(self.steps, self.config))
        loader = batches(images, self.config.batch_size, start=start.step, **options)
        count = self.count(images)
        before = start.loss_sum if self.accelerator.is_main_process else 0.0
        loss_sum = precise(torch.zeros((), device=self.accelerator.device)) + before
        seen = 0
        self.wrapped.train()
        with collect_interrupts() as interrupted:
            watched = self.context.watch(loader, self.title(start.epoch), count // self.shard[1])
            stopped = ask(lambda: bool(interrupted))
            for step, (x, y) in enumerate(watched, start.step):
                loss_sum += self.run_step(start.epoch, step, x, y) * len(x)
                seen += len(x)
                if step + 1 == self.steps or not self.moves(step):
                    continue
                if stopped():
                    self.save(Position(start.epoch, step + 1, float(self.accelerator.reduce(loss_sum))))
                    raise KeyboardInterrupt
                stopped = ask(lambda: bool(interrupted))  # answered during the next step
            total = float(self.accelerator.reduce(loss_sum))
            loss = total / max(1, count)
            if not loss < DIVERGED:
                raise ConfigError(f"{self.context.stage} has diverged: the loss is {loss:.2g} in epoch {start.epoch + 1}; try "
                                  "a lower --lr")
            share(self.model)
            self.shrink()
            # resumed from here, the epoch has no batches left and is evaluated again
            self.save(Position(start.epoch, self.steps, total))
            stop = anywhere(bool(interrupted))
        if stop:
            raise KeyboardInterrupt
        seconds = time.perf_counter() - began
        speed = {"seconds": seconds, "images_per_second": seen * self.shard[1] / seconds}
        self.context.log(self.evaluated(start.epoch, loss) | speed)

    def run_step(self, epoch: int, step: int, x: Tensor, y: Any) -> Tensor:
        """Forward and backward of a batch, and a step of the optimizer if it is the last one of the step; the mean loss."""
        x, y = to_device(x, y, self.config, self.accelerator.device)
        count, moves = len(x), self.moves(step)
        classes = self.data.num_classes or None  # images without classes have those that a network gave them
        x, y = self.mixing(x, y, classes, mix(self.seed, epoch, step, self.shard[0]))  # seeds dropout too
        with nullcontext() if moves else self.accelerator.no_sync(self.wrapped):
            with autocast(self.config, self.accelerator.device), self.batchnorm():
                outputs = self.wrapped(x)
                loss = self.task.loss(outputs, y)
                if self.distillation is not None:
                    loss = self.distillation.loss(x, outputs, loss)
            self.accelerator.backward(self.scaler.scale(loss * self.weight(step, count)))
        if moves:
            self.move(epoch * updates_per_epoch(self.steps, self.config) + step // self.config.grad_accum_steps)
        return loss.detach()

    def moves(self, step: int) -> bool:
        """Whether the optimizer takes a step after batch `step`."""
        return (step + 1) % self.config.grad_accum_steps == 0 or step + 1 == self.steps

    def move(self, update: int) -> None:
        """A step of the optimizer, the `update`-th from 0."""
        if self.schedule is not None:
            self.schedule.step_update(update)
        if self.config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.methods.after_step(update + 1, self.config.epochs * updates_per_epoch(self.steps, self.config))
        if self.average is not None:
            self.average.update(self.model, update)

    def compile(self) -> None:
        """Train through torch.compile where the settings ask for it. The model itself stays as it is."""
        if self.config.torchcompile:
            torch.compiler.reset()  # after some shapes of networks of a class, in a process, torch compiles no more
            self.wrapped = torch.compile(self.wrapped, backend=self.config.torchcompile)

    def count(self, images: Images) -> int:
        """How many images all processes train on in an epoch."""
        if isinstance(images, StreamImages):
            return self.steps * self.config.batch_size * self.shard[1]  # all batches are full
        return trained_on(len(images), self.config.batch_size, self.shard[1])

    def weight(self, step: int, count: int) -> float:
        """By what the mean loss of `count` images counts, for the mean over all images of the optimizer's step to come out.

        These are of all its batches, in all processes.
        """
        together = self.config.grad_accum_steps
        first = step - step % together
        if isinstance(self.fit, StreamImages):
            return 1 / min(together, self.steps - first)
        whole = self.config.batch_size * self.shard[1]
        return count * self.shard[1] / min(together * whole, self.count(self.fit) - first * whole)

    def batchnorm(self) -> AbstractContextManager[Any]:
        """In which the network runs in training."""
        return SyncedBatchNorm() if self.config.sync_bn else nullcontext()

    def shrink(self) -> None:
        """Take channels at zero out of the model if that is worth it."""
        if self.resrep is None or self.resrep.waiting() < WORTH_SHRINKING:
            return
        self.resrep.shrink()
        if self.shard[1] > 1:  # DistributedDataParallel knows the old parameters; it must be freed before the new one
            self.accelerator._models.clear()
            del self.wrapped
            self.wrapped = self.accelerator.prepare_model(self.model)
            self.compile()
        elif self.config.torchcompile:
            torch.compiler.reset()  # for the new shapes, as in `compile`

    def settle(self) -> None:
        """Keep the best of the network's values at the end, and log which, with the accuracy that is final."""
        if self.held is None:
            return
        began = time.perf_counter()
        others: dict[str, Mapping[str, Tensor]] = {BEGAN: self.began} if self.began else {}
        if self.average is not None:
            share(self.average.module)
            others[AVERAGE] = named_tensors(self.average.module)
        found = settle(self.model, self.fit, self.held, self.config, self.accelerator, seed=self.seed, others=others)
        row: dict[str, Any] = {"stage": "settle", "kept": found.kept, "held_out": len(self.held), "losses": found.losses,
                               "best_epoch": self.best.epoch}
        if found.kept == BEGAN:
            row["text"] = (f"the loss on images held out was {found.losses[BEGAN]:.4g} before this training, and is "
                           f"{found.losses[TRAINED]:.4g}: the network stays as it was; give a lower --lr, or --clip-grad 10")
        if found.changed:
            result, classes = evaluate_classes(self.model, self.data.val, self.config, self.accelerator, self.context.watch)
            row |= headline(result) | result | classes
        self.context.log(row | {"seconds": time.perf_counter() - began})

    def evaluated(self, epoch: int, loss: float) -> dict[str, Any]:
        """The row of an epoch: its settings, its training loss, and what the evaluation images say."""
        result, classes = evaluate_classes(self.model, self.data.val, self.config, self.accelerator, self.context.watch)
        if self.schedule is not None:  # an epoch that is only evaluated again has taken no step
            self.schedule.step_update((epoch + 1) * updates_per_epoch(self.steps, self.config) - 1)
        row = {
            "stage": self.context.stage, "epoch": epoch + 1, "epochs": self.config.epochs,
            "lr": self.optimizer.param_groups[0]["lr"],
            **headline(result), **result, "loss": loss, "val_loss": result["loss"],
        }
        if self.held is not None and not self.methods.narrows:
            row["held_loss"] = evaluate(self.model, self.held, self.config, self.accelerator)["loss"]
            if row["held_loss"] < self.best.loss:
                self.best = Best(epoch + 1, row["held_loss"])
                if self.context.best is not None:
                    self.context.best()
        return row | self.methods.progress() | self.methods.notes() | (classes if epoch + 1 == self.config.epochs else {})

    def title(self, epoch: int) -> str:
        """For a progress bar."""
        title = f"{self.context.stage}: epoch {epoch + 1}/{self.config.epochs}"
        at = self.methods.progress()
        return title + "".join(f", {name} {at[name]:.0%}" for name in ("masked", "reached") if name in at)

    def save(self, position: Position) -> None:
        """Replace the checkpoint: write beside the old file, then take its place. A crash leaves one or the other whole."""
        path = self.context.checkpoint
        if path is None or not self.accelerator.is_main_process:
            return
        state = {"epoch": position.epoch, "step": position.step, "total": position.loss_sum, "settings": self.settings,
                 "best": tuple(self.best), "began": self.began, **self.methods.state_dict()}
        if self.average is not None:
            state["average"] = self.average.state_dict()
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        content = io.BytesIO()  # torch's own writing to a file ends in an abort where the disk is full
        torch.save({**state, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, content)
        write_whole({path: content.getvalue()})

    def resume(self, optimizer: torch.optim.Optimizer) -> Position:
        """Load the checkpoint, if there is one, into the model, the optimizer and the compactors."""
        path = self.context.checkpoint
        state = None if path is None else first(lambda: read_checkpoint(path))
        if state is None:
            if not self.methods.narrows and self.held is not None:
                self.began = snapshot(self.model)
            return Position()
        try:
            found = {key: state["settings"].get(key, value) for key, value in self.settings.items()}
            differ = [f"{key} was {found[key]}, is {value}" for key, value in self.settings.items() if found[key] != value]
            start = Position(state["epoch"], state["step"], state["total"])
            if not differ:
                self.methods.load_state_dict(state)
                self.model.load_state_dict(state["model"])
                if self.average is not None:
                    self.average.load_state_dict(state["average"])
                if self.scaler.is_enabled():
                    self.scaler.load_state_dict(state["scaler"])
                optimizer.load_state_dict(state["optimizer"])
                self.best = Best(*state.get("best", ()))
                self.began = state.get("began", {})
        except Exception as error:  # whatever other contents give
            raise StorageError(f"cannot go on from {path}: {type(error).__name__}: {error}") from error
        if differ:
            raise ConfigError(f"cannot go on from {path} exactly: {', '.join(differ)}")
        if start.epoch >= self.config.epochs:
            raise ConfigError(f"{path} is of epoch {start.epoch + 1}: --epochs {self.config.epochs} has passed already")
        return start


def read_checkpoint(path: Path) -> Any:
    """The contents of a checkpoint, on the CPU; None if there is none. Raises StorageError if it cannot be read."""
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises anything on damaged bytes
        raise StorageError(f"cannot go on from {path}: {type(error).__name__}: {error}") from error
