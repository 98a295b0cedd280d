"""Channel ids move with the tensor: a label, written out, is what the same movement makes of the ids themselves."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrower.tracing.labels import (
    Label,
    aligned,
    along,
    collapsed,
    even_dims,
    expanded,
    faster_dims,
    fibres,
    joined,
    matching_blocks,
    permuted,
    reshaped,
    varying_dims,
)


def regrouped(shape: tuple[int, ...], draw: st.DataObject) -> tuple[int, ...]:
    """Another shape with as many elements."""
    left = prod(shape)
    out: list[int] = []
    while left > 1 and len(out) < 5:
        n = draw.draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0]))
        out.append(n)
        left //= n
    return (*out, left) if left > 1 or not out else tuple(out)


shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


@st.composite
def labels(draw: st.DrawFn) -> tuple[Label, tuple[int, ...]]:
    """A label, and the shape of its tensor: ids change along the free dimension and maybe along others."""
    shape = draw(shapes)
    free = draw(st.integers(0, len(shape) - 1))
    varies = [d == free or draw(st.integers(0, 3)) == 0 for d in range(len(shape))]
    small = [n if v else 1 for n, v in zip(shape, varies, strict=True)]
    return Label(np.arange(prod(small)).reshape(small), free), shape


@given(shapes, st.data())
def test_matching_blocks_split_a_view_into_independent_ones(old: tuple[int, ...], data: st.DataObject) -> None:
    new = regrouped(old, data)
    blocks = matching_blocks(old, new)
    assert [b[0] for b in blocks] == [0, *(b[1] for b in blocks[:-1])] and blocks[-1][1] == len(old)
    assert [b[2] for b in blocks] == [0, *(b[3] for b in blocks[:-1])] and blocks[-1][3] == len(new)
    assert all(prod(old[a:b]) == prod(new[c:d]) for a, b, c, d in blocks)


def test_matching_blocks_of_what_is_no_view() -> None:
    with pytest.raises(ValueError, match="no view"):
        matching_blocks((2, 3), (4, 2))


@given(labels(), st.data())
def test_a_view_moves_the_ids(given_: tuple[Label, tuple[int, ...]], data: st.DataObject) -> None:
    label, old = given_
    new = regrouped(old, data)
    moved, spread = reshaped(label, old, new)
    want = np.broadcast_to(label.ids, old).reshape(new)
    assert moved.ids.ndim == len(new)
    assert np.array_equal(np.broadcast_to(moved.ids, new), want)
    only_free = Label(along(np.arange(old[label.free]), len(old), label.free), label.free)
    index = np.broadcast_to(only_free.ids, old).reshape(new)
    assert list(spread) == [d for d in range(len(new)) if (np.diff(index, axis=d) != 0).any()]
    assert moved.free == (spread[-1] if spread else -1)
    assert all(moved.ids.shape[d] > 1 for d in spread), "a dimension over which the channels spread changes the ids"


@given(shapes, st.data())
def test_varying_dims(old: tuple[int, ...], data: st.DataObject) -> None:
    varies = tuple(data.draw(st.booleans()) for _ in old)
    new = regrouped(old, data)
    found = varying_dims(old, varies, new)
    small = [n if v else 1 for n, v in zip(old, varies, strict=True)]
    full = np.broadcast_to(np.arange(prod(small)).reshape(small), old).reshape(new)
    for d, v in enumerate(found):
        assert v == bool((full != full.take([0], axis=d)).any())


@given(shapes, st.data())
def test_dimensions_along_which_a_view_is_even(old: tuple[int, ...], data: st.DataObject) -> None:
    """They are those along which the numbers of an expanded tensor do not change."""
    even = [d for d in range(len(old)) if data.draw(st.booleans())]
    small = [1 if d in even else n for d, n in enumerate(old)]
    new = regrouped(old, data)
    x = np.broadcast_to(np.arange(prod(small)).reshape(small), old).reshape(new)
    assert even_dims(even, old, new) == tuple(d for d, n in enumerate(new) if n > 1 and not np.diff(x, axis=d).any() and even)


@given(labels(), st.data())
def test_a_permutation_moves_the_ids(given_: tuple[Label, tuple[int, ...]], data: st.DataObject) -> None:
    label, shape = given_
    order = data.draw(st.permutations(range(len(shape))))
    moved = permuted(label, order)
    want = np.broadcast_to(label.ids, shape).transpose(order)
    assert np.array_equal(np.broadcast_to(moved.ids, want.shape), want) and order[moved.free] == label.free


@given(labels(), st.integers(0, 2))
def test_aligned_is_broadcasting(given_: tuple[Label, tuple[int, ...]], more: int) -> None:
    label, shape = given_
    moved = aligned(label, len(shape) + more)
    assert np.array_equal(np.broadcast_to(moved.ids, (2,) * more + shape)[(0,) * more], np.broadcast_to(label.ids, shape))
    assert moved.free == label.free + more


@given(shapes, st.integers(1, 3), st.data())
def test_joined_is_concatenation(shape: tuple[int, ...], parts: int, data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    ids, full, sizes = [], [], []
    for k in range(parts):
        mine = [*shape[:dim], data.draw(st.integers(1, 3)), *shape[dim + 1:]]
        small = [n if data.draw(st.booleans()) else 1 for n in mine]
        ids.append(100 * k + np.arange(prod(small)).reshape(small))
        full.append(np.broadcast_to(ids[-1], mine))
        sizes.append(mine[dim])
    want = np.concatenate(full, axis=dim)
    assert np.array_equal(np.broadcast_to(joined(ids, dim, sizes), want.shape), want)


def test_expanded_takes_no_memory() -> None:
    ids = expanded(np.array([[3]]), 1, 1000)
    assert ids.shape == (1, 1000) and ids.strides[1] == 0 and (ids == 3).all()


@given(labels())
def test_fibres_run_along_the_free_dimension(given_: tuple[Label, tuple[int, ...]]) -> None:
    label, _ = given_
    rows = fibres(label)
    assert rows.shape[1] == label.ids.shape[label.free]
    assert np.array_equal(np.sort(rows.reshape(-1)), np.sort(label.ids.reshape(-1)))
    step = np.diff(np.arange(label.ids.size).reshape(label.ids.shape).take([0, -1], axis=label.free), axis=label.free)
    assert rows.shape[1] < 2 or (rows[:, -1] - rows[:, 0] == step.reshape(-1)[0]).all()


@given(labels(), st.data())
def test_collapsing_unites_what_lies_along_the_dimensions(given_: tuple[Label, tuple[int, ...]], data: st.DataObject) -> None:
    label, _ = given_
    dims = data.draw(st.lists(st.integers(0, label.ids.ndim - 1), unique=True))
    parent = list(range(label.ids.size))

    def find(k: int) -> int:
        while parent[k] != k:
            k = parent[k]
        return k

    def unite(a: np.ndarray, b: np.ndarray) -> None:
        for x, y in zip(*(v.reshape(-1).tolist() for v in np.broadcast_arrays(a, b)), strict=True):
            parent[find(x)] = find(y)

    out = collapsed(label, dims, unite)
    assert all(out.ids.shape[d] == (1 if d in dims else n) for d, n in enumerate(label.ids.shape))
    kept = np.broadcast_to(out.ids, label.ids.shape)
    for a, b in zip(label.ids.reshape(-1).tolist(), kept.reshape(-1).tolist(), strict=True):
        assert find(a) == find(b)
    assert len({find(k) for k in range(label.ids.size)}) == out.ids.size, "no more than that is united"


def test_faster_dims_are_those_merged_behind_the_channels() -> None:
    both = Label(np.arange(6).reshape(1, 3, 2, 1), 1)
    assert faster_dims(both, (4, 3, 2, 5), (4, 6, 5)) == [2]
    assert faster_dims(both, (4, 3, 2, 5), (4, 3, 10)) == []
    assert faster_dims(both._replace(free=2), (4, 3, 2, 5), (4, 6, 5)) == []
    assert faster_dims(Label(np.arange(3).reshape(1, 3, 1, 1), 1), (4, 3, 2, 5), (4, 6, 5)) == []


def test_a_shuffle_by_hand() -> None:
    """(2, 12) -> (2, 3, 4) -> (2, 4, 3) -> (2, 12), as torch moves the numbers themselves."""
    label = Label(along(np.arange(12), 2, 1), 1)
    moved, spread = reshaped(label, (2, 12), (2, 3, 4))
    assert spread == (1, 2) and moved.free == 2
    back, _ = reshaped(permuted(moved, (0, 2, 1)), (2, 4, 3), (2, 12))
    want = torch.arange(12).view(3, 4).t().reshape(12)
    assert back.ids.reshape(-1).tolist() == want.tolist()
