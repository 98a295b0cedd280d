"""Images to fit on, images that only judge, and how far outputs on these are from the dense network's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from math import ceil, prod
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError
from ..graph.types import Graph
from ..inputs import (
    are_images,
    arguments_of,
    as_float64,
    call_model,
    flatten_tensors,
    map_tensors,
    samples,
    shapes_of,
)
from ..measuring import check_runs
from ..surgery.walk import in_eval_mode

Measure = Literal["kl", "relative"]
"""How far outputs are from the dense ones. "kl": the Kullback-Leibler divergence of the class probabilities, of one tensor of
class scores `(N, classes, ...)`, in nats; the mean over images and positions. "relative": the squared error relative to the
variance of the dense output; the mean over floating tensors, in any nesting. Scalars, such as a loss, are left out."""

CHUNK = 3 << 18  # numbers in the images that run at once: activations of some ten times as many stay in memory that is reused
MOST_AT_ONCE = 64
LARGER = 3  # on a GPU 2^3 times as many of both: fewer would not keep it busy


def checked_inputs(what: str, batches: Iterable[Any], model: nn.Module, images: int | None, least: int,
                   wanted: str) -> list[tuple[Any, int]]:
    """The model's inputs from each batch with their numbers of images: finite, alike in shape, such that the model runs, at
    least `least` in all.

    Raises DataError. `wanted` says how many images would be good.
    """
    found: list[tuple[Any, int]] = []
    for inputs, count in samples(what, batches, model, images):
        if any(map(are_images, arguments_of(inputs))):
            raise DataError(f"{what}: batch {len(found)} is a list of images, as detectors take it: give tensors (N, C, H, W), "
                            "and a model that takes them, such as a module around the detector")
        tensors, first = flatten_tensors(inputs), flatten_tensors(found[0][0] if found else inputs)
        if [t.shape[1:] for t in tensors] != [t.shape[1:] for t in first] or any(
                len(t) != count if t.ndim else not torch.equal(t, f) for t, f in zip(tensors, first, strict=True)):
            raise DataError(f"{what}: batch {len(found)} has shape {shapes_of(inputs)}, the first one {shapes_of(first)}: all "
                            "images must have one shape, and all tensors of a batch as many rows as there are images; single "
                            "numbers beside them must be the same in all batches")
        if not all(bool(t.isfinite().all()) for t in tensors):
            raise DataError(f"{what}: batch {len(found)} is not finite")
        found.append((inputs, count))
    if (seen := sum(n for _, n in found)) < least:
        raise DataError(f"{what} got {seen} images: give it {least} at least, better some hundreds ({wanted})")
    check_runs(what, model, images_at(found[0][0], torch.tensor([0])))
    return found


def split(inputs: Sequence[tuple[Any, int]], every: int, most: int) -> tuple[list[tuple[Any, int]], list[tuple[Any, int]]]:
    """The images without one in `every`, and these, at most `most`; both in chunks.

    The size of the chunks is that of the computation on this device, whatever the batches are.
    """
    number = torch.arange(sum(n for _, n in inputs))
    chosen = (number % every == every - 1) & (number // every < most)
    whole = joined([x for x, _ in inputs])
    tensors = flatten_tensors(whole)
    size = sum(t[0].numel() for t in tensors if t.ndim) if len(number) else 1
    more = 0 if tensors[0].device.type == "cpu" else LARGER
    at_once = min(MOST_AT_ONCE << more, max(1, (CHUNK << more) // size))
    fit, held_out = ([(images_at(whole, index), len(index)) for index in mask.nonzero()[:, 0].split(at_once) if len(index)]
                     for mask in (~chosen, chosen))
    return fit, held_out


def joined(batches: Sequence[Any]) -> Any:
    """Batches as one: their tensors joined along the first dimension. Single numbers are the same in all."""
    columns = zip(*(flatten_tensors(b) for b in batches), strict=True)
    whole = iter([torch.cat(tensors) if tensors[0].ndim else tensors[0] for tensors in columns])
    return map_tensors(batches[0], lambda t: next(whole))


def images_at(batch: Any, index: Tensor) -> Any:
    """Some images of a batch."""
    def chosen(t: Tensor) -> Tensor:
        return t[index.to(t.device)] if t.ndim else t
    return map_tensors(batch, chosen)


class Comparison:
    """How far the outputs of several networks are from the dense one's, by a `Measure`, summed up chunk by chunk. None: as
    `measure_of` chooses."""

    def __init__(self, networks: int, measure: Measure | None = None) -> None:
        self.errors, self.sizes, self.given = [np.zeros(1) for _ in range(networks)], np.zeros((3, 1)), measure
        self.measure: Measure = measure or "kl"

    def dense(self, out: Any) -> None:
        """The dense output on the next chunk. Raises DataError if it holds nothing that can be compared."""
        self.measure = measure_of(out, self.given)
        self.want = [t.clone() for t in floats(out)]
        doubles = [as_float64(t.detach()) for t in self.want]
        self.sizes = self.sizes + np.array([[t.numel(), float(t.sum()), float(t.square().sum())] for t in doubles]).T

    def other(self, network: int, out: Any) -> None:
        """The output of another network on this chunk."""
        found = floats(out)
        if [t.shape for t in found] != [t.shape for t in self.want]:
            raise DataError(f"the outputs have shapes {shapes_of(found)}, the dense ones {shapes_of(self.want)}")
        if self.measure == "kl":
            errors = [kl_divergence(self.want[0], found[0])]
        else:
            errors = [float(as_float64(a - b).square().sum()) for a, b in zip(self.want, found, strict=True)]
        self.errors[network] = self.errors[network] + np.array(errors)

    def values(self) -> list[float]:
        """For each network, over all chunks. Raises DataError if one is not finite."""
        count, total, squares = self.sizes
        if self.measure == "kl":
            unit = count / self.want[0].shape[1]
        else:
            unit = np.maximum(squares - total ** 2 / np.maximum(count, 1), 1e-20 * count)
        found = [float((e / unit).mean()) for e in self.errors]
        if not np.isfinite(found).all():
            raise DataError("the outputs are not finite on these images")
        return [max(0.0, v) for v in found]


def floats(outputs: Any) -> list[Tensor]:
    """The floating tensors that hold something. Not those without dimensions, such as a loss: they are of no image."""
    return [t for t in flatten_tensors(outputs) if t.is_floating_point() and t.ndim and t.numel()]


def measure_of(outputs: Any, given: Measure | None = None) -> Measure:
    """The measure that is given. None: "kl" for what a classifier returns, one tensor `(N, K)` with K > 1, else "relative".

    Raises ConfigError if there is no such measure, DataError if it does not fit the outputs.
    """
    if given is not None and given not in get_args(Measure):
        raise ConfigError(f"measure={given!r}: give 'kl' for class scores, 'relative' for other outputs, or None")
    tensors = floats(outputs)
    if not tensors:
        raise DataError(f"the model returns {type(outputs).__name__} without floating-point numbers: nothing can be compared")
    if given == "kl" and (len(tensors) > 1 or tensors[0].ndim < 2 or tensors[0].shape[1] < 2):
        raise DataError(f"the outputs have shapes {shapes_of(tensors)}: measure='kl' compares class scores, one tensor (N, "
                        "classes, ...); give 'relative' for other outputs")
    return given or ("kl" if len(tensors) == 1 and tensors[0].ndim == 2 and tensors[0].shape[1] > 1 else "relative")


@torch.no_grad()
def divergences(dense: nn.Module, others: Sequence[nn.Module], inputs: Iterable[tuple[Any, int]],
                measure: Measure | None = None) -> tuple[list[float], Measure]:
    """How far the outputs of other networks are from the dense one's, and by which measure."""
    comparison = Comparison(len(others), measure)
    with ExitStack() as modes:
        for model in (dense, *others):
            modes.enter_context(in_eval_mode(model))
        for batch, _ in inputs:
            comparison.dense(call_model(dense, map_tensors(batch, torch.clone)))  # a forward may write into its inputs
            for k, other in enumerate(others):
                comparison.other(k, call_model(other, map_tensors(batch, torch.clone)))
    return comparison.values(), comparison.measure


