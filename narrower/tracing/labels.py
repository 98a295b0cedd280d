"""Channel ids of a tensor, and how data movement acts on them.

A `Label` is an integer array with the tensor's number of dimensions. It gives the channel id at every position. It has size 1
in dimensions along which the id is constant. One dimension is *free*: it shrinks when channels are removed. If ids vary along
other dimensions too, as in (heads, channels of a head), each fibre along the free dimension must keep equally many channels.
A tensor has no label (an input), one (an activation) or several (a weight: one per channel dimension).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np

Ids = np.ndarray


class Axis(NamedTuple):
    """One dimension of a parameter or buffer."""

    tensor: str
    dim: int


class PaddingAxis(NamedTuple):
    """Channels that a call adds. `number`: of the call among those of its operator. `part`: which of its added blocks."""

    operator: str
    number: int
    part: int


class Label(NamedTuple):
    """Channel ids of one tensor. `axis`: the parameter dimension, as long as the tensor is the unchanged parameter."""

    ids: Ids
    free: int
    axis: Axis | None = None


class Carried(NamedTuple):
    """All that is known of one tensor during a trace.

    `uniform`: its values are the same everywhere, or random. `view`: it shares memory with another tensor. `pool`: the number
    of the pooling that it comes from, or -1. `even`: dimensions along which its values are equal because it was expanded.
    `weight`: it is a parameter or buffer, or computed from these alone. `lost`: of such, why channels could not be followed.
    `chosen`: the channels of which its values are the numbers, as those of the second output of `max`.
    """

    labels: tuple[Label, ...] = ()
    uniform: bool = False
    view: bool = False
    pool: int = -1
    even: tuple[int, ...] = ()
    weight: bool = False
    lost: str = ""
    chosen: tuple[Label, ...] = ()


NOTHING = Carried()


class Axes:
    """Assigns channel ids to the dimensions of parameters and buffers at first use, in order of execution."""

    def __init__(self) -> None:
        self.start: dict[Axis | PaddingAxis, int] = {}
        self.size: dict[Axis | PaddingAxis, int] = {}
        self.blocks: dict[Axis | PaddingAxis, int] = {}
        self.total = self.activations = 0

    def number(self) -> int:
        """A new number for an activation."""
        self.activations += 1
        return self.activations

    def ids(self, key: Axis | PaddingAxis, size: int, blocks: int = 1) -> Ids:
        if key not in self.start:
            self.start[key], self.size[key], self.blocks[key] = self.total, size * blocks, blocks
            self.total += size * blocks
        return np.arange(self.start[key], self.start[key] + self.size[key])


def along(ids: Ids, ndim: int, dim: int) -> Ids:
    """A flat array of ids, reshaped to lie along `dim` of a tensor with `ndim` dimensions."""
    shape = [1] * ndim
    shape[dim] = -1
    return ids.reshape(shape)


def expanded(ids: Ids, dim: int, size: int) -> Ids:
    """`ids` broadcast to the tensor's real size in `dim`."""
    return ids if ids.shape[dim] == size else np.broadcast_to(ids, [*ids.shape[:dim], size, *ids.shape[dim + 1:]])


def permuted(label: Label, order: Sequence[int]) -> Label:
    return Label(label.ids.transpose(order), list(order).index(label.free), label.axis)


def aligned(label: Label, ndim: int) -> Label:
    """The label with leading dimensions of size 1 added up to `ndim`, as in broadcasting."""
    missing = ndim - label.ids.ndim
    return Label(label.ids.reshape((1,) * missing + label.ids.shape), label.free + missing, label.axis)


