"""What is asked of a network: the figures of classification, and batches of a user's task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from narrower import ConfigError
from narrower.data import CLASSIFICATION, Classification, OwnImages, batches, hold_out

torch.manual_seed(0)
LOGITS, LABELS = torch.randn(20, 8), torch.randint(8, (20,))


def test_figures_of_parts_add_up_to_those_of_the_whole() -> None:
    whole = CLASSIFICATION.figures(CLASSIFICATION.measure(LOGITS, LABELS))
    parts = [CLASSIFICATION.measure(LOGITS[k::3], LABELS[k::3]) for k in range(3)]
    assert CLASSIFICATION.figures(torch.stack(parts).sum(0)) == whole
    assert whole["top1"] == pytest.approx(100 * float((LOGITS.argmax(1) == LABELS).float().mean()))
    ranks = (LOGITS - LOGITS.gather(1, LABELS[:, None]) > 0).sum(1)
    assert whole["top5"] == pytest.approx(100 * float((ranks < 5).float().mean()))


def test_counts_by_class_add_up_and_are_those_of_each_class() -> None:
    parts = [CLASSIFICATION.measure(LOGITS[k::3], LABELS[k::3]) for k in range(3)]
    found = CLASSIFICATION.by_class(torch.stack(parts).sum(0).double())
    assert found["images"] == LABELS.bincount(minlength=8).tolist() and sum(found["images"]) == 20
    assert found["right"] == LABELS[LOGITS.argmax(1) == LABELS].bincount(minlength=8).tolist() != found["images"]
    unknown = CLASSIFICATION.by_class(CLASSIFICATION.measure(LOGITS, torch.full_like(LABELS, -100)))
    assert sum(unknown["images"]) == sum(unknown["right"]) == 0


def test_shares_of_fewer_classes_than_outputs_are_targets_too() -> None:
    shares = F.one_hot(LABELS.clamp(max=5), 6).float()
    torch.testing.assert_close(CLASSIFICATION.loss(LOGITS, shares), CLASSIFICATION.loss(LOGITS, LABELS.clamp(max=5)))
    assert Classification(0.1).loss(LOGITS, LABELS) != CLASSIFICATION.loss(LOGITS, LABELS)


def test_a_network_with_auxiliary_outputs_in_training_is_refused() -> None:
    with pytest.raises(ConfigError, match="returns tuple instead of one tensor of logits.*aux_logits"):
        CLASSIFICATION.loss((LOGITS, LOGITS), LABELS)


class Noise:
    """Samples with two kinds of targets. Each is its number, and a random number."""

    input_size = (1, 1, 1)

    def data(self, split: str) -> Any:
        return list(range(40))

    def collate(self, samples: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        numbers = torch.tensor(samples)
        return numbers.view(-1, 1, 1, 1).float(), {"number": numbers, "two": torch.stack((numbers, -numbers), 1)}

    def loss(self, outputs: Any, targets: Any) -> torch.Tensor:
        return outputs.mean()

    measure = loss

    def figures(self, total: torch.Tensor) -> dict[str, float]:
        return {"mean": float(total)}


class Random(Noise):
    def collate(self, samples: list[Any]) -> Any:
        return torch.stack([s[0] for s in samples]), torch.stack([s[1] for s in samples])


class Drawn:
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(1, 1, 1), torch.tensor(index)


def test_images_of_a_task_are_shared_out_held_out_and_collated_by_it() -> None:
    fit, held = hold_out(OwnImages(Noise().data("train"), Noise()), 2, seed=0)
    assert held is not None and (len(fit), len(held)) == (38, 2)
    seen = [int(n) for rank in (0, 1) for _, y in batches(fit, 5, order=1, shard=(rank, 2)) for n in y["number"]]
    held_numbers = [int(n) for _, y in batches(held, 5) for n in y["number"]]
    assert sorted(seen + held_numbers) == list(range(40))
    limited = [int(n) for _, y in batches(fit, 5, order=1, limit=7) for n in y["number"]]
    assert len(limited) == 7 and limited == [int(n) for _, y in batches(fit, 38, order=1) for n in y["number"]][:7]


def test_what_is_random_in_a_sample_follows_from_seed_epoch_and_index() -> None:
    def taken(images: Any, **options: Any) -> dict[int, float]:
        return {int(k): float(v) for x, y in batches(images, 3, **options) for v, k in zip(x, y, strict=True)}

    images = OwnImages(Drawn(), Random())
    assert taken(images) == taken(images, workers=1)
    first = taken(images.augmented(1, 0))
    later = taken(images.augmented(1, 0), start=2)
    assert later and all(first[k] == v for k, v in later.items())
    assert len({taken(images)[3], first[3], taken(images.augmented(1, 1))[3], taken(images.augmented(2, 0))[3]}) == 4
