"""fit_latency: a plan for a latency that is measured, not only predicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import BudgetError, ConfigError
from ..graph.types import Graph
from ..narrowing import narrow
from ..planning import Plan, plan
from ..planning.latency import LatencyTable
from ..planning.requests import Budget, read_latency
from ..preconditions import checked
from .runtimes import Runtime, runtime_named
from .tabulating import place_of, time_networks

NEAR = 0.02  # no second plan if the first is so near to the target, as a fraction of it


class Trial(NamedTuple):
    """A plan that was narrowed and measured: milliseconds predicted, measured, and of the dense network in the same run.

    `spread`: quartiles over median of the times of each of both, the larger one.
    """

    predicted_ms: float
    measured_ms: float
    dense_ms: float
    spread: float

    @property
    def error(self) -> float:
        """How far the prediction was from the measurement, as a fraction of this."""
        return self.predicted_ms / self.measured_ms - 1

    @property
    def undecided(self) -> bool:
        """Noise hides whether the narrow network is faster: times of one spread further than both are apart."""
        return self.spread > abs(1 - self.measured_ms / self.dense_ms)

    def __str__(self) -> str:
        share = self.measured_ms / self.dense_ms
        return (f"predicted {self.predicted_ms:.3f} ms, measured {self.measured_ms:.3f} ms ({share:.3f} of "
                f"{self.dense_ms:.3f} ms dense), prediction {self.error:+.1%}, spread {self.spread:.0%}")


@dataclass(frozen=True)
class LatencyFit:
    """A plan, the narrow network, the milliseconds asked for, how the network was measured, and all that was tried."""

    plan: Plan
    module: nn.Module
    target_ms: float
    trial: Trial
    trials: tuple[Trial, ...]

    @property
    def share(self) -> float:
        """The measured time as a fraction of what was asked for."""
        return self.trial.measured_ms / self.target_ms

    def __str__(self) -> str:
        kept = "" if self.trial is self.trials[-1] else ": the first plan is nearer to it, or within it"
        return "\n".join([*map(str, self.trials), f"wanted {self.target_ms:.3f} ms{kept}"])


@checked
def fit_latency(model: nn.Module, graph: Graph, scores: Mapping[str, Tensor], example_inputs: Any, *, latency: LatencyTable,
                runtime: Runtime | None = None, start: Plan | None = None, **request: Any) -> LatencyFit:
    """Plan for a latency, narrow, measure the result, and plan once more if the prediction was wrong.

    The second plan aims at the target divided by (measured / predicted) of the first. The better network is returned: the one
    within the target, or the nearer one. A target that is a fraction is one of the dense network measured in the same run.

    Args:
        model: as for `measure_latency`.
        graph: of `trace`.
        scores: as for `plan`.
        example_inputs: as for `measure_latency`.
        latency: from `measure_latency`, on this machine.
        runtime: needed only if the table was measured in a `Runtime` of your own.
        start: the first plan, if it is made already: for the same latency, by the same table.
        request: what `plan` takes: `latency_ms=`, and for example `sensitivity=`, `exclude=`.

    Raises:
        PlanError, BudgetError: as `plan`, for the latency that was asked for.
        ConfigError: the table is of another machine, or of other inputs.
    """
    if request.get("latency_ms") is None:
        raise ConfigError("fit_latency needs latency_ms=")
    if differ := elsewhere(latency, model, example_inputs):
        raise ConfigError(f"the latency table is of {differ}: measure one here, or use plan alone")
    found = start or plan(graph, scores, latency=latency, **request)
    if found.latency_ms is None:
        raise ConfigError("start= is a plan that no latency table was given for: make it with latency=")
    dense, predicted = found.latency_ms
    fraction = Budget(latency_ms=request["latency_ms"]).targets({"latency_ms": dense})["latency_ms"] / dense
    relative = read_latency(request["latency_ms"])[1]

    def fit(found: Plan) -> LatencyFit:
        assert found.latency_ms is not None
        small = narrow(model, found)
        took = trial(model, small, found.latency_ms[1], example_inputs, latency, runtime)
        return LatencyFit(found, small, fraction * (took.dense_ms if relative else dense), took, (took,))

    first = fit(found)
    aim = first.target_ms * predicted / first.trial.measured_ms
    if abs(first.share - 1) < NEAR or aim >= dense:  # so far off that nothing would have to go
        return first
    try:
        found = plan(graph, scores, latency=latency, **{**request, "latency_ms": f"{aim}ms"})
    except BudgetError:  # nobody asked for this number
        return first
    second = fit(found)
    best = min(second, first, key=lambda one: (one.share >= 1 + NEAR, abs(one.share - 1)))
    return replace(best, trials=(first.trial, second.trial))


def elsewhere(table: LatencyTable, model: nn.Module, example_inputs: Any) -> str:
    """In what the place of a table differs from here, in words. Empty where it was measured here, on such inputs."""
    if not {"runtime", "threads"} <= table.place.keys():
        return "an unknown place"
    here = place_of(model, example_inputs, table.place["runtime"], table.place["threads"])
    return ", ".join(f"{k} {table.place.get(k)} and not {v}" for k, v in here.items() if table.place.get(k) != v)


def trial(model: nn.Module, small: nn.Module, predicted_ms: float, example_inputs: Any, table: LatencyTable,
          runtime: Runtime | None = None) -> Trial:
    """Measure the dense network and a narrow one, in turn, as the table was measured."""
    runs_in = runtime or runtime_named(table.place["runtime"])
    (dense_ms, one), (ms, two) = time_networks([model, small], example_inputs, runs_in, table.place, seconds=2.0)
    return Trial(predicted_ms, ms, dense_ms, max(one, two))
