"""trace + plan + narrow against torch-pruning, in one run: seconds and ratios, one thread, 224 px.

    pip install torch-pruning==1.6.1 && python benchmarks/tracing.py [--zoo]

Both take half of the channels of every layer that can lose some, at random. Each pair of runs is on fresh copies of one
model, in turn; the median of the repetitions counts.
torch-pruning is called as its README recommends, with the classifier left alone. `--zoo` goes through many families; what the
peer fails on, or does not finish in a minute, counts for neither.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import signal
import statistics
import time
import warnings

import torch
from torch import nn

import narrower

MODELS = ("torchvision/resnet50", "torchvision/densenet121", "mobilenetv3_large_100", "efficientnet_b0")
ZOO = """
torchvision/alexnet torchvision/vgg16_bn torchvision/resnet18 torchvision/resnet50 torchvision/resnext50_32x4d
torchvision/wide_resnet50_2 torchvision/densenet121 torchvision/googlenet torchvision/inception_v3 torchvision/mobilenet_v2
torchvision/mobilenet_v3_small torchvision/mobilenet_v3_large torchvision/mnasnet1_0 torchvision/squeezenet1_1
torchvision/efficientnet_b0 torchvision/efficientnet_v2_s torchvision/regnet_x_400mf torchvision/regnet_y_400mf
torchvision/convnext_tiny
resnet26t resnet50_gn seresnet18 seresnext26d_32x4d ecaresnet26t resnetrs50 resnetv2_50 resnest14d res2net50_14w_8s skresnet18
selecsls42 dla34 dpn68 legacy_xception xception41 inception_v4 inception_resnet_v2 nasnetalarge efficientnet_b0
efficientnet_lite0 tf_efficientnet_b0 efficientnetv2_rw_t mixnet_s spnasnet_100 mobilenetv1_100 mobilenetv2_035
mobilenetv3_small_050 mobilenetv4_conv_small_035 mobilenet_edgetpu_100 lcnet_035 lcnetv2_small tinynet_e fbnetc_100 ghostnet_050
hardcorenas_a rexnet_100 regnetx_002 regnety_002 regnetz_005 regnetv_040 nf_resnet26 nfnet_l0 repvgg_a0 repghostnet_050
mobileone_s0 repvit_m0_9 ese_vovnet19b_slim eca_vovnet39b cspresnet50 cspdarknet53 cs3darknet_focus_s darknet17 hrnet_w18_small
gernet_s resnet33ts gcresnext26ts convnext_atto convnextv2_atto convmixer_768_32 inception_next_atto fasternet_t0 starnet_s050
hgnetv2_b0 tresnet_m legacy_senet154 poolformer_s12 convformer_s18 focalnet_tiny_srf mambaout_femto fastvit_t8 efficientvit_b0
mobilevit_xxs swiftformer_xs vit_tiny_patch16_224 mixer_s32_224 pit_ti_224
"""


class Late(Exception):
    """A minute has passed."""


def ours(model: nn.Module, x: torch.Tensor) -> float:
    start = time.perf_counter()
    graph = narrower.trace(model, x)
    plan = narrower.plan(graph, narrower.random(graph), remove=0.5)
    narrower.narrow(model, plan)
    return time.perf_counter() - start


def theirs(model: nn.Module, x: torch.Tensor) -> float:
    import torch_pruning as tp

    last = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    start = time.perf_counter()
    importance = tp.importance.RandomImportance()
    pruner = tp.pruner.BasePruner(model, x, importance=importance, pruning_ratio=0.5, ignored_layers=[last])
    pruner.step()
    return time.perf_counter() - start


def peer_manages(model: nn.Module, x: torch.Tensor) -> bool:
    def late(*args: object) -> None:
        raise Late

    signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    try:
        theirs(model, x)
        return True
    except Exception as e:
        print(f"{'':28s} torch-pruning: {type(e).__name__}: {str(e).splitlines()[0][:80] if str(e) else ''}", flush=True)
        return False
    finally:
        signal.alarm(0)


def main() -> None:
    from narrower.models import make_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--zoo", action="store_true", help="many families, two repetitions each")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    x = torch.randn(1, 3, 224, 224)
    ratios, seconds = [], []
    print(f"{'model':28s} {'narrower s':>10s} {'peer s':>8s} {'ratio':>6s}")
    for name in ZOO.split() if args.zoo else args.models:
        model = make_model(name, num_classes=97).eval()
        seconds.append(ours(copy.deepcopy(model), x))
        if not peer_manages(copy.deepcopy(model), x):
            print(f"{name:28s} {seconds[-1]:10.3f} {'':8s}", flush=True)
            continue
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(2 if args.zoo else args.repeats):
            for run, into in ((ours, times[0]), (theirs, times[1])):
                into.append(run(copy.deepcopy(model), x))
        a, b = (statistics.median(t) for t in times)
        seconds[-1] = a
        ratios.append(a / b)
        print(f"{name:28s} {a:10.3f} {b:8.3f} {a / b:6.2f}", flush=True)
    print(f"geometric mean of {len(ratios)} ratios: {math.exp(statistics.fmean(map(math.log, ratios))):.2f}; narrower took "
          f"{statistics.median(seconds):.2f} s (median), {max(seconds):.2f} s at most")


if __name__ == "__main__":
    main()
