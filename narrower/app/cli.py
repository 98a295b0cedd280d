"""The command line. Only this file parses arguments and prints."""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import ConfigError, NarrowerError

try:
    from jsonargparse import ActionYesNo, ArgumentParser, Namespace
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.table import Table
except ImportError as error:
    print(f"narrower: error: {error}; the command line needs: pip install 'narrower[cli]'", file=sys.stderr)
    raise SystemExit(2) from error

import narrower

from ..training.accelerator import make_accelerator
from ..training.config import TrainConfig
from .config import DataConfig, ModelConfig, PruneConfig, RunConfig
from .job import Job, Reporter, Settings, open_job
from .networks import Figures, figures, from_run, inspect_network, load_dense
from .oneshot import measure_sensitivity
from .prune import Result, prune, train_dense
from .run_folder import SENSITIVITY, Run, default_folder, read_settings

ERROR, INTERRUPTED = 2, 130
Group = TypeVar("Group")


class Terminal(Reporter):
    """Prints lines on stdout and into the run's log. Shows progress on stderr."""

    def __init__(self) -> None:
        self.out = Console(highlight=False, soft_wrap=True)
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)
        self.run: Run | None = None
        self.quiet = False  # set in all processes except the first
        self._bars: list[Progress] = []

    def print(self, what: Any, *, error: bool = False) -> None:
        if error or not self.quiet:
            (self.err if error else self.out).print(what, markup=False)
        if self.run is not None:
            text = io.StringIO()
            Console(file=text, width=200, highlight=False, soft_wrap=True).print(what, markup=False)
            self.run.print(text.getvalue())

    def watch(self, iterable: Iterable[Any], description: str = "", total: int = 0) -> Iterator[Any]:
        if self.quiet or not self.err.is_terminal:
            yield from iterable
            return
        columns = (TextColumn("{task.description}"), BarColumn(), Count(), Rate(), TimeRemainingColumn())
        bar = Progress(*columns, console=self.err, transient=True)
        task = bar.add_task(description, total=total or None)
        self._bars.append(bar)
        with bar:
            for item in iterable:
                yield item
                bar.advance(task, len(item[1]) if isinstance(item, (tuple, list)) else 1)

    def busy(self, description: str) -> AbstractContextManager[Any]:
        return self.err.status(description)

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


class Count(ProgressColumn):
    def render(self, task: Task) -> str:
        return f"{task.completed:,.0f}/{task.total or 0:,.0f}"


class Rate(ProgressColumn):
    def render(self, task: Task) -> str:
        return f"{task.speed or 0:,.0f} images/s"


def epoch_line(row: dict[str, Any]) -> str:
    forgetting = ""
    if "masked" in row:
        forgetting = f"masked {row['masked']:.1%}  reached {row['reached']:.1%}  {row['zero']:.0f} channels at zero  "
    return (
        f"{row['stage']}  epoch {row['epoch']}/{row['epochs']}  loss {row['loss']:.4f}  top-1 {row['top1']:.2f} %  "
        f"{forgetting}lr {row['lr']:.2g}  {row['images_per_second']:,.0f} images/s  {row['seconds']:.1f} s"
    )


def stage_line(row: dict[str, Any]) -> str:
    parts = [f"{row['stage']:<14}"]
    for key, value in row.items():
        if key == "top1":
            parts.append(f"top-1 {value:.2f} %")
        elif key == "error":
            parts.append(f"largest relative difference {value:.1e}")
        elif key in ("macs", "params"):
            parts.append(f"{key} {value[0]:,.0f} -> {value[1]:,.0f} ({value[1] / value[0]:.1%})")
        elif isinstance(value, (str, int)) and key not in ("stage", "text"):
            parts.append(f"{key} {value}")
    return "  ".join([*parts, f"{row['seconds']:.1f} s"])


NAMES = {"cut": "cut", "merge": "merged", "recalibrate": "BatchNorm renewed", "reconstruct": "reconstructed", "tune": "tuned",
         "fine-tune": "fine-tuned"}


def comparison(result: Result) -> Table:
    """The final table: the dense network, the narrow one after each stage, and what changed in all."""
    dense, narrow = result.dense, result.narrow
    table = Table(title="dense against narrow")
    for name in ("", "dense", *(NAMES[stage] for stage in result.stages), "change"):
        table.add_column(name, justify="right" if name else "left")
    stages = [f"{top1:.2f} %" for top1 in result.stages.values()]
    table.add_row("top-1", f"{dense.top1:.2f} %", *stages, f"{narrow.top1 - dense.top1:+.2f}")
    for (name, one), (_, two), ratio in zip(costs(dense), costs(narrow), ratios(dense, narrow), strict=True):
        table.add_row(name, one, *[""] * (len(stages) - 1), two, f"x {ratio:.3f}")
    return table


