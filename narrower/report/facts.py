"""What a report is made of: the contents of a run folder, and what follows from its network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..data.task import titled
from ..graph.types import Graph
from ..planning.damage import Sensitivity
from ..planning.latency import LatencyTable
from .feature_maps import FeatureMap

Row = Mapping[str, Any]

START, RESUME, MEASURE = "start", "resume", "measure"
"""Rows of the metrics: which command began with which images and weights; which settings have changed since; the result."""
STAGES = {"cut": "cut", "merge": "merged", "recalibrate": "BatchNorm renewed", "reconstruct": "reconstructed", "tune": "tuned",
          "fine-tune": "fine-tuned", "layers": "layer by layer", "narrow": "narrow"}
"""Stages after which the narrow network is evaluated, and what it is called then."""


class Cost(NamedTuple):
    """A cost of a network by its key in the row `MEASURE`: how it is called, its unit and decimals."""

    key: str
    title: str
    scale: float
    unit: str
    decimals: int

    def shown(self, value: float) -> str:
        return f"{value / self.scale:,.{self.decimals}f} {self.unit}"


COSTS = (Cost("macs", "MACs", 1e6, "M", 2), Cost("params", "parameters", 1e6, "M", 3), Cost("size_mb", "size", 1, "MB", 3),
         Cost("latency_ms", "latency", 1, "ms", 2))  # fmt: skip


class Layer(NamedTuple):
    """A layer by the name of its weight, with the shapes of the weight before and after."""

    name: str
    dense: tuple[int, ...]
    narrow: tuple[int, ...]


class Scored(NamedTuple):
    """Scores of the channels of a group, and which of them stay. Both of shape (size,)."""

    values: np.ndarray
    kept: np.ndarray


def last_row(rows: Sequence[Row], stage: str) -> Row:
    """The last row of a stage, or an empty one."""
    return next((row for row in reversed(rows) if row.get("stage") == stage and "epoch" not in row), {})


@dataclass(frozen=True, eq=False)
class Facts:
    """What is known of a run.

    Attributes:
        name: of its folder.
        settings: those of its `config.yaml`.
        rows: its metrics.
        layers: convolutions and linear layers in the order of the network; empty for a dense network.
        widths: {group: (channels, those that the plan keeps)}.
        scores: {group: scores of its channels, and which the plan keeps}.
        sensitivity: the damage curves.
        latency: the latency table.
        graph: of the dense network.
        maps: of one image, by group; only of a run by HRank.
        absent: {name of one of these: why it is not there}.
        agreement: whether the images have no classes, so that accuracy is the share on which the dense network agrees.
    """

    name: str
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    layers: Sequence[Layer] = ()
    widths: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    scores: Mapping[str, Scored] = field(default_factory=dict)
    sensitivity: Sensitivity | None = None
    latency: LatencyTable | None = None
    graph: Graph | None = None
    maps: Mapping[str, Sequence[FeatureMap]] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    agreement: bool = False

    def last(self, stage: str) -> Row:
        """The last row of a stage, or an empty one."""
        return last_row(self.rows, stage)

    @property
    def start(self) -> Row:
        """What the run began with."""
        return self.last(START)

    @property
    def measured(self) -> Row:
        """What came of a run that narrowed."""
        return self.last(MEASURE)

    @property
    def epochs(self) -> list[Row]:
        """The rows of epochs."""
        return [row for row in self.rows if "epoch" in row]

    @property
    def headline(self) -> str:
        """The name of the figure that says how good the network is."""
        return str(next((row["headline"] for row in reversed(self.rows) if "headline" in row), "top1"))

    @property
    def headline_title(self) -> str:
        if self.agreement:
            return "agreement with the dense network"
        return titled(self.headline)

    @property
    def removed(self) -> dict[str, float]:
        """{group: the share of its channels that the plan removes}."""
        return {name: 1 - kept / size for name, (size, kept) in self.widths.items()}
