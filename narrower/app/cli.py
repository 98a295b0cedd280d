"""The command line: each command, and what becomes of errors and Ctrl-C."""

from __future__ import annotations

import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..errors import ConfigError, NarrowerError

try:
    from rich.table import Table

    from .arguments import Command, parse
except ImportError as error:
    print(f"narrower: error: {error}; the command line needs: pip install 'narrower[cli]'", file=sys.stderr)
    raise SystemExit(2) from error

import narrower

from ..data.task import TITLES, titled
from ..training.accelerator import make_accelerator
from ..training.agreement import first, local_rank
from ..training.config import TrainConfig
from .comparing import compare, write_comparison
from .config import (
    FINE_TUNING,
    BenchConfig,
    CompareConfig,
    DataConfig,
    EvalConfig,
    ExportConfig,
    ModelConfig,
    PruneConfig,
    PushConfig,
    ReportConfig,
    RunConfig,
)  # fmt: skip
from .deploying import bench_networks, export_network
from .job import Job, Settings, open_job
from .networks import costs_of, inspect_network, load_dense
from .oneshot import measure_sensitivity
from .prune import plan_only, prune, train_dense
from .reporting import report_at_end, write_reports
from .run_folder import PREVIOUS, SENSITIVITY, Run, default_folder, give_back, quoted
from .sharing import push_run
from .terminal import Terminal, comparison, costs, ending_together, grid, headline_of, papers

ERROR, INTERRUPTED = 2, 130


def begin(settings: Settings, terminal: Terminal, command: str) -> Job:
    """Check the output folder, open the images and complete the settings."""
    given = settings.run
    name = settings.prune.method if command == "prune" else command
    file, _, factory = settings.model.model.rpartition(":")
    network = f"{Path(file).name}_{factory}" if file.endswith(".py") else settings.model.model
    if not (chosen := given.resume or given.output) and local_rank() == 0:
        terminal.made = default_folder(name, network)
    folder = Path(chosen or terminal.made or "runs")
    accelerator = make_accelerator(given.device, given.log_with, folder)
    folder = first(lambda: folder)  # that of the first process, which writes there
    terminal.quiet = not accelerator.is_main_process
    run = Run(folder, command=command, typed=terminal.typed, resume=bool(given.resume),
              overwrite=given.overwrite or settings.prune.dry_run,
              writes=accelerator.is_main_process and not settings.prune.dry_run)
    terminal.run = run
    job = open_job(settings, run, accelerator, terminal)
    size = "x".join(map(str, job.data.input_size))
    terminal.print(
        f"narrower {narrower.__version__}  {settings.model.model}  {job.data.name}: "
        f"{f'{job.data.num_classes} classes, ' if job.data.num_classes else ''}{size}  {accelerator.device}  {folder}"
    )
    return job


def run_prune(settings: Settings, terminal: Terminal, _: Namespace) -> None:
    if not settings.run.resume:  # whose settings stay
        settings.prune.check_used(settings.prune.method)
    job = begin(settings, terminal, "prune")
    if settings.prune.dry_run:
        plan_only(job)
        return
    result = prune(job)
    terminal.print(comparison(result))
    again = "evaluate it again with: narrower eval" if job.data.labelled else "write a file of it with: narrower export"
    terminal.print(f"saved in {result.folder}; {again} {quoted(result.folder)}")
    if settings.prune.report and job.run.writes:
        report_at_end(result.folder, terminal.print)


def run_report(_: Settings, terminal: Terminal, given: Namespace) -> None:
    for page in write_reports([Path(run) for run in given.runs], svg=given.svg):
        terminal.print(str(page))


def run_push(_: Settings, terminal: Terminal, given: Namespace) -> None:
    chosen = PushConfig(given.license, given.private, given.revision, given.message, given.exports, given.card, given.dry_run,
                        given.output)
    terminal.print(push_run(Path(given.run), given.repository, chosen, terminal))


def run_train(settings: Settings, terminal: Terminal, _: Namespace) -> None:
    job = begin(settings, terminal, "train")
    found = train_dense(job)
    terminal.print(f"{headline_of(found)}, saved in {job.run.folder}")


def run_sensitivity(settings: Settings, terminal: Terminal, _: Namespace) -> None:
    job = begin(settings, terminal, "sensitivity")
    measure_sensitivity(job)
    file = job.run.folder / SENSITIVITY
    terminal.print(f"saved in {file}; plan with it: narrower prune --sensitivity {quoted(file)} ...")


