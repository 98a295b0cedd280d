"""`--task`: the segmentation example through the commands, interrupted and resumed, and what may be wrong with a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("timm")
pytest.importorskip("accelerate")
from support.command_line import at_batch, rows, weights
from support.processes import in_two

from narrower.app import cli

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "segmentation_task.py"
OWN = ["--task", "own.py:Small", "--model", "own.py:tiny", "-b", "16", "--workers", "0", "--device", "cpu"]
SHORT = [*OWN, "--dense-epochs", "1", "--epochs", "2", "--images", "32", "--macs", "0.6"]
SMALL = """
def tiny():
    return nn.Sequential(block(1, 6), block(6, 6), nn.Conv2d(6, CLASSES, 1))

class Small(Shapes):
    def __init__(self, data_dir=None):
        self.folder = data_dir

    def data(self, split):
        return Drawn(48, 0) if split == "train" else Drawn(20, 48)
"""
FAULTY = """
class Lacks:
    input_size = (1, 32, 32)
    data = loss = figures = lambda self, *args: None

class NoSize(Small):
    input_size = 32

class Empty(Small):
    def data(self, split):
        return []

class NoLogits(Small):
    logits = False

class NoFile(Small):
    def data(self, split):
        raise FileNotFoundError("no such folder")

class Broken(list):
    def __getitem__(self, index):
        raise OSError("damaged")

class BadSample(Small):
    def data(self, split):
        return Broken([0, 1])

class Stream(Small):
    def data(self, split):
        return iter(range(9))

class Other(Small):
    input_size = (1, 16, 16)

class Single(Small):
    def data(self, split):
        return [1.0, 2.0]

class Needs(Small):
    def __init__(self, path):
        pass
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "own.py").write_text(EXAMPLE.read_text() + SMALL + FAULTY)
    return tmp_path


