"""`narrower compare`: a grid of methods, budgets and seeds, from the same dense network, by the same training."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from ..data.task import titled
from ..errors import ConfigError, MissingExtraError, NarrowerError
from ..extras import optional
from ..report.facts import MEASURE
from ..soft.soft_pruning import PUBLISHED
from ..storage import write_whole
from ..training.agreement import first
from ..training.config import flag
from . import external, run_folder
from .config import METHODS, SCOPES, CompareConfig, RunConfig, plain, unused
from .job import Job, Reporter, Settings
from .protocol import check_settings, check_start, pruning_of, start_now, start_of
from .prune import prune, train_dense

DENSE, TABLE, PICTURE = "dense", "compare.json", "compare.svg"
OTHERS = (external.DENSE, *external.EXTERNAL)
"""Methods that `narrower prune` does not have."""
NAMED: dict[str, dict[str, Sequence[str]]] = {"resrep": {"scope": SCOPES}, "soft": {"softness": [*PUBLISHED]},
                                              "centripetal": {"pull": ["published"], "scope": SCOPES}}
"""Settings of a method, and their values by name, of which one can follow it in a grid. Other names are of `--allocate`."""
OURS = ("exclude", "round_to", "min_channels", "tune_steps")
"""Settings that torch-pruning's rows would not follow."""
PLANNED = ("distill_features",)
"""And of the training: for the channels that a plan keeps, which none of `OTHERS` has."""
Begin = Callable[[Settings, str], Job]
"""Opens the job of a command (its name)."""


