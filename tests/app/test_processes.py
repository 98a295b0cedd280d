"""The command line in two processes: the same network as in one, one writer, one message, and no waiting for the dead."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("rich")
pytest.importorskip("timm")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")
from support.command_line import NETWORK, RESREP, SMALL, at_batch, rows, weights
from support.processes import in_two

from narrower.app import cli, run_folder

ALONE, BOTH = ["-b", "128"], ["-b", "64", "--sync-bn"]
ONESHOT = ["prune", *SMALL, "--epochs", "2", "--tune-steps", "2"]
FORGETTING = ["prune", *SMALL, *RESREP, "--epochs", "3", "--checkpoint", "one/dense.safetensors"]
SOFT = ["prune", *SMALL, "--method", "soft", "--macs", "0.5", "--epochs", "2", "--checkpoint", "one/dense.safetensors"]
RENEWED = ["prune", *SMALL, "--checkpoint", "one/dense.safetensors", "--no-reconstruct", "--epochs", "0", "--held-out", "0"]


class Outcome(NamedTuple):
    code: int
    out: str
    err: str
    ended: float


def command(arguments: list[str]) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    return Outcome(code, out.getvalue(), err.getvalue(), time.monotonic())


def stopped(arguments: list[str], stage: str, number: int | None) -> Outcome:
    """The command, in which this process gets a signal in the middle of a stage."""
    def send() -> None:
        Path(f"{arguments[-1]}.time").write_text(str(time.monotonic()))
        if number is not None:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        at_batch(patch, stage, 3, send)
        return command(arguments)


def commands(rank: int) -> None:
    """Each process runs all of these. In the last one the second process dies."""
    def keep(name: str, outcome: Outcome) -> None:
        Path(f"{name}-{rank}.json").write_text(json.dumps(outcome))

    second = rank == 1
    keep("oneshot", command([*ONESHOT, *BOTH, "--output", "two"]))
    keep("eval", command(["eval", "two", "--device", "cpu"]))
    keep("resrep", command([*FORGETTING, *BOTH, "--output", "two-resrep"]))
    keep("soft", command([*SOFT, *BOTH, "--output", "two-soft"]))
    keep("dry", command([*SOFT, *BOTH, "--dry-run", "--output", "dry"]))
    keep("renewed", command([*RENEWED, *BOTH, "--output", "two-renewed"]))
    keep("impossible", command([*RENEWED, *BOTH, "--macs", "1e-9", "--output", "impossible"]))
    keep("other", command([*RENEWED, *BOTH, "--lr", str(1 + rank), "--output", "other"]))
    keep("cut", stopped([*FORGETTING, *BOTH, "--output", "cut"], "resrep: epoch 2", signal.SIGINT if second else None))
    keep("resumed", command(["prune", "--resume", "cut"]))
    keep("killed", stopped([*ONESHOT, *BOTH, "--output", "killed"], "train dense", signal.SIGKILL if second else None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where one process, and then two, have run the commands."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "net.py").write_text(NETWORK)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "200")
        for arguments, name in ((ONESHOT, "one"), (FORGETTING, "one-resrep"), (SOFT, "one-soft"), (RENEWED, "one-renewed")):
            assert command([*arguments, *ALONE, "--output", name]).code == 0
        in_two(commands)
        yield folder


def outcomes(folder: Path, name: str) -> list[Outcome]:
    """Of both processes; of the first only where the second was killed."""
    return [Outcome(*json.loads(file.read_text())) for file in sorted(folder.glob(f"{name}-*.json"))]


def difference(one: Path, two: Path) -> float:
    """The largest difference of two runs' weights, relative to the largest weight of a tensor. The shapes are the same."""
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    pairs = [(first[name].double(), second[name].double()) for name in first]
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


@pytest.mark.parametrize(("name", "tolerance"), [("", 1e-3), ("-resrep", 1e-4), ("-soft", 1e-4), ("-renewed", 1e-5)])
def test_two_processes_make_the_network_of_one(folder: Path, name: str, tolerance: float) -> None:
    """The same images make a step; sums of float32 in another order differ in the last bits."""
    one, two = folder / f"one{name}", folder / f"two{name}"
    assert (one / run_folder.PLAN).read_text() == (two / run_folder.PLAN).read_text()
    assert difference(one, two) < tolerance
    stages = [[(row["stage"], row.get("epoch"), row.get("top1"), row.get("kept")) for row in rows(run)] for run in (one, two)]
    assert stages[0] == stages[1]
    losses = [[row["loss"] for row in rows(run) if "loss" in row] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_first_process_writes_and_prints(folder: Path) -> None:
    for name in ("oneshot", "eval", "resrep", "soft", "dry", "renewed"):
        first, second = outcomes(folder, name)
        assert first.code == second.code == 0
        assert first.out and not (first.err or second.out or second.err)
    first, _ = outcomes(folder, "eval")
    assert f"{rows(folder / 'two')[-1]['narrow']['top1']:.2f} %" in first.out
    planned, soft = ([re.sub(r"\d+\.\d s$", "", line) for line in outcomes(folder, name)[0].out.splitlines()]
                     for name in ("dry", "soft"))
    assert planned[-1].startswith("plan ") and {*planned[3:]} - {planned[-1]} <= {*soft}
    assert not list(folder.glob("*/*.part")) and not (folder / "dry").exists()


def test_an_error_of_all_is_told_once(folder: Path) -> None:
    for name, says in (("impossible", "the least is"),
                       ("other", "the processes disagree on --lr: 1.0 in process 0, 2.0 in process 1")):
        found = outcomes(folder, name)
        assert [outcome.code for outcome in found] == [2, 2]
        told = "".join(outcome.err for outcome in found)
        assert told.startswith("narrower: error: ") and says in told and told.count("\n") == 1
        assert not (folder / name).exists()


def test_a_signal_to_one_process_stops_both_at_the_same_step(folder: Path) -> None:
    found = outcomes(folder, "cut")
    assert [outcome.code for outcome in found] == [130, 130]
    assert "".join(outcome.err for outcome in found).count("interrupted; what was done is in cut") == 1
    assert [outcome.code for outcome in outcomes(folder, "resumed")] == [0, 0]
    assert difference(folder / "cut", folder / "two-resrep") == 0


def test_a_process_that_is_killed_ends_the_other_with_a_message(folder: Path) -> None:
    (survivor,) = outcomes(folder, "killed")
    assert survivor.code == 2 and survivor.err.count("\n") == 1
    assert "another process has stopped without a message; go on with --resume killed" in survivor.err
    assert survivor.ended - float((folder / "killed.time").read_text()) < 120  # else it waits for hours
