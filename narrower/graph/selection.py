"""Which channels stay, and what stays of every axis and tensor then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import PlanError
from .types import ChannelMap, Graph

Keep = Mapping[str, np.ndarray]
"""{group name: kept channels, ascending}."""

Cut = Mapping[int, np.ndarray]
"""{dimension of a tensor: positions that stay, shape (blocks, n)}: one row, or one for each group of a grouped convolution."""


@dataclass(frozen=True, eq=False)
class Kept:
    """The channels of a graph that stay. Groups that `keep` does not name stay whole."""

    graph: Graph
    keep: Keep

    @staticmethod
    def without(graph: Graph, removed: Iterable[tuple[str, np.ndarray]]) -> Kept:
        """All channels of the free groups but the `removed`: pairs of a group's name and some of its channels."""
        masks = {g.name: np.ones(g.size, dtype=bool) for g in graph.free}
        for group, channels in removed:
            masks[group][channels] = False
        return Kept(graph, {group: np.nonzero(mask)[0] for group, mask in masks.items()})

    @cached_property
    def masks(self) -> dict[str, np.ndarray]:
        masks = {g.name: np.full(g.size, g.name not in self.keep) for g in self.graph.groups}
        for name in self.keep.keys() & masks.keys():
            masks[name][self.keep[name]] = True
        return masks

    def mask(self, group: str) -> np.ndarray:
        """For each channel of a group whether it stays. Bool, shape (size,)."""
        return self.masks[group]

    def mask_along(self, maps: Iterable[ChannelMap], size: int) -> np.ndarray:
        """For each of `size` positions whether the channel there stays; positions without a channel do. Bool, shape (size,)."""
        stays = np.ones(size, dtype=bool)
        for m in maps:
            stays[m.positions] = self.masks[m.group][m.channels]
        return stays

    def axis_mask(self, tensor: str, dim: int) -> np.ndarray:
        """For each position along a dimension of a tensor whether it stays. Bool, shape (blocks, size)."""
        slices = self.graph.by_axis.get((tensor, dim), ())
        blocks = slices[0].blocks if slices else 1
        return self.mask_along(slices, blocks * self.graph.shapes[tensor][dim]).reshape(blocks, -1)

    def positions(self, tensor: str, dim: int) -> np.ndarray:
        """The dense positions that stay along a dimension of a tensor, ascending. Shape (blocks, n).

        Raises PlanError if the blocks would keep different numbers.
        """
        stays = self.axis_mask(tensor, dim)
        if len(set(stays.sum(1).tolist())) > 1:
            raise PlanError(f"{tensor}: each of its {len(stays)} groups must keep equally many channels")
        return np.nonzero(stays)[1].reshape(len(stays), -1)

    @cached_property
    def cuts(self) -> dict[str, Cut]:
        """What stays of every tensor that loses something, by its name."""
        losing = [self.graph[name] for name, kept in self.keep.items() if len(kept) < self.graph[name].size]
        axes = dict.fromkeys((s.tensor, s.dim) for g in losing for s in g.slices)
        cuts: dict[str, dict[int, np.ndarray]] = {}
        for tensor, dim in axes:
            cuts.setdefault(tensor, {})[dim] = self.positions(tensor, dim)
        return dict(cuts)
