"""What a forward reads from its data: counts of boxes, numbers of tensors, branches.

One forward on real tensors notes the output of every operator that depends on data. The trace and its probes then run with the
same answers and take the same branches, although most of their activations are zeros that nobody has computed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .table import operator_of

Answer = Any  # a number, a tensor or several


class AnswerListener(TorchDispatchMode):
    """Notes the answers of a forward on real tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[Answer] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if operator_of(func).depends_on_data(args):
            self.answers.append(copy_answer(out))
        return out


def copy_answer(out: Any) -> Answer:
    """A copy, as the model's code may write into the answer."""
    if isinstance(out, (list, tuple)):
        return type(out)(copy_answer(t) for t in out)
    return out.detach().clone() if isinstance(out, Tensor) else out
