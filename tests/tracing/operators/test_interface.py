"""The steps that rules share: dimensions, arguments, pieces of labels, and where labels meet."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.operators import C, codes, collected, pinned, units
from torch import Tensor, nn

import narrower
from narrower.tracing.constraints import ConstraintCollector
from narrower.tracing.labels import Axis, Carried, Label, along
from narrower.tracing.operators.interface import (
    Operator,
    at_channels,
    dims_of,
    except_free_at,
    free_at,
    is_mask,
    meet,
    normal,
    piece,
    plain,
    tensors_in,
)


@given(st.integers(1, 5), st.data())
def test_negative_dimensions_count_from_the_end(ndim: int, data: st.DataObject) -> None:
    dims = data.draw(st.lists(st.integers(-ndim, ndim - 1), min_size=1, max_size=3))
    assert [normal(d, ndim) for d in dims] == dims_of(dims, ndim) == [range(ndim)[d] for d in dims]
    assert dims_of(dims[0], ndim) == [range(ndim)[dims[0]]]
    assert dims_of(None, ndim) == dims_of([], ndim) == list(range(ndim)), "no dimension means all"


ARGUMENTS = st.lists(st.one_of(
    st.integers(), st.none(), st.lists(st.integers(), max_size=2), st.just(torch.zeros(1)),
    st.lists(st.just(torch.ones(1)), min_size=1, max_size=2), st.tuples(st.none(), st.just(torch.ones(1)))), max_size=4)


@given(ARGUMENTS)
def test_every_argument_is_plain_or_gives_its_tensors(args: list[Any]) -> None:
    rest = plain(args)
    assert not tensors_in(rest)
    assert list(rest) == [a for a in args if not tensors_in([a])]
    flat = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor)]
    assert [id(t) for t in tensors_in(args)] == [id(t) for t in flat]


def test_masks_are_told_from_indices() -> None:
    assert is_mask(torch.zeros(2, dtype=torch.bool)) and is_mask(torch.zeros(2, dtype=torch.uint8))
    assert not any(map(is_mask, (torch.zeros(2, dtype=torch.long), None, 3, True)))


@pytest.mark.parametrize(("dims", "pools"), [
    ((2, 3), True), ((-1, -2), True), (None, False), ((3,), False), ((1, 2, 3), False)])
def test_a_mean_pools_if_it_reduces_exactly_space(dims: Any, pools: bool) -> None:
    assert Operator("mean", pools="over space").is_pooling((torch.zeros(1, 2, 3, 4), dims)) == pools
    assert Operator("max_pool2d", pools="always").is_pooling((torch.zeros(1, 2, 3, 4), dims))
    assert not Operator("relu").is_pooling((torch.zeros(1, 2, 3, 4), dims))


def test_an_index_depends_on_data_if_it_has_a_mask() -> None:
    index = Operator("index", data_dependent="by mask")
    assert index.depends_on_data((torch.zeros(3), [None, torch.zeros(3, dtype=torch.bool)]))
    assert not index.depends_on_data((torch.zeros(3), [None, torch.zeros(3, dtype=torch.long)]))


@given(st.integers(0, 2), st.integers(0, 4), st.integers(0, 5), st.integers(1, 3))
def test_a_piece_is_the_slice_of_the_ids_where_they_change(dim: int, start: int, length: int, step: int) -> None:
    ids = np.arange(4 * 5 * 6).reshape(4, 5, 6)
    index = tuple(slice(start, start + length, step) if d == dim else slice(None) for d in range(3))
    assert np.array_equal(piece(Label(ids, 1), dim, start, start + length, step).ids, ids[index])
    constant = Label(along(np.arange(5), 3, 1), 1)
    if dim != 1:
        assert piece(constant, dim, start, start + length, step) is constant


def collector() -> ConstraintCollector:
    """One that knows ids up to 12."""
    return collected(lambda x: x)[0]


def flat(first: int, size: int, free: int, ndim: int) -> Carried:
    return Carried((Label(along(np.arange(first, first + size), ndim, free), free),))


def test_operands_that_are_free_in_one_dimension_unite_there() -> None:
    r = collector()
    labels = meet(r, [(flat(0, 6, 1, 3), (2, 6, 4)), (flat(6, 6, 0, 2), (6, 1))], 3, "add")
    assert [(x.free, x.ids.reshape(-1).tolist()) for x in labels] == [(1, [0, 1, 2, 3, 4, 5])]
    find = units(r)
    assert all(find(k) == find(k + 6) for k in range(6)) and len({find(k) for k in range(6)}) == 6
    assert not r.pins


@pytest.mark.parametrize(("other", "shape", "pins"), [
    (Carried(), (6, 1), True), (Carried(), (1, 4), False), (Carried(), (4,), False),
    (Carried(uniform=True), (6, 1), False), (Carried(even=(0,)), (6, 1), False)])
def test_an_operand_with_a_size_but_no_channels_pins_unless_its_values_are_even(other: Carried, shape: Any, pins: bool) -> None:
    r = collector()
    meet(r, [(flat(0, 6, 1, 3), (2, 6, 4)), (other, shape)], 3, "add")
    assert pinned(r) == (set(range(6)) if pins else set()) and codes(r) == ({"operand"} if pins else set())


@pytest.mark.parametrize("scale", [(6,), (1, 1, 6), (1, 4, 6)])
def test_a_parameter_that_multiplies_an_activation_is_no_weight_of_the_next_layer(scale: tuple[int, ...]) -> None:
    """Wherever it stands, and with as many dimensions as the activation."""
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.next, self.scale = nn.Linear(3, 6), nn.Linear(6, 2), nn.Parameter(torch.ones(scale))

        def forward(self, x: Tensor) -> Tensor:
            return self.next(self.scale * self.first(x))

    roles = {s.tensor: s.role for s in narrower.trace(Scaled(), torch.randn(2, 4, 3))["first"].slices}
    assert roles == {"first.weight": "out", "first.bias": "along", "scale": "along", "next.weight": "in"}


def test_a_weight_times_a_style_is_a_weight_still() -> None:
    """The style has the inputs of the weight only."""
    outputs, inputs = flat(0, 4, 1, 3).labels[0], flat(4, 6, 2, 3).labels[0]
    weight = Carried((outputs._replace(axis=Axis("w", 1)), inputs._replace(axis=Axis("w", 2))))
    labels = meet(collector(), [(weight, (1, 4, 6)), (flat(0, 6, 2, 3), (5, 1, 6))], 3, "mul")
    assert [x.axis for x in labels] == [Axis("w", 1), Axis("w", 2)]


def test_labels_are_told_by_their_free_dimension() -> None:
    a, b = flat(0, 6, 1, 3).labels[0], flat(6, 6, 2, 3).labels[0]
    both = Carried((a, b))
    assert free_at(both, 1) == [a] and free_at(both, 0) == []
    assert except_free_at(both, [1]) == [b] and except_free_at(both, []) == [a, b]


def test_ids_at_channels_unite_what_changes_elsewhere() -> None:
    r = collector()
    ids = at_channels(r, Label(np.arange(C).reshape(1, 4, 3), 1))
    assert ids.tolist() == [0, 3, 6, 9]
    find = units(r)
    assert [len({find(k) for k in range(3 * n, 3 * n + 3)}) for n in range(4)] == [1] * 4 and len({*map(find, range(C))}) == 4
