"""Networks outside PyTorch: `export` writes a network for another runtime, and compares what it computes there."""

from .exporting import Exported, export

__all__ = ["Exported", "export"]
