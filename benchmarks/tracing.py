"""trace + plan + narrow against torch-pruning, in one run: seconds and ratios, one thread, 224 px.

    pip install torch-pruning==1.6.1 && python benchmarks/tracing.py

Both take half of the channels of every layer that can lose some, at random. Each pair of runs is on fresh copies of one
model, in turn; the median of the repetitions counts.
torch-pruning is called as its README recommends, with the classifier left alone.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
import warnings

import torch
from torch import nn

import narrower

MODELS = ("torchvision/resnet50", "torchvision/densenet121", "mobilenetv3_large_100", "efficientnet_b0")


def ours(model: nn.Module, x: torch.Tensor) -> float:
    start = time.perf_counter()
    graph = narrower.trace(model, x)
    plan = narrower.plan(graph, narrower.random(graph), remove=0.5)
    narrower.narrow(model, plan)
    return time.perf_counter() - start


def theirs(model: nn.Module, x: torch.Tensor) -> float:
    import torch_pruning as tp

    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    start = time.perf_counter()
    importance = tp.importance.RandomImportance()
    pruner = tp.pruner.BasePruner(model, x, importance=importance, pruning_ratio=0.5, ignored_layers=[last])
    pruner.step()
    return time.perf_counter() - start


def main() -> None:
    from narrower.models import make_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    x = torch.randn(1, 3, 224, 224)
    ratios = []
    print(f"{'model':28s} {'narrower s':>10s} {'peer s':>8s} {'ratio':>6s}")
    for name in args.models:
        model = make_model(name, num_classes=97).eval()
        ours(copy.deepcopy(model), x)
        theirs(copy.deepcopy(model), x)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(args.repeats):
            for run, into in ((ours, times[0]), (theirs, times[1])):
                into.append(run(copy.deepcopy(model), x))
        a, b = (statistics.median(t) for t in times)
        ratios.append(a / b)
        print(f"{name:28s} {a:10.3f} {b:8.3f} {a / b:6.2f}", flush=True)
    print(f"geometric mean of the ratios: {math.exp(statistics.fmean(map(math.log, ratios))):.2f}")


if __name__ == "__main__":
    main()
