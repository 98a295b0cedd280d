"""Patches times matrix are the layer's output, for every geometry."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from narrower.repair.patches import (
    Geometry,
    Positions,
    as_matrix,
    as_weight,
    joined,
    patches_at,
    sample_positions,
    values_at,
)

GEOMETRIES = {
    "3x3": (2, 3, 1, 1, 1, 1, False), "strided, grouped, dilated": (2, 3, 2, 1, 2, 2, False), "1x1": (2, 1, 1, 0, 1, 1, False),
    "1d": (1, 5, 2, 2, 1, 3, False), "3d": (3, 2, 1, 1, 1, 1, False), "transposed": (2, 3, 2, 1, 1, 1, True),
    "transposed, grouped": (2, 4, 2, 1, 1, 2, True), "transposed, dilated": (2, 3, 1, 2, 2, 1, True),
    "transposed 1d": (1, 3, 3, 0, 1, 3, True),
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_patches_times_matrix_are_the_output(name: str) -> None:
    n, k, s, p, d, groups, transposed = GEOMETRIES[name]
    x = torch.randn(4, 6, *(9,) * n, dtype=torch.float64)
    shape = (6, 12 // groups) if transposed else (12, 6 // groups)
    weight = torch.randn(*shape, *(k,) * n, dtype=torch.float64)
    layer = getattr(F, f"conv{'_transpose' if transposed else ''}{n}d")
    out = layer(x, weight, stride=s, padding=p, dilation=d, groups=groups)
    geometry = Geometry((k,) * n, (s,) * n, (p,) * n, (d,) * n, transposed, groups)
    at = sample_positions(out, 4, 40, generator())
    matrix = as_matrix(weight, geometry)
    found = (patches_at(x, geometry, at) @ matrix.transpose(1, 2)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found, values_at(out, at))
    assert torch.equal(as_weight(matrix, weight, geometry), weight)


def test_a_linear_layer_is_a_convolution_without_space() -> None:
    x, weight = torch.randn(12, 5), torch.randn(3, 5)
    at = sample_positions(torch.zeros(12, 1), 4, 2, generator())
    assert torch.equal(at.image, at.row // 3) and len(at.row) == 8
    torch.testing.assert_close((patches_at(x, Geometry(), at) @ as_matrix(weight, Geometry()).transpose(1, 2))[0],
                               (x @ weight.T)[at.row])


def test_all_positions_are_taken_once_where_there_are_few() -> None:
    at = sample_positions(torch.zeros(2, 1, 2, 3), 2, 100, generator())
    places = list(zip(at.row.tolist(), at.space[0].tolist(), at.space[1].tolist(), strict=True))
    assert sorted(places) == [(r, y, x) for r in range(2) for y in range(2) for x in range(3)]


def test_positions_of_batches_are_positions_of_all_of_them() -> None:
    batches = [torch.randn(n, 3, 4, 4) for n in (2, 3)]
    parts = [sample_positions(b, len(b), 5, generator()) for b in batches]
    whole = joined(parts, [2, 3], [2, 3])
    assert torch.equal(values_at(torch.cat(batches), whole),
                       torch.cat([values_at(b, p) for b, p in zip(batches, parts, strict=True)]))
    assert whole.image.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5 + [4] * 5
    assert isinstance(whole, Positions)


@pytest.mark.parametrize("transposed", [False, True])
def test_positions_are_on_the_device_of_the_output(transposed: bool) -> None:
    """Tensors without values tell on which device each operand is, also where there is no such device."""
    with FakeTensorMode():
        x, out = torch.empty(4, 6, 9, 9, device="cuda"), torch.empty(4, 5, 9, 9, device="cuda")
        at = sample_positions(out, 4, 40, generator())
        found = patches_at(x, Geometry((3, 3), (1, 1), (1, 1), (1, 1), transposed), at)
        assert {t.device.type for t in (found, values_at(out, at), at.row, at.image, *at.space)} == {"cuda"}
