"""What the command line prints: lines and tables on stdout, progress and errors on stderr."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from ..data.task import titled
from ..errors import ConfigError, StorageError
from ..report.facts import COSTS, STAGES
from ..training.agreement import LOST, is_of_another, local_rank, tells
from .comparing import Comparison
from .job import Reporter
from .networks import Costs
from .prune import Result
from .run_folder import Run, quoted, read_yaml
from .shipped import config_file, names, published
from .timing import Timed

NUMBERS = 39  # columns of a terminal that the numbers of a progress bar take


class Terminal(Reporter):
    """Prints lines on stdout and into the run's log. Shows progress on stderr."""

    def __init__(self) -> None:
        self.out = Console(highlight=False, soft_wrap=True, emoji=False)
        self.err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        self.run: Run | None = None
        self.made: Path | None = None  # a folder for a run, before there is one
        self.typed = ""  # the command line
        self.quiet = False  # set in all processes except the first
        self.silent = local_rank() > 0  # errors are told by another process
        self._bars: list[Progress] = []

    def print(self, what: Any, *, error: bool = False) -> None:
        if not (self.silent if error else self.quiet):
            (self.err if error else self.out).print(what, markup=False)
        if self.run is not None:
            text = io.StringIO()
            Console(file=text, width=200, highlight=False, soft_wrap=True, emoji=False).print(what, markup=False)
            with suppress(StorageError) if error else nullcontext():  # that the disk is full, say
                self.run.print(text.getvalue())

    def watch(self, iterable: Iterable[Any], description: str = "", total: int = 0) -> Iterator[Any]:
        if self.quiet or not self.err.is_terminal:
            yield from iterable
            return
        width = max(10, self.err.width - NUMBERS)
        text = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=width))
        columns = (text, BarColumn(None, table_column=Column(ratio=1)), Count(), Rate(), TimeRemainingColumn())
        bar = Progress(*columns, console=self.err, transient=True, expand=True)
        task = bar.add_task(description, total=total or None)
        self._bars.append(bar)
        with bar:
            for item in iterable:
                yield item
                bar.advance(task, len(item[1]) if isinstance(item, (tuple, list)) else 1)

    def busy(self, description: str) -> AbstractContextManager[Any]:
        return nullcontext() if self.quiet else self.err.status(description)

    def close(self) -> None:
        """Remove the progress bars that an error has left."""
        for bar in self._bars:
            bar.stop()

    def note(self, text: str) -> None:
        if not self.quiet:
            self.err.print(f"narrower: {text}", markup=False)

    def tell(self, row: dict[str, Any]) -> None:
        if "text" in row:
            self.print(row["text"])
        self.print(epoch_line(row) if "epoch" in row else stage_line(row))


@contextmanager
def ending_together(terminal: Terminal) -> Iterator[None]:
    """Within, what ends one of several processes ends all, and one of them tells why.

    Raises:
        ConfigError: another process is gone without a message.
    """
    try:
        yield
    except BaseException as error:
        terminal.silent = not tells()
        if is_of_another(error):
            run = terminal.run
            more = f"; go on with --resume {quoted(run.folder)}" if run is not None and run.started else ""
            raise ConfigError(LOST + more) from error
        raise


class Count(ProgressColumn):
    def render(self, task: Task) -> str:
        return f"{task.completed:,.0f}/{task.total or 0:,.0f}"


class Rate(ProgressColumn):
    def render(self, task: Task) -> str:
        return f"{task.speed or 0:,.0f}/s"


def headline_of(row: dict[str, Any]) -> str:
    name = row["headline"]
    return f"{titled(name)} {row[name]:.2f} %"


def epoch_line(row: dict[str, Any]) -> str:
    narrowing = ""
    if "reached" in row:
        narrowing = f"masked {row['masked']:.1%}  reached {row['reached']:.1%}  {row['zero']:.0f} channels at zero  "
    elif "hard" in row:
        narrowing = f"masked {row['masked']:.1%}  {row['channels']:.0f} channels masked, {row['hard']:.0f} hard  "
    elif "spread" in row:
        narrowing = f"filters to merge differ by {row['spread']:.2%}  "
    return (
        f"{row['stage']}  epoch {row['epoch']}/{row['epochs']}  loss {row['loss']:.4f}  {headline_of(row)}  "
        f"{narrowing}lr {row['lr']:.2g}  {row['images_per_second']:,.0f} images/s  {row['seconds']:.1f} s"
    )


