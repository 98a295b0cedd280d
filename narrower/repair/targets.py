"""What the dense network makes where the narrow one is to be repaired: the targets of `reconstruct`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .held_out import images_at
from .held_out import joined as joined_images
from .patches import Positions, joined, sample_positions, values_at
from .watching import LayerCall, LayerWatch, Stream

ROUNDING = 1e-2  # a batch of other size rounds otherwise; other images differ by far more


class Target(NamedTuple):
    """The dense outputs of a layer at sampled positions, kept channels only: `(P, O)`, on the CPU.

    `stream`: the sum that the layer's output goes into, if any, and `total` `(P, O)`: that sum.
    """

    at: Positions
    out: Tensor
    stream: Stream | None
    total: Tensor | None


class TargetWatch(LayerWatch):
    """Takes the targets of every layer from forwards of the dense network, batch by batch.

    `kept`: the output channels that the narrow layer has. `per_image`: how many positions of each image are sampled.
    """

    def __init__(self, model: nn.Module, kept: Mapping[str, Tensor], per_image: Mapping[str, int]) -> None:
        super().__init__(model, kept)
        self.kept, self.per_image = kept, per_image
        self.generator = torch.Generator().manual_seed(0)
        self.sampled: dict[str, list[Positions]] = {}
        self.rows: dict[str, list[int]] = {}
        self.outs: dict[str, list[Tensor]] = {}
        self.totals: dict[str, list[Tensor]] = {}
        self.batches: list[int] = []
        self.unseen: dict[str, str] = {}

    def layer(self, call: LayerCall) -> Tensor:
        out, name = call.run(), call.weight
        if self.uses[name] > 1:
            self.unseen[name] = "its weight is used more than once"
        elif len(out) % self.images:
            self.unseen[name] = f"its {len(out)} rows are not as many for each of {self.images} images"
        else:
            at = sample_positions(out, self.images, self.per_image[name], self.generator)
            self.sampled.setdefault(name, []).append(at)
            self.rows.setdefault(name, []).append(len(out))
            self.outs.setdefault(name, []).append(self.taken(name, out))
        return out

    def taken(self, name: str, out: Tensor) -> Tensor:
        """The kept channels of an output at the sampled positions of this batch, on the CPU: those of all layers together are
        more than a GPU may have room for."""
        return values_at(out, self.sampled[name][-1])[:, self.kept[name]].cpu()

    def finished(self, number: int, out: Tensor) -> None:
        for name, stream in self.streams.items():
            if stream.addition == number and name in self.sampled:
                self.totals.setdefault(name, []).append(self.taken(name, out))

    def targets(self) -> dict[str, Target]:
        """The targets of all layers that were seen once in each forward."""
        found = {}
        for name, parts in self.sampled.items():
            if name in self.unseen:
                continue
            whole = len(self.totals.get(name, ())) == len(parts)
            found[name] = Target(joined(parts, self.batches, self.rows[name]), torch.cat(self.outs.pop(name)),
                                 self.streams[name] if whole else None, torch.cat(self.totals.pop(name)) if whole else None)
        return found


class InputWatch(LayerWatch):
    """Keeps what each layer reads first."""

    def __init__(self, model: nn.Module, weights: Iterable[str]) -> None:
        super().__init__(model, weights)
        self.read: dict[str, Tensor] = {}

    def layer(self, call: LayerCall) -> Tensor:
        self.read.setdefault(call.weight, call.x)
        return call.run()


def out_of_order(model: nn.Module, weights: Iterable[str], inputs: Sequence[tuple[Any, int]]) -> list[str]:
    """The layers whose rows do not stand image by image, as in `encoder(torch.cat([a, b]))` or where sequences come first.

    The first image alone and with a second one: its rows are then no longer the first ones.
    """
    images = images_at(joined_images([x for x, _ in inputs[:2]]), torch.tensor([0, 1]))
    alone, both = InputWatch(model, weights), InputWatch(model, weights)
    alone.run(images_at(images, torch.tensor([0])), 1)
    both.run(images, 2)
    found = []
    for name, x in alone.read.items():
        y = both.read[name][: len(x)] if name in both.read else x[:0]
        if len(x) > 1 and (y.shape != x.shape or bool((y - x).norm() > ROUNDING * x.norm())):
            found.append(name)
    return found


def dense_targets(model: nn.Module, kept: Mapping[str, Tensor], per_image: Mapping[str, int],
                  inputs: Sequence[tuple[Any, int]]) -> tuple[dict[str, Target], dict[str, str], frozenset[int]]:
    """One forward of the dense network over `inputs` (with their numbers of images): the targets of the layers with the weights
    in `kept`, why others have none, and the calls whose output one other call reads."""
    watch = TargetWatch(model, kept, per_image)
    watch.unseen = dict.fromkeys(out_of_order(model, kept, inputs), "its rows do not stand image by image")
    for batch, images in inputs:
        watch.run(batch, images)
        watch.batches.append(images)
    targets = watch.targets()
    silent = dict.fromkeys(kept, "no convolution or linear layer reads it as it is")
    return targets, {n: watch.unseen.get(n, why) for n, why in silent.items() if n not in targets}, watch.read_once()
