"""BatchNorm over the images of all processes: the same statistics as one process has with all of them in its batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm as Fused
from torch.overrides import TorchFunctionMode

from .agreement import several


class SyncedBatchNorm(TorchFunctionMode):
    """Within, every BatchNorm in train mode takes the mean and variance over the batches of all processes.

    It acts on `F.batch_norm`, which the modules of torch and of timm call: no module is exchanged, and it works on the CPU,
    where `torch.nn.SyncBatchNorm` does not. On CUDA the kernels of that module do it. All processes must run the same layers.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is F.batch_norm and several() and options["training"]:
            del options["training"]
            return batch_norm(*args, **options)
        return func(*args, **options)


def batch_norm(x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
               bias: Tensor | None = None, momentum: float = 0.1, eps: float = 1e-5) -> Tensor:
    """`F.batch_norm` in train mode over the batches `(N, C, ...)` of all processes. They may differ in N."""
    if x.is_cuda:
        return Fused.apply(x, weight, bias, running_mean, running_var, eps, momentum, dist.group.WORLD, dist.get_world_size())
    dims, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
    wide = x if x.dtype == torch.float64 else x.float()
    sums = Sum.apply(torch.cat([wide.sum(dims), wide.new_full((1,), x.numel() / x.shape[1])]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centred = wide - mean.view(shape)
    variance = Sum.apply(centred.square().sum(dims)) / count
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            running_var.lerp_((variance * (count / (count - 1).clamp_min(1))).to(running_var.dtype), momentum)
    out = centred * torch.rsqrt(variance + eps).view(shape)
    if weight is not None:
        out = out * weight.view(shape)
    return (out if bias is None else out + bias.view(shape)).to(x.dtype)


class Sum(torch.autograd.Function):
    """The sum over all processes. The gradient is that of the sum of all their losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total
