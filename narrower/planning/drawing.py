"""Pictures of plans and damage curves, on matplotlib axes. matplotlib is imported only here, when something is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..extras import optional

DENSE, NARROW, CHOSEN = "#9aa5b1", "#2f7fc1", "#d9480f"
DEPTH = ("#3b6fd4", "#2fa39a", "#e0962a")
"""Colours that can be seen on a light and on a dark ground. The last three: from the first group to the last."""
MOST_NAMES = 64
"""With more bars than this, names cannot be read, and only every n-th is written."""


def new_axes(bars: int = 0) -> Any:
    """Axes in a figure of their own, as wide as that many bars need."""
    return optional("matplotlib.pyplot").subplots(figsize=(width_for(bars), 4.2), layout="constrained")[1]


def width_for(bars: int) -> float:
    """Inches for so many bars with names below."""
    return float(np.clip(0.22 * bars + 1.5, 7.5, 16))


def draw_bars(axes: Any, names: Sequence[str], dense: Sequence[float], narrow: Sequence[float], label: str) -> None:
    """A bar for each name: what the dense network has, and before it what stays."""
    at = np.arange(len(names))
    axes.bar(at, dense, width=0.85, color=DENSE, alpha=0.55, label="dense")
    axes.bar(at, narrow, width=0.85, color=NARROW, label="narrow")
    step = -(-len(names) // MOST_NAMES)
    axes.set_xticks(at[::step], list(names)[::step], rotation=90, fontsize="small")
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", bbox_to_anchor=(0, 1.12), ncols=2, frameon=False, borderaxespad=0)


class Damages(Protocol):
    """What is drawn of a `Sensitivity`."""

    @property
    def curves(self) -> Sequence[Measured]: ...

    @property
    def measure(self) -> str: ...

    def damage(self, groups: Sequence[str], share: float) -> float: ...


class Measured(Protocol):
    """A curve of damages."""

    @property
    def groups(self) -> tuple[str, ...]: ...

    @property
    def shares(self) -> tuple[float, ...]: ...

    @property
    def damages(self) -> tuple[float, ...]: ...


def draw_damage(axes: Any, sensitivity: Damages, removed: Mapping[str, float] | None = None) -> None:
    """The damage of each group against the share of its channels that goes, from the first group (blue) to the last (orange).

    Points: as measured. Lines: as a plan reads them. `removed`: {group: the share that a plan removes}, drawn as circles.
    """
    colours = optional("matplotlib.colors").LinearSegmentedColormap.from_list("depth", DEPTH)
    curves = sensitivity.curves
    floor = floor_of(sensitivity)
    for k, curve in enumerate(curves):
        colour = colours(k / max(1, len(curves) - 1))
        shares = np.linspace(0.02, max(curve.shares), 60)
        read = [sensitivity.damage(curve.groups, share) for share in shares]
        axes.plot(shares, np.maximum(read, floor), color=colour, linewidth=1, alpha=0.8)
        axes.plot(curve.shares, np.maximum(curve.damages, floor), ".", color=colour, markersize=4, alpha=0.8)
        taken = [(removed or {}).get(name, 0.0) for name in curve.groups]
        if max(taken) > 0:
            share = max(taken)
            axes.plot([share], [max(sensitivity.damage(curve.groups, share), floor)], "o", color=colour, markersize=8,
                      markeredgecolor=CHOSEN, markeredgewidth=1.5)
    axes.set_yscale("log")
    axes.set_xlabel("share of the channels removed")
    unit = "KL divergence of the outputs, nats" if sensitivity.measure == "kl" else "squared error of the outputs, relative"
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)


def floor_of(sensitivity: Damages) -> float:
    """The least damage that is drawn: curves that touch zero would fill a logarithmic axis."""
    damages = [d for curve in sensitivity.curves for d in curve.damages if d > 0]
    return max(1e-6, max(damages, default=1.0) * 1e-5)
