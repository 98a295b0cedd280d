"""Networks outside PyTorch: `export` writes files for other runtimes, `benchmark` times networks, `measure_latency` layers."""

from .benchmarking import Benchmark, Timing, benchmark
from .elsewhere import read_latency_times, write_latency_jobs
from .exporting import Exported, export
from .fitting import LatencyFit, fit_latency
from .runtimes import Runtime
from .tabulating import measure_latency

__all__ = [
    "Benchmark", "Exported", "LatencyFit", "Runtime", "Timing", "benchmark", "export", "fit_latency", "measure_latency",
    "read_latency_times", "write_latency_jobs",
]
