"""Masks of the inputs that weights lose: in groups of a convolution, and for a tensor with two names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.networks import PATTERNS
from support.plans import graph_of
from torch import nn

from narrower.graph.selection import Kept
from narrower.surgery.masking import at_inputs, removed_inputs
from narrower.surgery.walk import named_tensors


@pytest.mark.parametrize("groups", [1, 2])
def test_inputs_of_a_grouped_weight_are_masked_in_each_group(groups: int) -> None:
    weight = torch.randn(6, 4 // groups, 3, 3)
    removed = np.array([True, False, False, True])
    x = torch.randn(2, 4, 5, 5)
    x[:, [1, 2]] = 0
    found = weight.masked_fill(at_inputs(removed.reshape(groups, -1), weight, 1), 0)
    assert not nn.functional.conv2d(x, found, groups=groups).any()
    assert found.count_nonzero() == weight.numel() // 2


def test_inputs_of_a_transposed_convolution_are_along_its_first_dimension() -> None:
    weight = torch.randn(4, 3, 2, 2)
    gone = at_inputs(np.array([[True, False, False, True]]), weight, 0)
    assert gone.shape == (4, 1, 1, 1) and gone.flatten().tolist() == [True, False, False, True]


def test_a_weight_with_two_names_comes_once() -> None:
    graph, model = graph_of("shared"), PATTERNS["shared"].make()
    found = removed_inputs(named_tensors(model), Kept.without(graph, [("stem.0", np.arange(3))]))
    assert len([name for name, _ in found if name in ("left.weight", "right.weight")]) == 1
    assert all(mask.sum() == 3 for mask in found.values())


def test_weights_that_lose_no_inputs_are_not_among_them() -> None:
    graph, model = graph_of("plain"), PATTERNS["plain"].make()
    assert not removed_inputs(named_tensors(model), Kept.without(graph, []))
