"""Scores of channels: HRank, and scores from weights or gradients. Higher is kept."""

from .hrank import hrank
from .weights import bn_scale, fpgm, magnitude, random, taylor

__all__ = ["bn_scale", "fpgm", "hrank", "magnitude", "random", "taylor"]
