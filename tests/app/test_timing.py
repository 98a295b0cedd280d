"""Milliseconds as a budget on the command line: a table measured once, and what the narrow network takes in the end.

Times come from a machine that takes a known time for each layer. Nothing is timed but in the table of costs.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("timm")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")
from support.command_line import NETWORK, SMALL, rows, weights
from support.latency import truth
from torch import nn

import narrower
from narrower.app import cli, oneshot, run_folder
from narrower.deployment import fitting
from narrower.deployment.layer_times import key_of
from narrower.deployment.survey import Survey, sizes_in, survey
from narrower.deployment.tabulating import place_of
from narrower.planning.latency import Whole

QUICK = ["prune", *SMALL, "--method", "magnitude", "--epochs", "0"]


class Machine:
    """Layers take what `layer_ms` says, narrow networks `slower` times that. Counts how often a table was asked for."""

    def __init__(self, slower: float = 1.0, spread: float = 0.01) -> None:
        self.slower, self.spread = slower, spread
        self.asked: list[dict[str, Any]] = []
        self.found: Survey | None = None

    @staticmethod
    def layer_ms(job: Mapping[str, Any]) -> float:
        return 1e-3 * math.prod(job["size"]) * math.prod(job["sizes"])

    def table(self, model: nn.Module, graph: narrower.Graph, example: Any, *, runtime: str, threads: int, cache: Path | None,
              progress: Callable[[str], None]) -> narrower.LatencyTable:
        self.asked.append({"runtime": runtime, "threads": threads, "cache": cache})
        progress("layer 1 of 9")
        self.found = survey(model, graph, example)
        if cache:
            cache.write_text("{}")
        times = {key_of(job): self.layer_ms(job) for job in self.found.jobs()}
        sizes = sizes_in(model, self.found)
        return self.found.table(place_of(model, example, runtime, threads), times,
                                [Whole(sizes, truth(self.found, self.layer_ms, sizes), self.spread)])

    def time_networks(self, modules: Sequence[nn.Module], *_: Any, seconds: float) -> list[tuple[float, float]]:
        assert self.found is not None
        dense, narrow = (truth(self.found, self.layer_ms, sizes_in(m, self.found)) for m in modules)
        return [(dense, 0.0), (self.slower * narrow, self.spread)]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "net.py").write_text(NETWORK)
    torch.manual_seed(0)
    sys.modules.pop("net", None)
    from narrower.models import make_model

    torch.save(make_model("net.py:Net", 10).state_dict(), "dense.pt")
    found = Machine()
    monkeypatch.setattr(narrower, "measure_latency", found.table)
    monkeypatch.setattr(fitting, "time_networks", found.time_networks)
    return found


def stage(run: str, name: str) -> dict[str, Any]:
    return next(row for row in reversed(rows(run)) if row["stage"] == name)


def test_milliseconds_are_met_measured_and_shown(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """The table comes before the training and is kept; the plan is corrected by a measurement; the accuracy is measured."""
    machine.slower = 1.2
    asked = ["--latency", "0.6x", "--runtime", "eager", "--threads", "2", "--round-to", "1"]
    assert cli.main([*QUICK, *asked, "--output", "run"]) == 0
    shown = capsys.readouterr().out
    assert machine.asked == [{"runtime": "eager", "threads": 2, "cache": Path("run") / run_folder.TIMES}]
    names = [row["stage"] for row in rows("run")]
    assert names.index("latency table") < names.index("train dense") < names.index("plan") < names.index("cut")
    assert (Path("run") / run_folder.LATENCY).exists() and not (Path("run") / run_folder.TIMES).exists()
    trials, time = stage("run", "plan")["trials"], stage("run", "time")
    assert len(trials) == 2 and trials[0]["error"] == pytest.approx(1 / 1.2 - 1, abs=0.03)
    assert time["narrow_ms"] == pytest.approx(0.6 * time["dense_ms"], rel=0.1) and time["narrow_ms"] == trials[1]["measured_ms"]
    assert time["wanted_ms"] == pytest.approx(0.6 * time["dense_ms"]) and time["spread"] == machine.spread
    assert time["prediction_error"] == pytest.approx(time["predicted_ms"][1] / time["narrow_ms"] - 1)
    assert time["place"]["runtime"] == "eager" and time["place"]["threads"] == 2 and time["place"]["shape"] == [1, 3, 8, 8]
    for words in ("eager on cpu, 2 threads, float32, 1x3x8x8", f"{time['dense_ms']:,.2f} ms",
                  f"x {time['narrow_ms'] / time['dense_ms']:.3f}", "wanted", f"({time['prediction_error']:+.1%})", "spread 1%"):
        assert words in shown
    top1 = stage("run", "measure")["narrow"]["top1"]
    assert cli.main(["eval", "run", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(top1), "of the network that was saved"


def test_a_table_is_measured_once_and_serves_other_runs(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """Resumed, in another run, and in a dry run. Of another machine it still plans, and nothing is claimed as measured."""
    common = [*QUICK, "--checkpoint", "dense.pt"]
    (Path("settings.yaml")).write_text("latency: 0.6x\nruntime: eager\nround_to: auto\n")
    assert cli.main([*common, "--config", "settings.yaml", "--output", "run"]) == 0
    before, lines = weights("run"), (Path("run") / run_folder.METRICS).read_text().splitlines(keepends=True)
    (Path("run") / run_folder.METRICS).write_text("".join(line for line in lines if '"save"' not in line))
    (Path("run") / run_folder.PLAN).unlink()
    assert cli.main(["prune", "--resume", "run"]) == 0
    assert all(torch.equal(before[key], value) for key, value in weights("run").items())
    own = ["--latency", "0.6", "--latency-table", "run/latency.json"]
    capsys.readouterr()
    assert cli.main([*common, *own, "--dry-run", "--output", "dry"]) == 0
    assert "measured" in capsys.readouterr().out and not Path("dry").exists()
    assert len(machine.asked) == 1

    data = json.loads(Path("run/latency.json").read_text())
    data["place"]["machine"] = "a phone"
    Path("phone.json").write_text(json.dumps(data))
    assert cli.main([*common, "--latency", "0.6", "--latency-table", "phone.json", "--output", "phone"]) == 0
    time = stage("phone", "time")
    assert "narrow_ms" not in time and time["predicted_ms"][1] <= 0.6 * time["predicted_ms"][0]
    assert "trials" not in stage("phone", "plan")
    shown = capsys.readouterr().out
    assert "eager (predicted)" in shown and "not measured, the table is of machine a phone" in shown
    for more, message in ((["--runtime", "openvino"], "has times of runtime eager, and openvino is asked for"),
                          (["--img-size", "16"], "has times of images [3, 8, 8], and [3, 16, 16] is asked for")):
        assert cli.main([*common, *own, *more]) == 2
        assert message in capsys.readouterr().err
    assert len(machine.asked) == 1


@pytest.mark.parametrize("method", ["resrep", "soft", "centripetal"])
def test_methods_that_narrow_in_the_training_work_towards_milliseconds(method: str, machine: Machine) -> None:
    given = ["--method", method, "--epochs", "3", "--checkpoint", "dense.pt", "-b", "64"]
    given += ["--scope", "all"] if method != "soft" else []  # which narrows all groups anyway
    given += ["--latency", "60%", "--runtime", "eager", "--round-to", "1"]
    assert cli.main(["prune", *SMALL, *given, "--output", "run"]) == 0
    time = stage("run", "time")
    assert time["narrow_ms"] <= 0.61 * time["dense_ms"]
    assert time["narrow_ms"] == stage("run", "plan")["trials"][-1]["measured_ms"]


def test_a_share_of_every_group_is_tried_for_milliseconds_too(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what comes out is measured: where the second plan is taken, the corrected one keeps the share as well."""
    machine.slower = 1.2
    run = [*QUICK, "--checkpoint", "dense.pt", "--latency", "0.45", "--runtime", "eager", "--round-to", "1", "--no-report"]
    monkeypatch.setattr(oneshot, "LEAST_SHARE", 0.5)
    for taken in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(oneshot, "roomier", lambda *a, taken=taken: (a[3]() if taken else a[2], "\nSEEN"))
            assert cli.main([*run, "--output", str(taken)]) == 0
        assert len(stage(str(taken), "plan")["trials"]) == 2 and "\nSEEN\n" in Path(str(taken), run_folder.LOG).read_text()
        plan = json.loads((Path(str(taken)) / run_folder.PLAN).read_text())
        assert (min(len(plan["keep"][name]) / size for name, size in plan["groups"].items()) >= 0.5) == taken


