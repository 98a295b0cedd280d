"""`narrower report`: a page in each folder, or an error and nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("timm")
pytest.importorskip("accelerate")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
from support.command_line import NETWORK
from support.html import check_page
from support.run_folders import ROWS, write_rows, write_run

from narrower.app import cli
from narrower.app.reporting import facts_of, report_at_end


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def test_each_run_gets_a_page_and_on_request_its_pictures(folder: Path) -> None:
    write_run(folder / "one", NETWORK)
    write_rows(folder / "two")
    before = {p.name for p in (folder / "one").iterdir()}
    assert cli.main(["report", "one", "two"]) == 0
    assert {p.name for p in (folder / "one").iterdir()} == before | {"report.html"}
    page = check_page((folder / "two" / "report.html").read_text())
    assert "Left out" in page.text and "two" in page.text
    assert cli.main(["report", "one", "--svg"]) == 0
    assert {p.stem for p in (folder / "one" / "report").glob("*.svg")} == {
        "widths", "macs", "latency", "scores", "damage", "training", "classes"}
    assert "Left out" not in check_page((folder / "one" / "report.html").read_text()).text


def test_pictures_that_are_no_longer_drawn_go_and_those_of_others_stay(folder: Path) -> None:
    write_rows(folder / "one")
    (folder / "one" / "report").mkdir()
    for name in ("widths.svg", "mine.svg"):
        (folder / "one" / "report" / name).write_text("<svg/>")
    assert cli.main(["report", "one", "--svg"]) == 0
    assert {p.stem for p in (folder / "one" / "report").iterdir()} == {"mine", "training", "classes", "latency"}


def test_the_facts_are_those_of_the_plan(folder: Path) -> None:
    plan = write_run(folder / "one", NETWORK.replace("conv1", "stem"))
    facts = facts_of(folder / "one")
    assert facts.widths == {name: (plan.graph[name].size, len(kept)) for name, kept in plan.keep.items()}
    layers = {layer.name: layer.narrow[0] for layer in facts.layers}
    assert layers["stem.weight"] == len(plan.keep["stem"]) and not facts.absent
    assert list(facts.scores) == list(facts.widths)  # in the order of the network
    for name, one in facts.scores.items():
        assert np.flatnonzero(one.kept).tolist() == plan.keep[name].tolist() and len(one.values) == plan.graph[name].size


def test_a_run_by_hrank_shows_maps_of_its_dense_network(folder: Path) -> None:
    plan = write_run(folder / "one", NETWORK, {"method": "hrank", "cache_dir": "none"})
    facts = facts_of(folder / "one")
    assert facts.maps and all(one.kept == (one.channel in plan.keep[name]) for name, own in facts.maps.items() for one in own)
    (folder / "one" / "dense.safetensors").unlink()
    facts = facts_of(folder / "one")
    assert not facts.maps and "the dense weights are not there" in facts.absent["maps"]


def test_what_cannot_be_read_is_absent_with_its_reason(folder: Path) -> None:
    write_run(folder / "one", NETWORK)
    (folder / "one" / "sensitivity.json").write_text("{}")
    (folder / "one" / "plan.json").write_text('{"groups": 3}')
    (folder / "one" / "narrower.json").unlink()
    (folder / "net.py").unlink()
    facts = facts_of(folder / "one")
    assert facts.absent.keys() == {"layers", "widths", "scores", "sensitivity", "graph"} and "net.py" in facts.absent["graph"]
    assert cli.main(["report", "one"]) == 0
    assert check_page((folder / "one" / "report.html").read_text()).text.count("Left out") == 5


def test_accuracy_without_labels_is_named_agreement(folder: Path) -> None:
    write_rows(folder / "one", [{"stage": "start", "command": "prune", "labelled": False}, *ROWS[1:]])
    assert facts_of(folder / "one").headline_title == "agreement with the dense network"


@pytest.mark.parametrize(("rows", "says"), [
    (ROWS[:-1], "the run in two has not ended: go on with it by narrower prune --resume two"),
    ([{"stage": "start", "command": "sensitivity"}], "two is a measurement of damage"),
    (None, "two is no run folder"),
])  # fmt: skip
def test_bad_folders_are_one_line_and_nothing_is_written(
    rows: list[dict[str, object]] | None, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "two").mkdir()
    if rows is not None:
        write_rows(folder / "two", rows)
    write_rows(folder / "one")
    assert cli.main(["report", "one", "two"]) == 2
    printed = capsys.readouterr()
    assert says in printed.out + printed.err and not list(folder.glob("*/report.html"))


def test_without_the_extra_the_command_says_so_and_a_run_ends_well(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(folder / "one")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert cli.main(["report", "one"]) == 2
    printed = capsys.readouterr()
    assert "narrower[report]" in printed.out + printed.err
    told: list[str] = []
    report_at_end(folder / "one", told.append)
    assert not told and not (folder / "one" / "report.html").exists()


def test_a_run_that_ends_tells_where_its_report_is(folder: Path) -> None:
    write_rows(folder / "one")
    told: list[str] = []
    report_at_end(Path("one"), told.append)
    assert told == [f"report: {Path('one/report.html')}"] and (folder / "one" / "report.html").stat().st_size < 5e6


def test_a_line_that_a_crash_cut_off_does_no_harm(folder: Path) -> None:
    write_rows(folder / "one")
    with (folder / "one" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(ROWS[0])[:9])
    assert cli.main(["report", "one"]) == 0
