"""Is the damage that `sensitivity` measures that of the network which `narrow` returns?

    pip install -e '.[cli]' && python benchmarks/damages.py mobilenetv3_small_050 torchvision/resnet18 convnext_atto

Each network, with random weights and statistics in float64, loses half of some groups, one group at a time and without
repair: once as `sensitivity` measures it, by a replay of the recorded forward from the first call that changes, and once as
`narrow` makes it. Printed: the largest relative difference of the two damages, how many groups were compared, and the
seconds of `sensitivity`.
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch
from torch import Tensor, nn

import narrower
from narrower.allocation import measure
from narrower.models import make_model
from narrower.repair.comparison import divergences


def network(name: str) -> nn.Module:
    """In float64, with BatchNorm statistics that are not those of a fresh network."""
    torch.manual_seed(0)
    model = make_model(name, 97).double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            module.running_var.uniform_(0.5, 1.5)
            assert module.running_mean is not None
            module.running_mean.normal_(0, 0.1)
    return model


def compared(model: nn.Module, images: Tensor, groups: int) -> str:
    """A line for one network; so many of its groups are compared."""
    graph = narrower.trace(model, images[:2])
    scores = narrower.random(graph)
    began = time.perf_counter()
    found = narrower.sensitivity(model, graph, scores, [images], shares=(0.5,), measure="relative")
    seconds = time.perf_counter() - began
    alone = [curve for curve in found.curves if len(curve.groups) == 1]  # groups with tied counts round together
    judges = images[measure.MEASURED - 1 :: measure.MEASURED]
    worst, count = 0.0, 0
    for curve in alone[:: max(1, -(-len(alone) // groups))]:
        plan = narrower.plan(graph, scores, remove={curve.groups[0]: curve.shares[0] + 1e-9})
        if sum(len(kept) < graph[name].size for name, kept in plan.keep.items()) > 1:
            continue  # the name is also that of a layer in another group
        count += 1
        want = divergences(model, [narrower.narrow(model, plan)], [(judges, len(judges))], "relative")[0][0]
        worst = max(worst, abs(curve.damages[0] - want) / max(want, 1e-12))
    return f"largest difference {worst:.1e} in {count} of {len(found.curves)} curves, {seconds:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", help="names as narrower --model takes them")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--groups", type=int, default=6, help="how many groups are compared")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    measure.second_moments = lambda *_: {}  # type: ignore[assignment]  # no repair
    torch.set_num_threads(1)
    for name in args.models:
        images = torch.randn(12, 3, args.size, args.size, dtype=torch.float64)
        try:
            print(f"{name}: {compared(network(name), images, args.groups)}", flush=True)
        except narrower.NarrowerError as error:
            print(f"{name}: {error}", flush=True)


if __name__ == "__main__":
    main()
