"""Groups from constraints that are written by hand."""

from __future__ import annotations

import numpy as np
import torch
from support import networks, reference
from support.networks import Head, unit
from torch import Tensor, nn

import narrower
from narrower.graph.types import PinReason, Role
from narrower.surgery.attributes import Place
from narrower.tracing.constraints import ConstraintCollector
from narrower.tracing.dense import DenseRun
from narrower.tracing.grouping import GroupDraft, Solution, index_of, name_groups, partition, pin_reasons, slices_of, solve
from narrower.tracing.labels import Axes, Axis, PaddingAxis

OUTPUT = PinReason("output", "network output", "model")
PADDING = PinReason("padding", "zero-padded channels", "model")


class Constraints:
    """Axes of weights, and what a collector would have said of them."""

    def __init__(self) -> None:
        self.axes = Axes()
        self.collector = ConstraintCollector(nn.Identity(), self.axes, {})
        self.shapes: dict[str, tuple[int, ...]] = {}

    def axis(self, tensor: str, dim: int, size: int, role: Role | None = None, blocks: int = 1) -> np.ndarray:
        ids = self.axes.ids(Axis(tensor, dim), size, blocks)
        if role:
            self.collector.roles.add((Axis(tensor, dim), role))
        return ids

    def convolution(self, name: str, made: int, read: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the channels that it reads and makes."""
        self.shapes[f"{name}.weight"] = (made, read, 1, 1)
        out = self.axis(f"{name}.weight", 0, made, "out")
        return self.axis(f"{name}.weight", 1, read, "in"), out

    @property
    def run(self) -> DenseRun:
        return DenseRun({}, {"eval": self.collector}, self.axes, self.shapes, frozenset(self.shapes))

    def solved(self, pins: dict[str, PinReason] | None = None, sizes: dict[Place, np.ndarray] | None = None) -> Solution:
        return solve(self.run, pins or {}, sizes or {})


def two_convolutions(width: int = 4) -> tuple[Constraints, np.ndarray, np.ndarray]:
    """a makes what b reads; b makes the output. The ids that a makes and that b makes."""
    c = Constraints()
    _, made = c.convolution("a", width, 3)
    read, out = c.convolution("b", 5, width)
    c.collector.unite(made, read)
    c.collector.pins.append((out, OUTPUT))
    return c, made, out


def test_united_channels_of_two_convolutions_are_one_group() -> None:
    c, made, out = two_convolutions()
    graph, channels = c.solved()
    assert [(g.name, g.size, g.pinned, g.layers) for g in graph] == [("a", 4, None, ("a",)), ("b", 5, OUTPUT, ("b",))]
    assert [(s.tensor, s.dim, s.role, s.channels.tolist(), s.positions.tolist()) for s in graph["a"].slices] == [
        ("a.weight", 0, "out", [0, 1, 2, 3], [0, 1, 2, 3]), ("b.weight", 1, "in", [0, 1, 2, 3], [0, 1, 2, 3])]
    assert not any(s.tensor == "a.weight" and s.dim == 1 for g in graph for s in g.slices), "no layer makes what a reads"
    assert channels.group_of[channels.unit_of[made]].tolist() == [0] * 4
    assert channels.channel_of[channels.unit_of[out]].tolist() == [0, 1, 2, 3, 4]


def test_a_weight_that_makes_channels_and_reads_them_has_both_roles() -> None:
    """As in a tied autoencoder: a transposed convolution reads what its weight makes in a convolution."""
    c, _, _ = two_convolutions()
    for mode in ("eval", "train"):
        c.axis("a.weight", 0, 4, "in" if mode == "train" else "out")
    graph, _ = c.solved()
    first, second = graph["a"].slices
    assert (first.role, first.makes, first.reads) == ("both", True, True)
    assert (second.role, second.makes, second.reads) == ("in", False, True) and graph["a"].layers == ("a",)


def test_units_are_numbered_in_the_order_of_execution() -> None:
    c = Constraints()
    _, a = c.convolution("a", 3, 2)
    b, _ = c.convolution("b", 2, 3)
    c.collector.unite(a[::-1], b)
    unit_of = c.run.unit_of
    assert unit_of[a].tolist() == [0, 1, 2] and unit_of[b].tolist() == [2, 1, 0]


def test_a_pinned_channel_makes_a_group_of_its_own() -> None:
    c, made, _ = two_convolutions()
    reason = PinReason("index", "one channel taken by its number", "here")
    c.collector.pins += [(made[2:3], reason), (made[2:3], PADDING)]
    graph, channels = c.solved()
    assert [(g.name, g.size, g.pinned) for g in graph] == [("a", 3, None), ("a#2", 1, reason), ("b", 5, OUTPUT)]
    assert channels.group_of[channels.unit_of[made]].tolist() == [0, 0, 1, 0]


def test_pins_by_name_complete_the_reasons() -> None:
    c, _, _ = two_convolutions()
    found = PinReason("differs", "other channels meet when narrow")
    graph = c.solved({"a": found, "b": found}).graph
    assert graph["a"].pinned == found and graph["b"].pinned == OUTPUT, "what the dense forward says comes first"


def test_channels_that_are_all_united_can_only_go_together() -> None:
    c, made, _ = two_convolutions(3)
    c.collector.unite(made[:1], made)
    (group,) = (g for g in c.solved().graph if g.name == "a")
    assert group.size == 1 and group.pinned == PinReason("together", "the 3 channels of a can only go together")


def test_ties_that_differ_are_kept_once() -> None:
    c = Constraints()
    _, a = c.convolution("a", 4, 3)
    _, b = c.convolution("b", 4, 3)
    c.collector.ties += [np.stack([a, b]), np.stack([b, a]), np.stack([a, a])]
    (tie,) = c.solved().graph.ties
    assert [{name: channels.tolist() for name, channels in block.items()} for block in tie.blocks] == [
        {"a": [0, 1, 2, 3]}, {"b": [0, 1, 2, 3]}]


def test_a_layer_that_mixes_channels_makes_their_group_inexact() -> None:
    c, made, _ = two_convolutions()
    c.collector.mixers.append(("native_layer_norm", 7, 1, made))
    graph = c.solved().graph
    assert not graph["a"].exact and graph["a"].free and graph["b"].exact
    (mixer,) = graph.mixers
    assert (mixer.operator, mixer.number, mixer.dim, mixer.size) == ("native_layer_norm", 7, 1, 4)
    assert [(m.group, m.positions.tolist()) for m in mixer.members] == [("a", [0, 1, 2, 3])]


def test_channels_that_meet_a_padding_are_pinned() -> None:
    """The shortcut pads 3 channels to 5 with zeros, which are added to what b makes."""
    c = Constraints()
    _, a = c.convolution("a", 3, 3)
    _, b = c.convolution("b", 5, 3)
    zeros = c.axes.ids(PaddingAxis("constant_pad_nd", 0, 1), 2)
    c.collector.pins.append((zeros, PADDING))
    c.collector.unite(np.concatenate([a, zeros]), b)
    graph = c.solved().graph
    assert [(g.name, g.size, g.pinned, g.layers) for g in graph] == [("a", 3, None, ("a", "b")), ("b", 2, PADDING, ("b",))]
    assert all(s.tensor in c.shapes for g in graph for s in g.slices), "a padding is no tensor"


def test_a_parameter_may_be_called_constant() -> None:
    c, made, _ = two_convolutions()
    c.shapes["constant"] = (4,)
    c.collector.unite(made, c.axis("constant", 0, 4))
    assert ("constant", 0, "along") in {(s.tensor, s.dim, s.role) for s in c.solved().graph["a"].slices}


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.rand(6) + 0.5)
        self.stem, self.head = unit(3, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x) * self.constant.view(-1, 1, 1))


def test_a_parameter_called_constant_narrows_with_its_channels() -> None:
    model = Constant()
    graph = narrower.trace(model, networks.IMAGES)
    assert graph["stem.0"].free
    reference.exact(model, narrower.plan(graph, narrower.random(graph), remove=0.5), networks.IMAGES)


def test_stored_sizes_become_edits() -> None:
    c, made, _ = two_convolutions()
    (edit,) = c.solved(sizes={Place("block", "sizes", 1): made[:3]}).graph.edits
    assert (edit.module, edit.attribute, edit.entry, edit.size) == ("block", "sizes", 1, 3)
    assert [(m.group, m.channels.tolist()) for m in edit.members] == [("a", [0, 1, 2])]


# ------------------------------------------------------------------------------------------------ the steps


def test_the_first_reason_of_a_unit_counts() -> None:
    c, made, out = two_convolutions()
    c.collector.pins += [(made[:2], PADDING), (made[1:3], OUTPUT)]
    numbers, reasons = pin_reasons(c.run)
    unit_of = c.run.unit_of
    assert reasons == [OUTPUT, PADDING]
    assert numbers[unit_of[made]].tolist() == [1, 1, 0, -1] and (numbers[unit_of[out]] == 0).all()


def test_partition_separates_axes_and_reasons() -> None:
    c, made, out = two_convolutions()
    run = c.run
    makers = {axis: run.units_of(axis) for axis in (Axis("a.weight", 0), Axis("b.weight", 0))}
    numbers = np.full(run.unit_count, -1)
    numbers[run.unit_of[made[0]]] = 0
    drafts = partition(run, makers, numbers, [PADDING])
    assert [(d.units.tolist(), d.reason, d.layers) for d in drafts] == [
        (run.unit_of[made[:1]].tolist(), PADDING, ["a"]), (run.unit_of[made[1:]].tolist(), None, ["a"]),
        (run.unit_of[out].tolist(), None, ["b"])]


def test_groups_of_one_layer_are_numbered() -> None:
    drafts = [GroupDraft(np.array([0, 1]), None, ["a"]), GroupDraft(np.array([2, 3]), None, ["a", "b"]),
              GroupDraft(np.array([4]), None, ["b"])]
    name_groups(drafts, {Axis("b.weight", 0): np.array([2, 3, 4])}, {"a#2": PADDING})
    assert [(d.name, d.reason) for d in drafts] == [
        ("a", None), ("a#2", PADDING), ("b", PinReason("together", "one channel of b by itself"))]


def test_positions_count_through_the_blocks_of_a_grouped_convolution() -> None:
    c = Constraints()
    _, a = c.convolution("a", 4, 3)
    read = c.axis("grouped.weight", 1, 2, "in", blocks=2)
    c.collector.unite(a[[2, 3, 0, 1]], read)
    run = c.run
    index = index_of([GroupDraft(run.unit_of[a], None, name="a")], run.unit_of)
    first, second = slices_of(run, dict(c.collector.roles), index)["a"]
    assert (first.tensor, first.blocks, second.tensor, second.blocks) == ("a.weight", 1, "grouped.weight", 2)
    assert second.channels.tolist() == [2, 3, 0, 1] and second.positions.tolist() == [0, 1, 2, 3]


def test_maps_split_an_array_by_groups() -> None:
    index = index_of([GroupDraft(np.array([0, 2]), None, name="a"), GroupDraft(np.array([3]), None, name="b")], np.arange(5))
    assert [(m.group, m.channels.tolist(), m.positions.tolist()) for m in index.maps(np.array([3, 2, 1, 0]))] == [
        ("a", [1, 0], [1, 3]), ("b", [0], [0])]
    assert index.maps(np.array([1, 4])) == [] and index.maps(np.array([], dtype=np.int64)) == []
