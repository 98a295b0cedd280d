"""Milliseconds as a budget: the table of times as a stage of a run, and the narrow network measured at its end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

import narrower

from ..deployment.elsewhere import read_latency_times
from ..deployment.fitting import Trial, elsewhere, trial
from ..deployment.formats import format_of
from ..errors import ConfigError, NoiseError
from ..extras import optional
from ..planning.requests import read_latency
from ..training.agreement import first
from . import run_folder
from .config import PruneConfig
from .job import Job
from .narrowing_methods import NARROWING_METHODS
from .oneshot import check_plan

RUNTIME, THREADS = "onnxruntime", 1
SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".xml"}
"""Of the files by which these runtimes are measured."""


@dataclass(frozen=True)
class Timed:
    """Times of the dense and the narrow network in the runtime of the latency table.

    Attributes:
        trial: measured in turn. None where the table is of another machine: then there is the prediction alone.
        predicted_ms: of the dense and of the narrow network.
        wanted_ms: the budget, None where it was another one.
        place: runtime, device, threads, dtype, shape and machine of the table.
        elsewhere: in what that place differs from here.
    """

    trial: Trial | None
    predicted_ms: tuple[float, float]
    wanted_ms: float | None
    place: dict[str, Any]
    elsewhere: str = ""

    @property
    def facts(self) -> dict[str, Any]:
        """All numbers, for the metrics."""
        found: dict[str, Any] = {"predicted_ms": list(self.predicted_ms), "wanted_ms": self.wanted_ms, "place": self.place}
        if self.trial is None:
            return found | {"elsewhere": self.elsewhere}
        measured = {"dense_ms": self.trial.dense_ms, "narrow_ms": self.trial.measured_ms}
        return found | measured | {"prediction_error": self.trial.error, "spread": self.trial.spread}

    def __str__(self) -> str:
        place = self.place
        threads = f"{place['threads']} thread{'s' if place['threads'] != 1 else ''}"
        where = f"{place['runtime']} on {place['device']}, {threads}, {place['dtype']}, {'x'.join(map(str, place['shape']))}"
        wanted = "" if self.wanted_ms is None else f", wanted {self.wanted_ms:,.3f} ms"
        dense, narrow = self.predicted_ms
        if self.trial is None:
            return (f"{where}: predicted {dense:,.3f} ms -> {narrow:,.3f} ms{wanted}; not measured, the table is of "
                    f"{self.elsewhere}")
        return (f"{where}: measured {self.trial.dense_ms:,.3f} ms -> {self.trial.measured_ms:,.3f} ms (spread "
                f"{self.trial.spread:.0%}){wanted}, predicted {narrow:,.3f} ms ({self.trial.error:+.1%})")


def untimed(given: PruneConfig) -> PruneConfig:
    """The settings without what needs a table of times, for a look at all others before one is measured."""
    some = given.macs is not None or given.params is not None or given.remove is not None
    return replace(given, latency=None, runtime=None, threads=None, latency_table=None,
                   round_to=None if given.round_to == "auto" else given.round_to, macs=given.macs if some else 1 - 1e-9)


def check_request(job: Job, model: nn.Module, graph: narrower.Graph) -> None:
    """Make a plan, to fail before anything is trained: without milliseconds, as long as they are not known."""
    if job.settings.prune.timed and job.times is None:
        job = replace(job, settings=replace(job.settings, prune=untimed(job.settings.prune)))
    if method := NARROWING_METHODS.get(job.settings.prune.method):
        method.check(job, model, graph)
    else:
        check_plan(job.settings.prune, model, graph, job.times)


def with_given_times(job: Job, graph: narrower.Graph) -> Job:
    """The job with the table of a run that goes on, or of `--latency-table`, if there is one.

    Raises:
        ConfigError, PlanError: the table cannot be read, or is of another network, image size, runtime or number of threads.
        MissingExtraError: a package that measuring needs is missing.
    """
    given = job.settings.prune
    if not given.timed or not (text := first(lambda: given_table(job))):
        return job
    table = narrower.LatencyTable.from_json(text)
    table.check(graph)
    asked = {"runtime": given.runtime, "threads": given.threads, "images": list(job.example.shape[1:])}
    found = {**table.place, "images": list(table.place.get("shape", ()))[1:]}
    for name, value in asked.items():
        if value is not None and found.get(name) != value:
            raise ConfigError(f"the latency table has times of {name} {found.get(name)}, and {value} is asked for")
    return replace(job, times=table)


def given_table(job: Job) -> str:
    """The table in the folder of a run that goes on, or of the settings, as JSON. Empty where it is yet to be measured."""
    given, kept = job.settings.prune, job.run.folder / run_folder.LATENCY
    if job.run.resume and kept.exists():
        return read_table(kept).to_json()
    if given.latency_table:
        return read_table(Path(given.latency_table)).to_json()
    if suffix := SUFFIXES.get(given.runtime or RUNTIME):
        for package in format_of(Path(f"network{suffix}")).packages:
            optional(package)  # not found out after minutes
    return ""


def read_table(path: Path) -> narrower.LatencyTable:
    """A table from a file, or from the folder of `write_latency_jobs`.

    Raises ConfigError if it cannot be read, PlanError if it holds something else.
    """
    if path.is_dir():
        return read_latency_times(path)
    try:
        return narrower.LatencyTable.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the latency table {path}: {error}") from error


def with_times(job: Job, model: nn.Module, graph: narrower.Graph) -> Job:
    """The job with the latency table that its settings ask for: read, or measured as a stage. By the first process, for all.

    Raises:
        BudgetError: the milliseconds cannot be reached.
    """
    if not job.settings.prune.timed:
        return job
    if job.times is None:
        job = replace(job, times=narrower.LatencyTable.from_json(first(lambda: own_table(job, model, graph).to_json())))
        check_request(job, model, graph)
    if job.run.writes and job.times is not None:
        job.run.write(run_folder.LATENCY, job.times.to_json().encode())
        (job.run.folder / run_folder.TIMES).unlink(missing_ok=True)
    return job


def own_table(job: Job, model: nn.Module, graph: narrower.Graph) -> narrower.LatencyTable:
    """The table, measured as a stage. Times are kept in the run folder one by one, for a run that goes on.

    Raises NoiseError if the times differ more among themselves than the budget does from the dense network's.
    """
    given, times = job.settings.prune, job.run.folder / run_folder.TIMES
    note = job.note_slowly()
    with job.stage("latency table", busy="measuring times") as facts:
        table = narrower.measure_latency(
            model, graph, job.example, runtime=given.runtime or RUNTIME, threads=given.threads or THREADS,
            cache=times if job.run.writes else None, progress=lambda text: note(f"latency table: {text}"),
        )  # fmt: skip
        facts |= {"runtime": table.place["runtime"], "threads": table.place["threads"], "spread": table.spread,
                  "prediction_error": table.error, "place": dict(table.place), "text": str(table)}
    dense = table.networks[0].ms
    wanted = target_of(given, dense)
    if wanted is not None and 0 < 1 - wanted / dense <= max(table.spread, table.error):
        times.unlink(missing_ok=True)  # a run that goes on measures anew
        raise NoiseError(f"this machine is too noisy to plan {wanted:,.3f} ms of {dense:,.3f} ms by: the times of one network "
                         f"spread by {table.spread:.0%}, predictions are off by up to {table.error:.0%}; stop other programs, "
                         "or give --latency-table from a quieter time")
    if table.noisy:
        job.report.note(f"warning: this machine is too noisy to be measured well: the times of one network spread by "
                        f"{table.spread:.0%}, predictions are off by up to {table.error:.0%}; stop other programs")
    return table


def timed(job: Job, model: nn.Module, small: nn.Module, plan: narrower.Plan) -> Timed | None:
    """The narrow network measured against the dense one, as a stage. None where no table was asked for."""
    table = job.times
    if table is None or plan.latency_ms is None:
        return None
    predicted, differ = plan.latency_ms, elsewhere(table, model, job.example)
    with job.stage("time", busy="measuring") as facts:
        found = None if differ else Trial(*first(lambda: tuple(trial(model, small, predicted[1], job.example, table))))
        dense = predicted[0] if found is None else found.dense_ms
        result = Timed(found, predicted, target_of(job.settings.prune, dense), dict(table.place), differ)
        facts |= {**result.facts, "text": str(result)}
    if found is not None and found.undecided:
        job.report.note(f"warning: too noisy to say whether the narrow network is faster: the times of one network spread by "
                        f"{found.spread:.0%}")
    return result


def target_of(given: PruneConfig, dense: float) -> float | None:
    """The milliseconds asked for, if any, of a network that takes so many when dense."""
    if given.latency is None:
        return None
    value, relative = read_latency(given.latency)
    return value * dense if relative else value
