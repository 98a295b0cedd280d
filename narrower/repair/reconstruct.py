"""reconstruct: the weights that stay make up for the channels that went."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..graph.selection import Kept
from ..graph.types import table
from ..inputs import flatten_tensors, map_tensors, samples
from ..narrowing.layers import Reader
from ..narrowing.narrow import RECORD, record_biases
from ..planning.plan import Plan
from ..surgery.copying import duplicate, fresh_copy, same_tensors
from ..surgery.walk import in_eval_mode, named_tensors
from .least_squares import choose, moments
from .patches import as_weight, patches_at, values_at
from .readers import give_intercepts, losing_inputs
from .targets import Target, dense_targets
from .watching import LayerCall, LayerWatch

HELD_OUT = 4  # one image in so many decides, the others are fitted
SAMPLES_PER_INPUT = 4  # sampled positions for each input of a layer
LEAST_SAMPLES = 8192
LEAST_SCALE = 1e-6  # a BatchNorm that multiplies by less hides its layer


class LayerRepair(NamedTuple):
    """`error`: the squared error of a layer on held-out images, relative to that of its cut weights.

    `strength`: the ridge relative to the mean variance of the inputs; inf where the intercept alone helps, None where
    nothing did and the layer keeps its cut weights.
    """

    weight: str
    error: float
    strength: float | None
    samples: int


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """`model`: the repaired network. `layers`: what was gained, in the order of the forward. `left`: weights that have lost
    inputs and stay as they were cut, and why."""

    model: nn.Module
    layers: tuple[LayerRepair, ...]
    left: Mapping[str, str]

    def __str__(self) -> str:
        rows = [("weight", "samples", "error left", "ridge")]
        for r in self.layers:
            ridge = "kept as cut" if r.strength is None else f"{r.strength:g}"
            rows.append((r.weight, f"{r.samples:,}", f"{r.error:.1%}", ridge))
        return "\n".join([table(rows), *(f"left as cut: {name}: {why}" for name, why in self.left.items())])


@torch.no_grad()
def reconstruct(model: nn.Module, small: nn.Module, plan: Plan, batches: Iterable[Any], *, images: int | None = None,
                stream_targets: bool = True) -> Reconstruction:
    """Repair `small`, which `narrow(model, plan)` returned.

    Every layer that lost inputs gets the weights that best give the dense layer's output from the inputs that are left.

    Layers are solved in the order of the forward, each from the inputs that the repaired layers before it give (He et al.,
    "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, section 3.2). Ridge regression on the difference to
    the cut weights, with an intercept. Its strength, and whether a layer changes at all, is decided on every fourth image,
    which the fit does not see. `stream_targets`: where a layer's output is added to another activation, directly or through a
    BatchNorm, its target makes up for what the other summand has lost as well.

    `batches` gives what the model takes, or pairs whose first part is; no labels are needed. All of them are used, or the first
    `images` samples. The dense network runs over them batch by batch. The narrow one runs once over all of them together, so
    memory grows with their number. Do not renew BatchNorm statistics after this: the targets are in the old ones.

    Neither `model` nor `small` is changed. Raises DataError for too few images, or if an activation is not finite; PlanError
    if the model's tensors are not those that were traced.
    """
    same_tensors(model, plan.graph)
    inputs = list(samples(batches, model, images))
    count = sum(n for _, n in inputs)
    if count < 2 * HELD_OUT:
        raise DataError(f"reconstruct got {count} images: give it {2 * HELD_OUT} at least, better some hundreds")
    repaired = duplicate(small, {id(t): fresh_copy(t) for t in named_tensors(small).values()})
    kept = Kept(plan.graph, plan.keep)
    outputs, left = losing_inputs(kept)
    intercepts = give_intercepts(repaired, kept, outputs)
    if hasattr(repaired, RECORD):
        record_biases(repaired, [place.into for place in intercepts.values() if place.kind == "new bias"])
    tensors = named_tensors(repaired)
    per_image = {name: -(-max(LEAST_SAMPLES, SAMPLES_PER_INPUT * tensors[name][0].numel()) // count) for name in outputs}
    with in_eval_mode(model), in_eval_mode(repaired):
        targets, unseen = dense_targets(model, outputs, per_image, inputs)
        watch = RepairWatch(repaired, targets, intercepts, stream_targets)
        watch.run(joined_batches([x for x, _ in inputs]), count)
    return Reconstruction(repaired, tuple(watch.repairs), {**left, **unseen})


def joined_batches(batches: list[Any]) -> Any:
    """Batches as one: their tensors joined along the first dimension."""
    columns = zip(*(flatten_tensors(b) for b in batches), strict=True)
    whole = iter([torch.cat(tensors) for tensors in columns])
    return map_tensors(batches[0], lambda t: next(whole))


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
        out, name, target = call.run(), call.weight, self.targets[call.weight]
        groups = call.geometry.groups
        wanted, scale = self.wanted(name, target)
        residual = (wanted - values_at(out, target.at)).unflatten(1, (groups, -1)).transpose(0, 1)
        inputs = patches_at(call.x, call.geometry, target.at)
        if not bool(residual.isfinite().all() and inputs.isfinite().all()):
            raise DataError(f"what {name} reads or makes is not finite on these images")
        held_out = target.at.image % HELD_OUT == HELD_OUT - 1
        choice = choose(moments(inputs[:, ~held_out], residual[:, ~held_out]),
                        moments(inputs[:, held_out], residual[:, held_out]), scale.double().unflatten(0, (groups, -1)))
        error = choice.after / choice.before if choice.before > 0 else 1.0
        self.repairs.append(LayerRepair(name, error, choice.strength, len(held_out)))
        if choice.correction is None:
            return out
        weight = self.tensors[name]
        weight.data.add_(as_weight(choice.correction.weight.to(weight.dtype), weight, call.geometry))
        if (into := self.intercepts.get(name)) is not None:
            sign = -1 if into.kind == "running mean" else 1
            t = self.tensors[into.into]
            t.data.add_(sign * choice.correction.intercept.flatten().to(t.dtype))
        return call.run()

    def wanted(self, name: str, target: Target) -> tuple[Tensor, Tensor]:
        """What a layer should make `(P, O)`, and by what its outputs are multiplied on their way into a sum `(O,)`."""
        ones = torch.ones_like(target.out[0])
        if target.stream is None or target.total is None:
            return target.out, ones
        module: Any = None if target.stream.norm is None else self.modules[target.stream.norm]
        scale = ones if module is None else module.weight / torch.sqrt(module.running_var + module.eps)
        if name not in self.others:
            return target.out, scale
        wanted = target.total - self.others[name]
        visible = scale.abs() > LEAST_SCALE
        if module is not None:
            wanted = (wanted - module.bias) / torch.where(visible, scale, 1.0) + module.running_mean
        return torch.where(visible, wanted, target.out), scale