def test_prune_and_eval_show_the_figures_of_the_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prune", *SHORT, "--tune-steps", "1", "--output", "one"]) == 0
    shown = capsys.readouterr().out
    assert "kl from the dense outputs" in shown and "kl on held-out images" in shown  # as the task has logits
    assert "own.py:tiny  Small: 1x32x32" in shown and "top-1" not in shown and "miou" in shown
    measured = rows("one")[-1]
    assert next(iter(measured["dense"])) == "miou" and list(measured["stages"]) == ["cut", "reconstruct", "tune", "fine-tune"]
    assert {"miou", "pixels", "headline"} <= rows("one")[1 + [r["stage"] for r in rows("one")].index("save")].keys()
    assert f"task: {Path.cwd() / 'own.py'}:Small" in Path("one/config.yaml").read_text()
    assert cli.main(["eval", "one", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["miou"] == measured["narrow"]["miou"] and found["images"] == 20 and {"pixels", "loss", "macs"} <= found.keys()


@pytest.mark.parametrize("method", ["magnitude", "resrep"])
def test_an_interrupted_run_goes_on_to_the_same_weights(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["prune", *SHORT, "--method", method, "--allocate", "share"]
    arguments += ["--scope", "all"] if method == "resrep" else ["--no-reconstruct"]
    assert cli.main([*arguments, "--output", "whole"]) == 0

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        at_batch(patch, "resrep: epoch 2" if method == "resrep" else "fine-tune: epoch 2", 1, stop)
        assert cli.main([*arguments, "--output", "cut"]) == cli.INTERRUPTED
    assert cli.main(["prune", "--resume", "cut"]) == 0
    one, two = weights("whole"), weights("cut")
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
    assert rows("whole")[-1]["narrow"]["miou"] == rows("cut")[-1]["narrow"]["miou"]


def test_two_processes_find_the_figures_of_one() -> None:
    arguments = ["train", *OWN, "--epochs", "1", "--sync-bn"]
    assert cli.main([*arguments, "--output", "one"]) == 0
    assert in_two(lambda rank: cli.main([*arguments, "-b", "8", "--output", "two"])) == [0, 0]
    one, two = rows("one")[-1], rows("two")[-1]
    assert one["miou"] == pytest.approx(two["miou"], abs=0.1) and one["miou"] > 0
    losses = [[row["val_loss"] for row in rows(run) if "epoch" in row] for run in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_taylor_takes_the_loss_of_the_task_and_sensitivity_its_images_and_whether_it_has_logits() -> None:
    start = ["train", *OWN, "--epochs", "1", "--output", "dense"]
    assert cli.main(start) == 0
    assert cli.main(["prune", "dense", "--method", "taylor", "--allocate", "share", "--dry-run", "--images", "32"]) == 0
    assert cli.main(["sensitivity", "dense", "--method", "magnitude", "--images", "32", "--output", "damage"]) == 0
    assert json.loads(Path("damage/sensitivity.json").read_text())["measure"] == "kl"
    other = ["sensitivity", "dense", "--method", "magnitude", "--images", "32", "--task", "own.py:NoLogits"]
    assert cli.main([*other, "--output", "other"]) == 0
    assert json.loads(Path("other/sensitivity.json").read_text())["measure"] == "relative"


@pytest.mark.parametrize(("task", "more", "message"), [
    ("none.py:Task", [], "cannot import 'none.py' for --task none.py:Task"),
    ("own.py:Smal", [], "has no function or class 'Smal'; it has "),
    ("own.py:Lacks", [], "has no method measure: it needs data(), loss(), measure(), figures() and input_size"),
    ("own.py:NoSize", [], "input_size is 32; it must be (channels, height, width)"),
    ("own.py:Empty", [], "data('val') has no samples"),
    ("own.py:NoFile", [], "data('val') fails: FileNotFoundError: no such folder (line "),
    ("own.py:BadSample", [], "sample 0 of the task's data cannot be read: OSError: damaged (line "),
    ("own.py:Stream", [], "data('val') gives range_iterator; it must be a map-style data set"),
    ("own.py:Other", [], "images of a batch are (2, 1, 32, 32), and input_size is (1, 16, 16)"),
    ("own.py:Single", [], "samples must be pairs (image, targets)"),
    ("own.py:Needs", [], "it cannot be made: TypeError"),
    ("own.py:Shapes", ["--data-dir", "."], "takes no data_dir"),
    ("own.py:Small", ["--dataset", "digits"], "--dataset digits: --task own.py:Small has images of its own"),
    ("own.py:Small", ["--hflip", "0"], "--hflip 0.0: --task own.py:Small has images of its own"),
    ("own.py:Small", ["--mean", "0.5", "0.5", "0.5"], "--mean 0.5 0.5 0.5: --task own.py:Small has images of its own"),
    ("own.py:Small", ["--img-size", "64"], "--img-size 64: the images of --task own.py:Small have 32x32 pixels"),
    ("own.py:Small", ["--mixup", "0.2"], "--mixup 0.2 is for images with classes"),
])
def test_what_is_wrong_with_a_task_is_said_in_one_line(
    task: str, more: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments: list[Any] = ["train", *OWN, "--task", task, *more, "--output", "out"]
    assert cli.main(arguments) == cli.ERROR
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not Path("out").exists()


def test_too_few_images_to_measure_on_are_noticed_before_anything_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    Path("few.py").write_text(Path("own.py").read_text().replace("Drawn(48, 0)", "Drawn(8, 0)"))
    few = ["prune", "--task", "few.py:Small", "--model", "few.py:tiny", "--checkpoint", "dense", *OWN[4:], "--held-out", "0",
           "--epochs", "0", "--macs", "0.6", "--output", "out"]
    assert cli.main(["train", *OWN, "--epochs", "1", "--output", "dense"]) == 0
    capsys.readouterr()
    assert cli.main(few) == cli.ERROR
    assert "8 training images are too few: measuring and repairing need 16 at least" in capsys.readouterr().err
    assert not Path("out").exists()
    assert cli.main([*few, "--method", "magnitude", "--allocate", "share", "--no-reconstruct"]) == 0
