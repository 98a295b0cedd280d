"""The context of a command: settings, images, run folder, device and reporter."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import narrower

from ..data.images import Images, batches
from ..data.sources import ImageData, Parts, Reading, open_data
from ..data.streams import StreamImages
from ..data.task import ByClass
from ..errors import ConfigError
from ..models import expected_images
from ..training.accelerator import emulated, shard_of
from ..training.agreement import check_same
from ..training.config import TrainConfig, flag
from ..training.evaluate import evaluate_classes, headline
from ..training.methods import Methods
from ..training.optimizing import updates_per_epoch
from ..training.train import TrainContext, train
from .config import DataConfig, ModelConfig, PruneConfig, RunConfig
from .own_task import open_task
from .resuming import WHERE, changes, check_start, fingerprint, named
from .run_folder import IMAGES, INPUT_SIZE, WEIGHTS, Run

if TYPE_CHECKING:
    from accelerate import Accelerator

NOTE_SECONDS = 10


@dataclass(frozen=True)
class Settings:
    """All groups of settings of a command."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)

    def flat(self) -> dict[str, Any]:
        """All settings in one dict, as in `config.yaml`. Options that concern a single start are reset."""
        groups = (self.model, self.data, self.train, self.run, self.prune)
        values = {key: value for group in groups for key, value in asdict(group).items()}
        return values | {"output": None, "overwrite": False, "resume": None, "dry_run": False}


class Reporter:
    """Receives the progress of a command. This base class shows nothing."""

    def watch(self, iterable: Iterable[Any], description: str = "", total: int = 0) -> Iterable[Any]:
        """Show progress through `iterable`, of `total` images."""
        return iterable

    def busy(self, description: str) -> AbstractContextManager[Any]:
        """Show that work is going on."""
        return nullcontext()

    def note(self, text: str) -> None:
        """Show a line of text."""

    def tell(self, row: dict[str, Any]) -> None:
        """A stage or an epoch is done. `row`: its name, figures and seconds, and optionally a `text` to show."""


@dataclass(frozen=True)
class Job:
    """The context of one command: settings, images, run folder, device and reporter.

    `times`: the latency table of the dense network, where the settings ask for one and it is known.
    """

    settings: Settings
    data: ImageData
    run: Run
    accelerator: Accelerator
    report: Reporter
    times: narrower.LatencyTable | None = None

    def with_pruning(self, **changes: Any) -> Job:
        """The same job with other settings of pruning."""
        return replace(self, settings=replace(self.settings, prune=replace(self.settings.prune, **changes)))

    @property
    def example(self) -> Tensor:
        """One image of zeros, `[1, C, H, W]`."""
        return torch.zeros(1, *self.data.input_size, device=self.accelerator.device)

    @property
    def shard(self) -> tuple[int, int]:
        """(rank of this process, number of processes)."""
        return shard_of(self.accelerator)

    @contextmanager
    def claimed(self, model: nn.Module) -> Iterator[None]:
        """Within, the run folder is written. An error brings back the run that this one replaces.

        Raises:
            ConfigError: a run that goes on began with other images, or with other weights than those of `model`; or processes
            have not the same.
        """
        given, weights = self.settings.model, fingerprint(model)
        train, val = count_of(self.data.train), count_of(self.data.val)
        facts = {
            IMAGES: train,
            WEIGHTS: weights if given.checkpoint or given.pretrained else None,
        }
        names = {"classes": list(self.data.classes)} if self.data.classes else {}
        changed = changes(self.run, self.settings.flat()) if self.run.resume else {}
        if self.run.resume:
            check_start(self.run, facts)
        check_same({"narrower": narrower.__version__, "the number of training images": train,
                    "the number of images to evaluate on": val, "the weights at the start": weights})
        versions = {"torch": torch.__version__, "python": platform.python_version(), "processes": self.shard[1]}
        images = {"labelled": self.data.labelled, INPUT_SIZE: list(self.data.input_size)}
        self.run.claim(self.settings.flat(), {**facts, **images, **names, **versions}, changed)
        if self.settings.run.log_with:
            plain = {key: value for key, value in self.settings.flat().items() if isinstance(value, (bool, int, float, str))}
            self.accelerator.init_trackers("narrower", config=plain)
        with self.run.replacing():
            yield
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def tell(self, row: dict[str, Any]) -> None:
        """Log the row of a stage or an epoch, give its numbers to the trackers, and show it."""
        self.run.log({key: value for key, value in row.items() if key != "text"})
        numbers = {f"{row['stage']}/{key}": value for key, value in row.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=row.get("epoch"))
        self.report.tell(row)

    def note_slowly(self) -> Callable[[str], None]:
        """A function that shows a line of progress, but not more than one in `NOTE_SECONDS`, and none in a short stage."""
        last = time.monotonic()

        def note(text: str) -> None:
            nonlocal last
            if time.monotonic() - last > NOTE_SECONDS:
                last = time.monotonic()
                self.report.note(text)

        return note

    @contextmanager
    def stage(self, name: str, busy: str = "") -> Iterator[dict[str, Any]]:
        """Time a stage and report it. Values put into the yielded dict become part of its row."""
        facts: dict[str, Any] = {}
        begin = time.perf_counter()
        with self.report.busy(busy) if busy else nullcontext():
            yield facts
        self.tell({"stage": name, **facts, "seconds": time.perf_counter() - begin})

    def headline(self, model: nn.Module) -> dict[str, Any]:
        """The first figure of the task, top-1 for images with classes, also by class, and its name as "headline"."""
        figures, classes = self.evaluate(model)
        return headline(figures) | classes

    def evaluate(self, model: nn.Module) -> tuple[dict[str, float], dict[str, ByClass]]:
        """As `evaluate_classes` of the training."""
        return evaluate_classes(model, self.data.val, self.settings.train, self.accelerator, self.report.watch)

    @property
    def fit_and_held(self) -> tuple[Images, Images | None]:
        """The training images to fit, and those that decide what is kept."""
        return self.data.split(self.settings.train.held_out, self.settings.run.seed)

    @property
    def updates(self) -> int:
        """Steps of the optimizer in the training of the settings."""
        config = self.settings.train
        count = len(batches(self.fit_and_held[0], config.batch_size, order=0, shard=self.shard, workers=config.workers))
        return max(1, config.epochs * updates_per_epoch(count, config))

    def train(self, model: nn.Module, stage: str, file: str, config: TrainConfig, *, best: Callable[[], None] | None = None,
              methods: Methods | None = None) -> dict[str, Any]:
        """Train in place, or continue from the checkpoint `file`. Returns the headline.

        `best` is called, in the process that writes, after each epoch that is the best so far on the images held out.
        """
        last: dict[str, Any] = {}

        def log(row: dict[str, Any]) -> None:
            if "headline" in row:
                last.update(headline(row))
            self.tell(row)

        with self.stage(stage) as facts:
            context = TrainContext(self.accelerator, stage, self.run.folder / file, log, self.report.watch,
                                   best if self.run.writes else None)
            train(model, self.data, config, context, seed=self.settings.run.seed, methods=methods)
            facts |= last or self.headline(model)  # zero epochs
        return headline(facts)


