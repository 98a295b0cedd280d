"""Centripetal SGD in the command line."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from support.command_line import NETWORK, SMALL, at_batch, rows, weights

from narrower.app import run_folder
from narrower.app.cli import main

QUICK = ["--epochs", "2", "--batch-size", "256", "--scope", "all"]
CENTRIPETAL = ["prune", *SMALL, *QUICK, "--method", "centripetal", "--macs", "0.5", "--no-report"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NETWORK)


def test_a_resumed_run_equals_an_uninterrupted_one_and_meets_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([*CENTRIPETAL, "--output", "whole"]) == 0
    last = {row["stage"]: row for row in rows("whole")}
    assert last["measure"]["narrow"]["macs"] <= 0.5 * last["measure"]["dense"]["macs"]
    assert last["merge"]["error"] < 1e-5
    epochs = [row for row in rows("whole") if row["stage"] == "centripetal" and "spread" in row]
    assert len(epochs) == 2 and epochs[-1]["spread"] == 0
    assert epochs[-1]["top1"] == last["merge"]["top1"], "nothing is lost by the merge"
    assert weights("whole")["conv2.weight"].shape[0] < 16, "a residual stream is merged too"
    with monkeypatch.context() as patch:
        at_batch(patch, "centripetal: epoch 1", 3, lambda: signal.raise_signal(signal.SIGINT))
        assert main([*CENTRIPETAL, "--output", "cut"]) == 130
    assert Path("cut", run_folder.MODEL).exists() and main(["prune", "--resume", "cut"]) == 0
    with monkeypatch.context() as patch:
        at_batch(patch, "centripetal: epoch 1", 0, lambda: signal.raise_signal(signal.SIGINT))
        assert main([*CENTRIPETAL, "--output", "early"]) == 130
    whole, again = weights("whole"), weights("cut")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_dry_run_shows_the_plan_and_a_grid_has_the_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMALL[:8], "--epochs", "1", "--output", "dense"]) == 0
    inner = ["--scope", "inner", "--macs", "0.7"]
    assert main([*CENTRIPETAL, *inner, "--checkpoint", "dense", "--dry-run", "--output", "no"]) == 0
    shown = capsys.readouterr()
    assert "MACs" in shown.out and "left alone: conv2: several layers make it" in shown.err and not Path("no").exists()
    assert main(["compare", *SMALL, *QUICK, "--checkpoint", "dense", "--methods", "centripetal", "--output", "grid"]) == 0
    assert "centripetal" in capsys.readouterr().out and rows("grid/centripetal-0.5-seed-0")[-1]["stage"] == "measure"


def test_the_published_rule_ends_with_differences_which_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CENTRIPETAL, "--pull", "published", "--output", "run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "warning: filters that are merged still differ" in shown
    assert rows("run")[-1]["stage"] == "measure"


@pytest.mark.parametrize(("extra", "said"), [
    (["--epochs", "0"], "take --method obs"),
    (["--model-ema"], "--model-ema"),
    (["--pull", "hard"], "--pull hard: take published, or JSON with together"),
    (["--pull", '{"speed": 1}'], "take published, or JSON with together"),
    (["--pull", '{"together": 2}'], "together=2"),
    (["--pull", '{"together": "soon"}'], "--pull {'together': 'soon'}: "),
    (["--scope", "outer"], "give inner or all"),
    (["--scope", "inner"], "cannot be reached"),
    (["--allocate", "norms"], "--allocate norms is for --method resrep"),
    (["--prior", "none"], "--prior none"),
    (["--tune-steps", "3"], "--tune-steps"),
    (["--steps", "2"], "--steps"),
    (["--schedule", "layer"], "--schedule layer"),
    (["--method", "obs", "--scope", "inner", "--pull", "published"], "--pull is for --method centripetal"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused_in_one_line(
    extra: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*CENTRIPETAL, *extra, "--output", "no"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
