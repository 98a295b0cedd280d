"""Which settings may change where a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("yaml")
pytest.importorskip("accelerate")

from torch import nn

from narrower.app.cli import hint
from narrower.app.config import ModelConfig, PruneConfig
from narrower.app.job import Settings
from narrower.app.networks import read_run
from narrower.app.reporting import ended_run
from narrower.app.resuming import TRAINING, WHERE, changes, check_start, fingerprint
from narrower.app.run_folder import Run
from narrower.errors import ConfigError

SETTINGS = Settings(prune=PruneConfig(macs=0.5)).flat()


def begun(folder: Path, **settings: Any) -> Run:
    """A run that has begun with these settings."""
    Run(folder, command="prune", overwrite=True).claim(SETTINGS | settings, {"training images": 10, "weights": "abc"})
    return Run(folder, command="prune", resume=True)


def test_every_setting_may_change_or_is_refused_by_name(tmp_path: Path) -> None:
    run = begun(tmp_path)
    assert changes(run, SETTINGS) == {}
    assert {*WHERE, *TRAINING} < SETTINGS.keys()
    for name in SETTINGS.keys() - {"output", "resume", "overwrite"}:
        now = SETTINGS | {name: "other" if name not in TRAINING else 99}
        if name in (*WHERE, *TRAINING):
            assert changes(run, now) == {name: (SETTINGS[name], now[name])}
        else:
            with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} .*cannot change"):
                changes(run, now)


def test_commands_in_messages_are_words_of_a_shell_where_folders_have_spaces(tmp_path: Path) -> None:
    folder = tmp_path / "my runs"
    run = begun(folder, workers=3)
    with pytest.raises(ConfigError) as caught:
        changes(run, SETTINGS | {"macs": 0.9})
    assert f"--config '{folder}/config.yaml' and" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        Run(folder, command="train", resume=True)
    assert f"narrower prune --resume '{folder}'" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        read_run(folder, ModelConfig())
    assert f"narrower prune --resume '{folder}'" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        ended_run(folder)
    assert f"narrower prune --resume '{folder}'" in str(caught.value)
    assert hint(run).endswith(f"--resume '{folder}'")


def test_the_length_of_resrep_stays(tmp_path: Path) -> None:
    run = begun(tmp_path, method="resrep")
    now = SETTINGS | {"method": "resrep"}
    assert changes(run, now | {"lr": 0.5}) == {"lr": (0.1, 0.5)}
    with pytest.raises(ConfigError, match=r"--epochs \(20, now 30\) cannot change"):
        changes(run, now | {"epochs": 30})
    run.claim(now, {})
    run.log({"stage": "save"})
    with pytest.raises(ConfigError, match="has ended"):
        changes(run, now | {"lr": 0.5})


def test_a_run_that_has_ended_goes_on_with_more_epochs_only(tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.claim(SETTINGS, {})
    run.log({"stage": "measure"})
    for now in ({"lr": 0.5}, {"epochs": 10}):
        with pytest.raises(ConfigError, match="has ended.*would change nothing; more --epochs"):
            changes(run, SETTINGS | now)
    assert changes(run, SETTINGS | {"lr": 0.5, "epochs": 21}).keys() == {"lr", "epochs"}
    assert changes(run, SETTINGS | {"workers": 0}).keys() == {"workers"}
    run.log({"stage": "fine-tune", "epoch": 21})  # under way again
    assert changes(run, SETTINGS | {"lr": 0.5}).keys() == {"lr"}


def test_settings_that_an_older_version_lacked_are_not_compared(tmp_path: Path) -> None:
    assert changes(begun(tmp_path), SETTINGS | {"new": 1}) == {}


def test_other_images_or_weights_are_noticed(tmp_path: Path) -> None:
    run = begun(tmp_path)
    check_start(run, {"training images": 10, "weights": "abc"})
    with pytest.raises(ConfigError, match=r"began with other weights \(abc\) than there are now \(def\)"):
        check_start(run, {"training images": 10, "weights": "def"})


def test_a_fingerprint_is_of_every_value() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).to(torch.bfloat16)
    before = fingerprint(model)
    assert fingerprint(model) == before
    for t in model.state_dict().values():
        t += 1
        assert fingerprint(model) != before
        t -= 1
        before = fingerprint(model)
