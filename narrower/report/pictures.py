"""The pictures of a report, as SVG files, and as SVG within a page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..extras import optional
from ..planning.drawing import DENSE, NARROW, draw_bars, draw_damage, width_for
from .by_class import Class
from .facts import Facts, Row, Scored

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT, ACCENT, THIRD = "#1f2328", "#d9480f", "#7c55b8"
"""Colours. That of the text becomes the page's own; the others can be seen on a light and on a dark ground."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "text.color": TEXT, "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT, "axes.spines.top": False, "axes.spines.right": False,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False,
}  # fmt: skip
FEW_CLASSES, LONG_NAME = 30, 24
PICTURE_NAMES = ("widths", "macs", "latency", "damage", "scores", "training", "classes", "resrep", "norms", "maps")
LINES = {"train": NARROW, "train dense": DENSE, "fine-tune": NARROW, "resrep": THIRD}


class Picture(NamedTuple):
    """An SVG file. `name`: without its ending. `text`: what it shows, in a sentence."""

    name: str
    text: str
    svg: bytes

    @property
    def inline(self) -> str:
        """The SVG as a part of an HTML page: no header, identifiers that no other picture has, text in the page's colour."""
        svg = self.svg.decode()
        svg = svg[svg.index("<svg") :].replace(TEXT, "currentColor")
        svg = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{self.name}-", svg)
        height, width = (float(found[1]) for key in ("height", "width") if (found := re.search(rf'\b{key}="([\d.]+)pt"', svg)))
        svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1)
        least = round(min(width, 900))
        return svg.replace("<svg", f'<svg role="img" style="aspect-ratio:{width:g}/{height:g};min-width:{least}px"', 1)


@contextmanager
def figure(width: float, height: float) -> Iterator[tuple[Figure, io.BytesIO]]:
    """A figure of so many inches, and the file that it is written to at the end."""
    optional("matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE | {"svg.hashsalt": "narrower"}):  # the same picture, the same bytes
        out = io.BytesIO()
        made = Figure(figsize=(width, height), layout="constrained")
        yield made, out
        made.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))


def bars(name: str, text: str, label: str, rows: Sequence[tuple[str, float, float]]) -> Picture:
    """A bar for each (name, dense, narrow)."""
    with figure(width_for(len(rows)), 4.2) as (made, out):
        names, dense, narrow = zip(*rows, strict=True)
        draw_bars(made.subplots(), names, dense, narrow, label)
    return Picture(name, text, out.getvalue())