class Cell(NamedTuple):
    """One run of the grid. `method`: some with `--allocate` (`resrep:norms`) or a setting that is `NAMED` (`soft:sfp`)."""

    method: str
    macs: float
    seed: int

    def folder(self, root: Path) -> Path:
        return root / f"{self.method.replace(':', '-')}-{self.macs:g}-seed-{self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What a run of the grid came to.

    Attributes:
        figure: the name of the figure that the task reports first, such as top1.
        dense, right_after, last: that figure in percent: of the dense network, before the fine-tuning, and at the end.
        macs, params, latency: of the narrow network as fractions of the dense one's; latency of one image, both in this run.
        seconds: of all stages and epochs, without the evaluations after epochs and without the training of the dense network.
    """

    cell: Cell
    figure: str
    dense: float
    right_after: float
    last: float
    macs: float
    params: float
    latency: float
    seconds: float


@dataclass(frozen=True)
class Line:
    """A method at a budget: the mean of its seeds, and the standard deviation of the last figure (None where n = 1)."""

    method: str
    budget: float
    n: int
    right_after: float
    last: float
    spread: float | None
    macs: float
    params: float
    latency: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """The grid: the figure of the task by name, that of the dense network, its runs, what failed with the reason, and the lines
    of its table."""

    figure: str
    dense: float
    runs: tuple[Outcome, ...]
    failed: dict[str, str]
    folder: Path

    @property
    def lines(self) -> tuple[Line, ...]:
        return lines(self.runs)


def cells(given: CompareConfig) -> list[Cell]:
    """All runs, seed by seed, so that a grid that is cut off has each method once before one has several.

    The dense network has no budget: it is trained once for each seed.
    """
    grid = itertools.product(given.seeds, given.budgets, given.methods)
    return list(dict.fromkeys(Cell(method, 1.0 if method == external.DENSE else budget, seed) for seed, budget, method in grid))


def compare(settings: Settings, given: CompareConfig, begin: Begin, report: Reporter) -> Comparison:
    """Run what is not there yet, go on with what was interrupted, and put all together.

    A run that cannot be done is reported and left out.

    After each run `compare.json` is written.

    Raises:
        ConfigError: the folder holds runs by another training or from another network, or nothing could be run.
        KeyboardInterrupt: Ctrl-C. The same command goes on.
    """
    root = Path(settings.run.output or "runs/compare")
    settings.prune.check_used(*dict.fromkeys(method.partition(":")[0] for method in given.methods))
    for cell in cells(given):  # all settings are checked before anything is trained
        own = settings_of(cell, settings, root)
        check_settings(cell.folder(root), own, pruning_of(own, ours=cell.method not in OTHERS))
    if not (settings.model.checkpoint or settings.model.pretrained):
        settings = with_dense(settings, root, begin)
    check_begun(settings, root, cells(given), report)
    failed: dict[str, str] = {}
    for cell in cells(given):
        if outcome(cell, cell.folder(root)) is not None:
            continue
        name = cell.folder(Path()).name
        report.note(name)
        try:
            one = begin(settings_of(cell, settings, root), "prune")
            external.prune_external(one, cell.method) if cell.method in OTHERS else prune(one)
        except NarrowerError as error:
            failed[name] = str(error)
            report.note(f"{name}: {failed[name]}")
            continue
        first(partial(write_table, together(root, cells(given), failed)))
    return together(root, cells(given), failed)


def together(root: Path, grid: Sequence[Cell], failed: dict[str, str]) -> Comparison:
    """What has ended so far. Raises ConfigError if nothing has, or if runs began with different networks or images."""
    found = [done for cell in grid if (done := outcome(cell, cell.folder(root))) is not None]
    if not found:
        raise ConfigError("none of the runs could be done: " + "; ".join(f"{name}: {why}" for name, why in failed.items()))
    folders = [one.cell.folder(root) for one in found]
    for folder in folders[1:]:
        check_start(folder, start_of(folders[0]), str(folders[0]))
    return Comparison(found[0].figure, found[0].dense, tuple(found), failed, root)


def check_begun(settings: Settings, root: Path, grid: Sequence[Cell], report: Reporter) -> None:
    """Raise ConfigError where a run has begun with other weights or images than these settings name."""
    begun = [cell for cell in grid if first((cell.folder(root) / run_folder.CONFIG).is_file)]
    if begun:
        folder = begun[0].folder(root)
        check_start(folder, start_now(settings, folder, begun[0].seed, report), "those of this command")


def settings_of(cell: Cell, settings: Settings, root: Path) -> Settings:
    """The settings of one run. What is in its folder already goes on.

    Raises:
        ConfigError: a method is not known, or does not go with the other settings.
    """
    method, _, how = cell.method.partition(":")
    run = replace(in_folder(settings.run, cell.folder(root)), seed=cell.seed)
    wishes = replace(settings.prune, macs=cell.macs, **{name: plain(name) for name in unused(method)})
    if cell.method in OTHERS:
        foreign = (*OURS, *PLANNED) if method in external.EXTERNAL else PLANNED
        if more := [name for name in foreign if getattr(wishes, name) != plain(name)]:
            raise ConfigError(f"{flag(more[0])} is not for {method}: the rows would not be alike")
        return replace(settings, run=run, prune=wishes)
    if method not in METHODS:
        raise ConfigError(f"no method is called {cell.method!r}: take some of {', '.join((*METHODS, *OTHERS))}")
    prune = replace(wishes, method=method)
    if how:
        name = next((name for name, values in NAMED.get(method, {}).items() if how in values), "allocate")
        prune = replace(prune, **{name: how})  # type: ignore[arg-type]
    return replace(settings, run=run, prune=prune)


def in_folder(given: RunConfig, folder: Path) -> RunConfig:
    """The settings of a run in this folder, which goes on where it has begun."""
    begun = (folder / run_folder.CONFIG).is_file()
    return replace(given, output=None if begun else str(folder), resume=str(folder) if begun else None)


def with_dense(settings: Settings, root: Path, begin: Begin) -> Settings:
    """The settings with the network that all runs start from, trained once in `root/dense`."""
    folder = root / DENSE
    given = settings.prune
    own = replace(settings, train=replace(settings.train, epochs=given.dense_epochs, lr=given.dense_lr))
    check_settings(folder, own, [])
    if not (folder / run_folder.MODEL).exists() or (folder / run_folder.CHECKPOINT).exists():
        train_dense(begin(replace(own, run=in_folder(settings.run, folder)), "train"))
    return replace(settings, model=replace(settings.model, checkpoint=str(folder)))


def outcome(cell: Cell, folder: Path) -> Outcome | None:
    """What is in the folder of a run that has ended; None where it has not."""
    def read() -> Outcome | None:
        if not (folder / run_folder.CONFIG).is_file():
            return None
        run = run_folder.Run(folder, resume=True, writes=False)
        if not (measured := run.last(MEASURE)):
            return None
        dense, narrow = measured["dense"], measured["narrow"]
        name = next(iter(dense))  # of the figure that the task reports first
        before = [value for stage, value in measured["stages"].items() if stage != "fine-tune"]
        ratio = {key: narrow[key] / dense[key] for key in ("macs", "params", "latency_ms")}
        return Outcome(cell, name, dense[name], (before or [narrow[name]])[-1], narrow[name], ratio["macs"], ratio["params"],
                       ratio["latency_ms"], seconds_of(run.rows()))

    return first(read)


def seconds_of(rows: Sequence[dict[str, Any]]) -> float:
    """Seconds of all stages. A stage with epochs counts by these, as its own row starts anew with every `--resume`."""
    with_epochs = {row["stage"] for row in rows if "epoch" in row}
    last = {(row["stage"], row.get("epoch")): row["seconds"] for row in rows if "seconds" in row}
    return float(sum(seconds for (stage, epoch), seconds in last.items() if epoch is not None or stage not in with_epochs))


def lines(found: Sequence[Outcome]) -> tuple[Line, ...]:
    """One line for each method and budget, in the order of the grid."""
    groups: dict[tuple[str, float], list[Outcome]] = {}
    for one in found:
        groups.setdefault((one.cell.method, one.cell.macs), []).append(one)
    names = ("right_after", "last", "macs", "params", "latency", "seconds")
    return tuple(
        Line(method, budget, len(group), spread=stdev(o.last for o in group) if len(group) > 1 else None,
             **{name: mean(getattr(o, name) for o in group) for name in names})
        for (method, budget), group in groups.items()
    )  # fmt: skip


def write_comparison(found: Comparison, note: Callable[[str], None]) -> list[str]:
    """Write `compare.json` and the picture `compare.svg` into the folder of the grid. Returns the names of the files."""
    write_table(found)
    try:
        write_whole({found.folder / PICTURE: frontier(found)})
    except MissingExtraError as error:
        note(f"no picture: {error}")
        return [TABLE]
    return [TABLE, PICTURE]


def write_table(found: Comparison) -> None:
    """Write `compare.json`."""
    table = {"figure": found.figure, "dense": found.dense, "lines": [asdict(line) for line in found.lines],
             "failed": found.failed, "folder": found.folder.name,
             "runs": [{**asdict(run), "cell": run.cell._asdict()} for run in found.runs]}
    write_whole({found.folder / TABLE: (json.dumps(table, indent=1) + "\n").encode()})


def frontier(found: Comparison) -> bytes:
    """An SVG: the figure of the task at the end against MACs and against measured latency, one colour a method.

    The line joins the best: no other is as good for less. Raises MissingExtraError without matplotlib.
    """
    optional("matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2, sharey=True), ("macs", "latency"),
                                ("MACs / dense", "latency / dense"), strict=True):
        for method in dict.fromkeys(line.method for line in found.lines):
            own = [line for line in found.lines if line.method == method]
            axes.errorbar([getattr(line, key) for line in own], [line.last for line in own],
                          yerr=[line.spread or 0 for line in own], fmt="o", capsize=3, label=method)
        best = pareto([(getattr(line, key), line.last) for line in found.lines])
        axes.plot(*zip(*best, strict=True), color="grey", linewidth=1, zorder=0)
        axes.axhline(found.dense, color="black", linestyle=":", linewidth=1, label="dense" if key == "macs" else None)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        if key == "macs":
            axes.set_ylabel(f"{titled(found.figure)} (%)")
            axes.legend(fontsize="small")
    out = io.BytesIO()
    with rc_context({"svg.hashsalt": "narrower"}):  # the same picture, the same bytes
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, accuracy) points that none of lower or equal cost exceeds, by growing cost."""
    best: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or accuracy > best[-1][1]:
            best.append((cost, accuracy))
    return best
