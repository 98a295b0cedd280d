"""The dense run: the forward before anything is removed, in eval mode and, where that does something else, in train mode."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from ..errors import TraceError, first_few
from ..inputs import flatten_tensors, opaque, sample_count
from ..surgery.copying import Stage, restore_after
from .constraints import ConstraintCollector
from .interpreter import run_forward
from .labels import Axes, Axis, Label, PaddingAxis
from .operators.data_dependent import Answer
from .operators.table import row_of
from .outline import outline
from .recorder import Recorder

Mode = Literal["eval", "train", "train but for BatchNorm"]
"""BatchNorm refuses one value per channel in train mode, as behind the global pooling of one image. In eval mode it ties the
same channels."""


class DenseForwardError(Exception):
    """The dense forward fails, as it may on meta tensors."""


@dataclass(frozen=True, eq=False)
class DenseRun:
    """What the dense forward says of the channels, under an assumption for each view that splits channels (`view_dims`).

    `collectors`: the constraints of the eval forward and, if it was traced, of the train forward. `axes`: the ids of all axes.
    `shapes`: of all parameters and buffers; `parameters`: the names of the former, shared ones once. `batch`: samples of the
    example inputs. `output_shapes`: of the eval forward.
    """

    view_dims: Mapping[str, int]
    collectors: Mapping[Mode, ConstraintCollector]
    axes: Axes
    shapes: Mapping[str, tuple[int, ...]]
    parameters: frozenset[str]
    batch: int = 1
    output_shapes: Sequence[tuple[int, ...]] = ()
    notes: tuple[str, ...] = ()

    @cached_property
    def unit_of(self) -> np.ndarray:
        """For each id its unit: a set of ids that stand for one channel, as constraints unite them. Shape (ids,).

        Units are numbered by their first id, that is in the order of execution.
        """
        pairs, total = [p for c in self.collectors.values() for p in c.pairs], self.axes.total
        if not pairs:
            return np.arange(total)
        a, b = (np.concatenate(ids) for ids in zip(*pairs, strict=True))
        _, labels = connected_components(coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(total, total)), directed=False)
        _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
        rank = np.empty(len(first), dtype=np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        return rank[inverse]

    @property
    def unit_count(self) -> int:
        return int(self.unit_of.max(initial=-1)) + 1

    def units_of(self, axis: Axis | PaddingAxis) -> np.ndarray:
        """The units along an axis, through all blocks of a grouped convolution."""
        start = self.axes.start[axis]
        return self.unit_of[start:start + self.axes.size[axis]]


def outputs_of(stage: Stage, mode: Recorder) -> list[Tensor]:
    """Run the forward once; what it stores in its modules is taken back. Raises TraceError for an output that hides tensors."""
    with restore_after(list(stage.model.modules())), same_choices(stage) if stage.model.training else nullcontext():
        out = run_forward(stage.model, stage.inputs, mode)
        if hiding := opaque(out):
            raise TraceError(f"the model returns a {hiding}: narrower cannot see the tensors in it, whose channels must stay. "
                             "Let forward return tensors, in tuples, lists, dicts or objects with attributes")
        return flatten_tensors(out)


@contextmanager
def same_choices(stage: Stage) -> Iterator[None]:
    """The same random numbers in each forward, as blocks may be skipped by chance. The generators are left as they were."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(sorted({t.device.index for t in stage.tensors.values() if t.is_cuda})):
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def collect(stage: Stage, collector: ConstraintCollector) -> list[Tensor]:
    """Run the dense forward; the channels of its outputs are pinned. Returns the outputs."""
    outputs = outputs_of(stage, collector)
    what = "network output in training" if stage.model.training else "network output"
    for t in outputs:
        carried = collector.of(t)
        if labels := (*carried.labels, *carried.chosen):
            collector.pin(labels, "output", what)
    for extreme, label in returned_extremes(collector, [t for t in outputs if not collector.of(t).labels]):
        collector.pin([label], "output", f"{what}: the {extreme} of these channels")
    return outputs


EXTREMES = ("max", "min", "amax", "amin", "logsumexp")


