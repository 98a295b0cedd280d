"""Images to fit on, and images that only judge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..inputs import are_images, arguments_of, flatten_tensors, map_tensors, samples, shapes_of
from ..measuring import check_runs

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
