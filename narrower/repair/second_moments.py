"""Second moments of what layers read, and weights repaired from them for several widths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DataError
from ..surgery.walk import named_tensors
from .patches import Geometry, as_matrix, as_weight, patches_at, sample_positions, widened
from .watching import LayerCall, LayerWatch

SAMPLES_PER_INPUT = 3
LEAST_SAMPLES = 2048
MOST_INPUTS = 12288  # the second moments of more take gigabytes, and hours to factorise
STRENGTH = 1e-3  # ridge, relative to the mean square of the inputs


class SecondMoments(NamedTuple):
    """The mean of x x^T over sampled positions, where x is what a layer reads with a one in front: `(G, 1 + I, 1 + I)`."""

    mean: Tensor
    geometry: Geometry


class MomentWatch(LayerWatch):
    """Collects second moments from forwards of a network."""

    def __init__(self, model: nn.Module, per_image: Mapping[str, int]) -> None:
        super().__init__(model, per_image)
        self.per_image, self.generator = per_image, torch.Generator().manual_seed(0)
        self.sums: dict[str, Tensor] = {}
        self.sizes: dict[str, int] = {}
        self.geometries: dict[str, Geometry] = {}

    def layer(self, call: LayerCall) -> Tensor:
        out, name = call.run(), call.weight
        if len(out) % self.images == 0:
            at = sample_positions(out, self.images, self.per_image[name], self.generator)
            x = widened(patches_at(call.x, call.geometry, at))
            x = torch.cat([torch.ones_like(x[..., :1]), x], dim=2)
            self.sums[name] = self.sums.get(name, 0) + x.transpose(1, 2) @ x
            self.sizes[name] = self.sizes.get(name, 0) + x.shape[1]
            self.geometries[name] = call.geometry
        return out


def second_moments(model: nn.Module, weights: Iterable[str], inputs: Sequence[tuple[Any, int]],
                   samples_per_input: int = SAMPLES_PER_INPUT) -> dict[str, SecondMoments]:
    """The second moments of what the layers with these weights read, from one forward over `inputs` (with their numbers of
    images). `samples_per_input`: how many positions are sampled for each input of a layer. Layers with more than `MOST_INPUTS`
    are left out. Raises DataError if an input is not finite."""
    named, images = named_tensors(model), sum(n for _, n in inputs)
    sizes = {w: named[w][0].numel() for w in weights}
    per_image = {w: -(-max(LEAST_SAMPLES, samples_per_input * n) // images) for w, n in sizes.items() if n <= MOST_INPUTS}
    watch = MomentWatch(model, per_image)
    for batch, count in inputs:
        watch.run(batch, count)
    odd = [w for w, s in watch.sums.items() if not bool(s.isfinite().all())]
    if odd:
        raise DataError(f"what {odd[0]} reads is not finite on these images")
    return {w: SecondMoments(s / watch.sizes[w], watch.geometries[w]) for w, s in watch.sums.items()}


class Repaired(NamedTuple):
    """A layer's weight without some inputs (zeros), the others repaired, and what is added to its output `(O,)`."""

    weight: Tensor
    intercept: Tensor


def ridge_factor(h: Tensor) -> Tensor:
    """The Cholesky factor of second moments `(1 + I, 1 + I)` with a ridge on all but the constant.

    The ridge grows by tens where rounding (the sums are of float32 products) has made the moments indefinite.
    """
    ridge = (STRENGTH * h.diagonal()[1:].mean()).clamp_min(1e-12)
    while True:
        factor, failed = torch.linalg.cholesky_ex(h + torch.diag(torch.cat([1e-9 * h.new_ones(1), ridge.expand(len(h) - 1)])))
        if not failed:
            return factor
        ridge = 10 * ridge


def repaired_weights(weight: Tensor, m: SecondMoments, removed: Sequence[np.ndarray]) -> list[Repaired]:
    """The weights for several widths. `removed`: for each the inputs that go, bool `(G, C / G)`, each a part of the next.

    Least squares from the inputs that stay, with a ridge on the difference to the weights as they are. The inputs are ordered
    such that those that stay longest come first: then one Cholesky factor holds those of all widths.
    """
    geometry = m.geometry
    w = as_matrix(weight, geometry).double()
    per_channel = w.shape[2] // removed[0].shape[1]
    new = [torch.zeros_like(w) for _ in removed]
    intercepts = [torch.zeros(w.shape[:2], dtype=w.dtype, device=w.device) for _ in removed]
    for g in range(geometry.groups):
        gone_at = np.sum([~r[g] for r in removed], axis=0)  # the number of widths that keep an input
        columns = np.repeat(gone_at, per_channel)
        order = torch.as_tensor(np.argsort(-columns, kind="stable"), device=w.device)
        h = m.mean[g].double()
        index = torch.cat([torch.zeros(1, dtype=order.dtype, device=order.device), order + 1])
        h = h[index][:, index]
        factor = ridge_factor(h)
        rows = w[g][:, order]
        for k in range(len(removed)):
            stay = int((columns > k).sum())
            lost = h[: stay + 1, stay + 1:] @ rows[:, stay:].T
            change = torch.cholesky_solve(lost, factor[: stay + 1, : stay + 1]).T
            new[k][g][:, order[:stay]] = rows[:, :stay] + change[:, 1:]
            intercepts[k][g] = change[:, 0]
    return [Repaired(as_weight(n, weight, geometry).to(weight.dtype), i.flatten().to(weight.dtype))
            for n, i in zip(new, intercepts, strict=True)]
