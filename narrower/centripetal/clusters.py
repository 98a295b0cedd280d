"""Which channels become one: clusters of filters, and what they mean for tensors."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

ROUNDS = 20  # of k-means


def even_clusters(size: int, count: int) -> np.ndarray:
    """The cluster of each of `size` channels, `count` clusters of neighbours that differ by one channel at most."""
    return np.arange(size) * count // size


def nearest_clusters(filters: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """The cluster of each filter by k-means, each of `count` clusters with one at least. `filters`: (size, ...).

    Clusters are numbered in the order of their first channels.
    """
    from scipy.cluster.vq import kmeans2

    points = filters.reshape(len(filters), -1).astype(np.float64)
    centres = spread_centres(points, count, np.random.default_rng(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of empty clusters
        centres, found = kmeans2(points, centres, iter=ROUNDS, minit="matrix", missing="warn")
    for empty in np.setdiff1d(np.arange(count), found):  # the filter farthest from its centre goes there, if it is not alone
        far = ((points - centres[found]) ** 2).sum(1)
        far[np.bincount(found, minlength=count)[found] < 2] = -1.0
        found[far.argmax()] = empty
        centres[empty] = points[far.argmax()]
    _, first, inverse = np.unique(found, return_index=True, return_inverse=True)
    return np.asarray(np.argsort(np.argsort(first))[inverse])


def spread_centres(points: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Points to begin with, far from each other (k-means++: Arthur and Vassilvitskii, 2007)."""
    chosen = [int(rng.integers(len(points)))]
    far = np.full(len(points), np.inf)
    for _ in range(count - 1):
        far = np.minimum(far, ((points - points[chosen[-1]]) ** 2).sum(1))
        rest = np.isin(np.arange(len(points)), chosen, invert=True)
        chosen.append(int(rng.choice(len(points), p=(far if far.any() else rest) / (far if far.any() else rest).sum())))
    return points[chosen]


def cluster_means(rows: Tensor, clusters: Tensor, sizes: Tensor) -> Tensor:
    """Each row replaced by the mean of its cluster. `rows`: (size, ...). `clusters`: (size,), numbers from 0. `sizes`:
    (clusters,), how many rows each has."""
    flat = rows.reshape(len(rows), -1)
    sums = flat.new_zeros(len(sizes), flat.shape[1]).index_add_(0, clusters, flat)
    return (sums / sizes[:, None])[clusters].reshape(rows.shape)


def cluster_sums(rows: Tensor, clusters: Tensor, first: Tensor) -> Tensor:
    """The sum of each cluster at its `first` row, zero at the others. Shapes as for `cluster_means`; `first`: (clusters,)."""
    flat = rows.reshape(len(rows), -1)
    sums = flat.new_zeros(len(first), flat.shape[1]).index_add_(0, clusters, flat)
    return torch.zeros_like(flat).index_copy_(0, first, sums).reshape(rows.shape)
