"""The search for the groups: trace, group, probe, refine, until a probe finds nothing wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import NamedTuple

from ..errors import TraceError
from ..graph.equal_counts import components
from ..graph.selection import Kept
from ..graph.types import Graph, PinReason
from ..surgery.attributes import Place
from ..surgery.copying import Stage
from ..surgery.walk import modules_of
from .dense import DenseRun, run_dense
from .grouping import Solution, solve
from .hypotheses import Attempt, Diagnosis, Hypotheses, asks_for_view_dim, refine
from .labels import Ids
from .operators.data_dependent import Answer
from .probe import Failure
from .stored_sizes import proposals
from .trials import indexes_channels, probe, trial_pattern

MAX_ATTEMPTS = 3  # stored sizes are for all layers of a class at once: what has failed for three of them fails for the next

INEXACT = PinReason("mixing", "a layer mixes these channels (inexact), and allow_inexact is off")


class Progress:
    """Reports how far a long trace is, after 2, 4, 8 ... seconds."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report
        self.began, self.next_report, self.forwards = perf_counter(), 2.0, 0

    def count(self, forwards: int, hypotheses: Hypotheses) -> None:
        """Called before so many forwards."""
        seconds = perf_counter() - self.began
        if seconds > self.next_report:
            self.next_report = 2 * seconds
            self.report(f"tracing since {seconds:.0f} s: {self.forwards} forwards, {len(hypotheses.pins)} groups found to be "
                        f"fixed, {len(hypotheses.stored_sizes)} stored numbers that follow")
        self.forwards += forwards


class State(NamedTuple):
    """Hypotheses, the dense run under them, and the groups that follow."""

    hypotheses: Hypotheses
    dense: DenseRun
    solution: Solution

    @property
    def trial(self) -> Kept:
        return trial_pattern(self.solution.graph, self.hypotheses.spare_ends)


