"""What ResRep costs in training: a step at the start, and a whole run with live narrowing, against plain training.

    python benchmarks/resrep.py

A CIFAR ResNet-56 on random images. The three kinds of step (plain SGD; narrower's ResRep; the way of the authors' code: a 1x1
Conv2d module behind each BatchNorm, masks multiplied into the gradient of every compactor) are taken in turn, and the median
counts. For the whole run the dense network and ResRep (budget 47 % of the MACs, the default schedule, channels at zero taken
out ten times) train for as many steps, in alternating slices.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrower
from narrower.models.resnet import BasicBlock, cifar_resnet56

Step = Callable[[Tensor, Tensor], None]


def stepping(model: nn.Module, optimizer: torch.optim.Optimizer, amp: bool, before: Callable[[], None] = lambda: None) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        before()
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain(model: nn.Module, amp: bool) -> Step:
    return stepping(model, torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=1e-4, nesterov=True), amp)


def ours(model: nn.Module, steps: int, amp: bool, settings: narrower.Forgetting | None = None) -> tuple[Step, narrower.ResRep]:
    graph = narrower.trace(model, torch.zeros(1, 3, 32, 32))
    resrep = narrower.ResRep(model, graph, macs=0.47, steps=steps, settings=settings)
    optimizer = torch.optim.SGD(resrep.param_groups(0.01, weight_decay=1e-4, momentum=0.9, nesterov=True))
    resrep.attach(optimizer)
    return stepping(model, optimizer, amp), resrep


def theirs(model: nn.Module, amp: bool) -> Step:
    compactors = []
    for block in model.modules():
        if isinstance(block, BasicBlock):
            width = block.bn1.num_features
            conv = nn.Conv2d(width, width, 1, bias=False)
            nn.init.dirac_(conv.weight)
            compactors.append(conv)
            block.bn1 = nn.Sequential(block.bn1, conv)  # type: ignore[assignment]
    own = {id(c.weight) for c in compactors}
    groups = [{"params": [p for p in model.parameters() if id(p) not in own]},
              {"params": [c.weight for c in compactors], "momentum": 0.99, "weight_decay": 0.0}]
    masks = [torch.ones(c.out_channels, 1, 1, 1) for c in compactors]

    def rule() -> None:
        for c, mask in zip(compactors, masks, strict=True):
            w = c.weight.data
            c.weight.grad = mask * c.weight.grad + 1e-4 * w * (w**2).sum((1, 2, 3), keepdim=True) ** -0.5

    return stepping(model, torch.optim.SGD(groups, 0.01, 0.9, weight_decay=1e-4, nesterov=True), amp, rule)


def timed(step: Step, x: Tensor, y: Tensor) -> float:
    start = time.perf_counter()
    step(x, y)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15, help="steps of each kind, at the start")
    parser.add_argument("--steps", type=int, default=200, help="of the whole run")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    args = parser.parse_args()
    torch.manual_seed(0)
    x, y = torch.randn(args.batch, 3, 32, 32), torch.randint(0, 10, (args.batch,))
    model = cifar_resnet56().train()
    kinds = {"plain": plain(copy.deepcopy(model), args.amp), "narrower": ours(copy.deepcopy(model), 10**6, args.amp)[0],
             "authors' way": theirs(copy.deepcopy(model), args.amp)}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(args.rounds + 2):
        for name, step in kinds.items():
            times[name].append(timed(step, x, y))
    medians = {name: statistics.median(t[2:]) for name, t in times.items()}
    kind = "bfloat16" if args.amp else "float32"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {args.batch}, {kind}")
    for name, value in medians.items():
        print(f"step, {name:<13} {1e3 * value:8.1f} ms  {value / medians['plain']:.2f}x")

    dense = plain(copy.deepcopy(model), args.amp)
    narrow, resrep = ours(copy.deepcopy(model), args.steps, args.amp)
    sums = {"dense": 0.0, "resrep": 0.0}
    shrinks = 0
    for _ in range(10):
        for name, step in (("dense", dense), ("resrep", narrow)):
            for _ in range(args.steps // 10):
                sums[name] += timed(step, x, y)
        start = time.perf_counter()
        if resrep.waiting() >= 0.05:
            resrep.shrink()
            shrinks += 1
        sums["resrep"] += time.perf_counter() - start
    print(f"whole run of {args.steps} steps: dense {sums['dense']:.1f} s, ResRep {sums['resrep']:.1f} s, "
          f"{sums['resrep'] / sums['dense']:.2f}x; {shrinks} shrinks, {resrep.reached():.1%} of the MACs remain")


if __name__ == "__main__":
    main()
