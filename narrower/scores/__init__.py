"""Scores of channels: HRank, the error that repair leaves, and scores from weights or gradients. Higher is kept."""

from .hrank import hrank
from .obs import obs
from .weights import bn_scale, fpgm, magnitude, random, taylor

__all__ = ["bn_scale", "fpgm", "hrank", "magnitude", "obs", "random", "taylor"]
