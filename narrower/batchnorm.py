"""recalibrate: estimate BatchNorm statistics again from data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .errors import DataError
from .inputs import call_model, running_on, samples
from .preconditions import checked
from .surgery.walk import in_eval_mode


@checked
@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any], *, images: int | None = None) -> int:
    """Reset the running statistics of every BatchNorm to the average over `batches` (or their first `images` samples).

    A batch is the model's input, or a pair (input, target). A BatchNorm that no batch reaches keeps its statistics; all do if
    an error ends the pass. A batch in which a BatchNorm reads one value of each channel does not count for it, if others did
    before. Returns the number of samples used. Raises DataError if there are no batches, a batch has no tensor, or the model
    does not run on it.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    before = [(m.momentum, {n: t.clone() for n, t in m.named_buffers()}) for m in norms]
    hooks = [m.register_forward_pre_hook(pass_single_values) for m in norms if not isinstance(m, nn.SyncBatchNorm)]
    seen, done = 0, False
    with in_eval_mode(model):
        try:
            for inputs, count in samples("recalibrate", batches, model, images):
                if not seen:
                    for m in norms:
                        m.reset_running_stats()
                        m.momentum = None  # cumulative average
                        m.train()
                with running_on("recalibrate", inputs):
                    call_model(model, inputs)
                seen += count
            done = True
        finally:
            for hook in hooks:
                hook.remove()
            for m, (momentum, statistics) in zip(norms, before, strict=True):
                m.momentum = momentum
                if not done or untouched(m):
                    for name, t in statistics.items():
                        m.get_buffer(name).copy_(t)
    if not seen:
        raise DataError("recalibrate got no batches")
    return seen


def pass_single_values(norm: nn.Module, args: tuple[Any, ...]) -> None:
    """Before a BatchNorm: one value of each channel, as of the image that `images` leaves of a batch, has no variance. With
    statistics of other batches the BatchNorm uses these, and keeps them."""
    for x in args[:1]:
        norm.train(x.numel() > x.shape[1] or not bool(norm.num_batches_tracked))


def untouched(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether the running statistics are as reset."""
    mean, var = norm.running_mean, norm.running_var
    return mean is not None and var is not None and not bool(mean.any()) and bool((var == 1).all())
