"""Sensitivity: what removing channels of each group costs the network's output, as curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ..errors import PlanError
from ..graph.types import html_table, table
from .drawing import draw_damage, new_axes

FORMAT = 1
LEAST_DAMAGE = 1e-9  # of a measurement: curves are drawn in logarithms


class Curve(NamedTuple):
    """The measured damage of groups that can only shrink together.

    `groups`: their names. `shares`: the share of their channels that was removed, ascending, above zero. `damages`: what that
    did to the output, as measured.
    """

    groups: tuple[str, ...]
    shares: tuple[float, ...]
    damages: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """The damage of removing the lowest channels of each group, that group alone, its readers repaired.

    `measure`: "kl" (the mean Kullback-Leibler divergence of the network's class probabilities from the dense ones, in nats) or
    "relative" (the squared error of the output relative to its variance). `images`: how many it was measured on.
    """

    curves: tuple[Curve, ...]
    measure: str
    images: int

    @cached_property
    def hulls(self) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
        """The convex hull of the curve of each group: a plan asks for thousands of damages."""
        return {name: hull for curve in self.curves for hull in [convex_hull(curve)] for name in curve.groups}

    @cached_property
    def by_group(self) -> Mapping[str, Curve]:
        return {name: curve for curve in self.curves for name in curve.groups}

    def damage(self, groups: Sequence[str], share: float) -> float:
        """The damage of removing that share of the channels of groups that shrink together.

        Between measured points a power of the share: convex and smooth, so that a plan need not end on a measured point. Zero
        without a curve.
        """
        hull = next((self.hulls[g] for g in groups if g in self.hulls), None)
        return 0.0 if hull is None or share <= 0 else interpolated(*hull, share)

    def plot(self, axes: Any = None, *, removed: Mapping[str, float] | None = None) -> Any:
        """The damage of each group against the share of its channels removed, on matplotlib axes: `axes`, or new ones.

        Points are measured, lines are what a plan reads. Colours go from the first group (blue) to the last (orange).
        `removed`: {group: share}, circles on the curves. Returns the axes. Raises MissingExtraError without matplotlib.
        """
        axes = new_axes() if axes is None else axes
        draw_damage(axes, self, removed)
        return axes

    def __str__(self) -> str:
        return f"{table(self.rows)}\n{self.summary}"

    def _repr_html_(self) -> str:
        """For notebooks."""
        return html_table(self.rows, [self.summary])

    @property
    def summary(self) -> str:
        """How it was measured."""
        return f"{self.measure} on {self.images} images"

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """A header, and a row for each curve: the damage at each share."""
        shares = sorted({s for c in self.curves for s in c.shares})
        rows: list[tuple[str, ...]] = [("group", *(f"-{s:.0%}" for s in shares), "")]
        for c in self.curves:
            found = dict(zip(c.shares, c.damages, strict=True))
            more = f"with {', '.join(c.groups[1:])}" if len(c.groups) > 1 else ""
            rows.append((c.groups[0], *(f"{found[s]:.4f}" if s in found else "" for s in shares), more))
        return rows

    def to_json(self) -> str:
        """All of it; `from_json` reads it again."""
        return json.dumps({"format": FORMAT, "measure": self.measure, "images": self.images,
                           "curves": [c._asdict() for c in self.curves]})

    @staticmethod
    def from_json(text: str) -> Sensitivity:
        """What `to_json` wrote. Raises PlanError for damaged text or another version."""
        try:
            data = json.loads(text)
            version = data["format"]
            curves = tuple(Curve(tuple(map(str, c["groups"])), tuple(map(float, c["shares"])), tuple(map(float, c["damages"])))
                           for c in data["curves"])
            found = Sensitivity(curves, str(data["measure"]), int(data["images"]))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise PlanError(f"this is not a sensitivity ({type(e).__name__}: {e})") from e
        if version != FORMAT:
            raise PlanError(f"the sensitivity has format {version}, this version of narrower reads {FORMAT}")
        if not all(c.groups and len(c.shares) == len(c.damages) and list(c.shares) == sorted(set(c.shares))
                   and all(0 < s < 1 for s in c.shares) and np.isfinite(c.damages).all() for c in curves):
            raise PlanError("the sensitivity is damaged: a curve needs ascending shares between 0 and 1, and a damage for each")
        return found


def convex_hull(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Shares and damages of the points, with (0, 0), that lie on the lower convex hull of the curve made monotone."""
    shares = np.array([0.0, *curve.shares])
    damages = np.maximum.accumulate(np.array([0.0, *(max(d, LEAST_DAMAGE) for d in curve.damages)]))
    hull: list[int] = []
    for k in range(len(shares)):
        while len(hull) > 1 and (damages[hull[-1]] - damages[hull[-2]]) * (shares[k] - shares[hull[-1]]) >= (
                damages[k] - damages[hull[-1]]) * (shares[hull[-1]] - shares[hull[-2]]):
            hull.pop()
        hull.append(k)
    return shares[hull], damages[hull]


def interpolated(shares: np.ndarray, damages: np.ndarray, share: float) -> float:
    """A power of the share through two neighbouring points; below the first point the power of the next piece."""
    if len(shares) < 2:
        return 0.0
    k = int(np.clip(np.searchsorted(shares, share), 1, len(shares) - 1))
    low, high = (k - 1, k) if k > 1 else (1, min(2, len(shares) - 1))
    power = 1.0
    if high > low:
        power = max(1.0, float(np.log(damages[high] / damages[low]) / np.log(shares[high] / shares[low])))
    return float(damages[k] * (share / shares[k]) ** power)
