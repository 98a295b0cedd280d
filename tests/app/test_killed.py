"""A run that ends at a random point goes on to the same network, bit for bit: killed, Ctrl-C, or on a full disk.

`NARROWER_KILLS=20` takes so many points for each method, instead of one for each way to end.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("rich")
pytest.importorskip("timm")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")
pytest.importorskip("resource")
import resource

from support.command_line import NETWORK, RESREP, SMALL, rows

from narrower.app import cli, run_folder

WAYS = ("killed", "Ctrl-C", "full disk")
POINTS = int(os.environ.get("NARROWER_KILLS", len(WAYS)))
RUNS = {"oneshot": ["prune", *SMALL, "-b", "64", "--epochs", "2", "--tune-steps", "3"],
        "resrep": ["prune", *SMALL, "-b", "64", "--epochs", "3", *RESREP],
        "soft": ["prune", *SMALL, "-b", "64", "--epochs", "2", "--method", "soft", "--macs", "0.5"],
        "centripetal": ["prune", *SMALL, "-b", "64", "--epochs", "2", "--method", "centripetal", "--scope", "all",
                        "--macs", "0.5"]}


class Fault(NamedTuple):
    """How a process ends, after so many seconds of its own time."""

    way: str
    after: float

    def arm(self) -> None:
        """From a process of its own: the timer counts what it computes, whatever else the machine does."""
        def act(*_: object) -> None:
            if self.way == "Ctrl-C":
                os.kill(os.getpid(), signal.SIGINT)
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))

        signal.signal(signal.SIGPROF, signal.SIG_DFL if self.way == "killed" else act)  # the default is to end at once
        signal.setitimer(signal.ITIMER_PROF, self.after)


class Ended(NamedTuple):
    """`code`: as of a shell, None for one that was killed. `seconds`: of its own time, where it ended by itself."""

    code: int | None
    err: str
    seconds: float


def work(arguments: list[str], fault: Fault | None, end: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a shell
    err, began = io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        if fault is not None:
            fault.arm()
        code = cli.main(arguments)
        signal.setitimer(signal.ITIMER_PROF, 0)
    end.send(Ended(code, err.getvalue(), time.process_time() - began))


def command(arguments: list[str], fault: Fault | None = None) -> Ended:
    """The command in a process of its own, forked from this one, which has imported everything already."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(arguments, fault, there))
    process.start()
    there.close()
    try:
        ended: Ended = here.recv()
    except EOFError:
        ended = Ended(None, "", 0.0)
    process.join()
    assert ended.code is not None or process.exitcode == -signal.SIGPROF, f"the command has failed ({process.exitcode})"
    return ended


def figures(run: str) -> list[tuple[Any, ...]]:
    """What a run has logged of each epoch, and of its last stages, whatever it did twice."""
    last = {(row["stage"], row.get("epoch")): row.get("top1") for row in rows(run)}
    return sorted(((*map(str, key), top1) for key, top1 in last.items() if key[0] != "evaluate dense"), key=str)


@pytest.mark.slow
@pytest.mark.parametrize("method", RUNS)
def test_a_run_that_ends_anywhere_goes_on_to_the_same_network(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "net.py").write_text(NETWORK)
    arguments = RUNS[method]
    whole = command([*arguments, "--output", "whole"])
    assert whole.code == 0
    draw = random.Random(f"{method} {POINTS}")
    for point in range(POINTS):
        run, story = f"run{point}", []
        faults = [Fault(WAYS[(point + k) % len(WAYS)], draw.uniform(0, whole.seconds)) for k in range(draw.choice((1, 2)))]
        for fault in (*faults, None):
            begun = (Path(run) / run_folder.CONFIG).exists()
            ended = command(["prune", "--resume", run] if begun else [*arguments, "--output", run], fault)
            stage = rows(run)[-1]["stage"] if (Path(run) / run_folder.METRICS).exists() else "nothing"
            story.append(f"{fault.way if fault else 'whole'} after {stage}: {ended.code}")
            if fault is not None:
                check_ending(fault, ended)
        print(f"{method} {point}: {'; '.join(story)}")
        assert ended.code == 0, (story, ended.err)
        for name in (run_folder.MODEL, run_folder.NARROW, run_folder.PLAN, run_folder.DENSE):
            assert (Path(run) / name).read_bytes() == (Path("whole") / name).read_bytes(), (story, name)
        assert figures(run) == figures("whole"), story
        epochs = [(row["stage"], row["epoch"]) for row in rows(run) if "epoch" in row]
        assert len(epochs) == len({*epochs}), story


def check_ending(fault: Fault, ended: Ended) -> None:
    """It ended as such a fault should end it, in one line; or it had ended before."""
    if ended.code == 0 or fault.way == "killed":
        return
    assert ended.code == {"Ctrl-C": 130, "full disk": 2}[fault.way], ended
    assert ended.err.count("\n") == 1 and "Traceback" not in ended.err
    if fault.way == "full disk":
        assert "cannot write" in ended.err
