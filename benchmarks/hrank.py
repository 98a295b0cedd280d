"""HRank scoring of a CIFAR ResNet-56: narrower against the published procedure, in one run.

    python benchmarks/hrank.py --checkpoint resnet56-cifar10-jpeg.pt --data-dir cifar10-jpeg/train

The published procedure takes a forward pass over all images for each of the 55 layers, and one matrix_rank call for each map
of the layer's output. A part of it is timed (one batch's forward; single calls on a sample of the real maps of each size) and
scaled to the whole. narrower takes one pass for all layers: over all images, and with its own stopping rule, whose kept
channels at half the MACs are compared with those of all images. With numba (`pip install 'narrower[fast]'`) ranks take about
half the time; the first call of all compiles them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from rank import collect_maps, load_images
from torch import nn

import narrower
from narrower.models.checkpoints import load_checkpoint
from narrower.models.resnet import cifar_resnet56

BATCH = 128


def published(model: nn.Module, images: torch.Tensor, sample: int, repeats: int) -> float:
    """Seconds of the published procedure on these images, scaled from a part."""
    batch = images[:BATCH]
    forwards = []
    with torch.inference_mode():
        model(batch)
        for _ in range(repeats):
            start = time.perf_counter()
            model(batch)
            forwards.append(time.perf_counter() - start)
    layers = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    total = layers * min(forwards) * len(images) / len(batch)
    made = {32: 19 * 16, 16: 18 * 32, 8: 18 * 64}  # maps of the 55 layers for one image
    generator = torch.Generator().manual_seed(0)
    for side, maps in collect_maps(model, batch[:32]).items():
        chosen = maps[torch.randperm(len(maps), generator=generator)[:sample]]
        start = time.perf_counter()
        for one in chosen:
            torch.linalg.matrix_rank(one).item()
        total += (time.perf_counter() - start) / len(chosen) * made[side] * len(images)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--sample", type=int, default=4000, help="single matrix_rank calls timed for each size")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = cifar_resnet56().eval()
    if args.checkpoint:
        load_checkpoint(model, args.checkpoint)
    images = load_images(args.data_dir, args.images, 0)
    graph = narrower.trace(model, images[:2])
    narrower.hrank(model, graph, images[:32].split(32))
    start = time.perf_counter()
    scores = narrower.hrank(model, graph, images.split(64))
    whole = time.perf_counter() - start
    start = time.perf_counter()
    early = narrower.hrank(model, graph, images.split(64), macs=0.5)
    settled = time.perf_counter() - start
    slow = published(model, images, args.sample, 3)
    kept, kept_early = (narrower.plan(graph, s, macs=0.5).keep for s in (scores, early))
    same = sum(len(np.intersect1d(kept[n], kept_early[n])) for n in kept) / sum(map(len, kept.values()))
    print(f"{args.images} images, {torch.get_num_threads()} threads; seconds")
    print(f"published procedure  {slow:8.1f}  (scaled from a part)")
    print(f"narrower             {whole:8.1f}  {slow / whole:6.1f}x")
    print(f"narrower, settled    {settled:8.1f}  {slow / settled:6.1f}x  keeps {same:.1%} of the same at half the MACs")


if __name__ == "__main__":
    main()
