"""The model card: what a hub reads in its head is what the run measured; what is not known is not said."""

from __future__ import annotations

import sys
from typing import Any

import pytest

pytest.importorskip("huggingface_hub")
pytest.importorskip("jinja2")
from support.run_folders import DENSE, NARROW, ROWS, SETTINGS, make_facts

from narrower.errors import ConfigError, MissingExtraError
from narrower.report import Facts, model_card


def card(facts: Facts, **fields: Any) -> Any:
    """The card, as the hub's library reads it."""
    from huggingface_hub import ModelCard

    text = model_card(facts, "ann/net", "narrower prune --macs 0.5", {"model.safetensors": "the tensors"}, fields)
    assert text.count("\n# ") == 1 and "{{" not in text and "\n\n\n" not in text
    return ModelCard(text)


def settings(**changes: Any) -> dict[str, Any]:
    return {**SETTINGS, **changes}


def test_the_head_has_what_was_measured() -> None:
    found = card(make_facts(), license="mit")
    result, = found.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", NARROW["top1"], "digits")
    assert found.data.license == "mit" and found.data.library_name == "narrower" and "obs" in found.data.tags
    assert found.data.pipeline_tag == "image-classification" and found.data.model_name == "net"


def test_the_table_has_each_stage() -> None:
    lines = [line for line in card(make_facts()).text.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in table[:7]}) == 1 and set(table[1]) == {"---", "---:"}
    figures = {row[0]: row[1] for row in table[2:6]}
    assert figures == {"dense": f"{DENSE['top1']:.2f} %", "cut": "23.93 %", "reconstructed": "81.27 %", "fine-tuned": "86.51 %"}


def test_agreement_is_not_called_accuracy() -> None:
    found = card(make_facts(agreement=True))
    assert not found.data.eval_results and found.data.metrics is None and "accuracy" not in found.text
    assert "the share of images on which the dense network finds the same class" in found.text


def test_another_task_is_not_called_classification() -> None:
    found = card(make_facts(settings=settings(task="own.py:Depth")))
    assert found.data.pipeline_tag is None and not found.data.eval_results


@pytest.mark.parametrize(("changes", "name", "listed"), [
    ({}, "digits", None),
    ({"data_dir": "cifar10"}, "cifar10", None),
    ({"dataset": "torch/cifar10", "data_dir": "x"}, "cifar10", None),
    ({"dataset": "hfds/uoft-cs/cifar10"}, "uoft-cs/cifar10", "uoft-cs/cifar10"),
])  # fmt: skip
def test_data_are_named_and_those_of_the_hub_listed(changes: dict[str, str], name: str, listed: str | None) -> None:
    found = card(make_facts(settings=settings(**changes)))
    assert found.data.eval_results[0].dataset_name == name and found.data.datasets == listed and f"for {name}." in found.text


def test_the_licence_and_the_weights_that_it_depends_on_are_told() -> None:
    assert "Not stated by those who share this network." in card(make_facts()).text
    text = card(make_facts(), license="other", license_name="mine", base_model="timm/resnet18.a1_in1k").text
    assert "`mine`. The weights come from `timm/resnet18.a1_in1k`: the terms of those apply too." in text


def test_fields_of_the_user_go_first() -> None:
    assert card(make_facts(), tags=["mine"], pipeline_tag="image-feature-extraction").data.tags == ["mine"]


@pytest.mark.parametrize(("field", "says"), [("licence", "no field licence; did you mean license?"),
                                             ("eval_results", "no field eval_results"),
                                             ("colour", "no field colour: it has base_model, datasets")])
def test_an_unknown_field_is_named(field: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        card(make_facts(), **{field: "x"})


def test_code_and_command_are_those_of_the_run() -> None:
    text = card(make_facts()).text
    assert "narrower.load('ann/net', lambda: Net())" in text and "called with num_classes=10, in_channels=3" in text
    text = card(make_facts(settings=settings(model="resnet18", model_kwargs={"drop_rate": 0.1}))).text
    assert "make_model('resnet18', num_classes=10, in_channels=3, drop_rate=0.1)" in text
    assert "\nnarrower prune --macs 0.5\n" in text and "Seed 7, narrower 0.1.0." in text
    assert "torch 2.9, Python 3.12." in card(make_facts(rows=[{**ROWS[0], "torch": "2.9", "python": "3.12"}, *ROWS[1:]])).text


def test_without_the_extra_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"narrower\[hub\]"):
        model_card(make_facts(), "ann/net", "", {}, {})
