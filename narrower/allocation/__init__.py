"""How many channels each group should keep: the damage of removing them is measured, readers repaired, and planned with."""

from .measure import sensitivity

__all__ = ["sensitivity"]
