"""One trial: remove some channels of every free group, run the narrowed forward, and compare it with the dense one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor, nn

from ..errors import TraceError
from ..graph.equal_counts import components
from ..graph.selection import Kept
from ..graph.types import Graph, PinReason
from ..surgery.attributes import Place, set_attributes
from ..surgery.copying import Stage
from ..surgery.resize import Change, fit, slice_tensor, undo
from .constraints import ConstraintCollector
from .dense import DenseRun, Mode, outputs_of, set_mode
from .grouping import Solution
from .labels import Carried, Ids
from .operators.table import row_of
from .probe import Failure, Mismatch, Probe


def trial_pattern(graph: Graph, spare_ends: bool = False) -> Kept:
    """Which channels a trial keeps: of each free group between a third and three quarters.

    Two trial patterns: one removes the first and the last channel of each group, one (`spare_ends`) keeps them and removes
    those behind the first. Code that indexes fixed channels, or a fixed share of them, fails under at least one. Neighbouring
    groups lose different shares, so that sizes which are equal by accident become unequal.
    """
    rng = np.random.default_rng(0)
    removed: list[tuple[str, np.ndarray]] = []
    for k, part in enumerate(components(graph)):
        sizes = part.sizes
        share = 0.25 + 0.4 * ((k * 0.618) % 1)
        want = np.clip(np.round(sizes * share), 1, np.maximum(1, sizes - 1)).astype(np.int64)
        lost = part.removable(want, np.where(sizes > 2, sizes - 2, sizes - 1))  # two channels that stay tell more than one
        for cell, n in zip(part.cells, lost, strict=True):
            first, inner, last = np.split(cell.channels, [1, max(1, len(cell.channels) - 1)])
            order = [inner, last, first] if spare_ends else [first, last, rng.permutation(inner)]
            removed.append((cell.group, np.concatenate(order)[:n]))
    return Kept.without(graph, removed)


def indexes_channels(dense: ConstraintCollector) -> bool:
    """Whether the forward slices or crops channels, so that one trial pattern does not tell enough."""
    return any(a.ids.shape[a.free] != b.ids.shape[b.free]
               for e in dense.log if row_of(e.name).takes_by_number and isinstance(e.inputs[0], Carried)
               for a, b in zip(e.inputs[0].labels, e.carried[0].labels, strict=False))


def probe(stage: Stage, dense: DenseRun, solution: Solution, kept: Kept, stored_sizes: Mapping[Place, Ids]) -> Failure | None:
    """Narrow the staged model in place, run its forwards, and undo it. Returns the first failure, or None."""
    stays = solution.surviving_units(kept)
    changes = narrow_in_place(stage, kept)
    try:
        counts = {place: int(stays[dense.unit_of[ids]].sum()) for place, ids in stored_sizes.items()}
        changes += set_attributes(stage.model, counts)
        for mode in dense.collectors:
            if mode != "eval":
                set_mode(stage.model, mode)
            if failure := run_narrow(stage, mode, dense, solution, kept):
                return failure
    finally:
        if len(dense.collectors) > 1:
            set_mode(stage.model, "eval")
        undo(changes)
    return None


def run_narrow(stage: Stage, mode: Mode, dense: DenseRun, solution: Solution, kept: Kept) -> Failure | None:
    """Run one forward of the narrowed model and compare it with the dense one."""
    interpreter = Probe(stage.model, mode, dense.collectors[mode], solution, kept)
    try:
        outputs = outputs_of(stage, interpreter)
    except Mismatch as mismatch:
        return mismatch.failure
    except TraceError:  # a fault of narrower
        raise
    except Exception as error:
        return interpreter.failure("fails", f"the forward fails when narrow: {first_line(error)}", interpreter.units_read(),
                                   interpreter.location(error))
    if mode == "eval" and [tuple(t.shape) for t in outputs] != dense.output_shapes:
        reason = PinReason("output", "the output changes its shape when narrow")
        return Failure(reason, np.zeros(0, dtype=np.int64), mode, place=interpreter.place)
    return None


def narrow_in_place(stage: Stage, kept: Kept) -> list[Change]:
    """Fit the staged model to the channels that stay; tied tensors stay one object. Returns what was replaced."""
    narrowed: dict[int, Tensor] = {}
    for name, cut in kept.cuts.items():
        t = stage.tensors[name]
        small = slice_tensor(t.detach(), cut)
        narrowed[id(t)] = nn.Parameter(small, requires_grad=False) if isinstance(t, nn.Parameter) else small
    return fit(stage.model, {name: narrowed[id(t)] for name, t in stage.tensors.items() if id(t) in narrowed})


def first_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text if len(text) < 160 else text[:157] + "..."
