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
from ..inputs import map_tensors, move_to
from .agreement import meeting, several
from .config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(device: str = "auto", log_with: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """accelerate's view of this process: its device, and the other processes if there are any.

    Args:
        device: a name of torch's, or "auto" for what accelerate finds.
        log_with: accelerate's names of experiment trackers, such as "tensorboard" and "wandb".
        folder: where trackers write.

    Raises:
        ConfigError: accelerate or a tracker is missing, or this machine has no such device.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ConfigError("training needs accelerate: pip install 'narrower[cli]'") from error

    if device not in ("auto", "cpu"):
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"--device {device} cannot be used here ({reason}); auto takes what there is") from error
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    try:
        found = Accelerator(cpu=device == "cpu", log_with=list(log_with) or None, project_dir=folder)
    except ValueError as error:
        raise ConfigError(f"--log-with {' '.join(log_with)}: {error}") from error
    if missing := [name for name in log_with if name not in map(str, found.log_with)]:
        raise ConfigError(f"--log-with {missing[0]}: its package is not installed (pip install {missing[0]})")
    if found.num_processes > 1:
        meeting()  # here, where all processes pass
    return found


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
