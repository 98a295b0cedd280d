"""`narrower push`: from a run folder to a hub on this machine and back, or an error of one line and nothing anywhere."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("timm")
pytest.importorskip("accelerate")
pytest.importorskip("jinja2")
pytest.importorskip("huggingface_hub")
from support import hub as stand_in
from support.command_line import NETWORK
from support.hub import Hub
from support.run_folders import ROWS, write_rows, write_run

import narrower
from narrower.app import cli
from narrower.app.arguments import parse
from narrower.app.run_folder import read_settings
from narrower.app.sharing import command_line, facts_of
from narrower.sharing import SUMS
from narrower.sharing.checksums import check_files, read_sums
from narrower.training.config import TrainConfig

FILES = {"README.md", SUMS, "model.safetensors", "narrower.json", "config.yaml", "metrics.jsonl", "plan.json"}


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    with stand_in.running(monkeypatch, tmp_path / "cache") as found:
        yield found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "one", NETWORK, {"data_dir": str(tmp_path / "photos"), "mean": [0.5] * 3, "std": [0.25] * 3})
    return Path("one")


def shared(hub: Hub, branch: str = "main") -> dict[str, bytes]:
    return {name: content for name, content in hub.repositories["ann/net"].branches[branch].items() if name != ".gitattributes"}


def code_of(card: str) -> str:
    return card.partition("```python\n")[2].partition("```")[0]


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_what_is_pushed_is_loaded_by_the_code_of_its_card(run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["push", "one", "ann/net", "--license", "mit", "--message", "first"]) == 0
    assert capsys.readouterr().out.strip().startswith(f"{hub.address}/ann/net/commit/")
    files = shared(hub)
    assert files.keys() == FILES and hub.repositories["ann/net"].messages == ["first"]
    names: dict[str, Any] = {}
    exec(NETWORK, names)
    exec(code_of(files["README.md"].decode()), names)
    assert same(names["model"], narrower.load(run, names["Net"]))


def test_the_code_of_a_network_by_name_needs_nothing_else(tmp_path: Path, hub: Hub) -> None:
    write_run(tmp_path / "one", "from narrower.models import cifar_resnet20 as Net", {"model": "cifar_resnet20"})
    assert cli.main(["push", "one", "ann/net"]) == 0
    names: dict[str, Any] = {}
    exec(code_of(shared(hub)["README.md"].decode()), names)
    assert same(names["model"], narrower.load(tmp_path / "one", lambda: names["make_model"]("cifar_resnet20", 10)))


def test_all_files_are_listed_and_none_has_a_path_of_this_machine(run: Path, tmp_path: Path) -> None:
    write_rows(run, [ROWS[0] | {"typed": f"narrower prune --data-dir={tmp_path}/photos"}, *ROWS[1:]], read_settings(run))
    assert cli.main(["push", "one", "ann/net", "--dry-run"]) == 0
    folder = run / "hub"
    check_files(folder, FILES - {"README.md", SUMS})
    assert read_sums(folder / SUMS).keys() == FILES - {"README.md", SUMS}
    assert {file.name for file in folder.iterdir()} == FILES
    assert not any(str(tmp_path).encode() in file.read_bytes() for file in folder.iterdir())
    assert read_settings(folder)["data_dir"] == "photos"


def test_a_dry_run_asks_nothing_and_replaces_nothing(run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["push", "one", "ann/net", "--dry-run", "--output", "there"]) == 0
    assert not hub.requests and not (run / "hub").exists()
    Path("there/README.md").write_text("mine")
    assert cli.main(["push", "one", "ann/net", "--dry-run", "--output", "there"]) == 2
    assert "there exists already" in capsys.readouterr().err and Path("there/README.md").read_text() == "mine"


def test_the_command_of_the_card_gives_the_settings_of_the_run(run: Path) -> None:
    given = {"epochs": 3, "lr": 0.05, "amp": True, "reconstruct": False, "remove": {"conv1": 0.5}, "exclude": ["a b", "c*"],
             "macs": None, "sched": "cosine", "seed": 3, "forgetting": {}, "hflip": 0.0}
    write_rows(Path("one"), settings={**read_settings(Path("one")), **given})
    words = shlex.split(command_line(facts_of(Path("one"))))
    _, settings, _ = parse(cli.COMMANDS, words[1:])
    found = settings.flat()
    assert words[0] == "narrower" and {key: found[key] for key in given} == given
    assert found["model"] == "net.py:Net" and found["mean"] == [0.5] * 3
    trained = {"epochs": TrainConfig.epochs, "lr": TrainConfig.lr, "warmup_epochs": TrainConfig.warmup_epochs}  # of `train`
    write_rows(Path("one"), settings={**read_settings(Path("one")), **trained})
    found = parse(cli.COMMANDS, shlex.split(command_line(facts_of(Path("one"))))[1:])[1].flat()
    assert {key: found[key] for key in trained} == trained


def test_exported_files_stand_beside_with_their_difference(run: Path, hub: Hub) -> None:
    assert cli.main(["push", "one", "ann/net", "--exports", "pt2"]) == 0
    files = shared(hub)
    assert files.keys() == FILES | {"model.pt2"} and "model.pt2" in files[SUMS].decode()
    assert "| `model.pt2` | the same for torch.export" in files["README.md"].decode()
    assert not (run / "model.pt2").exists()


def test_a_branch_and_a_private_repository(run: Path, hub: Hub) -> None:
    assert cli.main(["push", "one", "ann/net", "--private", "--revision", "half"]) == 0
    assert hub.repositories["ann/net"].private and shared(hub, "half").keys() == FILES and not shared(hub)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def of_another_network(run: Path) -> None:
    write_run(run.parent / "two", NETWORK.replace("16", "24"))
    (run.parent / "two" / "model.safetensors").replace(run / "model.safetensors")


@pytest.mark.parametrize(("damage", "says"), [
    (lambda run: (run / "config.yaml").unlink(), "one is no run folder (no config.yaml)"),
    (lambda run: write_rows(run, ROWS[:-1]), "has not ended: go on with it by narrower prune --resume one"),
    (lambda run: write_rows(run, [{"stage": "start", "command": "sensitivity"}]), "one is a measurement of damage"),
    (lambda run: write_rows(run, [{"stage": "start", "command": "train"}, {"stage": "train", "top1": 9.0}]), "not narrowed"),
    (lambda run: (run / "narrower.json").unlink(), "the network of one was not narrowed"),
    (lambda run: truncate(run / "narrower.json"), "narrower.json cannot be read"),
    (lambda run: truncate(run / "model.safetensors"), "model.safetensors cannot be read"),
    (lambda run: (run / "model.safetensors").unlink(), "model.safetensors cannot be read"),
    (of_another_network, "are of different networks"),
])  # fmt: skip
def test_what_cannot_be_shared_is_told_before_the_hub_is_asked(
    damage: Any, says: str, run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run.absolute())
    before = sorted(run.iterdir())
    assert cli.main(["push", "one", "ann/net"]) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1 and not hub.requests and sorted(run.iterdir()) == before


@pytest.mark.parametrize(("arguments", "says"), [
    ("net", "net is no name of a repository: give user/name"),
    ("ann/net --card {\"licence\":\"mit\"}", "a model card has no field licence; did you mean license?"),
    ("ann/net --exports onnx coreml", "--exports coreml: take onnx and pt2"),
    ("ann/net --output there", "--output is for --dry-run"),
    ("", "required: repository"),
])  # fmt: skip
def test_bad_arguments_are_one_line(
    arguments: str, says: str, run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["push", "one", *arguments.split()]) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1 and not hub.requests


def test_a_hub_that_is_away_or_refuses_is_one_line(
    run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuses = 403
    assert cli.main(["push", "one", "ann/net"]) == 2
    assert "the hub refuses (403): You have no rights here" in capsys.readouterr().err and not shared(hub)
    stand_in.at("http://127.0.0.1:9", monkeypatch)
    assert cli.main(["push", "one", "ann/net"]) == 2
    assert "http://127.0.0.1:9 cannot be reached (Connect" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert cli.main(["push", "one", "ann/net"]) == 2
    assert "narrower[hub]" in capsys.readouterr().err
