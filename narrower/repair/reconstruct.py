"""reconstruct: the weights that stay make up for the channels that went."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import DataError, PlanError
from ..graph.selection import Kept
from ..graph.types import html_table, table
from ..inputs import device_of, sample_count
from ..narrowing.layers import Reader
from ..narrowing.narrow import RECORD, record_biases
from ..planning.plan import Plan
from ..preconditions import checked
from ..surgery.copying import independent_copy, moved, same_tensors, where_float64_is
from ..surgery.resize import slice_tensor
from ..surgery.walk import in_eval_mode, named_tensors, outer_modes_off
from .comparison import Measure, divergences
from .held_out import checked_inputs, joined, split
from .least_squares import choose
from .patches import as_matrix, as_weight, patches_at, values_at, widened
from .readers import give_intercepts, images_wanted, losing_inputs
from .second_moments import MOST_INPUTS
from .targets import Target, dense_targets
from .watching import LayerCall, LayerWatch

JUDGES, MOST_JUDGES = 8, 64  # one image in so many, at most so many of them, judges whole networks and is never fitted
HELD_OUT = 4  # of the others one in so many chooses a layer's ridge
LEAST_IMAGES = 2 * JUDGES
SAMPLES_PER_INPUT = 4  # sampled positions for each input of a layer
LEAST_SAMPLES = 32768
LEAST_SCALE = 1e-6  # a BatchNorm that multiplies by less hides its layer
CUT, LAYERS, STREAMS = "cut", "layer targets", "stream targets"


class LayerRepair(NamedTuple):
    """`error`: the squared error of a layer on held-out images, relative to that of its cut weights.

    `strength`: the ridge relative to the mean variance of the inputs; inf where the intercept alone helps, None where
    nothing did and the layer keeps its cut weights. `inputs`: how many the layer reads at a position.
    """

    weight: str
    error: float
    strength: float | None
    samples: int
    inputs: int


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """`model`: the repaired network. `layers`: what was gained, in the order of the forward. `left`: weights that have lost
    inputs and stay as they were cut, and why.

    `divergences`: how far the outputs are from the dense ones, on `images` images that nothing was fitted on: as "cut", and
    repaired with "layer targets" or "stream targets", where these were tried. `kept`: which of them `model` is, the nearest.
    `measure`: "kl" (of class probabilities, in nats) or "relative" (squared error relative to the variance).
    """

    model: nn.Module
    layers: tuple[LayerRepair, ...]
    left: Mapping[str, str]
    kept: str
    divergences: Mapping[str, float]
    measure: str
    images: int

    def __str__(self) -> str:
        return "\n".join([*([table(self.rows)] if self.layers else []), *self.footer])

    def _repr_html_(self) -> str:
        """For notebooks."""
        return html_table(self.rows, self.footer)

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """A header, and a row for each layer."""
        rows: list[tuple[str, ...]] = [("weight", "inputs", "samples", "error left", "ridge")]
        for r in self.layers:
            ridge = "kept as cut" if r.strength is None else f"{r.strength:g}"
            rows.append((r.weight, f"{r.inputs:,}", f"{r.samples:,}", f"{r.error:.1%}", ridge))
        return rows

    @property
    def footer(self) -> list[str]:
        """The lines below the rows."""
        lines = [f"left as cut: {name}: {why}" for name, why in self.left.items()]
        if not self.divergences:
            return [*lines, "no layer to repair: the network is as it was cut"]
        found = ", ".join(f"{name} {value:.4g}" for name, value in self.divergences.items())
        judged = f"{self.measure} from the dense outputs on {self.images} images held out"
        return [*lines, f"{judged}: {found}; kept: {self.kept}"]


@checked
@outer_modes_off()
@torch.no_grad()
def reconstruct(model: nn.Module, small: nn.Module, plan: Plan, batches: Iterable[Any], *, images: int | None = None,
                stream_targets: bool | None = None, measure: Measure | None = None) -> Reconstruction:
    """Repair `small`, which `narrow(model, plan)` returned.

    Every layer that lost inputs gets the weights that best give the dense layer's output from the inputs that are left.

    Layers are solved in the order of the forward, each from the inputs that the repaired layers before it give (He et al.,
    "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, section 3.2). Ridge regression on the difference to
    the cut weights, with an intercept where the layer has a place for one. Its strength, and whether a layer changes at all, is
    decided on every fourth of the fitted images; then the layer is fitted to all of them.

    `stream_targets`: where a layer's output is added to another activation, directly or through a BatchNorm, its target makes
    up for what the other summand has lost as well. None tries both, in twice the time.

    Every eighth image (64 at most) is not fitted. On these the outputs are compared with the dense ones. The nearest network is
    returned: the cut one, as it was, if no repair is nearer. `measure`: "kl" (of class probabilities) or "relative" (squared
    error, of any outputs). None: "kl" for one tensor `(N, K)`, as of a classifier, else "relative".

    `batches` gives what the model takes, or pairs whose first part is; no labels are needed. All of them are used, or the first
    `images` samples. The dense network runs over them batch by batch. The narrow one runs once over all of them together, so
    memory grows with their number. Do not renew BatchNorm statistics after this: the targets are in the old ones.

    Neither `model` nor `small` is changed. Raises DataError for too few images, batches without tensors or of several shapes,
    activations that are not finite, or outputs without numbers to compare or that the measure does not
    fit; PlanError if the tensors of `model` are not those
    that were traced, or those of `small` not those that the plan leaves.
    """
    same_tensors(model, plan.graph)
    kept, home = Kept(plan.graph, plan.keep), device_of(small)
    model, small = where_float64_is(model), where_float64_is(small)
    outputs, reads, left = solvable(kept, cut_tensors("reconstruct", small, kept))
    inputs = checked_inputs("reconstruct", batches, model, images, LEAST_IMAGES, images_wanted(plan.graph, reads))
    fit, judges = split(inputs, JUDGES, MOST_JUDGES)
    cut = independent_copy(small)
    if outputs:
        count = sum(n for _, n in fit)
        per_image = {n: -(-max(LEAST_SAMPLES, SAMPLES_PER_INPUT * k) // count) for n, k in reads.items()}
        dense = independent_copy(model)  # layers are told apart by their memory, which parameters may share
        with in_eval_mode(dense):
            targets, unseen, once = dense_targets(dense, outputs, per_image, fit)
        left |= unseen
    if not outputs or not targets:
        return Reconstruction(moved(cut, home), (), left, CUT, {}, "", 0)
    ways = [stream_targets] if stream_targets is not None else [False, True]
    if all(t.stream is None for t in targets.values()):
        ways = ways[:1]
    whole = joined([x for x, _ in fit])
    found: dict[str, tuple[nn.Module, tuple[LayerRepair, ...]]] = {CUT: (cut, ())}
    for streams in ways:
        found[STREAMS if streams else LAYERS] = repaired_network(small, kept, targets, whole, streams, once)
    values, measure = divergences(model, [m for m, _ in found.values()], judges, measure)
    by_name = dict(zip(found, values, strict=True))
    best = min(by_name, key=lambda name: by_name[name])
    if best == CUT:
        left |= dict.fromkeys(targets, "no repair brings the outputs nearer to the dense ones")
    nearest, layers = found[best]
    return Reconstruction(moved(nearest, home), layers, left, best, by_name, measure, sum(n for _, n in judges))


def cut_tensors(what: str, small: nn.Module, kept: Kept) -> dict[str, Tensor]:
    """The tensors of the cut network. Raises PlanError, in the name of `what`, if they are not what the plan leaves."""
    named, shapes = named_tensors(small), kept.graph.shapes
    for name, cut in kept.cuts.items():
        want = tuple(slice_tensor(torch.empty(shapes[name], device="meta"), cut).shape)
        if name not in named or tuple(named[name].shape) != want:
            found = tuple(named[name].shape) if name in named else "missing"
            raise PlanError(f"the narrow network is not what this plan leaves: {name} is {found}, should be {want}; give "
                            f"{what} what narrow(model, plan) returned")
    return named


def solvable(kept: Kept, named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int], dict[str, str]]:
    """Of the weights that have lost inputs: the dense output channels that their layers still have, how many inputs each
    reads at a position, and why others cannot be repaired. `named`: the tensors of the cut network."""
    outputs, left = losing_inputs(kept)
    reads = {name: named[name][0].numel() for name in outputs}
    wide = [name for name, count in reads.items() if count > MOST_INPUTS]
    left |= {name: f"it has {reads.pop(name):,} inputs, more than can be solved for ({MOST_INPUTS:,})" for name in wide}
    return {name: outputs[name] for name in reads}, reads, left


def repaired_network(small: nn.Module, kept: Kept, targets: Mapping[str, Target], inputs: Any,
                     stream_targets: bool, once: frozenset[int]) -> tuple[nn.Module, tuple[LayerRepair, ...]]:
    """A repaired copy of the cut network, and what was gained. `once`: the calls whose output one other call reads."""
    model = independent_copy(small)
    intercepts = give_intercepts(model, kept, targets)
    if hasattr(model, RECORD):
        record_biases(model, [place.into for place in intercepts.values() if place.kind == "new bias"])
    watch = RepairWatch(model, targets, intercepts, stream_targets)
    watch.once = once
    with in_eval_mode(model):
        watch.run(inputs, sample_count(inputs))
    return model, tuple(watch.repairs)


class RepairWatch(LayerWatch):
    """The forward of the narrow network. Every layer with a target is solved, in place, before its output goes on."""

    def __init__(self, model: nn.Module, targets: Mapping[str, Target], intercepts: Mapping[str, Reader],
                 stream_targets: bool) -> None:
        super().__init__(model, targets)
        self.targets, self.intercepts = targets, intercepts
        self.tensors, self.modules = named_tensors(model), dict(model.named_modules())
        self.summands: dict[int, list[str]] = {}  # the call that makes the other summand: the layers that wait for it
        for name, target in targets.items():
            if stream_targets and target.stream is not None:
                self.summands.setdefault(target.stream.other, []).append(name)
        self.others: dict[str, Tensor] = {}
        self.repairs: list[LayerRepair] = []

    def finished(self, number: int, out: Tensor) -> None:
        for name in self.summands.get(number, ()):
            self.others[name] = values_at(out, self.targets[name].at)

    def layer(self, call: LayerCall) -> Tensor:
        name, target, weight = call.weight, self.targets[call.weight], self.tensors[call.weight]
        groups = call.geometry.groups
        inputs = widened(patches_at(call.x, call.geometry, target.at))
        made = inputs @ widened(as_matrix(weight, call.geometry)).transpose(1, 2)
        wanted, scale = (widened(t) for t in self.wanted(name, target))
        residual = (wanted if call.bias is None else wanted - call.bias).unflatten(1, (groups, -1)).transpose(0, 1) - made
        if not bool(residual.isfinite().all() and inputs.isfinite().all()):
            raise DataError(f"what {name} reads or makes is not finite on these images")
        held_out = target.at.image % HELD_OUT == HELD_OUT - 1
        into = self.intercepts.get(name)
        choice = choose(inputs, residual, held_out, scale.unflatten(0, (groups, -1)), into is not None)
        error = choice.after / choice.before if choice.before > 0 else 1.0
        self.repairs.append(LayerRepair(name, error, choice.strength, len(held_out),
                                        inputs.shape[2]))
        if choice.correction is None:
            return call.run()
        weight.data.add_(as_weight(choice.correction.weight.to(weight.dtype), weight, call.geometry))
        if into is not None:
            sign = -1 if into.kind == "running mean" else 1
            t = self.tensors[into.into]
            t.data.add_(sign * choice.correction.intercept.flatten().to(t.dtype))
        return call.run()

    def wanted(self, name: str, target: Target) -> tuple[Tensor, Tensor]:
        """What a layer should make `(P, O)`, and by what its outputs are multiplied on their way into a sum `(O,)`."""
        out = target.out.to(self.tensors[name].device)
        ones = torch.ones_like(out[0])
        if target.stream is None or target.total is None:
            return out, ones
        module: Any = None if target.stream.norm is None else self.modules[target.stream.norm]
        scale = ones if module is None else module.weight / torch.sqrt(module.running_var + module.eps)
        if name not in self.others:
            return out, scale
        wanted = target.total.to(out.device) - self.others.pop(name)
        visible = scale.abs() > LEAST_SCALE
        if module is not None:
            wanted = (wanted - module.bias) / torch.where(visible, scale, 1.0) + module.running_mean
        return torch.where(visible, wanted, out), scale