def open_job(settings: Settings, run: Run, accelerator: Accelerator, report: Reporter, *, val_alone: bool = False) -> Job:
    """Open the images, and complete the settings from them and from the network. Paths become absolute.

    `val_alone`: a folder without training images will do.

    Raises:
        ConfigError: settings contradict each other, or those of a run that goes on, or the run would replace its own start.
        DataError: there are no images that can be read.
    """
    check_output(settings, run)
    data, reading = open_images(settings, report, val_alone)
    check_classes(settings.model.num_classes, data, report)
    if not settings.data.dataset:
        note_order(data.classes, report)
    channels, height, width = data.input_size
    wishes = settings.prune
    unlimited = all(wish is None for wish in (wishes.macs, wishes.params, wishes.latency, wishes.remove))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if (workers := settings.train.workers) > max(cores, TrainConfig.workers):
        report.note(f"warning: --workers {workers}: this machine has {cores} cores, {cores} workers read as fast")
        workers = cores
    if emulated(settings.train, accelerator.device):
        report.note(f"warning: --amp: this processor computes {settings.train.amp_dtype} by software, many times slower than "
                    "without --amp")
    settings = with_absolute_paths(settings)
    settings = replace(
        settings,
        train=replace(settings.train, workers=workers),
        model=replace(
            settings.model,
            num_classes=settings.model.num_classes or data.num_classes or None,
            in_chans=channels,
        ),
        data=replace(
            settings.data,
            img_size=height if height == width else None,
            mean=list(reading.mean) if reading else None,
            std=list(reading.std) if reading else None,
        ),
        prune=replace(settings.prune, macs=0.5 if unlimited else wishes.macs),
    )
    if run.resume and (changed := changes(run, settings.flat())):
        report.note(f"changed from here on: {named(changed, list(changed))}")
    check_same({flag(key): value for key, value in settings.flat().items() if key not in WHERE})
    return Job(settings, data, run, accelerator, report)


def check_output(settings: Settings, run: Run) -> None:
    """Raise ConfigError where the run would replace what it starts from."""
    starts = {"checkpoint": settings.model.checkpoint, "sensitivity": settings.prune.sensitivity,
              "latency-table": settings.prune.latency_table}
    for name, start in starts.items():
        if start and run.writes and not run.resume and run.has(Path(start)):
            raise ConfigError(f"--{name} {start} is of the run in --output {run.folder}, whose place this run would take: give "
                              "--output another folder")


