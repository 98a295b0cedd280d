"""`narrower.scores.rank` against one batched `torch.linalg.matrix_rank`, on the maps inside a CIFAR ResNet-56.

    python benchmarks/rank.py --checkpoint resnet56-cifar10-jpeg.pt --data-dir cifar10-jpeg/train

The maps are the inputs of every convolution but the first. Without a checkpoint the weights are a seeded
initialisation, without a data folder the images are seeded noise: good for timing, not for judging agreement.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from narrower.models.checkpoints import load_checkpoint
from narrower.models.resnet import cifar_resnet56
from narrower.scores.matrix_rank import rank

MEAN, STD = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))


def load_images(folder: Path | None, count: int, seed: int) -> Tensor:
    """Images [count, 3, 32, 32], normalised, drawn at random from all files of a folder."""
    if folder is None:
        coarse = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        return nn.functional.interpolate(coarse, size=32, mode="bilinear")
    from PIL import Image

    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    if len(files) < count:
        raise SystemExit(f"{folder} holds {len(files)} images, {count} were asked for (--images)")
    random.Random(seed).shuffle(files)
    pixels = numpy.stack([numpy.asarray(Image.open(path).convert("RGB").resize((32, 32))) for path in files[:count]])
    return ((torch.from_numpy(pixels) / 255 - MEAN) / STD).permute(0, 3, 1, 2)


def collect_maps(model: nn.Module, images: Tensor) -> dict[int, Tensor]:
    """All maps read by the convolutions behind the first, by size: {side: [number, side, side]}."""
    found: dict[int, list[Tensor]] = {}

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        maps = inputs[0].flatten(0, 1)
        found.setdefault(maps.shape[-1], []).append(maps.clone())

    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    hooks = [conv.register_forward_pre_hook(keep) for conv in convs[1:]]
    with torch.inference_mode():
        for batch in images.split(64):
            model(batch)
    for hook in hooks:
        hook.remove()
    return {side: torch.cat(parts) for side, parts in found.items()}


def timed(function: Callable[[Tensor], Tensor], maps: Tensor) -> tuple[Tensor, float]:
    start = time.perf_counter()
    result = function(maps)
    return result, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="weights of a CIFAR ResNet-56")
    parser.add_argument("--data-dir", type=Path, help="a folder of images, searched with its subfolders")
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    model = cifar_resnet56().train()  # a fresh network needs the statistics of its batch
    if args.checkpoint:
        load_checkpoint(model, args.checkpoint).eval()
    print(f"weights: {args.checkpoint or 'seeded, untrained'}")
    print(f"images: {args.images} of {args.data_dir or 'seeded noise'}")
    all_maps = collect_maps(model, load_images(args.data_dir, args.images, args.seed))
    load = os.getloadavg()[0]
    print(f"torch {torch.__version__}, {args.threads} threads, load {load:.1f}; medians of {args.repeats} repeats")
    print("   maps   number differ   agreement  matrix_rank       rank  ratio (lowest, highest)")
    for side, maps in sorted(all_maps.items()):
        rank(maps[:10000]), torch.linalg.matrix_rank(maps[:1000])  # warm up
        pairs = []
        for _ in range(args.repeats):
            theirs, slow = timed(torch.linalg.matrix_rank, maps)
            ours, fast = timed(rank, maps)
            pairs.append((slow, fast))
        differ = int((theirs != ours).sum())
        slow, fast = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = sorted(slow / fast for slow, fast in pairs)
        size, agreement = f"{side}x{side}", 1 - differ / len(maps)
        print(
            f"{size:>7} {len(maps):>8} {differ:>6} {agreement:>11.5%} {slow:>10.2f} s {fast:>8.2f} s "
            f"{statistics.median(ratios):>5.1f}x ({ratios[0]:.1f}, {ratios[-1]:.1f})"
        )


if __name__ == "__main__":
    main()
