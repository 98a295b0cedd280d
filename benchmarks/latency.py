"""Milliseconds as a budget: predicted against measured, beside uniform cuts by torch-pruning. For results/latency.

    pip install -e '.[cli,export,compare]' && OMP_NUM_THREADS=1 python benchmarks/latency.py --threads 1 2 --out rows.jsonl

For each network and number of threads: the latency table (measured, or read from `--save`), then plans at half of the
multiply-adds with `round_to` 1, 8 and "auto", one by `latency_ms` at the predicted time of the last of these, and uniform cuts
by torch-pruning (`round_to` 1 and 8, its ratio found by bisection). All of them and the dense network run in turn in one
process. Weights are random, which times do not depend on. Damages are invented, one curve for each group from a fixed seed, so
that plans are as uneven as real ones. `speed-up / cut` is the speed-up divided by (dense MACs / narrow MACs). What `--out` has
is not measured again. Names: those of torchvision, efficientnet-lite0 to 4, and yolo (`yolo.py`, 416 pixels).

    python benchmarks/latency.py --equal imagenet-500 --macs 0.8 --out rows.jsonl

compares, for EfficientNet-Lite1 with its ImageNet weights, a plan by multiply-adds with one by milliseconds at the time that
the first one takes: summed damage, and top-1 after `reconstruct` on images that nothing was fitted on, without training.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import narrower
from narrower.deployment.runtimes import runtime_named
from narrower.deployment.tabulating import time_networks
from narrower.graph.equal_counts import components
from narrower.measuring import macs_of
from narrower.planning.damage import Curve

SHARES = (0.125, 0.25, 0.5, 0.75)
NAMES = ("resnet50", "mobilenet_v2", "efficientnet-lite1", "yolo")


def network(name: str, size: int | None = None) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model: nn.Module
    if name.startswith("efficientnet-lite"):
        from efficientnet_lite_pytorch import EfficientNet

        size = size or {"0": 224, "1": 240, "2": 260, "3": 280, "4": 300}[name[-1]]
        model = EfficientNet.from_name(name)
    elif name.startswith("yolo"):
        from yolo import Yolo

        model, size = Yolo(int(name[4:] or 32)), size or 416
    else:
        import torchvision

        model = torchvision.models.get_model(name, weights=None)
    return model.eval(), torch.randn(1, 3, size or 224, size or 224)


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


def uniform(model: nn.Module, x: torch.Tensor, graph: narrower.Graph, macs: float, round_to: int) -> nn.Module:
    """torch-pruning's cut by the smallest ratio, the same for all layers, that leaves at most `macs`."""
    import torch_pruning as tp
    from yolo import without_chunk

    model = without_chunk(model)
    pinned = {s.tensor.removesuffix(".weight") for g in graph.groups if g.pinned for s in g.slices if s.role == "out"}
    low, high, found = 0.0, 1.0, None
    for _ in range(8):
        ratio, trial = (low + high) / 2, copy.deepcopy(model)
        ignored = [m for n, m in trial.named_modules() if n in pinned and isinstance(m, (nn.Conv2d, nn.Linear))]
        tp.pruner.MagnitudePruner(trial, x, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=ratio,
                                  round_to=round_to, ignored_layers=ignored).step()
        if macs_of(trial, x) <= macs:
            high, found = ratio, trial
        else:
            low = ratio
    assert found is not None, "no ratio leaves so few"
    return found


def table_of(name: str, model: nn.Module, graph: narrower.Graph, x: torch.Tensor, threads: int,
             given: argparse.Namespace) -> narrower.LatencyTable:
    file = Path(given.save) / f"{name}-{x.shape[-1]}-{given.runtime}-{threads}.json"
    if file.exists():
        return narrower.LatencyTable.from_json(file.read_text())
    table = narrower.measure_latency(model, graph, x, runtime=given.runtime, threads=threads, seconds=given.seconds / 40,
                                     cache=Path(given.save) / f"times-{given.runtime}-{threads}.json")
    file.write_text(table.to_json())
    return table


