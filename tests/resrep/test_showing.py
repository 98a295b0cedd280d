"""ResRep in a notebook."""

from __future__ import annotations

import numpy as np
import torch
from support.html import check_page
from support.run_folders import Net

import narrower
from narrower.resrep.showing import group_rows


def test_norms_are_those_of_channels_that_are_not_chosen() -> None:
    rows = group_rows({"a": np.array([0.0, 0.5, 1.5]), "b": np.array([1.0])},
                      {"a": np.array([True, False, False]), "b": np.array([True])}, {"a": np.array([1, 2]), "b": np.array([0])})
    assert rows[1:] == [("a", "3", "1", "1", "0.50", "1.00"), ("b", "1", "1", "0", "", "")]


def test_a_notebook_shows_each_group_and_the_progress() -> None:
    model = Net()
    resrep = narrower.ResRep(model, narrower.trace(model, torch.zeros(1, 3, 8, 8)), macs=0.5, steps=10)
    page = check_page(resrep._repr_html_())
    assert "conv1" in page.text and "conv2" in page.text and str(resrep).splitlines()[0] in page.text
