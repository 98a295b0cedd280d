"""The sections of a report: each is made from the facts of a run, or says why it is left out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from ..resrep.history import spread
from . import pictures
from .by_class import classes_of, told
from .facts import COSTS, RESUME, STAGES, START, Facts, Row
from .pictures import Picture

MOST_ROWS = 2000
"""Of a table, for the size of the page."""


class Table(NamedTuple):
    """Cells as text. The first column is left-aligned, the others are right-aligned where they are `numbers`."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numbers: bool = True


class Section(NamedTuple):
    """A part of the page. `absent`: why it has no more than its title. `code`: lines for a terminal."""

    title: str
    text: str = ""
    picture: Picture | None = None
    table: Table | None = None
    folded: bool = False
    absent: str = ""
    code: str = ""


def stages(facts: Facts) -> Section:
    """The table of the network after each stage."""
    title = "Stages"
    measured = facts.measured
    if not measured:
        found = facts.last("train")
        rows = [("trained", percent(found.get(facts.headline)), seconds(found))] if found else []
        return Section(title, table=Table(("", facts.headline_title, "seconds"), rows))
    dense, narrow = measured["dense"], measured["narrow"]
    header = ("", facts.headline_title, *(cost.title for cost in COSTS), "seconds")
    lines = [("dense", percent(dense.get(facts.headline)), *costs(dense), "")]
    names = list(measured["stages"])
    for name in names:
        last = name == names[-1]
        shown = costs(narrow) if last else (*costs(narrow)[:3], "")
        lines.append((STAGES.get(name, name), percent(measured["stages"][name]), *shown, seconds(facts.last(name))))
    if not names:
        lines.append(("narrow", percent(narrow.get(facts.headline)), *costs(narrow), ""))
    change = narrow.get(facts.headline, 0.0) - dense.get(facts.headline, 0.0)
    ratios = [f"× {narrow[cost.key] / dense[cost.key]:.3f}" if dense.get(cost.key) else "" for cost in COSTS]
    lines.append(("change", f"{change:+.2f}", *ratios, ""))
    return Section(title, "Latency: one image, measured in turn on the machine of the run, at its end.",
                   table=Table(header, lines))


def costs(of: Row) -> tuple[str, ...]:
    return tuple(cost.shown(of[cost.key]) if cost.key in of else "" for cost in COSTS)


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} %"


def seconds(row: Row) -> str:
    return f"{row['seconds']:,.1f}" if "seconds" in row else ""


def widths(facts: Facts) -> Section:
    """Output channels of each layer."""
    title = "Widths by layer"
    if not facts.layers:
        return Section(title, absent=facts.absent.get("layers", "the network was not narrowed"))
    rows = [(short(layer.name), float(layer.dense[0]), float(layer.narrow[0])) for layer in facts.layers]
    picture = pictures.bars("widths", "Output channels of each layer, dense and kept", "output channels", rows)
    return Section(title, picture=picture)


def short(weight: str) -> str:
    """The layer of a weight."""
    return weight.removesuffix(".weight")


def macs(facts: Facts) -> Section:
    """Multiply-adds of each layer."""
    title = "Multiply-adds by layer"
    if not facts.layers:
        return Section(title, absent=facts.absent.get("layers", "the network was not narrowed"))
    if facts.graph is None:
        return Section(title, absent=facts.absent.get("graph", "the network was not traced"))
    uses = facts.graph.uses
    rows = [(short(name), uses[name] * prod(dense) / 1e6, uses[name] * prod(narrow) / 1e6)
            for name, dense, narrow in facts.layers if name in uses]
    if not rows:
        return Section(title, absent="no layer of the run is one of the traced network")
    return Section(title, picture=pictures.bars("macs", "Multiply-adds of each layer, dense and narrow", "MACs (M)", rows))


