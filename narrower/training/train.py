"""The reference loop, on accelerate: SGD with Nesterov momentum, warm-up and cosine decay.

Nothing random is carried from step to step: order, augmentation and dropout are drawn from (seed, epoch, step), with
torch's global generator seeded anew. A checkpoint is therefore model, optimizer, epoch and step, and a resumed run
equals an uninterrupted one bit for bit (on the CPU).
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.images import Images, batches, mix
from ..data.sources import ImageData
from ..errors import ConfigError, StorageError
from ..resrep.trainer import ResRep
from ..surgery.walk import in_eval_mode
from .config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

Watch = Callable[..., Any]
"""Wraps an iterable to show progress: `watch(iterable, description, total)`."""
Log = Callable[[dict[str, Any]], None]
"""Takes a row of metrics."""


WORTH_SHRINKING = 0.05
"""Share of the dense network's cost that must be at zero for an epoch to end in `ResRep.shrink`."""


def silent(iterable: Any, description: str = "", total: int = 0) -> Any:
    """The `Watch` that shows nothing."""
    return iterable


def make_accelerator(device: str = "auto") -> Accelerator:
    """accelerate's view of this process: its device, and the other processes if there are any.

    Raises:
        ConfigError: accelerate is missing, or this machine has no such device.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ConfigError("training needs accelerate: pip install 'narrower[cli]'") from error

    if device == "cpu":
        return Accelerator(cpu=True)
    if device != "auto":
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"--device {device} cannot be used here ({reason}); auto takes what there is") from error
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    return Accelerator()


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Rate of `step`, counted from 0 over all epochs of `steps` each: a linear warm-up, then a cosine to `min_lr`.

    Loshchilov and Hutter, "SGDR" (ICLR 2017), eq. 5, without restarts.
    """
    total, warmup = config.epochs * steps, round(config.warmup_epochs * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    model: nn.Module,
    data: ImageData,
    config: TrainConfig,
    *,
    seed: int = 0,
    stage: str = "train",
    accelerator: Accelerator | None = None,
    checkpoint: Path | None = None,
    resrep: ResRep | None = None,
    log: Log = lambda row: None,
    watch: Watch = silent,
) -> nn.Module:
    """Train `model` in place for `config.epochs` and return it, on the accelerator's device.

    Args:
        model: images `[N, C, H, W]` to logits `[N, num_classes]`.
        data: training images, and those to evaluate on after every epoch.
        config: the settings.
        seed: of order, augmentation and dropout.
        stage: name in the rows of `log`.
        accelerator: from `make_accelerator`; made here if not given.
        checkpoint: file that is replaced after every epoch, and from which training goes on if it exists.
        resrep: compactors on the model, to train along; after an epoch, channels that are zero leave the model where that saves
            at least `WORTH_SHRINKING` of the dense network.
        log: takes a row per epoch: stage, epoch, lr, loss, top1, val_loss, seconds, images_per_second, and of `resrep` what
            its `progress` says.
        watch: shows progress.

    Raises:
        ConfigError: the loss is not finite, or the checkpoint belongs to other settings.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the step under way was finished and saved in `checkpoint`.
    """
    accelerator = accelerator or make_accelerator()
    shard = (accelerator.process_index, accelerator.num_processes)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    model.to(accelerator.device)
    given: dict[str, Any] = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
    groups = list(model.parameters()) if resrep is None else resrep.param_groups(**given)
    optimizer: Any = torch.optim.SGD(groups, **given, nesterov=config.momentum > 0)
    if resrep is not None:
        resrep.attach(optimizer)
    settings = {"batch_size": config.batch_size, "seed": seed, "processes": shard[1]}
    first, done, lost = _resume(checkpoint, model, optimizer, settings, accelerator.device, resrep)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    steps = 0

    def save(epoch: int, step: int, total: Tensor) -> None:
        if checkpoint is not None and accelerator.is_main_process:
            state = {"epoch": epoch, "step": step, "total": float(total), "settings": settings}
            if resrep is not None:
                state["resrep"] = resrep.state_dict()
            _store({**state, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)

    for epoch in range(first, config.epochs):
        begin = time.perf_counter()
        images = data.train.augmented(seed, epoch)
        options: dict[str, Any] = {"order": mix(seed, epoch), "shard": shard, "workers": config.workers}
        steps = steps or len(batches(images, config.batch_size, **options))
        loader = batches(images, config.batch_size, start=done, **options)
        total = torch.tensor(lost, dtype=torch.float64, device=accelerator.device)
        seen = 0
        wrapped.train()
        with interrupts() as asked:
            title = f"{stage}: epoch {epoch + 1} of {config.epochs}{_costs(resrep)}"
            shown = watch(loader, title, len(images) // shard[1])
            for step, (x, y) in enumerate(shown, start=done):
                torch.manual_seed(mix(seed, epoch, step, shard[0]))  # dropout
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config, epoch * steps + step, steps) * group.get("lr_scale", 1.0)
                x, y = _placed(x, y, config, accelerator.device)
                with autocast(config, accelerator.device):
                    loss = F.cross_entropy(wrapped(x), y, label_smoothing=config.smoothing)
                accelerator.backward(loss)
                if config.clip_grad is not None:
                    accelerator.clip_grad_norm_(wrapped.parameters(), config.clip_grad)
                optimizer.step()
                optimizer.zero_grad()
                total += loss.detach() * len(y)
                seen += len(y)
                if asked and step + 1 < steps:
                    save(epoch, step + 1, total)
                    raise KeyboardInterrupt
        if not torch.isfinite(total):
            raise ConfigError(f"the loss is no longer finite in epoch {epoch + 1} of {stage}: try a lower --lr")
        if resrep is not None and resrep.waiting() >= WORTH_SHRINKING:
            resrep.shrink()
            if shard[1] > 1:
                accelerator._models.clear()
                del wrapped
                wrapped = accelerator.prepare_model(model)
        save(epoch, steps, total)  # resumed from here, the epoch has no batches left and is evaluated again
        if asked:
            raise KeyboardInterrupt
        seconds = time.perf_counter() - begin
        result = evaluate(model, data.val, config, accelerator, watch)
        row = {
            "stage": stage,
            "epoch": epoch + 1,
            "epochs": config.epochs,
            "lr": learning_rate(config, epoch * steps + steps - 1, steps),
        }
        row |= {
            "loss": float(total) / max(1, len(images) // shard[1]),
            "top1": result["top1"],
            "val_loss": result["loss"],
        }
        if resrep is not None:
            row |= {key: round(value, 6) for key, value in resrep.progress().items()}
        log(row | {"seconds": seconds, "images_per_second": seen * shard[1] / seconds})
        done, lost = 0, 0.0
    accelerator.free_memory()
    return model


def evaluate(
    model: nn.Module,
    images: Images,
    config: TrainConfig | None = None,
    accelerator: Accelerator | None = None,
    watch: Watch = silent,
) -> dict[str, float]:
    """`{"top1": percent, "loss": mean cross-entropy}` of `model` on `images`, in eval mode (the mode is put back).

    With several processes each takes a part, and all get the figures of the whole.
    """
    config = config or TrainConfig()
    accelerator = accelerator or make_accelerator()
    shard = (accelerator.process_index, accelerator.num_processes)
    loader = batches(images, config.batch_size, shard=shard, workers=config.workers)
    model.to(accelerator.device)
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    with in_eval_mode(model), torch.inference_mode(), autocast(config, accelerator.device):
        for x, y in watch(loader, "evaluating", len(images) // shard[1]):
            x, y = _placed(x, y, config, accelerator.device)
            logits = model(x).float()
            loss = F.cross_entropy(logits, y, reduction="sum")
            sums += torch.stack((loss, (logits.argmax(1) == y).sum(), torch.tensor(len(y), device=x.device)))
    loss, right, count = accelerator.reduce(sums).tolist()
    return {"top1": 100 * right / max(1, count), "loss": loss / max(1, count)}


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 where `config.amp` asks for it; it has the range of float32, so that no gradient is scaled."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.amp)


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM instead of raising, so that a step is never cut in half; the second one raises."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield asked
        return

    def note(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _costs(resrep: ResRep | None) -> str:
    """For the title of a progress bar."""
    if resrep is None:
        return ""
    at = resrep.progress()
    return f", masked to {at['masked']:.0%}, reached {at['reached']:.0%}, {at['zero']:.0f} channels at zero"


def _placed(x: Tensor, y: Tensor, config: TrainConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return x.to(device, memory_format=layout, non_blocking=True), y.to(device, non_blocking=True)


def _store(state: dict[str, Any], path: Path) -> None:
    """Write beside the old file, then take its place: a crash leaves one or the other whole."""
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    part.replace(path)


def _resume(
    checkpoint: Path | None,
    model: nn.Module,
    optimizer: Any,
    settings: dict[str, Any],
    device: torch.device,
    resrep: ResRep | None = None,
) -> tuple[int, int, float]:
    """Epoch, steps done in it and the loss summed so far; zeros where there is no checkpoint."""
    if checkpoint is None or not checkpoint.exists():
        return 0, 0, 0.0
    try:
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        found = {key: state["settings"][key] for key in settings}
        if found == settings:
            if resrep is not None:
                resrep.load_state_dict(state["resrep"])
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            return state["epoch"], state["step"], state["total"]
    except Exception as error:  # the unpickler raises anything on damaged bytes
        raise StorageError(f"cannot go on from {checkpoint}: {type(error).__name__}: {error}") from error
    differ = ", ".join(f"{key} was {found[key]}, is {settings[key]}" for key in settings if found[key] != settings[key])
    raise ConfigError(f"cannot go on from {checkpoint} exactly: {differ}")
