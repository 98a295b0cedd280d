"""Which networks each exporter takes, and how near its runtime is to PyTorch: the table of results/README.md.

    pip install -e '.[cli,export,openvino]' && python benchmarks/exports.py [NAME...] [--formats onnx pt2 ...] [--remove 0.33]

Random weights that matter: BatchNorm statistics are those of the images, scales and shifts are random, so that signals keep
their size through the whole network. The layers of detectors that give scores are stronger, so that these differ as in a
trained network, and ten boxes an image are given: the order of equal scores is chance. A row is one network and format: the
largest difference from PyTorch as a fraction of the largest output, or why there is no file. Images are smooth random ones
(detectors: a list of two). With `--remove` the network is narrowed first, by this share of the channels of every group, with
the smallest weights first.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import narrower
from narrower.models import CIFAR_MODELS, make_model

# Each with how it gives few boxes, the layers that give scores, and how much stronger these are.
DETECTORS: dict[str, tuple[dict[str, float], str, float]] = {
    "ssdlite320_mobilenet_v3_large": (
        {"detections_per_img": 10}, r"head\.classification_head\.module_list\.\d\.1", 4.0),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (
        {"box_detections_per_img": 10, "box_score_thresh": 0.0}, r"roi_heads\.box_predictor\.cls_score", 20.0),
}
NAMES = (*CIFAR_MODELS, "resnet50", "mobilenet_v3_small", "mobilenet_v3_large", "densenet121", "lraspp_mobilenet_v3_large",
         *DETECTORS)
FILES = {"onnx": "net.onnx", "pt2": "net.pt2", "torchscript": "net.ts", "openvino": "net.xml"}


def network(name: str, images: torch.Tensor) -> nn.Module:
    """The network in eval mode with random weights and BatchNorm statistics that fit them."""
    torch.manual_seed(0)
    if name in CIFAR_MODELS:
        model = make_model(name, 10)
    else:
        import torchvision

        given: dict[str, float | None] = {"weights_backbone": None} if name in DETECTORS or name.startswith("lraspp") else {}
        given |= DETECTORS[name][0] if name in DETECTORS else {}
        model = torchvision.models.get_model(name, weights=None, **given)
    for path, layer in model.named_modules():
        if name in DETECTORS and re.fullmatch(DETECTORS[name][1], path):
            nn.init.normal_(layer.weight, std=DETECTORS[name][2] * layer.weight.std().item())
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
        norm.reset_running_stats()
        norm.momentum = None
    model.eval()
    for norm in norms:
        norm.train()
    with torch.no_grad():
        model(list(images) if name in DETECTORS else images)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--formats", nargs="*", default=list(FILES))
    parser.add_argument("--size", type=int, default=96, help="pixels; the CIFAR networks take 32, the detectors 320")
    parser.add_argument("--images", type=int, default=2, help="for the statistics; few leave channels without any variance")
    parser.add_argument("--remove", type=float, help="narrow first, by this share of all channels")
    given = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, batch traced 2, compared on 2 and 3 (detectors: 2 and 2)")
    for name in given.names:
        size = 32 if name in CIFAR_MODELS else 320 if name in DETECTORS else given.size
        images = nn.functional.interpolate(torch.rand(given.images, 3, 9, 9), size=(size, size), mode="bicubic").clamp(0, 1)
        model, images = network(name, images), images[:2]
        inputs = (list(images),) if name in DETECTORS else images
        if given.remove:
            graph = narrower.trace(model, inputs)
            model = narrower.narrow(model, narrower.plan(graph, narrower.magnitude(model, graph), remove=given.remove))
        for kind in given.formats:
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found = narrower.export(model, inputs, Path(folder) / FILES[kind])
                    text = f"{found.difference:.1e}  batch {found.batch}  {found.size / 1e6:.2f} MB"
                except narrower.ExportError as error:
                    text = str(error)
            print(f"{name:<40} {kind:<12} {text}  ({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
