"""Distillation: a loss that draws the narrow network's outputs and features to those of the dense one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..graph.selection import Kept
from ..inputs import call_model, model_inputs
from ..planning.plan import Plan
from ..preconditions import check_number, checked
from ..repair.comparison import floats
from ..surgery.walk import in_eval_mode, tensor_shapes
from .features import Tap, Watched, find_taps


class Distillation:
    """The loss of a narrow network against the dense one that it was cut from.

    Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), section 2: the divergence of the class probabilities
    at a temperature, times its square. Romero et al., "FitNets" (ICLR 2015): features too; the plan says which channels of the
    dense network the narrow one has, so that they are compared without an adapter.

    Args:
        teacher: the dense network. It runs in eval mode, without gradients, and is never changed.
        student: the narrow network, or the one in training that will be narrow.
        plan: which channels the student has; needed for `features`.
        temperature: divides the logits of both. None: outputs are no logits, and are compared by their squared difference.
        weight: of the divergence in [0, 1]; the task's loss has the rest. 1 needs no labels.
        features: weight of the squared difference of features at the end of each stage, relative to their variance.
        logits: outputs are one tensor of class scores `(N, K, ...)` with any number of dimensions. Otherwise only `(N, K)` and
            `(N, K, H, W)` are taken for such: in the outputs of transformers, `(N, L, K)`, classes come last.

    Raises:
        ConfigError: a setting is out of range, the networks share parameters, or the teacher is narrower than the student.
    """

    @checked
    def __init__(self, teacher: nn.Module, student: nn.Module, plan: Plan | None = None, *, temperature: float | None = 4.0,
                 weight: float = 0.9, features: float = 0.0, logits: bool = False) -> None:
        for name, value, low, high in (("temperature", temperature, 1e-3, 1e3), ("weight", weight, 0, 1),
                                       ("features", features, 0, 1e6)):
            if value is not None or name != "temperature":
                check_number(name, value, low, high)
        if logits and temperature is None:
            raise ConfigError("logits=True needs temperature=")
        shared = {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}
        if teacher is student or shared:
            raise ConfigError("the teacher shares parameters with the student: give a copy of the dense network")
        check_wider(teacher, student)
        if features and plan is None:
            raise ConfigError("features need plan=: it says which of the dense channels the narrow network has")
        self.teacher, self.temperature, self.weight, self.features = teacher, temperature, weight, features
        self.logits = logits
        self.taps: list[Tap] = []
        if features and plan is not None:
            self.taps = find_taps(student, Kept(plan.graph, plan.keep))
        self.watched = Watched(student, self.taps)

    def loss(self, batch: Any, outputs: Any, task: Tensor | float = 0.0) -> Tensor:
        """The loss of a step: a scalar.

        Args:
            batch: what the student was called with, or a pair of it and the targets.
            outputs: what the student returned.
            task: the loss of the task on the same batch, such as cross-entropy. Without labels leave it out.

        Raises:
            ConfigError: outputs differ in number or shape, or are not those of the student's last forward, whose features are
                compared, or the student runs under a reentrant checkpoint, where features have no gradient.
        """
        if self.taps:
            self.check_watched(outputs)
        watching = Watched(self.teacher, self.taps)
        try:
            with torch.no_grad(), in_eval_mode(self.teacher):
                wanted = call_model(self.teacher, model_inputs(batch, self.teacher))
        finally:
            watching.close()
        total = (1 - self.weight) * task + self.weight * divergence(wanted, outputs, self.temperature, self.logits)
        return total + self.features * self.feature_error(watching.take(), self.watched.take()) if self.taps else total

    def check_watched(self, outputs: Any) -> None:
        """Raise ConfigError if the features that were kept are not those of the forward that gave these outputs, or have lost
        their gradient."""
        if any(tap.module not in self.watched.inputs for tap in self.taps):
            raise ConfigError("there are no features to compare: run the student before each loss, once for every loss")
        if not self.watched.returned(outputs):
            raise ConfigError("these outputs are not those of the student's last forward, whose features would be compared: "
                              "call loss before the student, or a copy of it, runs again")
        if blind := self.watched.without_gradients(outputs):
            raise ConfigError(f"the features that {', '.join(blind)} reads carry no gradient, as checkpoint() ran it without "
                              "one: call it with use_reentrant=False")

    def feature_error(self, dense: dict[str, Tensor], narrow: dict[str, Tensor]) -> Tensor:
        """The squared difference of the features, relative to the variance of the dense ones; the mean over taps.

        A student in training is compared on the channels that it will have. Raises ConfigError if it has some of the others
        only, as between two calls of `shrink`.
        """
        errors = []
        for k, tap in enumerate(self.taps):
            whole = dense[tap.module]
            if tap.channels.device != whole.device:  # moved once: a copy in each step would make the host wait
                tap = self.taps[k] = tap._replace(channels=tap.channels.to(whole.device))
            want, have = whole.index_select(tap.dim, tap.channels), narrow[tap.module]
            if have.shape == whole.shape != want.shape:
                have = have.index_select(tap.dim, tap.channels)
            if have.shape != want.shape:
                raise ConfigError(f"{tap.module} reads features {tuple(have.shape)} in the student, {tuple(want.shape)} by the "
                                  "plan: compare features before channels are removed, or when all of the plan's are")
            errors.append(relative_square(want, have))
        return torch.stack(errors).mean()

    def close(self) -> None:
        """Take the hooks off the student. At the end of a `with` block this happens by itself."""
        self.watched.close()

    def __enter__(self) -> Distillation:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def check_wider(teacher: nn.Module, student: nn.Module) -> None:
    """Raise ConfigError if all parameters of one name that differ in shape are smaller in the teacher: it was cut from the
    student, or as the student will be. Buffers are not asked, as some grow with the images."""
    own, other = (tensor_shapes(dict(m.named_parameters())) for m in (teacher, student))
    differ = {n: list(zip(own[n], other[n], strict=False)) for n in own.keys() & other.keys() if own[n] != other[n]}
    if differ and all(a <= b for pairs in differ.values() for a, b in pairs):
        name = min(differ)
        raise ConfigError(f"the teacher is narrower than the student: {name} is {own[name]} in it, {other[name]} in the "
                          "student; the order is Distillation(teacher, student): the dense network first")


def divergence(wanted: Any, outputs: Any, temperature: float | None = 1.0, logits: bool = False) -> Tensor:
    """How far outputs are from those that are wanted.

    For class scores `(N, K)` or `(N, K, H, W)`, with `logits` for all `(N, K, ...)`, KL(wanted || outputs) over K at a
    temperature, times its square: the mean over images and positions, in nats. For other outputs, in any nesting, and without a
    temperature, the squared error relative to the variance of what is wanted, averaged over floating tensors. Scalars are left
    out.

    Raises ConfigError if there are none, their number or shapes differ, or with `logits` they are no class scores.
    """
    want, have = floats(wanted), floats(outputs)
    if not want:
        raise ConfigError("the dense network returns no floating-point tensors with a dimension: distillation has nothing to "
                          "compare (on the command line: --no-distill)")
    if [t.shape for t in want] != [t.shape for t in have]:
        raise ConfigError(f"the dense network returns {[tuple(t.shape) for t in want]}, the narrow one "
                          f"{[tuple(t.shape) for t in have]}: distillation compares equal outputs. In a loop of your own, pass "
                          "what the dense network returns in eval mode, such as outputs[0] or outputs['out'] without an "
                          "auxiliary output; on the command line, train without it (--no-distill)")
    scores = len(want) == 1 and want[0].ndim > 1 and want[0].shape[1] > 1
    if logits and not scores:
        raise ConfigError(f"the networks return {[tuple(t.shape) for t in want]}: logits=True is for one tensor of class "
                          "scores (N, K, ...)")
    if temperature is not None and scores and (logits or want[0].ndim in (2, 4)):
        p, q = ((t.float() / temperature).log_softmax(1) for t in (want[0], have[0]))
        return F.kl_div(q, p, reduction="none", log_target=True).sum(1).mean() * temperature**2
    return torch.stack([relative_square(a, b) for a, b in zip(want, have, strict=True)]).mean()


def relative_square(want: Tensor, have: Tensor) -> Tensor:
    """The mean squared difference, relative to the variance of what is wanted. Zero for a single number, such as the output
    `(N, 1)` of a batch of one: it has no variance."""
    error = (have.float() - want.float()).square().mean()
    return error / want.float().var().clamp_min(1e-12) if want.numel() > 1 else 0 * error
