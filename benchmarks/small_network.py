"""Why ResNet-20 at half of the multiply-adds takes more than half of the time: the same pair in several runtimes, in one run.

    pip install -e '.[cli,export]' && OMP_NUM_THREADS=1 python benchmarks/small_network.py [--runtimes eager ...] [--seconds 5]

The narrow network has the same share of the channels of every group (times do not depend on which). `overhead` is the eager
pair on images of 4 x 4 pixels, where there is almost nothing to compute: what is left is the cost of calling some 70 operators,
which narrowing does not change.
"""

from __future__ import annotations

import argparse

import torch

import narrower
from narrower.models import make_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtimes", nargs="*", default=["eager", "onnxruntime", "compile"])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--batch-sizes", nargs="*", type=int, default=[1, 32])
    parser.add_argument("--round-to", type=int, default=1, help="kept widths are multiples of this")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = make_model("cifar_resnet20", 10).eval()
    images = torch.randn(1, 3, 32, 32)
    graph = narrower.trace(model, images)
    small = narrower.narrow(model, narrower.plan(graph, narrower.magnitude(model, graph), macs=0.5, round_to=given.round_to))
    pair = {"dense": model, "narrow": small}
    print("overhead", narrower.benchmark(pair, images[..., :4, :4], seconds=given.seconds), sep="\n", flush=True)
    for runtime in given.runtimes:
        found = narrower.benchmark(pair, images, runtime=runtime, batch_sizes=given.batch_sizes, seconds=given.seconds)
        print(found, flush=True)


if __name__ == "__main__":
    main()
