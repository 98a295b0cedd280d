"""The settings of the command line: one frozen dataclass per group of flags. Flag names are those of timm's `train.py`.

A field is a flag (`batch_size` is `--batch-size`) and a key of the YAML file that `--config` reads. Its annotation has the help
text and, for some, a short flag.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from ..deployment.layer_times import PREPARE
from ..errors import ConfigError, PlanError
from ..planning.requests import read_latency
from ..training.config import check, check_choices, flag

TRAINED = ("resrep", "soft", "centripetal")
"""Methods that narrow while they train. The others are scores."""
METHODS = ("obs", "hrank", *TRAINED, "magnitude", "fpgm", "bn_scale", "taylor", "random")
SCORES = tuple(name for name in METHODS if name not in TRAINED)
LEAST_IMAGES = 16
METHODS_WITH: dict[str, tuple[str, ...]] = {"scope": ("resrep", "centripetal"), "prior": TRAINED, "forgetting": ("resrep",),
                                            "softness": ("soft",), "pull": ("centripetal",), "reconstruct": SCORES}
"""Settings that only some methods have, and these."""
SCOPES = ("inner", "all")
FINE_TUNING = {"epochs": 15, "lr": 0.02, "warmup_epochs": 0.2}
"""Defaults of the training that follows a cut."""
SET_BY = {"name": "model", "num_classes": "num_classes", "in_channels": "in_chans", "pretrained": "pretrained"}
"""Arguments of networks that have flags of their own."""

Group = TypeVar("Group")


def part(group: type[Group], settings: Mapping[str, Any]) -> Group:
    """The settings, such as those of a run, that are of this group."""
    return group(**{item.name: settings[item.name] for item in fields(group) if item.name in settings})  # type: ignore[arg-type]


def unused(*methods: str) -> list[str]:
    """The settings that none of these methods has."""
    return [name for name, having in METHODS_WITH.items() if not {*methods} & {*having}]


@dataclass(frozen=True)
class ModelConfig:
    """network"""

    model: Annotated[
        str,
        "cifar_resnet20|32|44|56|110, cifar_vgg16_bn, cifar_densenet40, cifar_googlenet, "
        "cifar_mobilenet_v1 (the networks of the papers); torchvision/NAME; "
        "package.module:factory or file.py:factory; any other name is timm's",
    ] = "cifar_resnet20"
    checkpoint: Annotated[
        str | None, "weights of the network (.pt, .pth, .th, .safetensors; no code is run), or the folder of a run"
    ] = None
    pretrained: Annotated[bool, "published weights of timm or torchvision"] = False
    num_classes: Annotated[int | None, "outputs of the network; the data set's number of classes if not given"] = None
    in_chans: Annotated[int, "channels of the images: 3 (RGB) or 1 (grey)"] = 3
    model_kwargs: Annotated[dict[str, Any], "further arguments of the factory, as JSON: '{\"drop_rate\": 0.1}'"] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        check(self, num_classes=(1, inf), in_chans=(1, inf))
        known = SET_BY if ":" in self.model else {**SET_BY, "model_name": "model", "in_chans": "in_chans"}  # as timm calls them
        if taken := next((name for name in known if name in self.model_kwargs), None):
            raise ConfigError(f"--model-kwargs has {taken}, which has a flag of its own: give {flag(known[taken])}")
        if self.checkpoint and self.pretrained:
            raise ConfigError("give either --checkpoint or --pretrained")


@dataclass(frozen=True)
class DataConfig:
    """data"""

    data_dir: Annotated[str | None, "folder with train/<class>/ and val/<class>/, or where timm keeps a data set"] = None
    dataset: Annotated[
        str, "digits (embedded; the default without --data-dir), or a name of timm's: torch/cifar10, hfds/..., wds/..."
    ] = ""
    task: Annotated[
        str | None, "instead of images with classes: your own data, loss and figures, package.module:Task or file.py:Task"
    ] = None
    dataset_download: Annotated[bool, "let timm download the data set"] = False
    train_split: Annotated[str, "split of a data set of timm to train on"] = "train"
    val_split: Annotated[str, "its split to evaluate on"] = "validation"
    input_key: Annotated[str | None, "its column of images, where that has another name than timm expects"] = None
    target_key: Annotated[str | None, "its column of labels"] = None
    img_size: Annotated[int | None, "pixels; default: images up to 64 px as they are, else what the network expects"] = None
    mean: Annotated[list[float] | None, "mean per channel, of pixels in [0, 1]; default: the network's, else ImageNet's"] = None
    std: Annotated[list[float] | None, "standard deviation per channel"] = None
    hflip: Annotated[float, "probability of mirroring a training image (digits are never mirrored)"] = 0.5
    aa: Annotated[
        str | None, "augmentation of training images, by timm's names: rand-m9-mstd0.5-inc1 (RandAugment), augmix-m5, v0, ..."
    ] = None
    scale: Annotated[list[float], "area of a random crop of a large training image, least and most, as shares"] = field(
        default_factory=lambda: [0.08, 1.0]
    )
    color_jitter: Annotated[float, "of large training images; not with --aa"] = 0.0
    cache_dir: Annotated[str, "where small images are kept decoded, never in the data folder; 'none' for memory only"] = (
        "~/.cache/narrower"
    )

    def __post_init__(self) -> None:
        check(self, img_size=(1, inf), hflip=(0, 1), color_jitter=(0, inf))
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"--scale {' '.join(map(str, self.scale))}: give two shares in growing order, such as 0.08 1")


@dataclass(frozen=True)
class PruneConfig:
    """pruning"""

    method: Annotated[
        str, "obs, hrank, magnitude, fpgm, bn_scale, taylor or random: score, cut, repair, train; resrep: train towards zeros; "
        "soft: mask channels that may come back while training; centripetal: train filters to become identical, and merge them"
    ] = "obs"
    macs: Annotated[float | None, "multiply-adds that may remain: a fraction, or a number above 1 (default 0.5)"] = None
    params: Annotated[float | None, "parameters that may remain: a fraction, or a number above 1"] = None
    latency: Annotated[
        float | str | None,
        "time of a forward that may remain: 0.6x (of the dense time), 12.5ms, or a number: a fraction, above 1 milliseconds",
    ] = None
    runtime: Annotated[
        str | None, "for --latency and --round-to auto, what is timed: onnxruntime (default), openvino, eager, compile"
    ] = None
    threads: Annotated[int | None, "for the same, threads of the runtime (default 1)"] = None
    latency_table: Annotated[
        str | None, "for the same, times measured before: latency.json of a run, or a folder of `write_latency_jobs` with the "
        "times.json of the other machine"
    ] = None
    remove: Annotated[
        float | dict[str, float] | None,
        "instead of a budget: fraction of channels to take from each group, or JSON {pattern: fraction}",
    ] = None
    round_to: Annotated[
        int | Literal["auto"] | None,
        "kept widths are multiples of this (8 suits most hardware); auto: of what the runtime computes in; default: 1; "
        "auto where --latency is given",
    ] = None
    dry_run: Annotated[bool, "plan only: nothing is cut, trained or written"] = False
    exclude: Annotated[list[str], "patterns of groups or layers to leave alone: layer1.* fc"] = field(default_factory=list)
    min_channels: Annotated[
        int | float | None, "that every group keeps at least, below 1 a share; default: 1, or 1/8 if that, repaired, is nearer"
    ] = None
    allow_inexact: Annotated[
        bool, "also narrow channels that a layer normalises or pools across (removal changes such a layer by definition)"
    ] = True
    allocate: Annotated[
        Literal["measured", "share", "norms"],
        "how a budget is spread: measured (by the damage of each group), share (the same of each), norms (for resrep: "
        "the rows of its compactors decide during the training, as published)"
    ] = "measured"
    sensitivity: Annotated[str | None, "measured before: the sensitivity.json of `narrower sensitivity`"] = None
    reconstruct: Annotated[bool, "after the cut, repair the weights that stay by least squares"] = True
    steps: Annotated[int, "cut towards the budget in so many steps: repair, score and measure again after each"] = 1
    schedule: Annotated[
        Literal["once", "layer"],
        "once: cut all layers, repair, fine-tune for --epochs; layer (as HRank): plan once, then cut and fine-tune layer "
        "after layer, without repair, and at the end for --epochs"
    ] = "once"
    epochs_per_layer: Annotated[int, "of --schedule layer"] = 1
    images: Annotated[int, "training images for scoring, measuring and repairing; their labels are not used"] = 512
    tune_steps: Annotated[int, "steps of label-free tuning on these images, after the repair"] = 0
    tune_lr: Annotated[float, "its learning rate"] = 2e-5
    distill: Annotated[bool, "fine-tune towards the outputs of the dense network, beside the labels"] = True
    distill_temperature: Annotated[float, "divides the logits of both networks"] = 4.0
    distill_weight: Annotated[float, "of the dense network's outputs in the loss; labels have the rest (1: no labels)"] = 0.9
    distill_features: Annotated[float, "weight of the features at the end of each stage"] = 0.0
    scope: Annotated[
        Literal["inner", "all"],
        "resrep, centripetal: inner (channels that one layer makes; ResRep's paper) or all (residual streams too; C-SGD's)"
    ] = "inner"
    prior: Annotated[
        str, "resrep, soft, centripetal: score of the plan; with --allocate norms the row norms are multiplied by it, or none "
        "(as published)"
    ] = "magnitude"
    forgetting: Annotated[
        dict[str, Any], "resrep: settings instead of those that follow from --epochs, as JSON: '{\"mask_interval\": 200}'"
    ] = field(default_factory=dict)
    softness: Annotated[
        dict[str, Any] | str, "soft: sfp, asymptotic, softer or gradual-hard, as published; or settings of SoftPruning, JSON: "
        "'{\"factor\": 0, \"harden\": 0.5}'"
    ] = field(default_factory=dict)
    pull: Annotated[
        dict[str, Any] | str, "centripetal: published, or settings of CentripetalSGD, JSON: '{\"together\": 0.3}'"
    ] = field(default_factory=dict)
    dense_epochs: Annotated[int, "epochs of the dense network, when it is trained here (no --checkpoint, no --pretrained)"] = 25
    dense_lr: Annotated[float, "its learning rate"] = 0.1
    report: Annotated[bool, "write report.html at the end, where matplotlib and jinja2 are installed"] = True

    def __post_init__(self) -> None:
        check_choices(self)
        check(self, steps=(1, inf), images=(1, inf), tune_steps=(0, inf), tune_lr=(0, inf), epochs_per_layer=(0, inf))
        check(self, dense_epochs=(0, inf), dense_lr=(0, inf))
        check(self, distill_temperature=(1e-3, 1e3), distill_weight=(0, 1), distill_features=(0, 1e6))
        self.check_times()
        if self.sensitivity and (self.remove is not None or self.allocate != "measured"):
            raise ConfigError("--sensitivity spreads a budget (--macs, --params, --latency) with --allocate measured")
        if self.steps > 1 and (self.method in TRAINED or self.remove is not None or self.sensitivity):
            raise ConfigError("--steps goes towards a budget (--macs, --params) and measures on the way: it takes no --remove, "
                              f"no --sensitivity and no --method {' or '.join(TRAINED)}")
        if self.schedule == "layer" and self.method in TRAINED:
            raise ConfigError(f"--schedule layer is for methods that score and cut: {self.method} takes channels on its way")
        if self.images < LEAST_IMAGES and self.measures:
            raise ConfigError(f"--images {self.images}: measuring and repairing need {LEAST_IMAGES} at least, better hundreds")
        if self.method not in METHODS:
            raise ConfigError(f"no method is called {self.method!r}: take one of {', '.join(METHODS)}")
        if self.prior not in ("none", *SCORES):
            raise ConfigError(f"--prior {self.prior}: take none or one of {', '.join(SCORES)}")
        if self.method in TRAINED and (self.tune_steps or self.distill_features):
            raise ConfigError(f"--tune-steps and --distill-features are for a network cut before training, not {self.method}")
        if self.tune_steps and (not self.reconstruct or self.schedule == "layer"):
            other = "--no-reconstruct" if self.schedule == "once" else "--schedule layer"
            raise ConfigError(f"--tune-steps tunes what was repaired, and {other} repairs nothing: leave one of them out")
        if self.allocate == "norms" and self.method != "resrep":
            raise ConfigError("--allocate norms is for --method resrep: the other methods have no compactors")
        if self.allocate == "norms" and (self.remove, self.min_channels, self.round_to or 1) != (None, None, 1):
            raise ConfigError("--allocate norms works towards a budget (--macs, --params): it takes no --remove, --round-to or "
                              "--min-channels")
        if self.allocate != "norms" and self.method in TRAINED and self.prior == "none":
            raise ConfigError("--prior none leaves the choice to the norms of ResRep's rows: give --allocate norms too")

    def check_used(self, *methods: str) -> None:
        """Raise ConfigError for a setting without effect: none of these methods has it, or another setting rules it out."""
        for name in unused(*methods):
            if (value := getattr(self, name)) != plain(name):
                raise ConfigError(f"{flag(name, value)} is for --method {' or '.join(METHODS_WITH[name])}, and the "
                                  f"{'method is' if len(methods) == 1 else 'methods are'} {', '.join(methods)}")
        for name, (acts, why) in ACTS_WITH.items():
            if (value := getattr(self, name)) != plain(name) and not acts(self):
                raise ConfigError(f"{flag(name, value)} {why}")

    @property
    def measures(self) -> bool:
        return self.allocate == "measured" or (self.reconstruct and self.method in SCORES)

    @property
    def timed(self) -> bool:
        """Whether the plan needs a table of times."""
        return self.latency is not None or self.round_to == "auto"

    def check_times(self) -> None:
        """Raises ConfigError for contradictions among --latency, --round-to auto and what goes with them."""
        check(self, threads=(1, inf))
        if self.runtime is not None and self.runtime not in PREPARE:
            raise ConfigError(f"--runtime {self.runtime}: take one of {', '.join(PREPARE)}")
        if self.timed and self.steps > 1:
            raise ConfigError("--steps takes no --latency and no --round-to auto: times are those of the dense layers")
        if self.latency is None:
            return
        try:
            read_latency(self.latency)
        except PlanError:
            raise ConfigError(f"--latency {self.latency}: give 0.6x for a fraction of the dense time (below 1), 12.5ms or a "
                              "number above 1 for milliseconds") from None
        if self.remove is not None or self.allocate == "norms":
            other = "--allocate norms works towards --macs or --params" if self.remove is None else "--remove is no budget"
            raise ConfigError(f"--latency is a budget of its own, {other}: give one or the other")


def plain(name: str) -> Any:
    """The default of a setting of pruning."""
    return getattr(PruneConfig(), name)


ACTS_WITH: dict[str, tuple[Callable[[PruneConfig], bool], str]] = {
    **dict.fromkeys(("runtime", "threads", "latency_table"),
                    (lambda given: given.timed, "is for --latency or --round-to auto, and neither is given")),
    **dict.fromkeys(("distill_temperature", "distill_weight", "distill_features"),
                    (lambda given: given.distill, "is a part of the distillation, and --no-distill takes none")),
    "tune_lr": (lambda given: given.tune_steps > 0, "is for --tune-steps, which is not given"),
    "epochs_per_layer": (lambda given: given.schedule == "layer", "is for --schedule layer, and the schedule is once"),
    "allocate": (lambda given: given.remove is None, "spreads a budget, and --remove is none"),
}
"""Settings of pruning that act only where others say so: where, and why not elsewhere."""


@dataclass(frozen=True)
class RunConfig:
    """run"""

    output: Annotated[str | None, "folder of the run; default runs/<time>-<method>-<model>"] = None
    overwrite: Annotated[bool, "replace a run that is already in --output"] = False
    resume: Annotated[str | None, "run folder to go on with, exactly where it stopped, with its own settings"] = None
    seed: Annotated[int, "of initial weights, order and augmentation"] = 42
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps, ..."] = "auto"
    log_with: Annotated[
        list[str], "experiment trackers that get every row of the metrics: tensorboard, wandb, mlflow, ... (accelerate's)"
    ] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise ConfigError(f"--resume {self.resume} goes on with a run, --overwrite replaces one: leave one of them out")
        if self.resume and self.output and Path(self.output).resolve() != Path(self.resume).resolve():
            raise ConfigError(f"--resume {self.resume} goes on in that folder: leave out --output {self.output}")


@dataclass(frozen=True)
class CompareConfig:
    """grid"""

    methods: Annotated[
        list[str], "as for --method, each with its --allocate, --softness, --pull or --scope if wanted (resrep:norms, "
        "magnitude:share, soft:sfp, centripetal:all); dense: the dense network trained on; tp-magnitude and tp-group-norm: "
        "torch-pruning's"
    ] = field(default_factory=lambda: ["obs", "magnitude", "hrank", "resrep"])
    budgets: Annotated[list[float], "multiply-adds that may remain, as for --macs"] = field(default_factory=lambda: [0.5])
    seeds: Annotated[list[int], "one run for each"] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        for name in ("methods", "budgets", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"--{name}: give one at least")
        if min(self.budgets) <= 0:
            raise ConfigError(f"--budgets {min(self.budgets):g}: give a fraction of the multiply-adds, or a number above 1")


@dataclass(frozen=True)
class ReportConfig:
    """report"""

    svg: Annotated[bool, "also write the pictures, into report/ of the run folder"] = False


@dataclass(frozen=True)
class PushConfig:
    """sharing"""

    license: Annotated[
        str | None, "as the hub writes it: apache-2.0, mit, other, ...; default: that of timm's published weights"
    ] = None
    private: Annotated[bool, "make the repository private"] = False
    revision: Annotated[str | None, "branch, made where it is missing; default: the main one"] = None
    message: Annotated[str | None, "of the commit"] = None
    exports: Annotated[list[str], "files to put beside the network: onnx pt2"] = field(default_factory=list)
    card: Annotated[
        dict[str, Any], "fields of the model card, as JSON: '{\"datasets\": [\"imagenet-1k\"], \"language\": \"en\"}'"
    ] = field(default_factory=dict)
    dry_run: Annotated[bool, "upload nothing: write the files into --output"] = False
    output: Annotated[str | None, "folder for --dry-run; default: hub in the run folder"] = None

    def __post_init__(self) -> None:
        for name in self.exports:
            if name not in SHARED_FORMATS:
                raise ConfigError(f"--exports {name}: take {' and '.join(SHARED_FORMATS)}")
        if self.output and not self.dry_run:
            raise ConfigError("--output is for --dry-run")


SHARED_FORMATS = ("onnx", "pt2")
EXPORT_FORMATS = ("onnx", "openvino", "pt2", "torchscript")


@dataclass(frozen=True)
class EvalConfig:
    """evaluation"""

    json: Annotated[bool, "print the figures as one line of JSON"] = False


@dataclass(frozen=True)
class ExportConfig:
    """export"""

    format: Annotated[str, "onnx, openvino (.xml and .bin), pt2 (torch.export) or torchscript"] = "onnx"
    int8: Annotated[bool, "8-bit weights and activations (onnx), quantised after training on some images"] = False
    calibration_images: Annotated[int, "how many, for --int8"] = 128
    output: Annotated[str | None, "the file; default: model.onnx (model.int8.onnx, .xml, .pt2, .ts) in the run folder"] = None
    fixed_batch: Annotated[int | None, "the only number of images that the file takes at once; default: any number"] = None

    def __post_init__(self) -> None:
        check(self, calibration_images=(1, inf), fixed_batch=(1, inf))
        if self.format not in EXPORT_FORMATS:
            raise ConfigError(f"--format {self.format}: take one of {', '.join(EXPORT_FORMATS)}")
        if self.int8 and self.format != "onnx":
            raise ConfigError("--int8 is for --format onnx")
        if self.calibration_images != type(self).calibration_images and not self.int8:
            raise ConfigError("--calibration-images is for --int8, which is not given")


@dataclass(frozen=True)
class BenchConfig:
    """benchmark"""

    runtimes: Annotated[list[str], "eager, compile, onnxruntime, openvino, cudagraph (with --device cuda)"] = field(
        default_factory=lambda: ["eager"]
    )
    batch_sizes: Annotated[list[int], "images in a forward"] = field(default_factory=lambda: [1])
    threads: Annotated[list[int], "numbers of threads"] = field(default_factory=lambda: [1])
    seconds: Annotated[float, "for each network in each combination"] = 2.0

    def __post_init__(self) -> None:
        check(self, seconds=(0, inf))
        for name, values in (("--batch-sizes", self.batch_sizes), ("--threads", self.threads)):
            if min(values, default=0) < 1:
                raise ConfigError(f"{name} must be numbers from 1")
