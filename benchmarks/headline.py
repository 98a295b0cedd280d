"""The README's headline: its tables and picture, from what lies in results/. Nothing in them is written by hand.

    pip install -e '.[report]' && python benchmarks/headline.py

writes the tables between the marks `<!-- headline -->` and `<!-- /headline -->` of README.md, and results/headline.svg.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- headline -->\n", "<!-- /headline -->\n"


class Line(NamedTuple):
    """A line of the first table: folders of runs with 3 and with 10 epochs, and of the dense network trained on for 10."""

    name: str
    macs: str
    three: tuple[str, ...]
    ten: tuple[str, ...]
    dense: str


LINES = (
    Line("ResNet-56, CIFAR-10 (small JPEGs)", "50 %", ("resnet56-obs-50-3-epochs",), ("resnet56-obs-50-10-epochs",),
         "resnet56-dense-10-epochs"),
    Line("ResNet-20, CIFAR-10 (small JPEGs)", "47 %", tuple(f"resnet20-obs-47-3-epochs{s}" for s in ("", "-seed-1", "-seed-2")),
         ("resnet20-obs-47-10-epochs",), "resnet20-dense-10-epochs"),
)  # fmt: skip
SHARES = (
    ("EfficientNet-Lite1, 150 images of ImageNet", "90 %", "0.900"),
    ("EfficientNet-Lite1, 150 images of ImageNet", "80 %", "0.800"),
)
GRIDS = (("50 %", 3, "compare/resnet20-50-3-epochs"), ("50 %", 10, "compare/resnet20-50-10-epochs"),
         ("30 %", 3, "compare/resnet20-30-3-epochs"), ("30 %", 10, "compare/resnet20-30-10-epochs"))  # fmt: skip
ROUTES = {"obs": "**narrower**: cut, repaired, distilled", "magnitude": "narrower, order by L2 norms",
          "hrank": "narrower, order by HRank", "resrep": "ResRep", "soft": "soft pruning", "centripetal:all": "centripetal SGD",
          "dense": "the dense network, trained on",
          "tp-magnitude": "torch-pruning, L2 norms", "tp-group-norm": "torch-pruning, group norms"}  # fmt: skip
NETWORKS = {"resnet50": "ResNet-50", "mobilenet_v2": "MobileNetV2", "efficientnet-lite1": "EfficientNet-Lite1",
            "yolo": "YOLO-style"}
CUTS = {"torch-pruning, round_to=1": "torch-pruning, odd widths", "torch-pruning, round_to=8": "torch-pruning, multiples of 8",
        "plan, round_to=auto": 'narrower, `round_to="auto"`'}  # fmt: skip


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last(folder: Path, stage: str, *, epoch: bool = False) -> float:
    """The last top-1 of a stage, or of its epochs."""
    return float(next(row["top1"] for row in reversed(rows_of(folder)) if row["stage"] == stage and ("epoch" in row) == epoch))


def percent(values: list[float]) -> str:
    """One value, or mean and standard deviation of several."""
    return f"{mean(values):.2f} %" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def accuracy(results: Path) -> str:
    """What is left of a network after so much training."""
    out = ["| network, images | MACs | dense | narrow, no training, no labels | 3 epochs | 10 epochs | dense, 10 epochs more |",
           "|---|---|---|---|---|---|---|"]
    for name, macs, three, ten, dense in LINES:
        runs = [[results / run for run in group] for group in (three, ten)]
        cells = [percent([last(run, "reconstruct") for run in runs[0]]),
                 *(percent([last(run, "fine-tune", epoch=True) for run in group]) for group in runs),
                 percent([last(results / dense, "train")])]
        out.append(f"| {name} | {macs} | {percent([last(runs[0][0], 'evaluate dense')])} | {' | '.join(cells)} |")
    log = (results / "training-free" / "efficientnet-lite1-80-90-obs.txt").read_text()
    for name, macs, share in SHARES:
        figures = re.search(rf"dense (\d+\.\d\d) %.*?MACs {share}[^\n]*targets, \d+ s\) (\d+\.\d\d) %", log, re.DOTALL)
        assert figures is not None
        out.append(f"| {name} | {macs} | {figures[1]} % | {figures[2]} % | | | |")
    return "\n".join(out) + "\n"


def grid(results: Path) -> str:
    """Routes side by side, by the same training. Each budget begins with the column before it, of its first grid."""
    grids = [(budget, epochs, json.loads((results / folder / "compare.json").read_text())) for budget, epochs, folder in GRIDS]
    head, columns, dense = [], [], {f"{one['dense']:.2f} %" for *_, one in grids}
    for k, (budget, epochs, one) in enumerate(grids):
        lines = {of["method"]: of for of in one["lines"]}
        if k == 0 or budget != grids[k - 1][0]:
            head.append(f"{budget} of the MACs, no training")
            columns.append({method: before(of) for method, of in lines.items()})
        head.append(f"{epochs} epochs")
        columns.append({method: after(of) for method, of in lines.items()})
    out = [f"| ResNet-20 (dense {' and '.join(sorted(dense))}) | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    out += [f"| {name} | {' | '.join(column.get(method, '') for column in columns)} |" for method, name in ROUTES.items()]
    return "\n".join(out) + "\n"


def before(of: dict[str, Any]) -> str:
    """Top-1 before the training. Methods that narrow in it have none."""
    in_training = of["method"].partition(":")[0] in ("resrep", "soft", "centripetal", "dense")
    return "" if in_training else f"{of['right_after']:.2f} %"


def after(of: dict[str, Any]) -> str:
    """Top-1 after the training, and how far several seeds spread."""
    return f"{of['last']:.2f} %" + (f" ± {of['spread']:.2f} (n = {of['n']})" if of["spread"] is not None else "")


def speeds(results: Path) -> dict[str, dict[str, float]]:
    """{network: {kind of cut: speed-up}} with one thread, at half of the multiply-adds."""
    found: dict[str, dict[str, float]] = {}
    for row in map(json.loads, (results / "latency" / "rows.jsonl").read_text().splitlines()):
        if row.get("threads") == 1 and row.get("row") in CUTS:
            found.setdefault(row["network"], {})[row["row"]] = row["speed_up"]
    return found


def latency(results: Path) -> str:
    """Measured speed-ups."""
    out = [f"| speed-up at half of the MACs | {' | '.join(CUTS.values())} |", "|---|" + "---|" * len(CUTS)]
    for network, found in speeds(results).items():
        out.append(f"| {NETWORKS[network]} | " + " | ".join(f"{found[cut]:.2f}" for cut in CUTS) + " |")
    return "\n".join(out) + "\n"


def picture(results: Path, file: Path) -> None:
    """Speed-ups as bars."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    found = speeds(results)
    with rc_context({"svg.hashsalt": "narrower", "svg.fonttype": "none"}):  # the same picture, the same bytes
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        axes = figure.subplots()
        for k, (cut, colour) in enumerate(zip(CUTS, ("#b4bcc6", "#7f93a8", "#2f7fc1"), strict=True)):
            bars = axes.bar([i + 0.27 * (k - 1) for i in range(len(found))], [own[cut] for own in found.values()], 0.25,
                            color=colour, label=CUTS[cut].replace("`", ""))
            axes.bar_label(bars, fmt="%.2f", fontsize=8)
        axes.axhline(1, color="#808080", linewidth=1)
        axes.set_xticks(range(len(found)), [NETWORKS[name] for name in found])
        axes.set_ylabel("speed-up at half of the MACs")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=3, frameon=False)
        figure.savefig(file, format="svg", metadata={"Date": None})


def headline(results: Path) -> str:
    """What stands between the marks."""
    return (f"{accuracy(results)}\n{grid(results)}\n{latency(results)}\n"
            "![Speed-up at half of the multiply-adds](results/headline.svg)\n")


def with_headline(text: str, made: str) -> str:
    """The README with this between its marks."""
    before, rest = text.split(START)
    return before + START + made + END + rest.split(END)[1]


def main() -> None:
    results, readme = ROOT / "results", ROOT / "README.md"
    picture(results, results / "headline.svg")
    readme.write_text(with_headline(readme.read_text(), headline(results)))


if __name__ == "__main__":
    main()
