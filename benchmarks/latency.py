"""Milliseconds as a budget: predicted against measured, and what widths that a runtime likes are worth. For results/latency.

    pip install -e '.[cli,export]' && OMP_NUM_THREADS=1 python benchmarks/latency.py resnet50 mobilenet_v2 \
        --cache times.json --save folder

For each network: the latency table (measured, or read from `--save`), then plans at half of the multiply-adds with
`round_to` 1, 8 and "auto", one by `latency_ms` at the predicted time of the last of these, and one of equal shares. All narrow
networks and the dense one run in turn in one process. Weights are random, which times do not depend on. Damages are
invented, one curve for each group from a fixed seed, so that plans are as uneven as real ones; `gain` is the speed-up divided
by (dense MACs / narrow MACs), and `damage` the sum of the invented ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

import narrower
from narrower.deployment.runtimes import runtime_named
from narrower.deployment.tabulating import time_networks
from narrower.graph.equal_counts import components
from narrower.planning.damage import Curve

SHARES = (0.125, 0.25, 0.5, 0.75)


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if name.startswith("efficientnet-lite"):
        from efficientnet_lite_pytorch import EfficientNet

        size = {"0": 224, "1": 240, "2": 260, "3": 280, "4": 300}[name[-1]]
        return EfficientNet.from_name(name).eval(), torch.randn(1, 3, size, size)
    import torchvision

    return torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)


def invented(graph: narrower.Graph, seed: int) -> narrower.Sensitivity:
    """Damages that grow with the square of the share, by a factor of its own for each group."""
    rng = np.random.default_rng(seed)
    curves = []
    for part in components(graph):
        factor = float(np.exp(rng.normal(0, 1.0)))
        curves.append(Curve(tuple(dict.fromkeys(c.group for c in part.cells)), SHARES, tuple(factor * s * s for s in SHARES)))
    return narrower.Sensitivity(tuple(curves), "kl", 0)


def total_damage(damage: narrower.Sensitivity, plan: narrower.Plan) -> float:
    total = 0.0
    for curve in damage.curves:
        sizes = {n: plan.graph[n].size for n in curve.groups}
        kept = sum(len(plan.keep[n]) for n in curve.groups)
        total += damage.damage(curve.groups, 1 - kept / sum(sizes.values()))
    return total


def table_of(name: str, model: nn.Module, graph: narrower.Graph, x: torch.Tensor,
             given: argparse.Namespace) -> narrower.LatencyTable:
    file = Path(given.save) / f"{name}-{given.runtime}-{given.threads}.json"
    if file.exists():
        return narrower.LatencyTable.from_json(file.read_text())
    table = narrower.measure_latency(model, graph, x, runtime=given.runtime, threads=given.threads, cache=given.cache)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(table.to_json())
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["resnet50", "mobilenet_v2", "efficientnet-lite1"])
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", help="times of layers, kept for other networks")
    parser.add_argument("--save", default="latency-tables", help="folder of the tables")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each network")
    parser.add_argument("--seed", type=int, default=0, help="of the invented damages")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in given.names:
        model, x = network(name)
        graph = narrower.trace(model, x)
        table = table_of(name, model, graph, x, given)
        print(f"\n{name}\n{table}", flush=True)
        scores, damage = narrower.magnitude(model, graph), invented(graph, given.seed)
        plans = {f"macs=0.5, round_to={r}": narrower.plan(graph, scores, macs=0.5, round_to=r, sensitivity=damage,
                                                          latency=table)
                 for r in (1, 8, "auto")}
        wanted = plans["macs=0.5, round_to=auto"].latency_ms
        assert wanted is not None
        plans["latency_ms=same"] = narrower.plan(graph, scores, latency_ms=f"{wanted[1]}ms", sensitivity=damage, latency=table)
        plans["equal shares, round_to=auto"] = narrower.plan(graph, scores, macs=0.5, round_to="auto", latency=table)
        modules = [model, *(narrower.narrow(model, plan) for plan in plans.values())]
        times = time_networks(modules, x, runtime_named(given.runtime), table.place, given.seconds)
        dense = times[0][0]
        print(f"{'plan':<30} predicted  measured  spread   error   time  MACs   gain  damage  (dense {dense:.2f} ms)")
        for (text, plan), (ms, spread) in zip(plans.items(), times[1:], strict=True):
            assert plan.latency_ms is not None
            macs = plan.macs[1] / plan.macs[0]
            print(f"{text:<30} {plan.latency_ms[1]:>6.2f} ms {ms:>6.2f} ms {spread:>6.0%} {plan.latency_ms[1] / ms - 1:>+7.1%} "
                  f"{ms / dense:>6.3f} {macs:>5.3f} {macs / (ms / dense):>6.3f} {total_damage(damage, plan):>7.3f}", flush=True)
        print(json.dumps({"dense": times[0], "seed": given.seed}))


if __name__ == "__main__":
    main()