def classes(found: Sequence[Class], label: str = "accuracy") -> Picture:
    """Accuracy of both networks in each class. Of many, in those that lost and gained most, and how the changes are spread."""
    text = f"{label.capitalize()} of each class, dense and narrow"
    if len(found) <= FEW_CLASSES:
        with figure(width_for(len(found)), 3.8) as (made, out):
            draw_changes(made.subplots(), found, label)
        return Picture("classes", text, out.getvalue())
    ordered = sorted(found, key=lambda one: one.change)
    with figure(14, 4.2) as (made, out):
        left, right = made.subplots(1, 2, width_ratios=(2, 1))
        draw_changes(left, [*ordered[: FEW_CLASSES // 2], *ordered[-(FEW_CLASSES // 2) :]], label)
        left.axvline(FEW_CLASSES // 2 - 0.5, color=DENSE, linewidth=1, linestyle=":")
        most = max(abs(ordered[0].change), abs(ordered[-1].change), 1.0)
        right.hist([one.change for one in found], bins=31, range=(-most, most), color=NARROW)
        right.axvline(0, color=TEXT, linewidth=0.8)
        right.set_xlabel("change of a class (percentage points)")
        right.set_ylabel("classes")
        right.grid(axis="y", alpha=0.3)
    return Picture("classes", f"{text}: those that lost and gained most, and a histogram of the changes", out.getvalue())


def draw_changes(axes: Any, found: Sequence[Class], label: str) -> None:
    """A line for each class, from the dense network's accuracy to the narrow one's."""
    at = range(len(found))
    dense, narrow = [one.dense for one in found], [one.narrow for one in found]
    axes.vlines(at, dense, narrow, colors=[ACCENT if one.change < 0 else NARROW for one in found], linewidth=2, alpha=0.7)
    axes.plot(at, dense, "o", color=DENSE, markersize=7, label="dense")
    axes.plot(at, narrow, "o", color=NARROW, markersize=5, label="narrow")
    axes.set_xticks(at, [shortened(one.name) for one in found], rotation=90 if len(found) > 12 else 0, fontsize="small")
    axes.set_xlim(-0.7, len(found) - 0.3)
    axes.set_ylabel(f"{label} (%)")
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", bbox_to_anchor=(0, 1.14), ncols=2, borderaxespad=0)


def shortened(name: str) -> str:
    """For an axis, where dollars would begin a formula."""
    return (name if len(name) <= LONG_NAME else name[: LONG_NAME - 1] + "…").replace("$", r"\$")


def damage(facts: Facts) -> Picture:
    """The damage curves with the chosen points."""
    assert facts.sensitivity is not None
    with figure(8, 4.6) as (made, out):
        axes = made.subplots()
        draw_damage(axes, facts.sensitivity, facts.removed)
    return Picture("damage", "Damage of each group against the share of its channels removed", out.getvalue())


def training(facts: Facts) -> Picture:
    """Loss and headline over the epochs of all trainings, one after the other."""
    rows = facts.epochs
    dense = facts.last("evaluate dense").get(facts.headline)
    with figure(10, 3.6) as (made, out):
        left, right = made.subplots(1, 2)
        start = 0
        for stage in dict.fromkeys(row["stage"] for row in rows):
            own = [row for row in rows if row["stage"] == stage]
            at = [start + k + 1 for k in range(len(own))]
            colour = LINES.get(stage, THIRD)
            line(left, at, own, "loss", color=colour, label=stage)
            line(left, at, own, "val_loss", color=colour, linestyle=":", label=f"{stage}, test images")
            line(right, at, own, facts.headline, color=colour, label=stage)
            start += len(own)
        if dense is not None:
            right.axhline(dense, color=ACCENT, linestyle="--", linewidth=1, label="dense, as given")
        for axes, label in ((left, "loss"), (right, f"{facts.headline_title} (%)")):
            over_epochs(axes, label, start)
    return Picture("training", f"Loss and {facts.headline_title} over the epochs", out.getvalue())


def resrep(facts: Facts) -> Picture:
    """What ResRep's masks and zeros come to over the epochs, and the norms of the rows that stay."""
    rows = [row for row in facts.epochs if "masked" in row]
    at = [row["epoch"] for row in rows]
    with figure(12, 3.4) as (made, out):
        macs, channels, norms = made.subplots(1, 3)
        for key, label, colour in (("masked", "chosen rows masked", NARROW), ("reached", "zeros gone", THIRD)):
            line(macs, at, [{key: 100 * row[key]} for row in rows], key, color=colour, label=label)
        if isinstance(budget := facts.settings.get("macs"), (int, float)) and 0 < budget <= 1:
            macs.axhline(100 * budget, color=ACCENT, linestyle="--", linewidth=1, label="budget")
        for key, label, colour in (("chosen", "chosen", NARROW), ("zero", "at zero", THIRD)):
            line(channels, at, rows, key, color=colour, label=label)
        for key, label, colour in (("mean_norm", "mean", NARROW), ("least_norm", "least", THIRD)):
            line(norms, at, rows, key, color=colour, label=label)
        for axes, label in ((macs, "MACs / dense (%)"), (channels, "channels"), (norms, "norm of the rows that stay")):
            over_epochs(axes, label, len(rows))
    text = "Masked and reached MACs, channels chosen and at zero, and row norms over the epochs"
    return Picture("resrep", text, out.getvalue())


def scores(found: Mapping[str, Scored]) -> Picture:
    """The sorted scores of each group: those of channels that stay, and that go."""
    from matplotlib.ticker import MaxNLocator

    with panels(len(found)) as (grid, out):
        for axes, (name, one) in zip(grid, found.items(), strict=False):
            order = falling(one.values)
            values, kept = one.values[order], one.kept[order]
            floor = min(values.min(), 0.0) - 0.04 * np.ptp(np.append(values, 0.0))  # a channel of score 0 is seen too
            for mask, colour, label in ((kept, NARROW, "stays"), (~kept, ACCENT, "goes")):
                axes.stairs(np.where(mask, values, floor), baseline=floor, fill=True, color=colour, label=label)
            if values.min() > 0 and values.max() > 300 * np.median(values):
                axes.set_yscale("log")
                axes.set_ylim(values.min() / 2, values.max() * 1.5)
            axes.set_title(f"{name}: {kept.sum()} of {len(kept)} stay", fontsize=9)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        grid[0].legend(fontsize="small")
    return Picture("scores", "Sorted scores of the channels of some groups, those that stay and those that go", out.getvalue())


def falling(values: np.ndarray) -> np.ndarray:
    """Channels by falling score. Of equal ones the later stands before, as a plan removes the earlier first."""
    return np.argsort(values, kind="stable")[::-1]


def norms(steps: Sequence[int], groups: Mapping[str, np.ndarray]) -> Picture:
    """The norms `[len(steps), rows]` of each group over the steps."""
    with panels(len(groups)) as (grid, out):
        for axes, (name, found) in zip(grid, groups.items(), strict=False):
            for rows, colour in ((found[:, found[-1] > 0], NARROW), (found[:, found[-1] == 0], ACCENT)):
                axes.plot([0, *steps], np.vstack([np.ones((1, rows.shape[1])), rows]), color=colour, linewidth=0.8, alpha=0.6)
            axes.set_title(name, fontsize=9)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
    return Picture("norms", "Row norms of some groups over the steps", out.getvalue())


@contextmanager
def panels(count: int) -> Iterator[tuple[list[Any], io.BytesIO]]:
    """Axes for so many small pictures, three in a row."""
    rows, columns = -(-count // 3), min(3, count)
    with figure(4 * columns, 2.5 * rows) as (made, out):
        grid = list(made.subplots(rows, columns, squeeze=False).flat)
        for axes in grid[count:]:
            axes.set_axis_off()
        yield grid, out


def maps(facts: Facts) -> Picture:
    """Feature maps of one image: a row for each group, first what stays, then (named in another colour) what goes."""
    groups = facts.maps
    columns = max(len(found) for found in groups.values())
    height = 1.35 * len(groups) + 0.4
    with figure(1.0 * columns + 0.4, height) as (made, out):
        made.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 0.2 / height))  # the first name stands above the titles
        grid = made.subplots(len(groups), columns, squeeze=False)
        for row, (name, found) in zip(grid, groups.items(), strict=True):
            for axes in row:
                axes.set_axis_off()
            for axes, one in zip(row, found, strict=False):
                axes.imshow(one.pixels, cmap="magma", interpolation="nearest")
                axes.set_title(f"{one.channel}: rank {one.rank}", fontsize=8, color=TEXT if one.kept else ACCENT)
            row[0].text(0, 1.32, name, transform=row[0].transAxes, fontsize=9, weight="bold")
    return Picture("maps", "Feature maps that stay and that go, with their ranks", out.getvalue())


def line(axes: Any, at: Sequence[int], rows: Sequence[Row], key: str, **style: Any) -> None:
    """A line through what the rows have of `key`."""
    points = [(x, row[key]) for x, row in zip(at, rows, strict=True) if isinstance(row.get(key), (int, float))]
    if points:
        axes.plot(*zip(*points, strict=True), marker=".", markersize=4, linewidth=1.5, **style)


def over_epochs(axes: Any, label: str, epochs: int) -> None:
    """Name the axes, at whole epochs, and the lines."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(min(8, max(1, epochs)), integer=True))
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