def test_widths_that_the_runtime_likes_serve_other_budgets(machine: Machine) -> None:
    given = ["--checkpoint", "dense.pt", "--macs", "0.7", "--round-to", "auto"]
    assert cli.main([*QUICK, *given, "--runtime", "eager", "--output", "run"]) == 0
    time = stage("run", "time")
    assert time["wanted_ms"] is None and time["narrow_ms"] < time["dense_ms"] and machine.asked[0]["threads"] == 1


def test_noise_is_told_as_a_number(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.spread = 0.3
    assert cli.main([*QUICK, "--checkpoint", "dense.pt", "--latency", "0.6", "--runtime", "eager", "--output", "run"]) == 0
    assert "too noisy to be measured well: the times of one network spread by 30%" in capsys.readouterr().err
    assert stage("run", "latency table")["spread"] == 0.3 == stage("run", "time")["spread"]


def test_noise_above_what_is_to_be_saved_is_an_error(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is pruned; the times are not kept. Where no milliseconds are asked for, it is a warning at the end."""
    machine.spread = 0.45
    common = [*QUICK, "--checkpoint", "dense.pt", "--runtime", "eager"]
    assert cli.main([*common, "--latency", "0.6", "--output", "run"]) == 2
    assert "too noisy to plan" in (error := capsys.readouterr().err) and "spread by 45%, predictions are off by up to" in error
    assert not (Path("run") / run_folder.TIMES).exists() and not (Path("run") / run_folder.LATENCY).exists()
    assert cli.main([*common, "--macs", "0.7", "--round-to", "auto", "--output", "other"]) == 0
    assert "too noisy to say whether the narrow network is faster: the times of one network spread by 45%" in " ".join(
        capsys.readouterr().err.split())


@pytest.mark.parametrize(("arguments", "says"), [
    ("--latency half", "--latency half: give 0.6x for a fraction"),
    ("--latency 1.5x", "--latency 1.5x: give 0.6x for a fraction"),
    ("--latency -3", "--latency -3.0: give 0.6x for a fraction"),
    ("--latency 0.5 --runtime fast", "--runtime fast: take one of eager, compile, onnxruntime, openvino"),
    ("--latency 0.5 --threads 0", "--threads 0: give a value of at least 1"),
    ("--threads 2", "--threads is for --latency or --round-to auto"),
    ("--round-to odd", "--round-to odd: give a whole number or auto"),
    ("--latency 0.5 --remove 0.5", "--latency is a budget of its own, --remove is no budget"),
    ("--latency 0.5 --steps 2", "--steps takes no --latency"),
    ("--latency 0.5 --method resrep --allocate norms", "--allocate norms works towards --macs or --params"),
    ("--latency 0.0001x --runtime eager", "cannot be reached: the least is"),
    ("--latency 1e9 --runtime eager", "is no less than the dense network has"),
    ("--latency 0.5 --latency-table nowhere.json", "cannot read the latency table"),
    ("--latency 0.5 --latency-table net.py", "this is not a latency table"),
    ("--latency 0.5 --latency-table .", "has no jobs.json or no times.json"),
    ("--latency 0.5", "onnxruntime is missing"),
])  # fmt: skip
def test_what_cannot_be_done_is_one_line(arguments: str, says: str, machine: Machine, capsys: pytest.CaptureFixture[str],
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing was trained: the dense network would be."""
    if arguments == "--latency 0.5":
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert cli.main([*QUICK, *arguments.split(), "--output", "run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("narrower: error: ") and says in error and error.count("\n") == 1
    assert not any(row["stage"] == "train dense" for row in (rows("run") if Path("run/metrics.jsonl").exists() else []))