def run_eval(settings: Settings, terminal: Terminal, given: Namespace) -> None:
    accelerator = make_accelerator(settings.run.device)
    terminal.quiet = not accelerator.is_main_process
    job = open_job(settings, Run(Path(), overwrite=True, writes=False), accelerator, terminal, val_alone=True)
    if not job.data.labelled:
        raise ConfigError(f"the images of {job.data.name} have no classes: there is no accuracy to evaluate")
    if not (settings.model.checkpoint or settings.model.pretrained):
        raise ConfigError("say what to evaluate: a run folder, or --model with --checkpoint or --pretrained")
    model = load_dense(job)
    found, by_class = job.evaluate(model)
    measured = costs_of(job.example, model)[0]
    name = given.run or settings.model.model
    if given.json:
        facts = {"network": name, "data": job.data.name, "images": len(job.data.val), **found, **asdict(measured), **by_class}
        terminal.print(json.dumps(facts))
        return
    table = Table(title=f"{name} on {job.data.name}, {len(job.data.val):,} images")
    percent = (next(iter(found)), *TITLES)  # other figures of a task may be anything
    cells = {titled(key): f"{value:.2f} %" if key in percent else f"{value:.4f}" for key, value in found.items()}
    for title in (*cells, *(title for title, _ in costs(measured))):
        table.add_column(title, justify="right")
    table.add_row(*cells.values(), *(text for _, text in costs(measured)))
    terminal.print(table)


def run_inspect(settings: Settings, terminal: Terminal, _: Namespace) -> None:
    graph, found = inspect_network(settings, terminal)
    terminal.print(str(graph))
    terminal.print("  ".join(f"{name} {text}" for name, text in costs(found)))


def run_configs(_: Settings, terminal: Terminal, __: Namespace) -> None:
    terminal.print(papers())


def run_export(settings: Settings, terminal: Terminal, given: Namespace) -> None:
    chosen = ExportConfig(given.format, given.int8, given.calibration_images, given.output, given.fixed_batch)
    terminal.print(str(export_network(settings, None if given.run is None else Path(given.run), chosen, terminal)))


def run_bench(settings: Settings, terminal: Terminal, given: Namespace) -> None:
    chosen = BenchConfig(given.runtimes, given.batch_sizes, given.threads, given.seconds)
    found = bench_networks(given.networks, settings, chosen, terminal)
    terminal.print(str(found))
    found.check()


def run_compare(settings: Settings, terminal: Terminal, given: Namespace) -> None:
    chosen = CompareConfig(given.methods, given.budgets, given.seeds)
    found = compare(settings, chosen, lambda one, command: begin(one, terminal, command), terminal)
    terminal.run = None
    terminal.print(grid(found))
    for name, why in found.failed.items():
        terminal.print(f"not done: {name}: {why}")
    terminal.print(f"saved in {found.folder}: {', '.join(first(lambda: write_comparison(found, terminal.note)))}")


EVALUATING = ("batch_size", "amp", "amp_dtype", "channels_last", "workers")
MEASURING = ("method", "images", "allow_inexact")
GRID = tuple(name for name in PruneConfig.__dataclass_fields__
             if name not in ("method", "macs", "params", "latency", "remove", "dry_run", "sensitivity", "steps", "schedule",
                             "epochs_per_layer", "forgetting", "softness", "pull", "report"))
