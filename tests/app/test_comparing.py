"""A grid of runs: each is one of `prune`, what is there is not done again, and the table and picture say what came out."""

from __future__ import annotations

import io
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("timm")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")
import torch
from rich.console import Console
from support.command_line import NETWORK, SMALL, at_batch, rows, weights
from support.run_folders import write_rows

from narrower.app import cli
from narrower.app.comparing import Cell, Comparison, Outcome, cells, frontier, lines, pareto, seconds_of, settings_of
from narrower.app.comparing import outcome as read_outcome
from narrower.app.config import CompareConfig, PruneConfig
from narrower.app.job import Job, Settings
from narrower.app.prune import Result, prune
from narrower.app.terminal import grid

GRID = ["compare", *SMALL, "--epochs", "1", "--output", "grid"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "net.py").write_text(NETWORK)
    return tmp_path


def test_a_grid_goes_on_where_it_was_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All runs start from one dense network, and are those that `prune` makes with the same settings."""
    command = [*GRID, "--methods", "magnitude", "random:share", "--seeds", "1"]

    with monkeypatch.context() as patch:
        at_batch(patch, "fine-tune", 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert cli.main(command) == 130
    first = Path("grid/magnitude-0.5-seed-1")
    assert rows(first) and not Path("grid/random-share-0.5-seed-1").exists()
    dense = weights("grid/dense")
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "random:share" in shown and "magnitude" in shown and "compare.json" in shown
    assert all(torch.equal(t, dense[n]) for n, t in weights("grid/dense").items())
    assert cli.main(["prune", *SMALL, "--epochs", "1", "--checkpoint", "grid/dense", "--method", "magnitude", "--seed", "1",
                     "--macs", "0.5", "--output", "alone"]) == 0
    assert all(torch.equal(t, weights(first)[n]) for n, t in weights("alone").items())

    found = json.loads(Path("grid/compare.json").read_text())
    top1 = [row["top1"] for row in rows(first) if row["stage"] == "fine-tune"][-1]
    assert found["figure"] == "top1"
    assert [line["method"] for line in found["lines"]] == ["magnitude", "random:share"] and found["lines"][0]["last"] == top1
    before = [len(rows(p)) for p in sorted(Path("grid").glob("*seed*"))]
    assert cli.main(command) == 0  # nothing is done twice
    assert [len(rows(p)) for p in sorted(Path("grid").glob("*seed*"))] == before
    assert (found["runs"][0]["cell"]["method"], found["runs"][0]["last"]) == ("magnitude", top1)

    capsys.readouterr()
    assert cli.main([*command, "--lr", "0.5"]) == 2
    said = capsys.readouterr().err
    assert "magnitude-0.5-seed-1 was made otherwise: --lr (0.02, now 0.5)" in said and "another --output" in said
    torch.save({n: t + 1 for n, t in dense.items()}, "other.pt")
    other = ["--checkpoint", "other.pt", "--methods", "magnitude", "bn_scale:share", "--epochs", "1"]
    assert cli.main(["compare", *SMALL, "--output", "grid", "--seeds", "1", *other]) == 2
    assert "began with other weights of the dense network than" in capsys.readouterr().err


def test_the_dense_network_trained_on_is_a_row_with_no_budget(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*GRID, "--methods", "dense", "random:share", "--budgets", "0.7", "0.8"]) == 0
    found = json.loads(Path("grid/compare.json").read_text())
    assert [(line["method"], line["budget"]) for line in found["lines"]] == [
        ("dense", 1.0), ("random:share", 0.7), ("random:share", 0.8)]
    row = found["lines"][0]
    assert row["macs"] == row["params"] == 1 and row["right_after"] == found["dense"] and "dense" in capsys.readouterr().out
    stages = [r["stage"] for r in rows("grid/dense-1-seed-0")]
    assert stages.count("fine-tune") == 2, "an epoch, and the stage"


def test_what_cannot_be_done_is_named_and_the_rest_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*GRID, "--methods", "random:share", "--budgets", "0.5", "1e-9", "--epochs", "0"]) == 0
    shown = capsys.readouterr().out
    assert "not done: random-share-1e-09-seed-0: " in shown and "the least" in shown and "random:share" in shown


def test_an_interrupted_grid_has_the_table_of_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Job] = []

    def once(job: Job) -> Result:
        if done:
            raise KeyboardInterrupt
        done.append(job)
        return prune(job)

    monkeypatch.setattr("narrower.app.comparing.prune", once)
    quick = ["--epochs", "0", "--dense-epochs", "0"]
    assert cli.main([*GRID, *quick, "--methods", "random:share", "--seeds", "0", "1"]) == 130
    assert [run["cell"]["seed"] for run in json.loads(Path("grid/compare.json").read_text())["runs"]] == [0]


@pytest.mark.parametrize(("flags", "says"), [
    (["--methods", "obs", "nope"], "no method is called 'nope'"),
    (["--methods", "obs:norms"], "--allocate norms is for --method resrep"),
    (["--methods", "obs:sfp"], "--allocate sfp: take one of"),
    (["--methods", "resrep", "soft:nope"], "--allocate nope: take one of"),
    (["--budgets", "0"], "--budgets 0: give a fraction"),
    (["--methods", "tp-magnitude", "--exclude", "conv1"], "--exclude is not for tp-magnitude: the rows would not be alike"),
    (["--methods", "obs", "dense", "--distill-features", "1"], "--distill-features is not for dense: the rows"),
    (["--methods", "obs", "soft:sfp", "--scope", "all"], "centripetal, and the methods are obs, soft"),
    (["--schedule", "layer"], "there is no option --schedule"),
])
def test_a_wrong_grid_is_refused_before_anything_is_trained(flags: list[str], says: str,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*GRID, *flags]) == 2
    assert says in capsys.readouterr().err and not Path("grid").exists()


def test_each_method_comes_once_before_one_comes_twice() -> None:
    found = cells(CompareConfig(["a", "b"], [0.5, 0.3], [0, 1]))
    assert len(found) == 8 and {c.method for c in found[:2]} == {"a", "b"} and {c.seed for c in found[:4]} == {0}


def outcome(method: str, seed: int, last: float, latency: float = 0.5) -> Outcome:
    return Outcome(Cell(method, 0.5, seed), "miou", 90.0, 80.0, last, 0.5, 0.6, latency, 10.0)


def test_a_method_comes_with_a_setting_by_name() -> None:
    def chosen(method: str) -> PruneConfig:
        return settings_of(Cell(method, 0.3, 1), Settings(), Path("grid")).prune

    assert chosen("soft:sfp") == PruneConfig(method="soft", softness="sfp", macs=0.3)
    assert chosen("centripetal:published") == PruneConfig(method="centripetal", pull="published", macs=0.3)
    assert chosen("centripetal:all") == PruneConfig(method="centripetal", scope="all", macs=0.3)
    assert chosen("soft:share") == PruneConfig(method="soft", allocate="share", macs=0.3)
    assert chosen("resrep:norms") == PruneConfig(method="resrep", allocate="norms", macs=0.3)
    assert chosen("soft") == PruneConfig(method="soft", macs=0.3)


def test_an_outcome_has_the_figure_that_the_task_reports_first(tmp_path: Path) -> None:
    cell = Cell("obs", 0.5, 0)
    costs = {"macs": 4.0, "params": 4.0, "latency_ms": 4.0}
    stages = {"cut": 30.0, "reconstruct": 60.0, "fine-tune": 70.0}
    write_rows(tmp_path, [{"stage": "measure", "dense": {"miou": 80.0, **costs}, "narrow": {"miou": 70.0, **costs, "macs": 2.0},
                           "stages": stages}])
    found = read_outcome(cell, tmp_path)
    assert found == Outcome(cell, "miou", 80.0, 60.0, 70.0, 0.5, 1.0, 1.0, 0.0)
    assert read_outcome(cell, tmp_path / "nothing") is None


def test_a_line_has_the_mean_and_the_standard_deviation_of_its_seeds() -> None:
    found = lines([outcome("a", 0, 88.0), outcome("b", 0, 85.0), outcome("a", 1, 89.0)])
    assert [(line.method, line.n, line.last) for line in found] == [("a", 2, 88.5), ("b", 1, 85.0)]
    assert found[0].spread == pytest.approx(0.5**0.5) and found[1].spread is None


def test_only_what_none_of_lower_cost_exceeds_is_at_the_frontier() -> None:
    assert pareto([(0.5, 90), (0.4, 91), (0.6, 90.5), (0.3, 80), (0.3, 70), (0.9, 92)]) == [(0.3, 80), (0.4, 91), (0.9, 92)]


def test_the_seconds_of_an_epoch_count_once_and_resuming_starts_no_stage_anew() -> None:
    train = [{"stage": "fine-tune", "epoch": n, "seconds": 10.0} for n in (1, 2)]
    cut = {"stage": "cut", "seconds": 3.0}
    found: list[dict[str, Any]] = [{"stage": "start"}, cut, *train, {"stage": "fine-tune", "seconds": 11.0}]
    assert seconds_of(found) == 23


def test_the_table_names_the_figure(tmp_path: Path) -> None:
    found = Comparison("top1", 90.0, (outcome("obs", 0, 88.0),), {}, tmp_path)
    page = Console(width=80, record=True, file=io.StringIO())
    page.print(grid(replace(found, runs=(*found.runs, outcome("tp-group-norm", 0, 87.0), outcome("obs", 1, 89.0)))))
    shown = page.export_text()
    assert "tp-group-norm" in shown and "88.50±0.71" in shown and "…" not in shown, "it fits into 80 columns"
    assert [str(grid(replace(found, figure=name)).title) for name in ("top1", "miou")] == [
        f"{tmp_path}: {name}, dense 90.00 %" for name in ("top-1", "miou")]


def test_the_picture_is_an_svg_with_every_method(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = Comparison("miou", 90.0, (outcome("obs", 0, 88.0), outcome("resrep", 0, 87.0, 0.4)), {}, tmp_path)
    picture = frontier(found)
    assert picture.startswith(b"<?xml") and b"svg" in picture and picture == frontier(found)
    for name in (b"obs", b"resrep", b"latency / dense", b"miou (%)"):
        assert b"<!-- " + name + b" -->" in picture
