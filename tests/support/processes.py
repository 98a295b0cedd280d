"""Two processes as a launcher starts them, forked from the test, which has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any


def in_two(work: Callable[[int], Any], seconds: float = 300) -> list[Any]:
    """What `work(rank)` returns in each of two processes, in the environment that torchrun makes; None where one is killed.

    A process that does not end in time fails the test.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ends, found = [], []
    for rank in (0, 1):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=run, args=(work, rank, port, there))
        process.start()
        there.close()
        ends.append((process, here))
    for process, here in ends:
        try:
            found.append(here.recv() if here.poll(seconds) else None)
        except EOFError:
            found.append(None)
        process.join(10)
        if process.is_alive():
            process.kill()
            raise AssertionError(f"a process did not end; the other found {found}")
    return found


def run(work: Callable[[int], Any], rank: int, port: int, end: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)  # of the parent process
    except ImportError:
        pass
    end.send(work(rank))