def stage_line(row: dict[str, Any]) -> str:
    parts = [f"{row['stage']:<14}"]
    for key, value in row.items():
        if key == "headline":
            parts.append(headline_of(row))
        elif key == "error":
            parts.append(f"largest relative difference {value:.1e}")
        elif key in ("macs", "params"):
            parts.append(f"{key} {value[0]:,.0f} -> {value[1]:,.0f} ({value[1] / value[0]:.1%})")
        elif isinstance(value, (str, int)) and key not in ("stage", "text", row.get("headline")):
            parts.append(f"{key} {value}")
    return "  ".join([*parts, f"{row['seconds']:.1f} s"])


def comparison(result: Result) -> Table:
    """The final table: the network before, the narrow one after each stage, and what changed in all."""
    dense, narrow = result.dense, result.narrow
    table = Table(title=f"{result.start} against narrow")
    for name in ("", result.start, *(STAGES[stage] for stage in result.stages), "change"):
        table.add_column(name, justify="right" if name else "left")
    values = [result.before, *result.stages.values()]
    table.add_row(titled(result.headline), *(f"{value:.2f} %" for value in values), f"{values[-1] - values[0]:+.2f}")
    for cost, (name, one), (_, two) in zip(COSTS, costs(dense), costs(narrow), strict=True):
        ratio = getattr(narrow, cost.key) / getattr(dense, cost.key)
        table.add_row(name, one, *[""] * (len(result.stages) - 1), two, f"x {ratio:.3f}")
    if result.timed is not None:
        add_times(table, result.timed, len(result.stages) - 1)
    return table


def add_times(table: Table, timed: Timed, between: int) -> None:
    """A row for the runtime of `--latency`, and below the table how it was measured and what was predicted."""
    dense, narrow = timed.predicted_ms if timed.trial is None else (timed.trial.dense_ms, timed.trial.measured_ms)
    name = timed.place["runtime"] + (" (predicted)" if timed.trial is None else "")
    table.add_row(name, f"{dense:,.2f} ms", *[""] * between, f"{narrow:,.2f} ms", f"x {narrow / dense:.3f}")
    table.caption = str(timed)


def costs(of: Costs) -> list[tuple[str, str]]:
    return [(cost.title, cost.shown(getattr(of, cost.key))) for cost in COSTS]


def grid(found: Comparison) -> Table:
    """The table of `narrower compare`: a row for each method and budget, the best at the end first within a budget."""
    title = f"{found.folder}: {titled(found.figure)}, dense {found.dense:.2f} %"
    table = Table(title=title, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("method", overflow="fold")  # of 80 columns the numbers take 65
    for name in ("budget", "n", "right\nafter %", "last %", "MACs\n%", "params\n%", "latency\n%", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in sorted(found.lines, key=lambda line: (-line.budget, -line.last)):
        spread = "" if line.spread is None else f"±{line.spread:.2f}"
        table.add_row(line.method, f"{line.budget:g}", str(line.n), f"{line.right_after:.2f}", f"{line.last:.2f}{spread}",
                      *(f"{100 * share:.1f}" for share in (line.macs, line.params, line.latency)), f"{line.seconds:,.0f}")
    return table


def papers() -> Table:
    """The shipped settings, with what the authors report: figures before and after, and what share went."""
    table = Table(title="settings of the papers, and what the authors report")
    for name, least in (("name", 23), ("top-1 %", 8), ("MACs, M", 9), ("params, M", 9), ("source", 12)):
        table.add_column(name, min_width=least, overflow="fold")
    for name in names():
        found, settings = published(name), read_yaml(config_file(name))
        pairs = (change(found.macs) or f"{settings.get('macs', '')} of the dense", change(found.params))
        table.add_row(f"{name}\n{settings['model']}, {found.data}", change(found.top1, share=False), *pairs, found.source)
    return table


def change(pair: list[float | None], *, share: bool = True) -> str:
    """Two figures, and what share of the first went. Empty where there are none."""
    before, after = ("?" if value is None else f"{value:,.2f}" for value in pair)
    gone = f" (-{1 - pair[1] / pair[0]:.1%})" if share and pair[0] and pair[1] else ""
    return "" if pair == [None, None] else f"{before} -> {after}{gone}"
