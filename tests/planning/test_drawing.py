"""Pictures of plans and damage curves, on axes of one's own or new ones."""

from __future__ import annotations

import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.pyplot import close
from support.html import check_page
from support.run_folders import CURVES, traced

import narrower
from narrower.planning.drawing import MOST_NAMES, draw_bars, draw_damage, floor_of


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


def test_a_plan_draws_itself() -> None:
    """On given axes, or on new ones."""
    plan = narrower.plan(traced(), narrower.random(traced()), remove=0.5)
    given = Figure().subplots()
    assert plan.plot(given) is given
    heights = [bar.get_height() for bar in given.patches if isinstance(bar, Rectangle)]
    assert heights[: len(heights) // 2] == [g.size for g in plan.graph.groups]
    assert heights[len(heights) // 2 :] == [len(plan.keep[g.name]) if g.free else g.size for g in plan.graph.groups]
    new = plan.plot()
    assert new is not given and new.get_ylabel() == "channels"
    close(new.figure)


def test_a_sensitivity_draws_itself_and_is_a_table_in_a_notebook() -> None:
    given = Figure().subplots()
    assert CURVES.plot(given, removed={"conv2": 0.5}) is given and len(given.lines) == 5
    page = check_page(CURVES._repr_html_())
    assert all(cell in page.text for row in CURVES.rows for cell in row) and "kl on 64 images" in page.text


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(narrower.MissingExtraError, match=r"narrower\[report\]"):
        CURVES.plot()