@lru_cache(maxsize=4096)
def matching_blocks(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """The smallest runs old[i0:i1], new[j0:j1] with equal products, in order. A view acts on each run independently."""
    out: list[tuple[int, int, int, int]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0, a, b = i, j, 1, 1
        if i < len(old):
            a, i = old[i], i + 1
        if j < len(new):
            b, j = new[j], j + 1
        while a != b:
            if a < b and i < len(old):
                a, i = a * old[i], i + 1
            elif a > b and j < len(new):
                b, j = b * new[j], j + 1
            else:
                raise ValueError(f"no view from {old} to {new}")
        out.append((i0, i, j0, j))
    return out


@lru_cache(maxsize=4096)
def varying_dims(old: tuple[int, ...], varies: tuple[bool, ...], new: tuple[int, ...]) -> tuple[bool, ...]:
    """For each dimension of the view `new` of `old`: whether values vary along it that vary along the `varies` dimensions of
    `old`."""
    if sum(varies) == 0:
        return (False,) * len(new)
    small = [n if v else 1 for n, v in zip(old, varies, strict=True)]
    index = np.broadcast_to(np.arange(prod(small)).reshape(small), old).reshape(new)
    return tuple(n > 1 and bool((np.diff(index, axis=d) != 0).any()) for d, n in enumerate(new))


def reshaped(label: Label, old: tuple[int, ...], new: tuple[int, ...]) -> tuple[Label, tuple[int, ...]]:
    """The label of a view from shape `old` to `new`, and the dimensions over which the free one is spread.

    If there are several, the view splits the channels. The label's `free` is then the last of them, and the caller decides.
    """
    ids, free = label.ids, label.free
    shape = [1] * len(new)
    spread: tuple[int, ...] = ()
    index = [slice(None)] * len(new)
    full = list(ids.shape)
    for i0, i1, j0, j1 in matching_blocks(old, new):
        varies = tuple(ids.shape[d] > 1 for d in range(i0, i1))
        if any(varies):
            o, n = old[i0:i1], new[j0:j1]
            full[i0:i1], shape[j0:j1] = o, n
            index[j0:j1] = [slice(None) if v else slice(0, 1) for v in varying_dims(o, varies, n)]
            if i0 <= free < i1:
                only_free = tuple(d == free for d in range(i0, i1))
                spread = tuple(j0 + d for d, v in enumerate(varying_dims(o, only_free, n)) if v)
    ids = np.broadcast_to(ids, full).reshape(shape)[tuple(index)]
    return Label(ids, spread[-1] if spread else -1, label.axis), spread


def faster_dims(label: Label, old: tuple[int, ...], new: tuple[int, ...]) -> list[int]:
    """Dimensions after the free one along which ids vary too, and which a view merges with it."""
    if sum(n > 1 for n in label.ids.shape) < 2:
        return []
    for i0, i1, j0, j1 in matching_blocks(old, new):
        if i0 <= label.free < i1 and tuple(old[i0:i1]) != tuple(new[j0:j1]):
            return [d for d in range(label.free + 1, i1) if label.ids.shape[d] > 1]
    return []


def even_dims(even: Sequence[int], old: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...]:
    """Of a view from shape `old` to `new` the dimensions along which values are equal, if those of `old` are `even`."""
    out: list[int] = []
    for i0, i1, j0, j1 in matching_blocks(old, new) if even else ():
        varies = varying_dims(old[i0:i1], tuple(d not in even for d in range(i0, i1)), new[j0:j1])
        out += [j for j, v in zip(range(j0, j1), varies, strict=True) if not v and new[j] > 1]
    return tuple(out)


def joined(parts: Sequence[Ids], dim: int, sizes: Sequence[int]) -> Ids:
    """Ids of a concatenation along `dim`. `sizes`: the real sizes of the parts there."""
    full = [expanded(p, dim, n) for p, n in zip(parts, sizes, strict=True)]
    shape = [max(p.shape[d] for p in full) for d in range(full[0].ndim)]
    return np.concatenate([np.broadcast_to(p, [*shape[:dim], p.shape[dim], *shape[dim + 1:]]) for p in full], axis=dim)


def fibres(label: Label) -> Ids:
    """The ids along the free dimension, one row for each index of the other dimensions. Shape (fibres, size)."""
    moved = np.moveaxis(label.ids, label.free, -1)
    return moved.reshape(-1, moved.shape[-1])


def collapsed(label: Label, dims: Sequence[int], unite: Callable[[Ids, Ids], None]) -> Label:
    """Unite the ids along `dims`, because the operator mixes these positions, and drop these dimensions to size 1."""
    ids = label.ids
    for d in dims:
        if ids.shape[d] > 1:
            rows = np.moveaxis(ids, d, 0)
            unite(rows[:-1], rows[1:])  # neighbours are enough, and most rows of a grouped weight are equal
            ids = ids.take([0], axis=d)
    return Label(ids, label.free, label.axis)