def returned_extremes(collector: ConstraintCollector, outputs: Sequence[Tensor]) -> Iterator[tuple[str, Label]]:
    """Maxima over channels, as over the scores of classes, that come out of the network with no layer behind them."""
    reached = [n for t in outputs if isinstance(n := collector.numbered(t), int)]
    makers = {n: k for k, step in enumerate(collector.steps) for n in step.outputs} if reached else {}
    seen = set(reached)
    for n in reached:  # grows
        if n not in makers or (step := collector.steps[makers[n]]).labelled:
            continue
        if step.name in EXTREMES:
            number = sum(s.name == step.name for s in collector.steps[:makers[n]])
            yield from ((step.name, Label(ids, 0)) for name, k, _, ids in collector.mixers if (name, k) == (step.name, number))
        elif step.name != "convolution" and not row_of(step.name).matrix_product:
            new = {i for i in step.inputs if isinstance(i, int)} - seen
            seen |= new
            reached += new


def run_dense(stage: Stage, view_dims: Mapping[str, int], answers: Sequence[Answer] | None = None) -> DenseRun:
    """Collect the constraints of the dense forward. Raises DenseForwardError if it fails in eval mode."""
    batch = max(1, sample_count(stage.inputs))
    first_names = {id(t): n for n, t in reversed([*stage.tensors.items()]) if isinstance(t, nn.Parameter)}
    parameters = frozenset(first_names.values())
    axes = Axes()
    collector = ConstraintCollector(stage.model, axes, view_dims, answers)
    collectors: dict[Mode, ConstraintCollector] = {"eval": collector}
    try:
        outputs = collect(stage, collector)
    except TraceError:
        raise
    except Exception as e:
        raise DenseForwardError from e
    unused, tried = parameters - collector.seen, set[str]()
    error: Exception | None = None
    modes: tuple[Mode, ...] = ("train", "train but for BatchNorm")
    for mode in modes:
        training = ConstraintCollector(stage.model, axes, view_dims, answers)
        try:
            if collect_training(stage, mode, training, collector, None if unused else outputs):
                collectors[mode] = training
            error = None
            break
        except TraceError:
            raise
        except Exception as e:
            error = error or e
        finally:
            tried |= training.seen
    notes = [f"what only training does could not be traced ({type(error).__name__}: {error})"] if error else []
    for why in dict.fromkeys(collector.lost.values()):
        layers = [name for name, lost in collector.lost.items() if lost == why]
        notes.append(f"their weights are computed in a way that cannot be followed ({why}), so that channels of these layers "
                     f"are not seen and stay: {first_few(layers, 4)}")
    still = sorted(unused - tried)
    if still:
        notes.append(f"never used in the forward, left as they are: {first_few(still, 4)}")
    return DenseRun(view_dims, collectors, axes, {n: tuple(t.shape) for n, t in stage.tensors.items()}, parameters, batch,
                    [tuple(t.shape) for t in outputs], tuple(notes))


def set_mode(model: nn.Module, mode: Mode) -> None:
    """Set all modules to a mode."""
    model.train(mode != "eval")
    if mode == "train but for BatchNorm":
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def collect_training(stage: Stage, mode: Mode, collector: ConstraintCollector, seen: ConstraintCollector,
                     outputs: Sequence[Tensor] | None) -> bool:
    """Collect the constraints of a train mode. False where the forward does what the eval mode has `seen`.

    `outputs`: those of the eval mode. None: something was not used there, so that training does more.
    """
    set_mode(stage.model, mode)
    try:
        if outputs is not None and not differs_in_training(stage, seen, outputs):
            return False
        collect(stage, collector)
        return True
    finally:
        set_mode(stage.model, "eval")


def differs_in_training(stage: Stage, collector: ConstraintCollector, outputs: Sequence[Tensor]) -> bool:
    """Whether the forward in train mode does something else than `collector` has seen in eval mode, but for noise."""
    def trained() -> tuple[list[Any], list[Any]]:
        recorder = Recorder(stage.model, collector.axes, collector.answers)
        return outline(recorder, outputs_of(stage, recorder))

    seen = outline(collector, outputs)
    found = trained()
    if found == seen:
        return False
    if trained() != found:
        raise RuntimeError("it is not the same twice")
    return True
