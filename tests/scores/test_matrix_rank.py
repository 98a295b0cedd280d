"""`rank` gives the integers of `torch.linalg.matrix_rank`, for every shape, dtype, scale and way of cutting a batch."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from narrower.scores import matrix_rank_numba
from narrower.scores.matrix_rank import _largest_eigenvalue, _pivots, rank


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test with the compiled count and without it."""
    if request.param == "torch":
        monkeypatch.setattr(matrix_rank_numba, "count", None)
    elif matrix_rank_numba.count is None:
        pytest.skip("numba is not installed")
    return str(request.param)

EPS = torch.finfo(torch.float32).eps


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def low_rank(*shape: int, inner: int, seed: int = 0) -> Tensor:
    """Products of small integers: the rank is exact in float32, at most `inner`."""
    *batch, height, width = shape
    draw = generator(seed)
    left = torch.randint(-3, 4, (*batch, height, inner), generator=draw).float()
    return left @ torch.randint(-3, 4, (*batch, inner, width), generator=draw).float()


def relu_like(number: int, side: int, seed: int = 0) -> Tensor:
    """Smooth noise behind a ReLU whose threshold rises through the batch: full maps first, empty ones at the end."""
    noise = torch.randn(number, 1, side // 2 + 2, side // 2 + 2, generator=generator(seed))
    smooth = nn.functional.interpolate(noise, size=(side, side), mode="bicubic")[:, 0]
    return (smooth - torch.linspace(-1, 3, number)[:, None, None]).relu()


def with_singular_values(values: Tensor, rows: int, columns: int, seed: int) -> Tensor:
    draw = generator(seed)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=draw, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, columns, generator=draw, dtype=torch.float64)).Q
    return (left[:, : len(values)] * values @ right[: len(values)]).float()


def assert_same(maps: Tensor) -> None:
    expected = torch.linalg.matrix_rank(maps.float())
    found = rank(maps)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(found, expected), f"{int((found != expected).sum())} of {expected.numel()} differ"


@settings(max_examples=150, deadline=None)
@given(
    batch=st.lists(st.integers(0, 5), max_size=3),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    inner=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**32),
)
def test_any_shape_and_rank(batch: list[int], height: int, width: int, inner: int, dtype: torch.dtype, seed: int) -> None:
    assert_same(low_rank(*batch, height, width, inner=inner, seed=seed).to(dtype))


@pytest.mark.parametrize("side", [1, 2, 7, 8, 14, 16, 17, 28, 32, 56])
def test_relu_maps(side: int) -> None:
    maps = relu_like(1500 if side < 50 else 200, side)
    assert len(rank(maps).unique()) > min(side, 3) // 2, "the sample should hold several ranks"
    assert_same(maps)


def test_large_maps() -> None:
    assert_same(torch.cat([relu_like(6, 112), low_rank(3, 112, 112, inner=70)]))
    assert_same(low_rank(2, 300, 40, inner=30))
    assert_same(low_rank(2, 3, 1000, inner=2))


