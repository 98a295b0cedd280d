"""Repair of narrow networks without training: the weights that stay make up for the channels that went."""

from .reconstruct import Reconstruction, reconstruct

__all__ = ["Reconstruction", "reconstruct"]
