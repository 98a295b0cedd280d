"""The folder of a run: what `claim` writes, and what becomes of the run that was there before."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("yaml")

from narrower.app import run_folder
from narrower.app.run_folder import CONFIG, LOG, METRICS, MODEL, MOVING, PICTURES, PREVIOUS, Run
from narrower.errors import ConfigError, StorageError
from narrower.report.facts import RESUME, START


def snapshot(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run, and a file of the user's."""
    run = Run(tmp_path / "run", command="train")
    run.print("first\n")
    run.claim({"lr": 1}, {})
    with run.replacing():
        (run.folder / MODEL).write_text("weights of the first")
    (run.folder / "notes.txt").write_text("mine")
    return run.folder


def replace_it(folder: Path, ending: BaseException | None = None) -> Run:
    """A second run in the folder, which ends with an error or well."""
    run = Run(folder, command="train", overwrite=True)
    run.claim({"lr": 2}, {})
    with run.replacing():
        (folder / MODEL).write_text("weights of the second")
        if ending is not None:
            raise ending
    return run


def test_the_first_row_and_the_lines_before_claim_are_written(folder: Path) -> None:
    run = Run(folder, command="train", resume=True)
    assert run.last(START)["command"] == "train"
    assert (folder / LOG).read_text() == "first\n"


def test_an_error_brings_the_replaced_run_back(folder: Path) -> None:
    before = snapshot(folder)
    run = Run(folder, command="train", overwrite=True)
    run.claim({"lr": 2}, {})
    with pytest.raises(OSError, match="disk full"), run.replacing():
        (folder / MODEL).write_text("half")
        raise OSError("disk full")
    run.print("more of the failed run\n")
    assert snapshot(folder) == before


def test_a_run_that_ends_well_takes_the_place_of_the_other(folder: Path) -> None:
    replace_it(folder)
    assert (folder / MODEL).read_text() == "weights of the second" and (folder / "notes.txt").read_text() == "mine"
    assert not (folder / PREVIOUS).exists()


def test_an_interrupted_run_leaves_both(folder: Path) -> None:
    before = snapshot(folder)
    with pytest.raises(KeyboardInterrupt):
        replace_it(folder, KeyboardInterrupt())
    assert (folder / MODEL).read_text() == "weights of the second"
    assert snapshot(folder / PREVIOUS) == {name: text for name, text in before.items() if name != "notes.txt"}
    with pytest.raises(ValueError):  # a second that also fails brings the first back, not the interrupted one
        replace_it(folder, ValueError())
    assert snapshot(folder) == before


def test_pictures_of_the_report_go_with_the_run_and_other_files_beside_them_stay(folder: Path) -> None:
    def draw(name: str, text: str) -> None:
        (folder / PICTURES).mkdir(exist_ok=True)
        (folder / PICTURES / name).write_text(text)

    draw("widths.svg", "of the first")
    before = snapshot(folder)
    with pytest.raises(KeyboardInterrupt):
        replace_it(folder, KeyboardInterrupt())
    assert not (folder / PICTURES).exists() and (folder / PREVIOUS / PICTURES / "widths.svg").exists()
    draw("macs.svg", "of the second")
    with pytest.raises(ValueError):
        replace_it(folder, ValueError())
    assert snapshot(folder) == before
    draw("mine.svg", "mine")
    replace_it(folder)
    assert [path.name for path in (folder / PICTURES).iterdir()] == ["mine.svg"]


