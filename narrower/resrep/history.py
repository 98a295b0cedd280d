"""The way of the row norms over a training by ResRep, for a picture: some channels of some groups, a few dozen times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .trainer import ResRep

GROUPS, CHANNELS, TIMES = 6, 48, 48


def spread(count: int, most: int) -> np.ndarray:
    """At most `most` of the numbers below `count`, evenly spread, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))


class NormHistory:
    """Notes of a ResRep's norms, kept until they are taken."""

    def __init__(self, resrep: ResRep) -> None:
        self.resrep = resrep
        names = list(resrep.placement.rows)
        self.channels = {names[k]: spread(resrep.graph[names[k]].size, CHANNELS) for k in spread(len(names), GROUPS)}
        self.steps: list[int] = []
        self.norms: dict[str, list[list[float]]] = {name: [] for name in self.channels}

    def after_step(self, number: int, of: int) -> None:
        """Note the norms at `TIMES` of the steps, `number` from 1. Not those of compactors that are merged for good."""
        if self.resrep.phase == "frozen" or number * TIMES // of == (number - 1) * TIMES // of:
            return
        norms = self.resrep.norms()
        self.steps.append(number)
        for name, channels in self.channels.items():
            self.norms[name].append([round(float(value), 3) for value in norms[name][channels]])

    def take(self) -> dict[str, Any]:
        """`{"steps": [T], "norms": {group: [T][channels]}}` since the last time; empty where there is nothing."""
        found = {"steps": self.steps, "norms": self.norms} if self.steps else {}
        self.steps, self.norms = [], {name: [] for name in self.channels}
        return found

    def state_dict(self) -> dict[str, Any]:
        """What has not been taken yet."""
        return {"steps": list(self.steps), "norms": {name: [list(row) for row in rows] for name, rows in self.norms.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` gave."""
        self.steps = list(state["steps"])
        self.norms = {name: [list(row) for row in state["norms"][name]] for name in self.channels}
