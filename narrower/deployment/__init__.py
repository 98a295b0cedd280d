"""Networks outside PyTorch: `export` writes files for other runtimes, `benchmark` times networks side by side."""

from .benchmarking import Benchmark, Timing, benchmark
from .exporting import Exported, export
from .runtimes import Runtime

__all__ = ["Benchmark", "Exported", "Runtime", "Timing", "benchmark", "export"]
