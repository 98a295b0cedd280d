"""The command line as a user meets it: runs from start to end, bad input, Ctrl-C, and what is left on disk."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("rich")
pytest.importorskip("timm")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")
from PIL import Image
from support.command_line import NETWORK as NET
from support.command_line import rows, weights

import narrower
from narrower.app import cli, run_folder, terminal
from narrower.app.config import DataConfig, ModelConfig, PruneConfig, RunConfig
from narrower.report.facts import START
from narrower.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
NETWORK = NET + """
class Broken(Net):
    def forward(self, x):
        raise KeyError("oops")

class Single(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.only = nn.Conv2d(3, num_classes, 3)

    def forward(self, x):
        return self.only(x).mean((2, 3))

def seven():
    return Net(7)
"""
SMALL = ["--model", "net.py:Net", "--img-size", "8", "-b", "64", "--device", "cpu", "--cache-dir", "none"]
SHORT = [*SMALL, "--dense-epochs", "2", "--epochs", "2", "--images", "64", "--recalibrate", "256"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "net.py").write_text(NETWORK)
    return tmp_path


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def snapshot(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_prune_trains_its_own_dense_network(capsys: pytest.CaptureFixture[str]) -> None:
    """Train, cut, fine-tune, save; then evaluate, load from Python, and repeat from the saved settings."""
    assert cli.main(["prune", *SHORT, "--output", "one"]) == 0
    shown = capsys.readouterr()
    assert not shown.err
    for words in ("dense against narrow", "reconstructed", "fine-tuned", "MACs", "parameters", "size", "latency", "saved"):
        assert words in shown.out
    names = set(run_folder.FILES) - {run_folder.DENSE_CHECKPOINT, run_folder.LAYERS, run_folder.LAYERS_CHECKPOINT,
                                    run_folder.LATENCY, run_folder.TIMES, run_folder.REPORT}
    assert {path.name for path in Path("one").iterdir()} == names
    assert (Path("one") / run_folder.LOG).read_text() == shown.out

    stages = {row["stage"]: row for row in rows("one") if "epoch" not in row}
    before = "start, trace, settle, train dense, score, sensitivity, plan, narrow, verify"
    assert ", ".join(stages) == f"{before}, cut, reconstruct, save, fine-tune, measure"
    assert all(row["seconds"] >= 0 for row in stages.values() if row["stage"] != START)
    assert stages["start"]["typed"] == shlex.join(["narrower", "prune", *SHORT, "--output", "one"])
    assert [row["epoch"] for row in rows("one") if row["stage"] == "fine-tune" and "epoch" in row] == [1, 2]
    figures = stages["measure"]
    assert figures["narrow"]["macs"] <= 0.5 * figures["dense"]["macs"]
    assert figures["stages"] == {name: stages[name]["top1"] for name in ("cut", "reconstruct", "fine-tune")}
    assert figures["dense"]["top1"] == stages["train dense"]["top1"] > 15
    assert stages["verify"]["error"] < 1e-9
    for name in ("train dense", "cut", "reconstruct", "fine-tune"):
        counted = stages[name]["by_class"]
        assert len(counted["images"]) == 10 and sum(counted["images"]) == 599
        assert 100 * sum(counted["right"]) / 599 == pytest.approx(stages[name]["top1"])
    assert all(min(pair) > 0 for pair in figures["layer_times"]["ms"].values())
    assert figures["layer_times"]["ms"].keys() == {name for name, t in weights("one").items() if t.ndim > 1}
    sizes = json.loads((Path("one") / run_folder.PLAN).read_text())["groups"]
    scores = load_file(Path("one") / run_folder.SCORES)
    assert scores and all(len(values) == sizes[name] for name, values in scores.items())

    assert cli.main(["eval", "one", "--device", "cpu"]) == 0
    assert f"{figures['narrow']['top1']:.2f} %" in capsys.readouterr().out
    sys.modules.pop("net", None)
    from narrower.models import make_model

    small = narrower.load("one", lambda: make_model("net.py:Net", 10))
    assert same(small.state_dict(), weights("one"))

    assert cli.main(["prune", "--config", "one/config.yaml", "--output", "two"]) == 0
    assert same(weights("one"), weights("two"))
    assert (Path("one") / run_folder.CONFIG).read_text() == (Path("two") / run_folder.CONFIG).read_text()


def test_eval_and_inspect_find_what_train_and_prune_left(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *SMALL, "--epochs", "2", "--output", "dense"]) == 0
    before = snapshot("dense")
    arguments = ["--checkpoint", "dense/model.safetensors", "--method", "magnitude", "--remove", "0.5"]
    assert cli.main(["prune", *SMALL, *arguments, "--epochs", "0", "--exclude", "conv2", "--output", "narrow"]) == 0
    assert snapshot("dense") == before
    assert weights("narrow")["conv1.weight"].shape == (4, 3, 3, 3)
    assert weights("narrow")["conv2.weight"].shape == (16, 4, 3, 3)
    assert not (Path("narrow") / run_folder.DENSE).exists()
    capsys.readouterr()
    dense = rows("dense")[-1]["top1"]
    for arguments in (["dense"], [*SMALL, "--checkpoint", "dense/model.safetensors"]):
        assert cli.main(["eval", *arguments]) == 0
        assert f"{dense:.2f} %" in capsys.readouterr().out
    for arguments in (["narrow"], SMALL[:4]):
        assert cli.main(["inspect", *arguments]) == 0
        out = capsys.readouterr().out
        assert "conv1" in out and "pinned: network output" in out and "MACs" in out


def test_the_network_of_a_run_is_narrowed_again_trained_further_and_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    """A narrow run serves like a dense one, and no run is written over its own start."""
    quick = ["--method", "magnitude", "--epochs", "0", "--images", "48", "--macs"]
    assert cli.main(["train", *SMALL, "--epochs", "2", "--output", "dense"]) == 0
    assert cli.main(["prune", "dense", *quick, "0.6", "--output", "once"]) == 0
    assert cli.main(["prune", "once", *quick, "0.6", "--output", "twice"]) == 0
    assert "given against narrow" in capsys.readouterr().out
    last = {run: rows(run)[-1] for run in ("once", "twice")}
    assert last["twice"]["dense"]["macs"] == last["once"]["narrow"]["macs"]
    assert last["twice"]["narrow"]["macs"] <= 0.6 * last["once"]["narrow"]["macs"]
    assert cli.main(["train", "twice", "--epochs", "1", "--lr", "0.01", "--output", "further"]) == 0
    one, two = weights("twice"), weights("further")
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()} and not same(one, two)
    capsys.readouterr()
    assert cli.main(["eval", "further", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    top1 = [row["top1"] for row in rows("further") if "top1" in row][-1]
    assert found["top1"] == pytest.approx(top1) and found["top1"] <= found["top5"] and found["images"] == 599
    assert found["macs"] == last["twice"]["narrow"]["macs"] and found["loss"] > 0
    assert 100 * sum(found["by_class"]["right"]) / 599 == pytest.approx(top1)
    best = load_file("further/best.safetensors")  # of its only epoch
    assert best.keys() == two.keys() and best["conv1.weight"].shape == two["conv1.weight"].shape
    assert cli.main(["inspect", "further", "--checkpoint", "further/best.safetensors"]) == 0
    capsys.readouterr()
    assert cli.main(["prune", "once", *quick, "0.6", "--output", "once", "--overwrite"]) == 2
    assert "--checkpoint once is of the run in --output once, whose place" in capsys.readouterr().err


def test_a_budget_is_reached_in_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """Each step measures again, and the plan that comes out is for the dense network. Resumed, the run goes on with it."""
    assert cli.main(["train", *SMALL, "--epochs", "2", "--output", "dense"]) == 0
    common = ["prune", "dense", "--method", "magnitude", "--images", "48", "--epochs", "0", "--macs", "0.4", "--steps", "2"]
    assert cli.main([*common, "--output", "run"]) == 0
    found = [row for row in rows("run") if row["stage"] == "plan"]
    dense, first = found[0]["macs"]
    assert 0.5 * dense <= first <= 0.4**0.5 * dense and found[1]["macs"] == [first, pytest.approx(0.4 * dense, rel=0.2)]
    assert found[1]["macs"][1] <= 0.4 * dense == 0.4 * json.loads((Path("run") / run_folder.PLAN).read_text())["macs"][0]
    assert [row["stage"] for row in rows("run")].count("sensitivity") == 2
    assert next(row for row in rows("run") if row["stage"] == "verify")["error"] < 1e-6
    before, lines = weights("run"), (Path("run") / run_folder.METRICS).read_text().splitlines(keepends=True)
    (Path("run") / run_folder.METRICS).write_text("".join(line for line in lines if '"save"' not in line))
    assert cli.main(["prune", "--resume", "run"]) == 0
    assert same(before, weights("run"))


def test_steps_leave_out_what_is_reached_already(capsys: pytest.CaptureFixture[str]) -> None:
    """The first step towards the multiply-adds takes more parameters than the second may leave, or all that were to go."""
    from narrower.models import make_model

    torch.save(make_model("net.py:Net").state_dict(), "net.pt")
    common = ["prune", *SMALL, "--checkpoint", "net.pt", "--method", "magnitude", "--allocate", "share", "--no-reconstruct",
              "--dry-run"]
    for budget, steps in ((["--macs", "0.4", "--params", "0.9", "--steps", "2"], 2), (["--macs", "0.99", "--steps", "3"], 1)):
        capsys.readouterr()
        assert cli.main([*common, *budget]) == 0
        assert capsys.readouterr().err.count("narrower: step ") == steps


def test_a_dry_run_plans_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *SMALL, "--epochs", "1", "--output", "dense"]) == 0
    before = sorted(folder.rglob("*"))
    for method in ("magnitude", "resrep"):
        capsys.readouterr()
        given = ["prune", "dense", "--method", method, "--images", "48", "--macs", "0.7", "--dry-run"]
        assert cli.main([*given, "--output", "run"]) == 0
        out = capsys.readouterr().out
        assert "conv1" in out and "MACs" in out and "saved" not in out
    assert sorted(folder.rglob("*")) == before
    for arguments, message in ((["prune", *SMALL, "--dry-run"], "--dry-run plans for trained weights"),
                               (["prune", "dense", "--dry-run", "--method", "resrep", "--allocate", "norms"], "the training")):
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("method", ["hrank", "obs", "fpgm", "bn_scale", "taylor", "random"])
def test_every_method_meets_the_budget(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--method", method, "--remove", "0.25", "--dense-epochs", "1", "--epochs", "0"]
    exclude = ["--exclude", "conv2"] if method == "bn_scale" else []
    assert cli.main(["prune", *SMALL, *quick, *exclude, "--recalibrate", "0", "--output", "run"]) == 0
    assert weights("run")["conv1.weight"].shape[0] == 6


def test_constants_are_folded_or_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half of the first layer's channels have no scale; two of them are positive, and read by a padded convolution."""
    from narrower.models import make_model

    model: Any = make_model("net.py:Net")
    with torch.no_grad():
        model.bn1.weight[:4], model.bn1.bias[:4] = 0, torch.tensor([0.3, 0.3, -0.3, -0.3])
    torch.save(model.state_dict(), "dense.pt")
    wishes = ["--method", "bn_scale", "--exclude", "conv2", "--remove", '{"conv1": 0.5}', "--epochs", "0", "--no-reconstruct"]
    assert cli.main(["prune", *SMALL, "--checkpoint", "dense.pt", *wishes, "--output", "run"]) == 0
    printed = capsys.readouterr().out
    assert "0 removed channels are constant and folded" in printed
    assert "not folded: conv1: 2 channels: conv2.weight reads them between zeros" in printed


def flat_images(place: Path, count: int = 40) -> None:
    place.mkdir()
    draw = torch.Generator().manual_seed(0)
    for k in range(count):
        pixels = torch.randint(0, 256, (8, 8, 3), generator=draw, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(place / f"{k:02}.png")


def test_images_without_classes_are_enough_without_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Top-1 is the agreement with the dense network; labels that do not exist are never trained on."""
    from narrower.models import make_model

    flat_images(folder / "flat")
    torch.manual_seed(0)
    torch.save(make_model("net.py:Net").state_dict(), "dense.pt")
    images = [*SMALL, "--data-dir", "flat", "--workers", "0"]
    common = ["prune", *images, "--checkpoint", "dense.pt", "--method", "magnitude", "--remove", "0.25", "--images", "24"]
    assert cli.main([*common, "--epochs", "0", "--output", "run"]) == 0
    said = capsys.readouterr()
    assert "top-1 is the share of images on which a network agrees with the dense one" in said.err
    stages = {row["stage"]: row for row in rows("run")}
    assert stages["evaluate dense"]["top1"] == 100 >= stages["reconstruct"]["top1"]
    assert cli.main([*common, "--epochs", "1", "--distill-weight", "1", "--mixup", "0.5", "--output", "trained"]) == 0
    grid = ["compare", *images, "--checkpoint", "dense.pt", "--methods", "dense", "--output", "grid"]
    assert cli.main([*grid, "--epochs", "0"]) == 0
    assert json.loads(Path("grid/compare.json").read_text())["dense"] == 100
    capsys.readouterr()
    for arguments, message in (
        ([*common, "--epochs", "1"], "train towards the dense network alone"),
        ([*common, "--epochs", "1", "--no-distill"], "train towards the dense network alone"),
        ([*common, "--epochs", "0", "--method", "taylor"], "--method taylor needs labels"),
        (["sensitivity", *images, "--checkpoint", "dense.pt", "--method", "taylor"], "--method taylor needs labels"),
        ([*grid, "--seeds", "1", "--epochs", "1"], "train towards the dense network alone"),
        (["prune", *images, "--epochs", "0"], "no network can be trained on them"),
        (["train", *images], "no network can be trained on them"),
        (["eval", "run"], "there is no accuracy to evaluate"),
    ):
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err


def test_measured_damages_serve_later_plans(capsys: pytest.CaptureFixture[str]) -> None:
    """`sensitivity` prints and saves the curves. A run with them plans as one that measures itself."""
    assert cli.main(["train", *SMALL, "--epochs", "2", "--output", "dense"]) == 0
    common = [*SMALL, "--checkpoint", "dense/model.safetensors", "--method", "magnitude", "--images", "48"]
    assert cli.main(["sensitivity", *common, "--output", "damage"]) == 0
    said = capsys.readouterr().out
    assert "kl on 8 images" in said and "saved in damage/sensitivity.json" in said
    prune = ["prune", *common, "--macs", "0.6", "--epochs", "0"]
    assert cli.main([*prune, "--sensitivity", "damage/sensitivity.json", "--output", "one"]) == 0
    assert cli.main([*prune, "--output", "two"]) == 0
    plans = [(Path(run) / run_folder.PLAN).read_text() for run in ("one", "two")]
    assert plans[0] == plans[1] and same(weights("one"), weights("two"))
    assert not any(row["stage"] == "sensitivity" for row in rows("one"))
    assert cli.main(["sensitivity", *common, "--method", "resrep", "--output", "prior"]) == 0  # which plans by magnitude
    assert (Path("prior") / "sensitivity.json").read_text() == (Path("damage") / "sensitivity.json").read_text()
    capsys.readouterr()
    (Path("damage") / "sensitivity.json").write_text("{")
    damaged = {"damage/sensitivity.json": "this is not a sensitivity", "none.json": "cannot read the sensitivity"}
    for name, message in damaged.items():
        assert cli.main([*prune, "--sensitivity", name, "--output", "three"]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["sensitivity", *SMALL, "--output", "four"]) == 2
    assert "measured on a trained network" in capsys.readouterr().err


def test_each_stage_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """Share instead of measured damage, no reconstruction (BatchNorm is renewed then), no distillation."""
    plain = ["--allocate", "share", "--no-reconstruct", "--no-distill", "--method", "magnitude", "--macs", "0.6"]
    assert cli.main(["prune", *SHORT, *plain, "--output", "run"]) == 0
    stages = [row["stage"] for row in rows("run")]
    assert "recalibrate" in stages and not {"sensitivity", "reconstruct"} & {*stages}
    assert "BatchNorm renewed" in capsys.readouterr().out
    assert cli.main(["prune", *SHORT, "--allocate", "best", "--output", "other"]) == 2
    assert "--allocate best: give measured or share or norms" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "name", "expected"), [
    (["--tune-steps", "2", "--tune-lr", "1e-3"], "tune", {"steps": 2, "lr": 1e-3}),
    (["--distill-temperature", "2", "--distill-weight", "0.5", "--distill-features", "0.1", "--epochs", "1"], "Distillation",
     {"temperature": 2.0, "weight": 0.5, "features": 0.1}),
    (["--min-channels", "3"], "plan", {"min_channels": 3}),
    (["--min-channels", "0.25"], "plan", {"min_channels": 0.25}),
    (["--no-allow-inexact"], "trace", {"allow_inexact": False}),
])  # fmt: skip
def test_settings_reach_the_library(flags: list[str], name: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
                                    ) -> None:
    given, plain = [], getattr(narrower, name)

    def noted(*args: Any, **options: Any) -> Any:
        given.append(options)
        return plain(*args, **options)

    monkeypatch.setattr(narrower, name, noted)
    assert cli.main(["prune", *SMALL, "-b", "256", "--epochs", "0", "--dense-epochs", "0", *flags, "--output", "run"]) == 0
    assert any(expected.items() <= options.items() for options in given)


def test_trackers_get_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracker of our own stands for those that accelerate knows."""
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    seen: list[tuple[dict[str, Any], int | None]] = []

    class Recorder(GeneralTracker):
        name, requires_logging_directory, tracker = "recorder", False, None

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            seen.append((values, None))

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            seen.append((values, step))

    monkeypatch.setattr(cli, "make_accelerator", lambda device, log_with, folder: Accelerator(
        cpu=True, log_with=[Recorder()] if [*log_with] == ["recorder"] else None))
    assert cli.main(["train", *SMALL, "--epochs", "2", "--log-with", "recorder", "--output", "run"]) == 0
    assert seen[0][0]["epochs"] == 2 and seen[0][0]["lr"] == 0.1
    epochs = [(values, step) for values, step in seen if "train/val_loss" in values]
    assert [step for _, step in epochs] == [1, 2]
    found = [row for row in rows("run") if "epoch" in row]
    assert [values["train/top1"] for values, _ in epochs] == [row["top1"] for row in found]


def test_the_default_folder_is_new_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert cli.main(["train", *SMALL, "--epochs", "0"]) == 0
    assert len({path.name for path in Path("runs").glob("*-train-net.py_Net*")}) == 2


def test_the_own_network_of_a_run_is_found_from_anywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["train", *SMALL, "--epochs", "0", "--output", "run"]) == 0
    assert f"\nmodel: {folder}/net.py:Net\n" in "\n" + (Path("run") / run_folder.CONFIG).read_text()
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert cli.main(["eval", "../run", "--device", "cpu"]) == 0


def test_weights_can_be_read_by_those_who_may_read_other_files(folder: Path) -> None:
    (folder / "plain").touch()
    assert cli.main(["train", *SMALL, "--epochs", "0", "--output", "run"]) == 0
    assert {path.stat().st_mode for path in Path("run").iterdir()} == {(folder / "plain").stat().st_mode}


def test_eval_of_an_interrupted_run_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *SMALL, "--epochs", "0", "--output", "run"]) == 0
    (Path("run") / run_folder.MODEL).unlink()
    for command in ("eval", "inspect"):
        assert cli.main([command, "run", "--device", "cpu"]) == 2
        assert "has no network yet: go on with it by narrower train --resume " in capsys.readouterr().err