def kl_divergence(dense: Tensor, other: Tensor) -> float:
    """KL(dense || other) over dimension 1, in nats, summed over images and positions."""
    p, q = as_float64(dense).log_softmax(1), as_float64(other).log_softmax(1)
    return float((p.exp() * (p - q)).sum())


def input_counts(graph: Graph) -> dict[str, int]:
    """The weights of the layers that read free groups, and how many inputs each reads at a position.

    A weight of two layers that read it along different dimensions, as in a tied autoencoder, is not among them: what is best
    for one is not for the other.
    """
    axes = {(s.tensor, s.dim) for g in graph for s in g.slices if s.reads}
    times = Counter(tensor for tensor, _ in axes)
    names = {s.tensor for g in graph.free for s in g.slices if s.reads and s.tensor in graph.uses and times[s.tensor] == 1}
    return {name: prod(graph.shapes[name][1:]) for name in sorted(names)}


def images_wanted(graph: Graph, reads: Mapping[str, int]) -> str:
    """Which layer asks for the most images. `reads`: how many inputs each weight reads at a position."""
    wanted = {name: ceil(count / max(1.0, graph.uses.get(name, 1.0))) for name, count in reads.items()}
    name = max(wanted, key=lambda n: wanted[n], default="")
    if not name:
        return "no layer to repair"
    return f"{name} reads {reads[name]:,} inputs: {wanted[name]:,} images give as many samples"
