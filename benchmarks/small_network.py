"""Why ResNet-20 at half of the multiply-adds takes more than half of the time: dense and narrow in several runtimes, in turn.

    pip install -e '.[cli,export,openvino]' && OMP_NUM_THREADS=1 python benchmarks/small_network.py [--threads 1 2]

`compile` needs a C++ compiler. The narrow networks have the same share of the channels of every group (times do not depend on
which), one at any width and one at multiples of 8. `overhead` is the eager networks on images of 4 x 4 pixels, where there is
almost nothing to compute: what is left is the cost of calling some 70 operators, which narrowing does not change.
"""

from __future__ import annotations

import argparse

import torch

import narrower
from narrower.models import make_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtimes", nargs="*", default=["eager", "compile", "onnxruntime", "openvino"])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each network, in each combination")
    parser.add_argument("--threads", nargs="*", type=int, default=[1])
    parser.add_argument("--batch-sizes", nargs="*", type=int, default=[1, 32])
    parser.add_argument("--round-to", nargs="*", type=int, default=[1, 8], help="kept widths are multiples of these")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = make_model("cifar_resnet20", 10).eval()
    images = torch.randn(1, 3, 32, 32)
    graph = narrower.trace(model, images)
    scores = narrower.magnitude(model, graph)
    networks = {"dense": model}
    for round_to in given.round_to:
        plan = narrower.plan(graph, scores, macs=0.5, round_to=round_to)
        networks[f"narrow, round_to={round_to}"] = narrower.narrow(model, plan)
    print("overhead", narrower.benchmark(networks, images[..., :4, :4], seconds=given.seconds), sep="\n", flush=True)
    for runtime in given.runtimes:
        print(narrower.benchmark(networks, images, runtime=runtime, batch_sizes=given.batch_sizes, threads=given.threads,
                                 seconds=given.seconds), flush=True)


if __name__ == "__main__":
    main()
