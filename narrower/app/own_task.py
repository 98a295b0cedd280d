"""`--task file.py:Task`: the user's own images, loss and figures, loaded by name."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset

from ..data.images import Images, OwnImages, batches
from ..data.sources import ImageData
from ..data.task import OwnTask
from ..errors import ConfigError, DataError, NarrowerError, in_one_line
from ..models import import_named
from ..training.checking import task_in_training
from ..training.config import TrainConfig, flag
from .config import DataConfig

METHODS = ("data", "loss", "measure", "figures")
TAKEN = ("task", "data_dir", "img_size", "cache_dir")
"""Settings of the images that a task is given, that are compared with it, or that say nothing of them."""
TRIED = 2  # images in the batch that a task is tried on


def open_task(given: DataConfig, train: TrainConfig) -> ImageData:
    """The images of the task that the settings name, which is made here.

    Raises:
        ConfigError: there is no such task, it lacks something, or other settings contradict it.
        DataError: when images are read: it has none.
    """
    name = given.task or ""
    plain = DataConfig()
    for item in fields(DataConfig):
        if item.name not in TAKEN and (value := getattr(given, item.name)) != getattr(plain, item.name):
            words = " ".join(map(str, value)) if isinstance(value, list) else value
            raise ConfigError(f"{flag(item.name)} {words}: --task {name} has images of its own, leave one of them out")
    task = make_task(name, given.data_dir)
    if missing := [method for method in METHODS if not callable(getattr(task, method, None))]:
        raise ConfigError(f"--task {name} has no method {missing[0]}: it needs {', '.join(f'{m}()' for m in METHODS)} and "
                          "input_size, see narrower.data.OwnTask")
    size = getattr(task, "input_size", None)
    if not isinstance(size, (tuple, list)) or len(size) != 3 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ConfigError(f"--task {name}: input_size is {size!r}; it must be (channels, height, width) of an image")
    if given.img_size and given.img_size not in size[1:]:
        raise ConfigError(f"--img-size {given.img_size}: the images of --task {name} have {size[1]}x{size[2]} pixels")
    task_in_training(task, train)
    return ImageData(name.rpartition(":")[2], 0, (size[0], size[1], size[2]), lambda split: read(name, task, split), task=task)


def make_task(name: str, data_dir: str | None) -> Any:
    """The object that the class or function called `name` makes. Raises ConfigError where it cannot."""
    make = import_named(name, "--task")
    parameters = inspect.signature(make).parameters
    if data_dir and "data_dir" not in parameters:
        raise ConfigError(f"--data-dir {data_dir}: --task {name} takes no data_dir")
    try:
        return make(**({"data_dir": data_dir} if data_dir else {}))
    except Exception as error:  # whatever the user's class raises
        raise ConfigError(f"--task {name}: it cannot be made: {type(error).__name__}: {error}") from error


def read(name: str, task: OwnTask, split: str) -> Images:
    """The samples of a split. Raises DataError where there are none."""
    try:
        samples = task.data(split)
    except NarrowerError:
        raise
    except Exception as error:  # whatever the user's method raises
        raise DataError(f"--task {name}: data({split!r}) fails: {in_one_line(error)}") from error
    if isinstance(samples, IterableDataset) or not hasattr(samples, "__getitem__") or not hasattr(samples, "__len__"):
        raise DataError(f"--task {name}: data({split!r}) gives {type(samples).__name__}; it must be a map-style data set, with "
                        "len() and [index]")
    if not len(samples):
        raise DataError(f"--task {name}: data({split!r}) has no samples")
    return OwnImages(samples, task)


def first_batch(name: str, data: ImageData) -> tuple[Tensor, Any]:
    """A batch of the images to evaluate on. Raises DataError unless it is a pair of images of the right size and targets."""
    batch = next(iter(batches(data.val, TRIED)))
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        raise DataError(f"--task {name}: a batch is {type(batch).__name__}; samples must be pairs (image, targets), or "
                        "collate() must make (images, targets) of a list of them")
    if batch[0].shape[1:] != data.input_size:
        raise DataError(f"--task {name}: images of a batch are {tuple(batch[0].shape)}, and input_size is {data.input_size}")
    return batch[0], batch[1]
