"""Distillation: the narrow network learns to give what the dense network gives."""

from .distill import Distillation

__all__ = ["Distillation"]
