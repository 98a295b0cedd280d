"""narrower makes trained convolutional networks narrower: fewer channels, the same network, proven."""

from .allocation import sensitivity
from .batchnorm import recalibrate
from .centripetal import CentripetalSGD
from .deployment import (
    Benchmark,
    Exported,
    LatencyFit,
    Runtime,
    Timing,
    benchmark,
    export,
    fit_latency,
    measure_latency,
    read_latency_times,
    write_latency_jobs,
)
from .distillation import Distillation, Tuned, tune
from .errors import (
    BudgetError,
    ConfigError,
    DataError,
    ExportError,
    HubError,
    MissingExtraError,
    NarrowerError,
    NoiseError,
    PlanError,
    StorageError,
    TraceError,
    VerifyError,
)
from .graph import ChannelGroup, Graph, Scores, Slice
from .measuring import measure
from .narrowing import Folded, Verification, fold, narrow, verify
from .planning import LatencyTable, Plan, Sensitivity, compose, plan
from .repair import Reconstruction, reconstruct
from .resrep import Forgetting, ResRep
from .scores import bn_scale, fpgm, hrank, magnitude, obs, random, taylor
from .sharing import load
from .soft import SoftPruning
from .storage import save
from .tracing import trace

__version__ = "0.1.0"

__all__ = [
    "Benchmark", "BudgetError", "CentripetalSGD", "ChannelGroup", "ConfigError", "DataError", "Distillation", "ExportError",
    "Exported", "Folded", "Forgetting", "Graph", "HubError", "LatencyFit", "LatencyTable", "MissingExtraError", "NarrowerError",
    "NoiseError", "Plan", "PlanError", "Reconstruction", "ResRep", "Runtime", "Scores", "Sensitivity", "Slice", "SoftPruning",
    "StorageError",
    "Timing", "TraceError", "Tuned", "Verification", "VerifyError", "benchmark", "bn_scale", "compose", "export",
    "fit_latency", "fold", "fpgm", "hrank", "load", "magnitude", "measure", "measure_latency", "narrow", "obs", "plan",
    "random", "read_latency_times", "recalibrate", "reconstruct", "save", "sensitivity", "taylor", "trace", "tune",
    "verify", "write_latency_jobs",
]
