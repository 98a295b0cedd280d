"""Distillation: the narrow network learns to give what the dense network gives."""

from .distill import Distillation
from .tuning import Tuned, tune

__all__ = ["Distillation", "Tuned", "tune"]
