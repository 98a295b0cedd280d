"""What a layer reads and makes at sampled output positions, as matrices: pure functions over tensors.

A convolution is a linear map from a patch of its input to one position of its output. A linear layer is a convolution
without spatial dimensions. Letters: `N` rows (images, or images times positions for a linear layer), `C` input channels,
`O` output channels, `G` groups, `K` kernel positions, `P` samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """How a layer reads its input, with one entry for each spatial dimension (none for a linear layer)."""

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    transposed: bool = False
    groups: int = 1


class Positions(NamedTuple):
    """Sampled positions of an output: `row` `(P,)`, and a coordinate `(P,)` for each spatial dimension. `image` `(P,)` is the
    image that a row belongs to."""

    row: Tensor
    space: tuple[Tensor, ...]
    image: Tensor


def sample_positions(out: Tensor, images: int, per_image: int, generator: torch.Generator) -> Positions:
    """`per_image` random positions of each image in an output `(rows, channels, *space)`, or all of them if there are no more.

    The number of rows is a multiple of `images`. The generator is one of the CPU: the positions are the same on
    every device, for the same chunks of images.
    """
    sizes = (len(out) // images, *out.shape[2:])
    count = prod(sizes)
    if per_image >= count:
        flat, per_image = torch.arange(count).repeat(images), count
    else:
        flat = torch.randint(count, (images * per_image,), generator=generator)
    image = torch.arange(images).repeat_interleave(per_image)
    coordinates: list[Tensor] = []
    for size in reversed(sizes):
        coordinates.insert(0, flat % size)
        flat = flat // size
    row, *places = (t.to(out.device) for t in (image * sizes[0] + coordinates[0], *coordinates[1:]))
    return Positions(row, tuple(places), image.to(out.device))


def joined(parts: Sequence[Positions], images: Sequence[int], rows: Sequence[int]) -> Positions:
    """Positions of several batches as positions of one, in which the batches stand behind each other."""
    first_row = [sum(rows[:k]) for k in range(len(parts))]
    first_image = [sum(images[:k]) for k in range(len(parts))]
    return Positions(
        torch.cat([p.row + n for p, n in zip(parts, first_row, strict=True)]),
        tuple(torch.cat(axis) for axis in zip(*(p.space for p in parts), strict=True)),
        torch.cat([p.image + n for p, n in zip(parts, first_image, strict=True)]),
    )


def values_at(t: Tensor, at: Positions) -> Tensor:
    """The channels of a tensor `(N, channels, *space)` at the positions. Shape `(P, channels)`."""
    return t.movedim(1, -1)[(at.row, *at.space)]


def patches_at(x: Tensor, geometry: Geometry, at: Positions) -> Tensor:
    """What a layer reads of `x` `(N, C, *space)` for each output position, zero outside of `x`.

    Shape `(G, P, C / G * K)`, in the order of `as_matrix`.
    """
    last = x.movedim(1, -1)
    columns = [column(last, geometry, at, offsets) for offsets in product(*map(range, geometry.kernel))]
    return torch.stack(columns, dim=-1).reshape(len(at.row), geometry.groups, -1).transpose(0, 1)


def column(last: Tensor, geometry: Geometry, at: Positions, offsets: Sequence[int]) -> Tensor:
    """The input `(N, *space, C)` under one kernel position. Shape `(P, C)`."""
    inside: Tensor | None = None
    where = []
    for d, offset in enumerate(offsets):
        size, stride, padding = last.shape[d + 1], geometry.stride[d], geometry.padding[d]
        if geometry.transposed:
            shifted = at.space[d] + padding - offset * geometry.dilation[d]
            place, valid = torch.div(shifted, stride, rounding_mode="floor"), shifted % stride == 0
        else:
            place = at.space[d] * stride - padding + offset * geometry.dilation[d]
            valid = torch.ones_like(place, dtype=torch.bool)
        valid &= (place >= 0) & (place < size)
        if padding or geometry.transposed:
            inside = valid if inside is None else inside & valid
        where.append(place.clamp(0, size - 1))
    found = last[(at.row, *where)]
    return found if inside is None else found * inside[:, None]


def widened(t: Tensor) -> Tensor:
    """A tensor of half precision in single precision, where sums of products neither overflow nor stop growing."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def as_matrix(weight: Tensor, geometry: Geometry) -> Tensor:
    """A layer's weight as matrices that map patches to outputs. Shape `(G, O / G, C / G * K)`."""
    if geometry.transposed:  # (C, O / G, *kernel)
        blocks = weight.reshape(geometry.groups, -1, weight.shape[1], prod(geometry.kernel))
        return blocks.transpose(1, 2).flatten(2)
    return weight.reshape(geometry.groups, weight.shape[0] // geometry.groups, -1)


def as_weight(matrix: Tensor, like: Tensor, geometry: Geometry) -> Tensor:
    """The inverse of `as_matrix`, in the shape of `like`."""
    if geometry.transposed:
        blocks = matrix.reshape(geometry.groups, like.shape[1], -1, prod(geometry.kernel))
        return blocks.transpose(1, 2).reshape(like.shape)
    return matrix.reshape(like.shape)
