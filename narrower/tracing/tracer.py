"""trace: a model and example inputs to a Graph.

The model's own forward runs on meta tensors, channel ids beside them (`recording`, `ops`); the equations give
groups (`solving`); the probe narrows them all and runs the forward again (`probing`), until nothing disagrees.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from time import perf_counter
from traceback import walk_tb
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import TraceError
from ..graph.equal_counts import components
from ..graph.selection import Kept
from ..graph.types import Graph
from ..inputs import flatten_tensors, shapes_of
from ..surgery.attributes import Place, set_attributes
from ..surgery.copying import Stage, restore_after, stage
from ..surgery.resize import undo
from ..surgery.walk import modules_of, named_tensors, pause_collector
from .constraints import ConstraintCollector
from .grouping import Solution, solve, units
from .interpreter import LabelInterpreter, run_forward
from .labels import Axes, Ids
from .operators.data_dependent import Answer, AnswerListener
from .probe import Mismatch, Probe, alive, narrow_in_place, takes_by_number, trial_keep
from .stored_sizes import proposals

WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule")


@pause_collector()
def trace(model: nn.Module, example_inputs: Any, *, allow_inexact: bool = True) -> Graph:
    """Find the channel groups of `model` by running its forward on `example_inputs`.

    `example_inputs` is a tensor, a tuple of positional or a dict of keyword arguments, as the model takes them (only
    their shapes and dtypes matter, unless the forward branches on data). The model is not touched: a copy with meta
    tensors runs, in eval mode, and in train mode as well where that uses other layers. `allow_inexact=False` pins the groups
    that a layer normalises or pools across (their removal changes that layer by definition). From two seconds on, lines on
    standard error tell how far it is.

    Raises TraceError if the forward fails, if there is nothing to narrow, or for a wrapped (DDP, compiled) model.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"trace takes a torch.nn.Module, not {type(model).__name__}")
    if type(model).__name__ in WRAPPERS:
        inner = "_orig_mod" if type(model).__name__ == "OptimizedModule" else "module"
        raise TraceError(f"the model is wrapped in {type(model).__name__}: trace model.{inner} instead")
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError("the model is compiled by torch.jit (scripted or traced): trace the Python module it was made from")
    parameters = {n: t for n, t in named_tensors(model).items() if isinstance(t, nn.Parameter)}
    if not parameters:
        raise TraceError("the model has no parameters: there is nothing to narrow")
    lazy = [n for n, p in parameters.items() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise TraceError(f"{lazy[0]} is not initialised: run the model once before tracing it")
    try:
        return TraceSearch(stage(model, example_inputs, "meta")).graph(allow_inexact)
    except RealNeeded as e:
        first = e.__cause__
    real = stage(model, example_inputs, "real")
    try:
        with restore_after(list(real.model.modules())):
            run_forward(real.model, real.inputs, listening := AnswerListener())
    except Exception as e:
        raise TraceError(
            f"the model's forward fails on the example inputs ({shapes_of(example_inputs)}): {type(e).__name__}: "
            f"{str(e).rstrip('.')}. Check that model(example_inputs) runs."
        ) from first
    for answers in (listening.answers, None):  # where zeros will not do (an inverse), with all values
        try:
            return TraceSearch(real, answers).graph(allow_inexact)
        except RealNeeded as e:
            last = e
    raise unrepeatable(last.__cause__) from last


class RealNeeded(Exception):
    """The dense forward fails on meta tensors."""


class TraceSearch:
    """The loop of trace, solve and probe; what is found wrong goes into `pinned` or `choices` and the loop runs again."""

    def __init__(self, stage: Stage, answers: Sequence[Answer] | None = None) -> None:
        self.stage, self.answers = stage, answers
        self.began, self.next_line, self.forwards = perf_counter(), 2.0, 0
        self.repeatable = False  # the forward was seen to do the same twice
        self.choices: dict[str, int] = {}
        self.restart()
        self.unit = np.zeros(0, dtype=np.int64)  # see solving.units
        self.notes: list[str] = []
        self.shapes = {n: tuple(t.shape) for n, t in stage.tensors.items()}
        first = {id(t): n for n, t in reversed([*stage.tensors.items()]) if isinstance(t, nn.Parameter)}
        self.parameters = frozenset(first.values())
        self.modules = list(stage.model.modules())

    def restart(self) -> None:
        """Forget what was found of groups that may be others now."""
        self.pinned: dict[str, str] = {}
        self.edits: dict[Place, Ids] = {}
        self.failed: Counter[Any] = Counter()  # how often which edits did not mend a failure of some kind
        self.spare_ends = False  # see trial

    def graph(self, allow_inexact: bool) -> Graph:
        traces, axes, solution = self.settled()
        other = self.other_choices(traces["eval"], solution)
        if other:  # views that split channels which are pinned now: perhaps the other of their dimensions shrinks
            before = self.choices, self.pinned, self.notes, self.edits, self.unit
            self.choices = {**self.choices, **other}
            self.restart()
            again = self.settled()
            if free_channels(again[2].graph) > free_channels(solution.graph):
                traces, axes, solution = again
            else:
                self.choices, self.pinned, self.notes, self.edits, self.unit = before
        graph = solution.graph
        if not allow_inexact:
            for g in graph.free:
                if not g.exact:
                    self.pinned[g.name] = "a layer mixes these channels (inexact), and allow_inexact is off"
            graph = self.solved(traces, axes).graph
        if not graph.uses:
            raise TraceError("the model has no convolution or linear layer: narrower works on convolutional networks")
        return graph

    def settled(self) -> tuple[dict[str, ConstraintCollector], Axes, Solution]:
        """Trace, solve and probe until nothing disagrees."""
        traces, axes = self.dense()
        while True:
            solution = self.solved(traces, axes)
            try:
                self.probe(traces, solution)
                if self.spare_ends or not any(map(takes_by_number, traces.values())):
                    return traces, axes, solution
                self.spare_ends = True
            except Mismatch as e:
                if e.choice is not None and e.choice[0] not in self.choices:
                    self.choices[e.choice[0]] = e.choice[1]
                    self.restart()
                    traces, axes = self.dense()
                elif not solution.graph.free:
                    raise unrepeatable(e) from e
                elif not self.mended(traces, axes, solution, e):
                    self.blame(traces, solution, e)

    def other_choices(self, trace: ConstraintCollector, solution: Solution) -> dict[str, int]:
        """For views by their place: the first of the dimensions over which they spread channels that are pinned."""
        out = {}
        for dims, ids, where in trace.splits.values():
            groups = solution.group_of[solution.unit[ids]].reshape(-1)
            reasons = {solution.graph.groups[g].pinned or "" for g in set(groups.tolist()) if g >= 0}
            if where not in self.choices and any(r and "output" not in r and "channel" not in r[:14] for r in reasons):
                out[where] = dims[0]
        return out

    def solved(self, traces: dict[str, ConstraintCollector], axes: Axes) -> Solution:
        tensors = flatten_tensors(self.stage.inputs)
        batch = tensors[0].shape[0] if tensors and tensors[0].ndim else 1
        return solve(list(traces.values()), axes, self.unit, self.shapes, self.parameters, max(1, batch), self.pinned,
                     self.notes, self.edits)

    def dense(self) -> tuple[dict[str, ConstraintCollector], Axes]:
        """The equations of the dense forward: in eval mode, and in train mode where that reaches further parameters."""
        axes, self.notes = Axes(), []
        first = ConstraintCollector(self.stage.model, axes, self.choices, self.answers)
        try:
            self.out_shapes = self.outputs(first)
        except Exception as e:
            raise RealNeeded from e
        traces = {"eval": first}
        idle = self.parameters - first.seen
        if idle:
            second = ConstraintCollector(self.stage.model, axes, self.choices, self.answers)
            self.stage.model.train()
            try:
                self.outputs(second)
                traces["train"] = second
            except Exception as e:
                self.notes = [f"layers that only training uses could not be traced ({type(e).__name__}: {e})"]
            finally:
                self.stage.model.eval()
            still = sorted(idle - second.seen)
            if still:
                self.notes.append(f"never used in the forward, left as they are: {', '.join(still[:4])}"
                                  + (f" and {len(still) - 4} more" if len(still) > 4 else ""))
        self.unit = units(list(traces.values()), axes)
        return traces, axes

    def tell(self) -> None:
        """A line after 2, 4, 8 ... seconds."""
        seconds = perf_counter() - self.began
        if seconds > self.next_line:
            sys.stderr.write(f"narrower: tracing since {seconds:.0f} s: {self.forwards} forwards, {len(self.pinned)} groups "
                             f"found to be fixed, {len(self.edits)} stored numbers that follow\n")
            self.next_line = 2 * seconds

    def outputs(self, mode: LabelInterpreter) -> list[tuple[int, ...]]:
        self.tell()
        self.forwards += 1
        with restore_after(self.modules):
            out = flatten_tensors(run_forward(self.stage.model, self.stage.inputs, mode))
        for t in out:
            labels = mode.of(t).labels
            if labels:
                mode.pin(labels, "output", "network output")
        return [tuple(t.shape) for t in out]

    def probe(self, traces: dict[str, ConstraintCollector], solution: Solution, kept: Kept | None = None) -> None:
        """Run the narrowed forward; Mismatch if anything differs, with the ids at fault."""
        kept = trial_keep(solution.graph, self.spare_ends) if kept is None else kept
        changes = narrow_in_place(self.stage.model, self.stage.tensors, kept.cuts)
        left = alive(solution, kept)
        changes += set_attributes(self.stage.model, {p: int(left[solution.unit[ids]].sum()) for p, ids in self.edits.items()})
        try:
            for mode, dense in traces.items():
                if mode == "train":
                    self.stage.model.train()
                probe = Probe(self.stage.model, dense, solution, kept)
                try:
                    try:
                        shapes = self.outputs(probe)
                    except Mismatch:
                        raise
                    except Exception as e:
                        ids = [x.ids.reshape(-1) for c in probe.carried_in() for x in c.labels]
                        where = probe.failed or traced_to(probe, e)
                        raise Mismatch(np.concatenate(ids) if ids else np.zeros(0, int),
                                       f"the forward fails when narrow: {short(e)} ({where})") from e
                except Mismatch as e:
                    e.mode, e.module, e.place = mode, probe.here, probe.place
                    raise
                if mode == "eval" and shapes != self.out_shapes:
                    raise Mismatch(np.zeros(0, int), "the output changes its shape when narrow")
        finally:
            if "train" in traces:
                self.stage.model.eval()
            undo(changes)

    def mended(self, traces: dict[str, ConstraintCollector], axes: Axes, solution: Solution, e: Mismatch) -> bool:
        """Try to let a number that the module at fault stores follow the widths; it must take the probe further."""
        modules = dict(modules_of(self.stage.model))
        log = traces[e.mode].log
        names = [e.module, *(n for n in (e.module.rpartition(".")[0],) if n != e.module)]
        before = self.edits
        for edits in proposals([n for n in names if n in modules], modules, log, e.place, axes):
            attempt = e.reason.partition(" (")[0], frozenset((p, ids.tobytes()) for p, ids in edits.items())
            if edits.keys() <= before.keys() or self.failed[attempt] > 2:
                continue  # they are for all layers of a kind at once: what failed for three fails for the next
            self.edits = {**edits, **before}
            try:
                self.probe(traces, solution)
                return True
            except Mismatch as now:
                if (now.mode != e.mode and e.mode == "eval") or now.place > e.place:
                    return True
            self.failed[attempt] += 1
        self.edits = before
        return False

    def blame(self, traces: dict[str, ConstraintCollector], solution: Solution, e: Mismatch) -> None:
        """Pin the groups at fault: those whose ids met wrongly, or, where the probe does not know, found by bisection."""
        graph = solution.graph
        names = [g.name for g in graph.groups]
        found = {int(solution.group_of[u]) for u in np.unique(e.ids)} - {-1}
        suspects = [names[g] for g in found if graph[names[g]].free]
        if not suspects and not self.repeatable:
            try:
                self.probe(traces, solution, Kept(graph, {}))
            except Mismatch as again:
                raise unrepeatable(again) from e
            self.repeatable = True
        if len(suspects) != 1:
            suspects = self.bisect(traces, solution, suspects or [g.name for g in graph.free])
        for name in suspects:
            self.pinned[name] = e.reason

    def bisect(self, traces: dict[str, ConstraintCollector], solution: Solution, suspects: list[str]) -> list[str]:
        """The smallest half of the suspects that still fails alone, repeatedly."""
        full = trial_keep(solution.graph, self.spare_ends)
        tied = [{c.group for c in part.cells} for part in components(solution.graph)]

        def fails(names: list[str]) -> bool:
            cut, size = set(names), 0
            while len(cut) > size:  # tied groups can only be cut together
                size = len(cut)
                cut.update(*(part for part in tied if part & cut))
            try:
                self.probe(traces, solution, Kept(full.graph, {n: k for n, k in full.keep.items() if n in cut}))
            except Mismatch:
                return True
            return False

        if not fails(suspects):
            return suspects
        while len(suspects) > 1:
            half = len(suspects) // 2
            first, second = suspects[:half], suspects[half:]
            if fails(first):
                suspects = first
            elif fails(second):
                suspects = second
            else:
                break  # only together
        return suspects


def unrepeatable(e: BaseException | None) -> TraceError:
    return TraceError(f"the forward does not do the same twice: {e}")


def free_channels(graph: Graph) -> int:
    return sum(g.size * len(g.layers) for g in graph.free)


def traced_to(mode: LabelInterpreter, e: BaseException) -> str:
    """Module and source line that an error comes from."""
    places = [mode.place_of(frame) for frame, _ in walk_tb(e.__traceback__)]
    return next((p for p in reversed(places) if p), "model")


def short(e: BaseException) -> str:
    text = (str(e).strip().splitlines() or [type(e).__name__])[0]
    return text if len(text) < 160 else text[:157] + "..."
