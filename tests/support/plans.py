"""Graphs to plan on, and ways to look at plans."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import narrower
from support.networks import PATTERNS

NAMES = ["plain", "residual", "dense", "depthwise", "grouped", "regrouped", "squeeze_excite", "shuffle", "chunked", "unet",
         "transposed", "volume", "tokens", "shared"]


@cache
def graph_of(name: str) -> narrower.Graph:
    """The graph of one of the PATTERNS; graphs are frozen, so tests may share it."""
    return narrower.trace(PATTERNS[name].make(), PATTERNS[name].inputs)


def widths(plan: narrower.Plan) -> dict[str, int]:
    return {g.name: len(plan.keep[g.name]) for g in plan.graph.free}


def asked(kind: str, value: float) -> dict[str, Any]:
    return {kind: value}


def edited(plan: narrower.Plan, name: str, kept: list[int]) -> narrower.Plan:
    """The plan with other channels kept in one group, its costs counted anew."""
    data = json.loads(plan.to_json())
    data["keep"][name] = kept
    return narrower.Plan.from_json(json.dumps(data), plan.graph)
