"""Create, load, check, measure and save the networks of a command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

import narrower

from ..data.images import Images, batches
from ..data.unlabelled import relabelled
from ..errors import ConfigError, TraceError
from ..models import expected_images, make_model
from ..models.checkpoints import load_checkpoint
from ..narrowing.narrow import RECORD
from ..report.facts import START
from ..storage import META, WEIGHTS, write_whole
from ..surgery.walk import in_eval_mode
from ..training.accelerator import make_accelerator, to_device
from ..training.agreement import check_same, first, several
from ..training.checking import try_task
from . import run_folder
from .config import ModelConfig
from .job import Job, Reporter, Settings
from .own_task import first_batch


def dense_network(config: ModelConfig, *, pretrained: bool = False) -> nn.Module:
    """The dense network of the settings, with initial or published weights."""
    return make_model(
        config.model, config.num_classes, pretrained=pretrained, in_channels=config.in_chans, **config.model_kwargs
    )  # fmt: skip


def with_weights(config: ModelConfig) -> nn.Module:
    """The network with the weights that the settings name: a checkpoint, a run, or published. The default is initial weights.

    The network of a run that narrowed is narrow, with the last weights or those of its `best.safetensors`.
    """
    folder = run_of(config)
    model = dense_network(config, pretrained=config.pretrained) if folder is None else read_run(folder, config)
    return load_checkpoint(model, config.checkpoint) if config.checkpoint and Path(config.checkpoint) != folder else model


def run_of(config: ModelConfig) -> Path | None:
    """The folder of the run whose network the settings name: as such, or by its `best.safetensors`. None for other files."""
    file = Path(config.checkpoint or "")
    if config.checkpoint and file.is_dir():
        return file
    return file.parent if file.name == run_folder.BEST and (file.parent / run_folder.CONFIG).exists() else None


def outputs_of(model: nn.Module, images: Tensor) -> Any:
    """What the network gives, in eval mode. Raises TraceError where it fails on images of this shape."""
    try:
        with in_eval_mode(model), torch.inference_mode():
            return model.to(images.device)(images)
    except Exception as error:  # whatever the user's network raises
        reason = str(error).splitlines()[0] if str(error) else ""
        shape = tuple(images.shape)
        raise TraceError(f"the network fails on images of shape {shape}: {type(error).__name__}: {reason}") from error


def check_outputs(output: Any, shape: tuple[int, ...], num_classes: int | None) -> None:
    """Raise ConfigError unless the output for an image is one logit per class: any number where `num_classes` is None."""
    right = isinstance(output, Tensor) and output.ndim == 2 and output.shape[1] == (num_classes or output.shape[1])
    if not right:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        wanted = f"(1, {num_classes or 'classes'})"
        raise ConfigError(f"for images {shape} the network gives {found} instead of {wanted}: one per class")


def load_dense(job: Job) -> nn.Module:
    """The dense network, with the weights that the settings name, on the device.

    Raises as `outputs_of`, and ConfigError where its outputs are not what the task takes.
    """
    given = job.settings.model
    torch.manual_seed(job.settings.run.seed)
    model = with_weights(given)
    if job.settings.data.task:
        images, targets = to_device(*first_batch(job.settings.data.task, job.data), job.settings.train, job.accelerator.device)
        try_task(job.data.task, outputs_of(model, images), (images, targets))
    else:
        classes = given.num_classes or job.data.num_classes or None
        check_outputs(outputs_of(model, job.example), tuple(job.example.shape), classes)
    return model.to(job.accelerator.device)


def labelled_by(job: Job, model: nn.Module) -> Job:
    """The job with the classes that `model` finds, where the images have none: top-1 is then the agreement with it.

    Raises:
        ConfigError: the weights of the network are not given, or what was asked for needs labels.
    """
    if job.data.labelled:
        return job
    given = job.settings
    if not (given.model.checkpoint or given.model.pretrained):
        raise ConfigError(f"the images of {job.data.name} have no classes, so no network can be trained on them: give the "
                          "trained one (--checkpoint or --pretrained)")
    check_score(job)
    if given.train.epochs and (given.prune.distill_weight < 1 or not given.prune.distill):
        raise ConfigError("the images have no classes: train towards the dense network alone (--distill-weight 1), or not at "
                          "all (--epochs 0)")
    job.report.note("the images have no classes: top-1 is the share of images on which a network agrees with the dense one")

    def read(split: str) -> Images:
        images = getattr(job.data, split)
        return images if split == "train" and not given.train.epochs else relabelled(images, classes_of(model, images, job))

    return replace(job, data=replace(job.data, read=read))


def check_score(job: Job) -> None:
    """Raise ConfigError where the score needs labels that the images do not have."""
    if job.settings.prune.method == "taylor" and not job.data.labelled:
        raise ConfigError("--method taylor needs labels, and the images have no classes: take another score")


@torch.inference_mode()
def classes_of(model: nn.Module, images: Images, job: Job) -> Tensor:
    """The class that a network gives to each image. Shape `(N,)`."""
    check_same({"the number of images": len(images)})
    loader = batches(images, job.settings.train.batch_size, shard=job.shard, workers=job.settings.train.workers)
    with in_eval_mode(model):
        mine = torch.cat([model(x.to(job.accelerator.device)).argmax(1) for x, _ in loader])
    found = torch.zeros(len(images), dtype=mine.dtype, device=mine.device)
    found[job.shard[0] :: job.shard[1]] = mine
    return job.accelerator.reduce(found).cpu()


def from_first(job: Job, make: Callable[[], nn.Module]) -> nn.Module:
    """The narrow network that `make` gives in the first process. The others get it as the files that it would save."""
    made: list[nn.Module] = []

    def send() -> dict[str, bytes]:
        made.append(make())
        return packed(made[0]) if several() else {}

    files = first(send)
    return made[0] if made else unpacked(job, files)


def packed(model: nn.Module) -> dict[str, bytes]:
    """The contents of the files of a narrow network, by name."""
    with TemporaryDirectory() as folder:
        return {name: (narrower.save(model, folder) / name).read_bytes() for name in (WEIGHTS, META)}


def unpacked(job: Job, files: Mapping[str, bytes]) -> nn.Module:
    """The narrow network in these files, on the device."""
    with TemporaryDirectory() as folder:
        write_whole({Path(folder) / name: content for name, content in files.items()})
        return narrower.load(folder, lambda: dense_network(job.settings.model)).to(job.accelerator.device)


def from_run(job: Job, folder: Path) -> nn.Module:
    """The network that a run saved: narrow after `prune`, dense after `train`."""
    return read_run(folder, job.settings.model).to(job.accelerator.device)


def read_run(folder: Path, config: ModelConfig) -> nn.Module:
    """As `from_run`, on the CPU.

    Raises:
        ConfigError: the folder has no run, or one that was interrupted before it had a network.
    """
    run_folder.read_settings(folder)
    if not (folder / run_folder.MODEL).exists():
        command = run_folder.Run(folder, resume=True, writes=False).last(START).get("command", "prune")
        raise ConfigError(f"the run in {folder} has no network yet: go on with it by narrower {command} --resume "
                          f"{run_folder.quoted(folder)}")
    if (folder / run_folder.NARROW).exists():
        return narrower.load(folder, lambda: dense_network(config))
    return load_checkpoint(dense_network(config), folder / run_folder.MODEL)


@dataclass(frozen=True)
class Costs:
    """What a network costs: MACs, parameters, MB of weights, ms for one image."""

    macs: float
    params: float
    size_mb: float
    latency_ms: float


SECONDS, ROUNDS = 0.3, 3
"""Of one measurement of latency, and how often the networks take turns."""


def costs_of(example: Tensor, *networks: nn.Module) -> list[Costs]:
    """The costs of networks.

    Latency is the minimum of the rounds. The networks take turns, so that other load affects all of them equally.
    """
    costs = [[narrower.measure(model, example, seconds=SECONDS) for model in networks] for _ in range(ROUNDS)]
    found = []
    for model, cost in zip(networks, zip(*costs, strict=True), strict=True):
        size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        latency = min(round["latency_ms"] for round in cost)
        found.append(Costs(cost[0]["macs"], cost[0]["params"], size / 1e6, latency))
    return found


def input_size(config: ModelConfig, img_size: int | None, folder: Path | None) -> tuple[int, int, int]:
    """Channels, height and width of an image: by the settings, else as in the run in `folder`, else as the network expects.

    Settings have no `img_size` where images are not square. Runs of older versions do not tell theirs.
    """
    run = None if img_size or folder is None else run_folder.Run(folder, resume=True, writes=False)
    if run is not None and (found := run.last(START).get(run_folder.INPUT_SIZE)):
        return found[0], found[1], found[2]
    size = img_size or int(expected_images(config.model).get("large", 224))
    return config.in_chans, size, size


def inspect_network(
    settings: Settings, report: Reporter | None = None
) -> tuple[narrower.Graph, Costs]:
    """`narrower inspect`: the groups and costs of a network. Needs no images."""
    given, report = settings.model, report or Reporter()
    accelerator = make_accelerator(settings.run.device)
    try:
        model = with_weights(given)
    except ConfigError as error:
        if not given.pretrained:
            raise
        model = dense_network(given)  # raises where it was not about the weights
        report.note(f"without published weights, which inspect does not need: {error}")
    example = torch.zeros(1, *input_size(given, settings.data.img_size, run_of(given)), device=accelerator.device)
    graph = narrower.trace(model.to(accelerator.device), example, progress=report.note)
    return graph, costs_of(example, model)[0]


def is_narrow(model: nn.Module) -> bool:
    return hasattr(model, RECORD)


def save_network(model: nn.Module, folder: Path) -> None:
    """Save what `read_run` reads: a dense network, or a narrow one that was loaded and trained further."""
    if is_narrow(model):
        narrower.save(model, folder)
    else:
        save_weights(model, folder / run_folder.MODEL)


def save_weights(model: nn.Module, path: Path) -> None:
    """Replace the file `path` by the state dict. Raises StorageError if it cannot be written."""
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    write_whole({path: serialize(tensors)})  # save_file would make a file that only its owner can read
