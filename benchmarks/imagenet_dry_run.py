"""A dry run at ImageNet's sizes: ResRep on ResNet-50 in two processes, interrupted and resumed, against plain training.

    python benchmarks/imagenet_dry_run.py --work /tmp/dry-run

Random JPEGs in WebDataset shards stand for the images: accuracy means nothing here. Reported are images/s in the steps, the
largest resident memory of a process, at which step ResRep was interrupted, and whether the resumed run ended.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = 2
SOON = 0.2  # of the time of the first epoch; the second is faster, as the network is narrower then


class Ended(NamedTuple):
    code: int
    seconds: float
    rss_mb: float


def write_shards(root: Path, images: int, shards: int, seed: int = 0) -> None:
    """Smooth random JPEGs of ImageNet-like sizes, as `train-NNNN.tar` and `validation-NNNN.tar` with timm's `_info.json`."""
    draw, splits = np.random.default_rng(seed), {}
    root.mkdir(parents=True, exist_ok=True)
    for split, count, parts in (("train", images, shards), ("validation", images // 15, PROCESSES)):
        numbers = np.array_split(np.arange(count), parts)
        names = [f"{split}-{k:04d}.tar" for k in range(parts)]
        for name, part in zip(names, numbers, strict=True):
            with tarfile.open(root / name, "w") as tar:
                for number in map(int, part):
                    height, width = draw.integers(330, 500, 2)
                    coarse = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8))
                    jpeg = io.BytesIO()
                    coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(jpeg, "JPEG", quality=90)
                    for end, content in (("jpg", jpeg.getvalue()), ("cls", str(draw.integers(1000)).encode())):
                        member = tarfile.TarInfo(f"{split}{number:06d}.{end}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        lengths = [len(part) for part in numbers]
        splits[split] = {"name": split, "num_samples": count, "filenames": names, "shard_lengths": lengths}
    (root / "_info.json").write_text(json.dumps({"splits": splits}))


def launch(*arguments: str, interrupt_at: Path | None = None) -> Ended:
    """Run a command of narrower in two processes. `interrupt_at`: a run that gets Ctrl-C in the middle of its second epoch."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES), "-m", "narrower", *arguments]
    print("$ torchrun", " ".join(line[3:]), flush=True)
    began = time.perf_counter()
    process = subprocess.Popen(line, env=environment, start_new_session=True)
    while process.poll() is None:
        time.sleep(0.5)
        if interrupt_at is not None and (interrupt_at / "metrics.jsonl").exists() and (done := epochs(interrupt_at, "resrep")):
            time.sleep(SOON * done[0]["seconds"])
            os.killpg(process.pid, signal.SIGINT)
            process.wait()
    return Ended(process.returncode, time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)


def epochs(run: Path, stage: str) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return [row for row in rows if row["stage"] == stage and "epoch" in row]


def only_child_memory(*arguments: str, interrupt_at: Path | None = None) -> Ended:
    """As `launch`, in a process of its own: the largest memory of children is kept for the life of a process."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        ended = launch(*arguments, interrupt_at=interrupt_at)
        os.write(write, json.dumps(ended).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        found = Ended(*json.loads(answer.read()))
    os.waitpid(child, 0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--work", type=Path, default=Path("/tmp/narrower-dry-run"))
    parser.add_argument("--steps", type=int, default=50, help="steps of the optimizer, in two epochs")
    parser.add_argument("-b", "--batch-size", type=int, default=4, help="images per process")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--model", default="torchvision/resnet50")
    given = parser.parse_args()
    shards, work = given.work / "shards", given.work
    images = given.steps * given.batch_size * PROCESSES // 2
    for old in ("train", "resrep", "shards"):
        shutil.rmtree(work / old, ignore_errors=True)
    write_shards(shards, images, 2 * PROCESSES)
    common = ["--model", given.model, "--dataset", "wds/", "--data-dir", str(shards), "--num-classes", "1000", "--img-size",
              str(given.img_size), "-b", str(given.batch_size), "--epochs", "2", "--lr", "0.01", "--recalibrate", "0",
              "--held-out", "0", "--device", "cpu", "--workers", "0"]
    plain = only_child_memory("train", *common, "--output", str(work / "train"))
    resrep = ["prune", *common, "--method", "resrep", "--allocate", "norms", "--prior", "none", "--macs", "0.5", "--no-distill"]
    pretrained = ["--checkpoint", str(work / "train" / "model.safetensors")]
    first = only_child_memory(*resrep, *pretrained, "--output", str(work / "resrep"), interrupt_at=work / "resrep")
    stopped = torch.load(work / "resrep" / "training.checkpoint.pt", weights_only=True)
    second = only_child_memory("prune", "--resume", str(work / "resrep"))

    print(f"{images} images, {given.steps} steps of {given.batch_size} x {PROCESSES}, {given.img_size} px, {given.model}")
    for name, run, stage in (("plain", "train", "train"), ("ResRep", "resrep", "resrep")):
        for row in epochs(work / run, stage):
            print(f"{name:8} epoch {row['epoch']}: {row['images_per_second']:.2f} images/s, loss {row['loss']:.3f}")
    print(f"interrupted in epoch {stopped['epoch'] + 1}, after {stopped['step']} of its {given.steps // 2} steps")
    for name, ended in (("plain", plain), ("ResRep, interrupted", first), ("ResRep, resumed", second)):
        print(f"{name}: exit code {ended.code}, {ended.seconds:.0f} s, at most {ended.rss_mb:,.0f} MB in a process")


if __name__ == "__main__":
    main()
