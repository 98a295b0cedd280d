"""Kept: what stays of channels, axes and tensors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import narrower
from narrower.graph.selection import Kept
from narrower.graph.types import ChannelGroup, Graph, Slice


def graph_of(*slices: Slice, size: int, shapes: dict[str, tuple[int, ...]]) -> Graph:
    return Graph((ChannelGroup("g", size, slices, ("g",)),), shapes, frozenset(shapes), {})


def test_selections_are_what_is_left() -> None:
    channels = np.arange(3)
    out = Slice("g", channels, np.array([0, 2, 4]), "conv.weight", 0, "out")  # positions 1, 3 belong to nobody
    twice = Slice("g", np.array([0, 1, 2, 0, 1, 2]), np.arange(6), "next.weight", 1, "in")
    graph = graph_of(out, twice, size=3, shapes={"conv.weight": (5, 1), "next.weight": (2, 6)})
    cuts = Kept(graph, {"g": np.array([0, 2])}).cuts
    assert {t: {d: p.tolist() for d, p in cut.items()} for t, cut in cuts.items()} == {
        "conv.weight": {0: [[0, 1, 3, 4]]}, "next.weight": {1: [[0, 2, 3, 5]]}}
    assert Kept(graph, {"g": channels}).cuts == {}


def test_selections_of_blocks() -> None:
    reader = Slice("g", np.arange(6), np.arange(6), "w", 1, "in", blocks=2)
    graph = graph_of(reader, size=6, shapes={"w": (4, 3)})
    assert Kept(graph, {"g": np.array([0, 2, 4, 5])}).positions("w", 1).tolist() == [[0, 2], [1, 2]]


def test_selections_that_would_tear_blocks_apart_are_refused() -> None:
    """Three channels of one block and one of the other: never a silent mixture."""
    reader = Slice("g", np.arange(6), np.arange(6), "w", 1, "in", blocks=2)
    graph = graph_of(reader, size=6, shapes={"w": (4, 3)})
    with pytest.raises((narrower.NarrowerError, ValueError, AssertionError)):
        Kept(graph, {"g": np.array([0, 1, 2, 4])}).positions("w", 1)


@given(st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=1, max_size=3), st.data())
def test_kept_is_a_literal_loop_over_channels(axes: list[list[int]], data: st.DataObject) -> None:
    """Position n of axis k belongs to channel `axes[k][n]`, channel 4 standing for nobody; one position of each is free."""
    keep = sorted(data.draw(st.sets(st.integers(0, 3), min_size=1)))
    slices, want = [], {}
    for k, owners in enumerate(axes):
        at = [n for n, c in enumerate(owners) if c < 4]
        channels, positions = np.array([owners[n] for n in at], dtype=np.int64), np.array(at, dtype=np.int64)
        slices.append(Slice("g", channels, positions, f"t{k}", 0, "in"))
        want[f"t{k}"] = [n for n in range(len(owners) + 1) if n == len(owners) or owners[n] == 4 or owners[n] in keep]
    graph = graph_of(*slices, size=4, shapes={f"t{k}": (len(owners) + 1,) for k, owners in enumerate(axes)})
    kept = Kept(graph, {"g": np.array(keep)})
    assert [c for c in range(4) if kept.mask("g")[c]] == keep
    assert {t: kept.positions(t, 0)[0].tolist() for t in want} == want
    assert kept.cuts.keys() == (want.keys() if len(keep) < 4 else set())
    gone = np.setdiff1d(np.arange(4), keep)
    assert Kept.without(graph, [("g", gone[:1]), ("g", gone[1:])]).keep["g"].tolist() == keep


def test_groups_that_are_not_named_stay_whole() -> None:
    graph = graph_of(Slice("g", np.arange(3), np.arange(3), "w", 0, "out"), size=3, shapes={"w": (3, 1)})
    kept = Kept(graph, {})
    assert kept.mask("g").all() and kept.cuts == {} and kept.positions("w", 0).tolist() == [[0, 1, 2]]
