"""Movements of data: ids go where the numbers go; what cannot be followed is pinned."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.operators import C, assert_moved, assert_pinned, codes, collected, pinned, units
from torch import Tensor

SWAP = torch.tensor([1, 0])
MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(2, C, 24),
    "flatten": lambda x: x.flatten(1),
    "unflatten": lambda x: x.unflatten(1, (3, 4)),
    "shuffle": lambda x: x.view(2, 3, 4, 4, 6).transpose(1, 2).reshape(2, C, 4, 6),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "permute negative": lambda x: x.permute(0, -2, -1, 1),
    "transpose": lambda x: x.transpose(1, -1),
    "movedim": lambda x: x.movedim(1, 3),
    "t": lambda x: x[0, :, 0].t(),
    "unsqueeze": lambda x: x.unsqueeze(1).unsqueeze(-1),
    "squeeze": lambda x: x[:, :, :1].squeeze(2),
    "expand": lambda x: x.unsqueeze(0).expand(3, -1, -1, -1, -1),
    "slice": lambda x: x[:, 2:7],
    "slice from the end": lambda x: x[:, -5:-1],
    "slice with a step": lambda x: x[:, 1::3],
    "every second": lambda x: x[:, ::2],
    "slice of space": lambda x: x[:, :, ::2, 1:],
    "select a row": lambda x: x[:, :, 2],
    "narrow": lambda x: x.narrow(1, 3, 4),
    "last chunk": lambda x: x.chunk(3, 1)[2],
    "uneven chunk": lambda x: x.chunk(5, 1)[3],
    "split": lambda x: x.split([5, 4, 3], 1)[1],
    "unbound rows": lambda x: x.unbind(2)[1],
    "cat": lambda x: torch.cat([x[:, 4:], x, x[:, :2]], 1),
    "cat in space": lambda x: torch.cat([x, x], 3),
    "cat in the batch": lambda x: torch.cat([x, x, x]),
    "stack": lambda x: torch.stack([x, x], 2),
    "stack in front": lambda x: torch.stack([x, x]),
    "flip": lambda x: x.flip(1, 3),
    "roll": lambda x: x.roll(5, 1),
    "roll of space": lambda x: x.roll((1, 2), (2, 3)),
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "repeat with a new dimension": lambda x: x.repeat(2, 1, 3, 1, 1),
    "repeat interleaved": lambda x: x.repeat_interleave(2, 1),
    "tile": lambda x: x.tile(1, 2, 1, 1),
    "unshuffled pixels": lambda x: F.pixel_unshuffle(x, 2),
    "shuffled pixels": lambda x: F.pixel_shuffle(x, 2),
    "cropped channels": lambda x: F.pad(x, (0, 0, 0, 0, -2, -3)),
    "indexed rows": lambda x: x[:, :, torch.tensor([1, 0, 3])],
    "indexed rows and columns": lambda x: x[:, :, SWAP, SWAP + 2],
    "selected rows": lambda x: x.index_select(2, torch.tensor([1, 1])),
    "windows": lambda x: x.view(2, C, 2, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(12, C, 2, 2),
    "tokens": lambda x: x.flatten(2).transpose(1, 2),
    "heads": lambda x: x.flatten(2).transpose(1, 2).reshape(2, 24, 3, 4).transpose(1, 2),
    "blocks": lambda x: F.unfold(x, 2, dilation=(3, 2)),
    "blocks of one image": lambda x: F.unfold(x[0], (2, 3), stride=2),
    "blocks of the batch": lambda x: F.unfold(x.transpose(0, 1), 3),
    "blocks folded": lambda x: F.fold(x.flatten(2)[..., :6], (4, 6), 2, stride=2),
    "blocks folded of one image": lambda x: F.fold(x[0].flatten(1)[:, :8], (2, 8), (1, 2), stride=(1, 2)),
    "unfolded and folded": lambda x: F.fold(F.unfold(x, 2, stride=2), (4, 6), 2, stride=2),
    "windows over rows": lambda x: x.unfold(2, 2, 1).unfold(3, 3, 2),
    "windows over what changes": lambda x: x.transpose(1, 2).reshape(2, 4, 3, 4, 6).unfold(2, 2, 1),
    "parts of complex numbers": lambda x: torch.view_as_real(torch.view_as_complex(x.view(2, C, 4, 3, 2).contiguous())),
    "channels in the batch": lambda x: x.reshape(2 * C, 1, 4, 6),
}



@pytest.mark.parametrize("name", MOVED)
def test_ids_move_as_the_numbers_do(name: str) -> None:
    assert_moved(MOVED[name])


@given(st.data())
def test_any_chain_of_movements(data: st.DataObject) -> None:
    """Views, permutations, slices, concatenations in any order, drawn for the shape at hand."""
    steps: list[tuple[str, Any]] = []

    def function(x: Tensor) -> Tensor:
        for kind, a in steps:
            if kind == "view":
                x = x.reshape(a)
            elif kind == "permute":
                x = x.permute(a)
            elif kind == "slice":
                x = x[(slice(None),) * a[0] + (slice(*a[1:]),)]
            elif kind == "cat":
                x = torch.cat([x, x.flip(a)], a)
            elif kind == "flip":
                x = x.flip(a)
            elif kind == "unsqueeze":
                x = x.unsqueeze(a)
        return x

    shape = (2, data.draw(st.sampled_from([4, 6, 8, 12])), data.draw(st.integers(1, 3)), 2)
    for _ in range(data.draw(st.integers(1, 4))):
        now = tuple(function(torch.zeros(shape)).shape)
        kind = data.draw(st.sampled_from(["view", "view", "permute", "slice", "cat", "flip", "unsqueeze"]))
        dim = data.draw(st.integers(0, len(now) - 1))
        if kind == "view":
            left = prod(now)
            new: list[int] = []
            while left > 1 and len(new) < 4:
                new.append(data.draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0])))
                left //= new[-1]
            steps.append((kind, (*new, left)))
        elif kind == "permute":
            steps.append((kind, data.draw(st.permutations(range(len(now))))))
        elif kind == "slice":
            start = data.draw(st.integers(0, now[dim] - 1))
            step = data.draw(st.integers(1, 2))
            steps.append((kind, (dim, start, data.draw(st.integers(start + 1, now[dim])), step)))
        elif prod(now) < 500:
            steps.append((kind, dim))
    assert_moved(function, shape)


PINNED: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "every second": ("index", lambda x: x[:, ::2]),
    "index": ("index", lambda x: x[:, torch.tensor([1, 2, 3])]),
    "index_select": ("index", lambda x: x.index_select(1, torch.tensor([1, 2]))),
    "one channel": ("index", lambda x: x[:, 3]),
    "unbound": ("index", lambda x: x.unbind(1)),
    "written by index": ("index", lambda x: x.index_put((SWAP, SWAP), torch.zeros((), device="meta"))),
    "concatenated in space": ("operand", lambda x: torch.cat([x, torch.zeros(2, C, 4, 1, device="meta")], 3)),
    "stacked": ("operand", lambda x: torch.stack([x, torch.zeros(2, C, 4, 6, device="meta")])),
    "scattered": ("position", lambda x: x[SWAP, :, SWAP]),
    "blocks of channels": ("operator", lambda x: F.unfold(x.transpose(1, 2), 3)),
    "blocks that are channels": ("operator", lambda x: F.fold(x.flatten(2).transpose(1, 2), (4, 5), 2)),
    "windows over channels": ("operator", lambda x: x.unfold(1, 3, 3)),
    "beside the diagonal": ("operator", lambda x: torch.diag_embed(x.mean((2, 3)), 1)),
    "gates of a recurrent layer": ("operator", lambda x: x.unsafe_chunk(4, 1)),
    "rolled flat": ("operator", lambda x: x.roll(1)),
    "shuffled pixels of rows": ("position", lambda x: F.pixel_shuffle(x.transpose(1, 2), 2)),
}


@pytest.mark.parametrize("name", PINNED)
def test_a_movement_that_cannot_be_followed_pins(name: str) -> None:
    assert_pinned(PINNED[name][1], PINNED[name][0])


@pytest.mark.parametrize(("function", "sets"), [
    (lambda x: x.chunk(3, 1), [range(4), range(4, 8), range(8, 12)]),
    (lambda x: x.view(2, 3, 4, 4, 6), [range(4), range(4, 8), range(8, 12)]),
])
def test_equal_parts_keep_equally_many(function: Callable[[Tensor], Any], sets: list[range]) -> None:
    collector, _ = collected(function)
    assert [sorted(r) for r in collector.ties[0].tolist()] == [list(s) for s in sets]


@pytest.mark.parametrize(("function", "pairs"), [
    (lambda x: F.pixel_shuffle(x, 2), [(4 * k, 4 * k + j) for k in range(3) for j in range(1, 4)]),
    (lambda x: x.view(2, 6, 2, 4, 6).amax(1), [(k, k + 2) for k in range(10)]),
    (lambda x: torch.ops.aten.channel_shuffle(x, 3), [(k, k + 4) for k in range(8)]),
])
def test_channels_that_change_places_are_united(function: Callable[[Tensor], Any], pairs: list[tuple[int, int]]) -> None:
    find = units(collected(function)[0])
    assert all(find(a) == find(b) for a, b in pairs)
    assert len({find(k) for k in range(C)}) == C - len(pairs)


def test_zero_padding_adds_channels_that_stay() -> None:
    collector, out = collected(lambda x: F.pad(x, (0, 0, 0, 0, 2, 3)))
    ids = collector.of(out).labels[0].ids.reshape(-1)
    assert ids[2:-3].tolist() == list(range(C)) and pinned(collector) == {*ids[:2].tolist(), *ids[-3:].tolist()}
    assert {reason.code for _, reason in collector.pins} == {"padding"}


def test_padded_space_leaves_channels_alone() -> None:
    collector, out = collected(lambda x: F.pad(x, (1, 2, 3, 4), value=1.0))
    assert collector.of(out).labels[0].ids.reshape(-1).tolist() == list(range(C)) and not collector.pins


def test_a_uniform_tensor_is_no_longer_uniform_once_single_entries_are_set() -> None:
    """As a mask of ones in which the forward sets three channels to another number."""
    def masked(x: Tensor) -> Tensor:
        mask = torch.ones(1, C, 1, 1, device="meta")
        mask[:, torch.arange(2, 5)] = 3.0
        return x * mask

    assert_pinned(masked, "operand")
    assert not collected(lambda x: x * torch.ones(1, C, 1, 1, device="meta"))[0].pins


@pytest.mark.parametrize(("dims", "shape"), [((-2, -1), (2, C, C)), ((2, 0), (C, 2, C)), ((0, 1), (C, C, 2))])
def test_a_diagonal_matrix_has_its_channels_along_both_dimensions(dims: tuple[int, int], shape: tuple[int, ...]) -> None:
    collector, out = collected(lambda x: torch.diag_embed(x.mean((2, 3)), 0, *dims))
    labels = collector.of(out).labels
    assert out.shape == shape and sorted(x.free for x in labels) == sorted(d % 3 for d in dims) and not collector.pins
    assert all(x.ids.reshape(-1).tolist() == list(range(C)) and x.ids.shape[x.free] == C for x in labels)


def test_a_diagonal_matrix_of_rows_has_the_channels_of_the_rows() -> None:
    collector, out = collected(lambda x: torch.diag_embed(x.mean(2), 0, 0, 2))
    (label,) = collector.of(out).labels
    assert tuple(out.shape) == (6, 2, 6, C) and label.free == 3 and label.ids.reshape(-1).tolist() == list(range(C))


def test_the_two_parts_of_a_complex_parameter_stay() -> None:
    """One laid as (2, channels) too: the last dimension has no channels."""
    collector, out = collected(lambda x: torch.view_as_complex(x.view(2, 6, 2, 24).transpose(2, 3).contiguous()))
    assert codes(collector) == {"position"} and not collector.of(out).labels