def latency(facts: Facts) -> Section | None:
    """Milliseconds of each layer."""
    measured = facts.measured
    if not measured:
        return None
    title, rows = "Latency by layer", table_rows(facts)
    if rows:
        assert facts.latency is not None
        place = facts.latency.place
        text = (f"From the latency table: {place.get('runtime')} on {place.get('machine')}, threads: {place.get('threads')}. "
                "Layers were timed by themselves at some widths; the times here are read between these.")
    else:
        found = measured.get("layer_times", {"ms": {}})
        rows = [(short(name), *pair) for name, pair in found["ms"].items()]
        text = (f"One image in eager PyTorch on {found.get('device')}, threads: {found.get('threads')}, at the end of the run. "
                "Of each layer the shortest of several forwards, both networks in turn. Very short layers take mostly the time "
                "of the call, and what lies between the layers is not counted: it is in the latency of the stages.")
    if not rows:
        return Section(title, absent="the run has timed no layers (one of an older version)")
    _, dense, narrow = zip(*rows, strict=True)
    text += f" All layers together: {sum(dense):,.3f} → {sum(narrow):,.3f} ms."
    picture = pictures.bars("latency", "Milliseconds of each layer, dense and narrow", "ms", rows)
    table = Table(("layer", "dense ms", "narrow ms", "ratio"),
                  [(name, f"{a:,.4f}", f"{b:,.4f}", f"× {b / a:.3f}" if a else "") for name, a, b in rows])
    return Section(title, text, picture, table, folded=True)


def table_rows(facts: Facts) -> list[tuple[str, float, float]]:
    """Of each layer that the latency table knows the milliseconds, dense and narrow."""
    layers = {layer.name: layer for layer in facts.layers}
    if facts.latency is None or not layers.keys() >= {*facts.latency.tensors}:
        return []
    own = [layers[name] for name in facts.latency.tensors]
    dense, narrow = (facts.latency.times(np.arange(len(own)), np.array(sizes, dtype=float).reshape(-1, 2))
                     for sizes in ([one.dense[:2] for one in own], [one.narrow[:2] for one in own]))
    return [(short(one.name), float(a), float(b)) for one, a, b in zip(own, dense, narrow, strict=True)]


def scores(facts: Facts) -> Section | None:
    """Sorted scores, with the cut."""
    if not facts.measured:
        return None
    title = "Scores and the cut"
    if not facts.scores:
        return Section(title, absent=facts.absent.get("scores", "the run has kept no scores"))
    losing = [name for name, one in facts.scores.items() if not one.kept.all()]
    if not losing:
        return Section(title, absent="no group with scores has lost channels")
    given = facts.settings
    method = given.get("prior") if given.get("method") in ("resrep", "soft", "centripetal") else given.get("method")
    text = f"Each picture is a group, a bar each of its channels by falling score ({method}): blue stays, orange goes."
    if given.get("method") in ("soft", "centripetal"):
        text += " The scores decided how many channels go, the training which."
    if given.get("steps", 1) > 1:
        text += f" The scores are those of the dense network; it was scored again in each of {given['steps']} steps."
    shown = [losing[k] for k in spread(len(losing), 6)]
    return Section(title, text, pictures.scores({name: facts.scores[name] for name in shown}))


def damage(facts: Facts) -> Section:
    """Damage curves, and the point of each group that the plan chose."""
    title = "Damage curves"
    if facts.sensitivity is None:
        return Section(title, absent=facts.absent.get("sensitivity", "no damage was measured"))
    text = (f"Each line is a group of channels, from the first of the network (blue) to the last (orange). Damage is that of "
            f"removing the lowest channels of this group alone, its readers repaired, on {facts.sensitivity.images} images.")
    no_plan = f" No chosen points: {facts.absent.get('widths', 'no plan')}."
    text += " Circles: what the plan removes." if facts.widths else no_plan
    rows = []
    for curve in facts.sensitivity.curves:
        for name in curve.groups:
            size, kept = facts.widths.get(name, (0, 0))
            share = facts.removed.get(name, 0.0)
            rows.append((name, str(size or ""), str(kept or ""), f"{share:.0%}" if size else "",
                         f"{facts.sensitivity.damage(curve.groups, share):.4f}" if size else ""))
    table = Table(("group", "channels", "kept", "removed", "damage"), rows)
    return Section(title, text, pictures.damage(facts), table, folded=True)


def training(facts: Facts) -> Section:
    """Loss and accuracy over the epochs."""
    title = "Training"
    if not facts.epochs:
        return Section(title, absent="nothing was trained in this run")
    return Section(title, picture=pictures.training(facts))


