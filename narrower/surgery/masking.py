"""Where weights read removed channels. With zeros there the dense network computes what the narrow one does."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import and_

import numpy as np
import torch
from torch import Tensor

from ..graph.selection import Kept

Axis = tuple[str, int]
"""The name of a tensor, and a dimension of it."""


def at_inputs(inputs: np.ndarray, t: Tensor, dim: int) -> Tensor:
    """Inputs along a dimension of a weight, bool `(blocks, size)`, as a mask that broadcasts to it."""
    mask = torch.as_tensor(inputs, device=t.device)
    if len(mask) > 1:  # each block is a part of dimension 0
        mask = mask.repeat_interleave(len(t) // len(mask), 0)
    return mask.view([-1 if d == dim else len(mask) if d == 0 else 1 for d in range(t.dim())])


def removed_inputs(tensors: Mapping[str, Tensor], kept: Kept) -> dict[Axis, Tensor]:
    """For each dimension along which a weight reads removed channels a mask of these: bool, broadcasts to the weight. Tied
    tensors come once."""
    stays: dict[tuple[int, int], tuple[Axis, list[np.ndarray]]] = {}
    for (name, dim), slices in kept.graph.by_axis.items():
        if slices[0].reads:
            stays.setdefault((id(tensors[name]), dim), ((name, dim), []))[1].append(kept.axis_mask(name, dim))
    removed = {axis: ~reduce(and_, masks) for axis, masks in stays.values()}
    return {(name, dim): at_inputs(gone, tensors[name], dim) for (name, dim), gone in removed.items() if gone.any()}
