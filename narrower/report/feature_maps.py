"""Feature maps of one image with their ranks, as HRank sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..graph.types import Graph, MapSource
from ..scores.hrank import Averages, Maps
from ..scores.matrix_rank import rank
from ..surgery.walk import in_eval_mode
from ..tracing.interpreter import run_forward

GROUPS, EACH = 3, 5


class FeatureMap(NamedTuple):
    """A feature map [H, W] of a channel, its rank, and whether the plan keeps the channel."""

    channel: int
    rank: int
    kept: bool
    pixels: np.ndarray


class Seen(Maps):
    """Keeps the maps that HRank would rank: {group: {channel: (rank, map [H, W])}}, of the first image and the first reader."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        super().__init__(model, graph, Averages(graph))
        self.found: dict[str, dict[int, tuple[int, np.ndarray]]] = {}

    def see(self, source: MapSource, x: Tensor) -> None:
        if x.ndim != 4:
            return
        ranks, maps = rank(x[:1])[0], x[0].float().cpu().numpy()
        for member in source.members:
            own = self.found.setdefault(member.group, {})
            for channel, position in zip(member.channels.tolist(), member.positions.tolist(), strict=True):
                own.setdefault(channel, (int(ranks[position]), maps[position]))


@torch.no_grad()
def feature_maps(
    model: nn.Module, graph: Graph, image: Tensor, keep: Mapping[str, Sequence[int]]
) -> dict[str, list[FeatureMap]]:
    """Maps of the dense network for an image [1, C, H, W], in up to `GROUPS` groups along the network that lose channels.

    Of each group up to `EACH` maps that stay, those of the highest rank, then as many that go, those of the lowest.
    """
    with in_eval_mode(model):
        seen = Seen(model, graph)
        run_forward(model, image, seen)
    losing = [name for name, kept in keep.items() if name in seen.found and len(kept) < graph[name].size]
    chosen = [losing[k] for k in np.unique(np.linspace(0, len(losing) - 1, GROUPS).round().astype(int))] if losing else []
    found = {}
    for name in chosen:
        maps = [FeatureMap(c, r, c in keep[name], pixels) for c, (r, pixels) in seen.found[name].items()]
        maps.sort(key=lambda one: (-one.rank, one.channel))
        found[name] = [one for one in maps if one.kept][:EACH] + [one for one in maps if not one.kept][-EACH:]
    return found
