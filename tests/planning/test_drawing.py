"""Pictures of plans and damage curves, on axes of one's own or new ones."""

from __future__ import annotations

import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from support.run_folders import CURVES

import narrower
from narrower.planning.drawing import MOST_NAMES, draw_bars, draw_damage, floor_of, matplotlib


def test_bars_are_the_widths() -> None:
    axes = Figure().subplots()
    draw_bars(axes, ["a", "b"], [4, 8], [2, 8], "channels")
    assert [bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)] == [4, 8, 2, 8]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["a", "b"]


def test_many_bars_have_fewer_names() -> None:
    axes = Figure().subplots()
    draw_bars(axes, [str(n) for n in range(200)], [2] * 200, [1] * 200, "channels")
    assert len(axes.get_xticklabels()) <= MOST_NAMES


def test_points_are_as_measured_and_circles_where_the_plan_is() -> None:
    axes = Figure().subplots()
    draw_damage(axes, CURVES, {"conv1": 0.25, "conv2": 0.0})
    points = [tuple(np.concatenate(line.get_data())) for line in axes.lines if line.get_marker() == "."]
    assert points == [(0.125, 0.5, 0.01, 0.2), (0.125, 0.5, floor_of(CURVES), 0.1)]
    circles = [np.concatenate(line.get_data()).tolist() for line in axes.lines if line.get_marker() == "o"]
    assert circles == [[0.25, CURVES.damage(("conv1",), 0.25)]]


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(narrower.MissingExtraError, match=r"narrower\[report\]"):
        matplotlib()