def costs(of: Figures) -> list[tuple[str, str]]:
    return [
        ("MACs", f"{of.macs / 1e6:,.2f} M"),
        ("parameters", f"{of.params / 1e6:,.3f} M"),
        ("size", f"{of.size_mb:,.3f} MB"),
        ("latency", f"{of.latency_ms:,.2f} ms"),
    ]


def ratios(dense: Figures, narrow: Figures) -> list[float]:
    return [getattr(narrow, key) / getattr(dense, key) for key in ("macs", "params", "size_mb", "latency_ms")]


def begin(settings: Settings, terminal: Terminal, *names: str) -> Job:
    """Check the output folder, open the images and complete the settings."""
    given = settings.run
    accelerator = make_accelerator(given.device)
    terminal.quiet = not accelerator.is_main_process
    folder = Path(given.resume or given.output or default_folder(*names, settings.model.model))
    run = Run(folder, resume=bool(given.resume), overwrite=given.overwrite, writes=accelerator.is_main_process)
    terminal.run = run
    job = open_job(settings, run, accelerator, terminal)
    size = "x".join(map(str, job.data.input_size))
    terminal.print(
        f"narrower {narrower.__version__}  {settings.model.model}  {job.data.name}: {job.data.num_classes} classes, "
        f"{size}  {accelerator.device}  {folder}"
    )
    return job


def run_prune(settings: Settings, terminal: Terminal, _: Namespace) -> None:
    result = prune(begin(settings, terminal, settings.prune.method))
    terminal.print(comparison(result))
    terminal.print(f"saved in {result.folder}; evaluate it again with: narrower eval {result.folder}")


def run_train(settings: Settings, terminal: Terminal, _: Namespace) -> None:
    job = begin(settings, terminal, "train")
    top1 = train_dense(job)
    terminal.print(f"top-1 {top1:.2f} %, saved in {job.run.folder}")


def run_sensitivity(settings: Settings, terminal: Terminal, _: Namespace) -> None:
    job = begin(settings, terminal, "sensitivity")
    measure_sensitivity(job)
    file = job.run.folder / SENSITIVITY
    terminal.print(f"saved in {file}; plan with it: narrower prune --sensitivity {file} ...")


def run_eval(settings: Settings, terminal: Terminal, given: Namespace) -> None:
    accelerator = make_accelerator(settings.run.device)
    terminal.quiet = not accelerator.is_main_process
    job = open_job(settings, Run(Path(), overwrite=True, writes=False), accelerator, terminal)
    if not job.data.labelled:
        raise ConfigError(f"the images of {job.data.name} have no classes: there is no accuracy to evaluate")
    if given.run is None and not (settings.model.checkpoint or settings.model.pretrained):
        raise ConfigError("say what to evaluate: a run folder, or --model with --checkpoint or --pretrained")
    model = load_dense(job) if given.run is None else from_run(job, Path(given.run))
    top1 = job.evaluate(model)
    table = Table(title=f"{given.run or settings.model.model} on {job.data.name}, {len(job.data.val):,} images")
    for name in ("top-1", *(name for name, _ in costs(Figures(0, 0, 0, 0, 0)))):
        table.add_column(name, justify="right")
    table.add_row(f"{top1:.2f} %", *(text for _, text in costs(figures(job.example, (model, top1))[0])))
    terminal.print(table)


def run_inspect(settings: Settings, terminal: Terminal, given: Namespace) -> None:
    graph, found = inspect_network(settings, None if given.run is None else Path(given.run), terminal)
    terminal.print(str(graph))
    terminal.print("  ".join(f"{name} {text}" for name, text in costs(found)))


Command = Callable[[Settings, Terminal, Namespace], None]
EVALUATING = ("batch_size", "amp", "channels_last", "workers")
MEASURING = ("method", "images", "allow_inexact")
READING = ("batch_size", "workers", "held_out")
COMMANDS: dict[str, tuple[Command, str, list[tuple[type, tuple[str, ...]]]]] = {
    "inspect": (
        run_inspect,
        "print a network's channel groups, what is pinned and why, and its costs",
        [(ModelConfig, ()), (DataConfig, ("img_size",)), (RunConfig, ("device",))],
    ),
    "train": (
        run_train,
        "train a dense network",
        [(ModelConfig, ()), (DataConfig, ()), (TrainConfig, ()), (RunConfig, ())],
    ),
    "prune": (
        run_prune,
        "narrow a trained network and fine-tune it; without arguments a demo on digits",
        [(ModelConfig, ()), (DataConfig, ()), (PruneConfig, ()), (TrainConfig, ()), (RunConfig, ())],
    ),
    "sensitivity": (
        run_sensitivity,
        "measure what removing channels of each group does to the outputs of a trained network; no labels are needed",
        [(ModelConfig, ()), (DataConfig, ()), (PruneConfig, MEASURING), (TrainConfig, READING), (RunConfig, ())],
    ),
    "eval": (
        run_eval,
        "accuracy and costs of a run's network, or of a network and its checkpoint",
        [(ModelConfig, ()), (DataConfig, ()), (TrainConfig, EVALUATING), (RunConfig, ("device",))],
    ),
}
DEFAULTS = {"prune": {"epochs": 15, "lr": 0.02, "warmup_epochs": 0.2}}
EXAMPLES = {
    "inspect": "narrower inspect --model cifar_resnet56",
    "train": "narrower train --model cifar_resnet56 --data-dir cifar10 --epochs 100 -b 128 --amp --channels-last",
    "prune": "narrower prune --model cifar_resnet56 --checkpoint resnet56.pt --data-dir cifar10 --macs 0.5 --epochs 20",
    "sensitivity": "narrower sensitivity --model resnet50 --pretrained --data-dir photos --output runs/damage",
    "eval": "narrower eval runs/20250101-120000-hrank-cifar_resnet56",
}


