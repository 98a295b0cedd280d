"""Soft pruning in the command line."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from support.command_line import NETWORK, SMALL, at_batch, rows, weights

from narrower.app.cli import main

SOFT = ["prune", *SMALL, "--method", "soft", "--macs", "0.5", "--epochs", "2", "--batch-size", "256", "--no-report"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NETWORK)


def test_a_resumed_run_equals_an_uninterrupted_one_and_meets_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["--softness", '{"factor": 0.5}']
    assert main([*SOFT, *settings, "--output", "whole"]) == 0
    measured = next(row for row in rows("whole") if row["stage"] == "measure")
    assert measured["narrow"]["macs"] <= 0.5 * measured["dense"]["macs"]
    epochs = [row for row in rows("whole") if row["stage"] == "soft" and "hard" in row]
    assert epochs[-1]["hard"] == epochs[-1]["channels"] > 0
    with monkeypatch.context() as patch:
        at_batch(patch, "soft: epoch 2", 2, lambda: signal.raise_signal(signal.SIGINT))
        assert main([*SOFT, *settings, "--output", "cut"]) == 130
    assert main(["prune", "--resume", "cut"]) == 0
    whole, again = weights("whole"), weights("cut")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(("extra", "said"), [
    (["--epochs", "0"], "take --method obs"),
    (["--model-ema"], "--model-ema"),
    (["--softness", "hardest"], "gradual-hard"),
    (["--softness", '{"speed": 1}'], "factor"),
    (["--softness", '{"factor": "half"}'], "--softness {'factor': 'half'}: "),
    (["--prior", "none"], "--prior none"),
    (["--steps", "2"], "--steps"),
    (["--schedule", "layer"], "--schedule layer"),
    (["--method", "obs", "--softness", "sfp"], "--softness is for --method soft"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused_in_one_line(
    extra: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SOFT, *extra, "--output", "no"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
