"""`narrower export` and `narrower bench`: networks in other runtimes, compared with PyTorch and with each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import narrower

from ..data.images import batches
from ..errors import ConfigError, DataError
from ..training.accelerator import make_accelerator
from .config import BenchConfig, ExportConfig, ModelConfig, part
from .job import Job, Reporter, Settings, open_job
from .networks import dense_network, input_size, load_dense, read_run, run_of, with_weights
from .oneshot import sample
from .run_folder import NARROW, Run, read_settings

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2", "torchscript": ".ts"}
CHECKED = 2  # images for the comparison, where the file takes any number


def export_network(
    settings: Settings, folder: Path | None, given: ExportConfig, report: Reporter | None = None
) -> narrower.Exported:
    """Export the network of a run folder, or that of the settings with its checkpoint or published weights.

    Raises:
        ConfigError: nothing says which weights; int8 without images.
        ExportError, MissingExtraError: as `narrower.export`.
    """
    report = report or Reporter()
    if folder is None and not (settings.model.checkpoint or settings.model.pretrained):
        raise ConfigError("say what to export: a run folder, or --model with --checkpoint or --pretrained")
    count = given.fixed_batch or CHECKED
    job = job_with_images(settings, folder, given, report)
    if job is None:
        model, images, calibration = with_weights(settings.model), noise(settings, count), None
        report.note("no images: the file is compared with PyTorch on noise")
    else:
        model, images = load_dense(job), validation_images(job, count)
        calibration = calibration_batches(job, given) if given.int8 else None
    name = ("model.int8" if given.int8 else "model") + SUFFIXES[given.format]
    path = Path(given.output) if given.output else (folder or Path()) / name
    if not path.name.endswith(SUFFIXES[given.format]):
        other = next((f", or give --format {name}" for name, suffix in SUFFIXES.items() if path.name.endswith(suffix)), "")
        raise ConfigError(f"--output {path} must end in {SUFFIXES[given.format]} for --format {given.format}{other}")
    with report.busy(f"exporting to {path}"):
        return narrower.export(model.cpu(), images, path, dynamic_batch=given.fixed_batch is None, calibration=calibration)


def job_with_images(settings: Settings, folder: Path | None, given: ExportConfig, report: Reporter) -> Job | None:
    """The job of the images that settings or run name. None where there are none, unless int8 needs them."""
    if folder is None and not (settings.data.data_dir or settings.data.dataset or settings.data.task):
        if given.int8:
            raise ConfigError("--int8 needs images for calibration: give --data-dir or --dataset")
        return None
    try:
        return open_job(settings, Run(Path(), overwrite=True, writes=False), make_accelerator("cpu"), report)
    except DataError as error:
        if given.int8:
            raise
        report.note(f"the images cannot be read ({error})")
        return None


def calibration_batches(job: Job, given: ExportConfig) -> list[Tensor]:
    """Training images, as many at once as the file takes."""
    found = [x for x, _ in sample(job, given.calibration_images)]
    if given.fixed_batch is None:
        return found
    return [x for x in torch.cat(found).split(given.fixed_batch) if len(x) == given.fixed_batch]


def noise(settings: Settings, count: int) -> Tensor:
    size = input_size(settings.model, settings.data.img_size, run_of(settings.model))
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(0))


def validation_images(job: Job, count: int) -> Tensor:
    """So many. Of a smaller data set some come twice."""
    images, _ = next(iter(batches(job.data.val, count)))
    return images[torch.arange(count) % len(images)]


def bench_networks(
    names: Sequence[str], settings: Settings, given: BenchConfig, report: Reporter | None = None
) -> narrower.Benchmark:
    """Time the networks of run folders and those with a name (initial weights). A single narrow one: against its dense one.

    Raises:
        ConfigError: a name is not known, or the networks take images of different kinds.
        ExportError, MissingExtraError: as `narrower.benchmark`.
    """
    device = make_accelerator(settings.run.device).device
    modules: dict[str, nn.Module] = {}
    kinds: dict[str, tuple[int, int, int]] = {}
    for name in dict.fromkeys(names):
        config, size = settings.model, settings.data.img_size
        folder = Path(name) if Path(name).is_dir() else None
        if folder is not None:
            found = read_settings(folder)
            config = part(ModelConfig, found)
            size = size or found.get("img_size")
            if len(names) == 1 and (folder / NARROW).exists():
                modules["dense"] = dense_network(config)
            modules[name] = read_run(folder, config)
        else:
            if ":" not in name and Path(name).name != name and not name.startswith("torchvision/"):
                raise ConfigError(f"there is no run folder {name}, and no network is called so")
            config = replace(config, model=name)
            modules[name] = dense_network(config)
        kinds[name] = input_size(config, size, folder)
    if len(set(kinds.values())) > 1:
        each = ", ".join(f"{name}: {'x'.join(map(str, kind))}" for name, kind in kinds.items())
        raise ConfigError(f"the networks take images of different sizes ({each}): give --img-size")
    images = torch.randn(1, *next(iter(kinds.values())), generator=torch.Generator().manual_seed(0)).to(device)
    modules = {name: module.to(device) for name, module in modules.items()}
    return narrower.benchmark(modules, images, runtime=given.runtimes, batch_sizes=given.batch_sizes, threads=given.threads,
                              seconds=given.seconds, progress=report.note if report else None)