def make_parser(defaults: dict[str, dict[str, Any]]) -> ArgumentParser:
    """The parser of all commands. `defaults` ({command: {option: value}}) override those of the dataclasses."""
    parser = ArgumentParser(prog="narrower", description="Take a trained CNN, give back a narrower one.")
    parser.add_argument("--version", action="version", version=f"narrower {narrower.__version__}")
    commands = parser.add_subcommands(required=True)
    for name, (_, summary, groups) in COMMANDS.items():
        usage = f"narrower {name} [run] [options]" if name in ("eval", "inspect") else f"narrower {name} [options]"
        sub = ArgumentParser(usage=usage, description=f"{summary}. Example: {EXAMPLES[name]}")
        if name in ("eval", "inspect"):
            sub.add_argument("run", nargs="?", help="run folder of `narrower prune` or `narrower train`")
        else:
            sub.add_argument("--config", action="config", help="YAML with any of these settings, such as a run's config.yaml")
        for group, only in groups:
            tuning = name == "prune" and group is TrainConfig
            add_options(sub, group, only, "fine-tuning" if tuning else group.__doc__ or "")
        known = {action.dest for action in sub._actions}
        sub.set_defaults({key: value for key, value in defaults.get(name, {}).items() if key in known})
        commands.add_subcommand(name, sub, help=summary)
    return parser


def add_options(parser: ArgumentParser, group: type, only: Sequence[str], title: str) -> None:
    """Add a flag for each field of a dataclass of `config`. `only`: these fields; empty for all."""
    section = parser.add_argument_group(title)
    hints = get_type_hints(group, include_extras=True)
    for item in fields(group):
        if only and item.name not in only:
            continue
        hint, text, *short = get_args(hints[item.name])
        flags = [*short, "--" + item.name.replace("_", "-")]
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        options: dict[str, Any] = {"type": hint}
        if hint is bool:
            options = {"action": ActionYesNo(yes_prefix="", no_prefix="no-")}
        elif element := _element(hint):
            options = {"type": element, "nargs": "+"}
        section.add_argument(*flags, default=default, help=text, **options)


def _element(hint: Any) -> Any:
    """The element type of `list[...]` or `list[...] | None`. None for other types."""
    for part in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        if get_origin(part) is list:
            return get_args(part)[0]
    return None


def parse(arguments: Sequence[str]) -> tuple[str, Settings, Namespace]:
    """The command, its settings, and all parsed options. If a run folder is named, its settings are the defaults."""
    given = make_parser(DEFAULTS).parse_args(list(arguments))
    name: str = given.subcommand
    folder = given[name].get("resume") or given[name].get("run")
    if folder is not None:
        defaults = {name: DEFAULTS.get(name, {}) | read_settings(Path(folder))}
        given = make_parser(defaults).parse_args(list(arguments))
    chosen = given[name]

    def part(group: type[Group]) -> Group:
        return group(**{item.name: chosen[item.name] for item in fields(group) if item.name in chosen})  # type: ignore[arg-type]

    groups = part(ModelConfig), part(DataConfig), part(TrainConfig), part(RunConfig), part(PruneConfig)
    return name, Settings(*groups), chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 2 for an error of narrower, 130 for Ctrl-C."""
    terminal = Terminal()
    try:
        name, settings, chosen = parse(sys.argv[1:] if arguments is None else arguments)
        COMMANDS[name][0](settings, terminal, chosen)
    except NarrowerError as error:
        terminal.close()
        terminal.print(f"narrower: error: {message(error)}", error=True)
        return ERROR
    except KeyboardInterrupt:
        terminal.close()
        terminal.print("interrupted" + hint(terminal.run), error=True)
        return INTERRUPTED
    return 0


def message(error: NarrowerError) -> str:
    """The error's own message, without the traceback that a data loader process adds around it."""
    text = str(error)
    return text.rsplit(f"{type(error).__name__}: ", 1)[-1].strip() if "Original Traceback" in text else text


def hint(run: Run | None) -> str:
    if run is None or not run.claimed:
        return ""
    return f"; what was done is in {run.folder}, go on with --resume {run.folder}"