READING = ("batch_size", "workers", "held_out")
COMMANDS = {
    "inspect": Command(
        run_inspect,
        "print a network's channel groups, what is pinned and why, and its costs",
        "narrower inspect --model cifar_resnet56",
        [(ModelConfig, ()), (DataConfig, ("img_size",)), (RunConfig, ("device",))],
        takes_run=True,
    ),
    "train": Command(
        run_train,
        "train a network, or that of a run further",
        "narrower train --model cifar_resnet56 --data-dir cifar10 --epochs 100 -b 128 --amp --channels-last",
        [(ModelConfig, ()), (DataConfig, ()), (TrainConfig, ()), (RunConfig, ())],
        takes_run=True,
        takes_config=True,
    ),
    "prune": Command(
        run_prune,
        "narrow a trained network, or that of a run again, and fine-tune it; without arguments a demo on digits",
        "narrower prune --model cifar_resnet56 --checkpoint resnet56.pt --data-dir cifar10 --macs 0.5 --epochs 20",
        [(ModelConfig, ()), (DataConfig, ()), (PruneConfig, ()), (TrainConfig, ()), (RunConfig, ())],
        titles={TrainConfig: "fine-tuning"},
        defaults=FINE_TUNING,
        takes_run=True,
        takes_config=True,
    ),
    "sensitivity": Command(
        run_sensitivity,
        "measure what removing channels of each group does to the outputs of a trained network; no labels are needed",
        "narrower sensitivity --model resnet50 --pretrained --data-dir photos --output runs/damage",
        [(ModelConfig, ()), (DataConfig, ()), (PruneConfig, MEASURING), (TrainConfig, READING), (RunConfig, ())],
        takes_run=True,
        takes_config=True,
    ),
    "configs": Command(
        run_configs,
        "list the settings of the papers that --config takes by name, with what the authors report",
        "narrower configs",
        [],
    ),
    "eval": Command(
        run_eval,
        "accuracy and costs of a run's network, or of a network and its checkpoint",
        "narrower eval runs/20250101-120000-hrank-cifar_resnet56",
        [(ModelConfig, ()), (DataConfig, ()), (TrainConfig, EVALUATING), (RunConfig, ("device",)), (EvalConfig, ())],
        takes_run=True,
    ),
    "bench": Command(
        run_bench,
        "time networks side by side; of a narrow run alone, against the dense network",
        "narrower bench runs/20250101-120000-obs-cifar_resnet56 --runtimes eager onnxruntime",
        [(BenchConfig, ()), (ModelConfig, ("num_classes", "in_chans")), (DataConfig, ("img_size",)), (RunConfig, ("device",))],
        takes_networks=True,
    ),
    "compare": Command(
        run_compare,
        "run a grid of methods, budgets and seeds by one protocol; the same command goes on with one that was interrupted",
        "narrower compare --model cifar_resnet20 --checkpoint resnet20.pt --data-dir cifar10 --methods obs resrep --seeds 0 1",
        [(CompareConfig, ()), (ModelConfig, ()), (DataConfig, ()), (PruneConfig, GRID), (TrainConfig, ()),
         (RunConfig, ("output", "device", "log_with"))],
        titles={TrainConfig: "fine-tuning"},
        defaults=FINE_TUNING,
        takes_config=True,
    ),
    "report": Command(
        run_report,
        "write report.html into the folder of each run: its stages, widths, damage, training and settings on one page",
        "narrower report runs/20250101-120000-obs-cifar_resnet56 --svg",
        [(ReportConfig, ())],
        takes_runs=True,
    ),
    "push": Command(
        run_push,
        "share the narrow network of a run on a hub, with a model card; in Python narrower.load('user/name', factory) loads it",
        "narrower push runs/20250101-120000-obs-cifar_resnet56 user/name --license mit --exports onnx",
        [(PushConfig, ())],
        takes_repository=True,
    ),
    "export": Command(
        run_export,
        "write a network for another runtime, and compare what it computes there with PyTorch",
        "narrower export runs/20250101-120000-obs-cifar_resnet56 --format onnx",
        [(ModelConfig, ()), (DataConfig, ()), (ExportConfig, ())],
        takes_run=True,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 2 for an error of narrower, 130 for Ctrl-C."""
    terminal = Terminal()
    arguments = sys.argv[1:] if arguments is None else arguments
    terminal.typed = shlex.join(["narrower", *arguments])
    try:
        name, settings, chosen = parse(COMMANDS, arguments)
        with ending_together(terminal):
            COMMANDS[name].run(settings, terminal, chosen)
    except NarrowerError as error:
        terminal.close()
        terminal.print(f"narrower: error: {message(error)}", error=True)
        return ERROR
    except KeyboardInterrupt:
        terminal.close()
        terminal.print("interrupted" + hint(terminal.run), error=True)
        return INTERRUPTED
    finally:
        if terminal.made is not None:
            give_back(terminal.made)
    return 0


def message(error: NarrowerError) -> str:
    """The error's own message, without the traceback that a data loader process adds around it."""
    text = str(error)
    return text.rsplit(f"{type(error).__name__}: ", 1)[-1].strip() if "Original Traceback" in text else text


def hint(run: Run | None) -> str:
    if run is None or not (run.claimed or run.resume):
        return ""
    before = f"; the run that it replaces is in {run.folder / PREVIOUS} until then" if (run.folder / PREVIOUS).exists() else ""
    return f"; what was done is in {run.folder}, go on with --resume {quoted(run.folder)}{before}"