class TraceSearch:
    """Finds the groups of a staged model. `answers`: what its forward reads from data, if it runs on real tensors."""

    def __init__(self, stage: Stage, progress: Progress, answers: Sequence[Answer] | None = None) -> None:
        self.stage, self.progress, self.answers = stage, progress, answers

    def graph(self, allow_inexact: bool) -> Graph:
        """The groups that no probe refutes. Raises DenseForwardError or TraceError."""
        best = self.settle(Hypotheses())
        view_dims = other_view_dims(best)
        if view_dims:
            other = self.settle(best.hypotheses.with_view_dims(view_dims))
            best = max(best, other, key=lambda state: free_channels(state.solution.graph))
        hypotheses, dense, (graph, _) = best
        if not allow_inexact:
            mixed = {g.name: INEXACT for g in graph.free if not g.exact}
            graph = solve(dense, {**hypotheses.pins, **mixed}, hypotheses.stored_sizes).graph
        if not graph.uses:
            raise TraceError("the model has no convolution or linear layer: narrower works on convolutional networks")
        return graph

    def settle(self, hypotheses: Hypotheses) -> State:
        """Trace, group, probe and refine until a probe under these hypotheses finds nothing wrong."""
        dense = self.trace(hypotheses)
        while True:
            if dense.view_dims != hypotheses.view_dims:
                dense = self.trace(hypotheses)
            state = State(hypotheses, dense, solve(dense, hypotheses.pins, hypotheses.stored_sizes))
            failure = self.probe(state, state.trial)
            if failure is not None:
                hypotheses = refine(hypotheses, failure, self.diagnose(state, failure))
            elif not hypotheses.spare_ends and any(map(indexes_channels, dense.collectors.values())):
                hypotheses = replace(hypotheses, spare_ends=True)  # the other trial pattern
            elif refused := self.refused_steps(state):
                hypotheses = refine(hypotheses, *refused)
            else:
                return state

    def trace(self, hypotheses: Hypotheses) -> DenseRun:
        self.progress.count(1, hypotheses)
        return run_dense(self.stage, hypotheses.view_dims, self.answers)

    def probe(self, state: State, kept: Kept, stored_sizes: Mapping[Place, Ids] | None = None) -> Failure | None:
        hypotheses, dense, solution = state
        self.progress.count(len(dense.collectors), hypotheses)
        return probe(self.stage, dense, solution, kept, hypotheses.stored_sizes if stored_sizes is None else stored_sizes)

    def diagnose(self, state: State, failure: Failure) -> Diagnosis:
        """Find by further probes what is to blame for a failure."""
        if asks_for_view_dim(state.hypotheses, failure):
            return Diagnosis()
        if not state.solution.graph.free:
            raise unrepeatable(failure.reason)
        mending = self.mend(state, failure)
        return mending if mending.stored_sizes else self.blame(state, failure, mending.failed_attempts)

    def refused_steps(self, state: State) -> tuple[Failure, Diagnosis] | None:
        """Of views that are not read as at first, the groups whose smallest steps of narrowing fail, and the first failure.

        Such code may ask for multiples of four, as the channel shuffle of ShuffleNetV2 does, which a trial may meet by chance.
        """
        hypotheses, dense, solution = state
        reread = {g.name for c in dense.collectors.values() for _, ids, where in c.splits.values()
                  if where in hypotheses.view_dims for g in solution.groups_of(dense.unit_of[ids])}
        failures: dict[str, Failure] = {}
        for part in components(solution.graph):
            for step in part.moves() if reread & {c.group for c in part.cells} else ():
                removed = [(c.group, c.channels[:n]) for c, n in zip(part.cells, step, strict=True)]
                if (step < part.sizes).all() and (failure := self.probe(state, Kept.without(solution.graph, removed))):
                    failures |= dict.fromkeys((c.group for c in part.cells), failure)
        return (next(iter(failures.values())), Diagnosis(groups=tuple(failures))) if failures else None

    def mend(self, state: State, failure: Failure) -> Diagnosis:
        """Let numbers that the failing module stores follow the widths, where that takes the probe further."""
        hypotheses, dense, _ = state
        modules = dict(modules_of(self.stage.model))
        names = [n for n in dict.fromkeys((failure.module, failure.module.rpartition(".")[0])) if n in modules]
        log = dense.collectors[failure.mode].log
        operator = log[failure.place].name if failure.place < len(log) else ""
        failed: list[Attempt] = []
        for sizes in proposals(names, modules, log, failure.place, dense.axes):
            attempt = failure.reason.code, operator, frozenset((p, ids.tobytes()) for p, ids in sizes.items())
            if sizes.keys() <= hypotheses.stored_sizes.keys() or hypotheses.failed_attempts.get(attempt, 0) >= MAX_ATTEMPTS:
                continue
            after = self.probe(state, state.trial, {**sizes, **hypotheses.stored_sizes})
            if after is None or after.is_after(failure):
                return Diagnosis(stored_sizes=sizes, failed_attempts=tuple(failed))
            failed.append(attempt)
        return Diagnosis(failed_attempts=tuple(failed))

    def blame(self, state: State, failure: Failure, failed_attempts: tuple[Attempt, ...]) -> Diagnosis:
        """The groups at fault: those whose ids met wrongly, or, where the probe does not know, found by bisection."""
        free = [g.name for g in state.solution.graph.free]
        suspects = [g.name for g in state.solution.groups_of(failure.units) if g.free]
        ask = not suspects and not state.hypotheses.repeatable
        if ask and (again := self.probe(state, Kept(state.solution.graph, {}))):
            raise unrepeatable(again.reason)
        if len(suspects) != 1:
            suspects = self.bisect(state, suspects or free)
        return Diagnosis(groups=tuple(suspects), failed_attempts=failed_attempts, repeatable=ask)

    def bisect(self, state: State, suspects: list[str]) -> list[str]:
        """The smallest half of the suspects that still fails alone, repeatedly."""
        trial = state.trial
        tied = [{c.group for c in part.cells} for part in components(trial.graph)]

        def fails(names: list[str]) -> bool:
            cut, size = set(names), 0
            while len(cut) > size:  # tied groups can only be cut together
                size = len(cut)
                cut.update(*(part for part in tied if part & cut))
            return self.probe(state, Kept(trial.graph, {n: k for n, k in trial.keep.items() if n in cut})) is not None

        if not fails(suspects):
            return suspects
        while len(suspects) > 1:
            half = len(suspects) // 2
            failing = next((part for part in (suspects[:half], suspects[half:]) if fails(part)), None)
            if failing is None:
                break  # only together
            suspects = failing
        return suspects


def other_view_dims(state: State) -> dict[str, int]:
    """Views that split channels which are pinned now, and the first of the dimensions: perhaps that one shrinks.

    Channels that are pinned whatever the view does (outputs, single channels) give no reason to try.
    """
    dims_of = {}
    for dims, ids, where in state.dense.collectors["eval"].splits.values():
        codes = {g.pinned.code for g in state.solution.groups_of(state.dense.unit_of[ids]) if g.pinned}
        if where not in state.hypotheses.view_dims and codes - {"output", "index", "together"}:
            dims_of[where] = dims[0]
    return dims_of


def free_channels(graph: Graph) -> int:
    return sum(g.size * len(g.layers) for g in graph.free)


def unrepeatable(reason: object) -> TraceError:
    return TraceError(f"the forward does not do the same twice: {reason}")