def half(name: str, threads: int, given: argparse.Namespace) -> None:
    """All rows of one network and number of threads."""
    model, x = network(name, given.size)
    graph = narrower.trace(model, x)
    table = table_of(name, model, graph, x, threads, given)
    print(f"\n{name}, {threads} threads\n{table}", flush=True)
    scores, damage = narrower.magnitude(model, graph), invented(graph, given.seed)
    plans = {f"plan, round_to={r}": narrower.plan(graph, scores, macs=given.macs, round_to=r, sensitivity=damage, latency=table)
             for r in (1, 8, "auto")}
    wanted = plans["plan, round_to=auto"].latency_ms
    assert wanted is not None
    plans["plan, latency_ms=same"] = narrower.plan(graph, scores, latency_ms=f"{wanted[1]}ms", sensitivity=damage,
                                                   latency=table)
    modules = {text: narrower.narrow(model, plan) for text, plan in plans.items()}
    dense_macs = macs_of(model, x)
    for r in (1, 8):
        try:
            modules[f"torch-pruning, round_to={r}"] = uniform(model, x, graph, given.macs * dense_macs, r)
        except Exception as error:  # whatever another tool raises
            print(f"torch-pruning, round_to={r}: {type(error).__name__}: {error}", flush=True)
    times = time_networks([model, *modules.values()], x, runtime_named(given.runtime), table.place, given.seconds)
    dense = times[0][0]
    print(f"{'dense':<30} {dense:.2f} ms, spread {times[0][1]:.0%}, {dense_macs / 1e9:.2f} GMACs\n"
          f"{'':<30} MAC cut  predicted   measured  spread   error  speed-up  speed-up / cut  damage")
    for (text, module), (ms, spread) in zip(modules.items(), times[1:], strict=True):
        plan = plans.get(text)
        predicted = plan.latency_ms[1] if plan is not None and plan.latency_ms else float("nan")
        cut = dense_macs / macs_of(module, x)
        loss = total_damage(damage, plan) if plan is not None else float("nan")
        print(f"{text:<30} {cut:>7.3f} {predicted:>7.2f} ms {ms:>7.2f} ms {spread:>6.0%} {predicted / ms - 1:>+7.1%} "
              f"{dense / ms:>9.3f} {dense / ms / cut:>15.3f} {loss:>7.3f}", flush=True)
        keep(given, {"network": name, "threads": threads, "runtime": given.runtime, "row": text, "mac_cut": cut,
                     "dense_ms": dense, "predicted_ms": predicted, "measured_ms": ms, "spread": spread, "speed_up": dense / ms,
                     "speed_up_per_cut": dense / ms / cut, "damage": loss, "place": table.place})


def equal(given: argparse.Namespace) -> None:
    """EfficientNet-Lite1: by multiply-adds, and by milliseconds at the time that the first plan takes."""
    from repair import BATCH, lite, logits, quality

    data = lite(argparse.Namespace(data_dir=Path(given.equal), seed=given.seed, images=given.images, reported=given.reported))
    model, x, threads = data.model, data.images[:1], given.threads[0]
    graph = narrower.trace(model, x)
    batches = data.images.split(BATCH)
    table = table_of("efficientnet-lite1", model, graph, x, threads, given)
    scores, file = narrower.magnitude(model, graph), Path(given.save) / f"damage-{given.images}-{given.seed}.json"
    if not file.exists():
        file.write_text(narrower.sensitivity(model, graph, scores, batches).to_json())
    damage = narrower.Sensitivity.from_json(file.read_text())
    dense = logits(model, data.x)
    print(f"dense {quality(model, data, dense)} on {len(data.labels)} images that nothing is fitted on")
    by_macs = narrower.plan(graph, scores, macs=given.macs, round_to="auto", sensitivity=damage, latency=table)
    (before, _), (ms, _) = time_networks([model, narrower.narrow(model, by_macs)], x, runtime_named(given.runtime),
                                         table.place, given.seconds)
    if ms >= before:
        print(f"the plan by MACs takes {ms:.2f} ms, the dense network {before:.2f} ms: there is no time to spend")
        return
    by_time = narrower.fit_latency(model, graph, scores, x, latency=table, latency_ms=f"{ms / before}x", round_to="auto",
                                   sensitivity=damage).plan
    plans = {"by MACs": by_macs, "by milliseconds": by_time}
    small = {text: narrower.narrow(model, plan) for text, plan in plans.items()}
    times = time_networks([model, *small.values()], x, runtime_named(given.runtime), table.place, given.seconds)
    for (text, plan), (took, spread) in zip(plans.items(), times[1:], strict=True):
        repaired = narrower.reconstruct(model, small[text], plan, batches).model
        found, loss = quality(repaired, data, dense), total_damage(damage, plan)
        share = plan.macs[1] / plan.macs[0]
        print(f"{text:<16} MACs {share:.3f}, {took:.2f} ms of {times[0][0]:.2f} ms (spread {spread:.0%}), damage "
              f"{loss:.4f}, cut {quality(small[text], data, dense)}, reconstructed {found}", flush=True)
        keep(given, {"equal": text, "threads": threads, "macs": share, "ms": took, "dense_ms": times[0][0],
                     "spread": spread, "damage": loss, "reconstructed": found, "place": table.place})


def keep(given: argparse.Namespace, row: dict[str, Any]) -> None:
    with Path(given.out).open("a") as file:
        file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--macs", type=float, default=0.5, help="that may remain")
    parser.add_argument("--save", default="latency-tables", help="folder of tables, times of layers and damages")
    parser.add_argument("--out", default="latency.jsonl", help="a row for each measured network")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each network; for each layer a fortieth")
    parser.add_argument("--size", type=int, help="pixels, instead of the usual")
    parser.add_argument("--seed", type=int, default=0, help="of the invented damages, and of the order of the images")
    parser.add_argument("--equal", metavar="FOLDER", help="of ImageNet images: compare plans at equal time instead")
    parser.add_argument("--images", type=int, default=350, help="with --equal, to fit and measure on")
    parser.add_argument("--reported", type=int, help="with --equal, of the others")
    given = parser.parse_args()
    Path(given.save).mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in Path(given.out).read_text().splitlines()] if Path(given.out).exists() else []
    if given.equal:
        equal(given)
        return
    for name in given.names:
        for threads in given.threads:
            if any((row.get("network"), row["threads"]) == (name, threads) for row in done):
                continue
            torch.set_num_threads(threads)
            half(name, threads, given)


if __name__ == "__main__":
    main()
