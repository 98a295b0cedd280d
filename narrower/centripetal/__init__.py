"""Centripetal SGD: filters are trained to become identical, and then merged."""

from .centripetal_sgd import CentripetalSGD

__all__ = ["CentripetalSGD"]