def test_more_workers_than_cores_are_a_warning(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    for workers, used in ((3, 3), (500, 3)):
        assert cli.main(["train", *SMALL, "--epochs", "0", "--workers", str(workers), "--output", f"run{workers}"]) == 0
        assert ("this machine has 3 cores" in capsys.readouterr().err) == (workers > 3)
        assert f"\nworkers: {used}\n" in (Path(f"run{workers}") / run_folder.CONFIG).read_text()


def test_a_short_type_that_is_slow_here_is_a_warning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert cli.main(["train", *SMALL, "--epochs", "0", "--amp", "--output", "a"]) == 0
    assert "warning: --amp: this processor computes bfloat16 by software" in capsys.readouterr().err
    assert cli.main(["train", *SMALL, "--epochs", "0", "--output", "b"]) == 0
    assert "warning" not in capsys.readouterr().err


def test_a_run_is_not_overwritten_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", *SMALL, "--epochs", "1", "--output", "run"]
    assert cli.main(train) == 0
    (Path("run") / "notes.txt").write_text("mine")
    (Path("run") / run_folder.NARROW).write_text("{}")  # of an older run, say
    before = snapshot("run")
    assert cli.main(train) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert cli.main([*train, "--overwrite", "--data-dir", "nowhere"]) == 2
    assert cli.main(["prune", *SHORT, "--output", "run", "--overwrite", "--macs", "1e-9"]) == 2
    assert "cannot be reached" in capsys.readouterr().err
    assert snapshot("run") == before  # nothing was lost to commands that could not run
    assert cli.main([*train, "--overwrite", "--seed", "1"]) == 0
    after = snapshot("run")
    assert after["notes.txt"] == b"mine" and run_folder.NARROW not in after
    assert after[run_folder.MODEL] != before[run_folder.MODEL]


def test_a_resumed_run_keeps_its_settings_or_says_what_changed(capsys: pytest.CaptureFixture[str]) -> None:
    """What would give another network is refused by name; a longer training goes on, and config.yaml has its length."""
    quick = ["--method", "magnitude", "--remove", "0.25", "--images", "48", "--epochs", "1"]
    for seed in ("1", "2"):
        assert cli.main(["train", *SMALL, "--epochs", "0", "--seed", seed, "--output", f"dense{seed}"]) == 0
    assert cli.main(["prune", *SMALL, *quick, "--checkpoint", "dense1/model.safetensors", "--output", "run"]) == 0
    before = snapshot("run")
    assert json.loads(before[run_folder.METRICS].splitlines()[0])["command"] == "prune"
    capsys.readouterr()
    for arguments, says in (
        (["prune", "--remove", "0.5", "--method", "resrep"], "--method (magnitude, now resrep), --remove (0.25, now 0.5)"),
        (["prune", "--lr", "0.5"], "has ended: --lr (0.02, now 0.5) would change nothing"),
        (["prune", "--checkpoint", "dense2/model.safetensors"], "began with other weights of the dense network"),
        (["train"], "run is a run of `narrower prune`: go on by narrower prune --resume run"),
    ):
        assert cli.main([*arguments, "--resume", "run"]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") <= 2
        assert snapshot("run") == before
    Path("dense1").rename("moved")
    longer = ["--epochs", "2", "--checkpoint", "moved/model.safetensors"]
    assert cli.main(["prune", "--resume", "run", *longer]) == 0
    assert "changed from here on: --checkpoint (" in capsys.readouterr().err
    assert "\nepochs: 2\n" in (Path("run") / run_folder.CONFIG).read_text()
    assert next(row for row in rows("run") if row["stage"] == "resume")["changed"]["epochs"] == [1, 2]
    assert [row["epoch"] for row in rows("run") if row["stage"] == "fine-tune" and "epoch" in row] == [1, 2]


def test_a_run_that_diverges_brings_back_the_one_that_it_was_to_replace(capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", *SMALL, "--epochs", "1", "--output", "run"]
    assert cli.main(train) == 0
    before = snapshot("run")
    assert cli.main([*train, "--overwrite", "--lr", "1e8"]) == 2
    assert "train has diverged: the loss is" in capsys.readouterr().err
    assert snapshot("run") == before


def make_images(root: Path, size: int = 8) -> None:
    for split in ("train", "val"):
        for value, name in enumerate("ab"):
            (root / split / name).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (size, size), (100 * value, 40 * number, 0)).save(root / split / name / f"{number}.png")


def truncated(root: Path) -> None:
    torch.save(torch.nn.Linear(3, 3).state_dict(), root / "weights.pt")
    (root / "weights.pt").write_bytes((root / "weights.pt").read_bytes()[:300])


def unreadable(root: Path, size: int = 8) -> None:
    make_images(root / "images", size)
    for path in (root / "images" / "train").glob("*/1.png"):
        path.write_bytes(b"no image")


def nothing(root: Path) -> None:
    pass


BAD: list[tuple[list[str], str, Callable[[Path], object]]] = [
    (["--model", "cifar_resnet21"], "did you mean cifar_resnet", nothing),
    (["--model", "net.py:Broken"], "the network fails on images of shape (1, 3, 8, 8): KeyError: 'oops'", nothing),
    (["--model", "net.py:Single"], "nothing is free in this network (only: network output", nothing),
    (["--model", "net.py:seven"], "(1, 7) instead of (1, 10)", nothing),
    (["--model", "net.py:nine"], "no function or class 'nine'", nothing),
    (["--model", "other.py:Net"], "other.py' for --model", nothing),
    (["--model", "cifar_resnet20", "--pretrained"], "no published weights", nothing),
    (["--model-kwargs", '{"depth": 3}'], "unexpected keyword argument 'depth'", nothing),
    (["--checkpoint", "nowhere.pt"], "does not exist", nothing),
    (["--checkpoint", "weights.pt"], "damaged, truncated", truncated),
    (["--checkpoint", "w.pt"], "of another network", lambda root: torch.save({"a": torch.zeros(1)}, root / "w.pt")),
    (["--checkpoint", "m.pt"], "not run", lambda root: torch.save(torch.nn.Linear(1, 1), root / "m.pt")),
    (["--checkpoint", "a", "--pretrained"], "either --checkpoint or --pretrained", nothing),
    (["--macs", "0"], "between 0 and 1", nothing),
    (["--macs", "-0.5"], "between 0 and 1", nothing),
    (["--macs", "1e-9"], "cannot be reached: the least is", nothing),
    (["--params", "1e-9"], "cannot be reached: the least is", nothing),
    (["--remove", "1.5"], "between 0 and 1", nothing),
    (["--remove", '{"layer9*": 0.5}'], "no group matches 'layer9*'", nothing),
    (["--exclude", "layer9*"], "no group matches 'layer9*'", nothing),
    (["--macs", "0.5", "--remove", "0.5"], "either a budget", nothing),
    (["--method", "best"], "take one of obs, hrank, resrep, soft, centripetal, magnitude", nothing),
    (["--method", "resrep", "--allocate", "norms", "--remove", "0.5"], "works towards a budget", nothing),
    (["--allocate", "norms"], "is for --method resrep", nothing),
    (["--forgetting", '{"strength": 1}'], "--forgetting is for --method resrep, and the method is obs", nothing),
    (["--scope", "all"], "--scope is for --method resrep or centripetal, and the method is obs", nothing),
    (["--images", "8"], "measuring and repairing need 16 at least", nothing),
    (["--method", "resrep", "--prior", "none"], "give --allocate norms too", nothing),
    (["--method", "resrep", "--epochs", "0"], "needs --epochs", nothing),
    (["--method", "resrep", "--macs", "0.01"], "the least is", nothing),
    (["--method", "resrep", "--scope", "outer"], "give inner or all", nothing),
    (["--method", "resrep", "--no-reconstruct"], "--no-reconstruct is for --method obs or hrank or magnitude", nothing),
    (["--method", "resrep", "--forgetting", '{"lambda": 1}'], "it knows strength, warmup_steps", nothing),
    (["--images", "0"], "--images 0: give a value of at least 1", nothing),
    (["--train-split", "all"], "--train-split is for a data set of timm (--dataset), and the images are the digits", nothing),
    (["-b", "0"], "--batch-size 0", nothing),
    (["--lr", "-1"], "--lr -1.0", nothing),
    (["--in-chans", "2"], "--in-chans 2", nothing),
    (["--mean", "0.5"], "--mean has 1 values", nothing),
    (["--device", "nonsense"], "--device nonsense", nothing),
    (["--data-dir", "nowhere"], "does not exist", nothing),
    (["--dataset", "digits", "--data-dir", "."], "the digits are embedded, they do not come from --data-dir", nothing),
    (["--num-classes", "7"], "--num-classes 7: the images of digits have 10 classes", nothing),
    (["--data-dir", "empty"], "no folder train", lambda root: (root / "empty").mkdir()),
    (["--data-dir", "images"], "no images under", lambda root: (root / "images/train").mkdir(parents=True)),
    (["--data-dir", "images"], "cannot read image images/train/a/1.png", unreadable),
    (["--dataset", "torch/cifar10"], "needs --data-dir", nothing),
    (["--dataset", "no_such", "--data-dir", "."], "timm cannot open dataset 'no_such'", nothing),
    (["--output", "net.py"], "is a file", nothing),
    (["--output", "a", "--overwrite", "--checkpoint", "a/dense.safetensors"], "is of the run in --output a", nothing),
    (["--output", "a", "--overwrite", "--checkpoint", "b/../a"], "is of the run in --output a", nothing),
    (["--output", "a", "--overwrite", "--sensitivity", "a/sensitivity.json"], "is of the run in --output a", nothing),
    (["--model-kwargs", '{"num_classes": 2}'], "has num_classes, which has a flag of its own: give --num-classes", nothing),
    (["--model", "resnet18", "--model-kwargs", '{"in_chans": 1}'], "--model-kwargs has in_chans", nothing),
    (["--torchcompile", "foo"], "--torchcompile foo: torch knows", nothing),
    (["-b", "1", "--mixup", "0.2"], "--mixup 0.2 mixes images in pairs: give --batch-size 2 or more", nothing),
    (["--std", "0.2", "0", "0.2"], "--std 0.2 0.0 0.2: pixels are divided by it, give values above 0", nothing),
    (["--mean", "123.7", "116.3", "103.5"], "--mean 123.7 116.3 103.5: pixels are read as numbers from 0 to 1", nothing),
    (["--std", "58", "57", "57"], "divide by 255", nothing),
    (["--sched", "step"], "--sched step: give --decay-epochs", nothing),
    (["--clip-grad", "0"], "--clip-grad 0.0: give a value of at least 1e-09", nothing),
    (["--resume", "nowhere"], "no run folder", nothing),
]


@pytest.mark.parametrize(("arguments", "says", "prepare"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, prepare: Callable[[Path], object], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one message on stderr, no traceback, and no run folder from what never ran."""
    prepare(folder)
    assert cli.main(["prune", *SHORT, *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("narrower: error: ") and says in shown.err
    assert "Traceback" not in shown.err + shown.out
    assert not (folder / "runs").exists()


def test_help_of_a_command_that_is_misspelt(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["nonsense"], []):
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("narrower: error: ") and error.endswith("(all options: narrower --help)\n")


def test_outputs_without_images_are_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *SMALL, "--epochs", "0", "--num-classes", "12", "--output", "run"]) == 0
    assert "warning: --num-classes 12: the images of digits have 10 classes" in capsys.readouterr().err


def test_inspect_opens_the_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    from narrower.models import make_model

    torch.save(make_model("net.py:Net").state_dict(), "dense.pt")
    for file, says in (("nowhere.pt", "does not exist"), ("net.py", "no checkpoint"), ("dense.pt", "")):
        assert cli.main(["inspect", *SMALL[:4], "--device", "cpu", "--checkpoint", file]) == (2 if says else 0)
        assert says in capsys.readouterr().err


def test_inspect_goes_on_without_published_weights(capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.py").write_text("import net\ndef own(pretrained=False):\n    if pretrained:\n        raise OSError('away')\n"
                                "    return net.Net()\n")
    assert cli.main(["inspect", "--model", "own.py:own", "--img-size", "8", "--device", "cpu", "--pretrained"]) == 0
    shown = capsys.readouterr()
    assert "channels free" in shown.out and "without published weights, which inspect does not need: own.py:own" in shown.err
    assert cli.main(["inspect", "--model", "cifar_resnet21", "--device", "cpu", "--pretrained"]) == 2
    shown = capsys.readouterr()
    assert "did you mean cifar_resnet" in shown.err and "without published weights" not in shown.err


def test_eval_needs_no_training_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images(folder / "images", 8)
    assert cli.main(["train", *SMALL, "--data-dir", "images", "--epochs", "0", "--output", "dense"]) == 0
    capsys.readouterr()
    assert cli.main(["eval", "dense", "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    shutil.rmtree(folder / "images" / "train")
    assert cli.main(["eval", "dense", "--json"]) == 0
    assert {**json.loads(capsys.readouterr().out), "latency_ms": 0} == {**both, "latency_ms": 0}
    assert cli.main(["eval", *SMALL, "--checkpoint", "dense/model.safetensors", "--data-dir", "images"]) == 0
    assert cli.main(["train", "dense", "--epochs", "0", "--output", "more"]) == 2
    assert "images has no folder train or training (found: val)" in capsys.readouterr().err


def test_an_unreadable_image_met_while_training_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Large images are opened by other processes, whose tracebacks do not reach the user."""
    unreadable(folder, size=80)
    arguments = ["--data-dir", "images", "--img-size", "72", "--epochs", "1", "--workers", "1", "--output", "run"]
    assert cli.main(["train", *SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("narrower: error: cannot read image images/train/") and error.count("\n") == 1


def test_a_damaged_run_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prune", *SHORT, "--output", "run"]) == 0
    plan = json.loads((Path("run") / run_folder.NARROW).read_text())
    for change, says in (({"format": 99}, "update narrower"), ({"shapes": {}}, "damaged")):
        (Path("run") / run_folder.NARROW).write_text(json.dumps(plan | change))
        capsys.readouterr()
        assert cli.main(["eval", "run"]) == 2
        assert says in capsys.readouterr().err
    (Path("run") / run_folder.NARROW).write_text(json.dumps(plan))
    assert cli.main(["eval", "run", "--model", "cifar_resnet20"]) == 2
    assert "another network" in capsys.readouterr().err
    (Path("run") / run_folder.CONFIG).write_text("{")
    assert cli.main(["eval", "run"]) == 2
    assert "cannot read" in capsys.readouterr().err


@pytest.mark.parametrize(("stage", "at"), [("train dense", 3), ("fine-tune", 7)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    stage: str, at: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the middle: exit code 130, the work is saved, and the resumed run is the uninterrupted one."""
    arguments = ["prune", *SHORT, "--output"]
    assert cli.main([*arguments, "whole"]) == 0
    plain = terminal.Terminal.watch

    def pressing(self: terminal.Terminal, iterable: Any, description: str = "", total: int = 0) -> Iterator[Any]:
        for number, item in enumerate(plain(self, iterable, description, total)):
            if description.startswith(f"{stage}: epoch 2") and number == at:
                os.kill(os.getpid(), signal.SIGINT)
            yield item

    with monkeypatch.context() as patched:
        patched.setattr(terminal.Terminal, "watch", pressing)
        assert cli.main([*arguments, "cut"]) == 130
    error = capsys.readouterr().err
    assert "interrupted" in error and "--resume cut" in error and "Traceback" not in error
    checkpoint = torch.load(Path("cut") / (run_folder.CHECKPOINT if stage == "fine-tune" else run_folder.DENSE_CHECKPOINT))
    assert checkpoint["epoch"] == 1 and checkpoint["step"] == at + 1
    if stage == "fine-tune":
        assert same(checkpoint["model"], weights("cut"))  # usable without going on
    assert cli.main(["prune", "--resume", "cut"]) == 0
    assert same(weights("whole"), weights("cut"))
    assert cli.main(["prune", "--resume", "cut"]) == 0  # nothing is left to do: evaluated again, and not logged twice
    assert same(weights("whole"), weights("cut"))
    assert sum(row["stage"] == "score" for row in rows("cut")) == 1  # not done again
    figures = [next(row for row in reversed(rows(run)) if row["stage"] == "measure") for run in ("whole", "cut")]
    assert figures[0]["narrow"]["top1"] == figures[1]["narrow"]["top1"]
    assert figures[0]["stages"] == figures[1]["stages"]
    epochs = [[(row["stage"], row["epoch"]) for row in rows(run) if "epoch" in row] for run in ("whole", "cut")]
    assert epochs[0] == epochs[1]


RESREP = [*SMALL, "--dense-epochs", "1", "--epochs", "4", "--method", "resrep", "--macs", "0.5", "--scope", "all",
          "--images", "48"]


@pytest.mark.parametrize("allocate", ["measured", "norms"])
def test_resrep_merges_what_it_trained(allocate: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prune", *RESREP, "--allocate", allocate, "--output", "run"]) == 0
    out = capsys.readouterr().out
    assert "masked" in out and "channels are zero" in out and "dense against narrow" in out
    stages = {row["stage"]: row for row in rows("run")}
    assert {"trace", "resrep", "merge", "recalibrate", "measure"} <= stages.keys() and "fine-tune" not in stages
    narrow, dense = stages["measure"]["narrow"], stages["measure"]["dense"]
    assert narrow["macs"] <= 0.5 * dense["macs"]
    assert narrow["top1"] == stages["recalibrate"]["top1"]
    assert stages["merge"]["error"] < 1e-4
    epochs = [row for row in rows("run") if "epoch" in row and row["stage"] == "resrep"]
    assert epochs[-1]["reached"] <= 0.5 and epochs[-1]["zero"] > 0
    assert weights("run")["conv1.weight"].shape[0] < 8
    assert ("plan" in stages) == (allocate == "measured")
    assert cli.main(["eval", "run"]) == 0


def test_a_resumed_resrep_run_equals_an_uninterrupted_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The merged network of an interrupted training is usable; the resumed one is the uninterrupted one, across a shrink."""
    assert cli.main(["prune", *RESREP, "--output", "whole"]) == 0
    plain = terminal.Terminal.watch

    def pressing(self: terminal.Terminal, iterable: Any, description: str = "", total: int = 0) -> Iterator[Any]:
        for number, item in enumerate(plain(self, iterable, description, total)):
            if description.startswith("resrep: epoch 3") and number == 5:
                os.kill(os.getpid(), signal.SIGINT)
            yield item

    with monkeypatch.context() as patched:
        patched.setattr(terminal.Terminal, "watch", pressing)
        assert cli.main(["prune", *RESREP, "--output", "cut"]) == 130
    checkpoint = torch.load(Path("cut") / run_folder.CHECKPOINT, weights_only=True)
    sizes = {"conv1": 8, "conv2": 16}
    assert any(len(kept) < sizes[name] for name, kept in checkpoint["resrep"]["keep"].items()), "it had shrunk"
    assert cli.main(["eval", "cut"]) == 0
    assert cli.main(["prune", "--resume", "cut"]) == 0
    assert same(weights("whole"), weights("cut"))
    noted = [[(row["epoch"], row["steps"], row["norms"]) for row in rows(run) if "norms" in row] for run in ("whole", "cut")]
    assert noted[0] == noted[1] != []
    assert cli.main(["prune", "--resume", "cut"]) == 0
    assert same(weights("whole"), weights("cut"))


@pytest.mark.parametrize("allocate", ["measured", "norms"])
def test_settings_of_forgetting_go_with_both_ways_to_choose(allocate: str) -> None:
    given = ["--dense-epochs", "0", "--epochs", "1", "--images", "48", "--allocate", allocate]
    assert cli.main(["prune", *RESREP, *given, "--forgetting", '{"mask_interval": 7}', "--output", "run"]) == 0
    assert "merge" in {row["stage"] for row in rows("run")}


@pytest.mark.parametrize("command", [["inspect", *SMALL[:4]], ["prune", *SHORT, "--epochs", "0", "--dense-epochs", "0"]])
def test_a_long_trace_tells_on_standard_error_how_far_it_is(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = narrower.trace

    def slow(*given: Any, progress: Callable[[str], None], **options: Any) -> narrower.Graph:
        progress("tracing since 2 s: [3] forwards")
        return plain(*given, **options)

    monkeypatch.setattr(narrower, "trace", slow)
    assert cli.main([*command, "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert "narrower: tracing since 2 s: [3] forwards\n" in shown.err and "tracing since" not in shown.out


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["prune", "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for group in (ModelConfig, DataConfig, PruneConfig, TrainConfig, RunConfig):
        assert f"\n{'fine-tuning' if group is TrainConfig else group.__doc__}:" in text
        assert all("--" + item.name.replace("_", "-") in text for item in fields(group))


def test_without_the_extras_the_command_line_says_what_to_install() -> None:
    """What is missing is named, with the command that installs it."""
    program = "import sys; sys.modules['rich'] = None; import narrower.app.cli"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'narrower[cli]'" in done.stderr and "Traceback" not in done.stderr


def test_the_module_and_the_command_are_the_same() -> None:
    done = subprocess.run([sys.executable, "-m", "narrower", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"narrower {narrower.__version__}\n" and done.returncode == 0