def classes(facts: Facts) -> Section | None:
    """Where accuracy went."""
    if not facts.measured or facts.settings.get("task"):
        return None
    figure = "agreement" if facts.agreement else "accuracy"
    title = f"Where {figure} went, class by class"
    found = classes_of(facts)
    if not found:
        return Section(title, absent="the run has not counted by class (one of an older version)")
    rows = [(one.name, f"{one.images:,}", f"{one.dense:.2f} %", f"{one.narrow:.2f} %", f"{one.change:+.2f}")
            for one in sorted(found, key=lambda one: one.change)]
    text = told(found) + (" Classes are those that the dense network finds." if facts.agreement else "")
    if len(rows) > MOST_ROWS:
        rows = [*rows[: MOST_ROWS // 2], *rows[-(MOST_ROWS // 2) :]]
        text += f" The table has the {MOST_ROWS // 2:,} that lost most, and as many that gained most."
    table = Table(("class", "images", "dense", "narrow", "change"), rows)
    return Section(title, text, pictures.classes(found, figure), table, folded=True)


def resrep(facts: Facts) -> Section | None:
    """How ResRep went."""
    if facts.settings.get("method") != "resrep" or not facts.measured:
        return None
    title = "ResRep: from masks to zeros"
    if not any("masked" in row for row in facts.epochs):
        return Section(title, absent="the run has recorded no masks")
    return Section(title, picture=pictures.resrep(facts))


def norms(facts: Facts) -> Section | None:
    """The way of the row norms."""
    if facts.settings.get("method") != "resrep" or not facts.measured:
        return None
    title = "ResRep: the way of the row norms"
    rows = [row for row in facts.rows if "norms" in row]
    if not rows:
        return Section(title, absent="the run has noted no norms (one of an older version)")
    steps = [step for row in rows for step in row["steps"]]
    groups = {name: np.array([norms for row in rows for norms in row["norms"][name]]) for name in rows[0]["norms"]}
    text = ("Each line is a row of a compactor, that is a channel, in groups along the network: orange ends at zero and goes, "
            f"blue stays. All start at one. They were noted {len(steps)} times, the last at step {steps[-1]}, and no more once "
            "all compactors were merged for good; of a wide group some rows are shown.")
    return Section(title, text, pictures.norms(steps, groups))


def maps(facts: Facts) -> Section | None:
    """Feature maps with their ranks."""
    if facts.settings.get("method") != "hrank" or not facts.measured:
        return None
    title = "HRank: feature maps that stay and that go"
    if not facts.maps:
        return Section(title, absent=facts.absent.get("maps", "no group with feature maps has lost channels"))
    text = ("Of one image, in groups along the network: first maps that stay (those of the highest rank), then in orange maps "
            "that go (those of the lowest). The rank is of this image; the plan has averaged over many.")
    return Section(title, text, pictures.maps(facts))


def pins(facts: Facts) -> Section:
    """The groups that no channel can be removed from."""
    title = "Pinned groups"
    if facts.graph is None:
        return Section(title, absent=facts.absent.get("graph", "the network was not traced"))
    rows = [(g.name, str(g.size), str(g.pinned)) for g in facts.graph if g.pinned]
    text = f"{facts.graph.summary[0].upper()}{facts.graph.summary[1:]}."
    return Section(title, text, table=Table(("group", "channels", "why"), rows, numbers=False) if rows else None)


def made_by(facts: Facts) -> Section:
    """The command, the versions and all settings."""
    start = facts.start
    command = start.get("command", "prune" if facts.measured else "train")
    text = f"Seed {facts.settings.get('seed', 'unknown')}. "
    text += f"Run by narrower {start.get('narrower', 'of a version that was not recorded')}"
    text += f", torch {start['torch']}, Python {start['python']}" if {"torch", "python"} <= start.keys() else ""
    text += f", in {start['processes']} processes" if start.get("processes", 1) > 1 else ""
    text += f". Page by torch {torch.__version__}, Python {sys.version.split()[0]}."
    typed = [row["typed"] for row in facts.rows if row.get("stage") in (START, RESUME) and row.get("typed")]
    again = f"narrower {command} --config {shlex.quote(f'{facts.name}/config.yaml')}"
    text += " The command as it was typed, and one that takes the same settings:" if typed else " To run it again:"
    rows = [(str(key), str(value)) for key, value in facts.settings.items()]
    return Section("Command, versions and settings", text, table=Table(("setting", "value"), rows, numbers=False), folded=True,
                   code="\n".join([*typed, again]))


PARTS: Sequence[Callable[[Facts], Section | None]] = (
    stages, classes, widths, macs, latency, scores, damage, training, resrep, norms, maps, pins, made_by,
)  # fmt: skip


def sections(facts: Facts) -> list[Section]:
    """All sections of a report."""
    made = (part(facts) for part in PARTS)
    return [section for section in made if section is not None]
