"""recalibrate: estimate BatchNorm statistics again from data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .errors import DataError
from .inputs import call_model, samples
from .surgery.walk import in_eval_mode


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any], *, images: int | None = None) -> int:
    """Reset the running statistics of every BatchNorm to the average over `batches` (or their first `images` samples).

    A batch is the model's input, or a pair (input, target). Returns the number of samples used. Raises DataError if there are
    no batches.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    momenta = [m.momentum for m in norms]
    seen = 0
    with in_eval_mode(model):
        try:
            for inputs, count in samples(batches, model, images):
                if not seen:
                    for m in norms:
                        m.reset_running_stats()
                        m.momentum = None  # cumulative average
                        m.train()
                call_model(model, inputs)
                seen += count
        finally:
            for m, momentum in zip(norms, momenta, strict=True):
                m.momentum = momentum
    if not seen:
        raise DataError("recalibrate got no batches")
    return seen
