"""The data types of a graph: what they compute from their fields, and how they print."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrower.errors import PlanError
from narrower.graph.types import ChannelGroup, Graph, PinReason, Slice, table


def whole(group: str, size: int, tensor: str, dim: int, role: str = "out", first: int = 0) -> Slice:
    """A slice in which the channels of a group lie side by side."""
    channels = np.arange(size)
    return Slice(group, channels, channels + first, tensor, dim, role)  # type: ignore[arg-type]


PINNED = PinReason("output", "network output", "fc, net.py:3")


def graph() -> Graph:
    """Two free groups that a concatenation lays side by side in `c.weight`, and a pinned one."""
    a = ChannelGroup("a", 4, (whole("a", 4, "a.weight", 0), whole("a", 4, "c.weight", 1, "in")), ("a", "a2"))
    b = ChannelGroup("b", 6, (whole("b", 6, "b.weight", 0), whole("b", 6, "c.weight", 1, "in", 4)), ("b",), exact=False)
    c = ChannelGroup("c", 3, (whole("c", 3, "c.weight", 0),), ("c",), PINNED)
    shapes = {"a.weight": (4, 3, 1, 1), "b.weight": (6, 3, 1, 1), "c.weight": (3, 10, 1, 1)}
    return Graph((a, b, c), shapes, frozenset(shapes), dict.fromkeys(shapes, 1.0), notes=("train mode uses other layers",))


def test_a_group_is_free_unless_it_is_pinned() -> None:
    assert [g.name for g in graph().free] == ["a", "b"]
    assert all(g.free == (g.pinned is None) for g in graph())


def test_groups_are_found_by_name_and_iterated_in_order() -> None:
    found = graph()
    assert [g.name for g in found] == ["a", "b", "c"] and len(found) == 3
    assert all(found[g.name] is g for g in found)
    with pytest.raises(PlanError):
        found["d"]


def test_the_slices_of_an_axis_are_those_of_all_groups_and_no_other() -> None:
    found = graph()
    assert [s.group for s in found.by_axis["c.weight", 1]] == ["a", "b"]
    assert {(s.tensor, s.dim) for g in found for s in g.slices} == found.by_axis.keys()
    for (tensor, dim), slices in found.by_axis.items():
        assert all((s.tensor, s.dim) == (tensor, dim) for s in slices)
        positions = np.concatenate([s.positions for s in slices])
        assert sorted(positions.tolist()) == list(range(found.shapes[tensor][dim]))
    assert sum(map(len, found.by_axis.values())) == sum(len(g.slices) for g in found)


def test_a_reason_prints_its_text_and_where_it_was_found() -> None:
    assert str(PINNED) == "network output (fc, net.py:3)"
    assert str(PinReason("together", "one channel only")) == "one channel only"
    assert PinReason("output", "network output", "fc, net.py:3") == PINNED, "reasons compare by value"


def test_a_graph_prints_every_group_its_kind_and_the_channels_that_are_free() -> None:
    lines = str(graph()).splitlines()
    rows = {line.split()[0]: line for line in lines[2:5]}
    assert rows["a"].endswith("free") and rows["b"].endswith("free, inexact")
    assert rows["c"].endswith("pinned: network output (fc, net.py:3)")
    assert rows["a"].split()[1:3] == ["4", "2"], "channels and layers"
    assert lines[5] == "10 of 13 channels free in 2 of 3 groups"
    assert lines[6:] == ["note: train mode uses other layers"]


def test_a_graph_and_a_group_are_short_in_a_debugger() -> None:
    found = graph()
    assert repr(found) == "<Graph: 10 of 13 channels free in 2 of 3 groups>"
    assert repr(found["b"]) == "<ChannelGroup b: 6 channels, free, inexact>"


def test_notebooks_show_a_graph_as_a_table() -> None:
    odd = ChannelGroup("<a & b>", 4, (), (), PINNED)
    html = Graph((odd,), {}, frozenset(), {}, notes=("1 < 2",))._repr_html_()
    assert html.startswith("<table><tr><th>group</th>") and html.count("<tr>") == 2
    assert "<td>&lt;a &amp; b&gt;</td><td>4</td>" in html and "0 of 4 channels free in 0 of 1 groups<br>note: 1 &lt; 2" in html


CELLS = st.text("ab1.", min_size=1, max_size=6)


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.tuples(*[CELLS] * n), min_size=1, max_size=5)))
def test_columns_are_aligned_and_nothing_is_lost(rows: list[tuple[str, ...]]) -> None:
    header, rule, *rest = table(rows).splitlines()
    assert [line.split() for line in (header, *rest)] == [list(row) for row in rows]
    ends = np.cumsum([len(dashes) + 2 for dashes in rule.split("  ")]) - 2
    for line, row in zip((header, *rest), rows, strict=True):
        for k, (end, cell) in enumerate(zip(ends, row, strict=True)):
            start = 0 if k == 0 else ends[k - 1] + 2
            left = k in (0, len(row) - 1)
            assert line[start:end].rstrip() == cell if left else line[:end].endswith(cell), (line, cell)
