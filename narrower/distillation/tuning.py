"""tune: label-free training on the few hundred images that the repair uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..graph.selection import Kept
from ..inputs import call_model, flatten_tensors
from ..planning.plan import Plan
from ..preconditions import check_number, checked
from ..repair.comparison import Measure, divergences, measure_of
from ..repair.held_out import checked_inputs, images_at, joined, split
from ..repair.reconstruct import cut_tensors
from ..surgery.copying import independent_copy
from ..surgery.walk import in_eval_mode
from .distill import Distillation

HELD_OUT = 6  # one image in so many decides, the others are trained on
HELD_OUT_IMAGES = 128
TEMPERATURE, FEATURES = 2.0, 1.0


@dataclass(frozen=True, eq=False)
class Tuned:
    """`model`: the network that diverges least from the dense one on held-out images. `before`, `after`: the divergence there
    of the network as given and as tuned, and `measure` what it is ("kl" in nats, or "relative")."""

    model: nn.Module
    before: float
    after: float
    measure: str
    steps: int

    @property
    def kept(self) -> bool:
        """Whether the tuned network is the one that is returned."""
        return self.after < self.before

    def __str__(self) -> str:
        which = "kept" if self.kept else "not kept: the network stays as it was given"
        return f"{self.steps} steps: {self.measure} on held-out images {self.before:.4f} -> {self.after:.4f}, {which}"


@checked
@torch.inference_mode(False)  # which records gradients, also within torch.no_grad
def tune(model: nn.Module, small: nn.Module, plan: Plan, batches: Iterable[Any], *, steps: int = 300, lr: float = 2e-5,
         batch_size: int = 32, seed: int = 0, images: int | None = None, measure: Measure | None = None,
         progress: Callable[[str], None] | None = None) -> Tuned:
    """Train a copy of `small` towards the outputs and features of `model`, on images without labels.

    For a network that was cut and repaired, and a few hundred images: minutes, between no training and epochs of it (Wang et
    al., "Practical Network Acceleration with Tiny Sets", CVPR 2023). BatchNorm keeps its statistics, since the repaired weights
    are made for them; all parameters that require gradients train. Every sixth image (128 at most) is held out: the tuned
    network is kept if it diverges less from the dense one there.

    Args:
        model: the dense network. It is not changed.
        small: what `narrow` or `reconstruct` returned. It is not changed.
        plan: the plan of `narrow`.
        batches: what the model takes, or pairs whose first part is. All are kept in memory.
        steps: optimizer steps (Adam).
        lr: highest learning rate; it falls to zero as a cosine.
        batch_size: images in a step.
        seed: of the order of images.
        images: use so many of the images; None for all.
        measure: how outputs are compared, in the loss and on held-out images: "kl" (of class probabilities) or "relative"
            (squared error, for outputs that are no class scores). None: "kl" for one tensor `(N, K)`, as of a classifier.
        progress: takes a line of text after each tenth of the steps.

    Raises:
        ConfigError: a setting is out of range, no parameter requires gradients, or the loss is no longer finite.
        DataError: too few images, images that are not finite or of different shapes, or outputs that `measure` does not fit.
        PlanError: the tensors of `small` are not those that the plan leaves.
    """
    cut_tensors("tune", small, Kept(plan.graph, plan.keep))
    check_number("steps", steps, 1, whole=True)
    check_number("batch_size", batch_size, 1, whole=True)
    check_number("seed", seed, 0, whole=True)
    check_number("lr", lr, 0, inside=True)
    if not any(p.requires_grad for p in small.parameters()):
        raise ConfigError("no parameter of the network requires gradients, so there is nothing to train: call "
                          "requires_grad_(True) on it first, or on the layers that are to train")
    inputs = checked_inputs("tune", batches, model, images, 2 * HELD_OUT, "the more the better")
    fit, held_out = split(inputs, HELD_OUT, HELD_OUT_IMAGES)
    tuned = independent_copy(small)
    with torch.no_grad(), in_eval_mode(model):
        measure = measure_of(call_model(model, images_at(held_out[0][0], torch.tensor([0]))), measure)
    temperature = TEMPERATURE if measure == "kl" else None
    with in_eval_mode(tuned), Distillation(model, tuned, plan, temperature=temperature, weight=1.0, features=FEATURES,
                                           logits=measure == "kl") as loss:
        run_steps(tuned, loss, minibatches(fit, steps, batch_size, seed), Cosine(lr, steps), progress)
    (before, after), _ = divergences(model, [small, tuned], held_out, measure)
    return Tuned(tuned if after < before else small, before, after, measure, steps)


class Cosine(NamedTuple):
    """A learning rate that falls from `lr` to zero in `steps`."""

    lr: float
    steps: int

    def at(self, step: int) -> float:
        return self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def run_steps(student: nn.Module, distillation: Distillation, inputs: Iterable[Any], rate: Cosine,
              progress: Callable[[str], None] | None) -> None:
    """A step of Adam on each of the inputs, in place. Raises ConfigError if the loss is not finite.

    Losses are read together, ten times in all: reading each would make the host wait for the device in every step.
    """
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=rate.lr)
    losses: list[Tensor] = []
    for step, batch in enumerate(inputs):
        for group in optimizer.param_groups:
            group["lr"] = rate.at(step)
        loss = distillation.loss(batch, call_model(student, batch))
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tenth = (step + 1) % max(1, rate.steps // 10) == 0
        if tenth or step + 1 == rate.steps:
            values = torch.stack(losses).cpu().tolist()
            losses.clear()
            odd = [step + 2 - len(values) + k for k, value in enumerate(values) if not math.isfinite(value)]
            if odd:
                raise ConfigError(f"the loss is no longer finite at step {odd[0]} of {rate.steps}: try a lower lr")
            if tenth and progress is not None:
                progress(f"tuning: step {step + 1} of {rate.steps}, loss {values[-1]:.4f}")


def minibatches(inputs: Sequence[tuple[Any, int]], count: int, size: int, seed: int) -> Iterator[Any]:
    """`count` batches of `size` images (of all, where there are fewer). The order is drawn anew for each pass."""
    together = joined([batch for batch, _ in inputs])
    total = sum(n for _, n in inputs)
    size = min(size, total)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(total, generator=generator) for _ in range(-(-count * size // total))])
    order = order.to(flatten_tensors(together)[0].device)  # once: a copy in each step would make the host wait
    for index in order[:count * size].split(size):
        yield images_at(together, index)
