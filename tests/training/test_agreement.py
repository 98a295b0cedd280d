"""What the first of two processes decides, what both agree on, and which of them tells."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from typing import Any

import pytest
import torch.distributed as dist
from support.processes import in_two
from torch import nn

from narrower.errors import BudgetError, ConfigError
from narrower.training.agreement import (
    anywhere,
    ask,
    check_same,
    first,
    is_of_another,
    leave_after,
    local_rank,
    several,
    share,
    tells,
)

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


def after(other: int, rank: int) -> None:
    """Wait until the other process has come here. It does not wait: the message to the store leaves before it goes on.

    A process that ends while the other one still connects, or reads what it sent, would fail that one before its time.
    """
    store = dist.distributed_c10d._get_default_store()
    if rank == other:
        store.set("here", "1")
    else:
        store.wait(["here"])


def raised(work: Any) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:
        work()
    return type(caught.value), str(caught.value)


def impossible() -> int:
    raise BudgetError("too little")


def lose(rank: int) -> dict[str, Any]:
    dist.init_process_group("gloo")
    found = {"differ": raised(lambda: check_same({"images": 10, "classes": 5 + rank}))}
    check_same({"images": 10})
    after(0, rank)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        anywhere(True)
    return found | {"lost": is_of_another(caught.value), "waited": time.monotonic() - began}


def test_other_facts_and_a_lost_process_are_noticed() -> None:
    here, lost = in_two(lose)
    assert lost is None and here["lost"] and here["waited"] < 10
    kind, text = here["differ"]
    assert kind is ConfigError and text.startswith("the processes disagree on classes: 5 in process 0, 6 in process 1")


def asked(rank: int) -> tuple[bool, bool]:
    """The first process goes on before the second is asked: else they would wait for each other here."""
    state = [rank == 1]
    if rank == 1:
        dist.barrier()
    one = ask(lambda: state[0])
    if rank == 0:
        dist.barrier()
    state[0] = False
    two = ask(lambda: state[0])
    return one(), two()


def agree(rank: int) -> dict[str, Any]:
    dist.init_process_group("gloo")
    model = nn.BatchNorm1d(2)
    model.get_buffer("running_mean").add_(rank)
    model.weight.data.add_(3 * rank)
    share(model)
    found = {
        "first": first(lambda: 7 + rank), "anywhere": (anywhere(rank == 1), anywhere(False)), "asked": asked(rank),
        "error": raised(lambda: first(impossible)), "tells": (tells(), tells()), "rank": local_rank(),
        "shared": [t.tolist() for t in (model.running_mean, model.weight) if t is not None],
    }
    anywhere(True)  # the first process keeps the store: it must not end before the other has asked
    return found


def test_what_the_first_process_has_all_have() -> None:
    found = in_two(agree)
    for rank, here in enumerate(found):
        assert here["rank"] == rank and here["first"] == 7 and here["anywhere"] == (True, False)
        assert here["asked"] == (True, False)
        assert here["error"] == (BudgetError, "too little")
        assert here["shared"] == [[0, 0], [1, 1]]
    assert all(sorted(pair) == [False, True] for pair in zip(*(here["tells"] for here in found), strict=True))


def leave(rank: int, codes: tuple[int, int]) -> bool:
    dist.init_process_group("gloo")
    after(1, rank)  # the first keeps the store: only the second may leave while the other is not ready

    def command() -> int:
        if codes[rank] == 1:
            raise ZeroDivisionError("a defect")
        return codes[rank]

    leave_after(command)
    return several()


@pytest.mark.parametrize("codes", [(130, 130), (1, 1), (0, 0)])
def test_a_process_that_fails_leaves_at_once(codes: tuple[int, int], capfd: pytest.CaptureFixture[str]) -> None:
    """No code after it runs; after success there is one process again."""
    assert in_two(partial(leave, codes=codes)) == ([False, False] if codes == (0, 0) else [None, None])
    assert capfd.readouterr().err.count("ZeroDivisionError: a defect") == (2 if codes == (1, 1) else 0)


def test_one_process_decides_alone() -> None:
    assert not several() and first(lambda: 3) == 3 and anywhere(True) and not anywhere(False) and tells()
    assert leave_after(lambda: 5) == 5
    with pytest.raises(BudgetError):
        leave_after(impossible)
    check_same({"images": 10})
    share(nn.Linear(1, 1))
    assert not is_of_another(RuntimeError("gloo: Connection closed by peer"))
    with pytest.raises(BudgetError):
        first(impossible)
