"""What is asked of a network on its images: a loss to train with, and figures to report. Classification, or the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError


class Task(Protocol):
    """Loss and figures of a network's outputs against targets, which may be any nesting of tensors.

    A task may also have `logits = True`: outputs `(N, K, ...)` are class scores. Then damages, repairs and distillation compare
    class probabilities with the dense network's; other outputs are compared by their squared difference.
    """

    def loss(self, outputs: Any, targets: Any, /) -> Tensor:
        """The mean loss over the images of a batch: a scalar."""
        ...

    def measure(self, outputs: Any, targets: Any, /) -> Tensor:
        """What the figures are made of: counts, sums, a confusion matrix. Of one shape; added over batches and processes."""
        ...

    def figures(self, total: Tensor, /) -> Mapping[str, float]:
        """The figures from the sum (float64) over all images. The first is the headline: in percent, higher is better."""
        ...


class OwnTask(Task, Protocol):
    """A task with images of its own, for `--task file.py:Task`. It is made without arguments, or with `data_dir`.

    It may also have `collate`, which makes a batch `(images, targets)` of a list of samples.
    """

    input_size: tuple[int, int, int]
    """Of an image: (C, H, W)."""

    def data(self, split: str, /) -> Any:
        """Samples `(image [C, H, W], targets)` of the split "train" or "val": a map-style data set.

        Python's, NumPy's and torch's random numbers are seeded before each sample is taken: by the run's seed, the epoch and
        the index in training, by the index alone otherwise.
        """
        ...


class ByClass(TypedDict):
    """Of each class the images, and those that are classified right."""

    images: list[int]
    right: list[int]


@dataclass(frozen=True)
class Classification:
    """Cross-entropy, top-1 and top-5 of logits `[N, K]`. Targets: classes `[N]`, or the share of each class `[N, <= K]`.

    The loss raises ConfigError for outputs that are more than a tensor.
    """

    smoothing: float = 0.0
    logits = True

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        if not isinstance(outputs, Tensor):
            raise ConfigError(f"in training the network returns {type(outputs).__name__} instead of one tensor of logits: "
                              "switch auxiliary outputs off (torchvision: --model-kwargs '{\"aux_logits\": false}'), or give a "
                              "--task whose loss takes them")
        if targets.ndim == 2:  # shares; the network may have more outputs than there are classes
            targets = F.pad(targets, (0, outputs.shape[1] - targets.shape[1]))
        return F.cross_entropy(outputs, targets, label_smoothing=self.smoothing)

    def measure(self, outputs: Any, targets: Any) -> Tensor:
        """`[3 + 2 K]`: images, right, right among five; then of each class images, and right ones."""
        first = outputs.topk(min(5, outputs.shape[1]), dim=1).indices == targets[:, None]
        known = torch.stack((targets >= 0, first[:, 0])).long()  # a class below 0 is none
        whole = torch.stack((known.new_full((), len(targets)), first[:, 0].sum(), first.sum()))
        return torch.cat((whole, known.new_zeros(2, outputs.shape[1]).index_add_(1, targets.clamp(min=0), known).flatten()))

    def figures(self, total: Tensor) -> dict[str, float]:
        count, right, among = total[:3].tolist()
        return {"top1": 100 * right / max(1, count), "top5": 100 * among / max(1, count)}

    def by_class(self, total: Tensor) -> ByClass:
        """Of the sum over all images."""
        images, right = total[3:].long().view(2, -1).tolist()
        return {"images": images, "right": right}


CLASSIFICATION = Classification()
TITLES = {"top1": "top-1", "top5": "top-5"}


def titled(figure: str) -> str:
    """The name of a figure, for people."""
    return TITLES.get(figure, figure)


def has_logits(task: Task) -> bool:
    """Whether the outputs are class scores."""
    return bool(getattr(task, "logits", False))
