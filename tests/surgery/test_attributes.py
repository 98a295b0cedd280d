"""Numbers that modules store: read, written, taken back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

from narrower.graph.selection import Kept
from narrower.graph.types import ChannelGroup, ChannelMap, Edit, Graph
from narrower.surgery.attributes import Place, attribute_values, entries, set_attributes
from narrower.surgery.resize import undo


def test_entries_are_whole_numbers_alone_or_in_a_sequence() -> None:
    assert entries(3) == {None: 3} and entries((2, 5)) == {0: 2, 1: 5}
    assert entries(True) == entries("3") == entries([]) == entries([1, 2.0]) == entries(SimpleNamespace()) == {}


def test_values_count_the_channels_that_stay() -> None:
    """The number counts channel 0 twice and one position that belongs to nobody."""
    edit = Edit("m", "sizes", 1, 5, (ChannelMap("g", np.array([0, 0, 1, 2]), np.array([0, 1, 2, 4])),))
    graph = Graph((ChannelGroup("g", 3, (), ("g",)),), {}, frozenset(), {}, edits=(edit,))
    assert attribute_values(Kept(graph, {"g": np.array([1])})) == {Place("m", "sizes", 1): 2}
    assert attribute_values(Kept(graph, {"g": np.array([0, 2])})) == {Place("m", "sizes", 1): 4}


def test_set_attributes_keep_their_type_and_can_be_undone() -> None:
    model: Any = nn.Sequential(nn.Identity())
    model[0].sizes, model[0].width = (4, 6), 8
    changes = set_attributes(model, {Place("0", "sizes", 0): 3, Place("0", "sizes", 1): 5, Place("0", "width"): 7})
    assert (model[0].sizes, model[0].width) == ((3, 5), 7)
    undo(changes)
    assert (model[0].sizes, model[0].width) == ((4, 6), 8)


@pytest.mark.parametrize("value", [-1, 9])
def test_values_that_are_no_smaller_count_are_refused(value: int) -> None:
    model: Any = nn.Sequential(nn.Identity())
    model[0].width = 8
    with pytest.raises(TypeError, match="cannot be"):
        set_attributes(model, {Place("0", "width"): value})