def check_classes(given: int | None, data: ImageData, report: Reporter) -> None:
    """Compare `--num-classes` with the images.

    Raises:
        ConfigError: there would be labels without an output.
    """
    if given is None or not data.num_classes or given == data.num_classes:
        return
    if given < data.num_classes:
        raise ConfigError(f"--num-classes {given}: the images of {data.name} have {data.num_classes} classes")
    report.note(f"warning: --num-classes {given}: the images of {data.name} have {data.num_classes} classes, the other outputs "
                "have no images; classes are numbered in the order of their names: labels are wrong unless the missing ones "
                "come last")


def note_order(classes: Sequence[str], report: Reporter) -> None:
    """Say where class folders have other numbers than torchvision's `ImageFolder` gives them: labels may be wrong."""
    pairs = zip(classes, sorted(classes), strict=True)
    if found := next(((k, ours, theirs) for k, (ours, theirs) in enumerate(pairs) if ours != theirs), None):
        k, ours, theirs = found
        report.note(f"warning: class {k} is {ours!r} here (timm's order: 2 before 10, capitals as small letters) and "
                    f"{theirs!r} in torchvision's ImageFolder: if the network was trained with that, rename the folders until "
                    "both orders are one (02, small letters)")


def count_of(images: Images) -> int | None:
    """How many images there are. None of a stream, which does not know."""
    return None if isinstance(images, StreamImages) else len(images)


def with_absolute_paths(settings: Settings) -> Settings:
    """The settings, with whole paths of what they read."""
    model, data, wishes = settings.model, settings.data, settings.prune
    return replace(
        settings,
        model=replace(model, model=absolute_factory(model.model), checkpoint=absolute(model.checkpoint)),
        data=replace(data, data_dir=absolute(data.data_dir), task=data.task and absolute_factory(data.task)),
        prune=replace(wishes, sensitivity=absolute(wishes.sensitivity), latency_table=absolute(wishes.latency_table)),
    )


def absolute_factory(name: str) -> str:
    """The name of a network or a task, `file.py:factory` with the whole path of the file."""
    file, _, factory = name.rpartition(":")
    return f"{absolute(file)}:{factory}" if file.endswith(".py") else name


def absolute(path: str | None) -> str | None:
    return str(Path(path).absolute()) if path else None


def reading_of(settings: Settings) -> Reading:
    """How to read images: from the settings, else what the network expects, else ImageNet's values.

    Raises:
        ConfigError: the number of channels is not 1 or 3, `mean` or `std` have another length or are not of pixels in [0, 1].
    """
    given = settings.data
    expected = expected_images(settings.model.model)
    channels = settings.model.in_chans
    if channels not in (1, 3):
        raise ConfigError(f"--in-chans {channels}: images have 3 channels (RGB) or 1 (grey)")
    if given.aa and given.color_jitter:
        raise ConfigError("--color-jitter has no effect beside --aa: leave one of them out")
    for name, values in (("mean", given.mean), ("std", given.std)):
        if values is not None and len(values) != channels:
            raise ConfigError(f"--{name} has {len(values)} values, the images {channels} channels")
        if values is not None and not all(0 <= value <= 1 for value in values):
            raise ConfigError(f"--{name} {' '.join(map(str, values))}: pixels are read as numbers from 0 to 1, give values in "
                              "that range (for those of 0 to 255: divide by 255)")
    if given.std and 0 in given.std:
        raise ConfigError(f"--std {' '.join(map(str, given.std))}: pixels are divided by it, give values above 0")
    return replace(
        Reading(**expected),
        size=given.img_size,
        channels=channels,
        mean=tuple(given.mean or expected.get("mean", Reading.mean)[:channels]),
        std=tuple(given.std or expected.get("std", Reading.std)[:channels]),
        flip=given.hflip,
        aa=given.aa or None,
        scale=(given.scale[0], given.scale[1]),
        color_jitter=given.color_jitter,
        cache=None if given.cache_dir == "none" else Path(given.cache_dir).expanduser(),
    )


OF_DATASETS = ("train_split", "val_split", "input_key", "target_key", "dataset_download")
"""Settings that only data sets of timm have."""


def open_images(settings: Settings, report: Reporter, val_alone: bool = False) -> tuple[ImageData, Reading | None]:
    """The images that the settings name, and how they are read where no task does that. The default is the digits."""
    given = settings.data
    if given.task:
        return open_task(given, settings.train), None
    dataset = given.dataset or ("" if given.data_dir else "digits")
    unread = [name for name in OF_DATASETS if getattr(given, name) != getattr(DataConfig, name)]
    if dataset in ("", "folder", "digits") and unread:
        raise ConfigError(f"{flag(unread[0])} is for a data set of timm (--dataset), and the images are "
                          f"{'the digits' if dataset == 'digits' else f'those in {given.data_dir}'}")
    parts = Parts(given.train_split, given.val_split, given.input_key, given.target_key, val_alone)
    reading = reading_of(settings)
    return open_data(
        dataset, given.data_dir, reading, parts=parts,
        download=given.dataset_download, num_classes=settings.model.num_classes, watch=report.watch,
    ), reading  # fmt: skip
