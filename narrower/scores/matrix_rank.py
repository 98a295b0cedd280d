"""The rank of many small matrices at once: the same integers as `torch.linalg.matrix_rank`, without an SVD.

The rank of A is the number of singular values above tau. This is the number of positive eigenvalues of A A^T - tau^2 I. By
Sylvester's law of inertia it is the number of positive pivots of its LDL^T elimination. In float64 the rounding error of A A^T
is about a hundred times below tau^2. Elimination without row exchanges runs on a whole batch at once, with the batch as the
fastest dimension. Maps with a pivot so close to zero that rounding could decide go to the SVD.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..inputs import has_float64
from . import matrix_rank_numba

_EPS = torch.finfo(torch.float32).eps

_PANEL = 16  # pivots eliminated at a time, before one matrix product updates the rest

_GUARD = 0.9  # in units of tau^2: a dependent row gives a pivot <= -tau^2, so smaller absolute values are near tau

_SMALL = 128  # up to this many rows the compiled version is faster

_FAINT = 1e-70  # below this norm of A A^T its square underflows

# After a block of this size was allocated and freed once, glibc keeps freed blocks up to this size for the next chunk. It would
# return them to the system otherwise, and page faults can double the time. No effect with other allocators.
_KEPT = 24 * 2**20  # bytes; glibc adapts up to 32 MB


def rank(maps: Tensor) -> Tensor:
    """Rank of each map, as `torch.linalg.matrix_rank` counts it on float32 maps.

    A singular value counts if it exceeds max(H, W) * eps * sigma_max, where eps is float32's. Maps of any floating dtype are
    read as float32. If a singular value equals the tolerance up to float32 rounding, the two functions may differ
    (`benchmarks/rank.py` counts how often).

    Args:
        maps: shape (..., H, W), any floating dtype, any device.

    Returns:
        int64 of shape (...), on the device of `maps`.

    Raises:
        ValueError: `maps` is not floating, has fewer than two dimensions, or holds NaN or infinity (as float32).
    """
    if maps.dim() < 2 or not maps.is_floating_point():
        raise ValueError(f"rank takes floating maps of shape (..., H, W), not {maps.dtype} of {tuple(maps.shape)}")
    *batch, height, width = maps.shape
    flat = maps.detach().reshape(math.prod(batch), height, width)
    if not has_float64(flat.device):
        flat = flat.cpu()
    if height > width:
        flat = flat.mT
    if flat.numel() == 0:
        return torch.zeros(batch, dtype=torch.int64, device=maps.device)
    on_cpu = flat.device.type == "cpu"
    fast = on_cpu and matrix_rank_numba.count is not None and min(height, width) <= _SMALL
    workers = torch.get_num_threads() if on_cpu else 1
    cached = (2**19 if on_cpu else 2**24) // (height * width)
    chunks = flat.split(max(64, min(cached, -(-len(flat) // workers))))
    if on_cpu and not fast:
        torch.empty(_KEPT, dtype=torch.uint8)
    return torch.cat(_in_threads(_count_one_by_one if fast else _count, chunks, workers)).reshape(batch).to(maps.device)


def _in_threads(work: Callable[[Tensor], Tensor], chunks: Sequence[Tensor], workers: int) -> list[Tensor]:
    """Chunks in parallel, one thread each. torch's own threads would synchronise after each of a chunk's many short steps."""
    if min(workers, len(chunks)) < 2:
        return [work(chunk) for chunk in chunks]
    try:  # a thread's setting applies to itself and to threads that start later
        return list(_pool(workers).map(work, chunks))
    finally:
        torch.set_num_threads(workers)


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """A thread pool that is reused, because its threads keep their memory. New threads would get new pages each time."""
    return ThreadPoolExecutor(workers, "narrower-rank", initializer=torch.set_num_threads, initargs=(1,))


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _count(maps: Tensor) -> Tensor:
    """Ranks of maps (B, n, m) with n <= m."""
    single = maps.float()
    double = single.double()
    gram = _gram(double)
    norm = torch.linalg.matrix_norm(gram)
    tau2 = _largest_eigenvalue(gram, norm) * (maps.shape[-1] * _EPS) ** 2
    tau2 = torch.where(norm == 0, 1.0, tau2)  # a map of zeros: -I has no positive pivot, so no SVD is needed
    gram.diagonal(dim1=1, dim2=2).sub_(tau2[:, None])
    pivots = _pivots(gram)
    ranks = (pivots > 0).sum(0)
    clear = (pivots.abs().amin(0) > _GUARD * tau2) & ((norm == 0) | (norm > _FAINT))  # False where there is a NaN
    return _with_doubtful(single, ranks, clear)


def _count_one_by_one(maps: Tensor) -> Tensor:
    """The same with matrix_rank_numba."""
    assert matrix_rank_numba.count is not None
    single = maps.float().contiguous()
    ranks = torch.empty(len(single), dtype=torch.int64)
    clear = torch.empty(len(single), dtype=torch.bool)
    matrix_rank_numba.count(single.numpy(), (single.shape[-1] * _EPS) ** 2, _GUARD, _FAINT, ranks.numpy(), clear.numpy())
    return _with_doubtful(single, ranks, clear)


def _with_doubtful(maps: Tensor, ranks: Tensor, clear: Tensor) -> Tensor:
    """Replace the ranks that are not clear by those of the SVD."""
    doubtful = (~clear).nonzero()[:, 0]
    if len(doubtful):
        rest = maps[doubtful]
        if not rest.isfinite().all():
            raise ValueError("rank: the maps hold NaN or infinity; check the network's inputs and weights")
        ranks[doubtful] = torch.linalg.matrix_rank(rest)
    return ranks


def _gram(a: Tensor) -> Tensor:
    """A A^T of each matrix (B, n, m)."""
    if a.device.type != "cpu" or a.shape[1] < 24:
        return torch.bmm(a, a.mT)
    matrices = a.numpy()  # a loop over small products takes half the time of torch.bmm
    return torch.from_numpy(np.matmul(matrices, matrices.transpose(0, 2, 1)))


def _largest_eigenvalue(gram: Tensor, norm: Tensor) -> Tensor:
    """An upper bound, 0 to 1.5 % too high, of the largest eigenvalue of each positive semidefinite matrix (B, n, n).

    `norm` is |G|_F. Computed in float32, which is several times faster and precise enough.
    """
    unit = (gram / torch.where(norm == 0, 1.0, norm)[:, None, None]).float()
    return norm * _largest_of_unit(unit, 8).double() * (1 + 1e-5)


def _largest_of_unit(unit: Tensor, squarings: int) -> Tensor:
    """The same for matrices with |G|_F = 1 (or 0).

    |G^2|_F / |G|_F <= lambda <= |G^2|_F^(1/2). If these bounds are within a factor of 1.1, the upper one is within 1.5 %
    (0.75 % of tau). Otherwise recurse with lambda(G)^2 = lambda(G^2), which halves the error.
    """
    square = torch.bmm(unit, unit)
    size = torch.linalg.matrix_norm(square)
    largest = size.sqrt()
    loose = (largest > 1.1 * size).nonzero()[:, 0]
    if squarings > 1 and len(loose):
        scale = size[loose]
        largest[loose] = (_largest_of_unit(square[loose] / scale[:, None, None], squarings - 1) * scale).sqrt()
    return largest


def _pivots(matrix: Tensor) -> Tensor:
    """Pivots (n, B) of the LDL^T elimination, without row exchanges, of each symmetric matrix (B, n, n)."""
    pivots = []
    while True:
        size, n, _ = matrix.shape
        width = min(_PANEL, n)
        rows = matrix[:, :width].reshape(size, -1).contiguous().t().contiguous().view(width, n, size)
        for k in range(width - 1):
            row = rows[k, k + 1 :]
            factors = row[: width - k - 1] / rows[k, k]
            rows[k + 1 :, k + 1 :].addcmul_(factors[:, None], row, value=-1)
        found = rows.diagonal(dim1=0, dim2=1).t()
        pivots.append(found)
        if width == n:
            return torch.cat(pivots)
        right = rows[:, width:].contiguous().view(-1, size).t().contiguous().view(size, width, n - width)
        matrix = torch.baddbmm(matrix[:, width:, width:], right.mT, right / found.t()[:, :, None], alpha=-1)