def test_going_on_to_the_end_removes_the_replaced_run(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        replace_it(folder, KeyboardInterrupt())
    run = Run(folder, command="train", resume=True)
    run.claim({"lr": 2}, {})
    with run.replacing():
        pass
    assert (folder / MODEL).read_text() == "weights of the second" and not (folder / PREVIOUS).exists()


def test_a_folder_that_cannot_be_moved_aside_stays_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, plain = snapshot(folder), Path.replace

    def failing(self: Path, target: Any) -> Path:
        if self.name == CONFIG and Path(target).parent.name == MOVING:
            raise OSError("no permission")
        return plain(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(ConfigError, match="cannot write the run.*no permission"):
        replace_it(folder)
    assert snapshot(folder) == before


def test_a_move_that_was_cut_off_goes_on(folder: Path) -> None:
    before = snapshot(folder)
    (folder / MOVING).mkdir()
    (folder / MODEL).replace(folder / MOVING / MODEL)  # killed here
    with pytest.raises(ConfigError, match="already holds a run"):
        Run(folder, command="train")
    with pytest.raises(ValueError):
        replace_it(folder, ValueError())
    assert snapshot(folder) == before


def test_a_run_has_what_it_would_replace_and_nothing_beside_it(folder: Path) -> None:
    run = Run(folder, overwrite=True)
    (folder / "weights.pt").symlink_to(folder / MODEL)
    for mine in (".", MODEL, f"../{folder.name}/{MODEL}", "weights.pt", f"{PREVIOUS}/{MODEL}", f"{PICTURES}/widths.svg"):
        assert run.has(folder / mine), mine
    for other in ("notes.txt", "..", f"other/{MODEL}", f"../other/{MODEL}"):
        assert not run.has(folder / other), other


def test_a_run_that_began_meanwhile_in_the_same_folder_stays(tmp_path: Path) -> None:
    """The folder is claimed minutes after it was looked at."""
    two = [Run(tmp_path / "run", command="train") for _ in range(2)]
    two[0].claim({"lr": 1}, {})
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=r"already holds a run \(config.yaml, metrics.jsonl\): choose another --output"):
        two[1].claim({"lr": 2}, {})
    assert snapshot(tmp_path) == before


def test_runs_that_start_in_the_same_second_have_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(strftime=lambda _: "now"))
    found = [run_folder.default_folder("train", "net.py:Net") for _ in range(3)]
    assert [str(path) for path in found] == [f"runs/now-train-net.py_Net{end}" for end in ("", "-2", "-3")]
    (found[0] / CONFIG).write_text("lr: 1")
    for path in found:
        run_folder.give_back(path)
    assert [path.name for path in Path("runs").iterdir()] == [found[0].name]


def test_a_run_of_another_command_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match="is a run of `narrower train`: go on by narrower train --resume"):
        Run(folder, command="prune", resume=True)


def test_what_changed_is_recorded_when_a_run_goes_on(folder: Path) -> None:
    before = snapshot(folder)
    Run(folder, command="train", resume=True).claim({"lr": 1}, {})
    assert snapshot(folder) == before
    run = Run(folder, command="train", resume=True)
    run.claim({"lr": 3}, {}, {"lr": (1, 3)})
    assert (folder / CONFIG).read_text() == "lr: 3\n"
    assert run.last(RESUME)["changed"] == {"lr": [1, 3]} and METRICS in snapshot(folder)


def test_a_line_that_a_crash_cut_off_does_not_swallow_the_next(folder: Path) -> None:
    with (folder / METRICS).open("a") as file:
        file.write('{"stage": "sa')
    run = Run(folder, command="train", resume=True)
    run.claim({"lr": 1}, {})
    run.log({"stage": "save"})
    assert [row["stage"] for row in Run(folder, resume=True).rows()] == [START, "save"]


def test_a_run_that_was_killed_before_its_first_row_gets_it_when_it_goes_on(folder: Path) -> None:
    (folder / METRICS).unlink()
    Run(folder, command="train", resume=True).claim({"lr": 1}, {"training images": 10})
    assert Run(folder, resume=True).last(START)["training images"] == 10


def test_a_run_that_was_being_replaced_does_not_go_on(folder: Path) -> None:
    (folder / MOVING).mkdir()
    with pytest.raises(ConfigError, match="was being replaced when a process was killed.*start the new run again"):
        Run(folder, command="train", resume=True)


def test_a_process_that_lost_another_leaves_both_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "is_of_another", lambda error: "gloo" in str(error))
    with pytest.raises(RuntimeError):
        replace_it(folder, RuntimeError("gloo: Connection closed by peer"))
    assert (folder / MODEL).read_text() == "weights of the second" and (folder / PREVIOUS / MODEL).exists()


def test_what_cannot_be_written_is_an_error_of_one_line(folder: Path) -> None:
    run = Run(folder, command="train", resume=True)
    run.claim({"lr": 1}, {})
    (folder / METRICS).unlink()
    (folder / METRICS).mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*metrics.jsonl: .*; when it can be, go on with --resume"):
        run.log({"stage": "save"})
