"""How far the outputs of networks are from the dense one's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError
from ..inputs import as_float64, call_model, flatten_tensors, map_tensors, shapes_of
from ..surgery.walk import in_eval_mode

Measure = Literal["kl", "relative"]
"""How far outputs are from the dense ones. "kl": the Kullback-Leibler divergence of the class probabilities, of one tensor of
class scores `(N, classes, ...)`, in nats; the mean over images and positions. "relative": the squared error relative to the
variance of the dense output; the mean over floating tensors, in any nesting. Scalars, such as a loss, are left out."""


class Comparison:
    """How far the outputs of several networks are from the dense one's, by a `Measure`, summed up chunk by chunk. None: as
    `measure_of` chooses."""

    def __init__(self, networks: int, measure: Measure | None = None) -> None:
        self.errors, self.sizes, self.given = [np.zeros(1) for _ in range(networks)], np.zeros((3, 1)), measure
        self.measure: Measure = measure or "kl"

    def dense(self, out: Any) -> None:
        """The dense output on the next chunk. Raises DataError if it holds nothing that can be compared."""
        self.measure = measure_of(out, self.given)
        self.want = [t.clone() for t in floats(out)]
        doubles = [as_float64(t.detach()) for t in self.want]
        self.sizes = self.sizes + np.array([[t.numel(), float(t.sum()), float(t.square().sum())] for t in doubles]).T

    def other(self, network: int, out: Any) -> None:
        """The output of another network on this chunk."""
        found = floats(out)
        if [t.shape for t in found] != [t.shape for t in self.want]:
            raise DataError(f"the outputs have shapes {shapes_of(found)}, the dense ones {shapes_of(self.want)}")
        if self.measure == "kl":
            errors = [kl_divergence(self.want[0], found[0])]
        else:
            errors = [float(as_float64(a - b).square().sum()) for a, b in zip(self.want, found, strict=True)]
        self.errors[network] = self.errors[network] + np.array(errors)

    def values(self) -> list[float]:
        """For each network, over all chunks. Raises DataError if one is not finite."""
        count, total, squares = self.sizes
        if self.measure == "kl":
            unit = count / self.want[0].shape[1]
        else:
            unit = np.maximum(squares - total ** 2 / np.maximum(count, 1), 1e-20 * count)
        found = [float((e / unit).mean()) for e in self.errors]
        if not np.isfinite(found).all():
            raise DataError("the outputs are not finite on these images")
        return [max(0.0, v) for v in found]


def floats(outputs: Any) -> list[Tensor]:
    """The floating tensors that hold something. Not those without dimensions, such as a loss: they are of no image."""
    return [t for t in flatten_tensors(outputs) if t.is_floating_point() and t.ndim and t.numel()]


def measure_of(outputs: Any, given: Measure | None = None) -> Measure:
    """The measure that is given. None: "kl" for what a classifier returns, one tensor `(N, K)` with K > 1, else "relative".

    Raises ConfigError if there is no such measure, DataError if it does not fit the outputs.
    """
    if given is not None and given not in get_args(Measure):
        raise ConfigError(f"measure={given!r}: give 'kl' for class scores, 'relative' for other outputs, or None")
    tensors = floats(outputs)
    if not tensors:
        raise DataError(f"the model returns {type(outputs).__name__} without floating-point numbers: nothing can be compared")
    if given == "kl" and (len(tensors) > 1 or tensors[0].ndim < 2 or tensors[0].shape[1] < 2):
        raise DataError(f"the outputs have shapes {shapes_of(tensors)}: measure='kl' compares class scores, one tensor (N, "
                        "classes, ...); give 'relative' for other outputs")
    return given or ("kl" if len(tensors) == 1 and tensors[0].ndim == 2 and tensors[0].shape[1] > 1 else "relative")


@torch.no_grad()
def divergences(dense: nn.Module, others: Sequence[nn.Module], inputs: Iterable[tuple[Any, int]],
                measure: Measure | None = None) -> tuple[list[float], Measure]:
    """How far the outputs of other networks are from the dense one's, and by which measure."""
    comparison = Comparison(len(others), measure)
    with ExitStack() as modes:
        for model in (dense, *others):
            modes.enter_context(in_eval_mode(model))
        for batch, _ in inputs:
            comparison.dense(call_model(dense, map_tensors(batch, torch.clone)))  # a forward may write into its inputs
            for k, other in enumerate(others):
                comparison.other(k, call_model(other, map_tensors(batch, torch.clone)))
    return comparison.values(), comparison.measure


def kl_divergence(dense: Tensor, other: Tensor) -> float:
    """KL(dense || other) over dimension 1, in nats, summed over images and positions."""
    p, q = as_float64(dense).log_softmax(1), as_float64(other).log_softmax(1)
    return float((p.exp() * (p - q)).sum())
