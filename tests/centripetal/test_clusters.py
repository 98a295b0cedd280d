"""Clusters: every one has a member, near filters are together, means and sums are those of a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from narrower.centripetal.clusters import cluster_means, cluster_sums, even_clusters, nearest_clusters


def test_even_clusters_differ_by_one_channel_at_most() -> None:
    for size, count in ((7, 3), (8, 8), (5, 1), (64, 27)):
        sizes = np.bincount(even_clusters(size, count))
        assert len(sizes) == count and sizes.sum() == size and sizes.max() - sizes.min() <= 1


def test_near_filters_are_together() -> None:
    rng = np.random.default_rng(0)
    centres = 10 * rng.normal(size=(4, 3, 3, 3))
    truth = np.array([0, 1, 2, 3, 1, 0, 3, 2, 2, 0])
    found = nearest_clusters(centres[truth] + 0.01 * rng.normal(size=(10, 3, 3, 3)), 4, seed=3)
    assert found.tolist() == truth.tolist()  # numbered by their first channels too


@pytest.mark.parametrize("count", [1, 3, 11, 12])
def test_every_cluster_has_a_member_even_of_equal_filters(count: int) -> None:
    for filters in (np.zeros((12, 5)), np.random.default_rng(1).normal(size=(12, 5))):
        assert sorted(set(nearest_clusters(filters, count))) == list(range(count))


def test_means_and_sums_are_those_of_a_loop() -> None:
    rows, clusters = torch.randn(5, 2, 3), torch.tensor([1, 0, 1, 1, 0])
    means, sums = cluster_means(rows, clusters, torch.tensor([2, 3])), cluster_sums(rows, clusters, torch.tensor([1, 0]))
    for k in range(5):
        same = [j for j in range(5) if clusters[j] == clusters[k]]
        torch.testing.assert_close(means[k], sum(rows[j] for j in same) / len(same))
        torch.testing.assert_close(sums[k], sum(rows[j] for j in same) if k == same[0] else torch.zeros(2, 3))
