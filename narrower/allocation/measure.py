"""sensitivity: the damage of removing the lowest channels of each group, measured at the output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DataError
from ..graph.equal_counts import Component, components
from ..graph.types import Graph
from ..inputs import flatten_tensors, map_tensors, samples
from ..planning.damage import Curve, Sensitivity
from ..planning.requests import checked_scores, lowest_channels
from ..repair.second_moments import Repaired, SecondMoments, repaired, second_moments
from ..surgery.copying import duplicate, fresh_copy, same_tensors
from ..surgery.walk import in_eval_mode, named_tensors
from ..tracing.interpreter import run_forward
from .replay import Record, Replay

SHARES = (0.125, 0.25, 0.5, 0.75)
MEASURED = 6  # one image in so many is measured on, the others are fitted
MEASURED_IMAGES = 64
CHUNK = 16  # images whose activations are kept at once


class Cut(NamedTuple):
    """One removal to be measured: the number of its curve, the share that goes, and the weights of the readers then."""

    curve: int
    share: float
    weights: Mapping[str, Repaired]


@torch.no_grad()
def sensitivity(model: nn.Module, graph: Graph, scores: Mapping[str, Tensor], batches: Iterable[Any], *,
                images: int | None = None, shares: Sequence[float] = SHARES,
                progress: Callable[[str], None] | None = None) -> Sensitivity:
    """How much the output changes when each group alone loses its channels with the lowest `scores`.

    For each group (groups with tied counts together) and each of `shares`, the layers that read the removed channels are
    repaired by least squares, and the output is compared with the dense network's: by the Kullback-Leibler divergence of the
    class probabilities, or, for outputs that are not one tensor of logits `(N, classes, ...)`, by the squared error relative to
    the variance. Every sixth image (64 at most) is measured on; the second moments for the repair come from the others. Fitted
    on the images measured, curves would be flat where a layer has more inputs than samples.

    `batches` gives what the model takes, or pairs whose first part is; no labels are needed. All of them are used, or the first
    `images` samples. `progress` gets a line now and then.

    Raises DataError for too few images or outputs that are not finite, PlanError if the model is not the one that was traced or
    the scores are of another graph.
    """
    same_tensors(model, graph)
    values = checked_scores(graph, scores, set())
    inputs = list(samples(batches, model, images))
    count = sum(n for _, n in inputs)
    if count < 2 * MEASURED:
        raise DataError(f"sensitivity got {count} images: give it {2 * MEASURED} at least, better some hundreds")
    fit, measured = split(inputs)
    parts = components(graph)
    copy = duplicate(model, {id(t): fresh_copy(t) for t in named_tensors(model).values()})
    with in_eval_mode(copy):
        weights = {s.tensor for g in graph.free for s in g.slices if s.role == "in" and s.tensor in graph.uses}
        moments = second_moments(copy, weights, fit)
        cuts = [cut for k, part in enumerate(parts) for cut in cuts_of(graph, k, part, values, copy, moments, shares)]
        damages, kind = measured_damages(copy, cuts, measured, progress)
    curves = []
    for k, part in enumerate(parts):
        points = [(c.share, d) for c, d in zip(cuts, damages, strict=True) if c.curve == k]
        if points:
            names = tuple(dict.fromkeys(c.group for c in part.cells))
            curves.append(Curve(names, tuple(s for s, _ in points), tuple(d for _, d in points)))
    return Sensitivity(tuple(curves), kind, sum(n for _, n in measured))


def split(inputs: Sequence[tuple[Any, int]]) -> tuple[list[tuple[Any, int]], list[tuple[Any, int]]]:
    """The batches without every sixth image, and these images in chunks."""
    fit: list[tuple[Any, int]] = []
    measured: list[tuple[Any, int]] = []
    seen = 0
    for batch, count in inputs:
        number = torch.arange(seen, seen + count)
        chosen = (number % MEASURED == MEASURED - 1) & (number // MEASURED < MEASURED_IMAGES)
        seen += count
        for mask, out, size in ((~chosen, fit, count), (chosen, measured, CHUNK)):
            out += [(images_at(batch, index), len(index)) for index in mask.nonzero()[:, 0].split(size) if len(index)]
    return fit, measured


def images_at(batch: Any, index: Tensor) -> Any:
    """Some images of a batch."""
    def chosen(t: Tensor) -> Tensor:
        return t[index.to(t.device)]
    return map_tensors(batch, chosen)


def cuts_of(graph: Graph, number: int, part: Component, scores: Mapping[str, np.ndarray], model: nn.Module,
            moments: Mapping[str, SecondMoments], shares: Sequence[float]) -> list[Cut]:
    """The removals of one component, with the repaired weights of all its readers."""
    losses = [part.removable(np.round(part.sizes * s).astype(np.int64), part.sizes - 1) for s in sorted(shares)]
    losses = [n for k, n in enumerate(losses) if n.any() and not any(np.array_equal(n, m) for m in losses[:k])]
    if not losses:
        return []
    named = named_tensors(model)
    removed: dict[str, list[np.ndarray]] = {}
    for k, lost in enumerate(losses):
        for group, lowest in lowest_channels([part], [lost], scores):
            for s in graph[group].slices:
                if s.role == "in" and s.tensor in moments:
                    groups = moments[s.tensor].geometry.groups
                    inputs = named[s.tensor].shape[s.dim] * (groups if s.dim == 1 else 1)
                    masks = removed.setdefault(s.tensor, [np.zeros((groups, inputs // groups), dtype=bool) for _ in losses])
                    masks[k].reshape(-1)[s.positions[np.isin(s.channels, lowest)]] = True
    weights = {name: repaired(named[name], moments[name], masks) for name, masks in removed.items()}
    total = int(part.sizes.sum())
    return [Cut(number, int(lost.sum()) / total, {name: w[k] for name, w in weights.items()}) for k, lost in enumerate(losses)]


def measured_damages(model: nn.Module, cuts: Sequence[Cut], inputs: Sequence[tuple[Any, int]],
                     progress: Callable[[str], None] | None) -> tuple[list[float], str]:
    """The damage of each cut, and what it measures. The model's weights are changed in place and put back."""
    named = named_tensors(model)
    sums, seen, kind = np.zeros(len(cuts)), 0, "kl"
    for batch, count in inputs:
        record = Record(model)
        dense = [t.clone() for t in flatten_tensors(run_forward(model, batch, record))]
        kind = "kl" if is_logits(dense) else "relative"
        for k, cut in enumerate(cuts):
            before = {name: named[name].detach().clone() for name in cut.weights}
            for name, new in cut.weights.items():
                named[name].data.copy_(new.weight)
            added = {named[name].untyped_storage()._cdata: new.intercept for name, new in cut.weights.items()}
            start = min((record.first_read[memory] for memory in added), default=len(record.outputs))
            out = flatten_tensors(run_forward(model, batch, Replay(record, start, added)))
            for name, old in before.items():
                named[name].data.copy_(old)
            sums[k] += count * (kl_divergence(dense[0], out[0]) if kind == "kl" else relative_error(dense, out))
        seen += count
        if progress is not None:
            progress(f"sensitivity: {len(cuts)} cuts measured on {seen} of {sum(n for _, n in inputs)} images")
    damages = sums / max(1, seen)
    if not np.isfinite(damages).all():
        raise DataError("the outputs are not finite on these images")
    return [float(d) for d in np.maximum(damages, 0.0)], kind


def is_logits(outputs: Sequence[Tensor]) -> bool:
    """Whether the output looks like class scores: one floating tensor `(N, classes)` or `(N, classes, H, W)`."""
    return len(outputs) == 1 and outputs[0].is_floating_point() and outputs[0].ndim in (2, 4) and outputs[0].shape[1] > 1


def kl_divergence(dense: Tensor, cut: Tensor) -> float:
    """The mean over images (and positions) of KL(dense || cut) over dimension 1, in nats."""
    p, q = dense.double().log_softmax(1), cut.double().log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


def relative_error(dense: Sequence[Tensor], cut: Sequence[Tensor]) -> float:
    """The squared error relative to the variance of the dense outputs, averaged over floating tensors."""
    errors = [float((a - b).double().square().mean() / a.double().var().clamp_min(1e-20))
              for a, b in zip(dense, cut, strict=True) if a.is_floating_point() and a.numel() > 1]
    return sum(errors) / max(1, len(errors))
