"""Several processes, on one machine or more: what the first decides for all, and one message when one of them fails.

Training, evaluation and BatchNorm statistics are divided among the processes. All else is done by the first one, which sends
the others what it found: they cannot come to another result, and only it reads and writes files of the run.
"""

from __future__ import annotations

import itertools
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ConfigError, NarrowerError
from ..surgery.walk import named_tensors

Found = TypeVar("Found")

PATIENCE = timedelta(hours=3)
"""For so long a process waits for another one that lives. One that dies ends the waiting at once."""
LOST = "another process has stopped without a message"

failures = itertools.count()


def local_rank() -> int:
    """The number of this process on its machine, as the launcher says."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def launched() -> int:
    """How many processes the launcher has started, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def several() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@cache
def _group_beside(_: object) -> Any:
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def meeting() -> Any:
    """The group for messages between processes. It works on the CPU, so that nobody's GPU waits in the meantime.

    All processes must call this for the first time at the same place. `make_accelerator` does.
    """
    return _group_beside(dist.group.WORLD)


def first(find: Callable[[], Found]) -> Found:
    """What `find` returns in the first process, in all of them. The others do not call it.

    The result is pickled. Raises the NarrowerError that `find` raises, in all processes.
    """
    if not several():
        return find()
    sent: list[Any] = [None, None]
    error: NarrowerError | None = None
    if dist.get_rank() == 0:
        try:
            sent[0] = find()
        except NarrowerError as e:
            error = e
            sent[1] = (type(e), str(e))
    dist.broadcast_object_list(sent, src=0, group=meeting())
    if error is not None:
        raise error
    if sent[1] is not None:
        kind, text = sent[1]
        raise kind(text)
    return sent[0]


def anywhere(here: bool) -> bool:
    """Whether it is so in any process."""
    return ask(lambda: here)()


def ask(here: Callable[[], bool]) -> Callable[[], bool]:
    """Ask all processes whether it is so in any. The function that is returned gives the answer, the same in all of them.

    The answer is of the moment of the question. Mostly it has come by the time it is wanted, so that nobody waits. Where there
    is one process it is of the moment when it is wanted.
    """
    if not several():
        return here
    flag = torch.tensor(here(), dtype=torch.uint8)
    asked = dist.all_reduce(flag, dist.ReduceOp.MAX, group=meeting(), async_op=True)

    def answer() -> bool:
        asked.wait()
        return bool(flag)

    return answer


def check_same(facts: Mapping[str, Any]) -> None:
    """Raise ConfigError in all processes, unless the facts are the same in all of them."""
    if not several():
        return
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, dict(facts), group=meeting())
    for number, other in enumerate(found):
        for key, value in found[0].items():
            if other.get(key) != value:
                raise ConfigError(f"the processes disagree on {key}: {value} in process 0, {other.get(key)} in process "
                                  f"{number}; give all of them the same command, files and version of narrower")


def added(mine: Tensor | None) -> Tensor | None:
    """The sum of a tensor over the processes, in all of them. None counts as nothing; the shapes must be the same."""
    if not several():
        return mine
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, None if mine is None else mine.cpu(), group=meeting())
    parts = [part for part in found if part is not None]
    return sum(parts[1:], parts[0]) if parts else None


@torch.no_grad()
def share(model: nn.Module) -> None:
    """Give all processes the parameters and buffers of the first, in place.

    Parameters are alike already after a step; BatchNorm statistics are not, each process has those of its own images.
    """
    if several():
        for t in {id(t): t for t in named_tensors(model).values()}.values():
            dist.broadcast(t, src=0)


def is_of_another(error: BaseException) -> bool:
    """Whether an error says no more than that another process is gone, or does not answer."""
    return several() and isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error))


def tells() -> bool:
    """Whether this process reports the error: the first that fails does. Call it once per command in each process."""
    if not several():
        return local_rank() == 0
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.add(f"narrower/failure/{next(failures)}", 1) == 1
    except (RuntimeError, ValueError):
        return True  # the store went with the process that kept it: better two messages than none


def leave_after(command: Callable[[], int]) -> int:
    """Run a command and return its exit code, the last that this process does.

    One of several processes that fails leaves at once. Python would first take connections and wrapped models apart, where it
    may wait for the other processes, which wait for it.
    """
    try:
        code = command()
    except Exception:
        if not several():
            raise
        traceback.print_exc()
        code = 1
    if several():
        if code:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        dist.destroy_process_group()
    return code
