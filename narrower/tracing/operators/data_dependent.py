"""What a forward reads from its data: counts of boxes, numbers of tensors, branches.

One forward on real tensors notes what every such question was answered. The trace and its probes then run with the same
answers, and take the same way through the forward, but most of their activations are zeros that nobody has computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

QUESTIONS = {
    "_local_scalar_dense", "nonzero", "masked_select", "nms", "_unique2", "unique_dim", "unique_consecutive", "equal",
    "is_nonzero", "bincount", "repeat_interleave", "nonzero_static", "argwhere",
}

Answer = Any  # a number, a tensor or several


def asks(name: str, args: Sequence[Any]) -> bool:
    """Whether what comes out of a call, or its shape, depends on values."""
    return name in QUESTIONS or (name == "index" and any(masks(i) for i in args[1]))


def masks(i: Any) -> bool:
    return isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)


class AnswerListener(TorchDispatchMode):
    """Notes the answers of a forward on real tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[Answer] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if asks(func._schema.name.split("::")[-1], args):
            self.answers.append(copy_answer(out))
        return out


def copy_answer(out: Any) -> Answer:
    """A copy, as code may write into what it has got."""
    if isinstance(out, (list, tuple)):
        return type(out)(copy_answer(t) for t in out)
    return out.detach().clone() if isinstance(out, Tensor) else out
