"""HRank: filters whose feature maps have a low rank carry little information."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import DataError
from ..graph.cost import CostModel
from ..graph.selection import Keep
from ..graph.types import ChannelMap, Graph, MapSource, Scores
from ..inputs import as_float64, running_on, samples
from ..planning.plan import plan
from ..planning.requests import Budget
from ..preconditions import checked
from ..surgery.copying import same_tensors
from ..surgery.walk import in_eval_mode, named_tensors, outer_modes_off
from ..tracing.interpreter import run_forward
from ..tracing.operators.call_counter import CallCounter
from .matrix_rank import rank
from .weights import magnitude

SETTLED = 0.965  # stop if the plans from half the images and from all of them share this part of the kept channels

FIRST_CHECK = 128  # images


@checked
@outer_modes_off()
@torch.no_grad()
def hrank(model: nn.Module, graph: Graph, batches: Iterable[Any], *, images: int | None = None,
          macs: float | None = None, params: float | None = None) -> Scores:
    """The average rank of each channel's feature maps (Lin et al., "HRank", CVPR 2020, eq. 4 and 5).

    A channel's map is the input of the convolutions that read it: after BatchNorm, activation and addition. If a pooling is in
    between, it is the input of the pooling; of several poolings, the last with a window larger than one pixel. Ranks are those
    of `torch.linalg.matrix_rank` on float32 maps, averaged over images and over the convolutions. Maps of one row or column
    have rank 0 or 1. Of channels with equal ranks, the one with the lower index is removed first. Groups without maps (after a
    flatten, or between linear layers) get their L2 magnitude. One forward pass measures all layers.

    `batches`: model inputs, or pairs (inputs, targets). All are used, or the first `images` samples. With a budget (`macs` or
    `params`, as for `plan`) it stops early, once the plans from half the images and from all of them nearly agree.

    Returns mean ranks, from 0 to min(H, W), not normalised: `plan` compares them within their group. Raises DataError if there
    are no batches, a batch has no tensor or the model does not run on it, or a map is not finite, PlanError if the model is not
    the one that was traced, or for what is no budget.
    """
    same_tensors(model, graph)
    cost = CostModel(graph)
    Budget(macs, params).targets({kind: cost.cost(kind, cost.dense) for kind in ("macs", "params")})
    averages = Averages(graph)
    seen, check = 0, FIRST_CHECK
    last: Keep | None = None
    with in_eval_mode(model):
        for inputs, count in samples("hrank", batches, model, images):
            mode = Maps(model, graph, averages)
            with running_on("hrank", inputs):
                run_forward(model, inputs, mode)
            seen += count
            if (macs is not None or params is not None) and seen >= check:
                now = plan(graph, scores_of(model, graph, averages), macs=macs, params=params).keep
                if last is not None and agreement(last, now) >= SETTLED:
                    break
                last, check = now, 2 * seen
    if not seen:
        raise DataError("hrank got no batches: give it some images")
    return scores_of(model, graph, averages)


class Averages:
    """Running averages of ranks per channel, weighted by the number of images and consumers."""

    def __init__(self, graph: Graph) -> None:
        self.sums = {g.name: np.zeros(g.size) for g in graph.free}
        self.weights = {g.name: np.zeros(g.size) for g in graph.free}

    def add(self, members: Iterable[ChannelMap], ranks: np.ndarray, weight: float) -> None:
        """`ranks`: mean rank at each position of the tensor. `weight`: images times consumers."""
        for m in members:
            if m.group in self.sums:
                np.add.at(self.sums[m.group], m.channels, weight * ranks[m.positions])
                np.add.at(self.weights[m.group], m.channels, weight)


class Maps(TorchDispatchMode):
    """Measures the ranks of feature maps during a forward. No map is stored."""

    def __init__(self, model: nn.Module, graph: Graph, averages: Averages) -> None:
        super().__init__()
        self.averages = averages
        self.by_weight: dict[str | int, MapSource] = {s.weight: s for s in graph.sources if s.weight is not None}
        self.by_pool: dict[int, MapSource] = {s.pool: s for s in graph.sources if s.weight is None}
        self.names = {id(t): n for n, t in reversed(named_tensors(model).items()) if n in self.by_weight}
        self.counter = CallCounter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = self.counter.count(func, args, kwargs)
        source = self.by_pool.get(call.pool)
        if call.name == "convolution":
            source = self.by_weight.get(self.names.get(id(args[1]), call.number))
        if source is not None:
            self.see(source, args[0])
        return func(*args, **(kwargs or {}))

    def see(self, source: MapSource, x: Tensor) -> None:
        if not any(m.group in self.averages.sums for m in source.members):
            return
        maps = x if x.ndim > 3 else x.unsqueeze(-2)
        if maps.ndim > 4:  # video: a map for each frame
            maps = maps.flatten(2, -3)
        try:
            ranks = as_float64(rank(maps))
        except ValueError as e:
            raise DataError(f"the maps that {source.weight or 'a pooling or convolution'} reads are not finite: {e}") from e
        mean = ranks.view(*maps.shape[:2], -1).mean((0, 2))
        self.averages.add(source.members, mean.cpu().numpy(), maps.shape[0] * source.consumers)


def scores_of(model: nn.Module, graph: Graph, averages: Averages) -> Scores:
    """Mean ranks. Groups without maps get their L2 magnitude."""
    ranked = {name: torch.from_numpy(averages.sums[name] / weights).float()
              for name, weights in averages.weights.items() if weights.all()}
    return Scores({**({} if len(ranked) == len(graph.free) else magnitude(model, graph)), **ranked})


def agreement(first: Keep, second: Keep) -> float:
    """The share of the channels kept by `second` that `first` keeps too."""
    same = sum(len(np.intersect1d(first[n], second[n], assume_unique=True)) for n in second)
    return same / sum(len(kept) for kept in second.values())
