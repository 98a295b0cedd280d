"""The count of `matrix_rank.rank`, one map after the other, compiled by numba: a map stays in the first cache.

Loops go over four rows or pivots at once, so that each value that is loaded serves four multiplications. Matrices are padded
with zeros to a multiple of four.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

try:
    import numba

    njit: Any = numba.njit
except ImportError:  # matrix_rank has a way without numba
    njit = None

Count = Callable[[np.ndarray, float, float, float, np.ndarray, np.ndarray], None]


OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc"}}


def inlined(function: Any) -> Any:
    """A part of `count_ranks`: as a function of its own it would be up to a quarter slower."""
    return function if njit is None else njit(inline="always", **OPTIONS)(function)


@inlined
def gram_matrix(matrix: Any, columns: Any, gram: Any) -> None:
    """Write A A^T of `matrix` (n, m) into `gram`; `columns` is space for A^T, padded."""
    n, m = matrix.shape
    long, wide = columns.shape
    for i in range(n):
        for k in range(m):
            columns[k, i] = matrix[i, k]
    for i in range(wide):  # the upper triangle
        row = gram[i]
        start = i // 4 * 4
        for j in range(start, wide):
            row[j] = 0.0
        for k in range(0, long, 4):
            a0, a1, a2, a3 = columns[k, i], columns[k + 1, i], columns[k + 2, i], columns[k + 3, i]
            c0, c1, c2, c3 = columns[k], columns[k + 1], columns[k + 2], columns[k + 3]
            for j in range(start, wide):
                row[j] += (a0 * c0[j] + a1 * c1[j]) + (a2 * c2[j] + a3 * c3[j])
    for i in range(wide):
        for j in range(i):
            gram[i, j] = gram[j, i]


@inlined
def largest_eigenvalue(gram: Any, vector: Any, power: Any) -> Any:
    """The largest eigenvalue by power iteration, and the sum of the squares of all entries; `vector`, `power` are space.

    It starts from the rows' sums of magnitudes, weighted unevenly, as equal parts may cancel. It stops at a relative change of
    1e-3 if the eigenvalue is certainly the largest, because its square is more than half of all squares; else at 1e-9.
    """
    wide = len(gram)
    squares = 0.0
    for i in range(wide):
        vector[i] = 0.0
        for j in range(wide):
            vector[i] += abs(gram[i, j])
            squares += gram[i, j] * gram[i, j]
        vector[i] *= 0.5 + (0.618034 * i) % 1.0
    largest = 0.0
    for _ in range(500):
        length = 0.0
        for i in range(wide):
            length += vector[i] * vector[i]
            power[i] = 0.0
        if length == 0.0:
            break
        length = 1.0 / np.sqrt(length)
        for i in range(0, wide, 4):
            a0, a1, a2, a3 = vector[i] * length, vector[i + 1] * length, vector[i + 2] * length, vector[i + 3] * length
            c0, c1, c2, c3 = gram[i], gram[i + 1], gram[i + 2], gram[i + 3]
            for j in range(wide):
                power[j] += (a0 * c0[j] + a1 * c1[j]) + (a2 * c2[j] + a3 * c3[j])
        before, largest = largest, 0.0
        for i in range(wide):
            vector[i] = power[i]
            largest += power[i] * power[i]
        largest = np.sqrt(largest)
        if abs(largest - before) <= (1e-3 if 2 * largest * largest > squares else 1e-9) * largest:
            break
    return largest, squares


@inlined
def count_pivots(gram: Any, n: int, factors: Any) -> Any:
    """Eliminate `gram` in place. Returns the number of positive ones among the first n pivots, and the least magnitude."""
    wide = len(gram)
    positive, least = 0, np.inf
    for k in range(0, wide, 4):
        for q in range(4):  # four pivots
            row = gram[k + q]
            for u in range(q):
                factor, above = factors[u, k + q], gram[k + u]
                for j in range(k, wide):
                    row[j] -= factor * above[j]
            pivot = row[k + q]
            if k + q < n:
                if pivot > 0:
                    positive += 1
                if not abs(pivot) >= least:  # a NaN stays
                    least = abs(pivot)
            inverse = 1.0 / pivot
            for j in range(k, wide):
                factors[q, j] = row[j] * inverse
        c0, c1, c2, c3 = gram[k], gram[k + 1], gram[k + 2], gram[k + 3]
        for i in range(k + 4, wide):  # subtract them from the rows below
            a0, a1, a2, a3 = factors[0, i], factors[1, i], factors[2, i], factors[3, i]
            row = gram[i]
            for j in range(i // 4 * 4, wide):
                row[j] -= (a0 * c0[j] + a1 * c1[j]) + (a2 * c2[j] + a3 * c3[j])
    return positive, least


def count_ranks(maps: Any, scale: float, guard: float, faint: float, ranks: Any, clear: Any) -> None:
    """Write the ranks of maps (B, n, m), float32 and contiguous with n <= m, into `ranks` (B,), int64.

    `scale`: the square of the tolerance relative to the largest singular value. `clear` (B,) is False where rounding could
    decide: a pivot is within `guard` times the squared tolerance of zero (or not a number), or |A A^T| is below `faint`.
    """
    size, n, m = maps.shape
    wide, long = (n + 3) // 4 * 4, (m + 3) // 4 * 4
    gram, columns = np.zeros((wide, wide)), np.zeros((long, wide))
    power, vector = np.empty(wide), np.empty(wide)
    factors = np.empty((4, wide))
    for b in range(size):
        gram_matrix(maps[b], columns, gram)
        largest, squares = largest_eigenvalue(gram, vector, power)
        tau2 = largest * scale
        if largest == 0.0:
            tau2 = 1.0  # a map of zeros: -I has no positive pivot
        for i in range(wide):
            gram[i, i] -= tau2
        positive, least = count_pivots(gram, n, factors)
        ranks[b] = positive
        clear[b] = least > guard * tau2 and (squares == 0.0 or squares > faint * faint)


count: Count | None = None


if njit is not None:
    try:
        count = njit(cache=True, **OPTIONS)(count_ranks)
    except RuntimeError:  # there is no folder in which numba could keep what it compiles
        count = njit(**OPTIONS)(count_ranks)
