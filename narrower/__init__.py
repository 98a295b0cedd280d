"""narrower makes trained convolutional networks narrower: fewer channels, the same network, proven."""

from .errors import (
    BudgetError,
    ConfigError,
    DataError,
    NarrowerError,
    PlanError,
    StorageError,
    TraceError,
    VerifyError,
)
from .folding import Folded, fold
from .forgetting import Forgetting
from .groups import ChannelGroup, Graph, Slice
from .measuring import measure, recalibrate
from .narrowing import Verification, narrow, verify
from .planning import Budget, Plan, Scores, plan
from .resrep import ResRep
from .scores.hrank import hrank
from .scores.simple import bn_scale, fpgm, magnitude, random, taylor
from .storage import load, save
from .tracing import trace

__version__ = "0.1.0"

__all__ = [
    "Budget", "BudgetError", "ChannelGroup", "ConfigError", "DataError", "Folded", "Forgetting", "Graph",
    "NarrowerError", "Plan", "PlanError", "ResRep", "Scores", "Slice", "StorageError", "TraceError", "Verification",
    "VerifyError", "bn_scale", "fold", "fpgm", "hrank", "load", "magnitude", "measure", "narrow", "plan", "random",
    "recalibrate", "save", "taylor", "trace", "verify",
]
