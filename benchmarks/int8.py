"""int8 and narrowing together: accuracy and time of the four combinations, in one run.

    pip install -e '.[cli,export]'
    OMP_NUM_THREADS=1 python benchmarks/int8.py cifar --depth 20 --checkpoint resnet20-cifar10-jpeg.pt --data-dir cifar10-jpeg
    OMP_NUM_THREADS=1 python benchmarks/int8.py lite --data-dir imagenet-500 --images 350 --macs 0.8

The networks and images are those of `repair.py`. The narrow network is planned by `obs` and measured damage, with kept widths
that are multiples of `--round-to`, and reconstructed: no training, no labels. Both networks become `.onnx` files for one image,
in float32 and in int8 (`narrower.export` with `--calibration` of the fitted images). Top-1 is that of the files, in ONNX
Runtime, on all reported images. The files are timed in turn, as `narrower.benchmark` times networks.

What `--save` has is not made again: files, and the top-1 of each. A second call only times. `--seconds 0` does not time.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from repair import BATCH, Data, cifar, lite
from torch import nn

import narrower
from narrower.deployment.benchmarking import middle_and_spread, ratio_and_error
from narrower.deployment.formats import Run, open_onnx, open_openvino
from narrower.deployment.layer_times import SETTLE, in_turn, machine
from narrower.measuring import macs_of

FILES = {("dense", "float32"): "dense.onnx", ("dense", "int8"): "dense.int8.onnx",
         ("narrow", "float32"): "narrow.onnx", ("narrow", "int8"): "narrow.int8.onnx"}
OPEN = {"onnxruntime": open_onnx, "openvino": open_openvino}


def narrowed(data: Data, given: argparse.Namespace) -> nn.Module:
    """Without training: cut to the share of multiply-adds, and repaired."""
    batches = data.images.split(BATCH)
    graph = narrower.trace(data.model, data.images[:1])
    scores = narrower.Scores(narrower.obs(data.model, graph, batches))
    damage = narrower.sensitivity(data.model, graph, scores, batches)
    plan = narrower.plan(graph, scores, macs=given.macs, round_to=given.round_to, sensitivity=damage)
    return narrower.reconstruct(data.model, narrower.narrow(data.model, plan), plan, batches).model


def top1(run: Run, data: Data) -> float:
    """Of a file for one image."""
    hits = sum(int(run(data.x[i : i + 1])[0].argmax(1) == label) for i, label in enumerate(data.labels))
    return hits / len(data.labels)


def make_files(data: Data, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Write the four files. Returns what is known of each."""
    facts: dict[str, Any] = {}
    for width, model in (("dense", data.model), ("narrow", narrowed(data, given))):
        for precision in ("float32", "int8"):
            calibration = data.images[: given.calibration].split(1) if precision == "int8" else None
            found = narrower.export(model, data.images[:1], folder / FILES[width, precision], dynamic_batch=False,
                                    calibration=calibration)
            facts[found.path.name] = {"width": width, "precision": precision, "macs": macs_of(model, data.images[:1]),
                                      "bytes": found.size, "difference": found.difference,
                                      "top1": top1(open_onnx(found.path, 1), data), "images": len(data.labels)}
            print(f"{width} {precision}: top-1 {facts[found.path.name]['top1']:.2%}", flush=True)
    return facts


def timed(folder: Path, x: torch.Tensor, runtime: str, threads: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each file, measured in turn."""
    runs = [OPEN[runtime](folder / name, threads) for name in FILES.values()]
    times = in_turn([lambda run=run: run(x) for run in runs], seconds, time.perf_counter, SETTLE if threads > 1 else 0.0)
    rows = []
    for (width, precision), own in zip(FILES, times, strict=True):
        middle, spread = middle_and_spread(own)
        ratio, error = ratio_and_error(times[0], own)
        rows.append({"width": width, "precision": precision, "runtime": runtime, "threads": threads, "ms": 1e3 * middle,
                     "least_ms": 1e3 * min(own), "spread": spread, "ratio": ratio, "rounds": len(own),
                     "ratio_error": error, "machine": machine()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=("cifar", "lite"))
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="of the ResNet")
    parser.add_argument("--depth", type=int, choices=(20, 56), default=20, help="of the ResNet")
    parser.add_argument("--macs", type=float, default=0.5, help="that may remain")
    parser.add_argument("--round-to", type=int, default=8, help="kept widths are multiples of this")
    parser.add_argument("--images", type=int, default=1024, help="fitted and measured on")
    parser.add_argument("--calibration", type=int, default=256, help="of these images, for int8")
    parser.add_argument("--reported", type=int, help="report on so many images, not on all others")
    parser.add_argument("--runtimes", nargs="+", choices=tuple(OPEN), default=["onnxruntime"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each file")
    parser.add_argument("--save", type=Path, default=Path("int8"), help="folder of the files")
    parser.add_argument("--out", type=Path, help="append a row for each measured time")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the images")
    given = parser.parse_args()
    given.save.mkdir(parents=True, exist_ok=True)
    known = given.save / "files.json"
    if not known.exists():
        data = (cifar if given.network == "cifar" else lite)(given)
        facts = make_files(data, given.save, given)
        known.write_text(json.dumps({"files": facts, "shape": list(data.images[:1].shape)}))
    found = json.loads(known.read_text())
    x = torch.randn(found["shape"], generator=torch.Generator().manual_seed(0))
    dense = found["files"][FILES["dense", "float32"]]
    for fact in found["files"].values():
        print(f"{fact['width']:<7} {fact['precision']:<8} top-1 {fact['top1']:.2%} of {fact['images']}, MACs "
              f"{fact['macs'] / dense['macs']:.3f}, {fact['bytes'] / 1e6:.2f} MB")
    for runtime in given.runtimes if given.seconds else ():
        for threads in given.threads:
            print(f"\n{runtime}, {threads} threads, {'x'.join(map(str, found['shape']))}, {machine()}")
            for row in timed(given.save, x, runtime, threads, given.seconds):
                print(f"{row['width']:<7} {row['precision']:<8} {row['ms']:.3f} ms (least {row['least_ms']:.3f}, spread "
                      f"{row['spread']:.0%}), {row['ratio']:.3f} +- {row['ratio_error']:.3f} of dense float32", flush=True)
                if given.out:
                    with given.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
