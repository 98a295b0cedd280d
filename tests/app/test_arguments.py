"""From arguments to settings: types, files, and what is said of those that are not known."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")
pytest.importorskip("rich")
pytest.importorskip("accelerate")

from narrower.app.arguments import GROUPS, hint_of, parse, wanted
from narrower.app.cli import COMMANDS
from narrower.app.config import DataConfig, PruneConfig, RunConfig
from narrower.app.job import Settings
from narrower.app.run_folder import CONFIG, to_yaml
from narrower.errors import ConfigError


def settings(*arguments: str) -> Settings:
    return parse(COMMANDS, arguments)[1]


def test_without_arguments_there_are_the_defaults() -> None:
    assert settings("train") == Settings()
    assert settings("prune").train == replace(Settings().train, epochs=15, lr=0.02, warmup_epochs=0.2)


@pytest.mark.parametrize(("arguments", "group", "field", "value"), [
    ("--macs 0.25", "prune", "macs", 0.25),
    ("--macs 50%", "prune", "macs", 0.5),
    ("--macs=12.5%", "prune", "macs", 0.125),
    ("--macs null", "prune", "macs", None),
    ("--remove 0.5", "prune", "remove", 0.5),
    ("--remove {\"layer*\":0.5,\"fc\":\"25%\"}", "prune", "remove", {"layer*": 0.5, "fc": 0.25}),
    ("--exclude layer1.* fc", "prune", "exclude", ["layer1.*", "fc"]),
    ("--mean 0.5 1 0", "data", "mean", [0.5, 1.0, 0.0]),
    ("--scale 50% 100%", "data", "scale", [0.5, 1.0]),
    ("--model-kwargs {\"a\":[1,null]}", "model", "model_kwargs", {"a": [1, None]}),
    ("-b 7 --amp", "train", "batch_size", 7),
    ("--no-distill", "prune", "distill", False),
    ("--checkpoint null", "model", "checkpoint", None),
    ("--checkpoint 50%", "model", "checkpoint", "50%"),
    ("--checkpoint 3", "model", "checkpoint", "3"),
    ("--dataset true", "data", "dataset", "true"),
])
def test_flags_have_the_types_of_their_settings(arguments: str, group: str, field: str, value: Any) -> None:
    found = getattr(getattr(settings("prune", *arguments.split()), group), field)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("arguments", "says"), [
    ("--macs abc", "--macs abc: give a number, or a percentage such as 50%"),
    ("--macs %", "--macs %: give a number"),
    ("--epochs 2.5", "--epochs 2.5: give a whole number"),
    ("--model-kwargs {broken", "--model-kwargs {broken: give JSON such as"),
    ("--model-kwargs 3", "--model-kwargs 3: give JSON such as"),
    ("--remove {broken", "--remove {broken: give a number, or a percentage such as 50% or JSON such as"),
    ("--mcs 0.5", "there is no option --mcs; did you mean --macs? (all options: narrower prune --help)"),
    ("--batchsize=3", "there is no option --batchsize=3; did you mean --batch-size?"),
    ("--nonsense", "there is no option --nonsense (all"),
    ("run surplus", "unexpected argument 'surplus' (quote a path with spaces) (all"),
    ("surplus", "surplus is no run folder"),
    (__file__, "(no config.yaml); the weights in a file are given by --checkpoint, the network by --model"),
    ("--steps 2 --remove 0.5", "--steps goes towards a budget"),
    ("--macs", "argument --macs: expected one argument"),
    ("--config nowhere.yaml", "cannot read nowhere.yaml"),
    ("--mean 0.5 x 0", "--mean x: give a number"),
    ("--remove {\"a\":\"x\"}", "--remove {'a': 'x'}: give a number"),
])
def test_what_is_wrong_is_said_in_one_line(arguments: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings("prune", *arguments.split())
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("arguments", "says"), [
    ("", "no command is given. Take one of inspect, train, prune"),
    ("prun --macs 0.5", "there is no command 'prun'; did you mean prune? Take one of"),
    ("bench", "the following arguments are required: networks"),
    ("eval --macs 0.5", "there is no option --macs (all options: narrower eval --help)"),
])
def test_a_command_and_its_arguments_are_asked_for(arguments: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(COMMANDS, arguments.split())
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "says"), [
    ("{", "cannot read"),
    ("- 1", "holds no settings"),
    ("macs: half", "macs half: give a number"),
    ("mcs: 0.5", "there is no setting mcs; did you mean macs?"),
    ("epochs: 2.5", "epochs 2.5: give a whole number"),
    ("amp: 3", "amp 3: give true or false"),
])
def test_a_file_with_something_else_is_named(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        settings("prune", "--config", str(tmp_path / "s.yaml"))
    assert says in str(caught.value) and "s.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_flags_go_before_a_file_and_a_file_before_defaults(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("epochs: 3\nlr: 1e-4\nmacs: 30%\n")
    found = settings("prune", "--epochs", "4", "--config", str(tmp_path / "s.yaml"))
    assert (found.train.epochs, found.train.lr, found.prune.macs) == (4, 1e-4, 0.3)


def test_all_settings_of_a_run_are_read_back(tmp_path: Path) -> None:
    given = settings("prune", "--remove", '{"conv*": 0.5}', "--mean", "0.1", "0.2", "0.3", "--lr", "1e-5", "--clip-grad", "1")
    (tmp_path / CONFIG).write_text(to_yaml(given.flat()))
    assert settings("prune", "--config", str(tmp_path / CONFIG)) == given
    resumed = settings("prune", "--resume", str(tmp_path))
    assert replace(resumed, run=given.run) == given


def test_a_run_gives_its_network_and_images_but_not_how_it_was_trained(tmp_path: Path) -> None:
    given = settings("train", "--model", "cifar_resnet56", "--epochs", "7", "-b", "9", "--mean", "0.1", "0.2", "0.3",
                     "--checkpoint", "start.pt", "--seed", "3", "--amp", "--amp-dtype", "float16")
    (tmp_path / CONFIG).write_text(to_yaml(given.flat()))
    for command in ("prune", "train", "eval", "inspect", "sensitivity", "export"):
        _, found, flags = parse(COMMANDS, [command, str(tmp_path)])
        assert found.model == replace(given.model, checkpoint=str(tmp_path))
        assert found.data == (DataConfig() if command == "inspect" else given.data)  # it looks at no images
        assert command != "eval" or (found.train.amp, found.train.amp_dtype) == (True, "float16")
        assert flags.run == str(tmp_path) and found.run.seed == RunConfig.seed
    pruned = settings("prune", str(tmp_path), "--macs", "0.3")
    assert (pruned.train.batch_size, pruned.train.epochs, pruned.prune.macs) == (9, 15, 0.3)
    assert settings("eval", str(tmp_path), "--checkpoint", "other.pt").model.checkpoint == "other.pt"
    with pytest.raises(ConfigError, match="give one or the other"):
        settings("prune", str(tmp_path), "--resume", str(tmp_path))


@pytest.mark.parametrize(("given", "says"), [
    ({"scope": "nonsense"}, "--scope nonsense: take one of inner, all"),
    ({"tune_steps": 3, "reconstruct": False}, "--tune-steps tunes what was repaired, and --no-reconstruct repairs nothing"),
    ({"tune_steps": 3, "schedule": "layer"}, "--tune-steps tunes what was repaired, and --schedule layer repairs nothing"),
    ({"distill_features": 1, "distill": False}, "--distill-features is a part of the distillation, and --no-distill takes"),
    ({"distill_weight": 1, "distill": False}, "--distill-weight is a part of the distillation"),
    ({"tune_lr": 1e-3}, "--tune-lr is for --tune-steps, which is not given"),
    ({"epochs_per_layer": 2}, "--epochs-per-layer is for --schedule layer"),
    ({"allocate": "share", "remove": 0.5}, "--allocate spreads a budget, and --remove is none"),
    ({"threads": 2}, "--threads is for --latency or --round-to auto, and neither is given"),
])
def test_settings_that_others_leave_without_effect_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        PruneConfig(**given).check_used("obs")


def test_settings_of_other_methods_are_refused() -> None:
    given = PruneConfig(scope="all", prior="fpgm")
    for methods in (["resrep"], ["obs", "centripetal"]):
        given.check_used(*methods)
    with pytest.raises(ConfigError, match="--scope is for --method resrep or centripetal, and the method is soft"):
        given.check_used("soft")
    with pytest.raises(ConfigError, match="--scope is for --method resrep or centripetal, and the methods are obs, soft"):
        given.check_used("obs", "soft")
    with pytest.raises(ConfigError, match="--prior is for --method resrep or soft or centripetal, and the method is obs"):
        replace(given, scope="inner").check_used("obs")


def test_a_run_goes_on_in_its_own_folder() -> None:
    assert RunConfig(resume="a", output="b/../a")  # the same, said twice
    for surplus, says in (({"output": "b"}, "--resume a goes on in that folder: leave out --output b"),
                          ({"overwrite": True}, "--resume a goes on with a run, --overwrite replaces one")):
        with pytest.raises(ConfigError, match=says):
            RunConfig(resume="a", **surplus)


def test_for_every_type_of_a_setting_there_is_a_text() -> None:
    for group in GROUPS:
        for item in fields(group):
            assert wanted(hint_of(group, item.name)[0])
