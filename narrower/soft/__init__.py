"""Soft pruning: channels are masked again and again during a training, may come back, and stay away in the end."""

from .soft_pruning import SoftPruning

__all__ = ["SoftPruning"]
