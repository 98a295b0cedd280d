"""Slicing tensors and fitting modules to them: plain arithmetic, and back again."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import networks, reference
from support.networks import IMAGES, PATTERNS, Plain
from torch import nn

import narrower
from narrower.graph.selection import Kept
from narrower.graph.types import ChannelGroup, Graph, Slice
from narrower.surgery.copying import duplicate
from narrower.surgery.resize import fit, mirrored_attributes, slice_tensor, undo
from narrower.surgery.walk import named_tensors


def rows(*of: list[int]) -> np.ndarray:
    return np.array(of)


def test_sliced_takes_positions_along_each_dimension() -> None:
    t = torch.arange(24.0).view(4, 6)
    assert torch.equal(slice_tensor(t, {0: rows([1, 3]), 1: rows([0, 5])}), t[[1, 3]][:, [0, 5]])
    assert torch.equal(slice_tensor(t, {}), t)


def test_sliced_in_blocks_reads_other_positions_in_each() -> None:
    """A grouped convolution: its first half reads channels 0 and 2 of its own, the second half 1 and 2."""
    t = torch.arange(24.0).view(8, 3)
    cut = {0: rows([0, 3, 4, 7]), 1: rows([0, 2], [1, 2])}
    want = torch.cat([t[[0, 3]][:, [0, 2]], t[[4, 7]][:, [1, 2]]])
    for order in (cut, dict(reversed(cut.items()))):
        assert torch.equal(slice_tensor(t, order), want), "blocks are those of the dense rows"


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.data())
def test_sliced_is_numpy_indexing(a: int, b: int, c: int, data: st.DataObject) -> None:
    t = torch.arange(a * b * c).view(a, b, c)
    keep = [sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1))) for n in (a, b, c)]
    found = slice_tensor(t, {d: rows(k) for d, k in enumerate(keep)})
    assert np.array_equal(found.numpy(), t.numpy()[np.ix_(*keep)])
    assert found.dtype == t.dtype


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


LAYERS: dict[str, tuple[nn.Module, dict[str, tuple[int, ...]], dict[str, object]]] = {
    "conv": (nn.Conv2d(6, 8, 3), {"weight": (5, 4, 3, 3), "bias": (5,)}, {"in_channels": 4, "out_channels": 5}),
    "grouped": (nn.Conv2d(6, 8, 3, groups=2), {"weight": (4, 2, 3, 3), "bias": (4,)},
                {"in_channels": 4, "out_channels": 4, "groups": 2}),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), {"weight": (4, 1, 3, 3), "bias": (4,)},
                  {"in_channels": 4, "out_channels": 4, "groups": 4}),
    "depthwise twice": (nn.Conv2d(6, 12, 3, groups=6), {"weight": (8, 1, 3, 3), "bias": (8,)},
                        {"in_channels": 4, "out_channels": 8, "groups": 4}),
    "transposed": (nn.ConvTranspose2d(6, 8, 3), {"weight": (4, 5, 3, 3), "bias": (5,)}, {"in_channels": 4, "out_channels": 5}),
    "transposed grouped": (nn.ConvTranspose2d(6, 8, 3, groups=2), {"weight": (4, 3, 3, 3), "bias": (6,)},
                           {"in_channels": 4, "out_channels": 6, "groups": 2}),
    "transposed depthwise": (nn.ConvTranspose2d(6, 6, 3, groups=6), {"weight": (4, 1, 3, 3), "bias": (4,)},
                             {"in_channels": 4, "out_channels": 4, "groups": 4}),
    "linear": (nn.Linear(6, 8), {"weight": (5, 4), "bias": (5,)}, {"in_features": 4, "out_features": 5}),
    "batch norm": (nn.BatchNorm2d(6), dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (4,)),
                   {"num_features": 4}),
    "plain batch norm": (nn.BatchNorm2d(6, affine=False), dict.fromkeys(("running_mean", "running_var"), (4,)),
                         {"num_features": 4}),
    "instance norm": (nn.InstanceNorm2d(6, affine=True), dict.fromkeys(("weight", "bias"), (4,)), {"num_features": 4}),
    "group norm": (nn.GroupNorm(2, 6), dict.fromkeys(("weight", "bias"), (4,)), {"num_channels": 4, "num_groups": 2}),
    "layer norm": (nn.LayerNorm(6), dict.fromkeys(("weight", "bias"), (4,)), {"normalized_shape": (4,)}),
    "prelu": (nn.PReLU(6), {"weight": (4,)}, {"num_parameters": 4}),
    "embedding": (nn.Embedding(9, 6), {"weight": (9, 4)}, {"num_embeddings": 9, "embedding_dim": 4}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_fit_updates_what_mirrors_the_shapes_and_can_be_undone(name: str) -> None:
    layer, shapes, attributes = LAYERS[name]
    model = nn.Sequential(copy.deepcopy(layer))
    before = {k: v for k, v in model[0].__dict__.items() if not k.startswith("_")}
    tensors = named_tensors(model)
    new = {f"0.{n}": nn.Parameter(torch.zeros(s)) if isinstance(tensors[f"0.{n}"], nn.Parameter) else torch.zeros(s)
           for n, s in shapes.items()}
    changes = fit(model, new)
    assert {k: getattr(model[0], k) for k in attributes} == attributes
    assert all(t is new[n] for n, t in named_tensors(model).items() if n in new)
    reference.mirrors(model)
    undo(changes)
    assert {k: v for k, v in model[0].__dict__.items() if not k.startswith("_")} == before
    assert all(t is tensors[n] for n, t in named_tensors(model).items())


def test_fit_names_what_the_model_does_not_have() -> None:
    with pytest.raises(narrower.StorageError, match="conv9"):
        fit(Plain(), {"conv9.weight": torch.zeros(1)})
    with pytest.raises(narrower.StorageError, match=r"conv1\.gain"):
        fit(Plain(), {"conv1.gain": torch.zeros(1)})


def test_layers_without_a_mirror_are_left() -> None:
    assert mirrored_attributes(nn.ReLU(), {}) == {}
    assert mirrored_attributes(nn.BatchNorm2d(3, affine=False, track_running_stats=False), {}) == {}


def test_named_tensors_have_every_name_of_a_tied_one() -> None:
    model = networks.Shared()
    found = named_tensors(model)
    assert found["left.weight"] is found["right.weight"] and "bn1.running_mean" in found
    assert set(found) == set(model.state_dict())


@pytest.mark.parametrize("name", PATTERNS)
def test_a_duplicate_has_the_given_tensors_and_everything_else_of_its_own(name: str) -> None:
    case = PATTERNS[name]
    model = case.make().eval()
    given: dict[int, torch.Tensor] = {}
    for t in named_tensors(model).values():
        new = t.detach().clone()
        given.setdefault(id(t), nn.Parameter(new) if isinstance(t, nn.Parameter) else new)
    dup = duplicate(model, given)
    assert all(named_tensors(dup)[n] is given[id(t)] for n, t in named_tensors(model).items())
    assert not {id(m) for m in model.modules()} & {id(m) for m in dup.modules()}
    a, b = (reference.flat(reference.call(m, case.inputs)) for m in (model, dup))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_duplicate_keeps_what_refers_to_its_own_parts() -> None:
    class Cyclic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.parts = [self.conv, {"again": self.conv}]
            self.config = {"width": 4}
            self.me = (self,)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.parts[0] is self.conv and self.me[0] is self
            return self.conv(x)

    model = Cyclic()
    dup = duplicate(model, {})
    assert dup.parts[0] is dup.conv is dup.parts[1]["again"] is not model.conv  # type: ignore[index]
    assert dup.me[0] is dup and dup.config is not model.config  # type: ignore[index]
    dup(IMAGES)


def test_slicing_twice_is_slicing_once() -> None:
    t = torch.randn(9, 7)
    a, b = np.array([0, 2, 3, 7, 8]), np.array([1, 2, 4])
    once = slice_tensor(t, {0: rows(a[b].tolist())})
    assert torch.equal(slice_tensor(slice_tensor(t, {0: rows(a.tolist())}), {0: rows(b.tolist())}), once)
