"""From scores and a request (a budget or rates) to a Plan: how many channels each group keeps, and which."""

from .composition import compose
from .damage import Sensitivity
from .latency import LatencyTable
from .plan import Plan, plan

__all__ = ["LatencyTable", "Plan", "Sensitivity", "compose", "plan"]
