"""Equal counts: numbers of channels that can go together."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.networks import IMAGES, PATTERNS, chain, unit

import narrower
from narrower.graph.equal_counts import Cell, Component, components, nearest_integers, split_components
from narrower.graph.types import ChannelGroup, Graph, PinReason, Tie


def graph_with(sizes: dict[str, int], ties: list[Tie], pinned: tuple[str, ...] = ()) -> Graph:
    reason = PinReason("differs", "for a reason")
    groups = tuple(ChannelGroup(n, s, (), (n,), reason if n in pinned else None) for n, s in sizes.items())
    return Graph(groups, {}, frozenset(), {}, tuple(ties))


def blocks(*of: dict[str, list[int]]) -> Tie:
    return Tie(tuple({n: np.array(c) for n, c in block.items()} for block in of))


def brute(equations: np.ndarray, want: np.ndarray, most: np.ndarray, least: np.ndarray) -> float:
    """The smallest distance to `want` of all numbers that keep the equations."""
    every = product(*(range(int(a), int(b) + 1) for a, b in zip(least, most, strict=True)))
    found = [np.abs(np.array(x) - want).sum() for x in every if not len(equations) or not (equations @ np.array(x)).any()]
    return min(found, default=np.inf)


@given(st.integers(2, 4), st.integers(1, 3), st.data())
def test_nearest_integers_are_the_nearest(n: int, m: int, data: st.DataObject) -> None:
    equations = np.array([[data.draw(st.integers(-2, 2)) for _ in range(n)] for _ in range(m)], dtype=float)
    most = np.array([data.draw(st.integers(1, 4)) for _ in range(n)])
    want = np.array([data.draw(st.integers(0, int(k))) for k in most])
    found = nearest_integers(equations, want, most)
    assert not (equations @ found).any() and (found >= 0).all() and (found <= most).all()
    assert np.abs(found - want).sum() == brute(equations, want, most, np.zeros(n))


def test_cells_are_channels_that_stand_in_the_same_blocks() -> None:
    graph = graph_with({"a": 6, "b": 4}, [blocks({"a": [0, 1, 2]}, {"a": [3, 4], "b": [0]})])
    parts = components(graph)
    cells = sorted((c.group, c.channels.tolist()) for p in parts for c in p.cells)
    assert cells == [("a", [0, 1, 2]), ("a", [3, 4]), ("a", [5]), ("b", [0]), ("b", [1, 2, 3])]
    tied = next(p for p in parts if len(p.cells) == 3)
    assert {c.group for c in tied.cells} == {"a", "b"}
    lost = tied.removable(np.array([2 if len(c.channels) == 3 else 1 for c in tied.cells]), tied.sizes)
    counts = {tuple(c.channels.tolist()): int(k) for c, k in zip(tied.cells, lost, strict=True)}
    assert counts == {(0, 1, 2): 2, (3, 4): 1, (0,): 1}


def test_groups_without_ties_are_one_cell_each() -> None:
    parts = components(graph_with({"a": 3, "b": 5, "c": 2}, [], pinned=("c",)))
    assert [[(c.group, len(c.channels)) for c in p.cells] for p in parts] == [[("a", 3)], [("b", 5)]]
    assert [m.tolist() for m in parts[0].moves()] == [[1]]


def test_a_tie_with_what_is_pinned_or_left_out_holds_still() -> None:
    tie = blocks({"a": [0, 1, 2]}, {"b": [0, 1, 2]})
    for parts in (components(graph_with({"a": 3, "b": 3}, [tie], pinned=("b",))),
                  components(graph_with({"a": 3, "b": 3}, [tie]), ["a"])):
        (part,) = parts
        assert part.removable(np.array([2]), np.array([2])).tolist() == [0] and not part.moves()


def test_repeated_channels_count_as_often_as_they_stand() -> None:
    """One block holds each channel of a twice, the other those of b once: two of b go with one of a."""
    (part,) = components(graph_with({"a": 4, "b": 8}, [blocks({"a": [0, 1, 2, 3, 0, 1, 2, 3]}, {"b": list(range(8))})]))
    order = [c.group for c in part.cells]
    assert {tuple(sorted(zip(order, m.tolist(), strict=True))) for m in part.moves()} == {(("a", 1), ("b", 2))}


def test_connected_splits_what_is_independent() -> None:
    cells = [Cell(n, np.arange(2)) for n in "abcde"]
    parts = split_components(cells, [{0: 1.0, 2: -1.0}, {1: 1.0, 4: -1.0}])
    assert [[c.group for c in p.cells] for p in parts] == [["a", "c"], ["b", "e"], ["d"]]
    assert [p.equations.shape for p in parts[:2]] == [(1, 2), (1, 2)] and not len(parts[2].equations)
    assert isinstance(parts[0], Component)


@pytest.mark.parametrize("name", ["grouped", "shuffle", "transposed", "chunked", "selective"])
def test_moves_and_removals_keep_every_tie(name: str) -> None:
    case = PATTERNS[name]
    graph = narrower.trace(case.make(), case.inputs)
    rng = np.random.default_rng(0)
    for part in components(graph):
        for move in part.moves():
            assert move.any() and (move >= 0).all() and (move <= part.sizes).all()
            assert not len(part.equations) or not (part.equations @ move).any()
        for _ in range(5):
            most = part.sizes - 1
            want = rng.integers(0, part.sizes)
            lost = part.removable(want, most)
            assert (lost >= 0).all() and (lost <= most).all()
            assert not len(part.equations) or not (part.equations @ lost).any()
    every = {(c.group, int(k)) for p in components(graph) for c in p.cells for k in c.channels}
    assert every == {(g.name, k) for g in graph.free for k in range(g.size)}, "each channel is in one cell"


def test_conv_groups_of_different_numbers_meet() -> None:
    """12 channels made in 3 groups and read in 2: every sixth of them loses as many."""
    graph = narrower.trace(chain(unit(3, 6), unit(6, 12, groups=3), unit(12, 4, groups=2)), IMAGES)
    part = next(p for p in components(graph) if p.cells[0].group == "1.0")
    assert sorted(len(c.channels) for c in part.cells) == [2, 2, 4, 4]
    plan = narrower.plan(graph, narrower.random(graph), remove={"1.0": 0.5})
    kept = plan.keep["1.0"]
    for width in (4, 6):
        assert len(set(np.bincount(kept // width, minlength=12 // width).tolist())) == 1
    assert 0 < len(kept) < 12
