"""sensitivity: the damage of removing the lowest channels of each group, measured at the output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..graph.equal_counts import Component, components
from ..graph.selection import Kept
from ..graph.types import Graph
from ..narrowing.verify import Survivors
from ..planning.damage import Curve, Sensitivity
from ..planning.requests import checked_scores, lowest_channels
from ..preconditions import checked, checked_numbers
from ..repair.comparison import Comparison, Measure
from ..repair.held_out import checked_inputs, split
from ..repair.readers import images_wanted, input_counts
from ..repair.second_moments import SecondMoments, repaired_weights, second_moments
from ..surgery.copying import independent_copy, same_tensors, where_float64_is
from ..surgery.masking import at_inputs
from ..surgery.walk import in_eval_mode, named_tensors, outer_modes_off
from ..tracing.interpreter import run_forward
from ..tracing.operators.interface import address
from .replay import Record, Replay

SHARES = (0.125, 0.25, 0.5, 0.75)
MEASURED = 6  # one image in so many is measured on, the others are fitted
MEASURED_IMAGES = 64


class TrialCut(NamedTuple):
    """One removal to be measured: the number of its curve, the share that goes, the weights of the readers then, what is added
    to their outputs, and what runs the calls that mix channels (None: there are none)."""

    curve: int
    share: float
    weights: Mapping[str, Tensor]
    intercepts: Mapping[str, Tensor]
    survivors: Survivors | None = None


@checked
@outer_modes_off()
@torch.no_grad()
def sensitivity(model: nn.Module, graph: Graph, scores: Mapping[str, Tensor], batches: Iterable[Any], *,
                images: int | None = None, shares: Sequence[float] = SHARES, measure: Measure | None = None,
                progress: Callable[[str], None] | None = None) -> Sensitivity:
    """How much the output changes when each group alone loses its channels with the lowest `scores`.

    For each group (groups with tied counts together) and each of `shares`, the layers that read the removed channels are
    repaired by least squares, and the output is compared with the dense network's. Every sixth image (64 at most) is measured
    on; the second moments for the repair come from the others. Fitted on the images measured, curves would be flat where a
    layer has more inputs than samples. Layers whose inputs cannot be seen (their weight is computed first, or they are no plain
    layer), or that have more than 12,288, are cut without repair. `progress` names them. Layers that mix channels, such as
    GroupNorm or a matrix product of activations, see the channels that stay, as in the network that `narrow` returns.

    `measure`: how outputs are compared. "kl": by the Kullback-Leibler divergence of the class probabilities, of one tensor of
    class scores `(N, classes, ...)`. "relative": by the squared error relative to the variance, of any outputs. None: "kl" for
    one tensor `(N, K)`, as of a classifier, else "relative". So say "relative" if these K numbers are no class scores.

    `batches` gives what the model takes, or pairs whose first part is; no labels are needed. All of them are used, or the first
    `images` samples. `progress` gets a line now and then.

    Raises DataError for too few images, batches without tensors, of several shapes or that the model cannot take, values that
    are not finite, or outputs that `measure` does not fit; PlanError if the model is not the one that was traced or the scores
    are of another graph; ConfigError for an unknown measure, or `shares` that are no fractions between 0 and 1.
    """
    shares = checked_numbers("shares", shares, 0, 1, inside=True)
    same_tensors(model, graph)
    model = where_float64_is(model)
    values = checked_scores(graph, scores, set())
    counts = input_counts(graph)
    inputs = checked_inputs("sensitivity", batches, model, images, 2 * MEASURED, images_wanted(graph, counts))
    fit, measured = split(inputs, MEASURED, MEASURED_IMAGES)
    parts = components(graph)
    copy = independent_copy(model)
    with in_eval_mode(copy):
        moments = second_moments(copy, counts, fit)
        hidden = sorted(counts.keys() - moments.keys())
        if hidden and progress is not None:
            progress(f"sensitivity: cut without repair, as what they read cannot be seen or is too much: {', '.join(hidden)}")
        cuts = [cut for k, part in enumerate(parts) for cut in cuts_of(graph, k, part, values, copy, moments, shares)]
        damages, found = measured_damages(copy, cuts, measured, measure, progress)
    curves = []
    for k, part in enumerate(parts):
        points = [(c.share, d) for c, d in zip(cuts, damages, strict=True) if c.curve == k]
        if points:
            names = tuple(dict.fromkeys(c.group for c in part.cells))
            curves.append(Curve(names, tuple(s for s, _ in points), tuple(d for _, d in points)))
    return Sensitivity(tuple(curves), found, sum(n for _, n in measured))


def cuts_of(graph: Graph, number: int, part: Component, scores: Mapping[str, np.ndarray], model: nn.Module,
            moments: Mapping[str, SecondMoments], shares: Sequence[float]) -> list[TrialCut]:
    """The removals of one component, with the repaired weights of all its readers."""
    losses = [part.removable(np.round(part.sizes * s).astype(np.int64), part.sizes - 1) for s in sorted(shares)]
    losses = [n for k, n in enumerate(losses) if n.any() and not any(np.array_equal(n, m) for m in losses[:k])]
    if not losses:
        return []
    named = named_tensors(model)
    removed: dict[tuple[str, int], list[np.ndarray]] = {}
    gone = [list(lowest_channels([part], [lost], scores)) for lost in losses]
    for k, channels in enumerate(gone):
        for group, lowest in channels:
            for s in graph[group].slices:
                if s.reads and s.tensor in named:
                    blocks = moments[s.tensor].geometry.groups if s.tensor in moments else s.blocks
                    size = named[s.tensor].shape[s.dim] * (blocks if s.dim else 1)
                    masks = removed.setdefault((s.tensor, s.dim), [np.zeros(size, dtype=bool) for _ in losses])
                    masks[k][s.positions[np.isin(s.channels, lowest)]] = True
    weights: dict[str, list[Tensor]] = {}
    intercepts: dict[str, list[Tensor]] = {}
    for (name, dim), masks in removed.items():
        if name in moments:
            found = repaired_weights(named[name], moments[name], [m.reshape(moments[name].geometry.groups, -1) for m in masks])
            weights[name], intercepts[name] = [r.weight for r in found], [r.intercept for r in found]
        else:
            before = weights.get(name, [named[name]] * len(masks))  # a tied weight may be read along two dimensions
            weights[name] = [w.masked_fill(at_inputs(mask.reshape(-1, w.shape[dim]), w, dim), 0)
                             for w, mask in zip(before, masks, strict=True)]
    total, mixed = int(part.sizes.sum()), bool(graph.mixers or graph.products or graph.computed)
    return [TrialCut(number, int(lost.sum()) / total, {n: w[k] for n, w in weights.items()},
                     {n: i[k] for n, i in intercepts.items()},
                     Survivors(Kept.without(graph, gone[k]), named.values()) if mixed else None)
            for k, lost in enumerate(losses)]


def measured_damages(model: nn.Module, cuts: Sequence[TrialCut], inputs: Sequence[tuple[Any, int]], measure: Measure | None,
                     progress: Callable[[str], None] | None) -> tuple[list[float], Measure]:
    """The damage of each cut, and by which measure. The model's weights are changed in place and put back."""
    named, comparison, seen = named_tensors(model), Comparison(len(cuts), measure), 0
    for batch, count in inputs:
        record = Record(model)
        comparison.dense(run_forward(model, batch, record))
        starts = [record.start([address(named[name]) for name in cut.weights], cut.survivors) for cut in cuts]
        for k in sorted(range(len(cuts)), key=lambda k: -starts[k]):
            weights, survivors = cuts[k].weights, cuts[k].survivors
            before = {name: named[name].detach().clone() for name in weights}
            for name, new in weights.items():
                named[name].data.copy_(new)
            added = {address(named[name]): intercept for name, intercept in cuts[k].intercepts.items()}
            comparison.other(k, run_forward(model, batch, Replay(record, starts[k], added, survivors)))
            for name, old in before.items():
                named[name].data.copy_(old)
        seen += count
        if progress is not None:
            progress(f"sensitivity: {len(cuts)} cuts measured on {seen} of {sum(n for _, n in inputs)} images")
    return comparison.values(), comparison.measure
