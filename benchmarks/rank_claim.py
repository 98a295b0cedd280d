"""HRank's claim looked at: is the rank of a filter's maps the same for all images, and does it tell what removing it costs?

    python benchmarks/rank_claim.py --checkpoint resnet20-cifar10-jpeg.pt --data-dir cifar10-jpeg --output results/rank

Writes `rank.json` and three pictures (extra `compare`): `batches.svg`, the average rank of each filter in each of five batches
of 128 training images (the paper's figure 2); `settling.svg`, Spearman's correlation in each layer of the order by fewer
images with that by 1,000; and `damage.svg`, the correlation of scores with the damage of removing a filter alone:
KL(dense || cut) on validation images, nothing repaired. `--depth 56` takes ResNet-56, `--every 3` each third group (with all
its filters).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor, nn

import narrower
from narrower.graph.types import ChannelGroup, Graph, Scores
from narrower.models.checkpoints import load_checkpoint
from narrower.models.resnet import cifar_resnet20, cifar_resnet56
from narrower.repair.comparison import kl_divergence

BATCHES, BATCH, SETTLED = 5, 128, 1000
COUNTS = (10, 30, 100, 300)
SHOWN = 6  # groups in the first picture


def spearman(a: Tensor, b: Tensor) -> float:
    """0 where all values are equal."""
    return float(spearmanr(a.numpy(), b.numpy()).statistic) if len(set(a.tolist())) > 1 and len(set(b.tolist())) > 1 else 0.0


@torch.no_grad()
def damages(model: nn.Module, group: ChannelGroup, x: Tensor, dense: Tensor) -> Tensor:
    """`(C,)`: the divergence of the outputs where one channel reaches none of its readers."""
    named, found = dict(model.named_parameters()), []
    readers = [s for s in group.slices if s.role == "in"]
    for channel in range(group.size):
        before = {s.tensor: named[s.tensor].clone() for s in readers}
        for s in readers:
            at = torch.from_numpy(s.positions[s.channels == channel])
            named[s.tensor].index_fill_(s.dim, at, 0)
        found.append(kl_divergence(dense, model(x)) / len(x))
        for name, value in before.items():
            named[name].copy_(value)
    return torch.tensor(found)


def all_scores(model: nn.Module, graph: Graph, x: Tensor, y: Tensor) -> dict[str, Scores]:
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    return {
        "hrank": narrower.hrank(model, graph, batches), "magnitude": narrower.magnitude(model, graph),
        "fpgm": narrower.fpgm(model, graph), "taylor": narrower.taylor(model, graph, batches, F.cross_entropy),
        "obs": narrower.obs(model, graph, batches), "random": narrower.random(graph),
    }  # fmt: skip


def look(model: nn.Module, x: Tensor, y: Tensor, held: Tensor, every: int) -> dict[str, Any]:
    """All figures, by group."""
    graph = narrower.trace(model, x[:1])
    groups = [g for g in graph.free if any(s.role == "in" for s in g.slices)][::every]
    parts = [narrower.hrank(model, graph, [batch]) for batch in x.split(BATCH)[:BATCHES]]
    settled = narrower.hrank(model, graph, x.split(BATCH), images=SETTLED)
    fewer = {count: narrower.hrank(model, graph, x.split(BATCH), images=count) for count in COUNTS}
    scores = all_scores(model, graph, x[: 4 * BATCH], y[: 4 * BATCH])
    with torch.no_grad():
        dense = model(held)
    found = {}
    for group in groups:
        ranks, cost = torch.stack([p[group.name] for p in parts]), damages(model, group, held, dense)
        found[group.name] = {
            "ranks": ranks.tolist(),
            "spread_over_batches": float(ranks.std(0).mean()),
            "spread_over_filters": float(ranks.mean(0).std()),
            "same_order_as_1000": {count: spearman(f[group.name], settled[group.name]) for count, f in fewer.items()},
            "damage": cost.tolist(),
            "predicts_damage": {name: spearman(s[group.name], cost) for name, s in scores.items()},
        }
        print(group.name, *(f"{name} {rho:+.2f}" for name, rho in found[group.name]["predicts_damage"].items()), flush=True)
    return found


def pictures(found: dict[str, Any]) -> dict[str, Figure]:
    batches, settling, damage = (Figure(figsize=size, layout="constrained") for size in ((10, 5), (5, 3.5), (9, 3.5)))
    shown = [list(found)[round(n)] for n in torch.linspace(0, len(found) - 1, min(SHOWN, len(found))).tolist()]
    for axes, name in zip(batches.subplots(2, 3).flat, shown, strict=False):
        axes.imshow(torch.tensor(found[name]["ranks"]), aspect="auto", interpolation="nearest")
        values = torch.tensor(found[name]["ranks"])
        axes.set(title=f"{name}, rank {float(values.min()):.1f} to {float(values.max()):.1f}", xlabel="filter", ylabel="batch")
    axes = settling.subplots()
    for count in COUNTS:
        values = [of["same_order_as_1000"][count] for of in found.values()]
        axes.plot([count] * len(values), values, "o", color="tab:blue", alpha=0.4)
        axes.plot(count, statistics.mean(values), "k_", markersize=20)
    axes.set(xscale="log", xlabel="images", ylabel="Spearman with the order by 1,000", ylim=(-0.05, 1.05))
    axes = damage.subplots()
    for number, score in enumerate(next(iter(found.values()))["predicts_damage"]):
        values = [of["predicts_damage"][score] for of in found.values()]
        axes.plot([number] * len(values), values, "o", alpha=0.4)
        axes.plot(number, statistics.mean(values), "k_", markersize=20)
    axes.set_xticks(range(number + 1), list(next(iter(found.values()))["predicts_damage"]))
    axes.axhline(0, color="grey", linewidth=1)
    axes.set(ylabel="Spearman with the damage", ylim=(-1.05, 1.05))
    return {"batches": batches, "settling": settling, "damage": damage}


def summary(found: dict[str, Any]) -> str:
    ratios = [of["spread_over_batches"] / max(1e-9, of["spread_over_filters"]) for of in found.values()]
    lines = [f"spread of a filter's rank over batches / spread over the filters of a layer: {statistics.mean(ratios):.3f}"]
    lines += [f"order by {count} images with that by {SETTLED}: "
              f"{statistics.mean(of['same_order_as_1000'][count] for of in found.values()):.3f}" for count in COUNTS]
    for score in next(iter(found.values()))["predicts_damage"]:
        values = [of["predicts_damage"][score] for of in found.values()]
        lines.append(f"{score} with the damage: mean {statistics.mean(values):+.2f}, {min(values):+.2f} to {max(values):+.2f}, "
                     f"{len(values)} groups")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--depth", type=int, choices=(20, 56), default=20)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--held", type=int, default=256, help="validation images that damage is measured on")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    from narrower.data.sources import Reading, open_data

    data = open_data("folder", args.data_dir, Reading(flip=0.0))
    take = torch.Generator().manual_seed(0)
    train, val = data.train, data.val
    index = torch.randperm(len(train), generator=take)[: 8 * BATCH].tolist()
    x, y = train.__getitems__(index)
    held, _ = val.__getitems__(torch.randperm(len(val), generator=take)[: args.held].tolist())
    model = load_checkpoint(cifar_resnet20() if args.depth == 20 else cifar_resnet56(), args.checkpoint).eval()
    found = look(model, x, y, held, args.every)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "rank.json").write_text(json.dumps(found) + "\n")
    for name, figure in pictures(found).items():
        figure.savefig(args.output / f"{name}.svg", metadata={"Date": None})
    print(summary(found))


if __name__ == "__main__":
    main()
