"""Pictures: SVG for files, and SVG that can stand in a page beside others."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
import torch

pytest.importorskip("matplotlib")
from support.run_folders import make_facts, traced

import narrower
from narrower.report import pictures
from narrower.report.by_class import Class


def test_a_picture_in_a_page_has_no_size_of_its_own_and_the_colour_of_the_page() -> None:
    picture = pictures.bars("some", "what it shows", "channels", [("a", 4, 2), ("b", 8, 8)])
    assert b"<?xml" in picture.svg and pictures.TEXT.encode() in picture.svg
    inline = ElementTree.fromstring(picture.inline)
    assert "width" not in inline.attrib and "height" not in inline.attrib and "viewBox" in inline.attrib
    assert "currentColor" in picture.inline and pictures.TEXT not in picture.inline
    assert all(element.attrib.get("id", "some-").startswith("some-") for element in inline.iter())


def test_names_of_layers_are_text() -> None:
    """So that they can be searched for, and copied."""
    picture = pictures.bars("some", "", "channels", [("layer1.0.conv1", 4, 2)])
    assert b">layer1.0.conv1</text>" in picture.svg


def test_names_of_classes_are_no_formulas_and_not_too_long() -> None:
    svg = pictures.classes([Class("$x$", 10, 90.0, 80.0), Class("long " * 20, 10, 90.0, 95.0)]).svg.decode()
    assert ">$x$</text>" in svg and ">long long long long lon…</text>" in svg


def test_of_equal_scores_those_that_a_plan_removes_first_stand_last() -> None:
    scores = narrower.Scores({"conv1": torch.tensor([2.0, 1.0, 3.0, 1.0, 1.0, 2.0, 1.0, 1.0]), "conv2": torch.ones(16)})
    kept = narrower.plan(traced(), scores, remove=0.25).keep
    for name, values in scores.items():
        assert set(pictures.falling(values.numpy())[: len(kept[name])]) == set(kept[name])


def test_trainings_follow_each_other() -> None:
    """Epochs are counted on: a dense training before a fine-tuning does not lie under it."""
    rows = [{"stage": stage, "epoch": k, "loss": 1.0, "top1": 50.0} for stage in ("train dense", "fine-tune") for k in (1, 2)]
    svg = pictures.training(make_facts(rows=rows)).svg.decode()
    assert all(f">{n}</text>" in svg for n in (1, 2, 3, 4)) and "train dense" in svg and "fine-tune" in svg
