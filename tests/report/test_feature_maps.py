"""Feature maps with their ranks, as HRank sees them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from support.run_folders import SETTINGS, Net, make_facts, traced

import narrower
from narrower.report import sections
from narrower.report.feature_maps import EACH, feature_maps


def test_maps_are_what_hrank_ranks() -> None:
    """For one image the rank of each map is the score of its channel."""
    model, image = Net(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        model.conv1.weight[2] = 0
        model.conv1.bias[2] = -1.0  # type: ignore[index]
    plan = narrower.plan(traced(), scores := narrower.hrank(model, traced(), [image]), remove=0.5)
    found = feature_maps(model, traced(), image, plan.keep)  # type: ignore[arg-type]
    assert "conv1" in found
    for name, maps in found.items():
        assert all(one.rank == scores[name][one.channel] == np.linalg.matrix_rank(one.pixels) for one in maps)
        assert all(one.kept == (one.channel in plan.keep[name]) for one in maps)
        assert [one.kept for one in maps] == sorted((one.kept for one in maps), reverse=True) and len(maps) <= 2 * EACH
    dead = next(one for one in found["conv1"] if one.channel == 2)
    assert not dead.kept and dead.rank == 0 and not dead.pixels.any()


def test_only_hrank_shows_maps_and_a_reason_where_there_are_none() -> None:
    assert sections.maps(make_facts()) is None
    settings = SETTINGS | {"method": "hrank"}
    left = sections.maps(make_facts(settings=settings, absent={"maps": "no images"}))
    assert left is not None and left.absent == "no images"
    found = feature_maps(Net(), traced(), torch.randn(1, 3, 8, 8), {"conv1": [0, 1], "conv2": list(range(16))})
    shown = sections.maps(make_facts(settings=settings, maps=found))
    assert shown is not None and shown.picture is not None and set(found) == {"conv1"}
    assert shown.picture.inline.count("<image") == len(found["conv1"])