def test_maps_of_zeros_and_duplicate_rows() -> None:
    maps = torch.randn(40, 16, 16, generator=generator(1)).relu()
    maps[::4] = 0
    maps[1::4, 9] = maps[1::4, 2]
    maps[2::4, :, 5:] = maps[2::4, :, :1]
    maps[3::4, :10] = 0
    assert_same(maps)
    assert rank(maps)[:4].tolist() == [0, 15, 5, 6]


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (16, 16), (32, 32), (12, 40), (40, 12)])
def test_singular_values_on_either_side_of_the_tolerance(rows: int, columns: int) -> None:
    n, tolerance = min(rows, columns), max(rows, columns) * EPS
    for seed in range(20):
        values = torch.ones(n, dtype=torch.float64)
        values[n // 2 :] = 1e-3
        values[-1] = tolerance * 0.7
        values[-2] = tolerance * 1.4
        maps = with_singular_values(values, rows, columns, seed)
        assert rank(maps).item() == n - 1
        assert_same(maps)


@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_singular_value_that_equals_the_tolerance(place: int) -> None:
    values = torch.ones(8)
    values[place] = 8 * EPS  # its pivot is zero: only the SVD can say
    assert_same(values.diag())
    assert_same(values.diag() + torch.ones(8, 8).tril(-1) * values[:, None])


@pytest.mark.parametrize("n", [8, 16, 32])
def test_where_rounding_decides_the_svd_is_asked(n: int) -> None:
    draw = generator(n)
    values = torch.ones(300, n, 1, dtype=torch.float64)
    values[:, n // 2, 0] = n * EPS * torch.linspace(0.95, 1.05, 300)
    rotations = torch.linalg.qr(torch.randn(300, n, n, generator=draw, dtype=torch.float64)).Q
    maps = (values * rotations).float()
    assert len(rank(maps).unique()) == 2, "the sample should lie on both sides"
    assert_same(maps)


def test_clear_cases_need_no_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Tensor) -> Tensor:
        raise AssertionError("the SVD was asked")

    monkeypatch.setattr(torch.linalg, "matrix_rank", refuse)
    assert rank(torch.zeros(3, 32, 32)).tolist() == [0] * 3
    assert rank(torch.eye(16).expand(2, 16, 16)).tolist() == [16] * 2
    assert rank(low_rank(50, 32, 32, inner=12)).tolist() == [12] * 50


def test_cancelling_rows_do_not_hide_the_largest_singular_value() -> None:
    signs = torch.tensor([[1.0], [-1.0]]).repeat(16, 1)
    assert_same(signs @ signs.T + 1e-3 * torch.randn(50, 32, 32, generator=generator(2)))
    assert_same(torch.linalg.qr(torch.randn(20, 32, 32, generator=generator(3))).Q)


def test_blocks_that_do_not_meet() -> None:
    """The largest singular value stands apart, in rows that cancel; a small one lies between its tolerance and the others'."""
    maps = torch.zeros(3, 16, 16)
    signs = torch.where(torch.arange(8) % 2 == 0, 1.0, -1.0)
    maps[0, :8, :8] = 10.0
    maps[1, :8, :8] = 10 * signs[:, None] * signs
    maps[2, :8, :8] = 10 * signs[:, None] * torch.linspace(0.5, 1.5, 8)
    maps[:, 8:12, 8:12] = 1.0  # 4, beside 80
    maps[:, 12, 12], maps[:, 13, 13] = 3e-4, 3e-5  # the tolerance is 1.5e-4, for the second block alone 7.6e-6
    assert rank(maps).tolist() == [3, 3, 3]


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-18, 1e18, 1e30, 1e37])
def test_any_scale(scale: float) -> None:
    assert_same(torch.randn(30, 8, 8, generator=generator(4)).relu() * scale)


def test_maps_of_many_scales_in_one_batch() -> None:
    assert_same(low_rank(200, 8, 8, inner=5) * torch.logspace(-30, 30, 200)[:, None, None])


@pytest.mark.parametrize("threads", [1, 3])
def test_cutting_and_ordering_the_batch_change_nothing(threads: int) -> None:
    maps = relu_like(3000, 16)
    order = torch.randperm(len(maps), generator=generator(5))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        whole = rank(maps)
        assert torch.equal(whole[order], rank(maps[order]))
        for size in (1, 63, 64, 65, 1000, 2049):
            parts = maps[:64].split(1) if size == 1 else maps.split(size)
            assert torch.equal(torch.cat([rank(part) for part in parts]), whole[: 64 if size == 1 else None])
        assert torch.equal(rank(maps.view(3, 10, 100, 16, 16)), whole.view(3, 10, 100))
        assert rank(maps[7]).shape == () and rank(maps[7]) == whole[7]
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_is_left_alone() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        rank(relu_like(5000, 8))
        with pytest.raises(ValueError, match="NaN"):
            rank(torch.full((5000, 8, 8), torch.nan))
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_read_as_float32(dtype: torch.dtype) -> None:
    maps = relu_like(500, 16).to(dtype)
    assert_same(maps)
    assert torch.equal(rank(maps), rank(maps.float()))


