"""What the runs of a grid share: a folder with runs of other settings, another network or other images is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("timm")
pytest.importorskip("accelerate")
import torch
from support.command_line import NETWORK
from support.run_folders import write_rows

from narrower.app.comparing import Cell, Comparison, compare, settings_of
from narrower.app.config import CompareConfig, DataConfig, ModelConfig, PruneConfig, RunConfig
from narrower.app.job import Job, Reporter, Settings, with_absolute_paths
from narrower.app.resuming import fingerprint
from narrower.app.run_folder import IMAGES, WEIGHTS
from narrower.errors import ConfigError
from narrower.models import make_model
from narrower.training.config import TrainConfig

GRID = Settings(model=ModelConfig("net.py:Net", checkpoint="a.pt"), data=DataConfig(img_size=8, cache_dir="none"),
                run=RunConfig(output="grid"))
COSTS = {"top1": 80.0, "macs": 4.0, "params": 4.0, "latency_ms": 4.0}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)
    (tmp_path / "b.py").write_text(NETWORK)
    for name in ("a", "b"):
        torch.save(make_model("net.py:Net", 10).state_dict(), f"{name}.pt")
    return tmp_path


def finished(method: str, settings: Settings = GRID, **changed: Any) -> None:
    """A run of the grid that has ended, as its folder says. `changed`: settings that it was made with."""
    cell, root = Cell(method, 1.0 if method == "dense" else 0.5, 0), Path("grid")
    kept = with_absolute_paths(settings_of(cell, settings, root)).flat()
    completed = {"num_classes": 10, "in_chans": 3, "img_size": 8, "mean": [0.5] * 3, "std": [0.2] * 3}
    start = {WEIGHTS: fingerprint(dense()), IMAGES: 1198}
    rows: list[dict[str, Any]] = [
        {"stage": "start", **start}, {"stage": "measure", "dense": COSTS, "narrow": COSTS, "stages": {"cut": 30.0}}]
    write_rows(cell.folder(root), rows, kept | completed | changed)


def dense() -> torch.nn.Module:
    model = make_model("net.py:Net", 10)
    model.load_state_dict(torch.load("a.pt"))
    return model


def compared(settings: Settings, *methods: str) -> Comparison:
    """The table of a grid that has ended: nothing may begin."""
    def begin(_: Settings, command: str) -> Job:
        raise AssertionError(f"{command} has begun")

    return compare(settings, CompareConfig([*methods]), begin, Reporter())


def test_a_grid_that_has_ended_is_shown_again() -> None:
    finished("obs")
    finished("dense")
    assert len(compared(GRID, "obs", "dense").runs) == 2
    elsewhere = replace(GRID, model=replace(GRID.model, model=str(Path("net.py").absolute()) + ":Net"),
                        train=TrainConfig(workers=0, amp=True), run=RunConfig(output="grid", device="cpu", log_with=["wandb"]))
    assert len(compared(elsewhere, "obs", "dense").runs) == 2


@pytest.mark.parametrize(("changed", "says"), [
    ({"model": ModelConfig("b.py:Net", checkpoint="a.pt")}, "was made otherwise: --model "),
    ({"model": ModelConfig("net.py:Net", checkpoint="b.pt")}, "began with other weights of the dense network than those"),
    ({"model": replace(GRID.model, model_kwargs={"a": 1})}, "--model-kwargs"),
    ({"data": replace(GRID.data, dataset="digits")}, "--dataset"),
    ({"data": replace(GRID.data, img_size=16)}, "--img-size (8, now 16)"),
    ({"data": replace(GRID.data, data_dir="photos")}, "began with other training images than those of this"),
    ({"train": TrainConfig(lr=0.5)}, "--lr (0.1, now 0.5)"),
    ({"prune": PruneConfig(images=2048)}, "--images (512, now 2048)"),
    ({"prune": PruneConfig(reconstruct=False)}, "--reconstruct (True, now False)"),
    ({"prune": PruneConfig(allocate="share")}, "--allocate (measured, now share)"),
    ({"prune": PruneConfig(round_to=8)}, "--round-to (None, now 8)"),
    ({"prune": PruneConfig(distill_weight=1)}, "--distill-weight (0.9, now 1)"),
])
def test_what_another_command_has_made_is_not_shown_as_that_of_this_one(
        changed: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finished("obs")
    monkeypatch.setattr("narrower.app.protocol.open_images", lambda *_: (SimpleNamespace(train=range(5)), None))
    with pytest.raises(ConfigError) as error:
        compared(replace(GRID, **changed), "obs")
    assert says in str(error.value) and "another --output" in str(error.value)


def test_only_what_a_method_has_must_be_alike() -> None:
    """A grid may be made by several commands, each with the settings of its own methods."""
    finished("magnitude", scope="all")  # as an earlier version left it
    finished("dense", images=1024)
    finished("resrep")
    everywhere = replace(GRID, prune=PruneConfig(scope="all", prior="fpgm", dense_epochs=3))
    assert settings_of(Cell("magnitude", 0.5, 0), everywhere, Path("grid")).prune.scope == "inner"
    finished("centripetal", everywhere)
    assert len(compared(everywhere, "magnitude", "dense", "centripetal").runs) == 3
    with pytest.raises(ConfigError, match=r"resrep-0.5-seed-0 was made otherwise: --scope \(inner, now all\), --prior"):
        compared(everywhere, "magnitude", "resrep")


def test_the_dense_network_of_a_grid_is_of_these_settings() -> None:
    write_rows(Path("grid/dense"), [], with_absolute_paths(replace(GRID, train=TrainConfig(epochs=1))).flat())
    with pytest.raises(ConfigError, match=r"dense was made otherwise: --epochs \(1, now 25\)"):
        compared(replace(GRID, model=ModelConfig("net.py:Net")), "obs")
