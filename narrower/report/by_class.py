"""Accuracy class by class: what each class of images lost or gained between two evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .facts import Facts

DENSE_STAGES = ("evaluate dense", "train dense")


class Class(NamedTuple):
    """A class with images: its name, how many they are, and the percentages that both networks classify right."""

    name: str
    images: int
    dense: float
    narrow: float

    @property
    def change(self) -> float:
        """In percentage points."""
        return self.narrow - self.dense


def classes_of(facts: Facts) -> list[Class]:
    """All classes that have images, in their order. Empty where the run has not counted by class.

    The narrow network is that of the last stage that was evaluated.
    """
    rows = [row for row in facts.rows if "by_class" in row and "epoch" not in row]
    dense, narrow = ([row["by_class"] for row in rows if (row["stage"] in DENSE_STAGES) == first] for first in (True, False))
    if not dense or not narrow:
        return []
    images, before, after = dense[-1]["images"], dense[-1]["right"], narrow[-1]["right"]
    names = facts.start.get("classes") or range(len(images))
    return [Class(str(name), count, 100 * right / count, 100 * later / count)
            for name, count, right, later in zip(names, images, before, after, strict=False) if count]


def told(classes: Sequence[Class]) -> str:
    """How many lost and gained, what most, and how much a single image is."""
    lost, gained = (sum(sign * one.change > 1e-9 for one in classes) for sign in (-1, 1))
    worst, best = min(classes, key=lambda one: one.change), max(classes, key=lambda one: one.change)
    text = f"Of {len(classes):,} classes {lost:,} lost and {gained:,} gained."
    text += f" Most lost {worst.name} ({worst.change:+.1f} points)" if lost else ""
    text += f"{' and m' if lost else ' M'}ost gained {best.name} ({best.change:+.1f})" if gained else ""
    counts = sorted(one.images for one in classes)
    middle = counts[len(counts) // 2]
    text += "." if lost or gained else ""
    images = f"{middle:,} image{'s' if middle > 1 else ''}"
    return f"{text} A class has {images} (the median): one image is {100 / middle:.1f} points."
