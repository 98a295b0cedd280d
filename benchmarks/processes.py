"""One process against two of gloo at the same global batch: plan, network and accuracy, and the time of each stage.

    python benchmarks/processes.py --work /tmp/processes
    python benchmarks/processes.py --work /tmp/processes --model cifar_resnet20 --checkpoint resnet20.pt --data-dir cifar10-jpeg

Each route of `narrower prune` runs in one process with batches of `-b` ("one"), in two with half of that and `--sync-bn`
("two-sync"), which should give the same network, and in two that each normalise over their own images ("two"). Each process
has one thread: two cores take the place of two GPUs. Without `--checkpoint` a dense network is trained first, for
`--dense-epochs`. Without `--data-dir` the images are the digits. Other arguments go to every `narrower prune`. Run it on an
idle machine: a core that something else uses as well slows both processes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
ROUTES = {
    "obs": ["--method", "obs"],
    "hrank": ["--method", "hrank"],
    "resrep": ["--method", "resrep"],
}
"""Scored, measured, cut, repaired and trained, by two orders of the channels; and ResRep, of the channels so measured."""


class Way(NamedTuple):
    """How a route is run. `arguments`: of `narrower prune`."""

    name: str
    processes: int
    arguments: list[str]


def run(arguments: list[str], processes: int) -> None:
    """A command of narrower, in one process or several of one thread. Raises CalledProcessError if it fails."""
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    print(f"$ {f'torchrun --nproc-per-node {processes} -m ' if start else ''}narrower", *arguments, flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *start, "-m", "narrower", *arguments], env=environment, check=True)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def seconds(folder: Path) -> dict[str, float]:
    """The time of each stage; that of a training has its epochs and its end in it."""
    stages = [row for row in rows(folder) if "seconds" in row and "epoch" not in row]
    return {row["stage"]: row["seconds"] for row in stages if row["stage"] != "settle"}


def accuracies(folder: Path) -> dict[str, float]:
    """Top-1 in percent after each stage and epoch."""
    return {f"{row['stage']} {row.get('epoch', '')}".strip(): row["top1"] for row in rows(folder) if "top1" in row}


def plan_difference(one: Path, other: Path) -> str:
    """In how many of the channels that one of two plans keeps they differ, and by how much in the width of a group at most."""
    keeps = [{g: set(k) for g, k in json.loads((folder / "plan.json").read_text())["keep"].items()} for folder in (one, other)]
    pairs = [(keeps[0][group], keeps[1][group]) for group in keeps[0]]
    channels, width = sum(len(a ^ b) for a, b in pairs), max(abs(len(a) - len(b)) for a, b in pairs)
    return "the same plan" if not channels else f"plans differ in {channels} channels, in {width} at most by width"


def weight_difference(one: Path, other: Path) -> str:
    """The largest difference of the final weights, relative to the largest of their tensor."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    if any(first[name].shape != second[name].shape for name in first):
        return "weights of other shapes"
    pairs = [(first[name].double(), second[name].double()) for name in first]
    return f"weights differ by {max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in pairs):.1e}"


def table(title: str, columns: dict[str, dict[str, float]], ratios: bool = False) -> None:
    """Print a column of figures for each run, and the first as a multiple of each other one."""
    first, *others = columns
    heads = [*columns, *(f"{first} / {name}" for name in others if ratios)]
    print(f"  {title:24}" + "".join(f"{head:>16}" for head in heads))
    for row in columns[first]:
        found = [column.get(row, float("nan")) for column in columns.values()]
        found += [found[0] / max(1e-9, value) for value in found[1:] if ratios]
        print(f"  {row:24}" + "".join(f"{value:16.2f}" for value in found))


def report(route: str, folders: dict[str, Path]) -> None:
    """Print what two processes found and took, against one."""
    print(f"\n{route}")
    one, *others = folders
    for name in others:
        print(f"  {name}: {plan_difference(folders[one], folders[name])}, {weight_difference(folders[one], folders[name])}")
    table("top-1 in percent", {name: accuracies(folder) for name, folder in folders.items()})
    times = {name: seconds(folder) for name, folder in folders.items()}
    table("seconds", {name: {**column, "all": sum(column.values())} for name, column in times.items()}, ratios=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/narrower-processes"))
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=["obs", "resrep"])
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("-b", "--batch-size", type=int, default=128, help="of all processes together")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--dense-epochs", type=int, default=5)
    given, others = parser.parse_known_args()
    common = ["--model", given.model, "--img-size", str(given.img_size), "--device", "cpu", "--workers", "0"]
    common += ["--data-dir", str(given.data_dir)] if given.data_dir else []
    given.work.mkdir(parents=True, exist_ok=True)
    dense = given.work / "dense"
    if given.checkpoint is None:
        run(["train", *common, "-b", str(given.batch_size), "--epochs", str(given.dense_epochs), "--output", str(dense),
             "--overwrite"], 1)
    checkpoint = given.checkpoint or dense / "model.safetensors"
    half = str(given.batch_size // 2)
    ways = (Way("one", 1, ["-b", str(given.batch_size)]), Way("two-sync", 2, ["-b", half, "--sync-bn"]),
            Way("two", 2, ["-b", half]))
    pruning = ["prune", *common, "--checkpoint", str(checkpoint), "--epochs", str(given.epochs), "--no-report", *others]
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, one thread a process")
    for route in given.routes:
        folders = {way.name: given.work / f"{route}-{way.name}" for way in ways}
        for way in ways:
            shutil.rmtree(folders[way.name], ignore_errors=True)
            run([*pruning, *ROUTES[route], *way.arguments, "--output", str(folders[way.name])], way.processes)
        report(route, folders)


if __name__ == "__main__":
    main()
