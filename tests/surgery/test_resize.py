"""Slicing tensors and fitting modules to them: plain arithmetic, and back again."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import reference
from support.networks import Plain
from torch import nn

import narrower
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


def test_slicing_twice_is_slicing_once() -> None:
    t = torch.randn(9, 7)
    a, b = np.array([0, 2, 3, 7, 8]), np.array([1, 2, 4])
    once = slice_tensor(t, {0: rows(a[b].tolist())})
    assert torch.equal(slice_tensor(slice_tensor(t, {0: rows(a.tolist())}), {0: rows(b.tolist())}), once)