def test_strided_views_gradients_and_modes() -> None:
    maps = relu_like(512, 14).view(4, 128, 14, 14)
    expected = rank(maps)
    assert torch.equal(rank(maps.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(rank(maps.mT), expected)
    assert torch.equal(rank(maps[:, ::2]), expected[:, ::2])
    assert torch.equal(rank(maps.clone().requires_grad_()), expected)
    with torch.inference_mode():
        assert torch.equal(rank(maps * 2), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rank(maps), expected)


def test_the_input_is_not_written_to() -> None:
    maps = relu_like(64, 8).double()
    copy = maps.clone()
    rank(maps)
    assert torch.equal(maps, copy)


@pytest.mark.parametrize("shape", [(0, 8, 8), (3, 0, 8, 8), (2, 0, 8), (2, 8, 0), (0, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    assert torch.equal(rank(torch.zeros(shape)), torch.zeros(shape[:-2], dtype=torch.int64))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (70, 7, 7), (99, 3, 0)])
def test_nan_and_infinity_are_refused(value: float, place: tuple[int, int, int]) -> None:
    maps = relu_like(100, 8)
    maps[place] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        rank(maps)


def test_what_overflows_float32_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        rank(torch.eye(8, dtype=torch.float64) * 1e300)


@pytest.mark.parametrize(
    "maps", [torch.zeros(3), torch.zeros(2, 3, 3, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.cfloat)]
)
def test_what_is_no_map_is_refused(maps: Tensor) -> None:
    with pytest.raises(ValueError, match=r"floating maps of shape \(\.\.\., H, W\)"):
        rank(maps)


@pytest.mark.parametrize("n", [1, 2, 8, 32, 112])
def test_largest_eigenvalue_is_never_low_and_at_most_one_and_a_half_percent_high(n: int) -> None:
    draw = generator(n)
    spectra = torch.rand(60, n, generator=draw, dtype=torch.float64) ** torch.logspace(-2, 2, 60)[:, None]
    spectra[0] = 1  # all equal
    spectra[1, n // 2 + 1 :] = 0
    spectra = spectra / spectra.amax(1, keepdim=True) * torch.logspace(-9, 9, 60)[:, None]
    basis = torch.linalg.qr(torch.randn(60, n, n, generator=draw, dtype=torch.float64)).Q
    matrices = basis * spectra[:, None] @ basis.mT
    ratio = _largest_eigenvalue(matrices, torch.linalg.matrix_norm(matrices)) / spectra.amax(1)
    assert ratio.min() > 1 - 1e-9 and ratio.max() < 1.015


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 33, 50])
def test_products_of_pivots_are_the_leading_minors(n: int) -> None:
    matrices = torch.randn(20, n, n, generator=generator(n), dtype=torch.float64)
    matrices = matrices + matrices.mT + 4 * torch.eye(n, dtype=torch.float64)
    expected = torch.stack([torch.linalg.det(matrices[:, :k, :k]) for k in range(1, n + 1)])
    found = _pivots(matrices).cumprod(0)
    assert torch.allclose(found, expected, rtol=1e-6)


def test_maps_of_a_trained_network() -> None:
    shared = Path(os.environ.get("NARROWER_SHARED", Path(__file__).parents[3] / "shared"))
    checkpoint = shared / "weights" / "resnet56-cifar10-jpeg.pt"
    if not checkpoint.exists():
        pytest.skip("no trained checkpoint")
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        from rank import collect_maps, load_images
    finally:
        sys.path.pop(0)
    from narrower.models.checkpoints import load_checkpoint
    from narrower.models.resnet import cifar_resnet56

    model = load_checkpoint(cifar_resnet56(), checkpoint).eval()
    for side, maps in collect_maps(model, load_images(None, 16, seed=0)).items():
        differ = int((rank(maps) != torch.linalg.matrix_rank(maps)).sum())
        # a single map at the tolerance is a matter of rounding, also of the forward pass; benchmarks/rank.py counts over more
        assert differ <= max(1, 1e-4 * len(maps)), f"{differ} of {len(maps)} maps of {side}x{side}"
