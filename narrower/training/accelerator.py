"""What a training needs of the machine: the device, the other processes, mixed precision, signals."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.images import Batch
from ..errors import ConfigError
from ..extras import optional
from ..inputs import map_tensors, move_to
from .agreement import launched, local_rank, meeting, several
from .config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(device: str = "auto", log_with: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """accelerate's view of this process: its device, and the other processes if there are any.

    A CUDA device becomes the current one of torch, and cuDNN chooses its algorithms by trying them.

    Args:
        device: a name of torch's, or "auto" for what accelerate finds. With "auto" or "cuda" each process has a GPU of its own.
        log_with: accelerate's names of experiment trackers, such as "tensorboard" and "wandb".
        folder: where trackers write.

    Raises:
        MissingExtraError: accelerate is missing.
        ConfigError: a tracker is missing, this machine has no such device, or several processes would share it.
    """
    accelerate = optional("accelerate")
    if device not in ("auto", "cpu"):
        check_device(device)
        if device != "cuda" or launched() == 1:  # else accelerate gives each process a GPU, as it does where none is named
            os.environ["ACCELERATE_TORCH_DEVICE"] = device
    try:
        found: Accelerator = accelerate.Accelerator(cpu=device == "cpu", log_with=list(log_with) or None, project_dir=folder)
    except ValueError as error:
        raise ConfigError(f"--log-with {' '.join(log_with)}: {error}") from error
    if missing := [name for name in log_with if name not in map(str, found.log_with)]:
        raise ConfigError(f"--log-with {missing[0]}: its package is not installed (pip install {missing[0]})")
    if launched() > found.num_processes and found.device.type != "cuda":
        raise ConfigError(f"{launched()} processes were started, and on {found.device} they would not know of each other and "
                          "write the same files: give --device cpu, or start one")
    if found.num_processes > 1:
        meeting()  # here, where all processes pass
    if found.device.type == "cuda":
        use_gpu(found.device)
    return found


def check_device(name: str) -> None:
    """Raises ConfigError if torch cannot use the device, or if it is one GPU for several processes."""
    if name.startswith("cuda:") and launched() > 1:
        raise ConfigError(f"--device {name} is one GPU for {launched()} processes: give --device cuda, which gives each its "
                          "own, and choose among the GPUs by CUDA_VISIBLE_DEVICES")
    each = name == "cuda" and launched() > 1  # even a small tensor takes half a gigabyte of a GPU
    try:
        torch.empty(1, device=f"cuda:{local_rank() % max(1, torch.cuda.device_count())}" if each else name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name} cannot be used here ({reason}); auto takes what there is") from error


def use_gpu(device: torch.device) -> None:
    """Make a GPU the current one, which libraries and CUDA graphs take, and let cuDNN try out its algorithms.

    What it knows without trying does not fit the odd widths of narrow networks.
    """
    if device.index is not None:
        torch.cuda.set_device(device)
    if not torch.are_deterministic_algorithms_enabled():
        torch.backends.cudnn.benchmark = True


def shard_of(accelerator: Accelerator) -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return accelerator.process_index, accelerator.num_processes


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """`config.amp_dtype` where `config.amp` asks for it. bfloat16 has the range of float32, so gradients need no scaling."""
    return torch.autocast(device.type, dtype=getattr(torch, config.amp_dtype), enabled=config.amp)


def emulated(config: TrainConfig, device: torch.device) -> bool:
    """Whether `config.amp` would be slower than float32, as the processor has no arithmetic for `config.amp_dtype`.

    Convolutions are then computed by oneDNN's reference code: ten times slower in bfloat16 on a processor with AVX2 alone.
    """
    if not config.amp or device.type != "cpu":
        return False
    known = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}
    supported = getattr(torch.ops.mkldnn, known[config.amp_dtype], None)
    return supported is not None and not supported()


def to_device(x: Tensor, y: Any, config: TrainConfig, device: torch.device) -> Batch:
    """A batch on the device, in the memory format of the settings."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    # reordered on the device: a copy that changes the order begins with one in memory that is not pinned, and is waited for
    return move_to(x, device).contiguous(memory_format=layout), map_tensors(y, lambda t: move_to(t, device))


@contextmanager
def collect_interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in a list, so that a step is never cut in half. The second signal raises KeyboardInterrupt.

    Not so with several processes: each gets Ctrl-C from the terminal, and again from the launcher, which ends those that do not
    stop within its own patience.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield received
        return

    def note(number: int, _: Any) -> None:
        if received and not several():
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
